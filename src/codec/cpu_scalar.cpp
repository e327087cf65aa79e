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

float squared_norm(const float *y, int n) {
  float squares[kMaxHeadDim];
  for (int c = 0; c < n; ++c) squares[c] = y[c] * y[c];
  return ordered_sum(squares, n);
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
  float y[kMaxHeadDim];
  std::copy_n(row, n, y);
  rotate(side, y);
  float norm2 = squared_norm(y, n);
  int exponent = 0;
  if (!(norm2 >= kMinSquaredNorm && norm2 <= kMaxSquaredNorm)) {
    float largest = 0;
    for (int c = 0; c < n; ++c) {
      if (!std::isfinite(row[c])) return Encoded::kNonFinite;
      largest = std::max(largest, std::fabs(row[c]));
    }
    if (largest == 0) return Encoded::kFine;
    exponent = std::ilogb(largest);
    for (int c = 0; c < n; ++c) y[c] = std::ldexp(row[c], -exponent);
    rotate(side, y);
    norm2 = squared_norm(y, n);
  }

  float products[kMaxHeadDim];
  int uu = 0;
  if (side.bits == 8) {
    float largest = 0;
    for (int c = 0; c < n; ++c) largest = std::max(largest, std::fabs(y[c]));
    const float gain = 127.5f / largest;
    for (int c = 0; c < n; ++c) {
      const int grid = choose_grid8(y[c] * gain), u = 2 * grid + 1;
      record[c] = uint8_t(grid);
      products[c] = y[c] * float(u);
      uu += u * u;
    }
  } else {
    const float gain = side.z_gain / std::sqrt(norm2);
    for (int c = 0; c < n; ++c) {
      const unsigned code = choose_code(y[c] * gain, side.thresholds, side.bits);
      const float u = side.levels[code];
      put_code(record, n, side.bits, c, code);
      products[c] = y[c] * u;
      uu += int(u) * int(u);
    }
  }
  const float dot = ordered_sum(products, n);
  const float value = choose_scale(side.scale_rule, norm2, dot, float(uu), side.scale_gain);
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
    const float gain = scale * side.decode_gain;
    for (int c = 0; c < side.head_dim; ++c) row[c] = row[c] * gain;
  }
}

}  // namespace

const CodecKernels kCodecScalar = {to_f32, from_f32, encode, decode};

}  // namespace tqkv
