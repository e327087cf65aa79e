// SPDX-License-Identifier: Apache-2.0
// The kernels of CPU attention, every target of this machine against double precision.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention/cpu.hpp"
#include "cache/pages.hpp"
#include "catch.hpp"
#include "codec/cpu.hpp"
#include "codec/quantize.hpp"

namespace {

using namespace tqkv;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kPoison = -12345;

struct Target {
  std::string name;
  const AttentionKernels *kernels;
};

std::vector<Target> targets() {
  std::vector<Target> result = {{"scalar", &kAttentionScalar}};
  const auto add = [&](int simd, const char *name, const AttentionKernels *kernels) {
    if (codec_kernels(simd) != nullptr) result.push_back({name, kernels});
  };
#ifdef TQKV_HAVE_AVX2
  add(TQ_SIMD_AVX2, "avx2", &kAttentionAvx2);
#endif
#ifdef TQKV_HAVE_AVX512
  add(TQ_SIMD_AVX512, "avx512", &kAttentionAvx512);
#endif
#ifdef TQKV_HAVE_NEON
  add(TQ_SIMD_NEON, "neon", &kAttentionNeon);
#endif
  return result;
}

// One draw of what score_tiles and add_tiles work on.
struct Problem {
  Side side;
  int rows, num_tiles;
  std::vector<std::vector<uint8_t>> tiles;
  std::vector<const uint8_t *> codes;
  std::vector<float> scales, bias, queries, weights;
  std::vector<double> levels;  // [token][channel]

  int tokens() const { return num_tiles * kTileTokens; }
  double level(int t, int c) const { return levels[size_t(t * side.head_dim + c)]; }
};

Problem draw(std::mt19937_64 &random, int which, int bits, int head_dim, int rows, int num_tiles) {
  std::normal_distribution<float> normal;
  const auto normals = [&](int count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float &value : values) value = normal(random);
    return values;
  };
  Problem p;
  tq_side_config config{};
  config.head_dim = head_dim;
  config.bits = bits;
  config.rotation = TQ_ROTATION_NONE;
  REQUIRE(make_side(config, which, 0, TQ_TYPE_BF16, "k", &p.side) == TQ_OK);
  p.rows = rows;
  p.num_tiles = num_tiles;
  for (int i = 0; i < num_tiles; ++i) {  // exactly as long as a tile is, so that a sanitizer sees one byte too many
    std::vector<uint8_t> tile(size_t(kTileTokens * p.side.code_bytes()));
    for (uint8_t &byte : tile) byte = uint8_t(random());
    for (int t = 0; t < kTileTokens; ++t) {
      uint8_t record[kMaxHeadDim];
      read_record(p.side, which, tile.data(), t, record);
      for (int c = 0; c < head_dim; ++c) {
        const unsigned code = get_code(record, head_dim, bits, c);
        p.levels.push_back(bits == 8 ? 2 * int8_t(code) + 1 : double(p.side.levels[code]));
      }
    }
    p.tiles.push_back(std::move(tile));
  }
  for (const auto &tile : p.tiles) p.codes.push_back(tile.data());
  p.scales = normals(p.tokens());
  p.bias = normals(kRowBlock);
  p.queries = normals(kRowBlock * kMaxHeadDim);
  p.weights = normals(kRowBlock * kChunkTokens);
  return p;
}

// All bits; the smallest, the largest and the common head sizes, and any; all numbers of rows and tiles.
template <class Body>
void for_problems(int which, const Body &body) {
  std::mt19937_64 random(tqkv_test::seed());
  for (const int bits : {1, 2, 3, 4, 8}) {
    for (const int head_dim : {16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 560, 576, 0, 0, 0}) {
      const int dim = head_dim != 0 ? head_dim : 16 * int(1 + random() % 36);
      const int rows = 1 + int(random() % kRowBlock), tiles = 1 + int(random() % (kChunkTokens / kTileTokens));
      body(draw(random, which, bits, dim, rows, tiles));
    }
    for (int i = 1; i <= kRowBlock; ++i) {
      body(draw(random, which, bits, 128, i, 1 + int(random() % 16)));
      body(draw(random, which, bits, 48, 1 + int(random() % kRowBlock), i));
    }
  }
}

std::string describe(const Target &target, const Problem &p) {
  return target.name + ": " + std::to_string(p.side.bits) + " bits, head_dim " + std::to_string(p.side.head_dim) +
         ", " + std::to_string(p.rows) + " rows, " + std::to_string(p.num_tiles) + " tiles";
}

bool same_bits(const float *a, const float *b, int count) {
  return std::memcmp(a, b, size_t(count) * sizeof(float)) == 0;
}

// A sum of n products in any order is off by at most n units of rounding of the sum of their absolute values; the
// scale and what is added at the end round twice more.
double tolerance(int n, double absolute) {
  return (n + 3) * 0x1p-24 * absolute;
}

TEST_CASE("attention kernels: scores of coded keys", "[attention]") {
  for_problems(TQ_SIDE_K, [](const Problem &p) {
    for (const Target &target : targets()) {
      INFO(describe(target, p));
      std::vector<float> scores(kRowBlock * kChunkTokens, kPoison);
      target.kernels->score_tiles(p.side, p.codes.data(), p.num_tiles, p.scales.data(), p.queries.data(), p.rows,
                                  p.bias.data(), scores.data());
      int wrong = 0;
      for (int r = 0; r < kRowBlock; ++r) {
        for (int t = 0; t < kChunkTokens; ++t) {
          const float score = scores[size_t(r * kChunkTokens + t)];
          if (r >= p.rows || t >= p.tokens()) {
            wrong += score != kPoison;
            continue;
          }
          double sum = 0, absolute = 0;
          for (int c = 0; c < p.side.head_dim; ++c) {
            const double term = double(p.queries[size_t(r * kMaxHeadDim + c)]) * p.level(t, c);
            sum += term;
            absolute += std::fabs(term);
          }
          const double scale = double(p.scales[size_t(t)]), bias = double(p.bias[size_t(r)]);
          wrong += !(std::fabs(score - (scale * sum + bias)) <=
                     tolerance(p.side.head_dim, std::fabs(scale) * absolute + std::fabs(bias)));
        }
      }
      CHECK(wrong == 0);

      int different = 0;
      for (int r = 0; r < p.rows; ++r) {
        std::vector<float> alone(kChunkTokens);
        target.kernels->score_tiles(p.side, p.codes.data(), p.num_tiles, p.scales.data(),
                                    p.queries.data() + r * kMaxHeadDim, 1, p.bias.data() + r, alone.data());
        different += !same_bits(alone.data(), scores.data() + r * kChunkTokens, p.tokens());
      }
      CHECK(different == 0);
    }
  });
}

TEST_CASE("attention kernels: sums of coded values", "[attention]") {
  for_problems(TQ_SIDE_V, [](Problem p) {
    // Tokens that a row does not see weigh nothing, whatever their scale.
    std::mt19937_64 random(tqkv_test::seed());
    const size_t hidden = random() % size_t(p.tokens());
    p.scales[hidden] = random() % 2 != 0 ? kNaN : kInfinity;
    for (int r = 0; r < kRowBlock; ++r) p.weights[size_t(r) * kChunkTokens + hidden] = 0;
    for (const Target &target : targets()) {
      INFO(describe(target, p));
      const std::vector<float> before(kRowBlock * kMaxHeadDim, 0.25f);
      std::vector<float> outputs = before, weights = p.weights;
      target.kernels->add_tiles(p.side, p.codes.data(), p.num_tiles, p.scales.data(), weights.data(), p.rows,
                                outputs.data());
      int wrong = 0;
      for (int r = 0; r < kRowBlock; ++r) {
        for (int c = 0; c < kMaxHeadDim; ++c) {
          const float output = outputs[size_t(r * kMaxHeadDim + c)];
          if (r >= p.rows || c >= p.side.head_dim) {
            wrong += output != 0.25f;
            continue;
          }
          double sum = 0.25, absolute = 0.25;
          for (int t = 0; t < p.tokens(); ++t) {
            const float weight = p.weights[size_t(r * kChunkTokens + t)];
            if (weight == 0) continue;
            const double term = double(weight) * double(p.scales[size_t(t)]) * p.level(t, c);
            sum += term;
            absolute += std::fabs(term);
          }
          wrong += !(std::fabs(output - sum) <= tolerance(p.tokens(), absolute));
        }
      }
      CHECK(wrong == 0);

      int different = 0;
      for (int r = 0; r < p.rows; ++r) {
        std::vector<float> alone = before, weight = p.weights;
        target.kernels->add_tiles(p.side, p.codes.data(), p.num_tiles, p.scales.data(),
                                  weight.data() + r * kChunkTokens, 1, alone.data());
        different += !same_bits(alone.data(), outputs.data() + r * kMaxHeadDim, p.side.head_dim);
      }
      CHECK(different == 0);
    }
  });
}

TEST_CASE("attention kernels: raw keys and values", "[attention]") {
  std::mt19937_64 random(tqkv_test::seed());
  for (int head_dim = 16; head_dim <= kMaxHeadDim; head_dim += 16) {
    const int rows = 1 + int(random() % kRowBlock);
    const Problem p = draw(random, TQ_SIDE_K, 1, head_dim, rows, 1);
    std::vector<float> row(p.queries.begin(), p.queries.begin() + head_dim);
    std::shuffle(row.begin(), row.end(), random);
    for (const Target &target : targets()) {
      INFO(describe(target, p));
      std::vector<float> scores(kRowBlock * kChunkTokens, kPoison);
      target.kernels->score_key(row.data(), head_dim, p.queries.data(), rows, p.bias.data(), scores.data());
      std::vector<float> weights = p.weights, outputs(kRowBlock * kMaxHeadDim, 0.25f);
      weights[0] = 0;  // the first row does not see the value: not even its NaN
      std::vector<float> value = row;
      value[0] = kNaN;
      target.kernels->add_value(value.data(), head_dim, weights.data(), rows, outputs.data());
      int wrong = 0;
      for (int r = 0; r < kRowBlock; ++r) {
        double sum = 0, absolute = 0;
        for (int c = 0; c < head_dim; ++c) {
          const double term = double(p.queries[size_t(r * kMaxHeadDim + c)]) * double(row[size_t(c)]);
          sum += term;
          absolute += std::fabs(term);
        }
        const double bias = double(p.bias[size_t(r)]);
        const float score = scores[size_t(r * kChunkTokens)];
        if (r >= rows) {
          wrong += score != kPoison;
        } else {
          wrong += !(std::fabs(score - (sum + bias)) <= tolerance(head_dim, absolute + std::fabs(bias)));
        }
        for (int c = 0; c < kMaxHeadDim; ++c) {
          const float output = outputs[size_t(r * kMaxHeadDim + c)];
          if (r == 0 || r >= rows || c >= head_dim) {
            wrong += output != 0.25f;
          } else if (c == 0) {
            wrong += !std::isnan(output);
          } else {
            const double term = double(weights[size_t(r * kChunkTokens)]) * double(value[size_t(c)]);
            wrong += !(std::fabs(output - (0.25 + term)) <= tolerance(1, 0.25 + std::fabs(term)));
          }
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("attention kernels: softmax", "[attention]") {
  std::mt19937_64 random(tqkv_test::seed());
  std::normal_distribution<float> normal;
  for (int trial = 0; trial < 400; ++trial) {
    const int low = int(random() % kChunkTokens), high = low + 1 + int(random() % size_t(kChunkTokens - low));
    const float spread = std::vector<float>{0.01f, 1, 10, 300}[random() % 4];
    const float soft_cap = random() % 2 != 0 ? 0 : std::vector<float>{0.5f, 30, 1e6f}[random() % 3];
    const float slope = random() % 2 != 0 ? 0 : normal(random) / 16, distance = -float(random() % 1000);
    const float old_max = random() % 3 == 0 ? -kInfinity : spread * normal(random);
    const float old_sum = old_max == -kInfinity ? 0 : 1 + float(random() % 100);
    std::vector<float> scores(kChunkTokens);
    for (float &score : scores) score = spread * normal(random);
    for (int t = 0; t < kChunkTokens; ++t) {
      if (t < low || t >= high)
        scores[size_t(t)] = std::vector<float>{kNaN, kInfinity, -kInfinity, 1e30f}[random() % 4];
    }
    std::vector<double> x(kChunkTokens);
    double largest = double(old_max);
    for (int t = low; t < high; ++t) {
      double &value = x[size_t(t)] = double(scores[size_t(t)]);
      if (soft_cap > 0) value = double(soft_cap) * std::tanh(value / double(soft_cap));
      value += double(slope) * (t + double(distance));
      largest = std::max(largest, value);
    }
    for (const Target &target : targets()) {
      INFO(target.name << ", trial " << trial << ": [" << low << ", " << high << "), spread " << spread << ", cap "
                       << soft_cap << ", slope " << slope);
      std::vector<float> weights = scores;
      float max = old_max, sum = old_sum;
      const float correction =
          target.kernels->softmax(weights.data(), kChunkTokens, low, high, soft_cap, slope, distance, &max, &sum);
      // Logits are rounded a few times, to which softmax is as sensitive as they are large.
      const double magnitude = std::max(std::fabs(largest), 4.0 * double(spread)) + 1000 * std::fabs(double(slope));
      const double relative = 4e-7 + 4 * 0x1p-23 * magnitude;
      CHECK(std::fabs(double(max) - largest) <= relative);
      CHECK(std::fabs(double(correction) - std::exp(double(old_max) - largest)) <= relative);
      double expected_sum = double(old_sum) * std::exp(double(old_max) - largest);
      int wrong = 0;
      for (int t = 0; t < kChunkTokens; ++t) {
        const float weight = weights[size_t(t)];
        if (t < low || t >= high) {
          wrong += weight != 0;
          continue;
        }
        const double expected = std::exp(x[size_t(t)] - largest);
        expected_sum += expected;
        wrong += !(std::fabs(weight - expected) <= relative * expected + 1e-37);
      }
      CHECK(wrong == 0);
      CHECK(std::fabs(double(sum) - expected_sum) <= 2 * relative * expected_sum);
    }
  }
}

TEST_CASE("attention kernels: the exponential is good to 2 units in the last place", "[attention]") {
  for (const Target &target : targets()) {
    INFO(target.name);
    double worst = 0;
    for (float x = -86.9f; x <= 0; x += 0.001f) {
      float scores[kChunkTokens] = {0, x}, max = 0, sum = 0;
      target.kernels->softmax(scores, kChunkTokens, 0, 2, 0, 0, 0, &max, &sum);
      const double expected = std::exp(double(x));
      worst = std::max(worst, std::fabs(double(scores[1]) / expected - 1));
    }
    CHECK(worst <= 2 * 0x1p-23);
  }
}

TEST_CASE("attention kernels: a visible NaN reaches the sum, an infinite logit the maximum", "[attention]") {
  for (const Target &target : targets()) {
    INFO(target.name);
    for (const float soft_cap : {0.0f, 20.0f}) {
      std::vector<float> scores(kChunkTokens, 1.0f);
      scores[5] = 3;
      scores[37] = scores[245] = kNaN;  // in the largest one's lane, and in the last vector
      float max = -kInfinity, sum = 0;
      target.kernels->softmax(scores.data(), kChunkTokens, 3, 250, soft_cap, 0, 0, &max, &sum);
      CHECK(max == tqkv_test::Approx(soft_cap > 0 ? soft_cap * std::tanh(3 / soft_cap) : 3.0f));  // not NaN
      CHECK(std::isnan(sum));
      CHECK(std::isnan(scores[37]));
      CHECK(scores[5] == 1.0f);
    }
    std::vector<float> scores(kChunkTokens, -kInfinity);
    scores[100] = 2;
    float max = -kInfinity, sum = 0;
    target.kernels->softmax(scores.data(), kChunkTokens, 0, kChunkTokens, 0, 0, 0, &max, &sum);
    CHECK(max == 2);
    CHECK(sum == 1);
  }
}

}  // namespace
