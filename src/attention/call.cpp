// SPDX-License-Identifier: Apache-2.0
#include "attention/call.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "runtime/args.hpp"
#include "runtime/error.hpp"

namespace tqkv {
namespace {

tq_status check_bounds(int64_t value, int64_t low, const char *name) {
  if (value >= low) return TQ_OK;
  return fail(TQ_ERROR_INVALID_ARGUMENT, "args.%s is %lld; it must be at least %lld", name, (long long)value,
              (long long)low);
}

tq_status check_table(const AttentionCall &call, const tq_attention_args &args, bool skip_pointers) {
  // A query without tables says by the numbers which form it means.
  const bool csr = args.block_indptr != nullptr || args.block_indices != nullptr ||
                   (skip_pointers && args.block_table == nullptr && args.num_block_indices != 0);
  if (!skip_pointers && csr == (args.block_table != nullptr)) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, csr ? "args.block_table and args.block_indptr are both given"
                                               : "args.block_table is NULL and so is args.block_indptr");
  }
  if (!skip_pointers && csr && (args.block_indptr == nullptr || args.block_indices == nullptr)) {
    return fail(TQ_ERROR_NULL_POINTER, "args.%s is NULL",
                args.block_indptr == nullptr ? "block_indptr" : "block_indices");
  }
  TQKV_TRY(check_bounds(args.table_columns, 0, "table_columns"));
  TQKV_TRY(check_bounds(args.num_block_indices, 0, "num_block_indices"));
  if (csr && (args.table_columns != 0 || args.block_table_stride != 0)) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.table_columns and block_table_stride must be 0 with block_indptr");
  }
  if (!csr && args.num_block_indices != 0) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.num_block_indices must be 0 with block_table");
  }
  if (call.table_stride < args.table_columns && call.num_seqs > 1) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.block_table_stride is %lld, below table_columns %lld",
                (long long)call.table_stride, (long long)args.table_columns);
  }
  return TQ_OK;
}

tq_status check_exact(const Codec &codec, const tq_attention_args &args, bool skip_pointers, AttentionCall *call) {
  TQKV_TRY(check_bounds(args.exact_columns, 0, "exact_columns"));
  TQKV_TRY(check_bounds(args.exact_first_tokens, 0, "exact_first_tokens"));
  TQKV_TRY(check_bounds(args.exact_recent_tokens, 0, "exact_recent_tokens"));
  if (args.exact_pages == nullptr) {
    if (args.exact_table != nullptr || args.exact_columns != 0 || args.exact_first_tokens != 0 ||
        args.exact_recent_tokens != 0) {
      return fail(TQ_ERROR_NULL_POINTER, "args.exact_pages is NULL, but other exact fields are set");
    }
    return TQ_OK;
  }
  tq_pages pages{};
  TQKV_TRY(read_struct(args.exact_pages, "args.exact_pages", &pages));
  TQKV_TRY(check_pages(codec, TQ_PAGES_EXACT, &pages, "args.exact_pages", skip_pointers, &call->exact));
  if (!skip_pointers && args.exact_table == nullptr)
    return fail(TQ_ERROR_NULL_POINTER, "args.exact_table is NULL with exact_pages");
  call->has_exact = true;
  call->exact_table = args.exact_table;
  call->exact_columns = args.exact_columns;
  call->exact_stride = args.exact_table_stride != 0 ? args.exact_table_stride : args.exact_columns;
  if (call->exact_stride < args.exact_columns && call->num_seqs > 1) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.exact_table_stride is %lld, below exact_columns %lld",
                (long long)call->exact_stride, (long long)args.exact_columns);
  }
  call->exact_first = args.exact_first_tokens;
  call->exact_recent = args.exact_recent_tokens;
  return TQ_OK;
}

tq_status check_numbers(const tq_attention_args &args) {
  if (!std::isfinite(args.scale)) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.scale is %g; it must be finite", double(args.scale));
  }
  if (!std::isfinite(args.soft_cap) || args.soft_cap < 0) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.soft_cap is %g; it must be finite and at least 0",
                double(args.soft_cap));
  }
  TQKV_TRY(check_bounds(args.window_tokens, 0, "window_tokens"));
  if (args.split_tokens < 0 || args.split_tokens % kTileTokens != 0) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.split_tokens is %d; it must be 0 or a multiple of %d",
                args.split_tokens, kTileTokens);
  }
  return TQ_OK;
}

// Without a fixed split size, enough pieces for a machine of many cores, and none below 1024 keys. It depends on the
// call's bounds only.
void choose_splits(const tq_attention_args &args, AttentionCall *call) {
  const int64_t length = std::max<int64_t>(call->max_length, 1);
  call->fixed_split = args.split_tokens != 0;
  if (call->fixed_split) {
    call->split_tokens = args.split_tokens;
  } else {
    constexpr int64_t kPieces = 64, kLeastTokens = 1024;
    const int64_t pieces = std::max<int64_t>(1, int64_t{call->num_tokens} * call->q_heads / 4);
    const int64_t splits = std::clamp<int64_t>(kPieces / pieces, 1, kPieces);
    const int64_t tokens = std::max(kLeastTokens, (length + splits - 1) / splits);
    call->split_tokens = (tokens + kTileTokens - 1) / kTileTokens * kTileTokens;
  }
  call->splits = (length + call->split_tokens - 1) / call->split_tokens;
}

}  // namespace

tq_status make_call(const Codec &codec, const tq_attention_args &args, bool skip_pointers, AttentionCall *result) {
  AttentionCall call;
  call.codec = &codec;
  if ((args.flags & ~TQ_ATTENTION_CAUSAL) != 0) {
    return fail(TQ_ERROR_UNKNOWN_ENUM, "args.flags is %#x; only TQ_ATTENTION_CAUSAL is known", unsigned(args.flags));
  }
  if (args.reserved != 0) {
    return fail(TQ_ERROR_RESERVED_NOT_ZERO, "args.reserved is %d, must be zero", args.reserved);
  }
  call.causal = (args.flags & TQ_ATTENTION_CAUSAL) != 0;
  TQKV_TRY(check_bounds(args.num_seqs, 0, "num_seqs"));
  TQKV_TRY(check_bounds(args.num_tokens, 0, "num_tokens"));
  if (args.q_heads <= 0 || args.q_heads % codec.kv_heads != 0) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.q_heads is %d; it must be a positive multiple of kv_heads, %d",
                args.q_heads, codec.kv_heads);
  }
  TQKV_TRY(check_type(args.q_type, "args.q_type"));
  TQKV_TRY(check_type(args.out_type, "args.out_type"));
  if (args.cu_seqlens_q == nullptr && args.num_tokens != args.num_seqs) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "args.num_tokens is %d and num_seqs %d; without cu_seqlens_q they are equal",
                args.num_tokens, args.num_seqs);
  }
  TQKV_TRY(check_bounds(args.max_q_len, 0, "max_q_len"));
  TQKV_TRY(check_bounds(args.max_length_tokens, 0, "max_length_tokens"));
  TQKV_TRY(check_numbers(args));
  call.num_seqs = args.num_seqs;
  call.num_tokens = args.num_tokens;
  call.q_heads = args.q_heads;
  call.group = args.q_heads / codec.kv_heads;
  call.cu_seqlens_q = args.cu_seqlens_q;
  call.q_positions = args.q_positions;
  call.max_q_len = args.cu_seqlens_q == nullptr ? 1 : args.max_q_len != 0 ? args.max_q_len : args.num_tokens;

  if (args.pages == nullptr) return fail(TQ_ERROR_NULL_POINTER, "args.pages is NULL");
  tq_pages pages{};
  TQKV_TRY(read_struct(args.pages, "args.pages", &pages));
  TQKV_TRY(check_pages(codec, TQ_PAGES_CODED, &pages, "args.pages", skip_pointers, &call.pool));
  call.block_table = args.block_table;
  call.block_indptr = args.block_indptr;
  call.block_indices = args.block_indices;
  call.table_columns = args.table_columns;
  call.table_stride = args.block_table_stride != 0 ? args.block_table_stride : args.table_columns;
  call.num_block_indices = args.num_block_indices;
  TQKV_TRY(check_table(call, args, skip_pointers));
  TQKV_TRY(check_exact(codec, args, skip_pointers, &call));
  if ((args.k_new == nullptr) != (args.v_new == nullptr)) {
    return fail(TQ_ERROR_NULL_POINTER, "args.%s is NULL; k_new and v_new go together",
                args.k_new == nullptr ? "k_new" : "v_new");
  }

  // Strides, and with them every array's extent.
  const int heads = codec.kv_heads;
  const auto rows = [&](const void *data, int type, int64_t token_stride, int64_t head_stride, int count, int head_dim,
                        const char *name, Rows *view) {
    view->data = static_cast<const uint8_t *>(data);
    view->type = type;
    return check_rows(data, type, call.num_tokens, count, head_dim, token_stride, head_stride, name, skip_pointers,
                      &view->token_stride, &view->head_stride);
  };
  TQKV_TRY(rows(args.q, args.q_type, args.q_token_stride, args.q_head_stride, args.q_heads, codec.k.head_dim, "args.q",
                &call.q));
  TQKV_TRY(rows(args.out, args.out_type, args.out_token_stride, args.out_head_stride, args.q_heads, codec.v.head_dim,
                "args.out", &call.out));
  if (args.k_new != nullptr) {
    TQKV_TRY(rows(args.k_new, args.q_type, args.k_new_token_stride, args.k_new_head_stride, heads, codec.k.head_dim,
                  "args.k_new", &call.k_new));
    TQKV_TRY(rows(args.v_new, args.q_type, args.v_new_token_stride, args.v_new_head_stride, heads, codec.v.head_dim,
                  "args.v_new", &call.v_new));
  }
  if (!skip_pointers && call.num_seqs > 0 && args.lengths == nullptr) {
    return fail(TQ_ERROR_NULL_POINTER, "args.lengths is NULL");
  }
  struct Aligned {
    const void *pointer;
    const char *name;
  };
  for (const Aligned &array :
       {Aligned{args.cu_seqlens_q, "cu_seqlens_q"}, Aligned{args.q_positions, "q_positions"},
        Aligned{args.block_table, "block_table"}, Aligned{args.block_indptr, "block_indptr"},
        Aligned{args.block_indices, "block_indices"}, Aligned{args.lengths, "lengths"}, Aligned{args.starts, "starts"},
        Aligned{args.exact_table, "exact_table"}, Aligned{args.sinks, "sinks"},
        Aligned{args.alibi_slopes, "alibi_slopes"}, Aligned{args.key_offset, "key_offset"}, Aligned{args.lse, "lse"}}) {
    if (!skip_pointers) TQKV_TRY(check_aligned(array.pointer, 4, "args.", array.name));
  }
  if (!skip_pointers) TQKV_TRY(check_aligned(args.faults, 8, "args.", "faults"));
  call.lengths = args.lengths;
  call.starts = args.starts;
  call.scale = args.scale != 0 ? args.scale : float(1 / std::sqrt(double(codec.k.head_dim)));
  call.soft_cap = args.soft_cap;
  call.window = args.window_tokens;
  call.sinks = args.sinks;
  call.alibi_slopes = args.alibi_slopes;
  call.key_offset = args.key_offset;
  call.lse = args.lse;
  call.faults = args.faults;

  const int64_t blocks = std::max(call.table_columns, call.num_block_indices);  // one of them is 0
  int64_t capacity = 0;
  if (__builtin_mul_overflow(blocks, int64_t{codec.block_size}, &capacity)) capacity = INT64_MAX;
  capacity = std::min<int64_t>(capacity, INT32_MAX);
  if (args.k_new != nullptr) capacity = std::min<int64_t>(capacity + call.max_q_len, INT32_MAX);
  call.max_length = args.max_length_tokens != 0 ? args.max_length_tokens : capacity;
  choose_splits(args, &call);
  *result = call;
  return TQ_OK;
}

tq_status attention_workspace(const AttentionCall &call, AttentionWorkspace *workspace) {
  const auto times = [](int64_t a, int64_t b, int64_t c, int64_t d, int64_t *product) {
    return !__builtin_mul_overflow(a, b, product) && !__builtin_mul_overflow(*product, c, product) &&
           !__builtin_mul_overflow(*product, d, product);
  };
  AttentionWorkspace result;
  result.state = 2 + 2 * int64_t{call.codec->v.head_dim};
  int64_t queries = 0, states = 0;
  if (!times(call.num_tokens, call.q_heads, call.codec->k.head_dim, 4, &queries) ||
      !times(int64_t{call.num_tokens} * call.q_heads, call.splits, result.state, 4, &states) ||
      states > INT64_MAX - queries - (int64_t{1} << 40)) {
    return fail(TQ_ERROR_OVERFLOW, "%d tokens, %d heads and %lld splits of the context overflow 63 bits of workspace",
                call.num_tokens, call.q_heads, (long long)call.splits);
  }
  const auto align = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  result.queries = result.sequences + align(int64_t{call.num_seqs} * 4);
  result.states = result.queries + align(queries);
  result.bytes = result.states + align(states);
  *workspace = result;
  return TQ_OK;
}

}  // namespace tqkv
