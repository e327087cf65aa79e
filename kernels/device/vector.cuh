// SPDX-License-Identifier: Apache-2.0
// Moving one vector between memory and registers or shared memory, slots, faults.
#pragma once

#include <cuda_fp16.h>

#include "codec/half.hpp"
#include "codec/quantize.hpp"
#include "codec/record.hpp"
#include "kernels/device/ptx.cuh"
#include "kernels/launch.hpp"

namespace tqkv::cuda {

inline constexpr unsigned kAll = 0xffffffff;

__device__ __forceinline__ int lane_index() {
  return int(threadIdx.x) % 32;
}

__device__ inline void count_fault(tq_faults *faults, int kind, int64_t index) {
  if (faults == nullptr) return;
  atomicAdd(reinterpret_cast<unsigned long long *>(&faults->count[kind]), 1ull);
  const uint64_t packed = (0x00ffffffffffffffull - uint64_t(index)) << 8 | uint64_t(kind);
  atomicMax(reinterpret_cast<unsigned long long *>(&faults->first), (unsigned long long)packed);
}

__device__ inline uint8_t *tile_at(const Tiles &tiles, int64_t slot, int head) {
  int64_t block, row;
  if (tiles.storage_shift >= 0) {
    block = slot >> tiles.storage_shift;
    row = slot & (tiles.storage_tokens - 1);
  } else if ((slot >> 32) == 0) {
    block = uint32_t(slot) / uint32_t(tiles.storage_tokens);
    row = uint32_t(slot) % uint32_t(tiles.storage_tokens);
  } else {
    block = slot / tiles.storage_tokens;
    row = slot % tiles.storage_tokens;
  }
  return tiles.base + block * tiles.block_stride + (row >> 4) * tiles.tile_stride + head * tiles.head_stride;
}

// What the slots of a token say. Bad: one of the two is neither -1 nor in its pool.
struct Slots {
  int64_t coded = -1, exact = -1;
  bool bad = false;
};

__device__ inline Slots check_slots(const VectorSide &side, int64_t coded, int64_t exact) {
  Slots slots{coded, exact};
  slots.bad =
      coded < -1 || coded >= side.tiles.num_slots || exact < -1 || (exact != -1 && exact >= side.exact.num_slots);
  return slots;
}

__device__ inline Slots read_slots(const VectorCall &call, const VectorSide &side, int64_t token) {
  return check_slots(side, call.slots[token], call.exact_slots != nullptr ? call.exact_slots[token] : -1);
}

// The same for loading, where an exact slot of any kind makes the coded one unimportant.
__device__ inline Slots check_load_slots(const VectorSide &side, int64_t coded, int64_t exact) {
  Slots slots{coded, exact};
  const bool outside = exact < -1 || (exact != -1 && exact >= side.exact.num_slots);
  slots.bad = outside || (exact == -1 && (coded < -1 || coded >= side.tiles.num_slots));
  if (!outside && exact >= 0) slots.coded = -1;
  return slots;
}

__device__ inline Slots read_load_slots(const VectorCall &call, const VectorSide &side, int64_t token) {
  return check_load_slots(side, call.slots[token], call.exact_slots != nullptr ? call.exact_slots[token] : -1);
}

__device__ inline float load_element(const void *data, int type, int64_t at) {
  if (type == TQ_TYPE_F32) return static_cast<const float *>(data)[at];
  const uint16_t half = static_cast<const uint16_t *>(data)[at];
  return type == TQ_TYPE_F16 ? __half2float(__ushort_as_half(half)) : f32_from_bf16(half);
}

__device__ inline void store_element(void *data, int type, int64_t at, float value) {
  if (type == TQ_TYPE_F32) {
    static_cast<float *>(data)[at] = value;
  } else {
    static_cast<uint16_t *>(data)[at] = uint16_t(type == TQ_TYPE_F16 ? pack_f16(value, 0) : pack_bf16(value, 0));
  }
}

// Neighbours in memory, read and written at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Neighbours {
  T of[kCount];
};

// kCount neighbours, an even number. `aligned`: `at` counts from a multiple of 16 bytes and is a multiple of kCount.
template <int kCount>
__device__ __forceinline__ void load_neighbours(const void *data, int type, bool aligned, int64_t at,
                                                float (&x)[kCount]) {
  if (!aligned) {
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
      const float value = load_element(data, type, at + i);
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[k] = k == i ? value : x[k];
    }
  } else if (type == TQ_TYPE_F32) {
    const auto loaded = *reinterpret_cast<const Neighbours<float, kCount> *>(static_cast<const float *>(data) + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = loaded.of[i];
  } else {
    const auto loaded =
        *reinterpret_cast<const Neighbours<uint32_t, kCount / 2> *>(static_cast<const uint16_t *>(data) + at);
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const uint32_t pair = loaded.of[i / 2];
      if (type == TQ_TYPE_F16) {
        f32_pair_from_f16(pair, x[i], x[i + 1]);
      } else {
        x[i] = __uint_as_float(pair << 16), x[i + 1] = __uint_as_float(pair & 0xffff0000);
      }
    }
  }
}

template <int kCount>
__device__ __forceinline__ void store_neighbours(void *data, int type, bool aligned, int64_t at,
                                                 const float (&x)[kCount]) {
  if (!aligned) {
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
      float value = 0;
#pragma unroll
      for (int k = 0; k < kCount; ++k) value = k == i ? x[k] : value;
      store_element(data, type, at + i, value);
    }
  } else if (type == TQ_TYPE_F32) {
    Neighbours<float, kCount> stored;
#pragma unroll
    for (int i = 0; i < kCount; ++i) stored.of[i] = x[i];
    *reinterpret_cast<Neighbours<float, kCount> *>(static_cast<float *>(data) + at) = stored;
  } else {
    Neighbours<uint32_t, kCount / 2> stored;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      stored.of[i / 2] = type == TQ_TYPE_F16 ? pack_f16(x[i], x[i + 1]) : pack_bf16(x[i], x[i + 1]);
    }
    *reinterpret_cast<Neighbours<uint32_t, kCount / 2> *>(static_cast<uint16_t *>(data) + at) = stored;
  }
}

// x * 2^n, rounded once, for |n| < 150 and results that are not rounded twice: as ldexp.
__device__ inline float times_power_of_two(float x, int n) {
  if (n > 127) {
    x = x * 0x1p100f;
    n -= 100;
  }
  return x * __uint_as_float(n >= -126 ? uint32_t(n + 127) << 23 : 1u << (n + 149));
}

// The exponent of |x|, as ilogb; x finite and not zero.
__device__ inline int exponent_of(float x) {
  const uint32_t magnitude = __float_as_uint(x) & 0x7fffffff;
  return magnitude < 0x00800000 ? 31 - __clz(int(magnitude)) - 149 : int(magnitude >> 23) - 127;
}

enum Outcome : int { kFine = 0, kNonFinite = 1, kClamped = 2 };

__device__ inline void count_outcome(tq_faults *faults, int outcome, int64_t token) {
  if (outcome == kNonFinite) count_fault(faults, TQ_FAULT_NON_FINITE, token);
  if (outcome == kClamped) count_fault(faults, TQ_FAULT_RANGE, token);
}

// Stores a scale of either type; the largest finite one instead of more.
__device__ inline Outcome store_scale(float value, int scale_type, uint8_t *at) {
  if (scale_type == TQ_TYPE_F32) {
    constexpr float kMaxF32 = 0x1.fffffep127f;
    *reinterpret_cast<float *>(at) = kMaxF32 < value ? kMaxF32 : value;
    return value > kMaxF32 ? kClamped : kFine;
  }
  constexpr float kMaxF16 = 65504;
  *reinterpret_cast<uint16_t *>(at) = uint16_t(pack_f16(kMaxF16 < value ? kMaxF16 : value, 0));
  return value > kMaxF16 ? kClamped : kFine;
}

__device__ inline uint32_t load_scale_bits(int scale_type, const uint8_t *at) {
  return scale_type == TQ_TYPE_F32 ? *reinterpret_cast<const uint32_t *>(at) : *reinterpret_cast<const uint16_t *>(at);
}
__device__ inline float scale_from_bits(int scale_type, uint32_t bits) {
  return scale_type == TQ_TYPE_F32 ? __uint_as_float(bits) : __half2float(__ushort_as_half(uint16_t(bits)));
}
__device__ inline float load_scale(int scale_type, const uint8_t *at) {
  return scale_from_bits(scale_type, load_scale_bits(scale_type, at));
}

__device__ inline int scale_bytes(const SideShape &side) {
  return side.bits == kRawBits ? 0 : side.scale_type == TQ_TYPE_F32 ? 4 : 2;
}

// Largest value that a raw copy can hold.
__device__ inline float raw_limit(int raw_type) {
  return raw_type == TQ_TYPE_F16 ? 65504.0f : 0x1.fep127f;
}

}  // namespace tqkv::cuda
