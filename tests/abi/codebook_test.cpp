// SPDX-License-Identifier: Apache-2.0
// Codebooks against Lloyd-Max levels computed here by numerical integration.
#include <algorithm>
#include <functional>

#include "support.hpp"

namespace {

// A symmetric density of unit variance as a table over the positive half, cells of 1/2048, Simpson-free midpoint sums.
struct Density {
  std::vector<double> x, weight;  // weights of the whole density sum to 1

  explicit Density(int head_dim) {  // 0: Gaussian
    constexpr int kCells = 2048;
    const double limit = head_dim ? std::min(std::sqrt(double(head_dim)), 12.0) : 12.0;
    double total = 0;
    for (int i = 0; i < int(limit * kCells); ++i) {
      const double at = (i + 0.5) / kCells;
      const double base = head_dim ? 1 - at * at / head_dim : 0;
      if (head_dim && base <= 0) break;
      const double p = head_dim ? std::pow(base, (head_dim - 3) / 2.0) : std::exp(-at * at / 2);
      x.push_back(at);
      weight.push_back(p);
      total += p;
    }
    double variance = 0;
    for (size_t i = 0; i < x.size(); ++i) variance += x[i] * x[i] * weight[i] / total;
    for (double &w : weight) w /= total;
    for (double &at : x) at /= std::sqrt(variance);
  }

  // Relative error of quantising to +-levels by midpoint thresholds with the least-MSE factor: 1 - E[xc]^2 / E[c^2].
  double mse(const std::vector<double> &levels) const {
    double xc = 0, cc = 0;
    size_t level = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      while (level + 1 < levels.size() && x[i] >= (levels[level] + levels[level + 1]) / 2) ++level;
      xc += weight[i] * x[i] * levels[level];
      cc += weight[i] * levels[level] * levels[level];
    }
    return 1 - xc * xc / cc;
  }

  std::vector<double> lloyd_max(int bits) const {
    std::vector<double> levels;
    const int count = 1 << (bits - 1);
    for (int i = 0; i < count; ++i) levels.push_back((i + 0.5) * 3.0 / count);
    for (int iteration = 0; iteration < 5000; ++iteration) {
      std::vector<double> sum(levels.size(), 0.0), mass(levels.size(), 0.0);
      size_t level = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        while (level + 1 < levels.size() && x[i] >= (levels[level] + levels[level + 1]) / 2) ++level;
        sum[level] += weight[i] * x[i];
        mass[level] += weight[i];
      }
      double moved = 0;
      for (size_t i = 0; i < levels.size(); ++i) {
        const double next = sum[i] / mass[i];
        moved = std::max(moved, std::fabs(next - levels[i]));
        levels[i] = next;
      }
      if (moved < 1e-9) break;
    }
    return levels;
  }

  // Least error over all scalings of the levels.
  double best_mse(const std::vector<double> &levels) const {
    double best = 1;
    const auto at = [&](double factor) {
      std::vector<double> scaled = levels;
      for (double &level : scaled) level *= factor;
      return mse(scaled);
    };
    double best_factor = 0;
    for (double top = 0.2; top < 5; top *= 1.01) {
      const double factor = top / levels.back();
      if (at(factor) < best) best = at(factor), best_factor = factor;
    }
    for (double step = 1e-3; step > 1e-6; step /= 4) {
      for (int k = -12; k <= 12; ++k) best = std::min(best, at(best_factor * (1 + k * step)));
    }
    return best;
  }
};

std::vector<double> positive_half(const tq_side_info &side) {
  std::vector<double> levels;
  for (int i = side.num_levels / 2; i < side.num_levels; ++i) levels.push_back(side.grid[i] + 0.5);
  return levels;
}

void check_grid(const tq_side_info &side, int bits) {
  REQUIRE(side.num_levels == 1 << bits);
  for (int i = 0; i < side.num_levels; ++i) {
    // Ascending and symmetric: grid[i] + 1/2 == -(grid[n-1-i] + 1/2).
    if (i > 0) CHECK(side.grid[i] > side.grid[i - 1]);
    CHECK(side.grid[i] + side.grid[side.num_levels - 1 - i] == -1);
  }
  for (int i = side.num_levels; i < 16; ++i) CHECK(side.grid[i] == 0);
  int exponent;
  CHECK(std::frexp(side.level_unit, &exponent) == 0.5f);  // a power of two
}

}  // namespace

TEST_CASE("fitted codebooks are Lloyd-Max to within the documented loss") {
  const Target &target = targets().front();
  for (int codebook : {TQ_CODEBOOK_GAUSSIAN, TQ_CODEBOOK_BETA}) {
    for (int head_dim : {16, 64, 128, 256, 576}) {
      if (codebook == TQ_CODEBOOK_GAUSSIAN && head_dim != 128) continue;
      const Density density(codebook == TQ_CODEBOOK_BETA ? head_dim : 0);
      for (int bits = 1; bits <= 4; ++bits) {
        tq_config config = make_config(target, head_dim, bits, bits);
        config.k.codebook = config.v.codebook = codebook;
        const CodecPtr codec = make_codec(config);
        const tq_side_info side = info_of(codec.get()).k;
        INFO(describe(config) << " codebook_mse " << side.codebook_mse << " loss " << side.codebook_loss);
        CHECK(side.codebook == codebook);
        check_grid(side, bits);
        const double ideal = density.mse(density.lloyd_max(bits));
        const double fitted = density.best_mse(positive_half(side));
        // Midpoint sums over cells of 1/2048 err by about cell^2 / 24 of the curvature: below 1e-6.
        CHECK(std::fabs(side.codebook_mse - fitted) <= 2e-6 + 1e-4 * fitted);
        CHECK(std::fabs(side.codebook_mse / (1 + side.codebook_loss) - ideal) <= 2e-6 + 1e-4 * ideal);
        CHECK(side.codebook_loss <= (bits >= 3 ? 0.002 : 0.012));
        CHECK(side.codebook_loss >= -1e-6);
      }
    }
  }
}

TEST_CASE("the limiting Gaussian's errors are the textbook's") {
  // Max (1960), optimum quantisers of a unit Gaussian: 0.3634, 0.1175, 0.03454, 0.009497.
  const Density density(0);
  const double textbook[] = {0, 0.3634, 0.1175, 0.03454, 0.009497};
  for (int bits = 1; bits <= 4; ++bits) {
    CHECK(density.mse(density.lloyd_max(bits)) == tqkv_test::Approx(textbook[bits]).epsilon(2e-3));
  }
}

TEST_CASE("uniform codebooks are equally spaced") {
  const Target &target = targets().front();
  for (int bits : {1, 2, 3, 4}) {
    tq_config config = make_config(target, 128, bits, bits);
    config.k.codebook = TQ_CODEBOOK_UNIFORM;
    const CodecPtr codec = make_codec(config);
    const tq_side_info side = info_of(codec.get()).k;
    check_grid(side, bits);
    const std::vector<double> levels = positive_half(side);
    for (size_t i = 0; i < levels.size(); ++i) CHECK(levels[i] == (2 * double(i) + 1) * levels[0]);
    if (bits == 2) CHECK(side.codebook_mse == tqkv_test::Approx(Density(128).best_mse({1, 3})).epsilon(1e-4));
  }
}

TEST_CASE("defaults resolve as documented") {
  const Target &target = targets().front();
  for (int bits : {1, 2, 3, 4, 8, 16}) {
    const CodecPtr codec = make_codec(make_config(target, 128, bits, bits));
    const tq_codec_info info = info_of(codec.get());
    for (const tq_side_info &side : {info.k, info.v}) {
      CHECK(side.bits == bits);
      CHECK(side.head_dim == 128);
      if (bits == 16) {
        CHECK(side.rotation == TQ_ROTATION_NONE);
        CHECK(side.scale_bytes == 0);
        continue;
      }
      CHECK(side.rotation == TQ_ROTATION_HADAMARD);
      CHECK(side.hadamard_rounds == 1);
      CHECK(side.codebook == (bits == 8 ? TQ_CODEBOOK_UNIFORM : TQ_CODEBOOK_BETA));
      CHECK(side.scale_type == TQ_TYPE_F16);
      CHECK(side.scale_rule >= TQ_SCALE_LEAST_MSE);
      CHECK(side.scale_rule <= TQ_SCALE_UNBIASED);
    }
    CHECK(info.kv_heads == 1);
    CHECK(info.block_size_tokens == 16);
    CHECK(info.exact_block_size_tokens == 16);
    CHECK(info.raw_type == TQ_TYPE_BF16);
  }
}

TEST_CASE("a caller's levels are fitted to the grid and the loss is reported") {
  FRESH(random, "codebook custom");
  const Target &target = targets().front();
  for (int bits = 1; bits <= 4; ++bits) {
    for (int round = 0; round < 10; ++round) {
      std::vector<float> positive, levels;
      float level = 0;
      for (int i = 0; i < 1 << (bits - 1); ++i) positive.push_back(level += float(random.uniform(0.3, 1.0)));
      const float unit = float(std::exp(random.uniform(-8, 8)));  // any unit
      for (size_t i = positive.size(); i > 0; --i) levels.push_back(-positive[i - 1] * unit);
      for (float value : positive) levels.push_back(value * unit);
      tq_config config = make_config(target, 128, bits, bits);
      config.k.codebook = TQ_CODEBOOK_CUSTOM;
      config.k.num_levels = 1 << bits;
      config.k.levels = levels.data();
      const CodecPtr codec = make_codec(config);
      const tq_side_info side = info_of(codec.get()).k;
      check_grid(side, bits);
      const std::vector<double> fitted = positive_half(side);
      INFO(describe(config) << " loss " << side.codebook_loss);
      const Density density(128);
      const std::vector<double> given(positive.begin(), positive.end());
      const double before = density.best_mse(given), after = density.best_mse(fitted);
      CHECK(side.codebook_mse == tqkv_test::Approx(after).epsilon(1e-3));
      CHECK(side.codebook_loss == tqkv_test::Approx(after / before - 1).margin(2e-3));
      // The caller's levels, not better ones: the finest grid has 127.5 steps at the top, half a step is 0.4% of it.
      for (size_t i = 0; i < fitted.size(); ++i) {
        CHECK(std::fabs(fitted[i] / fitted.back() - double(positive[i]) / double(positive.back())) < 0.02);
      }
    }
  }
}
