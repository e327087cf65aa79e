// SPDX-License-Identifier: Apache-2.0
// Query rows as what the main kernels of attention multiply; a warp a row.
#pragma once

#include "kernels/attention.hpp"
#include "kernels/device/rotation.cuh"
#include "kernels/device/vector.cuh"

namespace tqkv::cuda {

inline constexpr int kMostQuery = 32639;  // 127 * 256 + 127: both bytes of it and of its negative are signed ones
using RowIntegers = uint16_t[256];        // of a row that rotates in registers

// A row's integers: Q = y / unit, rounded.
struct Quantizer {
  float unit;  // 0 where all are 0
  float up, inverse;
  bool finite;

  // `largest`: the bits of the largest |y|.
  __device__ explicit Quantizer(uint32_t largest) {
    largest = __reduce_max_sync(kAll, largest);
    finite = largest < 0x7f800000;
    unit = finite ? __uint_as_float(largest) * (1.0f / float(kMostQuery)) : 0.0f;
    up = unit < 0x1p-100f ? 0x1p64f : 1.0f;  // the inverse of what is subnormal may be no number
    inverse = unit == 0 ? 0.0f : reciprocal_approx(unit * up);
  }
  __device__ int32_t operator()(float y) const {
    return min(max(__float2int_rn(y * up * inverse), -kMostQuery), kMostQuery);  // of a NaN 0
  }
};

// Both bytes of an integer, which are signed: the lower one as it is, the upper one of what is left.
__device__ inline uint32_t bytes_of(int32_t q) {
  return uint32_t((q + 128) & 0xff00) | uint32_t(q & 0xff);
}

// Writes a word of high bytes and one of low bytes.
__device__ inline void write_words(uint8_t *operand, int word, const uint32_t (&bytes)[4]) {
  const uint32_t first = bytes[0] | bytes[1] << 16, second = bytes[2] | bytes[3] << 16;
  reinterpret_cast<uint2 *>(operand)[word] =
      make_uint2(__byte_perm(first, second, 0x7531), __byte_perm(first, second, 0x6420));
}

__device__ inline void write_query_row(const AttentionCall &call, int32_t row, int lane, double gain,
                                const Quantizer &quantizer, int32_t sum, float offset) {
  sum = __reduce_add_sync(kAll, sum);
  if (lane != 0) return;
  const int32_t bias = call.k_uniform ? -96 * sum : sum / 2, bias_low = int8_t(bias);
  const float row_gain = quantizer.finite ? float(gain * double(quantizer.unit)) : __int_as_float(0x7fc00000);
  static_assert(sizeof(QueryRow) == sizeof(int4));
  reinterpret_cast<int4 *>(call.query_rows)[row] = make_int4(
      __float_as_int(row_gain), __float_as_int(offset * (call.scale * kLog2E)), (bias - bias_low) / 256, bias_low);
}

// Where a row of queries is.
struct QueryPlace {
  int64_t at;               // in q
  const float *key_offset;  // null: none
  uint8_t *operand;

  __device__ QueryPlace(const AttentionCall &call, int32_t row) {
    const uint32_t token = uint32_t(row) / uint32_t(call.q_heads), head = uint32_t(row) % uint32_t(call.q_heads);
    operand = call.query_operands + row * (2 * int64_t{call.operand_bytes});
    at = token * call.q.token_stride + head * call.q.head_stride;
    key_offset = call.key_offset;
    if (key_offset != nullptr) key_offset += int64_t{head / uint32_t(call.group)} * call.head_dim_k;
  }
};

// Loads a row of 32 * kPerLane channels and rotates it; gives its product with the key offset.
template <int kPerLane>
__device__ __forceinline__ float load_query_row(const AttentionCall &call, const QueryWork &work,
                                                const QueryPlace &place, int32_t row, int lane, float (&x)[kPerLane]) {
  const int first = kPerLane * lane;
  float offset = 0;
  if (work.rotated == nullptr || place.key_offset != nullptr) {
    load_neighbours(call.q.data, call.q.type, call.q.aligned != 0, place.at + first, x);
  }
  if (place.key_offset != nullptr) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) offset = __fmaf_rn(x[i], place.key_offset[first + i], offset);
    offset = warp_sum(offset);
  }
  if (work.rotated != nullptr) {
    load_neighbours(work.rotated, TQ_TYPE_F32, true, int64_t{row} * (32 * kPerLane) + first, x);
  } else {
    rotate(work.k, lane, x);
  }
  return offset;
}

// The bits of the lane's largest |x|.
template <int kPerLane>
__device__ __forceinline__ uint32_t largest_of(const float (&x)[kPerLane]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffff);
  return largest;
}

// A row of 32 * kPerLane channels as integers; `integers`: as many, of the warp.
template <int kPerLane>
__device__ __forceinline__ void prepare_narrow_row(const AttentionCall &call, const QueryWork &work, int32_t row,
                                                   int lane, uint16_t *integers) {
  const QueryPlace place(call, row);
  const int first = kPerLane * lane;
  constexpr int kWords = 8 * kPerLane;
  using Channels = Neighbours<int16_t, 4>;  // of a word
  Channels channels[(kWords + 31) / 32];
#pragma unroll
  for (int i = 0; i < (kWords + 31) / 32; ++i) {  // before there is something to wait for
    const int word = min(lane + 32 * i, kWords - 1);
    channels[i] = *reinterpret_cast<const Channels *>(work.order.channel + 4 * word);
  }
  float x[kPerLane];
  const float offset = load_query_row(call, work, place, row, lane, x);
  const Quantizer quantizer(largest_of(x));
  int32_t sum = 0;
  Neighbours<uint16_t, kPerLane> bytes;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int32_t q = quantizer(x[i]);
    sum += q;
    bytes.of[i] = uint16_t(bytes_of(q));
  }
  *reinterpret_cast<Neighbours<uint16_t, kPerLane> *>(integers + first) = bytes;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < (kWords + 31) / 32; ++i) {
    if (lane + 32 * i >= kWords) break;
    uint32_t operand[4];
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
      const int channel = channels[i].of[byte];
      operand[byte] = channel < 0 ? 0 : integers[channel];
    }
    write_words(place.operand, lane + 32 * i, operand);
  }
  write_query_row(call, row, lane, work.gain, quantizer, sum, offset);
  __syncwarp();
}

}  // namespace tqkv::cuda
