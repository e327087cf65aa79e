// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the scalar codec that decides stored bytes: index choice, order of sums, scale. Every step is one
// IEEE operation in a fixed order, so that CPU targets and GPUs agree bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "codec/host_device.hpp"

namespace tqkv {

inline constexpr int kMaxHeadDim = 576;

// Squared norms outside this range are computed again after an exact power-of-two scaling of the vector, so that no
// intermediate over- or underflows.
inline constexpr float kMinSquaredNorm = 0x1p-80f;
inline constexpr float kMaxSquaredNorm = 0x1p80f;

// THE ORDER OF SUMS over head_dim values. With head_dim = o * 2^k and o odd: blocks of m = 4 * o adjacent values (m = 1
// if o = 1); inside a block groups of four, (a + b) + (c + d), are added one after the other; the 2^i block sums are
// added pairwise, neighbours first. `v` is overwritten; the sum is in v[0].
TQKV_HOST_DEVICE int sum_block(int head_dim) {
  int odd = head_dim;
  while (odd % 2 == 0) odd /= 2;
  return odd == 1 ? 1 : 4 * odd;
}

TQKV_HOST_DEVICE float ordered_sum(float *v, int head_dim) {
  const int m = sum_block(head_dim);
  for (int b = 0; m > 1 && b < head_dim; b += m) {
    float sum = (v[b] + v[b + 1]) + (v[b + 2] + v[b + 3]);
    for (int i = b + 4; i < b + m; i += 4) sum = sum + ((v[i] + v[i + 1]) + (v[i + 2] + v[i + 3]));
    v[b] = sum;
  }
  for (int stride = m; stride < head_dim; stride *= 2) {
    for (int i = 0; i < head_dim; i += 2 * stride) v[i] = v[i] + v[i + stride];
  }
  return v[0];
}

// Index choice. z is the coordinate in steps of the int8 grid; `thresholds` are the 2^(bits-1) - 1 midpoints between
// neighbouring magnitudes, multiples of 1/2. A value on a threshold takes the larger magnitude. The sign is the sign
// bit. Returns the code as record.hpp defines it.
TQKV_HOST_DEVICE unsigned choose_code(float z, const float *thresholds, int bits) {
  const bool negative = std::signbit(z);
  const float a = std::fabs(z);
  const int count = 1 << (bits - 1);
  int magnitude = 0;
  for (int i = 0; i + 1 < count; ++i) magnitude += a >= thresholds[i];
  if (bits == 4) return unsigned(magnitude) | unsigned(negative) << 3;
  return unsigned(negative ? count - 1 - magnitude : count + magnitude);
}

// The same for 8 bits, where every half-integer of the grid is a level: 127.5 steps is the largest |z|.
TQKV_HOST_DEVICE int choose_grid8(float z) {
  const float a = std::fabs(z);
  const int m = a < 127.0f ? int(a) : 127;
  return std::signbit(z) ? ~m : m;
}

// The stored scale before rounding to its type: for the rotated vector y (without its normalisation `gain`, the factor
// that makes the rotation orthogonal, already multiplied by 2 / level_unit) and the odd integers u = 2 * grid + 1 that
// its codes stand for: norm2 = |y|^2, dot = <y, u>, uu = |u|^2.
TQKV_HOST_DEVICE float choose_scale(int rule, float norm2, float dot, float uu, float gain) {
  if (rule == 1) return dot / uu * gain;               // TQ_SCALE_LEAST_MSE
  if (rule == 2) return std::sqrt(norm2 / uu) * gain;  // TQ_SCALE_NORM
  return norm2 / dot * gain;                           // TQ_SCALE_UNBIASED
}

}  // namespace tqkv
