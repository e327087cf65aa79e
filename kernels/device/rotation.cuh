// SPDX-License-Identifier: Apache-2.0
// Hadamard rotations of a vector in shared memory, by a warp.
#pragma once

#include "kernels/device/vector.cuh"

namespace tqkv::cuda {

__device__ inline float warp_max(float x) {
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, lane));
  return x;
}

__device__ inline int warp_max(int x) {
  for (int lane = 16; lane > 0; lane /= 2) x = max(x, __shfl_xor_sync(kAll, x, lane));
  return x;
}

template <class T>
__device__ T warp_sum(T x) {
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(kAll, x, lane);
  return x;
}

template <class T>
__device__ void flip_signs(const SideParams &side, int round, int lane, T *x) {
  for (int c = lane; c < side.head_dim; c += 32) {
    if (side.signs[round][c >> 5] >> (c & 31) & 1) x[c] = -x[c];
  }
  __syncwarp();
}

// x becomes H_base (or its transpose) of each block of it; `scratch` is overwritten.
template <class T>
__device__ void apply_base(const SideParams &side, bool transpose, int lane, T *x, T *scratch) {
  const int m = side.base;
  if (m == 1) return;
  for (int c = lane; c < side.head_dim; c += 32) {
    const int stride = side.head_dim / m, i = c / stride;
    const T *v = x + c % stride;
    T sum = 0;
    for (int j = 0; j < m; j += 4) {
      const auto term = [&](int k) {
        const uint64_t negative = transpose ? side.base_rows[j + k] >> i & 1 : side.base_rows[i] >> (j + k) & 1;
        return negative != 0 ? -v[(j + k) * stride] : v[(j + k) * stride];
      };
      const T group = (term(0) + term(1)) + (term(2) + term(3));
      sum = j == 0 ? group : sum + group;
    }
    scratch[c] = sum;
  }
  __syncwarp();
  for (int c = lane; c < side.head_dim; c += 32) x[c] = scratch[c];
  __syncwarp();
}

template <class T>
__device__ void butterflies(const SideParams &side, int lane, T *x) {
  for (int stride = 1; stride < side.head_dim / side.base; stride *= 2) {
    for (int pair = lane; pair < side.head_dim / 2; pair += 32) {
      const int i = 2 * pair - (pair & (stride - 1));
      const T a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
    __syncwarp();
  }
}

// rotate() of side.hpp, where it is no matrix.
__device__ inline void rotate(const SideParams &side, int lane, float *x, float *scratch) {
  for (int round = 0; round < side.rounds; ++round) {
    flip_signs(side, round, lane, x);
    apply_base(side, false, lane, x, scratch);
    butterflies(side, lane, x);
  }
}

// The transpose.
__device__ inline void rotate_back(const SideParams &side, int lane, float *x, float *scratch) {
  for (int round = side.rounds - 1; round >= 0; --round) {
    apply_base(side, true, lane, x, scratch);
    butterflies(side, lane, x);
    flip_signs(side, round, lane, x);
  }
}

// ---- a vector of 32 * kPerLane channels, a power of two, in registers: lane i has channels kPerLane * i and on

template <int kPerLane>
__device__ __forceinline__ void flip_own_signs(const SideParams &side, int round, int lane, float (&x)[kPerLane]) {
  const uint32_t bits = side.signs[round][kPerLane * lane / 32] >> (kPerLane * lane % 32);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    x[i] = __uint_as_float(__float_as_uint(x[i]) ^ (bits << (31 - i) & 0x80000000));
  }
}

template <int kPerLane>
__device__ __forceinline__ void own_butterflies(int lane, float (&x)[kPerLane]) {
#pragma unroll
  for (int stride = 1; stride < kPerLane; stride *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((i & stride) != 0) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
#pragma unroll 1
  for (int bit = 1; bit < 32; bit *= 2) {  // a loop: this runs once, and fetching code takes longer
    const float sign = (lane & bit) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = __fmaf_rn(x[i], sign, __shfl_xor_sync(kAll, x[i], bit));
  }
}

template <int kPerLane>
__device__ __forceinline__ void rotate(const SideParams &side, int lane, float (&x)[kPerLane]) {
#pragma unroll 1
  for (int round = 0; round < side.rounds; ++round) {
    flip_own_signs(side, round, lane, x);
    own_butterflies(lane, x);
  }
}

template <int kPerLane>
__device__ __forceinline__ void rotate_back(const SideParams &side, int lane, float (&x)[kPerLane]) {
#pragma unroll 1
  for (int round = side.rounds - 1; round >= 0; --round) {
    own_butterflies(lane, x);
    flip_own_signs(side, round, lane, x);
  }
}

// The channels of a lane where these functions take a vector of a side; 0 where they do not.
inline int channels_per_lane(const SideParams &side) {
  const bool fits = side.base == 1 && (side.head_dim == 64 || side.head_dim == 128 || side.head_dim == 256);
  return fits ? side.head_dim / 32 : 0;
}

}  // namespace tqkv::cuda
