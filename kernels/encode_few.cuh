// SPDX-License-Identifier: Apache-2.0
// Encode and store of few vectors, where what counts is how long one takes: a warp has one, lane i its channels i + 32 j,
// and no table is made before.
#pragma once

#include "kernels/device/launch.cuh"
#include "kernels/encode_any.cuh"

namespace tqkv::cuda {

inline constexpr int kFewWarps = 4;               // a block
inline constexpr int kFewPerMultiprocessor = 16;  // vectors: more are for encode_rotated_kernel

// Finite rows of any magnitude become rows whose largest value is in [1, 2).
struct Magnitude {
  int exponent = 0;
  bool zero = false, not_finite = false;
};
template <int kPerLane>
__device__ __forceinline__ Magnitude find_magnitude(const float (&x)[kPerLane]) {
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) largest = max(largest, __float_as_uint(x[j]) & 0x7fffffff);
  for (int lane = 16; lane > 0; lane /= 2) largest = max(largest, __shfl_xor_sync(kAll, largest, lane));
  Magnitude found;
  found.not_finite = largest >= 0x7f800000;
  found.zero = found.not_finite || largest == 0;
  if (!found.zero) found.exponent = exponent_of(__uint_as_float(largest));
  return found;
}

// A plane of one record.
template <int kHeadDim, int kBits>
__device__ __forceinline__ void write_one(const uint32_t *nibbles, int plane, int words, uint8_t *to, bool in_tile_of_v,
                                          int row) {
  const int index = lane_index();
  if (index >= words) return;
  const uint32_t word = plane_word<kBits>(nibbles, plane, index);
  if (!in_tile_of_v) {
    reinterpret_cast<uint32_t *>(to)[index] = word;
    return;
  }
  to += 64 * index + 16 * (row / 4) + row % 4;
#pragma unroll
  for (int e = 0; e < 4; ++e) to[4 * e] = uint8_t(word >> (8 * e));
}

template <int kHeadDim>
__global__ void __launch_bounds__(32 * kFewWarps) encode_few_kernel(const __grid_constant__ VectorCall call) {
  static_assert(is_power_of_two(kHeadDim));
  constexpr int kPerLane = kHeadDim / 32;
  struct Scratch {
    alignas(8) uint8_t entries[kHeadDim];
    uint32_t nibbles[kHeadDim / 8];
  };
  __shared__ Scratch scratch[kFewWarps];
  __shared__ uint32_t touched[kFewWarps];
  grid_dependency_launch();
  touch_parameter<kFewWarps>(call, touched);
  const VectorSide &v = call.side[blockIdx.y];
  const SideParams &side = v.side;
  Scratch &s = scratch[threadIdx.x / 32];
  const int lane = lane_index(), count = 1 << (side.bits - 1);
  const uint32_t vector = blockIdx.x * kFewWarps + threadIdx.x / 32;
  const int64_t token = vector / uint32_t(call.heads);
  const int head = int(vector % uint32_t(call.heads));
  float thresholds[7];  // of those that there are not, out of reach
#pragma unroll
  for (int k = 0; k < 7; ++k) thresholds[k] = k + 1 < count ? float(side.thresholds[k]) : 0x1p30f;
  const uint2 magnitudes = magnitude_bytes(side);
  const int64_t row = token * v.rows.token_stride + head * v.rows.head_stride, from = row + lane;
  const bool wide = v.rows.type == TQ_TYPE_F32;
  if (token < call.tokens) {  // what the kernel before may write still is in the L2 cache as well
    prefetch_l2(static_cast<const uint8_t *>(v.rows.data) + (row + kPerLane * lane) * (wide ? 4 : 2));
    if (call.slots != nullptr) prefetch_l2(call.slots + token);
  }
  grid_dependency_wait();
  if (token >= call.tokens) return;

  float x[kPerLane];
  Slots slots{token, -1, false};
  if (call.slots != nullptr)
    slots = Slots{call.slots[token], call.exact_slots != nullptr ? call.exact_slots[token] : -1};
  // All of them are under way before the first is needed.
  if (wide) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) x[j] = static_cast<const float *>(v.rows.data)[from + 32 * j];
  } else {
    uint16_t half[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) half[j] = static_cast<const uint16_t *>(v.rows.data)[from + 32 * j];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      x[j] = v.rows.type == TQ_TYPE_F16 ? __half2float(__ushort_as_half(half[j])) : f32_from_bf16(half[j]);
    }
  }
  if (call.slots != nullptr) {
    slots = check_slots(v, slots.coded, slots.exact);
    if (slots.bad) {
      if (lane == 0 && head == 0 && v.counts_slots) count_fault(call.faults, TQ_FAULT_SLOT, call.first_token + token);
      return;
    }
  }
  int outcome = kFine;
  if (slots.coded != -1) {
    if (v.offset != nullptr) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) x[j] = x[j] - v.offset[head * kHeadDim + lane + 32 * j];
    }
    const auto measure = [&] {  // squared_norm(): a lane is a cell
      float cell = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) cell = __fmaf_rn(x[j], x[j], cell);
#pragma unroll
      for (int stride = 1; stride < kCells; stride *= 2) cell = cell + __shfl_xor_sync(kAll, cell, stride);
      return cell;
    };
    float norm2 = measure();
    Magnitude found;
    if (!(norm2 >= kMinSquaredNorm && norm2 <= kMaxSquaredNorm)) {
      found = find_magnitude(x);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) x[j] = found.zero ? 1.0f : times_power_of_two(x[j], -found.exponent);
      norm2 = measure();
    }
    const float norm = sqrtf(norm2), gain = side.steps / norm;
    // X, and its rotation: exact in any order.
    float y[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const float rounded = (x[j] * gain + kRoundingBias) - kRoundingBias;
      y[j] = (side.signs[0][j] >> lane & 1) != 0 ? -rounded : rounded;
    }
#pragma unroll
    for (int stride = 1; stride < kPerLane; stride *= 2) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if ((j & stride) != 0) continue;
        const float a = y[j], b = y[j + stride];
        y[j] = a + b;
        y[j + stride] = a - b;
      }
    }
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) {
      const float sign = (lane & bit) != 0 ? -1.0f : 1.0f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) y[j] = __fmaf_rn(y[j], sign, __shfl_xor_sync(kAll, y[j], bit));
    }
    uint32_t uu = 0, dot = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {  // choose_code()
      const float folded = fabsf(y[j]);
      uint32_t magnitude = 0;
#pragma unroll
      for (float threshold : thresholds) magnitude += folded >= threshold;
      const bool negative = y[j] < 0;
      const uint32_t code = side.bits == 4 ? magnitude | (negative ? 8 : 0)
                            : negative     ? uint32_t(count) - 1 - magnitude
                                           : uint32_t(count) + magnitude;
      const uint32_t u = __byte_perm(magnitudes.x, magnitudes.y, code & 7) & 0xff;
      uu += u * u;
      dot += uint32_t(folded) * u;
      s.entries[lane + 32 * j] = found.zero ? 0 : uint8_t(code * 0x11);
    }
    uu = __reduce_add_sync(kAll, uu);
    dot = __reduce_add_sync(kAll, dot);
    __syncwarp();
    if (lane < kHeadDim / 8) {
      const uint2 eight = reinterpret_cast<const uint2 *>(s.entries)[lane];
      uint32_t entry[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) entry[c] = (c < 4 ? eight.x : eight.y) >> (c % 4 * 8) & 0xff;
      s.nibbles[lane] = gather_codes(entry, side.bits == 4);
    }
    __syncwarp();

    const int plane1_bytes = side.bits == 1 || side.bits == 3 ? kHeadDim / 8 : 0;
    const int plane0_bytes = record_bytes(kHeadDim, side.bits) - plane1_bytes;
    const bool in_tile_of_v = call.slots != nullptr && side.is_v;
    const int row = int(slots.coded) & (kTileTokens - 1);
    uint8_t *plane0, *plane1, *scale;
    if (call.slots == nullptr) {
      plane0 = v.flat.codes + token * v.flat.codes_stride;
      plane1 = plane0 + plane0_bytes;
      scale = v.flat.scales + token * v.flat.scales_stride;
    } else {
      uint8_t *tile = tile_at(v.tiles, slots.coded, head);
      plane0 = tile + v.tiles.codes_offset + (side.is_v ? 0 : row * plane0_bytes);
      plane1 = tile + v.tiles.codes_offset + kTileTokens * plane0_bytes + (side.is_v ? 0 : row * plane1_bytes);
      scale = tile + v.tiles.scales_offset + row * scale_bytes(side);
    }
    if (side.bits == 4) {
      write_one<kHeadDim, 4>(s.nibbles, 0, kHeadDim / 8, plane0, in_tile_of_v, row);
    } else if (side.bits == 3) {
      write_one<kHeadDim, 3>(s.nibbles, 0, kHeadDim / 16, plane0, in_tile_of_v, row);
      write_one<kHeadDim, 3>(s.nibbles, 1, kHeadDim / 32, plane1, in_tile_of_v, row);
    } else if (side.bits == 2) {
      write_one<kHeadDim, 2>(s.nibbles, 0, kHeadDim / 16, plane0, in_tile_of_v, row);
    } else {
      write_one<kHeadDim, 1>(s.nibbles, 1, kHeadDim / 32, plane1, in_tile_of_v, row);
    }
    if (lane == 0) {
      float value = choose_scale(side.scale_rule, norm, int64_t{dot}, int(uu), side.scale_gain);
      if (found.exponent != 0) value = times_power_of_two(value, found.exponent);
      if (found.zero) value = 0;
      const int stored = store_scale(value, side.scale_type, scale);
      outcome = found.not_finite ? int(kNonFinite) : stored;
      count_outcome(call.faults, outcome, call.first_token + token);
    }
  }
  if (slots.exact != -1) store_exact(call, v, 1, token, head, outcome);
}

}  // namespace tqkv::cuda
