// SPDX-License-Identifier: Apache-2.0
#include "metrics.hpp"

#include <tqkv/tqkv.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

namespace tqkv_metrics {
namespace {

constexpr int64_t kLanes = 8;
constexpr double kNothing = -std::numeric_limits<double>::infinity();
using Lanes [[gnu::vector_size(kLanes * sizeof(double))]] = double;

float half_to_float(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  // A half's exponent and fraction, read as a float's, are 2^112 too small; subnormals come out right as well.
  const uint32_t bits = (half & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000
                                                  : std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>(bits | sign);
}

double log_add(double a, double b) {
  const double m = std::max(a, b);
  return m == kNothing ? m : m + std::log(std::exp(a - m) + std::exp(b - m));
}

// log sum exp of x[0, count)
double log_sum_exp(const double *x, int64_t count) {
  if (count == 0) return kNothing;
  const double m = *std::max_element(x, x + count);
  double z = 0;
  for (int64_t j = 0; j < count; ++j) z += std::exp(x[j] - m);
  return m + std::log(z);
}

// Weight of a part with log-sum-exp `part` in the whole.
double share(double part, double whole) {
  return part == kNothing ? 0 : std::exp(part - whole);
}

}  // namespace

void to_float(const void *source, int32_t type, int64_t count, float *destination) {
  if (type == TQ_TYPE_F32) {
    std::memcpy(destination, source, size_t(count) * sizeof(float));
    return;
  }
  const auto *in = static_cast<const uint16_t *>(source);
  if (type == TQ_TYPE_BF16) {
    for (int64_t i = 0; i < count; ++i) destination[i] = std::bit_cast<float>(uint32_t(in[i]) << 16);
  } else {
    for (int64_t i = 0; i < count; ++i) destination[i] = half_to_float(in[i]);
  }
}

void VectorError::add(const float *x, const float *y, int64_t dim) {
  double xx = 0, yy = 0, xy = 0, ee = 0;
  for (int64_t c = 0; c < dim; ++c) {
    const double a = x[c], b = y[c];
    xx += a * a;
    yy += b * b;
    xy += a * b;
    ee += (a - b) * (a - b);
  }
  if (xx == 0) return;
  sum_mse += ee / xx;
  sum_cosine += yy == 0 ? 0 : xy / std::sqrt(xx * yy);
  ++count;
}

void VectorError::add(const VectorError &other) {
  sum_mse += other.sum_mse;
  sum_cosine += other.sum_cosine;
  count += other.count;
}

ExactAttention::ExactAttention(const AttentionShape &shape, const float *q, std::vector<int64_t> positions,
                               ParallelFor parallel_for)
    : parallel_for_(std::move(parallel_for)),
      shape_(shape),
      positions_(std::move(positions)),
      lse_(size_t(shape.rows()), kNothing),
      out_(size_t(shape.rows() * shape.head_dim_v), 0.0),
      chunk_lse_(size_t(shape.rows()), kNothing) {
  const int64_t group = shape_.q_heads / shape_.kv_heads, rows = shape_.queries * group, dim = shape_.head_dim_k;
  for (int64_t g = 0; g < shape_.kv_heads; ++g) {
    for (int64_t r = 0; r < rows; r += kLanes) blocks_.push_back({g, r, std::min(kLanes, rows - r)});
  }
  queries_.assign(blocks_.size() * size_t(dim * kLanes), 0.0);
  for (size_t b = 0; b < blocks_.size(); ++b) {
    for (int64_t i = 0; i < blocks_[b].rows; ++i) {
      const float *row = q + row_of(blocks_[b], i) * dim;
      for (int64_t c = 0; c < dim; ++c)
        queries_[(b * size_t(dim) + size_t(c)) * kLanes + size_t(i)] = row[c] * shape_.scale;
    }
  }
}

int64_t ExactAttention::row_of(const Block &block, int64_t i) const {
  const int64_t group = shape_.q_heads / shape_.kv_heads, r = block.first_row + i;
  return r / group * shape_.q_heads + block.kv_head * group + r % group;
}

int64_t ExactAttention::visible_of(const Block &block, int64_t i) const {
  const int64_t position = positions_[size_t(row_of(block, i) / shape_.q_heads)];
  return std::clamp<int64_t>(position - first_ + 1, 0, tokens_);
}

// x[lane][token] = scale * <q, k>
void ExactAttention::logits(size_t block, const float *keys, double *x) const {
  constexpr int64_t kKeys = 2;
  const int64_t dim = shape_.head_dim_k, stride = shape_.kv_heads * dim;
  const double *q = queries_.data() + block * size_t(dim * kLanes);
  keys += blocks_[block].kv_head * dim;
  for (int64_t j = 0; j < tokens_; j += kKeys) {
    const float *key[kKeys] = {keys + j * stride, keys + std::min(j + 1, tokens_ - 1) * stride};
    Lanes sums[kKeys] = {};
    for (int64_t c = 0; c < dim; ++c) {
      Lanes lanes;
      std::memcpy(&lanes, q + c * kLanes, sizeof lanes);
      for (int64_t u = 0; u < kKeys; ++u) sums[u] += lanes * double(key[u][c]);
    }
    for (int64_t u = 0; u < kKeys && j + u < tokens_; ++u) {
      for (int64_t i = 0; i < kLanes; ++i) x[i * tokens_ + j + u] = sums[u][i];
    }
  }
}

// Attention over keys with logits x[0, visible), whose log-sum-exp is `lse`, joins what a row has of earlier ones.
// values(j) is where the value of key j begins.
template <class Values>
void ExactAttention::add_to_row(const double *x, int64_t visible, double lse, const Values &values, double &row_lse,
                                double *out) const {
  const int64_t dim = shape_.head_dim_v;
  const double whole = log_add(row_lse, lse), before = share(row_lse, whole);
  for (int64_t c = 0; c < dim; ++c) out[c] *= before;
  for (int64_t j = 0; j < visible; ++j) {
    const double weight = std::exp(x[j] - whole);
    const float *value = values(j);
    for (int64_t c = 0; c < dim; ++c) out[c] += weight * value[c];
  }
  row_lse = whole;
}

void ExactAttention::add_chunk(int64_t first, int64_t tokens, const float *k, const float *v) {
  first_ = first;
  tokens_ = tokens;
  x_.resize(blocks_.size() * size_t(kLanes * tokens));
  const int64_t dim = shape_.head_dim_v;
  parallel_for_(int64_t(blocks_.size()), [&](int64_t b) {
    const Block &block = blocks_[size_t(b)];
    double *x = x_.data() + b * kLanes * tokens;
    logits(size_t(b), k, x);
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t row = row_of(block, i), visible = visible_of(block, i);
      chunk_lse_[size_t(row)] = log_sum_exp(x + i * tokens, visible);
      add_to_row(
          x + i * tokens, visible, chunk_lse_[size_t(row)],
          [&](int64_t j) { return v + (j * shape_.kv_heads + block.kv_head) * dim; }, lse_[size_t(row)],
          out_.data() + row * dim);
    }
  });
}

void ExactAttention::compare_chunk(const OtherCache &cache, WeightState &state) const {
  const int64_t dim = shape_.head_dim_v;
  if (state.lse.empty()) {
    state.lse.assign(size_t(shape_.rows()), kNothing);
    state.mean_gain.assign(size_t(shape_.rows()), 0.0);
    if (cache.coded_v) state.out.assign(size_t(shape_.rows() * dim), 0.0);
  }
  parallel_for_(int64_t(blocks_.size()), [&](int64_t b) {
    const Block &block = blocks_[size_t(b)];
    std::vector<double> y(size_t(kLanes * tokens_)), exact_y;
    logits(size_t(b), cache.coded, y.data());
    if (cache.exact) {
      exact_y.resize(y.size());
      logits(size_t(b), cache.exact, exact_y.data());
    }
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t row = row_of(block, i), visible = visible_of(block, i);
      if (visible == 0) continue;
      const double *x = x_.data() + (b * kLanes + i) * tokens_;
      double *other = y.data() + i * tokens_;
      const int64_t recent = positions_[size_t(row / shape_.q_heads)] - cache.exact_recent - first_;
      const auto exactly = [&](int64_t j) { return first_ + j < cache.exact_first || j > recent; };
      if (cache.exact) {
        for (int64_t j = 0; j < visible; ++j) {
          if (exactly(j)) other[j] = exact_y[size_t(i * tokens_ + j)];
        }
      }
      const double chunk_lse = chunk_lse_[size_t(row)];
      double gain = 0;
      for (int64_t j = 0; j < visible; ++j) gain += std::exp(x[j] - chunk_lse) * (x[j] - other[j]);
      // lse_ already holds this chunk: the mean so far keeps the share of the earlier ones.
      const double now = share(chunk_lse, lse_[size_t(row)]);
      state.mean_gain[size_t(row)] = (1 - now) * state.mean_gain[size_t(row)] + now * gain;
      const double other_lse = log_sum_exp(other, visible);
      if (cache.coded_v) {
        add_to_row(
            other, visible, other_lse,
            [&](int64_t j) {
              return (cache.exact_v && exactly(j) ? cache.exact_v : cache.coded_v) +
                     (j * shape_.kv_heads + block.kv_head) * dim;
            },
            state.lse[size_t(row)], state.out.data() + row * dim);
      } else {
        state.lse[size_t(row)] = log_add(state.lse[size_t(row)], other_lse);
      }
    }
  });
}

double ExactAttention::divergence(const WeightState &state) const {
  double sum = 0;
  int64_t count = 0;
  for (size_t row = 0; row < lse_.size(); ++row) {
    if (lse_[row] == kNothing) continue;
    sum += state.mean_gain[row] - lse_[row] + state.lse[row];
    ++count;
  }
  return sum / double(count);
}

template <class Out>
double ExactAttention::error_of(const Out *out) const {
  double error = 0, norm = 0;
  for (size_t i = 0; i < out_.size(); ++i) {
    error += (out[i] - out_[i]) * (out[i] - out_[i]);
    norm += out_[i] * out_[i];
  }
  return error == 0 ? 0 : std::sqrt(error / norm);
}

double ExactAttention::output_error(const float *out) const {
  return error_of(out);
}

double ExactAttention::output_error(const WeightState &state) const {
  return error_of(state.out.data());
}

}  // namespace tqkv_metrics
