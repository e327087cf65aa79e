// SPDX-License-Identifier: Apache-2.0
// Vectors of one head_dim in registers: L adjacent lanes share a vector, each with C adjacent channels. Butterflies and
// sums follow the order of src/codec/quantize.hpp and rotation.hpp: the strides below C first, then across lanes.
#pragma once

#include "kernels/device/vector.cuh"

namespace tqkv::cuda {

template <int kHeadDim>
struct LaneShape;
template <>
struct LaneShape<64> {
  static constexpr int C = 32, L = 2, kBase = 1;
};
template <>
struct LaneShape<96> {
  static constexpr int C = 48, L = 2, kBase = 12;
};
template <>
struct LaneShape<128> {
  static constexpr int C = 32, L = 4, kBase = 1;
};
template <>
struct LaneShape<256> {
  static constexpr int C = 32, L = 8, kBase = 1;
};

// H of order 12 by Paley's first construction: row i as bits, 1 where the entry is -1 (rotation.hpp).
struct Hadamard12 {
  uint32_t row[12];
};
constexpr Hadamard12 make_hadamard12() {
  Hadamard12 h{};
  for (int i = 0; i < 12; ++i) {
    for (int j = 0; j < 12; ++j) {
      const int d = (i - j + 11) % 11;
      const bool residue = d == 1 || d == 3 || d == 4 || d == 5 || d == 9;
      const int s = i == 0 ? (j == 0 ? 0 : 1) : j == 0 ? -1 : d == 0 ? 0 : residue ? 1 : -1;
      if (s + (i == j) < 0) h.row[i] |= 1u << j;
    }
  }
  return h;
}

template <bool kTranspose, int C>
__device__ __forceinline__ void apply_base12(float (&y)[C]) {
  constexpr Hadamard12 h = make_hadamard12();
#pragma unroll
  for (int block = 0; block < C; block += 12) {
    float out[12];
#pragma unroll
    for (int i = 0; i < 12; ++i) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 12; j += 4) {
        const auto term = [&](int k) {
          const bool negative = ((kTranspose ? h.row[j + k] >> i : h.row[i] >> (j + k)) & 1) != 0;
          return negative ? -y[block + j + k] : y[block + j + k];
        };
        const float group = (term(0) + term(1)) + (term(2) + term(3));
        sum = j == 0 ? group : sum + group;
      }
      out[i] = sum;
    }
#pragma unroll
    for (int i = 0; i < 12; ++i) y[block + i] = out[i];
  }
}

template <int kHeadDim>
struct Lanes {
  static constexpr int C = LaneShape<kHeadDim>::C, L = LaneShape<kHeadDim>::L, kBase = LaneShape<kHeadDim>::kBase;
  static constexpr int kVectors = 32 / L;  // a warp's
  static_assert(C * L == kHeadDim && kVectors % 4 == 0);

  __device__ __forceinline__ static int part() { return int(threadIdx.x) % L; }
  __device__ __forceinline__ static int vector() { return int(threadIdx.x) % 32 / L; }

  template <int kStride>
  __device__ __forceinline__ static void butterflies(float (&y)[C]) {
    if constexpr (kStride < C) {
#pragma unroll
      for (int pair = 0; pair < C / 2; ++pair) {
        const int i = pair / kStride * 2 * kStride + pair % kStride;
        const float a = y[i], b = y[i + kStride];
        y[i] = a + b;
        y[i + kStride] = a - b;
      }
      butterflies<2 * kStride>(y);
    }
  }

  // quad[0] becomes the sum of all, neighbours first.
  template <int kStride>
  __device__ __forceinline__ static void add_pairwise(float (&quad)[C / 4]) {
    if constexpr (kStride < C / 4) {
#pragma unroll
      for (int i = 0; i < C / 4; i += 2 * kStride) quad[i] = quad[i] + quad[i + kStride];
      add_pairwise<2 * kStride>(quad);
    }
  }

  template <bool kTranspose>
  __device__ __forceinline__ static void hadamard(float (&y)[C]) {
    if constexpr (kBase == 12) apply_base12<kTranspose>(y);
    butterflies<kBase>(y);
#pragma unroll
    for (int lane = 1; lane < L; lane *= 2) {
      // The product is exact, so that the fused operation rounds once, as a + b and a - b do.
      const float sign = part() & lane ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < C; ++i) y[i] = __fmaf_rn(y[i], sign, __shfl_xor_sync(kAll, y[i], lane));
    }
  }

  // Negates the channels whose bits are set in this round.
  __device__ __forceinline__ static void flip(const SideParams &side, int round, float (&y)[C]) {
#pragma unroll
    for (int i = 0; i < C; i += 16) {
      const int c = part() * C + i;
      const uint32_t word = side.signs[round][c >> 5] >> (c & 16);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        y[i + j] = __uint_as_float(__float_as_uint(y[i + j]) ^ (word << (31 - j) & 0x80000000));
      }
    }
  }

  // Sums of groups of four adjacent values to the sum over the vector.
  __device__ __forceinline__ static float sum_quads(float (&quad)[C / 4]) {
    constexpr int m = kBase == 1 ? 1 : kBase / 4;  // quads in a block that is summed one after the other
#pragma unroll
    for (int b = 0; b < C / 4; b += m) {
#pragma unroll
      for (int i = 1; i < m; ++i) quad[b] = quad[b] + quad[b + i];
    }
    add_pairwise<m>(quad);
    float sum = quad[0];
#pragma unroll
    for (int lane = 1; lane < L; lane *= 2) sum = sum + __shfl_xor_sync(kAll, sum, lane);
    return sum;
  }

  __device__ __forceinline__ static float squared_norm(const float (&y)[C]) {
    float quad[C / 4];
#pragma unroll
    for (int i = 0; i < C; i += 4) {
      quad[i / 4] = (y[i] * y[i] + y[i + 1] * y[i + 1]) + (y[i + 2] * y[i + 2] + y[i + 3] * y[i + 3]);
    }
    return sum_quads(quad);
  }

  __device__ __forceinline__ static float max_of(float x) {
#pragma unroll
    for (int lane = 1; lane < L; lane *= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, lane));
    return x;
  }
};

__device__ __forceinline__ float low_half(uint32_t pair, int type) {
  return type == TQ_TYPE_BF16 ? __uint_as_float(pair << 16) : __half2float(__ushort_as_half(uint16_t(pair & 0xffff)));
}

__device__ __forceinline__ float high_half(uint32_t pair, int type) {
  return type == TQ_TYPE_BF16 ? __uint_as_float(pair & 0xffff0000)
                              : __half2float(__ushort_as_half(uint16_t(pair >> 16)));
}

// C adjacent elements at `at` of an array.
template <int C>
__device__ __forceinline__ void load_row(const void *data, int type, bool aligned, int64_t at, float (&x)[C]) {
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < C; ++i) x[i] = load_element(data, type, at + i);
  } else if (type == TQ_TYPE_F32) {
    const float4 *from = reinterpret_cast<const float4 *>(static_cast<const float *>(data) + at);
#pragma unroll
    for (int i = 0; i < C / 4; ++i) {
      const float4 v = from[i];
      x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
    }
  } else {
    const uint4 *from = reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(data) + at);
    uint32_t pair[C / 2];
#pragma unroll
    for (int i = 0; i < C / 8; ++i) {
      const uint4 v = __ldg(from + i);
      pair[4 * i] = v.x, pair[4 * i + 1] = v.y, pair[4 * i + 2] = v.z, pair[4 * i + 3] = v.w;
    }
    if (type == TQ_TYPE_BF16) {
#pragma unroll
      for (int i = 0; i < C / 2; ++i) {
        x[2 * i] = low_half(pair[i], TQ_TYPE_BF16), x[2 * i + 1] = high_half(pair[i], TQ_TYPE_BF16);
      }
    } else {
#pragma unroll
      for (int i = 0; i < C / 2; ++i) {
        x[2 * i] = low_half(pair[i], TQ_TYPE_F16), x[2 * i + 1] = high_half(pair[i], TQ_TYPE_F16);
      }
    }
  }
}

}  // namespace tqkv::cuda
