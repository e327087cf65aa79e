// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the scalar codec that decides stored bytes. Floating point is left only where a fixed order costs
// nothing, and every step of it is one IEEE operation; rotation, choice of levels and sums are exact in integers. So CPU
// targets, warps and tensor cores agree bit for bit, whatever their order.
//
// ENCODING x to codes and a scale:
//   norm2 = |x|^2              by squared_norm(); outside [kMinSquaredNorm, kMaxSquaredNorm] x is multiplied by a power
//                              of two first and the scale by its inverse at the end
//   X_c = the f32 product x_c * (side.steps / sqrt(norm2)), to the nearest integer, ties to even
//   Y = the Hadamard rounds of rotation.hpp applied to X, exact; after more than one round, Y_c * side.round_gain to the
//       nearest integer. A dense rotation is applied to x instead, in f32, after norm2 and before X, and Y = X.
//   Y_c is the coordinate in units of which the coordinates' root mean square has kUnits, and |Y| = side.y_norm but for
//   rounding, which adds 0.03% to the squared error of 4 bits at head_dim 128. X is exact in f16: |X_c| <= kUnits.
//   code_c = choose_code(Y_c), which stands for the odd integer u_c = 2 grid + 1
//   scale = choose_scale(...)
//
// DECODING: x_c = +-(sum of +-u) * decode_gain(...), rounded once, the random sign of the first round last.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "codec/host_device.hpp"

namespace tqkv {

inline constexpr int kMaxHeadDim = 576;

inline constexpr float kMinSquaredNorm = 0x1p-80f;
inline constexpr float kMaxSquaredNorm = 0x1p80f;

// Element c adds to cell c % kCells, in the order of c, by fused multiply-add; the cells are added pairwise, neighbours
// first.
inline constexpr int kCells = 32;

TQKV_HOST_DEVICE float squared_norm(const float *x, int head_dim) {
  float cells[kCells] = {};
  for (int c = 0; c < head_dim; ++c) cells[c % kCells] = std::fma(x[c], x[c], cells[c % kCells]);
  for (int stride = 1; stride < kCells; stride *= 2) {
    for (int i = 0; i < kCells; i += 2 * stride) cells[i] = cells[i] + cells[i + stride];
  }
  return cells[0];
}

inline constexpr int kUnits = 2047, kUnits8 = 32766;  // at 8 bits

// The integer nearest to the f32 product x * gain, ties to even, below 2^22: adding kRoundingBias leaves it in the sum's
// last bits.
inline constexpr float kRoundingBias = 0x1.8p23f;
TQKV_HOST_DEVICE int to_integer(float x, float gain) {
  const float product = x * gain;
  return int((product + kRoundingBias) - kRoundingBias);
}

// Cells of Y: floor(Y_c * side.cells), exact. They do not straddle thresholds: a table has an entry a cell. The factor's
// last bit is set, so that the product with no Y but 0 is an integer, and -Y is in the mirror image of Y's cell.
inline int cell_of(int y, float cells) {
  return int(std::floor(double(y) * double(cells)));
}

// The code of Y_c as record.hpp defines it: its level's index is the number of thresholds not above Y_c, of which 0 is
// the middle one, and -Y_c has the mirror image of Y_c's. `thresholds`: the positive ones, between neighbouring magnitudes.
TQKV_HOST_DEVICE unsigned choose_code(int y, const int *thresholds, int bits) {
  const int folded = y < 0 ? -y : y;
  const int count = 1 << (bits - 1);
  int magnitude = 0;
  for (int i = 0; i + 1 < count; ++i) magnitude += folded >= thresholds[i];
  if (bits == 4) return unsigned(magnitude) | unsigned(y < 0) << 3;
  return unsigned(y < 0 ? count - 1 - magnitude : count + magnitude);
}

// The same for 8 bits, where every half-integer of the grid is a level and 127.5 steps the vector's largest |Y_c|.
TQKV_HOST_DEVICE float gain8(int largest) {
  return 127.5f / float(largest);
}
TQKV_HOST_DEVICE int choose_grid8(int y, float gain) {
  const float a = float(y < 0 ? -y : y) * gain;
  const int m = a < 127.0f ? int(a) : 127;
  return y < 0 ? ~m : m;
}

// The factor of a decoded vector. Its last two bits are zero so that 3 * 2^22 times it is exact: sums that are left in the
// bits of kRoundingBias + sum become values by one fused multiply-add.
TQKV_HOST_DEVICE float decode_gain(float scale, float side_gain) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scale * side_gain) & ~3u);
}

// Division and root as IEEE rounds them, of all numbers. A kernel has others, of those that are not far from 1.
struct Arithmetic {
  TQKV_HOST_DEVICE float divide(float a, float b) { return a / b; }
  TQKV_HOST_DEVICE float root(float x) { return std::sqrt(x); }
};

// The stored scale before rounding to its type: norm = |x|, dot = <Y, u>, uu = |u|^2; `gain` belongs to the rule.
template <class Of = Arithmetic>
TQKV_HOST_DEVICE float choose_scale(int rule, float norm, int64_t dot, int uu, float gain) {
  if (rule == 1) return Of::divide(float(dot), float(uu)) * norm * gain;  // TQ_SCALE_LEAST_MSE
  if (rule == 2) return Of::divide(norm, Of::root(float(uu))) * gain;     // TQ_SCALE_NORM
  return Of::divide(norm, float(dot)) * gain;                             // TQ_SCALE_UNBIASED
}

}  // namespace tqkv
