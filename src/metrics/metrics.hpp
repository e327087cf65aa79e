// SPDX-License-Identifier: Apache-2.0
// What a compressed cache is judged by, in double precision over the original values: part of the library, where
// tq_recommend measures by it, and of the command.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace tqkv_metrics {

// Widens an array of a TQ_TYPE. Exact for all of them.
void to_float(const void *source, int32_t type, int64_t count, float *destination);

// Means over vectors x with |x| > 0 and their reconstructions y.
struct VectorError {
  double sum_mse = 0;     // |x - y|^2 / |x|^2
  double sum_cosine = 0;  // <x, y> / (|x| |y|), 0 where y = 0
  int64_t count = 0;

  void add(const float *x, const float *y, int64_t dim);
  void add(const VectorError &other);
  double mse() const { return sum_mse / double(count); }
  double cosine() const { return sum_cosine / double(count); }
};

// Runs body(i) for i in [0, count), in any order, perhaps on several threads.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t)> &body)>;

struct AttentionShape {
  int64_t queries, q_heads, kv_heads, head_dim_k, head_dim_v;
  double scale;

  int64_t rows() const { return queries * q_heads; }  // row = query * q_heads + head
};

// Softmax statistics of every row over the keys seen so far; chunks of keys may come in any order.
struct WeightState {
  std::vector<double> lse;        // [rows]
  std::vector<double> mean_gain;  // [rows]: sum_j p_j (x_j - y_j), the exact logits x, the compared ones y
  std::vector<double> out;        // [rows][head_dim_v], where the compared values are given
};

// Exact causal attention over a sequence of keys that arrives in chunks.
class ExactAttention {
 public:
  // q: [queries, q_heads, head_dim_k]; positions: [queries], where in the sequence each query stands.
  ExactAttention(const AttentionShape &shape, const float *q, std::vector<int64_t> positions, ParallelFor parallel_for);

  // The keys and values at [first, first + tokens): [tokens, kv_heads, head_dim].
  void add_chunk(int64_t first, int64_t tokens, const float *k, const float *v);

  // The same chunk as another cache would see it: keys `coded`, and `exact` (optional) at those j that a query at p
  // reads exactly: j < exact_first or j > p - exact_recent. Likewise its values (optional). To be called after add_chunk
  // of that chunk.
  struct OtherCache {
    const float *coded;
    const float *exact;
    int64_t exact_first, exact_recent;
    const float *coded_v = nullptr, *exact_v = nullptr;
  };
  void compare_chunk(const OtherCache &other, WeightState &state) const;

  // Mean over rows of KL(exact weights || weights of the compared keys), in nats.
  double divergence(const WeightState &state) const;
  // |out - exact out| / |exact out| over all rows; out: [queries, q_heads, head_dim_v].
  double output_error(const float *out) const;
  // The same of the values that compare_chunk was given.
  double output_error(const WeightState &state) const;

 private:
  // Rows of one kv head come in blocks of as many as the arithmetic does at once.
  struct Block {
    int64_t kv_head, first_row, rows;  // rows of the kv head: query * group + head within the group
  };
  int64_t row_of(const Block &block, int64_t i) const;
  int64_t visible_of(const Block &block, int64_t i) const;
  void logits(size_t block, const float *keys, double *x) const;
  template <class Values>
  void add_to_row(const double *x, int64_t visible, double lse, const Values &values, double &row_lse,
                  double *out) const;
  template <class Out>
  double error_of(const Out *out) const;

  ParallelFor parallel_for_;
  AttentionShape shape_;
  std::vector<int64_t> positions_;
  std::vector<Block> blocks_;
  std::vector<double> queries_;  // [block][head_dim_k][lane], scaled
  std::vector<double> lse_;      // [rows]
  std::vector<double> out_;      // [rows][head_dim_v]

  int64_t first_ = 0, tokens_ = 0;  // the current chunk
  std::vector<double> x_;           // [block][lane][tokens]: its exact logits
  std::vector<double> chunk_lse_;   // [rows]
};

}  // namespace tqkv_metrics
