// SPDX-License-Identifier: Apache-2.0
// Quality: measured errors of unit vectors against the figures of this project and the bounds of the theory.
#include <algorithm>

#include "encoding.hpp"
#include "support.hpp"

namespace {

std::vector<double> unit_vectors(Random &random, int64_t count, int head_dim) {
  std::vector<double> values = normals(random, count * head_dim);
  for (int64_t i = 0; i < count; ++i) {
    double square = 0;
    for (int c = 0; c < head_dim; ++c) square += std::pow(values[size_t(i * head_dim + c)], 2);
    for (int c = 0; c < head_dim; ++c) values[size_t(i * head_dim + c)] /= std::sqrt(square);
  }
  return values;
}

double mean_squared_error(const Target &target, const tq_config &config, const std::vector<double> &x) {
  const CodecPtr codec = make_codec(config);
  const int64_t count = int64_t(x.size()) / config.k.head_dim;
  const Encoded encoded = encode(target, codec.get(), TQ_SIDE_K, encode_elements(x, TQ_TYPE_F32), TQ_TYPE_F32);
  const std::vector<double> decoded = decode(target, codec.get(), TQ_SIDE_K, encoded, count);
  double error = 0;
  for (size_t i = 0; i < x.size(); ++i) error += (x[i] - decoded[i]) * (x[i] - decoded[i]);
  return error / double(count);
}

}  // namespace

TEST_CASE("mean squared errors of unit vectors at head_dim 128") {
  FRESH(random, "bounds mse");
  // 20000 vectors: one vector's error varies by about 10% at 4 bits, the mean by 0.07%.
  const std::vector<double> x = unit_vectors(random, 20000, 128);
  struct Figure {
    int bits;
    double least_mse, unbiased;
  };
  for (const Target &target : targets()) {
    for (const Figure &figure : {Figure{2, .1170, .1320}, Figure{3, .0344, .0352}, Figure{4, .00945, .00950}}) {
      tq_config config = make_config(target, 128, figure.bits, figure.bits);
      config.seed = random.bits();
      config.k.scale_rule = TQ_SCALE_LEAST_MSE;
      const double least = mean_squared_error(target, config, x);
      config.k.scale_rule = TQ_SCALE_UNBIASED;
      const double unbiased = mean_squared_error(target, config, x);
      INFO(target.name << " bits " << figure.bits << " least " << least << " unbiased " << unbiased);
      CHECK(least <= figure.least_mse);
      CHECK(unbiased <= figure.unbiased);
      // For a rule with decoded = s c, least error D: the unbiased scale's is D / (1 - D) per vector.
      CHECK(unbiased == tqkv_test::Approx(least / (1 - least)).epsilon(0.01));
    }
  }
}

TEST_CASE("errors lie between the theory's bounds, and are the codebook's") {
  FRESH(random, "bounds theory");
  const Target &target = targets().back();
  for (int head_dim : {16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 224, 256, 288, 320, 384, 448, 512, 576}) {
    const std::vector<double> x = unit_vectors(random, 400000 / head_dim, head_dim);
    for (int bits = 1; bits <= 4; ++bits) {
      tq_config config = make_config(target, head_dim, bits, bits);
      config.k.scale_rule = TQ_SCALE_LEAST_MSE;
      config.seed = random.bits();
      const double mse = mean_squared_error(target, config, x);
      const double codebook = info_of(make_codec(config).get()).k.codebook_mse;
      INFO("head_dim " << head_dim << " bits " << bits << " mse " << mse << " codebook " << codebook);
      // arXiv:2504.19874: no quantiser of b bits a coordinate does better than 4^-b on the sphere's worst case, and
      // this one is within sqrt(3) pi / 2 of it. The scale's 16 bits are extra: 16 / head_dim bits a coordinate.
      CHECK(mse >= std::pow(4.0, -bits - 16.0 / head_dim));
      CHECK(mse <= std::sqrt(3.0) * 3.14159265358979 / 2 * std::pow(4.0, -bits));
      // A per-vector scale fits each vector: never worse than the codebook's mean figure, which knows one scale for
      // all; better by about 1 / head_dim of it for each fitted parameter.
      CHECK(mse <= codebook * 1.02);
      CHECK(mse >= codebook * (1 - 4.0 / head_dim) * 0.97);
    }
  }
}

TEST_CASE("8 bits lose what a uniform grid of 256 levels loses") {
  FRESH(random, "bounds 8 bits");
  const Target &target = targets().back();
  const std::vector<double> x = unit_vectors(random, 4000, 128);
  tq_config config = make_config(target, 128, 8, 8);
  config.k.scale_rule = TQ_SCALE_LEAST_MSE;
  const double mse = mean_squared_error(target, config, x);
  INFO("mse " << mse);
  // Steps of 8 sigma / 256, error step^2 / 12 a coordinate: 8.1e-5; 128 coordinates stay within 4 sigma mostly.
  CHECK(mse <= 8.5e-5);
}

TEST_CASE("the unbiased rule keeps inner products: a million pairs") {
  FRESH(random, "bounds unbiased");
  const int head_dim = 128;
  // The sum's relative deviation is about sqrt(mse / pairs): with 4 million pairs 1.8e-4 at 2 bits, far below 1e-3.
  const int64_t vectors = 4000, queries = 1000;
  const std::vector<double> x = unit_vectors(random, vectors, head_dim), q = unit_vectors(random, queries, head_dim);
  const Target &target = targets().back();
  for (int bits : {1, 2, 3, 4, 8}) {
    tq_config config = make_config(target, head_dim, bits, bits);
    config.k.scale_rule = TQ_SCALE_UNBIASED;
    config.seed = random.bits();
    const CodecPtr codec = make_codec(config);
    const Encoded encoded = encode(target, codec.get(), TQ_SIDE_K, encode_elements(x, TQ_TYPE_F32), TQ_TYPE_F32);
    const std::vector<double> decoded = decode(target, codec.get(), TQ_SIDE_K, encoded, vectors);
    double cross = 0, square = 0, worst = 0;
    for (int64_t i = 0; i < vectors; ++i) {
      const double *xi = &x[size_t(i * head_dim)], *di = &decoded[size_t(i * head_dim)];
      double own = 0;
      for (int c = 0; c < head_dim; ++c) own += xi[c] * di[c];
      worst = std::max(worst, std::fabs(own - 1));
      for (int64_t j = 0; j < queries; ++j) {
        const double *qj = &q[size_t(j * head_dim)];
        double qx = 0, qd = 0;
        for (int c = 0; c < head_dim; ++c) qx += qj[c] * xi[c], qd += qj[c] * di[c];
        cross += qx * qd;
        square += qx * qx;
      }
    }
    INFO("bits " << bits << " slope - 1 " << cross / square - 1 << " worst own product " << worst);
    // At 1 bit the deviation is sqrt(.57 / 4e6) = 3.8e-4: five of them.
    CHECK(std::fabs(cross / square - 1) < (bits == 1 ? 0.002 : 0.001));
    // Exactly so for the vector itself, but for the fp16 scale, half a unit in the last place, and the roundings of
    // coordinates.
    CHECK(worst <= 0x1p-11 + kCoordinateSlack);
  }
}

TEST_CASE("one Hadamard round tames vectors with a few huge channels") {
  FRESH(random, "bounds outliers");
  const Target &target = targets().back();
  const int head_dim = 128;
  std::vector<double> x = normals(random, int64_t(2000) * head_dim);
  for (int64_t i = 0; i < 2000; ++i) {
    for (int c : {3, 40, 77}) x[size_t(i * head_dim + c)] *= 30;
  }
  const auto relative = [&](int rotation) {
    tq_config config = make_config(target, head_dim, 4, 4);
    config.k.rotation = rotation;
    config.k.scale_rule = TQ_SCALE_LEAST_MSE;
    const double mse = mean_squared_error(target, config, x);
    double energy = 0;
    for (double value : x) energy += value * value;
    return mse * 2000 / energy;
  };
  const double hadamard = relative(TQ_ROTATION_HADAMARD), none = relative(TQ_ROTATION_NONE);
  INFO("relative error " << hadamard << " with, " << none << " without");
  CHECK(hadamard < 0.0125);
  CHECK(none > 4 * hadamard);
}
