// SPDX-License-Identifier: Apache-2.0
// A matrix B of f16 in shared memory, and a warp's 16 rows times it: by wgmma where there is that, all four warps of a
// block together, else by mma with operands of the same memory.
#pragma once

#include "kernels/device/rows.cuh"

namespace tqkv::cuda {

// B [kDepth, kColumns], K-major: [kDepth / 8][kColumns][8 rows].
template <int kDepth, int kColumns, bool kWarpgroup = kHasWgmma>
struct SharedMatrix {
  static constexpr int kSteps = kDepth / 16;
  static constexpr uint32_t kStride = 16 * kColumns;  // bytes from 8 rows to the next

  // Of 8 rows and a column.
  __device__ static uint4 &at(uint4 *matrix, int eight_rows, int column) {
    return matrix[eight_rows * kColumns + column];
  }

  uint32_t address;
  uint64_t descriptor;

  __device__ __forceinline__ explicit SharedMatrix(const uint4 *matrix)
      : address(shared_address(matrix)), descriptor(wgmma_descriptor(address, kStride, 128)) {}

  // d = A B, the columns from kFirstColumn on; a[s]: A's operand of rows 16 s .. 16 s + 15 of B. Rows from kMinusFrom on
  // count negative. d is there after wait().
  template <int kFirstColumn, int kCount, int kMinusFrom = kDepth>
  __device__ __forceinline__ void multiply(float (&d)[kCount], const uint32_t (&a)[kSteps][4]) const {
    if constexpr (kWarpgroup) {
      step<0, kFirstColumn, kCount, kMinusFrom>(d, a);
      wgmma_commit();
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) d[i] = 0;
#pragma unroll
      for (int tile = 0; tile < kCount / 4; ++tile) {
        float sum[4] = {};
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const uint32_t from = address + 2 * s * kStride + 128 * (kFirstColumn / 8 + tile) + 4 * lane_index();
          const uint32_t minus = 16 * s >= kMinusFrom ? 0x80008000 : 0;
          const uint32_t b[2] = {load_shared_word(from) ^ minus, load_shared_word(from + kStride) ^ minus};
          mma_m16n8k16(sum, a[s], b, sum);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) d[4 * tile + i] = sum[i];
      }
    }
  }

  // Before multiply(), whose operands were written as registers are.
  __device__ __forceinline__ static void begin() {
    if constexpr (kWarpgroup) wgmma_fence();
  }
  // For all but the last kLeft products, and so for d.
  template <int kLeft, int kCount>
  __device__ __forceinline__ static void wait(float (&d)[kCount]) {
    if constexpr (kWarpgroup) wgmma_wait<kLeft>(d);
  }
  // Between writing the matrix and __syncthreads().
  __device__ __forceinline__ static void written() {
    if constexpr (kWarpgroup) wgmma_memory_fence();
  }

 private:
  template <int s, int kFirstColumn, int kCount, int kMinusFrom>
  __device__ __forceinline__ void step(float (&d)[kCount], const uint32_t (&a)[kSteps][4]) const {
    // The address is in the lower half, which does not overflow.
    constexpr uint32_t kOffset = (2 * s * kStride + 16 * kFirstColumn) / 16;
    const uint64_t b = (descriptor & 0xffffffff00000000) | uint32_t(uint32_t(descriptor) + kOffset);
    wgmma_m64k16<2 * kCount, s == 0, (16 * s >= kMinusFrom)>(d, a[s], b);
    if constexpr (s + 1 < kSteps) step<s + 1, kFirstColumn, kCount, kMinusFrom>(d, a);
  }
};

}  // namespace tqkv::cuda
