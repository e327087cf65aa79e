// SPDX-License-Identifier: Apache-2.0
// Every SIMD target of the codec gives the bits of the scalar one: codes, scales, what became of a vector, decoded values
// and conversions, for every kind of side and with extreme vectors among usual ones.
#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "catch.hpp"
#include "codec/codec.hpp"
#include "codec/half.hpp"
#include "codec/quantize.hpp"
#include "codec/rotation.hpp"
#include "runtime/device.hpp"
#include "runtime/error.hpp"

namespace {

using namespace tqkv;

struct Target {
  const char *name;
  const CodecKernels *kernels;
};

std::vector<Target> simd_targets() {
  std::vector<Target> targets;
  for (const int simd : {TQ_SIMD_AVX2, TQ_SIMD_AVX512, TQ_SIMD_NEON}) {
    if (simd_available(simd)) targets.push_back({simd_name(simd), codec_kernels(simd)});
  }
  return targets;
}

std::mt19937_64 generator(uint64_t salt) {
  return std::mt19937_64(tqkv_test::seed() + 0x9e3779b97f4a7c15 * salt);
}

int draw(std::mt19937_64 &random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

float any_float(std::mt19937_64 &random) {
  return std::bit_cast<float>(uint32_t(random()));
}

// Mostly what models produce; else what finds the corners of the arithmetic.
void draw_vector(std::mt19937_64 &random, float *row, int n) {
  std::normal_distribution<float> normal;
  const float size = std::exp(2 * normal(random));
  for (int c = 0; c < n; ++c) row[c] = size * normal(random);
  const int at = draw(random, 0, n - 1);
  switch (draw(random, 0, 25)) {
    case 0:  // zeros of both signs
      for (int c = 0; c < n; ++c) row[c] = random() % 2 != 0 ? 0.0f : -0.0f;
      break;
    case 1:
      for (int c = 0; c < n; ++c) row[c] = std::ldexp(normal(random), draw(random, -149, -120));
      break;
    case 2:
      for (int c = 0; c < n; ++c) row[c] = std::ldexp(normal(random), 124);
      break;
    case 3:
      row[at] = std::numeric_limits<float>::quiet_NaN();
      break;
    case 4:
      row[at] = random() % 2 != 0 ? INFINITY : -INFINITY;
      break;
    case 5:  // one coordinate, the others zeros of both signs
      for (int c = 0; c < n; ++c) row[c] = c == at ? size : random() % 2 != 0 ? 0.0f : -0.0f;
      break;
    case 6:  // equal magnitudes: exact cancellation, and values on thresholds
      for (int c = 0; c < n; ++c) row[c] = random() % 2 != 0 ? size : -size;
      break;
    case 7:  // few nonzero coordinates
      for (int c = 0; c < n; ++c) row[c] = c % 8 == at % 8 ? std::trunc(normal(random)) : 0.0f;
      break;
    case 8:  // above the largest fp16 scale
      for (int c = 0; c < n; ++c) row[c] = 1e6f * normal(random);
      break;
    case 9:  // around the limits of the squared norm
      for (int c = 0; c < n; ++c) row[c] *= random() % 2 != 0 ? 0x1p-41f : 0x1p39f;
      break;
    case 10:
      for (int c = 0; c < n; ++c) row[c] = any_float(random);
      break;
    default:
      break;
  }
}

// I - 2 v v^T / |v|^2: orthogonal, and no structure that hides a wrong index.
std::vector<float> reflection(std::mt19937_64 &random, int n) {
  std::normal_distribution<double> normal;
  std::vector<double> v(static_cast<size_t>(n));
  double norm2 = 0;
  for (double &x : v) {
    x = normal(random);
    norm2 += x * x;
  }
  std::vector<float> matrix;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) matrix.push_back(float((i == j) - 2 * v[size_t(i)] * v[size_t(j)] / norm2));
  }
  return matrix;
}

struct Case {
  tq_side_config config{};
  std::vector<float> matrix, levels;

  Case(int head_dim, int bits, int rotation) {
    config.head_dim = head_dim;
    config.bits = bits;
    config.rotation = rotation;
  }
  Case &rounds(int n) {
    config.hadamard_rounds = n;
    return *this;
  }
  Case &scale(int rule, int type) {
    config.scale_rule = rule;
    config.scale_type = type;
    return *this;
  }

  Side side(uint64_t seed, int which) {
    config.matrix = matrix.empty() ? nullptr : matrix.data();
    config.levels = levels.empty() ? nullptr : levels.data();
    config.num_levels = int32_t(levels.size());
    Side made;
    const tq_status status = make_side(config, which, seed, TQ_TYPE_BF16, "side", &made);
    INFO(last_error());
    REQUIRE(status == TQ_OK);
    return made;
  }

  std::string text(int n) const {
    std::ostringstream out;
    out << "head_dim " << config.head_dim << ", bits " << config.bits << ", rotation " << config.rotation << ", rounds "
        << config.hadamard_rounds << ", codebook " << config.codebook << ", scale rule " << config.scale_rule
        << ", scale type " << config.scale_type << ", n " << n;
    return out.str();
  }
};

// Index of the first element that differs in a bit, or -1. NaNs are equal: processors and compilers differ in the sign that
// arithmetic gives them.
template <class T>
int64_t first_difference(const std::vector<T> &a, const std::vector<T> &b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(T)) != 0 && (a[i] == a[i] || b[i] == b[i])) return int64_t(i);
  }
  return -1;
}

constexpr size_t kGuard = 64;  // bytes past the outputs, which must stay

struct Encodings {
  std::vector<uint8_t> records, scales;
  std::vector<Encoded> encoded;
};

Encodings encode_with(const CodecKernels &kernels, const Side &side, std::vector<float> rows, int n) {
  Encodings result;
  result.records.assign(size_t(n * side.code_bytes()) + kGuard, 0xa5);
  result.scales.assign(size_t(n * side.scale_bytes()) + kGuard, 0x5a);
  result.encoded.assign(size_t(n), Encoded::kClamped);
  kernels.encode(side, rows.data(), n, result.records.data(), result.scales.data(), result.encoded.data());
  return result;
}

std::vector<float> decode_with(const CodecKernels &kernels, const Side &side, const Encodings &from, int n) {
  std::vector<float> rows(size_t(n * side.head_dim) + kGuard / 4, 12345.0f);
  // Exactly the bytes of the vectors: reading past them is an error that sanitizers see.
  const std::vector<uint8_t> records(from.records.begin(), from.records.end() - ptrdiff_t(kGuard));
  const std::vector<uint8_t> scales(from.scales.begin(), from.scales.end() - ptrdiff_t(kGuard));
  kernels.decode(side, records.data(), scales.data(), n, rows.data());
  return rows;
}

void check_side(std::mt19937_64 &random, Case &test, int n) {
  const Side side = test.side(random(), draw(random, TQ_SIDE_K, TQ_SIDE_V));
  std::vector<float> rows(size_t(n * side.head_dim));
  for (int i = 0; i < n; ++i) draw_vector(random, &rows[size_t(i * side.head_dim)], side.head_dim);
  const Encodings expected = encode_with(kCodecScalar, side, rows, n);
  const std::vector<float> expected_rows = decode_with(kCodecScalar, side, expected, n);
  Encodings noise = expected;
  for (size_t i = 0; i < noise.records.size() - kGuard; ++i) noise.records[i] = uint8_t(random());
  for (size_t i = 0; i < noise.scales.size() - kGuard; ++i) noise.scales[i] = uint8_t(random());
  const std::vector<float> expected_noise = decode_with(kCodecScalar, side, noise, n);

  for (const Target &target : simd_targets()) {
    INFO(target.name << ": " << test.text(n));
    const Encodings got = encode_with(*target.kernels, side, rows, n);
    CHECK(first_difference(expected.records, got.records) == -1);
    CHECK(first_difference(expected.scales, got.scales) == -1);
    CHECK(expected.encoded == got.encoded);
    CHECK(first_difference(expected_rows, decode_with(*target.kernels, side, expected, n)) == -1);
    CHECK(first_difference(expected_noise, decode_with(*target.kernels, side, noise, n)) == -1);
  }
}

constexpr int kBits[] = {1, 2, 3, 4, 8};
constexpr int kRules[] = {TQ_SCALE_LEAST_MSE, TQ_SCALE_NORM, TQ_SCALE_UNBIASED};

}  // namespace

TEST_CASE("this machine's SIMD target is tested") {
  bool found = false;
  for (const Target &target : simd_targets()) {
    found = found || target.kernels == codec_kernels(best_simd());
    CHECK(target.kernels->encode != kCodecScalar.encode);
  }
  CHECK((found || best_simd() == TQ_SIMD_SCALAR));
}

TEST_CASE("SIMD targets give the scalar target's bits at every head size and width") {
  std::mt19937_64 random = generator(1);
  for (int head_dim = 16; head_dim <= kMaxHeadDim; head_dim += 16) {
    for (const int bits : kBits) {
      const int type = random() % 2 != 0 ? TQ_TYPE_F16 : TQ_TYPE_F32;
      Case none = Case(head_dim, bits, TQ_ROTATION_NONE).scale(kRules[random() % 3], type);
      check_side(random, none, draw(random, 1, kGroup));
      for (int rounds = 1; rounds <= 3 && hadamard_base(head_dim) != 0; ++rounds) {
        Case hadamard = Case(head_dim, bits, TQ_ROTATION_HADAMARD).rounds(rounds).scale(kRules[random() % 3], type);
        check_side(random, hadamard, draw(random, 1, kGroup));
      }
    }
    Case custom = Case(head_dim, kBits[random() % 5], TQ_ROTATION_CUSTOM);
    custom.matrix = reflection(random, head_dim);
    check_side(random, custom, draw(random, 1, kGroup));
  }
}

TEST_CASE("SIMD targets give the scalar target's bits with dense rotations") {
  std::mt19937_64 random = generator(2);
  for (const int head_dim : {16, 80, 112, 128, 176}) {
    Case test(head_dim, kBits[random() % 5], TQ_ROTATION_DENSE);
    check_side(random, test, kGroup);
  }
}

TEST_CASE("SIMD targets give the scalar target's bits for every number of vectors, rule and scale type") {
  std::mt19937_64 random = generator(3);
  for (const int head_dim : {48, 64, 80, 128, 144, 256}) {
    for (const int bits : kBits) {
      for (const int rule : kRules) {
        for (const int type : {TQ_TYPE_F16, TQ_TYPE_F32}) {
          for (int n = 1; n <= kGroup; ++n) {
            Case test = Case(head_dim, bits, TQ_ROTATION_HADAMARD).scale(rule, type);
            check_side(random, test, n);
          }
        }
      }
    }
  }
}

TEST_CASE("SIMD targets give the scalar target's bits with every codebook") {
  std::mt19937_64 random = generator(4);
  for (const int head_dim : {16, 64, 96, 128, 272}) {
    for (int bits = 1; bits <= 4; ++bits) {
      for (const int codebook : {TQ_CODEBOOK_GAUSSIAN, TQ_CODEBOOK_BETA, TQ_CODEBOOK_UNIFORM, TQ_CODEBOOK_CUSTOM}) {
        Case test(head_dim, bits, head_dim == 272 ? TQ_ROTATION_NONE : TQ_ROTATION_HADAMARD);
        test.config.codebook = codebook;
        if (codebook == TQ_CODEBOOK_CUSTOM) {
          const int half = 1 << (bits - 1);
          float level = 0;
          for (int i = 0; i < half; ++i) {
            level += 0.5f + float(random() % 1000) / 1000;
            test.levels.push_back(level);
            test.levels.insert(test.levels.begin(), -level);
          }
        }
        check_side(random, test, kGroup);
      }
    }
  }
}

TEST_CASE("SIMD targets place values on and beside thresholds as the scalar target does") {
  // Without a rotation a vector can be built whose coordinates, in units, are the thresholds or their neighbours.
  std::mt19937_64 random = generator(5);
  for (const int bits : {2, 3, 4}) {
    const int head_dim = 128;
    Case test = Case(head_dim, bits, TQ_ROTATION_NONE);
    const Side side = test.side(0, TQ_SIDE_K);
    const int thresholds = (1 << (bits - 1)) - 1;
    std::vector<float> rows(size_t(kGroup * head_dim));
    for (int i = 0; i < kGroup; ++i) {
      float *row = &rows[size_t(i * head_dim)];
      // As many as fit into the norm; the last coordinate takes the rest of it.
      double rest = double(side.y_norm) * double(side.y_norm);
      for (int c = 0; c < head_dim - 1; ++c) {
        const float near = float(side.thresholds[random() % unsigned(thresholds)] + draw(random, -1, 1));
        row[c] = double(near) * double(near) > rest ? 0 : random() % 2 != 0 ? near : -near;
        rest -= double(row[c]) * double(row[c]);
      }
      row[head_dim - 1] = float(std::sqrt(rest));
    }
    const Encodings expected = encode_with(kCodecScalar, side, rows, kGroup);
    for (const Target &target : simd_targets()) {
      INFO(target.name << ": " << test.text(kGroup));
      CHECK(first_difference(expected.records, encode_with(*target.kernels, side, rows, kGroup).records) == -1);
    }
  }
}

TEST_CASE("SIMD targets convert all 16-bit values as the scalar target does") {
  std::vector<uint16_t> all(1 << 16);
  for (size_t i = 0; i < all.size(); ++i) all[i] = uint16_t(i);
  for (const int type : {TQ_TYPE_F16, TQ_TYPE_BF16}) {
    std::vector<float> expected(all.size());
    kCodecScalar.to_f32(all.data(), type, int(all.size()), expected.data());
    for (const Target &target : simd_targets()) {
      INFO(target.name << ", type " << type);
      std::vector<float> got(all.size());
      target.kernels->to_f32(all.data(), type, int(all.size()), got.data());
      CHECK(first_difference(expected, got) == -1);
      // Each value alone among usual ones: a NaN must not change its neighbours.
      std::vector<uint16_t> mixed;
      for (const int h : {0x7c01, 0xfc01, 0x7e00, 0x7f81, 0xff81, 0x7fff, 0xffff}) {
        for (int i = 0; i < 17; ++i) mixed.push_back(uint16_t(i == 5 ? h : 0x3c00 + i));
      }
      std::vector<float> expected_mixed(mixed.size()), got_mixed(mixed.size());
      kCodecScalar.to_f32(mixed.data(), type, int(mixed.size()), expected_mixed.data());
      target.kernels->to_f32(mixed.data(), type, int(mixed.size()), got_mixed.data());
      CHECK(first_difference(expected_mixed, got_mixed) == -1);
    }
  }
}

TEST_CASE("SIMD targets round f32 to 16 bits as the scalar target does") {
  std::mt19937_64 random = generator(6);
  std::vector<float> values;
  // Every f16 and bf16 value, the middle to the next one, and both sides of it.
  for (uint32_t h = 0; h < 1 << 16; ++h) {
    for (const uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      values.push_back(std::bit_cast<float>(h << 16 | low));
    }
    const uint32_t f16 = std::bit_cast<uint32_t>(f32_from_f16(uint16_t(h)));
    for (const uint32_t low : {0x0fffu, 0x1000u, 0x1001u}) values.push_back(std::bit_cast<float>(f16 + low));
    values.push_back(std::ldexp(float(h), -26));  // among the subnormal ones
    values.push_back(std::ldexp(float(2 * h + 1), -26));
  }
  for (int i = 0; i < 100000; ++i) values.push_back(any_float(random));
  for (const float edge : {65503.99f, 65504.0f, 65519.99f, 65520.0f, FLT_MAX, INFINITY, FLT_MIN, FLT_TRUE_MIN}) {
    values.push_back(edge);
    values.push_back(-edge);
  }
  for (const int type : {TQ_TYPE_F16, TQ_TYPE_BF16}) {
    std::vector<uint16_t> expected(values.size()), got(values.size());
    kCodecScalar.from_f32(values.data(), type, int(values.size()), expected.data());
    for (const Target &target : simd_targets()) {
      INFO(target.name << ", type " << type);
      target.kernels->from_f32(values.data(), type, int(values.size()), got.data());
      CHECK(first_difference(expected, got) == -1);
    }
  }
}

TEST_CASE("SIMD targets convert exactly as many values as asked") {
  std::mt19937_64 random = generator(7);
  for (int count = 1; count <= 70; ++count) {
    for (const int type : {TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16}) {
      const size_t bytes = size_t(count * type_bytes(type));
      std::vector<float> input(static_cast<size_t>(count));
      for (float &x : input) x = any_float(random);
      std::vector<uint8_t> expected(bytes + kGuard, 0xa5);
      kCodecScalar.from_f32(input.data(), type, count, expected.data());
      std::vector<float> expected_back(size_t(count) + 16, 12345.0f);
      kCodecScalar.to_f32(expected.data(), type, count, expected_back.data());
      for (const Target &target : simd_targets()) {
        INFO(target.name << ", type " << type << ", count " << count);
        std::vector<uint8_t> got(bytes + kGuard, 0xa5);
        target.kernels->from_f32(input.data(), type, count, got.data());
        CHECK(first_difference(expected, got) == -1);
        const std::vector<uint8_t> exact(expected.begin(), expected.begin() + ptrdiff_t(bytes));
        std::vector<float> back(size_t(count) + 16, 12345.0f);
        target.kernels->to_f32(exact.data(), type, count, back.data());
        CHECK(first_difference(expected_back, back) == -1);
      }
    }
  }
}
