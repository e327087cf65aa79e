// SPDX-License-Identifier: Apache-2.0
// The scalar target: one vector after the other, by the functions that the kernels share.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "codec/cpu.hpp"
#include "codec/half.hpp"
#include "codec/quantize.hpp"

namespace tqkv {
namespace {

void to_f32(const void *input, int type, int count, float *output) {
  if (type == TQ_TYPE_F32) {
    std::memcpy(output, input, size_t(count) * 4);
    return;
  }
  const auto *half = static_cast<const uint16_t *>(input);
  for (int i = 0; i < count; ++i) output[i] = type == TQ_TYPE_F16 ? f32_from_f16(half[i]) : f32_from_bf16(half[i]);
}

void from_f32(const float *input, int type, int count, void *output) {
  if (type == TQ_TYPE_F32) {
    std::memcpy(output, input, size_t(count) * 4);
    return;
  }
  auto *half = static_cast<uint16_t *>(output);
  for (int i = 0; i < count; ++i) half[i] = type == TQ_TYPE_F16 ? f16_from_f32(input[i]) : bf16_from_f32(input[i]);
}

Encoded store_scale(const Side &side, float value, void *scale) {
  if (side.scale_type == TQ_TYPE_F32) {
    const float kept = std::min(value, FLT_MAX);
    std::memcpy(scale, &kept, 4);
    return value > FLT_MAX ? Encoded::kClamped : Encoded::kFine;
  }
  constexpr float kMaxF16 = 65504;
  const uint16_t kept = f16_from_f32(std::min(value, kMaxF16));
  std::memcpy(scale, &kept, 2);
  return value > kMaxF16 ? Encoded::kClamped : Encoded::kFine;
}

}  // namespace

Encoded encode_vector(const Side &side, float *row, uint8_t *record, void *scale) {
  const int n = side.head_dim;
  std::memset(record, 0, size_t(side.code_bytes()));
  std::memset(scale, 0, size_t(side.scale_bytes()));
  float norm2 = squared_norm(row, n);
  int exponent = 0;
  if (!(norm2 >= kMinSquaredNorm && norm2 <= kMaxSquaredNorm)) {
    float largest = 0;
    for (int c = 0; c < n; ++c) {
      if (!std::isfinite(row[c])) return Encoded::kNonFinite;
      largest = std::max(largest, std::fabs(row[c]));
    }
    if (largest == 0) return Encoded::kFine;
    exponent = std::ilogb(largest);
    for (int c = 0; c < n; ++c) row[c] = std::ldexp(row[c], -exponent);
    norm2 = squared_norm(row, n);
  }
  const float norm = std::sqrt(norm2), gain = side.steps / norm;
  if (!side.matrix.empty()) rotate(side, row);
  int32_t y[kMaxHeadDim];
  for (int c = 0; c < n; ++c) y[c] = to_integer(row[c], gain);
  rotate(side, y);

  int64_t dot = 0;
  int uu = 0;
  int largest = 0;
  for (int c = 0; c < n; ++c) largest = std::max(largest, std::abs(y[c]));
  const float grid_gain = gain8(largest);
  for (int c = 0; c < n; ++c) {
    int u;
    if (side.bits == 8) {
      const int grid = choose_grid8(y[c], grid_gain);
      u = 2 * grid + 1;
      record[c] = uint8_t(grid);
    } else {
      const unsigned code = choose_code(y[c], side.thresholds, side.bits);
      u = int(side.levels[code]);
      put_code(record, n, side.bits, c, code);
    }
    dot += int64_t{y[c]} * u;
    uu += u * u;
  }
  const float value = choose_scale(side.scale_rule, norm, dot, uu, side.scale_gain);
  return store_scale(side, exponent == 0 ? value : std::ldexp(value, exponent), scale);
}

namespace {

void encode(const Side &side, float *rows, int n, uint8_t *records, void *scales, Encoded *encoded) {
  for (int i = 0; i < n; ++i) {
    encoded[i] = encode_vector(side, rows + i * side.head_dim, records + i * side.code_bytes(),
                               static_cast<uint8_t *>(scales) + i * side.scale_bytes());
  }
}

void decode(const Side &side, const uint8_t *records, const void *scales, int n, float *rows) {
  for (int i = 0; i < n; ++i) {
    const uint8_t *record = records + i * side.code_bytes();
    float *row = rows + i * side.head_dim;
    for (int c = 0; c < side.head_dim; ++c) {
      const unsigned code = get_code(record, side.head_dim, side.bits, c);
      row[c] = side.bits == 8 ? float(2 * int(int8_t(code)) + 1) : side.levels[code];
    }
    rotate_back(side, row);
    float scale = 0;
    to_f32(static_cast<const uint8_t *>(scales) + i * side.scale_bytes(), side.scale_type, 1, &scale);
    const float gain = decode_gain(scale, side.decode_gain);
    for (int c = 0; c < side.head_dim; ++c) {
      // What a fused multiply-add of +0 gives: a product of a zero is +0, one that underflows keeps its sign.
      const bool flipped = side.hadamard_rounds > 0 && side.signs[size_t(c)] != 0;
      const float y = flipped ? -row[c] : row[c], product = y * gain;
      const float x = product == 0 && (y == 0 || gain == 0) ? 0.0f : product;
      row[c] = flipped ? -x : x;
    }
  }
}

}  // namespace

const CodecKernels kCodecScalar = {to_f32, from_f32, encode, decode};

}  // namespace tqkv
