// SPDX-License-Identifier: Apache-2.0
#include "plan/plan.hpp"

#include <cstring>
#include <string>

#include "attention/call.hpp"
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
    const size_t bytes = text.size() + 1;
    if (json_bytes != nullptr) *json_bytes = bytes;
    if (json != nullptr && json_capacity < bytes) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "json_capacity is %zu; the text takes %zu bytes", json_capacity, bytes);
    }
    TQKV_TRY(write_struct(plan, result, "result"));
    if (json != nullptr) std::memcpy(json, text.c_str(), bytes);
    return TQ_OK;
  });
}
