// SPDX-License-Identifier: Apache-2.0
// A warp's 16 vectors of one head_dim as the tensor cores want them, and Hadamard rotations as products with +-1. Lane 4 g + q works on rows g and g + 8; of each it has the chunks of 8 channels 4 t + q.
#pragma once

#include "kernels/device/vector.cuh"

namespace tqkv::cuda {

inline constexpr int kRows = 16;

__device__ __forceinline__ int lane_row() {
  return lane_index() / 4;
}
__device__ __forceinline__ int lane_part() {
  return lane_index() % 4;
}

// A warp's items: groups of kRows tokens of a head. Heads first: neighbours work on whole tokens.
struct ItemStep {
  const VectorCall &call;
  uint32_t group, head, groups_a_step, heads_a_step;

  __device__ ItemStep(const VectorCall &of, int warps) : call(of) {
    const uint32_t heads = uint32_t(call.heads), item = blockIdx.x + threadIdx.x / 32 * gridDim.x;
    group = item / heads;
    head = item % heads;
    groups_a_step = gridDim.x * uint32_t(warps) / heads;
    heads_a_step = gridDim.x * uint32_t(warps) % heads;
  }
  __device__ __forceinline__ bool left() const { return int64_t{group} * kRows < call.tokens; }
  __device__ __forceinline__ void advance() {
    group += groups_a_step;
    head += heads_a_step;
    if (head >= uint32_t(call.heads)) {
      head -= uint32_t(call.heads);
      ++group;
    }
  }
};

// The slots of the lane's token in the next item, read before they are needed and unchecked. Past the last token they are
// the last one's.
struct NextSlots {
  int64_t coded = -1, exact = -1;

  __device__ __forceinline__ void read(const ItemStep &step) {
    const VectorCall &call = step.call;
    const int64_t token = min(int64_t{step.group} * kRows + lane_index() % kRows, call.tokens - 1);
    if (call.slots != nullptr) coded = call.slots[token];
    if (call.exact_slots != nullptr) exact = call.exact_slots[token];
  }
};

// The grid of a call whose warps take items: no more blocks than run at once, `blocks` of them a multiprocessor.
inline dim3 item_grid(const VectorCall &call, const DeviceLimits &limits, int blocks) {
  const int64_t items = (call.tokens + kRows - 1) / kRows * call.heads;
  const int64_t resident = int64_t{limits.multiprocessors} * blocks / call.num_sides;
  return dim3(unsigned(items < resident ? items : resident), unsigned(call.num_sides));
}

constexpr bool is_power_of_two(int n) {
  return (n & (n - 1)) == 0;
}

// Whether the entry of H for chunks of 8 channels is -1: H = this (x) Sylvester's matrix of order 8.
template <int kHeadDim>
__device__ __forceinline__ bool is_negative(const SideParams &side, int row, int column) {
  if constexpr (is_power_of_two(kHeadDim)) {
    return (__popc(unsigned(row & column)) & 1) != 0;
  } else {
    static_assert(kHeadDim == 96);  // base matrix of order 12
    return (side.base_rows[row] >> column & 1) != 0;
  }
}

// Signs of channels 2 i and 2 i + 1 before the rotation: bits 15 and 31 of word i.
template <int kHeadDim>
__device__ inline void fill_signs(const SideParams &side, uint32_t *signs) {
  for (int i = int(threadIdx.x); i < kHeadDim / 2; i += int(blockDim.x)) {
    const uint32_t pair = side.signs[0][i / 16] >> (2 * i % 32);
    signs[i] = (pair & 1) << 15 | (pair & 2) << 30;
  }
}

// Operands B of rotations as products, of 16-bit numbers +-one. Column 2 p + b of output tile i is channel 2 i + b of
// chunk 4 t + p, row 2 q + j channel j of input chunk 4 s + q; the second word has rows of channels 2 + j. Of lane
// 4 (2 p + b) + q: the words of tile 0 and those of tile 1; tile i + 2 has the same, negated for channels from 4 on.
// Where head_dim is a power of two t and s only change the sign: {those of t = s = 0, those negated}[32 lanes].
// Else [t][s][32 lanes].
template <int kHeadDim>
inline constexpr int rotation_operands = is_power_of_two(kHeadDim) ? 2 : kHeadDim / 32 * (kHeadDim / 32);

template <int kHeadDim>
__device__ inline void fill_operands(const SideParams &side, uint32_t one, uint4 *operands) {
  constexpr int kSteps = kHeadDim / 32;
  for (int i = int(threadIdx.x); i < 32 * rotation_operands<kHeadDim>; i += int(blockDim.x)) {
    const int lane = i % 32, which = i / 32, p = lane / 8, q = lane % 4;
    const bool negative = is_power_of_two(kHeadDim)
                              ? is_negative<kHeadDim>(side, p, q) != (which != 0)
                              : is_negative<kHeadDim>(side, 4 * (which / kSteps) + p, 4 * (which % kSteps) + q);
    const uint32_t word = one ^ (negative ? 0x80008000u : 0u) ^ (lane / 4 % 2 != 0 ? 0x80000000u : 0u);
    operands[i] = make_uint4(word, word, word, word ^ 0x80008000u);
  }
}

// 8 adjacent elements from memory, of 16 bits all in `low`.
__device__ __forceinline__ void unpack_chunk(int type, const uint4 &low, const uint4 &high, float *x) {
  const uint32_t word[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (type == TQ_TYPE_F32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(word[i]);
  } else if (type == TQ_TYPE_BF16) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __half2float(__ushort_as_half(uint16_t(word[i / 2] >> (i % 2 * 16))));
  }
}

// `flips`: the signs to change, in the order of fill_signs().
__device__ __forceinline__ float flipped(float x, int i, const uint4 &flips) {
  const uint32_t pair[4] = {flips.x, flips.y, flips.z, flips.w};
  const uint32_t sign = (i % 2 == 0 ? pair[i / 2] << 16 : pair[i / 2]) & 0x80000000;
  return __uint_as_float(__float_as_uint(x) ^ sign);
}

__device__ __forceinline__ void store_chunk(const Rows &rows, int type, int64_t at, const float *y,
                                            const uint4 &flips) {
  if (type == TQ_TYPE_F32) {
    auto *to = reinterpret_cast<float4 *>(static_cast<float *>(rows.data) + at);
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = flipped(y[i], i, flips);
    to[0] = make_float4(x[0], x[1], x[2], x[3]);
    to[1] = make_float4(x[4], x[5], x[6], x[7]);
    return;
  }
  uint4 packed;
  if (type == TQ_TYPE_BF16) {
    packed = make_uint4(pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]), pack_bf16(y[4], y[5]), pack_bf16(y[6], y[7]));
  } else {
    packed = make_uint4(pack_f16(y[0], y[1]), pack_f16(y[2], y[3]), pack_f16(y[4], y[5]), pack_f16(y[6], y[7]));
  }
  *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(rows.data) + at) =
      make_uint4(packed.x ^ flips.x, packed.y ^ flips.y, packed.z ^ flips.z, packed.w ^ flips.w);
}

}  // namespace tqkv::cuda
