// SPDX-License-Identifier: Apache-2.0
// Decode and load of one head_dim, in registers. At head_dim 128, 4 bits and bf16 a vector moves 66 + 256 bytes and
// takes about 17 issue slots an element. Levels come from a byte permutation, and become f32 by their place in a
// mantissa; rows leave through a warp's own shared memory, so that neighbouring lanes write neighbouring bytes.
#pragma once

#include "kernels/device/lanes.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {

// Two blocks a multiprocessor: 128 registers a thread, or 255 where a lane has 48 channels. More warps with fewer registers
// measured slower: the loop is as long as the vector, and fetching it is what they would wait for.
inline constexpr int kDecodeBlocks = 2;
constexpr int decode_threads(int head_dim) {
  return head_dim == 96 ? 128 : 256;
}

// Words of a lane's codes, wherever they are.
template <int kWords>
__device__ __forceinline__ void load_words(const uint8_t *at, bool aligned, uint32_t *word) {
  constexpr int kVector = kWords % 4 == 0 ? 4 : kWords % 2 == 0 ? 2 : 1;
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      word[i] = at[4 * i] | at[4 * i + 1] << 8 | at[4 * i + 2] << 16 | uint32_t(at[4 * i + 3]) << 24;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += kVector) {
      if constexpr (kVector == 4) {
        const uint4 v = *reinterpret_cast<const uint4 *>(at + 4 * i);
        word[i] = v.x, word[i + 1] = v.y, word[i + 2] = v.z, word[i + 3] = v.w;
      } else if constexpr (kVector == 2) {
        const uint2 v = *reinterpret_cast<const uint2 *>(at + 4 * i);
        word[i] = v.x, word[i + 1] = v.y;
      } else {
        word[i] = *reinterpret_cast<const uint32_t *>(at + 4 * i);
      }
    }
  }
}

// Word `index` of a token's plane in V, whose bytes are interleaved with those of its three neighbours.
__device__ __forceinline__ uint32_t load_v_word(const uint8_t *plane, int index, int row) {
  const uint4 v = *reinterpret_cast<const uint4 *>(plane + 64 * index + 16 * (row >> 2));
  const uint32_t pick = uint32_t(row & 3) * 0x11 + 0x40;
  return __byte_perm(__byte_perm(v.x, v.y, pick), __byte_perm(v.z, v.w, pick), 0x5410);
}

// 0xff where a byte's highest bit is set.
__device__ __forceinline__ uint32_t sign_masks(uint32_t bytes) {
  uint32_t masks;
  asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(masks) : "r"(bytes));
  return masks;
}

template <int kHeadDim, int kBits>
struct Decoder {
  using Vec = Lanes<kHeadDim>;
  static constexpr int C = Vec::C;
  static constexpr int kPlaneBits = kBits == 3 ? 2 : kBits == 1 ? 0 : kBits;
  static constexpr int kWords = C * kPlaneBits / 32;
  static constexpr bool kOnes = kBits == 3 || kBits == 1;
  static constexpr int kPlane0 = kHeadDim * kPlaneBits / 8, kPlane1 = kHeadDim / 8;
  static constexpr int kOnesWords = kOnes ? (C + 31) / 32 : 0;
  uint32_t word[kWords > 0 ? kWords : 1], ones[2];

  // The 1-bit words that hold this lane's channels: of 48, the first or second half of the middle one.
  __device__ static int ones_word(int i) { return C == 32 ? Vec::part() : Vec::part() + i; }

  __device__ void load_record(const uint8_t *plane0, const uint8_t *plane1, bool aligned) {
    load_words<kWords>(plane0 + Vec::part() * 4 * kWords, aligned, word);
#pragma unroll
    for (int i = 0; i < kOnesWords; ++i) load_words<1>(plane1 + 4 * ones_word(i), aligned, ones + i);
  }

  __device__ void load_v(const uint8_t *plane0, const uint8_t *plane1, int row) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = load_v_word(plane0, Vec::part() * kWords + i, row);
#pragma unroll
    for (int i = 0; i < kOnesWords; ++i) ones[i] = load_v_word(plane1, ones_word(i), row);
  }

  // Bytes grid + 128 of channels 8g .. 8g + 7 as two words. `table`: those of the magnitudes at 4 bits, of the ascending
  // indices below.
  __device__ void grid_bytes(int g, uint2 table, uint32_t &low, uint32_t &high) const {
    if constexpr (kBits == 8) {
      low = word[2 * g] ^ 0x80808080;
      high = word[2 * g + 1] ^ 0x80808080;
    } else if constexpr (kBits == 4) {
      const uint32_t index = word[g] & 0x77777777;
      low = __byte_perm(table.x, table.y, index & 0xffff) ^ sign_masks(word[g]);
      high = __byte_perm(table.x, table.y, index >> 16) ^ sign_masks(word[g] << 4);
    } else {
      uint32_t index = 0;
      if constexpr (kPlaneBits == 2) index = word[g / 2] >> (g % 2 * 2) & 0x33333333;
      if constexpr (kOnes) {
        constexpr int kUp = kBits == 3 ? 2 : 0;  // where the bit belongs in the index
        constexpr uint32_t kBit = 0x11111111u;
        if constexpr (C == 32) {
          constexpr int kAt[4] = {2, 1, 3, 0};
          index |= (ones[0] >> kAt[g % 4] & kBit) << kUp;
        } else {
          // Channels 48 part + 8 g: of the second lane the fields begin with the middle word's third.
          constexpr int kFirst[6] = {2, 1, 3, 0, 2, 1}, kSecond[6] = {3, 0, 2, 1, 3, 0};
          const uint32_t a = ones[g / 4] >> kFirst[g] & kBit, b = ones[g / 2 == 0 ? 0 : 1] >> kSecond[g] & kBit;
          index |= (Vec::part() == 0 ? a : b) << kUp;
        }
      }
      low = __byte_perm(table.x, table.y, index & 0xffff);
      high = __byte_perm(table.x, table.y, index >> 16);
    }
  }

  __device__ void levels(uint2 table, float (&y)[C]) const {
#pragma unroll
    for (int g = 0; g < C / 8; ++g) {
      uint32_t half[2];
      grid_bytes(g, table, half[0], half[1]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // 2^16 + 2 (grid + 128) as f32 bits; the level is 2 grid + 1.
        constexpr uint32_t kMagic = 0x47800000;
        const uint32_t bits = __byte_perm(half[i / 4], kMagic, 0x7604 | (i % 4) << 4);
        y[8 * g + i] = __uint_as_float(bits) - 65791.0f;
      }
    }
  }
};

__device__ inline uint2 level_table(const SideParams &side) {
  uint64_t bytes = 0;
  const int count = side.bits == 8 ? 0 : side.bits == 4 ? 8 : 1 << side.bits;
  for (int i = 0; i < count; ++i) {
    const int grid = (int(side.levels[i]) - 1) / 2;  // odd: exact below zero too
    bytes |= uint64_t(grid + 128) << (8 * i);
  }
  return make_uint2(uint32_t(bytes), uint32_t(bytes >> 32));
}

__device__ __forceinline__ uint32_t pack_halves(float low, float high, int type) {
  uint32_t packed;
  if (type == TQ_TYPE_BF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

template <int kHeadDim, int kBits>
__device__ void decode_vectors(const VectorCall &call, const VectorSide &v, uint2 table, uint4 *staging) {
  using Vec = Lanes<kHeadDim>;
  constexpr int C = Vec::C;
  const SideParams &side = v.side;
  const int part = Vec::part(), lane = int(threadIdx.x % 32);
  const uint32_t heads = uint32_t(call.heads);
  const uint32_t items = uint32_t((call.tokens + Vec::kVectors - 1) / Vec::kVectors) * heads;
  for (uint32_t item = blockIdx.x * (decode_threads(kHeadDim) / 32) + threadIdx.x / 32; item < items;
       item += gridDim.x * (decode_threads(kHeadDim) / 32)) {
    const int head = int(item % heads);
    const int64_t first = int64_t{item / heads} * Vec::kVectors, token = first + Vec::vector();
    bool wanted = token < call.tokens, zero = false, exact = false;
    Decoder<kHeadDim, kBits> codes{};
    float scale = 0;
    Slots slots;
    if (call.slots == nullptr) {
      if (wanted) {
        const uint8_t *record = v.flat.codes + token * v.flat.codes_stride;
        codes.load_record(record, record + Decoder<kHeadDim, kBits>::kPlane0, v.flat.aligned);
        scale = load_scale(side.scale_type, v.flat.scales + token * v.flat.scales_stride);
      }
    } else if (wanted) {
      slots = read_load_slots(call, v, token);
      zero = slots.bad;
      exact = !zero && slots.exact != -1;
      if (zero && part == 0 && head == 0 && v.counts_slots)
        count_fault(call.faults, TQ_FAULT_SLOT, call.first_token + token);
      wanted = zero || exact || slots.coded != -1;
      if (!zero && slots.coded != -1) {
        const uint8_t *tile = tile_at(v.tiles, slots.coded, head);
        const int row = int(slots.coded) & 15;
        const uint8_t *plane0 = tile + v.tiles.codes_offset;
        const uint8_t *plane1 = plane0 + kTileTokens * Decoder<kHeadDim, kBits>::kPlane0;
        if (side.is_v) {
          codes.load_v(plane0, plane1, row);
        } else {
          codes.load_record(plane0 + row * Decoder<kHeadDim, kBits>::kPlane0,
                            plane1 + row * Decoder<kHeadDim, kBits>::kPlane1, true);
        }
        scale = load_scale(side.scale_type, tile + v.tiles.scales_offset + row * scale_bytes(side));
      }
    }
    if (!__any_sync(kAll, wanted)) continue;

    float y[C];
    codes.levels(table, y);
    for (int round = side.rounds - 1; round >= 0; --round) {
      Vec::template hadamard<true>(y);
      Vec::flip(side, round, y);
    }
    const float gain = scale * side.decode_gain;
#pragma unroll
    for (int i = 0; i < C; ++i) y[i] = y[i] * gain;
    if (v.offset != nullptr) {
      const float *offset = v.offset + head * kHeadDim + part * C;
#pragma unroll
      for (int i = 0; i < C; ++i) y[i] = y[i] + offset[i];
    }
    if (__any_sync(kAll, zero || exact)) {
      if (zero) {
#pragma unroll
        for (int i = 0; i < C; ++i) y[i] = 0;
      } else if (exact) {
        const uint8_t *tile = tile_at(v.exact, slots.exact, head) + v.exact.codes_offset;
        load_row(tile, side.raw_type, true, (slots.exact & 15) * kHeadDim + part * C, y);
      }
    }

    const int64_t at = token * v.rows.token_stride + head * v.rows.head_stride + part * C;
    if (!v.rows.aligned) {
      if (wanted) {
#pragma unroll
        for (int i = 0; i < C; ++i) store_element(v.rows.data, v.rows.type, at + i, y[i]);
      }
    } else if (v.rows.type == TQ_TYPE_F32) {
      if (wanted) {
        float4 *to = reinterpret_cast<float4 *>(static_cast<float *>(v.rows.data) + at);
#pragma unroll
        for (int i = 0; i < C / 4; ++i) to[i] = make_float4(y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]);
      }
    } else {
      // 16-byte chunk n of the warp's rows is at n ^ (n >> 3 & 7): free of bank conflicts in both directions.
      const auto place = [](int n) { return n ^ (n >> 3 & 7); };
      const unsigned wanted_lanes = __ballot_sync(kAll, wanted);
      uint32_t word[C / 2];
#pragma unroll
      for (int i = 0; i < C / 2; ++i) word[i] = pack_halves(y[2 * i], y[2 * i + 1], v.rows.type);
#pragma unroll
      for (int i = 0; i < C / 8; ++i) {
        staging[place(lane * (C / 8) + i)] = make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
      }
      __syncwarp();
      constexpr int kRowChunks = kHeadDim / 8;
#pragma unroll
      for (int i = 0; i < C / 8; ++i) {
        const int n = 32 * i + lane, vector = n / kRowChunks;
        if (wanted_lanes >> (vector * Vec::L) & 1) {
          uint16_t *row =
              static_cast<uint16_t *>(v.rows.data) + (first + vector) * v.rows.token_stride + head * v.rows.head_stride;
          reinterpret_cast<uint4 *>(row)[n % kRowChunks] = staging[place(n)];
        }
      }
      __syncwarp();
    }
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(decode_threads(kHeadDim), kDecodeBlocks)
    decode_kernel(const __grid_constant__ VectorCall call) {
  __shared__ uint4 staging[decode_threads(kHeadDim) * Lanes<kHeadDim>::C / 8];
  const VectorSide &v = call.side[blockIdx.y];
  const uint2 table = level_table(v.side);
  uint4 *own = staging + threadIdx.x / 32 * (32 * Lanes<kHeadDim>::C / 8);
  switch (v.side.bits) {
    case 1:
      return decode_vectors<kHeadDim, 1>(call, v, table, own);
    case 2:
      return decode_vectors<kHeadDim, 2>(call, v, table, own);
    case 3:
      return decode_vectors<kHeadDim, 3>(call, v, table, own);
    case 4:
      return decode_vectors<kHeadDim, 4>(call, v, table, own);
    default:
      return decode_vectors<kHeadDim, 8>(call, v, table, own);
  }
}

template <int kHeadDim>
int load_decode() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, decode_kernel<kHeadDim>);
}

template <int kHeadDim>
int launch_decode_fast(const VectorCall &call, const DeviceLimits &limits, void *stream) {
  constexpr int kWarps = decode_threads(kHeadDim) / 32, kVectors = Lanes<kHeadDim>::kVectors;
  const int64_t items = (call.tokens + kVectors - 1) / kVectors * call.heads;
  if (items > INT32_MAX / 2) return cudaErrorInvalidValue;
  const int64_t blocks = (items + kWarps - 1) / kWarps;
  const int64_t resident = int64_t{limits.multiprocessors} * kDecodeBlocks / call.num_sides;
  decode_kernel<kHeadDim><<<dim3(unsigned(blocks < resident ? blocks : resident), unsigned(call.num_sides)),
                            decode_threads(kHeadDim), 0, cudaStream_t(stream)>>>(call);
  return cudaPeekAtLastError();
}

}  // namespace tqkv::cuda
