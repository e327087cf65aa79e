// SPDX-License-Identifier: Apache-2.0
// Decode and load of one head_dim after one Hadamard round or none: int8 grid values times +-1, exact in integers. At
// head_dim 128, 4 bits and bf16 a vector moves 66 + 256 bytes; an H200 has about 19 issue slots an element in that time.
#pragma once

#include <bit>

#include "kernels/device/launch.cuh"
#include "kernels/device/rows.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {

constexpr int kDecodeWarps = 4;          // a block
constexpr int decode_blocks(bool any) {  // a multiprocessor
  return any ? 3 : 4;
}

// The codes of a lane: of the chunks of 8 channels 4 s + q in row 2 g or 2 g + 1, which the products see as g and g + 8.
template <int kHeadDim, int kBits>
struct RowCodes {
  static constexpr int kSteps = kHeadDim / 32;
  static constexpr int kPlaneBits = kBits == 3 ? 2 : kBits == 1 ? 0 : kBits;
  static constexpr bool kOnes = kBits == 3 || kBits == 1;
  static constexpr int kPlane0 = kHeadDim * kPlaneBits / 8, kPlane1 = kHeadDim / 8;
  static constexpr int kRecord = kPlane0 + (kOnes ? kPlane1 : 0);
  static constexpr int kChunkWords = kPlaneBits == 8 ? 2 : kPlaneBits == 0 ? 0 : 1;  // the word that a chunk is in
  uint32_t word[kChunkWords > 0 ? kSteps *kChunkWords : 1], ones[kOnes ? kSteps : 1];

  // Of the word that chunk 4 s + q is in, or the first of its two.
  __device__ static int word_index(int s) {
    return kPlaneBits == 2 ? 2 * s + lane_part() / 2 : (4 * s + lane_part()) * kChunkWords;
  }

  // Whether the second plane is read four words at a time, unless its records may lie anywhere.
  static constexpr bool kFours = kOnes && kSteps % 4 == 0 && kRecord % 16 == 0;

  // Of a token's own bytes.
  template <bool kAnywhere>
  __device__ void load_record(const uint8_t *plane0, const uint8_t *plane1) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < kChunkWords; ++i) word[kChunkWords * s + i] = load_word(plane0, word_index(s) + i);
      if constexpr (kFours && !kAnywhere) {
        if (s % 4 != 0) continue;
        const uint4 four = __ldg(reinterpret_cast<const uint4 *>(plane1) + s / 4);
        ones[s] = four.x, ones[s + 1] = four.y, ones[s + 2] = four.z, ones[s + 3] = four.w;
      } else if constexpr (kOnes) {
        ones[s] = load_word(plane1, s);
      }
    }
  }
  // Of V, where bytes of four tokens are interleaved.
  __device__ void load_v(const uint8_t *plane0, const uint8_t *plane1, int row) {
    const auto read = [&](const uint8_t *plane, int index) {
      const uint32_t pick = uint32_t(row & 3) * 0x11 + 0x40;
      const uint4 v = __ldg(reinterpret_cast<const uint4 *>(plane + 64 * index + 16 * (row >> 2)));
      return __byte_perm(__byte_perm(v.x, v.y, pick), __byte_perm(v.z, v.w, pick), 0x5410);
    };
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < kChunkWords; ++i) word[kChunkWords * s + i] = read(plane0, word_index(s) + i);
      if constexpr (kOnes) ones[s] = read(plane1, s);
    }
  }

  // Of two of V's rows that are in one such group of four.
  __device__ static void load_v_pair(const uint8_t *plane0, const uint8_t *plane1, int row, RowCodes (&codes)[2]) {
    const uint32_t pick[2] = {uint32_t(row & 3) * 0x11 + 0x40, uint32_t(row & 3) * 0x11 + 0x51};
    const auto read = [&](const uint8_t *plane, int index, uint32_t &first, uint32_t &second) {
      const uint4 v = __ldg(reinterpret_cast<const uint4 *>(plane + 64 * index + 16 * (row >> 2)));
      first = __byte_perm(__byte_perm(v.x, v.y, pick[0]), __byte_perm(v.z, v.w, pick[0]), 0x5410);
      second = __byte_perm(__byte_perm(v.x, v.y, pick[1]), __byte_perm(v.z, v.w, pick[1]), 0x5410);
    };
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < kChunkWords; ++i) {
        read(plane0, word_index(s) + i, codes[0].word[kChunkWords * s + i], codes[1].word[kChunkWords * s + i]);
      }
      if constexpr (kOnes) read(plane1, s, codes[0].ones[s], codes[1].ones[s]);
    }
  }

  // Grid values of chunk 4 t + q as signed bytes. `table`: those of magnitudes at 4 bits, of ascending indices below.
  __device__ __forceinline__ void grid(int t, uint2 table, uint32_t &low, uint32_t &high) const {
    if constexpr (kBits == 8) {
      low = word[2 * t];
      high = word[2 * t + 1];
    } else if constexpr (kBits == 4) {
      const uint32_t index = word[t] & 0x77777777;
      low = __byte_perm(table.x, table.y, index & 0xffff) ^ sign_masks(word[t]);
      high = __byte_perm(table.x, table.y, index >> 16) ^ sign_masks(word[t] << 4);
    } else {
      uint32_t index = 0;
      if constexpr (kPlaneBits == 2) index = word[t] >> (2 * (lane_part() & 1)) & 0x33333333;
      if constexpr (kOnes) {
        constexpr uint32_t kAt = 0x0312;  // nibbles: {2, 1, 3, 0}
        index |= (ones[t] >> (kAt >> (4 * lane_part()) & 3) & 0x11111111) << (kBits == 3 ? 2 : 0);
      }
      low = __byte_perm(table.x, table.y, index & 0xffff);
      high = __byte_perm(table.x, table.y, index >> 16);
    }
  }

 private:
  __device__ static uint32_t load_word(const uint8_t *plane, int index) {
    return __ldg(reinterpret_cast<const uint32_t *>(plane) + index);
  }
};

// What the warp's rows are, one a lane of the first 16; the others repeat them.
struct DecodeRow {
  const uint8_t *plane0 = nullptr, *plane1 = nullptr;  // of the record, or of V's tile
  int64_t exact_slot = -1;
  uint32_t scale = 0;  // as stored
  int row = 0;         // in the tile
  bool coded = false, bad = false;
};

// Copies rows that are kept exact; the slot of row i is lane i's.
static __device__ __noinline__ void load_exact(const VectorSide &v, uint32_t rows, int64_t own_slot, int64_t first,
                                               int head) {
  for (; rows != 0; rows &= rows - 1) {
    const int row = __ffs(int(rows)) - 1, n = v.side.head_dim;
    const int64_t slot = __shfl_sync(kAll, own_slot, row);
    const uint8_t *tile = tile_at(v.exact, slot, head) + v.exact.codes_offset;
    const int64_t at = (first + row) * v.rows.token_stride + head * v.rows.head_stride;
    for (int c = lane_index(); c < n; c += 32) {
      store_element(v.rows.data, v.rows.type, at + c, load_element(tile, v.side.raw_type, slot % kTileTokens * n + c));
    }
  }
}

// The rotation back of chunk t's outputs: sums of +-grid, from `begin` on; of tile i, channels 2 i, 2 i + 1.
template <int kHeadDim>
__device__ __forceinline__ void rotate_back(const uint32_t (&a)[kHeadDim / 32][4], const uint4 *operands, int t,
                                            int begin, int32_t (&sum)[4][4]) {
  constexpr int kSteps = kHeadDim / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = __float_as_int(kRoundingBias);
  }
  // Levels are 2 grid + 1: half the sum of the +-1 of a column comes first. There is one only where all 8 channels of a
  // chunk have the same sign.
  sum[0][0] = begin;
  sum[0][2] = begin;
  const auto multiply = [&](int s, const uint4 &first, const uint4 &second) {
    const uint32_t b[4][2] = {{first.x, first.y}, {first.z, first.w}, {second.x, second.y}, {second.z, second.w}};
#pragma unroll
    for (int i = 0; i < 4; ++i) mma_m16n8k32<int8_t, int8_t>(sum[i], a[s], b[i], sum[i]);
  };
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if constexpr (is_power_of_two(kHeadDim)) {
      const int negative = std::popcount(unsigned(s & t)) % 2;
      multiply(s, operands[2 * negative], operands[2 * negative + 1]);
    } else {
      const uint4 *at = operands + (kSteps * t + s) * 64 + lane_index();
      multiply(s, at[0], at[32]);
    }
  }
}

// Where the warp's rows go.
template <int kHeadDim>
struct Output {
  static constexpr int kSteps = kHeadDim / 32;
  const VectorSide &v;
  const uint4 *operands;
  const int32_t *begins;
  const uint4 *signs;
  int64_t at, next;  // the lane's first chunk in row 2 g, and from there to row 2 g + 1
  uint32_t coded;
  int head;

  // Grid values `a`, whose levels are 2 grid + 1, times gains. `kType`: 0 for everything, else rows of this 16-bit type,
  // rotated, without offset, whose gains are not too large for a bias: 3 * 2^22 times them is exact where it is finite.
  template <int kType>
  __device__ __forceinline__ void write(const uint32_t (&a)[kSteps][4], const float (&gain)[2]) const {
    const float twice[2] = {2 * gain[0], 2 * gain[1]};
    const float bias[2] = {-kRoundingBias * twice[0], -kRoundingBias * twice[1]};
    uint4 kept[4];
    if constexpr (is_power_of_two(kHeadDim)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) kept[i] = operands[32 * i + lane_index()];
    }
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      int32_t sum[4][4];
      rotate_back<kHeadDim>(a, is_power_of_two(kHeadDim) ? kept : operands, t, begins[4 * t + lane_part()], sum);
      const uint4 flips = signs[4 * t + lane_part()];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float biased = __int_as_float(sum[i / 2][2 * r + i % 2]);  // the bits of kRoundingBias + sum
          if constexpr (kType != 0) {
            x[i] = __fmaf_rn(biased, twice[r], bias[r]);
          } else {
            const int grid = int8_t(a[t][r + i / 4 * 2] >> (8 * (i % 4)));
            x[i] = v.side.rounds == 1 ? __fmaf_rn(biased - kRoundingBias, twice[r], 0.0f)
                                      : __fmaf_rn(float(2 * grid + 1), gain[r], 0.0f);
          }
        }
        if ((coded >> (2 * lane_row() + r) & 1) == 0) continue;
        if constexpr (kType != 0) {
          store_chunk(v.rows, kType, at + r * next + 32 * t, x, flips);
        } else {
          const float *offset = v.offset == nullptr ? nullptr : v.offset + head * kHeadDim + 8 * (4 * t + lane_part());
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            x[i] = flipped(x[i], i, flips);
            if (offset != nullptr) x[i] = x[i] + offset[i];
          }
          store_chunk(v.rows, v.rows.type, at + r * next + 32 * t, x, make_uint4(0, 0, 0, 0));
        }
      }
    }
  }
};

template <int kHeadDim, int kBits, bool kAny>
__device__ void decode_rows(const VectorCall &call, const VectorSide &v, uint2 table, const uint4 *operands,
                            const int32_t *begins, const uint4 *signs) {
  using Codes = RowCodes<kHeadDim, kBits>;
  constexpr int kSteps = Codes::kSteps;
  const SideParams &side = v.side;
  // Three items at a time are under way: the slots of one are read, the codes of the next are brought into the L2 cache,
  // and those of the third are decoded. An item that is a whole tile has one place.
  ItemStep step(call, kDecodeWarps);
  NextSlots next_slots;
  bool next_whole = false;
  const auto find = [&] {
    DecodeRow own;
    next_whole = false;
    const int64_t own_token = int64_t{step.group} * kRows + lane_index() % kRows;
    const int head = int(step.head);
    if (!step.left()) return own;
    if (call.slots == nullptr) {
      if (own_token < call.tokens) {
        own.coded = true;
        own.plane0 = v.flat.codes + own_token * v.flat.codes_stride;
        own.plane1 = own.plane0 + Codes::kPlane0;
        own.scale = load_scale_bits(side.scale_type, v.flat.scales + own_token * v.flat.scales_stride);
      }
    } else {
      const int64_t first_slot = __shfl_sync(kAll, next_slots.coded, 0);
      const bool follows = own_token < call.tokens && next_slots.exact == -1 &&
                           next_slots.coded == first_slot + lane_index() % kRows && first_slot >= 0 &&
                           next_slots.coded < v.tiles.num_slots && first_slot % kTileTokens == 0;
      next_whole = __all_sync(kAll, follows && (!kAny || side.scale_type == TQ_TYPE_F16)) != 0;
      if (next_whole) {
        own.plane0 = tile_at(v.tiles, first_slot, head);
        // Of both rows of the lane.
        own.scale = *reinterpret_cast<const uint32_t *>(own.plane0 + v.tiles.scales_offset + 4 * lane_row());
        prefetch_l2(own.plane0 + v.tiles.codes_offset + lane_index() * (kTileTokens * Codes::kRecord / 32));
        return own;
      }
      if (own_token >= call.tokens) return own;
      const Slots slots = check_load_slots(v, next_slots.coded, next_slots.exact);
      own.bad = slots.bad;
      if (own.bad && lane_index() < kRows && head == 0 && v.counts_slots) {
        count_fault(call.faults, TQ_FAULT_SLOT, call.first_token + own_token);
      }
      own.coded = !own.bad && slots.coded != -1;
      if (!own.bad) own.exact_slot = slots.exact;
      if (own.coded) {
        const uint8_t *tile = tile_at(v.tiles, slots.coded, head);
        own.row = int(slots.coded) % kTileTokens;
        own.plane0 = tile + v.tiles.codes_offset;
        own.plane1 = own.plane0 + kTileTokens * Codes::kPlane0;
        if (!side.is_v) {
          own.plane0 += own.row * Codes::kPlane0;
          own.plane1 += own.row * Codes::kPlane1;
        }
        own.scale = load_scale_bits(side.scale_type, tile + v.tiles.scales_offset + own.row * scale_bytes(side));
      }
    }
    // Of V's tile its share, so that the rows together cover it.
    if (own.coded && lane_index() < kRows) {
      const int share = side.is_v && call.slots != nullptr ? own.row : 0;
      if constexpr (Codes::kPlane0 > 0) prefetch_l2(own.plane0 + share * Codes::kPlane0);
      if constexpr (Codes::kOnes) prefetch_l2(own.plane1 + share * Codes::kPlane1);
    }
    return own;
  };
  next_slots.read(step);
  DecodeRow next = find();
  uint32_t next_group = step.group, next_head = step.head;
  bool left = step.left();
  step.advance();
  next_slots.read(step);
  while (left) {
    const DecodeRow own = next;
    const bool whole = next_whole;
    const int head = int(next_head);
    const int64_t first = int64_t{next_group} * kRows;
    left = step.left();
    next_group = step.group;
    next_head = step.head;
    uint32_t coded = ~uint32_t{0}, bad = 0, exact = 0;
    const bool v_tiles = call.slots != nullptr && side.is_v;

    next = find();   // first: waiting for its slots would be waiting for what is loaded after them
    Codes codes[2];  // all of them before the first is needed
    if (whole) {
      const uint8_t *plane0 = own.plane0 + v.tiles.codes_offset, *plane1 = plane0 + kTileTokens * Codes::kPlane0;
      if (v_tiles) {
        Codes::load_v_pair(plane0, plane1, 2 * lane_row(), codes);
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = 2 * lane_row() + r;
          codes[r].template load_record<kAny>(plane0 + row * Codes::kPlane0, plane1 + row * Codes::kPlane1);
        }
      }
    } else {
      coded = __ballot_sync(kAll, own.coded);
      bad = __ballot_sync(kAll, own.bad) & 0xffff;
      exact = __ballot_sync(kAll, own.exact_slot != -1) & 0xffff;
      const uint8_t *plane0[2], *plane1[2] = {};
      int in_tile[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 2 * lane_row() + r;
        plane0[r] = reinterpret_cast<const uint8_t *>(__shfl_sync(kAll, uint64_t(own.plane0), row));
        if constexpr (Codes::kOnes)
          plane1[r] = reinterpret_cast<const uint8_t *>(__shfl_sync(kAll, uint64_t(own.plane1), row));
        in_tile[r] = __shfl_sync(kAll, own.row, row);
        codes[r] = {};
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if ((coded >> (2 * lane_row() + r) & 1) == 0) continue;
        if (v_tiles) {
          codes[r].load_v(plane0[r], plane1[r], in_tile[r]);
        } else {
          codes[r].template load_record<kAny>(plane0[r], plane1[r]);
        }
      }
    }
    step.advance();
    next_slots.read(step);
    uint32_t a[kSteps][4];
    float gain[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t other = __shfl_sync(kAll, own.scale, 2 * lane_row() + r);
      const uint32_t scale = !whole ? other : r == 0 ? own.scale & 0xffff : own.scale >> 16;
      gain[r] = decode_gain(scale_from_bits(side.scale_type, scale), side.decode_gain);
#pragma unroll
      for (int t = 0; t < kSteps; ++t) codes[r].grid(t, table, a[t][r], a[t][r + 2]);
    }

    const int64_t at = (first + 2 * lane_row()) * v.rows.token_stride + head * v.rows.head_stride + 8 * lane_part();
    const Output<kHeadDim> output{v, operands, begins, signs, at, v.rows.token_stride, coded, head};
    if constexpr (kAny) {
      output.template write<0>(a, gain);
    } else if (v.rows.type == TQ_TYPE_BF16) {
      output.template write<TQ_TYPE_BF16>(a, gain);
    } else {
      output.template write<TQ_TYPE_F16>(a, gain);
    }
    for (uint32_t rows = bad; rows != 0; rows &= rows - 1) {
      const int64_t row = (first + __ffs(int(rows)) - 1) * v.rows.token_stride + head * v.rows.head_stride;
      for (int c = lane_index(); c < kHeadDim; c += 32) store_element(v.rows.data, v.rows.type, row + c, 0);
    }
    if (exact != 0) [[unlikely]]
      load_exact(v, exact, own.exact_slot, first, head);
  }
}

// Grid values as signed bytes.
__device__ inline uint2 level_table(const SideParams &side) {
  uint64_t bytes = 0;
  const int count = side.bits == 8 ? 0 : side.bits == 4 ? 8 : 1 << side.bits;
  for (int i = 0; i < count; ++i) {
    const int grid = (int(side.levels[i]) - 1) / 2;  // odd: exact below zero too
    bytes |= uint64_t(uint8_t(grid)) << (8 * i);
  }
  return make_uint2(uint32_t(bytes), uint32_t(bytes >> 32));
}

// Operands B of the rotation back, of signed bytes: column 2 p + b of tile i is channel 2 i + b of chunk 4 t + p, row
// 4 q + j channel j of chunk 4 s + q, in the second word channel 4 + j. Of lane 4 (2 p + b) + q: the words of tiles 0 and
// 1, and of tiles 2 and 3. {t = s = 0, the same negated}[2][32 lanes], or [t][s][2][32 lanes].
template <int kHeadDim>
__device__ void fill_inverse(const SideParams &side, uint4 *operands) {
  constexpr int kSteps = kHeadDim / 32;
  for (int index = int(threadIdx.x); index < 32 * rotation_operands<kHeadDim>; index += int(blockDim.x)) {
    const int lane = index % 32, which = index / 32, p = lane / 8, q = lane % 4;
    const bool negative = is_power_of_two(kHeadDim)
                              ? is_negative<kHeadDim>(side, q, p) != (which != 0)
                              : is_negative<kHeadDim>(side, 4 * (which % kSteps) + q, 4 * (which / kSteps) + p);
    // Bytes of 1 or -1, by the parity of j and (b, i % 2).
    const uint32_t minus = 0xfefefefe,
                   even = 0x01010101 ^ (negative ? minus : 0) ^ (lane / 4 % 2 != 0 ? 0xfe00fe00 : 0);
    const uint32_t odd = even ^ 0xfefe0000;
    operands[64 * which + lane] = make_uint4(even, even, odd, odd);
    operands[64 * which + 32 + lane] = make_uint4(even, even ^ minus, odd, odd ^ minus);
  }
}

// Where the sums of a chunk's first channel begin, as the bits of kRoundingBias plus half of the column's sum.
template <int kHeadDim>
__device__ void fill_begins(const SideParams &side, int32_t *begins) {
  for (int chunk = int(threadIdx.x); chunk < kHeadDim / 8; chunk += int(blockDim.x)) {
    int sum = 0;
    for (int k = 0; k < kHeadDim / 8; ++k) sum += is_negative<kHeadDim>(side, k, chunk) ? -8 : 8;
    begins[chunk] = __float_as_int(kRoundingBias) + sum / 2;
  }
}

template <int kHeadDim>
struct DecodeShared {
  uint4 operands[64 * rotation_operands<kHeadDim>], signs[kHeadDim / 8];
  int32_t begins[kHeadDim / 8];
};

// `kAny`: everything, else up to 4 bits and what Output::write does for a type.
template <int kHeadDim, bool kAny>
__global__ void __launch_bounds__(32 * kDecodeWarps, decode_blocks(kAny))
    decode_kernel(const __grid_constant__ VectorCall call) {
  __shared__ DecodeShared<kHeadDim> shared;
  grid_dependency_launch();
  const VectorSide &v = call.side[blockIdx.y];
  fill_inverse<kHeadDim>(v.side, shared.operands);
  fill_signs<kHeadDim>(v.side, reinterpret_cast<uint32_t *>(shared.signs));
  fill_begins<kHeadDim>(v.side, shared.begins);
  __syncthreads();
  const uint2 table = level_table(v.side);
  grid_dependency_wait();
  const auto decode = [&](auto bits) {
    decode_rows<kHeadDim, bits, kAny>(call, v, table, shared.operands, shared.begins, shared.signs);
  };
  switch (v.side.bits) {
    case 1:
      return decode(std::integral_constant<int, 1>());
    case 2:
      return decode(std::integral_constant<int, 2>());
    case 3:
      return decode(std::integral_constant<int, 3>());
    case 4:
      return decode(std::integral_constant<int, 4>());
    default:
      if constexpr (kAny) decode(std::integral_constant<int, 8>());
  }
}

// The rest is for the generic kernels.
template <int kHeadDim>
bool takes_decode(const VectorSide &v, bool tiles, const DeviceLimits &) {
  return v.side.rounds <= 1 && v.side.bits <= 8 && v.rows.aligned != 0 && (tiles || v.flat.alignment >= 4);
}

template <int kHeadDim>
int load_decode() {
  cudaFuncAttributes attributes;
  if (const int error = cudaFuncGetAttributes(&attributes, decode_kernel<kHeadDim, false>)) return error;
  return cudaFuncGetAttributes(&attributes, decode_kernel<kHeadDim, true>);
}

// RowCodes::kFours of codes of so many bits.
template <int kHeadDim>
bool reads_fours(int bits) {
  return (bits == 1 && RowCodes<kHeadDim, 1>::kFours) || (bits == 3 && RowCodes<kHeadDim, 3>::kFours);
}

template <int kHeadDim>
int launch_decode_fast(const VectorCall &call, const DeviceLimits &limits, void *stream) {
  bool any = false;
  for (int i = 0; i < call.num_sides; ++i) {
    const VectorSide &v = call.side[i];
    any = any || v.side.rounds != 1 || v.side.bits == 8 || v.rows.type == TQ_TYPE_F32 || v.offset != nullptr ||
          v.side.scale_type != TQ_TYPE_F16 ||
          (call.slots == nullptr && v.flat.alignment < 16 && reads_fours<kHeadDim>(v.side.bits));
  }
  const dim3 grid = item_grid(call, limits, decode_blocks(any));
  const auto kernel = any ? decode_kernel<kHeadDim, true> : decode_kernel<kHeadDim, false>;
  if (limits.compute_capability < 90) return launch(kernel, grid, 32 * kDecodeWarps, 0, stream, call);
  return launch_dependent(kernel, grid, 32 * kDecodeWarps, 0, stream, call);
}

}  // namespace tqkv::cuda
