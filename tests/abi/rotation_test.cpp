// SPDX-License-Identifier: Apache-2.0
// Rotations: orthogonal, derived from the seed as specified, the same on every target.
#include <algorithm>
#include <cstring>

#include "support.hpp"

namespace {

oracle::Matrix product_with_transpose(const oracle::Matrix &m) {
  oracle::Matrix p(m.n);
  for (int i = 0; i < m.n; ++i) {
    for (int j = 0; j < m.n; ++j) {
      for (int k = 0; k < m.n; ++k) p(i, j) += m(i, k) * m(j, k);
    }
  }
  return p;
}

double distance_from_identity(const oracle::Matrix &m) {
  double worst = 0;
  for (int i = 0; i < m.n; ++i) {
    for (int j = 0; j < m.n; ++j) worst = std::max(worst, std::fabs(m(i, j) - (i == j)));
  }
  return worst;
}

double largest_difference(const oracle::Matrix &a, const oracle::Matrix &b) {
  double worst = 0;
  for (size_t i = 0; i < a.a.size(); ++i) worst = std::max(worst, std::fabs(a.a[i] - b.a[i]));
  return worst;
}

// The rotation as tq_decode applies it: vectors of all levels equal but for one channel's sign. At 8 bits the code byte
// of channel c is its grid value, so (+1/2 everywhere) minus (the same with -1/2 at c) is row c of R times one step.
oracle::Matrix recover_rotation(const Target &target, const tq_codec *codec, int32_t which, int head_dim) {
  const tq_codec_info info = info_of(codec);
  const tq_side_info &side = which == TQ_SIDE_K ? info.k : info.v;
  REQUIRE(side.bits == 8);
  REQUIRE(side.scale_type == TQ_TYPE_F32);
  Encoded encoded;
  encoded.codes.assign(size_t(head_dim) * size_t(head_dim + 1), 0);
  for (int c = 0; c < head_dim; ++c) encoded.codes[size_t((c + 1) * head_dim + c)] = 0xff;
  const std::vector<float> scales(size_t(head_dim) + 1, 1.0f);
  encoded.scales.resize(scales.size() * 4);
  std::memcpy(encoded.scales.data(), scales.data(), encoded.scales.size());
  const std::vector<double> out = decode(target, codec, which, encoded, head_dim + 1);
  oracle::Matrix m(head_dim);
  for (int row = 0; row < head_dim; ++row) {
    for (int c = 0; c < head_dim; ++c) {
      m(row, c) = (out[size_t(c)] - out[size_t((row + 1) * head_dim + c)]) / side.level_unit;
    }
  }
  return m;
}

tq_config rotation_config(const Target &target, int head_dim, int rotation, int rounds, uint64_t seed) {
  tq_config config = make_config(target, head_dim, 8, 8);
  config.k.rotation = config.v.rotation = rotation;
  config.k.hadamard_rounds = config.v.hadamard_rounds = rounds;
  config.k.scale_type = config.v.scale_type = TQ_TYPE_F32;
  config.seed = seed;
  return config;
}

}  // namespace

TEST_CASE("base matrices are Hadamard matrices") {
  for (int order : {1, 12, 20, 28, 36}) {
    const oracle::Matrix h = oracle::base_hadamard(order);
    for (double entry : h.a) CHECK(std::fabs(entry) == 1);
    oracle::Matrix p = product_with_transpose(h);
    for (double &entry : p.a) entry /= order;
    CHECK(distance_from_identity(p) == 0);
  }
}

TEST_CASE("Hadamard rotations are those of the specification, on every target", "[slow]") {
  FRESH(random, "rotation hadamard");
  for (const Target &target : targets()) {
    for (int head_dim = 16; head_dim <= 576; head_dim += 16) {
      if (!oracle::hadamard_exists(head_dim)) continue;
      const int rounds = 1 + head_dim / 16 % 3;
      const uint64_t seed = random.pick({uint64_t{0}, random.bits(), ~uint64_t{0}});
      const tq_config config = rotation_config(target, head_dim, TQ_ROTATION_HADAMARD, rounds, seed);
      INFO(target.name << ' ' << describe(config));
      const CodecPtr codec = make_codec(config);
      for (int32_t side : {TQ_SIDE_K, TQ_SIDE_V}) {
        const oracle::Matrix got = recover_rotation(target, codec.get(), side, head_dim);
        // Entries are about 1 / sqrt(head_dim), as differences of sums of about 1: a few 2^-24 of 1.
        CHECK(largest_difference(got, oracle::hadamard_rotation(head_dim, side, rounds, seed)) <= 2e-6);
      }
    }
  }
}

TEST_CASE("dense rotations are those of the specification, orthogonal and without reflection bias") {
  FRESH(random, "rotation dense");
  for (const Target &target : targets()) {
    for (int head_dim : {16, 48, 112, 128, 176, 208}) {
      const uint64_t seed = random.bits();
      const tq_config config = rotation_config(target, head_dim, TQ_ROTATION_DENSE, 0, seed);
      INFO(target.name << ' ' << describe(config));
      const CodecPtr codec = make_codec(config);
      for (int32_t side : {TQ_SIDE_K, TQ_SIDE_V}) {
        const oracle::Matrix got = recover_rotation(target, codec.get(), side, head_dim);
        CHECK(largest_difference(got, oracle::dense_rotation(head_dim, side, seed)) <= 4e-6);
        CHECK(distance_from_identity(product_with_transpose(got)) <= 1e-5 * std::sqrt(double(head_dim)));
      }
    }
  }
}

TEST_CASE("none is the identity, and a caller's matrix is used as given") {
  FRESH(random, "rotation custom");
  for (const Target &target : targets()) {
    for (int head_dim : {16, 80, 128}) {
      const CodecPtr none = make_codec(rotation_config(target, head_dim, TQ_ROTATION_NONE, 0, 7));
      CHECK(distance_from_identity(recover_rotation(target, none.get(), TQ_SIDE_K, head_dim)) <= 1e-6);

      tq_config config = rotation_config(target, head_dim, TQ_ROTATION_CUSTOM, 0, 7);
      const std::vector<float> k = random_orthogonal(random, head_dim), v = random_orthogonal(random, head_dim);
      std::vector<float> k_given = k, v_given = v;
      config.k.matrix = k_given.data();
      config.v.matrix = v_given.data();
      const CodecPtr custom = make_codec(config);
      std::fill(k_given.begin(), k_given.end(), 0.0f);  // it was copied
      std::fill(v_given.begin(), v_given.end(), 0.0f);
      for (int32_t side : {TQ_SIDE_K, TQ_SIDE_V}) {
        oracle::Matrix want(head_dim);
        const std::vector<float> &given = side == TQ_SIDE_K ? k : v;
        std::copy(given.begin(), given.end(), want.a.begin());
        CHECK(largest_difference(recover_rotation(target, custom.get(), side, head_dim), want) <= 2e-6);
      }
    }
  }
}

TEST_CASE("a matrix that is not orthogonal is refused") {
  FRESH(random, "rotation refused");
  const Target &target = targets().front();
  std::vector<float> matrix = random_orthogonal(random, 64);
  tq_config config = rotation_config(target, 64, TQ_ROTATION_CUSTOM, 0, 0);
  config.k.matrix = config.v.matrix = matrix.data();
  CHECK(tq_supports(&config) == TQ_OK);
  // Row 5 scaled by 1 + e has a diagonal entry of (1 + e)^2, e = 4e-4 is within 1e-3 and 6e-4 is not.
  const std::vector<float> good = matrix;
  for (int c = 0; c < 64; ++c) matrix[size_t(5 * 64 + c)] = good[size_t(5 * 64 + c)] * 1.0004f;
  CHECK(tq_supports(&config) == TQ_OK);
  for (int c = 0; c < 64; ++c) matrix[size_t(5 * 64 + c)] = good[size_t(5 * 64 + c)] * 1.0006f;
  CHECK(tq_supports(&config) == TQ_ERROR_INVALID_ARGUMENT);
  matrix = good;
  matrix[100] = std::nanf("");
  CHECK(tq_supports(&config) == TQ_ERROR_INVALID_ARGUMENT);
  config.v.matrix = nullptr;
  config.k.matrix = good.data();
  CHECK(tq_supports(&config) == TQ_ERROR_NULL_POINTER);
}

TEST_CASE("seeds, sides and rounds give different rotations, equal ones equal bytes") {
  FRESH(random, "rotation seeds");
  const Target &target = targets().front();
  const std::vector<uint8_t> input = encode_elements(normals(random, 64 * 8), TQ_TYPE_F32);
  for (int rotation : {TQ_ROTATION_HADAMARD, TQ_ROTATION_DENSE}) {
    tq_config config = make_config(target, 64, 4, 4);
    config.k.rotation = config.v.rotation = rotation;
    config.seed = random.bits();
    const CodecPtr a = make_codec(config), b = make_codec(config);
    config.seed ^= 1;
    const CodecPtr c = make_codec(config);
    const Encoded ka = encode(target, a.get(), TQ_SIDE_K, input, TQ_TYPE_F32);
    CHECK(ka.codes == encode(target, b.get(), TQ_SIDE_K, input, TQ_TYPE_F32).codes);
    CHECK(ka.codes != encode(target, a.get(), TQ_SIDE_V, input, TQ_TYPE_F32).codes);
    CHECK(ka.codes != encode(target, c.get(), TQ_SIDE_K, input, TQ_TYPE_F32).codes);
    CHECK(info_of(a.get()).page_fingerprint == info_of(b.get()).page_fingerprint);
    CHECK(info_of(a.get()).page_fingerprint != info_of(c.get()).page_fingerprint);
    CHECK(info_of(a.get()).tile_fingerprint != info_of(c.get()).tile_fingerprint);
  }
}
