// SPDX-License-Identifier: Apache-2.0
// Encode and store of one head_dim with one Hadamard round or none, whatever the rows are. X is exact in f16, so that
// tensor cores add its rotation exactly; a coordinate's code is one byte of shared memory, whose address is the
// coordinate's cell.
#pragma once

#include <bit>

#include "kernels/device/matrix.cuh"
#include "kernels/device/rows.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {

inline constexpr int kEncodeWarps = 4;       // a block
constexpr int encode_blocks(int head_dim) {  // a multiprocessor: as many as do without spills
  return head_dim == 256 ? 2 : head_dim == 64 ? 4 : 3;
}

// The same of encode_rotated_kernel, whose warps share one matrix.
constexpr int rotated_warps(int head_dim) {
  return head_dim == 256 ? 4 : 8;
}
constexpr int rotated_blocks(int) {
  return 2;
}

// Items that a warp leaves for later because they are unusual; after more of them it takes all as if they were.
inline constexpr int kPutOff = 32;

// Quotient and rest, by a multiplication: `reciprocal` is (2^32 - 1) / divisor, with which the quotient is too small by
// one at most.
__device__ __forceinline__ uint32_t divide(uint32_t n, uint32_t divisor, uint32_t reciprocal, uint32_t &rest) {
  uint32_t quotient = __umulhi(n, reciprocal);
  rest = n - quotient * divisor;
  if (rest >= divisor) {
    rest -= divisor;
    ++quotient;
  }
  return quotient;
}

// Where whole tiles of a side are.
struct alignas(16) WholeTiles {
  uint8_t *codes;
  int64_t block_stride, tile_stride, head_stride;
  uint32_t per_block, tiles_a_block;  // per_block: the reciprocal
  uint32_t count;                     // of whole tiles, as many as 31 bits say

  WholeTiles() = default;
  __device__ explicit WholeTiles(const Tiles &tiles)
      : codes(tiles.base + tiles.codes_offset),
        block_stride(tiles.block_stride),
        tile_stride(tiles.tile_stride),
        head_stride(tiles.head_stride),
        per_block(UINT32_MAX / uint32_t(tiles.storage_tokens / kTileTokens)),
        tiles_a_block(uint32_t(tiles.storage_tokens / kTileTokens)),
        count(uint32_t(min(tiles.num_slots / kTileTokens, int64_t{INT32_MAX}))) {}

  // The codes of the side.
  __device__ __forceinline__ uint8_t *at(uint32_t tile, uint32_t head) const {
    uint32_t in_block;
    const uint32_t block = divide(tile, tiles_a_block, per_block, in_block);
    return codes + (block * block_stride + in_block * tile_stride + head * head_stride);
  }
};

template <int kHeadDim>
struct EncodeShared {
  static constexpr int kStride = kHeadDim / 8 + 4;  // words of a row in `nibbles`: rows of lanes in different banks
  struct Warp {
    uint32_t nibbles[kRows * kStride];  // codes of 8 channels a word; at 4 bits as they are stored
    // Where each row goes: its planes, or V's in its tile, and its scale.
    uint64_t plane0[kRows], plane1[kRows], scale[kRows];
    int64_t dot[kRows];
    float norm[kRows];
    uint32_t uu[kRows];
    int32_t exponent[kRows], row[kRows];  // row: in its tile
    uint32_t quads;                       // bits of rows
    int num_put_off;
    uint2 put_off[kPutOff];  // groups and heads
    uint2 rest;              // where all that is left is put off, too
    // Of encode_rotated_kernel, which has no registers for them: here a warp's own pointer finds them.
    uint32_t stride, per_head;  // ItemPlace
    uint32_t zero;
    float unit, cells, cell_of_0;
    uint2 magnitudes;  // as below
    int64_t tokens;
    WholeTiles tiles;
    int32_t plane0_at[32], plane1_at[32], scale_at[32];  // where a lane's words are in a tile
    int64_t slots[2 * kRows];                            // of the next item, then the exact ones
    uint32_t whole;                                      // items before the first that lacks tokens
    // Where a lane's chunks of the first item are, and its slot, if there are slots; bytes from there.
    uint64_t rows_from[32], slots_from[32];
    int64_t group_stride, head_stride, token_stride;
  };
  static constexpr int kPart = kHeadDim < 128 ? kHeadDim : 128;  // a rotation of more is two of half as many, added
  uint4 matrix[kHeadDim / 8 * kPart];                // SharedMatrix of the rotation, by the kernel of rotated rows
  uint4 signs[kHeadDim / 8];                         // of pairs of channels
  uint4 operands[32 * rotation_operands<kHeadDim>];  // of the rotation
  uint2 magnitudes;                                  // |u| of each index in the lower 3 bits of a code, as bytes
  Warp warps[rotated_warps(kHeadDim) > kEncodeWarps ? rotated_warps(kHeadDim) : kEncodeWarps];
  uint32_t table[4];  // and more: a byte a cell

  static constexpr int bytes(int half_cells) { return int(sizeof(EncodeShared)) + 2 * half_cells; }
  __device__ __forceinline__ static EncodeShared &get() { return *static_cast<EncodeShared *>(dynamic_shared()); }
  __device__ __forceinline__ static Warp &warp() { return get().warps[threadIdx.x / 32]; }
};

// Coordinates are in units of 2^-36: operands A have units of 2^-24, which are f16's least, and B has +-2^-12. Then
// Y_c times side.cells, rounded towards zero among the numbers of which the least is 2^-149, has an integer's bits.
inline constexpr uint32_t kOperandOne = 0x0c000c00;  // f16 2^-12, twice
inline constexpr float kUnit = 0x1p-36f, kPerBit = 0x1p-113f;

// What a cell's byte says: its code twice, in the lower and upper half; its code; or, of cells of |Y|, its magnitude.
enum class Entry { kTwice, kCode, kMagnitude };

// `half` cells below zero come first, unless entries are of magnitudes.
__device__ __forceinline__ void fill_table(const SideParams &side, uint32_t *table, Entry kind = Entry::kTwice) {
  const bool folds = kind == Entry::kMagnitude;
  const int half = side.half_cells, below = folds ? 0 : half, count = 1 << (side.bits - 1);
  const float *levels = side.levels + (side.bits == 4 ? 0 : count);
  int thresholds[7];  // twice the first cell of the next magnitude; of those that there are not, out of reach
#pragma unroll
  for (int j = 0; j < 7; ++j) thresholds[j] = j + 1 < count ? int(levels[j] + levels[j + 1]) : 2 * half;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < (half + below) / 4; i += int(blockDim.x)) {
    uint32_t entries = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int cell = 4 * i + k - below, folded = cell < 0 ? -1 - cell : cell;
      int magnitude = 0;
#pragma unroll
      for (int threshold : thresholds) magnitude += 2 * folded >= threshold;
      const int negative = side.bits == 4 ? magnitude | 8 : count - 1 - magnitude;
      const int code = cell < 0 ? negative : side.bits == 4 || folds ? magnitude : count + magnitude;
      entries |= uint32_t(code) << (8 * k);
    }
    table[i] = kind == Entry::kTwice ? entries * 0x11 : entries;
  }
}

// |u| of each index in the lower 3 bits of a code.
__device__ inline uint2 magnitude_bytes(const SideParams &side) {
  uint64_t bytes = 0;
  for (int i = 0; i < (side.bits == 4 ? 8 : 1 << side.bits); ++i) {
    bytes |= uint64_t(uint8_t(fabsf(side.levels[i]))) << (8 * i);
  }
  return make_uint2(uint32_t(bytes), uint32_t(bytes >> 32));
}

// The codes of 8 channels from their entries: nibble j for channel j, or at 4 bits the word of a record.
__device__ __forceinline__ uint32_t gather_codes(const uint32_t (&entry)[8], bool four_bits) {
  const auto bytes = [](uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
  };
  const uint32_t even = bytes(entry[0], entry[2], entry[4], entry[6]);
  const uint32_t odd = bytes(entry[1], entry[3], entry[5], entry[7]);
  const uint32_t word = (even & 0x0f0f0f0f) | (odd & 0xf0f0f0f0);
  if (!four_bits) return word;
  const uint32_t first = __byte_perm(even, odd, 0x5140), second = __byte_perm(even, odd, 0x7362);
  const uint32_t signs = (first & 0xf0f0f0f0) | (second & 0x0f0f0f0f);
  return (word & 0x77777777) | (signs & 0x88888888);
}

// Word `index` of a plane from the codes of 8 channels a word.
template <int kBits>
__device__ __forceinline__ uint32_t plane_word(const uint32_t *nibbles, int plane, int index) {
  if constexpr (kBits == 4) return nibbles[index];
  if (kBits != 1 && plane == 0) {
    return (nibbles[2 * index] & 0x33333333) | (nibbles[2 * index + 1] & 0x33333333) << 2;
  }
  const uint32_t *four = nibbles + 4 * index;
  const auto bit = [&](int i) { return four[i] >> (kBits - 1) & 0x11111111; };
  return bit(0) << 2 | bit(1) << 1 | bit(2) << 3 | bit(3);
}

// Row-major planes of flat records and of K's tiles, in words; `wide`: 16 bytes at a time where they are aligned so.
template <int kHeadDim, int kBits>
__device__ __forceinline__ void write_rows(const typename EncodeShared<kHeadDim>::Warp &warp, uint32_t coded,
                                           bool wide) {
  const int lane = current_lane();
  constexpr int kStride = EncodeShared<kHeadDim>::kStride;
  constexpr int kPlaneWords[2] = {kBits == 1 ? 0 : kHeadDim * (kBits == 3 ? 2 : kBits) / 32,
                                  kBits == 1 || kBits == 3 ? kHeadDim / 32 : 0};
#pragma unroll
  for (int plane = 0; plane < 2; ++plane) {
    const int words = kPlaneWords[plane];
    const int vector = words % 4 == 0 ? 4 : words % 2 == 0 ? 2 : 1;
    const uint64_t *starts = plane == 0 ? warp.plane0 : warp.plane1;
#pragma unroll
    for (int i = 0; i < kRows * words / vector; i += 32) {
      const int piece = i + lane;
      if (kRows * words / vector % 32 != 0 && piece >= kRows * words / vector) break;
      const int row = piece / (words / vector), first = piece % (words / vector) * vector;
      if ((coded >> row & 1) == 0) continue;
      uint32_t word[4];
#pragma unroll
      for (int k = 0; k < vector; ++k) word[k] = plane_word<kBits>(warp.nibbles + row * kStride, plane, first + k);
      auto *to = reinterpret_cast<uint8_t *>(starts[row]) + 4 * first;
      if (!wide) {
#pragma unroll
        for (int k = 0; k < vector; ++k) reinterpret_cast<uint32_t *>(to)[k] = word[k];
      } else if (vector == 4) {
        *reinterpret_cast<uint4 *>(to) = make_uint4(word[0], word[1], word[2], word[3]);
      } else if (vector == 2) {
        *reinterpret_cast<uint2 *>(to) = make_uint2(word[0], word[1]);
      } else {
        *reinterpret_cast<uint32_t *>(to) = word[0];
      }
    }
  }
}

// V's tiles. Where bit i of warp.quads is set, i a multiple of 4, rows i .. i + 3 are one group of four of a tile and
// written as words; of the other rows single bytes.
template <int kHeadDim, int kBits>
__device__ __forceinline__ void write_v_rows(const typename EncodeShared<kHeadDim>::Warp &warp, uint32_t coded) {
  const int lane = current_lane();
  constexpr int kStride = EncodeShared<kHeadDim>::kStride;
  constexpr int kPlaneWords[2] = {kBits == 1 ? 0 : kHeadDim * (kBits == 3 ? 2 : kBits) / 32,
                                  kBits == 1 || kBits == 3 ? kHeadDim / 32 : 0};
#pragma unroll
  for (int plane = 0; plane < 2; ++plane) {
    const int words = kPlaneWords[plane];
    const uint64_t *starts = plane == 0 ? warp.plane0 : warp.plane1;
#pragma unroll 2
    for (int i = lane; i < (words * 4 + 31) / 32 * 32; i += 32) {
      const int index = i / 4, row = i % 4 * 4;  // neighbours write neighbouring 16 bytes
      const int in_tile = warp.row[row];
      if ((warp.quads >> row & 1) == 0 || index >= words) continue;
      uint32_t word[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) word[k] = plane_word<kBits>(warp.nibbles + (row + k) * kStride, plane, index);
      const uint32_t a = __byte_perm(word[0], word[1], 0x5140), b = __byte_perm(word[2], word[3], 0x5140);
      const uint32_t c = __byte_perm(word[0], word[1], 0x7362), d = __byte_perm(word[2], word[3], 0x7362);
      auto *to = reinterpret_cast<uint8_t *>(starts[row]) + 64 * index + 16 * (in_tile / 4);
      *reinterpret_cast<uint4 *>(to) = make_uint4(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632),
                                                  __byte_perm(c, d, 0x5410), __byte_perm(c, d, 0x7632));
    }
    for (uint32_t rows = coded & ~(warp.quads * 15); rows != 0; rows &= rows - 1) {
      const int row = __ffs(int(rows)) - 1, in_tile = warp.row[row];
      for (int e = lane; e < 4 * words; e += 32) {
        const uint32_t word = plane_word<kBits>(warp.nibbles + row * kStride, plane, e / 4);
        reinterpret_cast<uint8_t *>(starts[row])[64 * (e / 4) + 16 * (in_tile / 4) + 4 * (e % 4) + in_tile % 4] =
            uint8_t(word >> (8 * (e % 4)));
      }
    }
  }
}

// Copies rows raw into exact slots. `outcome`: of the lane's row so far; what becomes of the copy counts only where that
// is fine.
static __device__ __noinline__ void store_exact(const VectorCall &call, const VectorSide &v, uint32_t rows,
                                                int64_t first, int head, int outcome) {
  const int n = v.side.head_dim;
  const float limit = raw_limit(v.side.raw_type);
  const Rows &from = v.matrix != nullptr ? v.original : v.rows;
  for (; rows != 0; rows &= rows - 1) {
    const int64_t token = first + __ffs(int(rows)) - 1, slot = call.exact_slots[token];
    uint8_t *tile = tile_at(v.exact, slot, head) + v.exact.codes_offset;
    const int64_t at = token * from.token_stride + head * from.head_stride;
    bool finite = true, clamped = false;
    for (int c = lane_index(); c < n; c += 32) {
      const float x = load_element(from.data, from.type, at + c);
      finite = finite && isfinite(x);
      clamped = clamped || fabsf(x) > limit;
    }
    finite = __all_sync(kAll, finite);
    clamped = __any_sync(kAll, clamped);
    for (int c = lane_index(); c < n; c += 32) {
      const float x = load_element(from.data, from.type, at + c);
      store_element(tile, v.side.raw_type, slot % kTileTokens * n + c,
                    !finite      ? 0.0f
                    : x < -limit ? -limit
                    : x > limit  ? limit
                                 : x);
    }
    if (lane_index() == token - first && outcome == kFine) {
      count_outcome(call.faults, !finite ? kNonFinite : clamped ? kClamped : kFine, call.first_token + token);
    }
  }
}

// Instead of a type: bf16 rows some of which this kernel writes again.
inline constexpr int kRewritten = -1;

// Where the chunks of a lane in rows g and g + 8 come from.
struct RowInput {
  const Rows &rows;
  const float *offset;  // of the lane's first channel
  int64_t at[2];        // of the first chunk
  uint32_t wanted;      // bits of rows; of the others kType 0 makes ones
  int exponent[2];      // values are times 2^-exponent

  // Chunk t of row g + 8 r as it is in memory; of f32 the second half is read with its values.
  template <int kType>
  __device__ __forceinline__ uint4 read(int r, int t) const {
    const auto *chunk = reinterpret_cast<const uint4 *>(address<kType>(r, t));
    return kType == kRewritten ? *chunk : __ldg(chunk);
  }
  // Its values. `kType`: 0 for everything, kRewritten the same, else rows of this type with neither offset nor exponent.
  template <int kType>
  __device__ __forceinline__ void unpack(int r, int t, const uint4 &raw, float *x) const {
    const int type = kType == 0 ? rows.type : kType == kRewritten ? TQ_TYPE_BF16 : kType;
    uint4 rest = raw;
    if (type == TQ_TYPE_F32) rest = __ldg(reinterpret_cast<const uint4 *>(address<kType>(r, t)) + 1);
    unpack_chunk(type, raw, rest, x);
    if constexpr (kType <= 0) {
      // Rounded twice only below what changes a sum of squares of about 1.
      const int half = -exponent[r] / 2;
      const float first = power_of_two(half), second = power_of_two(-exponent[r] - half);
      const bool wants = (wanted >> (lane_row() + 8 * r) & 1) != 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float from = offset != nullptr ? x[i] - offset[32 * t + i] : x[i];
        x[i] = wants ? from * first * second : 1.0f;
      }
    }
  }

  // Calls body(integral_constant) with the 16-bit type of the rows.
  template <class Body>
  __device__ __forceinline__ void with_type(Body &&body) const {
    if (rows.type == TQ_TYPE_BF16) {
      body(std::integral_constant<int, TQ_TYPE_BF16>());
    } else {
      body(std::integral_constant<int, TQ_TYPE_F16>());
    }
  }

 private:
  template <int kType>
  __device__ __forceinline__ const uint8_t *address(int r, int t) const {
    const int bytes = (kType == 0 ? rows.type : kType) == TQ_TYPE_F32 ? 4 : 2;
    return static_cast<const uint8_t *>(rows.data) + (at[r] + 32 * t) * bytes;
  }
  __device__ __forceinline__ static float power_of_two(int n) {
    return __uint_as_float(uint32_t(n + 127) << 23);
  }
};

// Of a group of tokens and a head.
__device__ __forceinline__ RowInput row_input(const VectorCall &call, const Rows &rows, uint32_t group, int head) {
  RowInput input{rows, nullptr, {0, 0}, 0, {0, 0}};
#pragma unroll
  for (int r = 0; r < 2; ++r) {  // the last row also for what there would be past it
    const int64_t row = min(int64_t{group} * kRows + lane_row() + 8 * r, call.tokens - 1);
    input.at[r] = row * rows.token_stride + head * rows.head_stride + 8 * lane_part();
  }
  return input;
}

// Of rows whose sum of squares says little: the exponent of the largest value where there is one.
struct Extremes {
  int exponent[2];
  uint32_t zero, not_finite;  // bits of rows; what is not finite is zero too
};
template <int kSteps>
__device__ __forceinline__ Extremes find_extremes(const RowInput &input) {
  Extremes found{};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t largest = 0;
    for (int t = 0; t < kSteps; ++t) {
      float x[8];
      input.unpack<0>(r, t, input.read<0>(r, t), x);
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffff);
    }
    largest = max(largest, __shfl_xor_sync(kAll, largest, 1));
    largest = max(largest, __shfl_xor_sync(kAll, largest, 2));
    const bool bad = largest >= 0x7f800000, nothing = largest == 0;
    found.not_finite |= uint32_t(bad) << (lane_row() + 8 * r);
    found.zero |= uint32_t(bad || nothing) << (lane_row() + 8 * r);
    found.exponent[r] = bad || nothing ? 0 : exponent_of(__uint_as_float(largest));
  }
  for (int lane = 4; lane < 32; lane *= 2) {
    found.zero |= __shfl_xor_sync(kAll, found.zero, lane);
    found.not_finite |= __shfl_xor_sync(kAll, found.not_finite, lane);
  }
  return found;
}

// The values of both rows. `kAny`: whatever the rows are, as kAnyType; else they have 16-bit types and no offset, and few
// enough channels stay in registers as they are in memory. Others are read again, from the L1 cache.
template <int kHeadDim, bool kAny, int kAnyType = 0>
struct RowValues {
  static constexpr int kSteps = kHeadDim / 32;
  static constexpr bool kKept = kHeadDim <= 128 && !kAny;
  uint4 raw[kKept ? 2 : 1][kKept ? kSteps : 1];

  __device__ __forceinline__ void load(const RowInput &input) {
    if constexpr (kKept) {
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        raw[i / kSteps][i % kSteps] = input.read<TQ_TYPE_BF16>(i / kSteps, i % kSteps);
      }
    }
  }

  // Calls body(r, t, x) with the values of all chunks. `kType`: as of RowInput, 0 also where the rows were scaled.
  template <int kType, class Body>
  __device__ __forceinline__ void for_each(const RowInput &input, Body &&body) {
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const int r = i / kSteps, t = i % kSteps;
      float x[8];
      if constexpr (kKept && kType != 0) {
        input.unpack<kType>(r, t, raw[r][t], x);
      } else {
        input.unpack<kType>(r, t, input.read<kType>(r, t), x);
      }
      body(r, t, x);
    }
  }

  // squared_norm() of both rows. A lane has the cells 8 q .. 8 q + 7.
  template <int kType>
  __device__ __forceinline__ void measure(const RowInput &input, float (&norm2)[2]) {
    float cell[2][8] = {};
    for_each<kType>(input, [&](int r, int, const float *x) {
#pragma unroll
      for (int i = 0; i < 8; ++i) cell[r][i] = __fmaf_rn(x[i], x[i], cell[r][i]);
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = ((cell[r][0] + cell[r][1]) + (cell[r][2] + cell[r][3])) +
                  ((cell[r][4] + cell[r][5]) + (cell[r][6] + cell[r][7]));
      sum = sum + __shfl_xor_sync(kAll, sum, 1);
      norm2[r] = sum + __shfl_xor_sync(kAll, sum, 2);
    }
  }
};

// sum + <Y, u> of 8 channels in units of kUnit, |u| in bytes `low` and `high`. Terms are positive: |Y| < 2^16 in the last
// bits of 2^23 + |Y|.
__device__ __forceinline__ uint32_t add_dot(const float (&y)[8], uint32_t low, uint32_t high, uint32_t sum) {
  uint32_t pair[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float a = __fmaf_rn(fabsf(y[2 * c]), 1 / kUnit, 0x1p23f);
    const float b = __fmaf_rn(fabsf(y[2 * c + 1]), 1 / kUnit, 0x1p23f);
    pair[c] = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x5410);
  }
  sum = __dp2a_hi(pair[1], low, __dp2a_lo(pair[0], low, sum));
  return __dp2a_hi(pair[3], high, __dp2a_lo(pair[2], high, sum));
}

// What turns coordinates into codes and sums.
template <int kHeadDim, bool kDot>
struct Chooser {
  float cells, begin;  // begin: the bits are the address of the cell of 0
  uint2 magnitudes;
  bool four_bits;
  uint32_t uu[2] = {}, dot[2] = {};

  // The word of 8 channels of row r, in units of kUnit.
  __device__ __forceinline__ uint32_t choose(const float (&y)[8], int r) {
    uint32_t entry[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) entry[c] = load_shared_byte(__float_as_uint(__fmaf_rz(y[c], cells, begin)));
    const uint32_t word = gather_codes(entry, four_bits), index3 = four_bits ? word & 0x77777777 : word;
    const uint32_t low = __byte_perm(magnitudes.x, magnitudes.y, index3);
    const uint32_t high = __byte_perm(magnitudes.x, magnitudes.y, index3 >> 16);
    uu[r] = __dp4a(high, high, __dp4a(low, low, uu[r]));
    if constexpr (kDot) dot[r] = add_dot(y, low, high, dot[r]);
    return word;
  }
  // Word `index` of row g + 8 r: channels 8 index .. 8 index + 7.
  __device__ __forceinline__ void choose(const float (&y)[8], int r, int index,
                                         typename EncodeShared<kHeadDim>::Warp &warp) {
    warp.nibbles[(lane_row() + 8 * r) * EncodeShared<kHeadDim>::kStride + index] = choose(y, r);
  }
};

// Codes of rotated rows. `x`: operands A of step 2 t + j, which has channels 4 j .. 4 j + 3 of the chunks 4 t + q.
template <int kHeadDim, bool kDot>
__device__ __forceinline__ void choose_rotated(const uint32_t (&x)[kHeadDim / 16][4], const uint4 *operands,
                                               Chooser<kHeadDim, kDot> &chooser,
                                               typename EncodeShared<kHeadDim>::Warp &warp) {
  constexpr int kSteps = kHeadDim / 32;
  // Output tile i has channels 2 i, 2 i + 1 of the chunks.
  const auto multiply = [&](float(&sum)[4], const uint32_t(&a)[4], const uint4 &operand, int i) {
    const uint32_t b[2] = {i % 2 == 0 ? operand.x : operand.z, i % 2 == 0 ? operand.y : operand.w};
    mma_m16n8k16(sum, a, b, sum);
  };
  if constexpr (is_power_of_two(kHeadDim)) {
    // The highest bit of the channel by addition, the others by products.
    constexpr int kHalves = kSteps > 2 ? 2 : 1, kHalfSteps = kSteps / kHalves;
    const uint4 positive = operands[lane_index()], negative = operands[32 + lane_index()];
#pragma unroll
    for (int t = 0; t < kHalfSteps; ++t) {
      float y[kHalves][4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          float(&sum)[4] = y[half][i];
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[k] = 0;
#pragma unroll
          for (int s = 0; s < 2 * kHalfSteps; ++s) {
            const bool minus = (std::popcount(unsigned(s / 2 & t)) + i / 2 * s) % 2 != 0;
            multiply(sum, x[half * 2 * kHalfSteps + s], minus ? negative : positive, i);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float v[8];
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            const float a = y[0][c / 2][2 * r + c % 2];
            if constexpr (kHalves == 1) {
              v[c] = a;
            } else {
              const float b = y[1][c / 2][2 * r + c % 2];
              v[c] = half == 0 ? a + b : a - b;
            }
          }
          chooser.choose(v, r, 4 * (half * kHalfSteps + t) + lane_part(), warp);
        }
      }
    }
  } else {
    // Bit 2 of the channel by addition.
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      float y[2][2][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const uint4 operand = operands[(kSteps * t + s) * 32 + lane_index()];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) multiply(y[j][i], x[2 * s + j], operand, i);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float v[8];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float a = y[0][c / 2][2 * r + c % 2], b = y[1][c / 2][2 * r + c % 2];
          v[c] = a + b;
          v[4 + c] = a - b;
        }
        chooser.choose(v, r, 4 * t + lane_part(), warp);
      }
    }
  }
}

template <class T>
__device__ __forceinline__ T sum_of_four(T x) {
  x += __shfl_xor_sync(kAll, x, 1);
  return x + __shfl_xor_sync(kAll, x, 2);
}

// Codes and sums of rows to the warp's memory; next() when their values are not needed any more.
template <int kHeadDim, bool kRotated, bool kDot, bool kAny, int kAnyType, class Next>
__device__ __forceinline__ void choose_codes(const SideParams &side, const RowInput &input,
                                             RowValues<kHeadDim, kAny, kAnyType> &values, const float (&gain)[2],
                                             Next &&next) {
  auto &shared = EncodeShared<kHeadDim>::get();
  auto &warp = EncodeShared<kHeadDim>::warp();
  const uint32_t cell_of_0 = shared_address(shared.table) + uint32_t(side.half_cells);
  Chooser<kHeadDim, kDot> chooser{side.cells * kPerBit, __uint_as_float(cell_of_0), shared.magnitudes, side.bits == 4};
  const auto for_each = [&](auto &&body) {
    if constexpr (kAny) {
      values.template for_each<kAnyType>(input, body);
    } else {
      input.with_type([&](auto type) { values.template for_each<type>(input, body); });
    }
  };
  if constexpr (kRotated) {
    uint32_t x[kHeadDim / 16][4];
    for_each([&](int r, int t, const float *y) {
      const uint4 flips = shared.signs[4 * t + lane_part()];
      x[2 * t][r] = pack_f16(y[0] * gain[r], y[1] * gain[r]) ^ flips.x;
      x[2 * t][r + 2] = pack_f16(y[2] * gain[r], y[3] * gain[r]) ^ flips.y;
      x[2 * t + 1][r] = pack_f16(y[4] * gain[r], y[5] * gain[r]) ^ flips.z;
      x[2 * t + 1][r + 2] = pack_f16(y[6] * gain[r], y[7] * gain[r]) ^ flips.w;
    });
    constexpr bool kEarly = encode_blocks(kHeadDim) < 4;  // where there are registers for it
    if constexpr (kEarly) next();
    choose_rotated(x, shared.operands, chooser, warp);
    if constexpr (!kEarly) next();
  } else {
    for_each([&](int r, int t, const float *y) {
      constexpr float kBias = kRoundingBias * kUnit;
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = (y[i] * gain[r] + kBias) - kBias;
      chooser.choose(v, r, 4 * t + lane_part(), warp);
    });
    next();
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t uu = sum_of_four(chooser.uu[r]);
    const uint64_t dot = kDot ? sum_of_four(uint64_t{chooser.dot[r]}) : 0;
    if (lane_part() == 0) {
      warp.uu[lane_row() + 8 * r] = uu;
      warp.dot[lane_row() + 8 * r] = int64_t(dot);
    }
  }
}

// The factor of both rows, of which even lanes work out row g's and odd ones row g + 8's; the norm to `warp`.
template <class Warp>
__device__ __forceinline__ void find_gains(float unit, const float (&norm2)[2], Warp &warp, float (&gain)[2]) {
  const bool odd = lane_index() % 2 != 0;
  const float norm = sqrtf(odd ? norm2[1] : norm2[0]), own = unit / norm, other = __shfl_xor_sync(kAll, own, 1);
  gain[0] = odd ? other : own;
  gain[1] = odd ? own : other;
  if (lane_part() < 2) warp.norm[lane_row() + 8 * lane_part()] = norm;
}

// Where the lane's row goes, to `warp`; which rows go anywhere.
template <int kHeadDim>
__device__ __forceinline__ uint32_t find_places(const VectorCall &call, const VectorSide &v, int64_t own_token,
                                                int64_t slot, int head, typename EncodeShared<kHeadDim>::Warp &warp) {
  const int lane = current_lane();
  const SideParams &side = v.side;
  // A 1-bit plane is the second, also where it is the only one.
  const int plane1_bytes = side.bits == 1 || side.bits == 3 ? kHeadDim / 8 : 0;
  const int plane0_bytes = record_bytes(kHeadDim, side.bits) - plane1_bytes;
  const bool coded = slot != -1;
  if (coded) {
    uint8_t *plane0, *plane1, *scale;
    if (call.slots == nullptr) {
      plane0 = v.flat.codes + own_token * v.flat.codes_stride;
      plane1 = plane0 + plane0_bytes;
      scale = v.flat.scales + own_token * v.flat.scales_stride;
    } else {
      uint8_t *tile = tile_at(v.tiles, slot, head);
      const int row = int(slot) % kTileTokens;
      plane0 = tile + v.tiles.codes_offset + (side.is_v ? 0 : row * plane0_bytes);
      plane1 = tile + v.tiles.codes_offset + kTileTokens * plane0_bytes + (side.is_v ? 0 : row * plane1_bytes);
      scale = tile + v.tiles.scales_offset + row * scale_bytes(side);
    }
    if (lane < kRows) {
      warp.plane0[lane] = uint64_t(plane0);
      warp.plane1[lane] = uint64_t(plane1);
      warp.scale[lane] = uint64_t(scale);
    }
  }
  if (call.slots != nullptr && side.is_v) {  // groups of four rows that are one of a tile
    const int64_t four = slot - lane % 4, first_four = __shfl_sync(kAll, four, lane & ~3);
    uint32_t quads = __ballot_sync(kAll, coded && (four & 3) == 0 && four == first_four);
    quads &= quads >> 1;
    quads &= quads >> 2;
    if (lane == 0) warp.quads = quads & 0x1111;
    if (lane < kRows) warp.row[lane] = int(slot & (kTileTokens - 1));
  }
  return __ballot_sync(kAll, coded) & 0xffff;
}

template <int kHeadDim, int kBits>
__device__ __forceinline__ void write_codes_of(const VectorCall &call, const VectorSide &v,
                                               const typename EncodeShared<kHeadDim>::Warp &warp, uint32_t coded) {
  if (call.slots != nullptr && v.side.is_v) {
    write_v_rows<kHeadDim, kBits>(warp, coded);
  } else {
    write_rows<kHeadDim, kBits>(warp, coded, call.slots != nullptr || v.flat.alignment == 16);
  }
}

template <int kHeadDim>
__device__ __forceinline__ void write_codes(const VectorCall &call, const VectorSide &v,
                                            const typename EncodeShared<kHeadDim>::Warp &warp, uint32_t coded) {
  if (v.side.bits == 4) write_codes_of<kHeadDim, 4>(call, v, warp, coded);
  if (v.side.bits == 3) write_codes_of<kHeadDim, 3>(call, v, warp, coded);
  if (v.side.bits == 2) write_codes_of<kHeadDim, 2>(call, v, warp, coded);
  if (v.side.bits == 1) write_codes_of<kHeadDim, 1>(call, v, warp, coded);
}

// Rows that were rotated in bf16, which did them no good: their originals times 2^-exponent, rotated in f32 instead.
template <int kHeadDim>
__device__ __noinline__ void rotate_again(const VectorSide &v, uint32_t group, int head, uint32_t rows,
                                          const int32_t *exponents) {
  for (; rows != 0; rows &= rows - 1) {
    const int row = __ffs(int(rows)) - 1;
    const int64_t token = int64_t{group} * kRows + row;
    const int64_t from = token * v.original.token_stride + head * v.original.head_stride;
    const int64_t to = token * v.rows.token_stride + head * v.rows.head_stride;
    for (int c = lane_index(); c < kHeadDim; c += 32) {
      float sum = 0;
      for (int j = 0; j < kHeadDim; ++j) {
        const float x = load_element(v.original.data, v.original.type, from + j);
        sum = __fmaf_rn(v.matrix[c * kHeadDim + j], times_power_of_two(x, -exponents[row]), sum);
      }
      store_element(v.rows.data, v.rows.type, to + c, sum);
    }
  }
}

// One item, whatever its rows are. `kDense`: rows that were rotated before.
template <int kHeadDim, bool kRotated, bool kDense = false>
__device__ __noinline__ void encode_any(const VectorCall &call, const VectorSide &v, uint32_t group, int head) {
  auto &warp = EncodeShared<kHeadDim>::warp();
  const SideParams &side = v.side;
  const int64_t first = int64_t{group} * kRows, own_token = first + lane_index() % kRows;
  Slots slots;
  if (own_token < call.tokens) {
    slots.coded = own_token;
    if (call.slots != nullptr) slots = read_slots(call, v, own_token);
    if (slots.bad) {
      if (lane_index() < kRows && head == 0 && v.counts_slots) {
        count_fault(call.faults, TQ_FAULT_SLOT, call.first_token + own_token);
      }
      slots.coded = slots.exact = -1;
    }
  }
  const uint32_t coded = find_places<kHeadDim>(call, v, own_token, slots.coded, head, warp);
  const uint32_t exact = __ballot_sync(kAll, slots.exact != -1) & 0xffff;
  int outcome = kFine;
  if (coded != 0) {
    RowInput input = row_input(call, v.rows, group, head);
    if (v.offset != nullptr) input.offset = v.offset + head * kHeadDim + 8 * lane_part();
    input.wanted = coded;
    constexpr int kType = kDense ? kRewritten : 0;
    RowValues<kHeadDim, true, kType> values;
    float norm2[2];
    values.template measure<kType>(input, norm2);
    const auto is_usual = [&](int r) { return norm2[r] >= kMinSquaredNorm && norm2[r] <= kMaxSquaredNorm; };
    Extremes found{};
    int exponent[2] = {0, 0};
    if (!__all_sync(kAll, is_usual(0) && is_usual(1))) {
      // Scaled where that is needed: by 2^0 the others come out the same.
      if constexpr (kDense) {
        RowInput original = row_input(call, v.original, group, head);
        original.wanted = coded;
        found = find_extremes<kHeadDim / 32>(original);
      } else {
        found = find_extremes<kHeadDim / 32>(input);
      }
      input.wanted = coded & ~found.zero;
      exponent[0] = is_usual(0) ? 0 : found.exponent[0];
      exponent[1] = is_usual(1) ? 0 : found.exponent[1];
      if constexpr (kDense) {
        if (lane_part() == 0) {
          warp.exponent[lane_row()] = exponent[0];
          warp.exponent[lane_row() + 8] = exponent[1];
        }
        uint32_t unusual = 0;
        for (int r = 0; r < 2; ++r) {
          const uint32_t rows = __ballot_sync(kAll, !is_usual(r));
          for (int row = 0; row < 8; ++row) unusual |= (rows >> (4 * row) & 1) << (row + 8 * r);
        }
        __syncwarp();
        rotate_again<kHeadDim>(v, group, head, unusual & input.wanted, warp.exponent);
        __syncwarp();
      } else {
        input.exponent[0] = exponent[0];
        input.exponent[1] = exponent[1];
      }
      values.template measure<kType>(input, norm2);
    }
    float gain[2];
    find_gains(side.steps * (kRotated ? 0x1p-24f : kUnit), norm2, warp, gain);
    if (lane_part() == 0) {
      warp.exponent[lane_row()] = exponent[0];
      warp.exponent[lane_row() + 8] = exponent[1];
    }
    choose_codes<kHeadDim, kRotated, true>(side, input, values, gain, [] {});
    __syncwarp();
    // What is stored of zeros and of what is not finite: all codes zero.
    for (uint32_t rows = found.zero & coded; rows != 0; rows &= rows - 1) {
      uint32_t *row = warp.nibbles + (__ffs(int(rows)) - 1) * EncodeShared<kHeadDim>::kStride;
      for (int i = lane_index(); i < kHeadDim / 8; i += 32) row[i] = 0;
    }
    __syncwarp();
    const int row = lane_index() % kRows;
    if (lane_index() < kRows && (coded >> row & 1) != 0) {
      float value = choose_scale(side.scale_rule, warp.norm[row], warp.dot[row], int(warp.uu[row]), side.scale_gain);
      if (warp.exponent[row] != 0) value = times_power_of_two(value, warp.exponent[row]);
      if ((found.zero >> row & 1) != 0) value = 0;
      const int stored = store_scale(value, side.scale_type, reinterpret_cast<uint8_t *>(warp.scale[row]));
      outcome = (found.not_finite >> row & 1) != 0 ? int(kNonFinite) : stored;
      count_outcome(call.faults, outcome, call.first_token + own_token);
    }
    write_codes<kHeadDim>(call, v, warp, coded);
  }
  if (exact != 0) store_exact(call, v, exact, first, head, outcome);
  __syncwarp();
}

template <int kHeadDim, bool kRotated>
__device__ __forceinline__ void encode_unusual(const VectorCall &call, const VectorSide &v, uint32_t group, int head) {
  if constexpr (kRotated) {
    encode_any<kHeadDim, true>(call, v, group, head);
  } else if (v.matrix != nullptr) {
    encode_any<kHeadDim, false, true>(call, v, group, head);
  } else {
    encode_any<kHeadDim, false>(call, v, group, head);
  }
}

// What was put off, and all items that are left.
template <int kHeadDim, bool kRotated>
__device__ __noinline__ void encode_put_off(const VectorCall &call) {
  const VectorSide &v = call.side[blockIdx.y];
  __syncwarp();
  const auto &warp = EncodeShared<kHeadDim>::warp();
  for (int i = 0; i < warp.num_put_off; ++i) {
    encode_unusual<kHeadDim, kRotated>(call, v, warp.put_off[i].x, int(warp.put_off[i].y));
  }
  ItemStep step(call, int(blockDim.x) / 32);
  step.group = warp.rest.x;
  step.head = warp.rest.y;
  for (; step.left(); step.advance()) {
    encode_unusual<kHeadDim, kRotated>(call, v, step.group, int(step.head));
  }
}

// Rows of 16-bit types without offset, with one round or none; what is unusual among them goes to encode_any.
template <int kHeadDim, bool kRotated>
__device__ __forceinline__ void encode_rows(const VectorCall &call, const VectorSide &v) {
  auto &warp = EncodeShared<kHeadDim>::warp();
  const SideParams &side = v.side;
  ItemStep step(call, kEncodeWarps);
  RowValues<kHeadDim, false> values;
  NextSlots next_slots;
  const auto read = [&] {                   // before it is needed, and where nothing is left for nothing
    if (!kRotated && !step.left()) return;  // the rows of others may change
    values.load(row_input(call, v.rows, step.group, int(step.head)));
    next_slots.read(step);
  };
  read();
  if (lane_index() == 0) warp.num_put_off = 0;
  __syncthreads();  // the tables
  while (step.left()) {
    const uint32_t group = step.group;
    const int head = int(step.head);
    const int64_t own_token = int64_t{group} * kRows + lane_index() % kRows;
    Slots slots;
    if (own_token < call.tokens) {
      slots.coded = own_token;
      if (call.slots != nullptr) slots = check_slots(v, next_slots.coded, next_slots.exact);
    }
    const auto next = [&] {
      step.advance();
      read();
    };
    const RowInput input = row_input(call, v.rows, group, head);
    float norm2[2];
    input.with_type([&](auto type) { values.template measure<type>(input, norm2); });
    const auto is_usual = [&](int r) { return norm2[r] >= kMinSquaredNorm && norm2[r] <= kMaxSquaredNorm; };
    if (!__all_sync(kAll, is_usual(0) && is_usual(1) && !slots.bad && slots.exact == -1)) {
      const int n = warp.num_put_off;
      if (n == kPutOff) break;
      __syncwarp();
      if (lane_index() == 0) {
        warp.put_off[n] = make_uint2(group, uint32_t(head));
        warp.num_put_off = n + 1;
      }
      __syncwarp();
      next();
      continue;
    }
    const uint32_t coded = find_places<kHeadDim>(call, v, own_token, slots.coded, head, warp);
    float gain[2];
    find_gains(side.steps * (kRotated ? 0x1p-24f : kUnit), norm2, warp, gain);
    if (side.scale_rule == TQ_SCALE_NORM) {
      choose_codes<kHeadDim, kRotated, false>(side, input, values, gain, next);
    } else {
      choose_codes<kHeadDim, kRotated, true>(side, input, values, gain, next);
    }
    __syncwarp();
    const int row = lane_index() % kRows;
    if (lane_index() < kRows && (coded >> row & 1) != 0) {
      const float value =
          choose_scale(side.scale_rule, warp.norm[row], warp.dot[row], int(warp.uu[row]), side.scale_gain);
      const int outcome = store_scale(value, side.scale_type, reinterpret_cast<uint8_t *>(warp.scale[row]));
      count_outcome(call.faults, outcome, call.first_token + int64_t{group} * kRows + row);
    }
    write_codes<kHeadDim>(call, v, warp, coded);
    __syncwarp();
  }
  if (lane_index() == 0) warp.rest = make_uint2(step.group, step.head);
  encode_put_off<kHeadDim, kRotated>(call);
}

}  // namespace tqkv::cuda
