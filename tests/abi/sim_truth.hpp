// SPDX-License-Identifier: Apache-2.0
// What a simulated engine's tokens are, and attention over them in double precision as tqkv.h defines it.
#pragma once

#include <memory>
#include <vector>

#include "support.hpp"

namespace simulator {

// One token's vectors, [kv_heads, head_dim] each, in one layer.
struct LayerToken {
  std::vector<double> given_k, given_v;  // what the model computed, exact in its type
  std::vector<double> coded_k, coded_v;  // decoded, the key offset added
  std::vector<double> raw_k, raw_v;      // rounded to the raw type
  std::vector<double> loaded_k;          // coded_k with the offset added in f32
  std::vector<double> coded_norm;        // [kv_heads]: of decoded keys, without the offset
  // Bytes of the pages: K codes, K scale, V codes, V scale of each head.
  std::vector<std::vector<uint8_t>> coded_record, raw_record;
};
struct Token {
  std::vector<LayerToken> layers;
};
using TokenPtr = std::shared_ptr<const Token>;

// One sequence of an attention call.
struct QuerySequence {
  const std::vector<TokenPtr> *tokens = nullptr;  // by position; NULL: a padding row
  int row0 = 0, q_len = 0;
  bool fault = false;  // must give zeros
};

struct Truth {
  std::vector<char> written;           // [num_tokens]: rows that belong to a sequence
  std::vector<double> out;             // [num_tokens, q_heads, head_dim_v]
  std::vector<double> lse;             // [num_tokens, q_heads]
  std::vector<double> logit;           // [num_tokens, q_heads]: largest |logit| before soft cap
  std::vector<double> query_rounding;  // [num_tokens, q_heads]: as in oracle::Attention, zeros unless asked for
};

int32_t position_of(const AttentionCall &call, const QuerySequence &sequence, size_t index, int row);
bool visible(const AttentionCall &call, size_t index, int32_t key, int32_t position);
bool in_exact_range(const AttentionCall &call, const QuerySequence &sequence, size_t index, int32_t key);

// Of the call only scalars, lengths, starts, positions, exact table, sinks and slopes are read, never pages, block
// tables, q, k_new or v_new. q: [num_tokens, q_heads, head_dim_k]. `integer_queries`: as in AttentionRun.
Truth attend(const AttentionCall &call, const oracle::Codec &codec, const std::vector<QuerySequence> &sequences,
             const std::vector<double> &q, int layer, bool integer_queries);

}  // namespace simulator
