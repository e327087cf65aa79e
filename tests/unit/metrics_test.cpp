// SPDX-License-Identifier: Apache-2.0
#include "metrics/metrics.hpp"

#include <tqkv/tqkv.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "catch.hpp"

namespace {

using tqkv_metrics::AttentionShape;
using tqkv_metrics::ExactAttention;
using tqkv_metrics::WeightState;

struct Problem {
  AttentionShape shape;
  int64_t tokens;
  std::vector<float> q, k, v, coded, exact, coded_v, exact_v;
  std::vector<int64_t> positions;
};

std::vector<float> normals(std::mt19937_64 &random, int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float &value : values) value = normal(random);
  return values;
}

Problem draw(std::mt19937_64 &random) {
  Problem p;
  const int64_t kv_heads = 1 + int64_t(random() % 3), group = 1 + int64_t(random() % 5);
  p.shape = {1 + int64_t(random() % 6),  kv_heads * group,           kv_heads,
             1 + int64_t(random() % 40), 1 + int64_t(random() % 40), 0.3};
  p.tokens = p.shape.queries + int64_t(random() % 60);
  p.q = normals(random, p.shape.rows() * p.shape.head_dim_k);
  p.k = normals(random, p.tokens * kv_heads * p.shape.head_dim_k);
  p.v = normals(random, p.tokens * kv_heads * p.shape.head_dim_v);
  p.coded = normals(random, int64_t(p.k.size()));
  p.exact = normals(random, int64_t(p.k.size()));
  p.coded_v = normals(random, int64_t(p.v.size()));
  p.exact_v = normals(random, int64_t(p.v.size()));
  for (int64_t i = 0; i < p.shape.queries; ++i) p.positions.push_back(p.tokens - p.shape.queries + i);
  return p;
}

struct Reference {
  std::vector<double> out, other_out;
  double divergence = 0;
};

// Straight from the definitions, one row after the other.
Reference reference(const Problem &p, int64_t exact_first, int64_t exact_recent) {
  Reference result;
  const AttentionShape &s = p.shape;
  for (int64_t row = 0; row < s.rows(); ++row) {
    const int64_t position = p.positions[size_t(row / s.q_heads)];
    const int64_t g = row % s.q_heads / (s.q_heads / s.kv_heads);
    std::vector<double> px, py;
    double zx = 0, zy = 0;
    for (int64_t j = 0; j <= position; ++j) {
      double x = 0, y = 0;
      const bool exact = j < exact_first || j > position - exact_recent;
      for (int64_t c = 0; c < s.head_dim_k; ++c) {
        const size_t at = size_t((j * s.kv_heads + g) * s.head_dim_k + c);
        const double q = p.q[size_t(row * s.head_dim_k + c)];
        x += q * p.k[at];
        y += q * (exact ? p.exact[at] : p.coded[at]);
      }
      px.push_back(std::exp(s.scale * x));
      py.push_back(std::exp(s.scale * y));
      zx += px.back();
      zy += py.back();
    }
    std::vector<double> out(size_t(s.head_dim_v), 0.0), other(out);
    for (size_t j = 0; j < px.size(); ++j) {
      const bool exact = int64_t(j) < exact_first || int64_t(j) > position - exact_recent;
      result.divergence += px[j] / zx * std::log(px[j] / zx / (py[j] / zy)) / double(s.rows());
      for (size_t c = 0; c < out.size(); ++c) {
        const size_t at = (j * size_t(s.kv_heads) + size_t(g)) * out.size() + c;
        out[c] += px[j] / zx * p.v[at];
        other[c] += py[j] / zy * double(exact ? p.exact_v[at] : p.coded_v[at]);
      }
    }
    result.out.insert(result.out.end(), out.begin(), out.end());
    result.other_out.insert(result.other_out.end(), other.begin(), other.end());
  }
  return result;
}

}  // namespace

TEST_CASE("metrics: attention in chunks is the attention of the whole", "[metrics]") {
  std::mt19937_64 random(tqkv_test::seed());
  for (int round = 0; round < 40; ++round) {
    const Problem p = draw(random);
    const int64_t first = int64_t(random() % 8), recent = int64_t(random() % 20);
    const Reference expected = reference(p, first, recent);
    const auto loop = [](int64_t count, const std::function<void(int64_t)> &body) {
      for (int64_t i = 0; i < count; ++i) body(i);
    };
    ExactAttention attention(p.shape, p.q.data(), p.positions, loop);
    WeightState weights, with_values;
    for (int64_t at = 0, count = 0; at < p.tokens; at += count) {
      count = std::min<int64_t>(p.tokens - at, 1 + int64_t(random() % 30));
      const int64_t k_at = at * p.shape.kv_heads * p.shape.head_dim_k;
      const int64_t v_at = at * p.shape.kv_heads * p.shape.head_dim_v;
      attention.add_chunk(at, count, &p.k[size_t(k_at)], &p.v[size_t(v_at)]);
      attention.compare_chunk({&p.coded[size_t(k_at)], &p.exact[size_t(k_at)], first, recent}, weights);
      attention.compare_chunk({&p.coded[size_t(k_at)], &p.exact[size_t(k_at)], first, recent, &p.coded_v[size_t(v_at)],
                               &p.exact_v[size_t(v_at)]},
                              with_values);
    }
    // Sums of at most 66 terms of size 10 or less in double, 2^-53 each: the divergence itself may be zero. A float keeps
    // 2^-24 of the expected output.
    CHECK(attention.divergence(weights) == tqkv_test::Approx(expected.divergence).epsilon(1e-11).margin(1e-12));
    CHECK(attention.divergence(with_values) == tqkv_test::Approx(expected.divergence).epsilon(1e-11).margin(1e-12));
    double error = 0, norm = 0;
    for (size_t i = 0; i < expected.out.size(); ++i) {
      error += (expected.other_out[i] - expected.out[i]) * (expected.other_out[i] - expected.out[i]);
      norm += expected.out[i] * expected.out[i];
    }
    CHECK(attention.output_error(with_values) == tqkv_test::Approx(std::sqrt(error / norm)).epsilon(1e-9));
    const std::vector<float> rounded(expected.out.begin(), expected.out.end());
    CHECK(attention.output_error(rounded.data()) < 0x1p-23);
    std::vector<float> doubled(rounded);
    for (float &value : doubled) value *= 2;
    CHECK(attention.output_error(doubled.data()) == tqkv_test::Approx(1).epsilon(1e-6));
  }
}

TEST_CASE("metrics: every half comes out as IEEE says", "[metrics]") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = uint16_t(bits);
    float value = 0;
    tqkv_metrics::to_float(&half, TQ_TYPE_F16, 1, &value);
    const int exponent = int(bits >> 10 & 31), fraction = int(bits & 1023);
    const double sign = bits >> 15 ? -1 : 1;
    CAPTURE(bits);
    REQUIRE(std::signbit(value) == (bits >> 15 != 0));
    if (exponent == 31) {
      REQUIRE((fraction == 0 ? std::isinf(value) : std::isnan(value)));
    } else {
      REQUIRE(double(value) ==
              sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25)));
    }
  }
}

TEST_CASE("metrics: errors of vectors are means over those that are not zero", "[metrics]") {
  const float x[] = {3, 4}, y[] = {3, 0}, zero[] = {0, 0};
  tqkv_metrics::VectorError error;
  error.add(x, y, 2);     // 16 / 25, cosine 3 / 5
  error.add(zero, y, 2);  // counts for nothing
  error.add(x, zero, 2);  // 1, cosine 0
  CHECK(error.count == 2);
  CHECK(error.mse() == tqkv_test::Approx((0.64 + 1) / 2));
  CHECK(error.cosine() == tqkv_test::Approx(0.3));
}
