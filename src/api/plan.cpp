// SPDX-License-Identifier: Apache-2.0
#include "plan/plan.hpp"

#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "attention/call.hpp"
#include "codec/quantize.hpp"
#include "plan/recommend.hpp"
#include "runtime/args.hpp"
#include "runtime/error.hpp"

using namespace tqkv;

namespace {

tq_status check_range(int64_t value, int64_t high, const char *name) {
  if (value >= 0 && value <= high) return TQ_OK;
  return fail(TQ_ERROR_INVALID_ARGUMENT, "args.%s is %lld; it must be 0 to %lld", name, (long long)value,
              (long long)high);
}

tq_status check_args(const tq_plan_args &args) {
  TQKV_TRY(check_block_size(args.block_size_tokens, "args.block_size_tokens"));
  if (args.config_json == nullptr) return fail(TQ_ERROR_NULL_POINTER, "args.config_json is NULL");
  // Lengths and numbers of sequences are int32 in every call.
  TQKV_TRY(check_range(args.context_tokens, INT32_MAX, "context_tokens"));
  TQKV_TRY(check_range(args.batch, INT32_MAX, "batch"));
  TQKV_TRY(check_range(args.memory_bytes, INT64_MAX, "memory_bytes"));
  TQKV_TRY(check_range(args.exact_first_tokens, INT32_MAX, "exact_first_tokens"));
  return check_range(args.exact_recent_tokens, INT32_MAX, "exact_recent_tokens");
}

// What tq_attention_workspace says of a decode step of `batch` sequences with tables for `context` tokens. The codec is
// only a shape here: no bits decide the workspace, and bf16 and fp8 caches are compared as if they were attended alike.
tq_status decode_workspace(const Layer &layer, int block_size, int64_t batch, int64_t context, int64_t *bytes) {
  Codec codec;
  codec.kv_heads = int(layer.kv_heads);
  codec.block_size = block_size;
  codec.k.head_dim = int(layer.head_dim_k);
  codec.v.head_dim = int(layer.head_dim_v);
  codec.k.bits = codec.v.bits = kRawBits;
  tq_pages pages{};
  pages.struct_size = sizeof pages;
  const int32_t table = 0;
  tq_attention_args args{};
  args.num_seqs = args.num_tokens = int32_t(batch);
  args.q_heads = int32_t(layer.q_heads);
  args.q_type = args.out_type = TQ_TYPE_BF16;
  args.pages = &pages;
  args.block_table = &table;
  args.table_columns = (context + block_size - 1) / block_size;
  AttentionCall call;
  AttentionWorkspace workspace;
  TQKV_TRY(make_call(codec, args, true, &call));
  TQKV_TRY(attention_workspace(call, &workspace));
  *bytes = workspace.bytes;
  return TQ_OK;
}

// A text for the caller, as tq_plan's comment says; called before anything is written.
tq_status check_text(const std::string &text, const char *json, size_t json_capacity, size_t *json_bytes) {
  const size_t bytes = text.size() + 1;
  if (json_bytes != nullptr) *json_bytes = bytes;
  if (json == nullptr || json_capacity >= bytes) return TQ_OK;
  return fail(TQ_ERROR_INVALID_ARGUMENT, "json_capacity is %zu; the text takes %zu bytes", json_capacity, bytes);
}

tq_status check_target(double value, const char *name) {
  if (value >= 0 && value <= 1e300) return TQ_OK;
  return fail(TQ_ERROR_INVALID_ARGUMENT, "args.%s is %g; it must be finite and at least 0", name, value);
}

// Everything but the values of the arrays. Absent fields get their defaults.
tq_status check_args(tq_recommend_args &args) {
  TQKV_TRY(check_type(args.type, "args.type"));
  if (args.num_tokens < 1 || args.num_tokens > INT32_MAX) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.num_tokens is %lld; it must be 1 to 2^31 - 1",
                (long long)args.num_tokens);
  }
  if (args.kv_heads == 0) args.kv_heads = 1;
  if (args.kv_heads < 1 || args.kv_heads > 1024) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.kv_heads is %d; it must be 1 to 1024", args.kv_heads);
  }
  if (args.head_dim_v == 0) args.head_dim_v = args.head_dim_k;
  for (const auto &[dim, name] : {std::pair{args.head_dim_k, "head_dim_k"}, std::pair{args.head_dim_v, "head_dim_v"}}) {
    if (dim >= 16 && dim <= kMaxHeadDim && dim % 16 == 0) continue;
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.%s is %d; it must be a multiple of 16 from 16 to %d", name, dim,
                kMaxHeadDim);
  }
  TQKV_TRY(check_rows(args.k, args.type, args.num_tokens, args.kv_heads, args.head_dim_k, args.k_token_stride,
                      args.k_head_stride, "args.k", false, &args.k_token_stride, &args.k_head_stride));
  TQKV_TRY(check_rows(args.v, args.type, args.num_tokens, args.kv_heads, args.head_dim_v, args.v_token_stride,
                      args.v_head_stride, "args.v", false, &args.v_token_stride, &args.v_head_stride));
  if (args.q == nullptr) {
    if (args.num_queries != 0 || args.q_heads != 0) {
      return fail(TQ_ERROR_NULL_POINTER, "args.q is NULL, but num_queries is %lld and q_heads %d",
                  (long long)args.num_queries, args.q_heads);
    }
    if (args.max_kl != 0) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "args.max_kl is %g; the KL of attention weights needs queries in args.q",
                  args.max_kl);
    }
  } else {
    if (args.num_queries < 1 || args.num_queries > args.num_tokens) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "args.num_queries is %lld; it must be 1 to num_tokens, %lld",
                  (long long)args.num_queries, (long long)args.num_tokens);
    }
    if (args.q_heads < 1 || args.q_heads > 65536 || args.q_heads % args.kv_heads != 0) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "args.q_heads is %d; it must be a multiple of kv_heads, %d, up to 65536",
                  args.q_heads, args.kv_heads);
    }
    TQKV_TRY(check_rows(args.q, args.type, args.num_queries, args.q_heads, args.head_dim_k, args.q_token_stride,
                        args.q_head_stride, "args.q", false, &args.q_token_stride, &args.q_head_stride));
  }
  if (!std::isfinite(args.scale)) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.scale is %g; it must be finite", double(args.scale));
  }
  TQKV_TRY(check_range(args.threads, 1024, "threads"));
  TQKV_TRY(check_target(args.max_output_error, "max_output_error"));
  TQKV_TRY(check_target(args.max_kl, "max_kl"));
  TQKV_TRY(check_target(args.max_bytes_per_token, "max_bytes_per_token"));
  TQKV_TRY(check_range(args.context_tokens, INT32_MAX, "context_tokens"));
  if (args.exact_first_tokens == -1) {
    if (args.exact_recent_tokens == 0) return TQ_OK;
    return fail(TQ_ERROR_INVALID_ARGUMENT,
                "args.exact_recent_tokens is %d; it must be 0 where exact_first_tokens is -1",
                args.exact_recent_tokens);
  }
  TQKV_TRY(check_range(args.exact_first_tokens, INT32_MAX, "exact_first_tokens"));
  return check_range(args.exact_recent_tokens, INT32_MAX, "exact_recent_tokens");
}

}  // namespace

tq_status tq_plan(const tq_plan_args *given, tq_plan_result *result, char *json, size_t json_capacity,
                  size_t *json_bytes) {
  return guard([&]() -> tq_status {
    tq_plan_args args{};
    TQKV_TRY(read_struct(given, "args", &args));
    TQKV_TRY(check_args(args));
    tq_plan_result plan{};
    std::string text;
    TQKV_TRY(make_plan(args, decode_workspace, &plan, &text));
    TQKV_TRY(check_text(text, json, json_capacity, json_bytes));
    TQKV_TRY(write_struct(plan, result, "result"));
    if (json != nullptr) std::memcpy(json, text.c_str(), text.size() + 1);
    return TQ_OK;
  });
}

tq_status tq_recommend(const tq_recommend_args *given, tq_recommend_result *result, char *json, size_t json_capacity,
                       size_t *json_bytes) {
  return guard([&]() -> tq_status {
    tq_recommend_args args{};
    TQKV_TRY(read_struct(given, "args", &args));
    TQKV_TRY(check_args(args));
    tq_recommend_result recommendation{};
    std::string text;
    TQKV_TRY(make_recommendation(args, &recommendation, &text));
    TQKV_TRY(check_text(text, json, json_capacity, json_bytes));
    TQKV_TRY(write_struct(recommendation, result, "result"));
    if (json != nullptr) std::memcpy(json, text.c_str(), text.size() + 1);
    return TQ_OK;
  });
}
