// SPDX-License-Identifier: Apache-2.0
// A warp's 16 vectors of one head_dim as the tensor cores want them, and Hadamard rotations as products with a matrix of
// +-1 in shared memory. Lane 4 g + q works on rows g and g + 8; of each it has the chunks of 8 channels 4 t + q.
#pragma once

#include "kernels/device/vector.cuh"

namespace tqkv::cuda {

inline constexpr int kRows = 16;

__device__ __forceinline__ int lane_index() {
  return int(threadIdx.x) % 32;
}
__device__ __forceinline__ int lane_row() {
  return lane_index() / 4;
}
__device__ __forceinline__ int lane_part() {
  return lane_index() % 4;
}

// Bits i = 0 .. 3: whether entry (row, column + i) of the Hadamard matrix is -1, or with `transposed` (row + i, column),
// the adjacent index a multiple of 4.
__device__ inline uint32_t hadamard_signs4(const SideParams &side, int fixed, int running, bool transposed) {
  if (side.base == 1) {  // parity(fixed & running), of which the lowest two bits of `running` take all values
    const uint32_t low = 0x6ca0u >> (4 * (fixed & 3)) & 15;
    return (__popc(uint32_t(fixed & running)) & 1) != 0 ? low ^ 15 : low;
  }
  uint32_t signs = 0;
  for (int i = 0; i < 4; ++i) {
    const int row = transposed ? running + i : fixed, column = transposed ? fixed : running + i;
    const uint32_t base = uint32_t(side.base_rows[row % side.base] >> (column % side.base)) & 1;
    const uint32_t power = uint32_t(__popc(uint32_t((row / side.base) & (column / side.base)))) & 1;
    signs |= (base ^ power) << i;
  }
  return signs;
}

__device__ inline uint32_t random_signs4(const SideParams &side, int channel) {
  return side.signs[0][channel >> 5] >> (channel & 31) & 15;
}

// The matrix of a round of rotation or, transposed, of its inverse: operand B of every product in the order in which
// warps read it, [head_dim / 8 tiles of outputs][pairs of steps][32 lanes][2 steps][2 words], or step after step where
// their number is odd; 16-byte aligned.
//   Inputs: word h of step s in lane q has channels 8 (4 s + q) + 4 h .. + 3, or of the inverse (`kInverse`)
//   8 (steps q + s) + 4 h: codes are read as runs of words.
//   Outputs: column 2 q + b of tile 4 t + i is channel 8 (4 t + q) + 2 i + b.
template <int kHeadDim, bool kInverse>
__device__ inline void fill_rotation(const SideParams &side, uint32_t *matrix) {
  constexpr int kSteps = kHeadDim / 32;
  for (int word = int(threadIdx.x); word < kHeadDim / 8 * kSteps * 64; word += int(blockDim.x)) {
    constexpr int kRun = kSteps % 2 == 0 ? 4 : 2;  // words that a lane reads at a time
    const int h = word % 2, lane = word / kRun % 32, tile = word / (64 * kSteps);
    const int s = word / (32 * kRun) % (2 * kSteps / kRun) * (kRun / 2) + word % kRun / 2;
    const int q = lane % 4, column = lane / 4;
    const int input = (kInverse ? 8 * (kSteps * q + s) : 8 * (4 * s + q)) + 4 * h;
    const int output = 8 * (4 * (tile / 4) + column / 2) + 2 * (tile % 4) + column % 2;
    uint32_t negative = hadamard_signs4(side, output, input, kInverse);
    if constexpr (kInverse) {
      if ((side.signs[0][output >> 5] >> (output & 31) & 1) != 0) negative ^= 15;
    } else {
      negative ^= random_signs4(side, input);
    }
    const uint32_t bytes = (negative | negative << 7 | negative << 14 | negative << 21) & 0x01010101;
    matrix[word] = 0x01010101 ^ (bytes * 0xfe);
  }
}

// Operands of a tile: of `step` and, where their number is even, the next, which a lane reads at a time.
template <int kSteps>
inline constexpr int kRotationRun = kSteps % 2 == 0 ? 2 : 1;
template <int kSteps>
__device__ __forceinline__ void load_rotation(const uint32_t *matrix, int tile, int step,
                                              uint32_t (&b)[kRotationRun<kSteps>][2]) {
  const uint32_t *from = matrix + (tile * kSteps + step) * 64;
  if constexpr (kSteps % 2 == 0) {
    const uint4 v = reinterpret_cast<const uint4 *>(from)[lane_index()];
    b[0][0] = v.x, b[0][1] = v.y, b[1][0] = v.z, b[1][1] = v.w;
  } else {
    const uint2 v = reinterpret_cast<const uint2 *>(from)[lane_index()];
    b[0][0] = v.x, b[0][1] = v.y;
  }
}

// 8 adjacent elements at `at`, 16-byte aligned, of the rows' type.
__device__ __forceinline__ void load_chunk(const Rows &rows, int type, int64_t at, float *x) {
  if (type == TQ_TYPE_F32) {
    const float4 *from = reinterpret_cast<const float4 *>(static_cast<const float *>(rows.data) + at);
    const float4 a = __ldg(from), b = __ldg(from + 1);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    return;
  }
  const uint4 v = __ldg(reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(rows.data) + at));
  const uint32_t pair[4] = {v.x, v.y, v.z, v.w};
  if (type == TQ_TYPE_BF16) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(i % 2 == 0 ? pair[i / 2] << 16 : pair[i / 2] & 0xffff0000);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __half2float(__ushort_as_half(uint16_t(pair[i / 2] >> (i % 2 * 16))));
  }
}

__device__ __forceinline__ void store_chunk(const Rows &rows, int64_t at, const float *y) {
  if (rows.type == TQ_TYPE_F32) {
    auto *to = reinterpret_cast<float4 *>(static_cast<float *>(rows.data) + at);
    to[0] = make_float4(y[0], y[1], y[2], y[3]);
    to[1] = make_float4(y[4], y[5], y[6], y[7]);
    return;
  }
  auto *to = reinterpret_cast<uint4 *>(static_cast<uint16_t *>(rows.data) + at);
  if (rows.type == TQ_TYPE_BF16) {
    *to = make_uint4(pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]), pack_bf16(y[4], y[5]), pack_bf16(y[6], y[7]));
  } else {
    *to = make_uint4(pack_f16(y[0], y[1]), pack_f16(y[2], y[3]), pack_f16(y[4], y[5]), pack_f16(y[6], y[7]));
  }
}

// Reads adjacent words; 16 or 8 bytes at a time where they are `wide`, that is aligned to their number.
template <int kWords>
__device__ __forceinline__ void load_words(const uint8_t *at, bool wide, uint32_t *word) {
  if (kWords % 4 == 0 && wide) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = __ldg(reinterpret_cast<const uint4 *>(at + 4 * i));
      word[i] = v.x, word[i + 1] = v.y, word[i + 2] = v.z, word[i + 3] = v.w;
    }
  } else if (kWords == 2 && wide) {
    const uint2 v = __ldg(reinterpret_cast<const uint2 *>(at));
    word[0] = v.x, word[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = __ldg(reinterpret_cast<const uint32_t *>(at + 4 * i));
  }
}

}  // namespace tqkv::cuda
