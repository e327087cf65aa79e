// SPDX-License-Identifier: Apache-2.0
// Encode and store of one head_dim, in registers. At head_dim 128, 4 bits and bf16 a vector moves 256 + 66 bytes; at
// 3.2 TB/s an H200 has about 22 issue slots an element in that time, and this takes about 27. No shuffles but the last
// stages of the butterflies; indices by a table that every lane has its own bank of; codes leave as whole words.
#pragma once

#include "kernels/device/lanes.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {

// Two blocks a multiprocessor: 128 registers a thread, or 168 where a lane has 48 channels. More warps with fewer registers
// measured slower: the loop is as long as the vector, and fetching it is what they would wait for.
inline constexpr int kEncodeBlocks = 2;
constexpr int encode_threads(int head_dim) {
  return head_dim == 96 ? 192 : 256;
}
// Entries for floor(2 |z|) = 0 .. 256: thresholds are multiples of 1/2 and at most 127. 33 KB with one bank a lane.
inline constexpr int kTableEntries = 257;

// The odd integer 2 m + 1 of the magnitude chosen for |z| in [n / 2, (n + 1) / 2), as f32; these have no more than 8
// significant bits, so that the lowest byte is free for the magnitude's index.
__device__ inline uint32_t table_entry(const SideParams &side, int n) {
  const int count = 1 << (side.bits - 1);
  const unsigned code = choose_code(float(n) * 0.5f, side.thresholds, side.bits);
  const unsigned index = side.bits == 4 ? code : code - unsigned(count);
  return __float_as_uint(side.levels[code]) | index;
}

__device__ inline void fill_table(const SideParams &side, uint32_t *table) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int first = 32 * warp; first < kTableEntries; first += 32 * warps) {
    const uint32_t own = first + lane < kTableEntries ? table_entry(side, first + lane) : 0;
    for (int i = 0; i < 32 && first + i < kTableEntries; ++i) {
      table[(first + i) * 32 + lane] = __shfl_sync(kAll, own, i);
    }
  }
}

// Bytes `byte` of four words as one word.
template <int kByte>
__device__ __forceinline__ uint32_t gather_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  constexpr uint32_t kPair = kByte | (4 + kByte) << 4;
  return __byte_perm(__byte_perm(a, b, kPair), __byte_perm(c, d, kPair), 0x5410);
}

// Bits 4j: the signs of y[0..7].
__device__ __forceinline__ uint32_t sign_nibbles(const float *y) {
  const auto u = [&](int i) { return __float_as_uint(y[i]); };
  return (gather_bytes<3>(u(0), u(2), u(4), u(6)) >> 7 & 0x01010101) |
         (gather_bytes<3>(u(1), u(3), u(5), u(7)) >> 3 & 0x10101010);
}

// The signs of y[0..7] where a 4-bit word has them.
__device__ __forceinline__ uint32_t sign_bits4(const float *y) {
  const auto u = [&](int i) { return __float_as_uint(y[i]); };
  return (gather_bytes<3>(u(0), u(1), u(2), u(3)) & 0x80808080) |
         (gather_bytes<3>(u(4), u(5), u(6), u(7)) >> 4 & 0x08080808);
}

// What one lane contributes to a record: words of the first plane at word `first`, and of the 1-bit plane of 3 or 1
// bits. A word of the 1-bit plane that two lanes share is completed by both and belongs to the first.
template <int kHeadDim, int kBits>
struct LaneCodes {
  static constexpr int C = Lanes<kHeadDim>::C;
  static constexpr int kPlaneBits = kBits == 3 ? 2 : kBits == 1 ? 0 : kBits;
  static constexpr int kWords = C * kPlaneBits / 32;
  static constexpr bool kOnes = kBits == 3 || kBits == 1;
  static constexpr bool kShared = kOnes && C % 32 != 0;
  static_assert(C % 32 == 0 || (C == 48 && Lanes<kHeadDim>::L == 2));
  uint32_t word[kWords > 0 ? kWords : 1];
  uint32_t ones, shared;
};

template <int kHeadDim, int kBits>
struct Encoder {
  using Vec = Lanes<kHeadDim>;
  using Codes = LaneCodes<kHeadDim, kBits>;
  static constexpr int C = Vec::C;

  // 8 channels: products to two quads, squares to uu, and the indices as nibbles.
  __device__ __forceinline__ static uint32_t choose8(const float *y, float gain, uint32_t table, float *quad,
                                                     float &uu) {
    uint32_t entry[8];
    float product[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // n = floor(2 |z|) or 256, whichever is less: `gain` has 2 / 256 in it, saturation is exact, and adding 2^15
      // downwards leaves the floor of 256 times the value in the last bits.
      float part;
      asm("mul.rn.sat.f32 %0, %1, %2;" : "=f"(part) : "f"(fabsf(y[i])), "f"(gain));
      const uint32_t n = __float_as_uint(__fadd_rd(part, 0x1p15f));
      const uint32_t address = table + n * 128;  // the exponent's bits cancel against those in `table`
      asm("ld.shared.u32 %0, [%1];" : "=r"(entry[i]) : "r"(address));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float u = __uint_as_float(entry[i] & 0xffffff00);
      product[i] = fabsf(y[i]) * u;  // y times the level: they have one sign
      uu = __fmaf_rn(u, u, uu);      // integers below 2^24: exact
    }
    quad[0] = (product[0] + product[1]) + (product[2] + product[3]);
    quad[1] = (product[4] + product[5]) + (product[6] + product[7]);
    return gather_bytes<0>(entry[0], entry[2], entry[4], entry[6]) +
           gather_bytes<0>(entry[1], entry[3], entry[5], entry[7]) * 16;
  }

  __device__ __forceinline__ static void choose(const float (&y)[C], float gain, uint32_t table, Codes &codes,
                                                float &dot, float &uu) {
    float quad[C / 4];
    uint32_t index[C / 8], sign[C / 8];
    uu = 0;
#pragma unroll
    for (int g = 0; g < C / 8; ++g) {
      index[g] = choose8(y + 8 * g, gain, table, quad + 2 * g, uu);
      sign[g] = kBits == 4 ? sign_bits4(y + 8 * g) : sign_nibbles(y + 8 * g);
    }
    dot = Vec::sum_quads(quad);
    if constexpr (kBits == 4) {
#pragma unroll
      for (int g = 0; g < C / 8; ++g) codes.word[g] = index[g] | sign[g];
    }
    if constexpr (kBits == 2 || kBits == 3) {
      // Level indices ascend: of two bits of magnitude, m where positive and 3 - m where not; of one, 2 + m and 1 - m.
#pragma unroll
      for (int g = 0; g < C / 8; g += 2) {
        const uint32_t m = index[g] | index[g + 1] << 2, s = sign[g] | sign[g + 1] << 2;
        codes.word[g / 2] = kBits == 3 ? m ^ (s * 3) : (m ^ s) | (~s & 0x55555555) << 1;
      }
    }
    if constexpr (Codes::kOnes) {
      const auto positive = [&](int g) { return ~sign[g] & 0x11111111; };
      if constexpr (C == 32) {
        codes.ones = positive(0) << 2 | positive(1) << 1 | positive(2) << 3 | positive(3);
      } else {
        const bool second = Vec::part() == 1;
        const auto from = [&](int g) { return second ? positive(g + 2) : positive(g); };
        codes.ones = from(0) << 2 | from(1) << 1 | from(2) << 3 | from(3);
        const uint32_t half = second ? positive(0) << 3 | positive(1) : positive(4) << 2 | positive(5) << 1;
        codes.shared = half | __shfl_xor_sync(kAll, half, 1);
      }
    }
  }

  __device__ __forceinline__ static void choose_bytes(const float (&y)[C], Codes &codes, float &dot, float &uu) {
    float largest = 0, quad[C / 4];
#pragma unroll
    for (int i = 0; i < C; ++i) largest = fmaxf(largest, fabsf(y[i]));
    const float gain = 127.5f / Vec::max_of(largest);
    uu = 0;
#pragma unroll
    for (int g = 0; g < C / 4; ++g) {
      float product[4];
      uint32_t n[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = fabsf(y[4 * g + i] * gain);
        const float floor = __fadd_rd(a < 127.0f ? a : 127.0f, 0x1p23f);
        n[i] = __float_as_uint(floor);
        const float u = (floor - 0x1p23f) * 2.0f + 1.0f;
        product[i] = fabsf(y[4 * g + i]) * u;
        uu = __fmaf_rn(u, u, uu);
      }
      quad[g] = (product[0] + product[1]) + (product[2] + product[3]);
      const auto u = [&](int i) { return __float_as_uint(y[4 * g + i]); };
      const uint32_t negative = (gather_bytes<3>(u(0), u(1), u(2), u(3)) >> 7 & 0x01010101) * 255;
      codes.word[g] = gather_bytes<0>(n[0], n[1], n[2], n[3]) ^ negative;
    }
    dot = Vec::sum_quads(quad);
  }
};

template <int kWords>
__device__ __forceinline__ void store_words(uint8_t *at, const uint32_t *word, bool aligned) {
  constexpr int kVector = kWords % 4 == 0 ? 4 : kWords % 2 == 0 ? 2 : 1;
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
#pragma unroll
      for (int b = 0; b < 4; ++b) at[4 * i + b] = uint8_t(word[i] >> (8 * b));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += kVector) {
      if constexpr (kVector == 4) {
        *reinterpret_cast<uint4 *>(at + 4 * i) = make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]);
      } else if constexpr (kVector == 2) {
        *reinterpret_cast<uint2 *>(at + 4 * i) = make_uint2(word[i], word[i + 1]);
      } else {
        *reinterpret_cast<uint32_t *>(at + 4 * i) = word[i];
      }
    }
  }
}

// 4x4 bytes across the lanes of four tokens: lane i gets byte i of all four words.
template <int L>
__device__ __forceinline__ uint32_t transpose_bytes(uint32_t word) {
  const bool odd = (threadIdx.x & L) != 0, upper = (threadIdx.x & 2 * L) != 0;
  word = __byte_perm(word, __shfl_xor_sync(kAll, word, L), odd ? 0x3715 : 0x6240);
  return __byte_perm(word, __shfl_xor_sync(kAll, word, 2 * L), upper ? 0x3276 : 0x5410);
}

// One word of a plane of V. `quad`: the four tokens of the group are all written, to one group of the tile.
template <int L>
__device__ __forceinline__ void store_v_word(uint8_t *plane, int word_index, int row, uint32_t word, bool quad,
                                             bool wanted) {
  const uint32_t transposed = transpose_bytes<L>(word);
  uint8_t *at = plane + 64 * word_index + 16 * (row >> 2);
  if (quad) {
    if (wanted) *reinterpret_cast<uint32_t *>(at + 4 * (row & 3)) = transposed;
  } else if (wanted) {
#pragma unroll
    for (int b = 0; b < 4; ++b) at[4 * b + (row & 3)] = uint8_t(word >> (8 * b));
  }
}

// Copies C channels of each wanted vector raw; what became of it.
template <int kHeadDim>
__device__ __noinline__ int copy_exact(const VectorSide &v, int64_t at, int64_t slot, int head, bool wanted) {
  using Vec = Lanes<kHeadDim>;
  constexpr int C = Vec::C;
  float x[C];
  if (wanted) {
    load_row(v.rows.data, v.rows.type, v.rows.aligned != 0, at, x);
  } else {
#pragma unroll
    for (int i = 0; i < C; ++i) x[i] = 0;
  }
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < C; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffff);
#pragma unroll
  for (int lane = 1; lane < Vec::L; lane *= 2) largest = max(largest, __shfl_xor_sync(kAll, largest, lane));
  const float limit = raw_limit(v.side.raw_type);
  const bool finite = largest < 0x7f800000, clamped = finite && __uint_as_float(largest) > limit;
  if (!wanted) return kFine;
  uint32_t word[C / 2];
#pragma unroll
  for (int i = 0; i < C; ++i) {
    float value = finite ? x[i] : 0;
    if (clamped) value = value < -limit ? -limit : value > limit ? limit : value;
    const uint32_t half = v.side.raw_type == TQ_TYPE_F16 ? f16_from_f32(value) : bf16_from_f32(value);
    word[i / 2] = i % 2 == 0 ? half : word[i / 2] | half << 16;
  }
  uint8_t *tile = tile_at(v.exact, slot, head) + v.exact.codes_offset + int(slot % kTileTokens) * 2 * kHeadDim;
  store_words<C / 2>(tile + Vec::part() * C * 2, word, true);
  return !finite ? kNonFinite : clamped ? kClamped : kFine;
}

template <int kHeadDim, int kBits>
__device__ void encode_vectors(const VectorCall &call, const VectorSide &v, uint32_t table) {
  using Vec = Lanes<kHeadDim>;
  using Codes = LaneCodes<kHeadDim, kBits>;
  constexpr int C = Vec::C, L = Vec::L;
  const SideParams &side = v.side;
  const int part = Vec::part();
  const uint32_t heads = uint32_t(call.heads);
  const uint32_t items = uint32_t((call.tokens + Vec::kVectors - 1) / Vec::kVectors) * heads;
  const bool tiles = call.slots != nullptr;
  for (uint32_t item = blockIdx.x * (encode_threads(kHeadDim) / 32) + threadIdx.x / 32; item < items;
       item += gridDim.x * (encode_threads(kHeadDim) / 32)) {
    // Heads first: the warps of a block read whole tokens.
    const int head = int(item % heads);
    const int64_t token = int64_t{item / heads} * Vec::kVectors + Vec::vector();
    bool wanted = token < call.tokens;
    Slots slots;
    if (tiles && wanted) {
      slots = read_slots(call, v, token);
      if (slots.bad) {
        if (part == 0 && head == 0 && v.counts_slots) count_fault(call.faults, TQ_FAULT_SLOT, call.first_token + token);
        slots.coded = slots.exact = -1;
      }
      wanted = slots.coded != -1;
    }
    const int64_t at = token * v.rows.token_stride + head * v.rows.head_stride + part * C;
    int outcome = kFine;
    if (call.exact_slots != nullptr && __any_sync(kAll, slots.exact != -1)) {
      outcome = copy_exact<kHeadDim>(v, at, slots.exact, head, slots.exact != -1);
    }
    if (!__any_sync(kAll, wanted)) {
      if (part == 0) count_outcome(call.faults, outcome, call.first_token + token);
      continue;
    }

    const int64_t vector = token * heads + head;
    const float *offset = v.offset == nullptr ? nullptr : v.offset + head * kHeadDim + part * C;
    const auto load = [&](float(&x)[C]) {
      if (!wanted) {
#pragma unroll
        for (int i = 0; i < C; ++i) x[i] = 1;
      } else if (v.rotated != nullptr) {
        load_row(v.rotated, TQ_TYPE_F32, true, vector * kHeadDim + part * C, x);
      } else {
        load_row(v.rows.data, v.rows.type, v.rows.aligned != 0, at, x);
        if (offset != nullptr) {
#pragma unroll
          for (int i = 0; i < C; ++i) x[i] = x[i] - offset[i];
        }
      }
    };
    float y[C];
    load(y);
    const auto rotate = [&] {
      for (int round = 0; round < side.rounds; ++round) {
        Vec::flip(side, round, y);
        Vec::template hadamard<false>(y);
      }
    };
    rotate();
    float norm2 = Vec::squared_norm(y);
    int exponent = 0, coded = kFine;
    bool zero = false;
    if (v.exponents != nullptr) {
      exponent = wanted ? v.exponents[vector] : 0;
      zero = exponent == kZeroRow || exponent == kNonFiniteRow;
      if (exponent == kNonFiniteRow) coded = kNonFinite;
    } else if (__any_sync(kAll, !(norm2 >= kMinSquaredNorm && norm2 <= kMaxSquaredNorm))) {
      // Again for the whole warp, scaled where that is needed: by 2^0 the others come out the same.
      load(y);
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < C; ++i) largest = max(largest, __float_as_uint(y[i]) & 0x7fffffff);
#pragma unroll
      for (int lane = 1; lane < L; lane *= 2) largest = max(largest, __shfl_xor_sync(kAll, largest, lane));
      const bool extreme = !(norm2 >= kMinSquaredNorm && norm2 <= kMaxSquaredNorm);
      if (largest >= 0x7f800000) coded = kNonFinite;
      zero = largest == 0 || coded == kNonFinite;
      if (extreme && !zero) exponent = exponent_of(__uint_as_float(largest));
#pragma unroll
      for (int i = 0; i < C; ++i) y[i] = zero ? 1 : times_power_of_two(y[i], -exponent);
      rotate();
      norm2 = Vec::squared_norm(y);
    }

    Codes codes;
    float dot = 0, uu = 0;
    if constexpr (kBits == 8) {
      Encoder<kHeadDim, kBits>::choose_bytes(y, codes, dot, uu);
    } else {
      const float gain = side.z_gain / sqrtf(norm2);
      Encoder<kHeadDim, kBits>::choose(y, gain * 0x1p-7f, table, codes, dot, uu);
    }
#pragma unroll
    for (int lane = 1; lane < L; lane *= 2) uu += __shfl_xor_sync(kAll, uu, lane);
    float value = choose_scale(side.scale_rule, norm2, dot, uu, side.scale_gain);
    if (exponent != 0) value = times_power_of_two(value, exponent);
    if (zero) {
      value = 0;
#pragma unroll
      for (int i = 0; i < Codes::kWords; ++i) codes.word[i] = 0;
      codes.ones = codes.shared = 0;
    }

    const int bytes = scale_bytes(side);
    constexpr int kPlane0 = kHeadDim * Codes::kPlaneBits / 8, kPlane1 = kHeadDim / 8;
    if (!tiles) {
      if (wanted) {
        uint8_t *record = v.flat.codes + token * v.flat.codes_stride;
        store_words<Codes::kWords>(record + part * 4 * Codes::kWords, codes.word, v.flat.aligned);
        if constexpr (Codes::kOnes) {
          store_words<1>(record + kPlane0 + (Codes::kShared ? 8 : 4) * part, &codes.ones, v.flat.aligned);
        }
        if constexpr (Codes::kShared) {
          if (part == 0) store_words<1>(record + kPlane0 + 4, &codes.shared, v.flat.aligned);
        }
        if (part == 0) {
          const int stored = store_scale(value, side.scale_type, v.flat.scales + token * v.flat.scales_stride);
          if (coded == kFine) coded = stored;
        }
      }
    } else {
      const int row = int(slots.coded) & 15;
      uint8_t *tile = wanted ? tile_at(v.tiles, slots.coded, head) : nullptr;
      uint8_t *plane0 = tile + v.tiles.codes_offset, *plane1 = plane0 + kTileTokens * kPlane0;
      if (side.is_v) {
        const int64_t group = slots.coded - Vec::vector() % 4;
        const unsigned members = L == 8 ? kAll : ((1u << (4 * L % 32)) - 1) << (threadIdx.x % 32 / (4 * L) * (4 * L));
        const int64_t first = __shfl_sync(kAll, group, int(threadIdx.x % 32) / (4 * L) * (4 * L));
        const bool fits = wanted && group == first && (group & 3) == 0;
        const bool quad = (__ballot_sync(kAll, fits) & members) == members;
#pragma unroll
        for (int i = 0; i < Codes::kWords; ++i) {
          store_v_word<L>(plane0, part * Codes::kWords + i, row, codes.word[i], quad, wanted);
        }
        if constexpr (Codes::kOnes) {
          store_v_word<L>(plane1, part * (Codes::kShared ? 2 : 1), row, codes.ones, quad, wanted);
        }
        if constexpr (Codes::kShared) store_v_word<L>(plane1, 1, row, codes.shared, quad, wanted && part == 0);
      } else if (wanted) {
        store_words<Codes::kWords>(plane0 + row * kPlane0 + part * 4 * Codes::kWords, codes.word, true);
        if constexpr (Codes::kOnes) {
          uint8_t *ones = plane1 + row * kPlane1;
          store_words<1>(ones + (Codes::kShared ? 8 : 4) * part, &codes.ones, true);
          if constexpr (Codes::kShared) {
            if (part == 0) store_words<1>(ones + 4, &codes.shared, true);
          }
        }
      }
      if (wanted && part == 0) {
        const int stored = store_scale(value, side.scale_type, tile + v.tiles.scales_offset + row * bytes);
        if (coded == kFine) coded = stored;
      }
    }
    if (part == 0 && wanted && coded != kFine) outcome = coded;
    if (part == 0) count_outcome(call.faults, outcome, call.first_token + token);
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(encode_threads(kHeadDim), kEncodeBlocks)
    encode_kernel(const __grid_constant__ VectorCall call) {
  __shared__ uint32_t table[kTableEntries * 32];
  const VectorSide &v = call.side[blockIdx.y];
  if (v.side.bits != 8) fill_table(v.side, table);
  __syncthreads();
  const uint32_t base = uint32_t(__cvta_generic_to_shared(table)) + threadIdx.x % 32 * 4 - 0x47000000u * 128;
  switch (v.side.bits) {
    case 1:
      return encode_vectors<kHeadDim, 1>(call, v, base);
    case 2:
      return encode_vectors<kHeadDim, 2>(call, v, base);
    case 3:
      return encode_vectors<kHeadDim, 3>(call, v, base);
    case 4:
      return encode_vectors<kHeadDim, 4>(call, v, base);
    default:
      return encode_vectors<kHeadDim, 8>(call, v, base);
  }
}

template <int kHeadDim>
int load_encode() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, encode_kernel<kHeadDim>);
}

template <int kHeadDim>
int launch_encode_fast(const VectorCall &call, const DeviceLimits &limits, void *stream) {
  constexpr int kWarps = encode_threads(kHeadDim) / 32, kVectors = Lanes<kHeadDim>::kVectors;
  const int64_t items = (call.tokens + kVectors - 1) / kVectors * call.heads;
  if (items > INT32_MAX / 2) return cudaErrorInvalidValue;
  const int64_t blocks = (items + kWarps - 1) / kWarps;
  const int64_t resident = int64_t{limits.multiprocessors} * kEncodeBlocks / call.num_sides;
  encode_kernel<kHeadDim><<<dim3(unsigned(blocks < resident ? blocks : resident), unsigned(call.num_sides)),
                            encode_threads(kHeadDim), 0, cudaStream_t(stream)>>>(call);
  return cudaPeekAtLastError();
}

}  // namespace tqkv::cuda
