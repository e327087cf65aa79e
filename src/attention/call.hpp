// SPDX-License-Identifier: Apache-2.0
// What an attention call means, after its checks: defaults filled in, strides explicit.
#pragma once

#include "cache/pages.hpp"
#include "codec/codec.hpp"

namespace tqkv {

// [tokens, heads, channels], channels adjacent.
struct Rows {
  const uint8_t *data = nullptr;
  int type = 0;
  int64_t token_stride = 0, head_stride = 0;  // elements
  const uint8_t *row(int64_t token, int64_t head) const {
    return data + (token * token_stride + head * head_stride) * type_bytes(type);
  }
};

struct AttentionCall {
  const Codec *codec = nullptr;
  bool causal = false;
  int num_seqs = 0, num_tokens = 0, q_heads = 0, group = 1;  // group: query heads a kv head
  Rows q, k_new, v_new, out;
  const int32_t *cu_seqlens_q = nullptr, *q_positions = nullptr;
  int64_t max_q_len = 0, max_length = 0;

  Pool pool;
  const int32_t *block_table = nullptr, *block_indptr = nullptr, *block_indices = nullptr;
  int64_t table_stride = 0, table_columns = 0, num_block_indices = 0;
  const int32_t *lengths = nullptr, *starts = nullptr;

  bool has_exact = false;
  Pool exact;
  const int32_t *exact_table = nullptr;
  int64_t exact_stride = 0, exact_columns = 0, exact_first = 0, exact_recent = 0;

  float scale = 0, soft_cap = 0;
  int64_t window = 0;
  const float *sinks = nullptr, *alibi_slopes = nullptr, *key_offset = nullptr;
  float *lse = nullptr;
  tq_faults *faults = nullptr;

  // How the work is cut: keys in splits of this many tokens, at most `splits` of them.
  int64_t split_tokens = 0, splits = 1;
  bool fixed_split = false;  // the caller chose the size
  uint8_t *workspace = nullptr;
};

// Checks everything and fills `call` in; with `skip_pointers` array pointers are only tested for being given.
[[nodiscard]] tq_status make_call(const Codec &codec, const tq_attention_args &args, bool skip_pointers,
                                  AttentionCall *call);

// The parts of the workspace, in bytes from its start; `bytes` is what the call needs.
struct AttentionWorkspace {
  int64_t sequences = 0;  // int32 [num_seqs]: non-zero where the sequence has a fault
  int64_t queries = 0;    // f32 [num_tokens, q_heads, head_dim_k]: rotated and scaled
  int64_t states = 0;     // f32 [num_tokens, q_heads, splits, state]: maximum, sum, and the two outputs below
  int64_t state = 0;      // floats a state takes
  int64_t bytes = 0;
};
[[nodiscard]] tq_status attention_workspace(const AttentionCall &call, AttentionWorkspace *workspace);

void run_attention_cpu(const AttentionCall &call, const AttentionWorkspace &workspace);

void merge_states_cpu(const Codec &codec, const tq_merge_args &args);

}  // namespace tqkv
