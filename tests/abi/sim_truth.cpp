// SPDX-License-Identifier: Apache-2.0
#include "sim_truth.hpp"

#include <algorithm>

namespace simulator {

int32_t position_of(const AttentionCall &call, const QuerySequence &sequence, size_t index, int row) {
  if (!call.q_positions.empty()) return call.q_positions[size_t(row)];
  return call.lengths[index] - sequence.q_len + (row - sequence.row0);
}

bool visible(const AttentionCall &call, size_t index, int32_t key, int32_t position) {
  if (key >= call.lengths[index] || (!call.starts.empty() && key < call.starts[index])) return false;
  if ((call.args.flags & TQ_ATTENTION_CAUSAL) != 0 && key > position) return false;
  return call.args.window_tokens == 0 || position - key < call.args.window_tokens;
}

bool in_exact_range(const AttentionCall &call, const QuerySequence &sequence, size_t index, int32_t key) {
  const int32_t start = call.starts.empty() ? 0 : std::max(call.starts[index], 0);
  const int32_t first_query = position_of(call, sequence, index, sequence.row0);
  return key - start < call.args.exact_first_tokens || key > first_query - call.args.exact_recent_tokens;
}

Truth attend(const AttentionCall &call, const oracle::Codec &codec, const std::vector<QuerySequence> &sequences,
             const std::vector<double> &q, int layer, bool integer_queries) {
  const tq_attention_args &args = call.args;
  const size_t dk = size_t(codec.k.head_dim), dv = size_t(codec.v.head_dim), heads = size_t(args.q_heads);
  const size_t group = heads / size_t(codec.kv_heads);
  const double scale = args.scale != 0 ? double(args.scale) : 1 / std::sqrt(double(dk));
  Truth truth;
  truth.written.assign(size_t(args.num_tokens), 0);
  truth.out.assign(size_t(args.num_tokens) * heads * dv, 0.0);
  truth.lse.assign(size_t(args.num_tokens) * heads, -std::numeric_limits<double>::infinity());
  truth.logit.assign(size_t(args.num_tokens) * heads, 0.0);
  truth.query_rounding.assign(size_t(args.num_tokens) * heads, 0.0);

  struct Key {
    int32_t position;
    const double *k, *v;
    const double *coded_norm;  // [kv_heads]; null where the key is read raw
  };
  for (size_t s = 0; s < sequences.size(); ++s) {
    const QuerySequence &sequence = sequences[s];
    const int32_t length = call.lengths[s];
    for (int row = sequence.row0; row < sequence.row0 + sequence.q_len; ++row) truth.written[size_t(row)] = 1;
    if (sequence.fault || sequence.q_len == 0) continue;

    std::vector<Key> keys;
    for (int32_t j = 0; j < length; ++j) {
      const Token *token = (*sequence.tokens)[size_t(j)].get();
      if (!token) continue;  // left padding
      const LayerToken &vectors = token->layers[size_t(layer)];
      bool exact = false;
      if (call.exact_pool && in_exact_range(call, sequence, s, j)) {
        const int64_t stride = args.exact_table_stride ? args.exact_table_stride : args.exact_columns;
        const int64_t column = j / codec.exact_block_size;
        exact = column < args.exact_columns && call.exact_table[s * size_t(stride) + size_t(column)] >= 0;
      }
      if (!call.k_new.empty() && j >= length - sequence.q_len) {
        keys.push_back({j, vectors.given_k.data(), vectors.given_v.data(), nullptr});
      } else if (exact) {
        keys.push_back({j, vectors.raw_k.data(), vectors.raw_v.data(), nullptr});
      } else {
        keys.push_back({j, vectors.coded_k.data(), vectors.coded_v.data(), vectors.coded_norm.data()});
      }
    }

    std::vector<double> x;
    for (int row = sequence.row0; row < sequence.row0 + sequence.q_len; ++row) {
      const int32_t p = position_of(call, sequence, s, row);
      for (size_t h = 0; h < heads; ++h) {
        const size_t index = size_t(row) * heads + h, kv_head = h / group;
        const double *query = q.data() + index * dk;
        x.clear();
        double maximum = call.sinks.empty() ? -std::numeric_limits<double>::infinity() : double(call.sinks[h]);
        bool any = false;
        for (const Key &key : keys) {
          x.push_back(-std::numeric_limits<double>::infinity());
          if (!visible(call, s, key.position, p)) continue;
          any = true;
          const double *k = key.k + kv_head * dk;
          double sum[4] = {};
          for (size_t c = 0; c < dk; c += 4) {
            for (size_t i = 0; i < 4; ++i) sum[i] += query[c + i] * k[c + i];
          }
          double logit = scale * (sum[0] + sum[1] + sum[2] + sum[3]);
          truth.logit[index] = std::max(truth.logit[index], std::fabs(logit));
          if (args.soft_cap > 0) logit = double(args.soft_cap) * std::tanh(logit / double(args.soft_cap));
          if (!call.alibi_slopes.empty()) logit += double(call.alibi_slopes[h]) * (key.position - p);
          x.back() = logit;
          maximum = std::max(maximum, logit);
        }
        if (!any) continue;
        double z = call.sinks.empty() ? 0 : std::exp(double(call.sinks[h]) - maximum);
        double *out = truth.out.data() + index * dv;
        double largest_norm = 0;
        for (size_t j = 0; j < keys.size(); ++j) {
          const double weight = std::exp(x[j] - maximum);
          if (weight == 0) continue;
          z += weight;
          if (weight > 1e-9 && keys[j].coded_norm) largest_norm = std::max(largest_norm, keys[j].coded_norm[kv_head]);
          const double *v = keys[j].v + kv_head * dv;
          for (size_t c = 0; c < dv; ++c) out[c] += weight * v[c];
        }
        for (size_t c = 0; c < dv; ++c) out[c] /= z;
        truth.lse[index] = maximum + std::log(z);
        if (integer_queries && largest_norm > 0) {
          truth.query_rounding[index] = oracle::query_rounding(codec.k, {query, query + dk}, scale, largest_norm);
        }
      }
    }
  }
  return truth;
}

}  // namespace simulator
