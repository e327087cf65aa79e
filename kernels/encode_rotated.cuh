// SPDX-License-Identifier: Apache-2.0
// Encode and store of rows of 16-bit types after one Hadamard round: a warpgroup's tensor cores rotate four items at a
// time, signs included. At head_dim 128, 4 bits and bf16 a vector moves 256 + 66 bytes; an H200 has about 19 issue slots
// an element in that time.
//
// Lane 4 g + q has rows 2 g and 2 g + 1. Of each it reads the chunks of 8 channels 4 t + q, and gets rotated channels
// that follow each other: kChunks chunks of each part of kPart channels, from kChunks q on. So its codes are whole words
// of a record, or nearly.
#pragma once

#include "kernels/device/operands.cuh"
#include "kernels/encode_any.cuh"

namespace tqkv::cuda {

template <int kHeadDim>
struct Rotated {
  static constexpr int kSteps = kHeadDim / 32;
  static constexpr int kPart = EncodeShared<kHeadDim>::kPart, kParts = kHeadDim / kPart, kChunks = kPart / 32;
  static constexpr int kWarps = rotated_warps(kHeadDim);
  static constexpr bool kDots = kHeadDim <= 128;  // whether there are registers for <Y, u> of any rule and bits
  // Of every plane, at least between two lanes.
  static constexpr bool whole_words(int bits) { return is_power_of_two(kHeadDim) || bits == 4; }
  using Matrix = SharedMatrix<kHeadDim, kPart>;
  // Codes of row 2 g + r: chunk by chunk in nibbles, at 4 bits as they are stored; at 2 bits two chunks a word of a record.
  template <int kBits>
  static constexpr int kWords = kBits == 2 ? (kChunks + 1) / 2 : kChunks;
  template <int kBits>
  using Words = uint32_t[kParts][2][kWords<kBits>];
};

__device__ __forceinline__ uint32_t parity(uint32_t x) {
  return uint32_t(__popc(x)) & 1;
}

// Signs of channels 32 t + 2 i + 8 q and the next one, bits 15 and 31 of word q of element 4 t + i.
template <int kHeadDim>
__device__ inline void fill_row_signs(const SideParams &side, uint32_t *signs) {
  for (int i = int(threadIdx.x); i < kHeadDim / 2; i += int(blockDim.x)) {
    const uint32_t pair = side.signs[0][i / 16] >> (i / 4 % 4 * 2 + i % 4 * 8);
    signs[i] = (pair & 1) << 15 | (pair & 2) << 30;
  }
}

// The rotation as SharedMatrix. Column 8 (4 t + i) + 2 q + b is rotated channel 2 i + b of chunk kChunks q + t; row
// 16 (2 t + j) + 8 h + 2 q + i is channel 4 j + 2 h + i of chunk 4 t + q. `signs`: fill_row_signs().
template <int kHeadDim>
__device__ inline void fill_matrix(const SideParams &side, const uint4 *signs, uint4 *matrix) {
  using R = Rotated<kHeadDim>;
  constexpr int kAtOnce = 32 * R::kWarps / R::kPart;
  const int column = int(threadIdx.x) % R::kPart, first = int(threadIdx.x) / R::kPart;
  if (first >= kAtOnce) return;
  const int tile = column / 8, chunk = R::kChunks * (column % 8 / 2) + tile / 4;
  const int channel = 8 * chunk + tile % 4 * 2 + column % 2;
  const uint32_t one = kOperandOne ^ (channel % 2 != 0 ? 0x80000000 : 0);
  constexpr uint32_t kMinus = 0x80008000;
  uint32_t words[4];  // of chunks q
  uint32_t negative = 0;
  if constexpr (is_power_of_two(kHeadDim)) {
#pragma unroll
    for (int q = 0; q < 4; ++q) words[q] = one ^ parity(channel & (8 * q)) * kMinus;
  } else {
    negative = uint32_t(side.base_rows[chunk]);
  }
#pragma unroll 2
  for (int eight = first; eight < kHeadDim / 8; eight += kAtOnce) {
    const int from = 32 * (eight / 4) + eight % 4 * 2;  // the channel of the first row
    const uint4 flips = signs[eight];
    const uint32_t flip[4] = {flips.x, flips.y, flips.z, flips.w};
    uint32_t word[4];
    if constexpr (is_power_of_two(kHeadDim)) {
      const uint32_t minus = parity(channel & from) * kMinus;
#pragma unroll
      for (int q = 0; q < 4; ++q) word[q] = words[q] ^ minus ^ flip[q];
    } else {
      const uint32_t minus = one ^ parity(channel & from & 7) * kMinus;
#pragma unroll
      for (int q = 0; q < 4; ++q) word[q] = (negative >> (from / 8 + q) & 1) * kMinus ^ minus ^ flip[q];
    }
    R::Matrix::at(matrix, eight, column) = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// Where an item is; per_head: divide()'s reciprocal of the number of heads.
struct ItemPlace {
  uint32_t group, head;

  ItemPlace() = default;

  __device__ __forceinline__ ItemPlace(uint32_t item, uint32_t heads, uint32_t per_head) {
    group = __umulhi(item, per_head);
    head = item - group * heads;
    if (head >= heads) {
      head -= heads;
      ++group;
    }
  }
};

// The lane's two rows as they are in memory.
template <int kHeadDim>
struct PairOfRows {
  static constexpr int kSteps = kHeadDim / 32;
  uint4 raw[2][kSteps];
  const uint16_t *second;  // the lane's first chunk of row 2 g + 1

  // Finds both rows and reads the first of them. Of what there would be past the last row they are the last.
  __device__ __forceinline__ void load_first(const Rows &rows, uint32_t item, const ItemPlace &place) {
    const auto &warp = EncodeShared<kHeadDim>::warp();
    const int lane = current_lane();
    uint64_t first;
    if (item < warp.whole) [[likely]] {
      first = warp.rows_from[lane] + place.group * warp.group_stride + place.head * warp.head_stride;
      second = reinterpret_cast<const uint16_t *>(first + warp.token_stride);
    } else {
      keep_branch();
      const int64_t last = warp.tokens - 1, token = min(int64_t{place.group} * kRows + lane / 4 * 2, last);
      first = reinterpret_cast<uint64_t>(static_cast<const uint16_t *>(rows.data) + token * rows.token_stride +
                                         int64_t{place.head} * rows.head_stride + 8 * (lane % 4));
      second = reinterpret_cast<const uint16_t *>(first) + (token < last ? rows.token_stride : 0);
    }
    load(reinterpret_cast<const uint16_t *>(first), 0);
  }
  __device__ __forceinline__ void load_second() { load(second, 1); }
  template <int kType>
  __device__ __forceinline__ void unpack(int r, int t, float (&x)[8]) const {
    unpack_chunk(kType, raw[r][t], raw[r][t], x);
  }

 private:
  __device__ __forceinline__ void load(const uint16_t *from, int r) {
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      const auto *chunk = reinterpret_cast<const uint4 *>(from + 32 * t);
      if constexpr (kHeadDim <= 128) raw[r][t] = load_once(chunk);
      if constexpr (kHeadDim > 128) raw[r][t] = __ldg(chunk);  // registers are short: these may be late
    }
  }
};

// Exact operands A of both rows, as Rotated's matrix wants them; of unusual rows zeros. Of the lane's row 2 g + q % 2 the
// norm; whether all rows are usual.
template <int kHeadDim>
__device__ __forceinline__ bool quantise(const PairOfRows<kHeadDim> &rows, int type, float unit,
                                         uint32_t (&a)[kHeadDim / 16][4], float &norm) {
  constexpr int kSteps = kHeadDim / 32;
  constexpr bool kKept = kHeadDim <= 128;  // the values, in registers; else what they are made of
  float kept[kKept ? 2 : 1][kKept ? kSteps : 1][8], sum[2];
  if constexpr (kKept) {  // nothing else is said twice: the loop has to fit the instruction cache
    const auto unpack = [&](auto kType) {
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i)
        rows.template unpack<kType>(i / kSteps, i % kSteps, kept[i / kSteps][i % kSteps]);
    };
    if (type == TQ_TYPE_BF16) {
      unpack(std::integral_constant<int, TQ_TYPE_BF16>());
    } else {
      unpack(std::integral_constant<int, TQ_TYPE_F16>());
    }
  }
  const auto value = [&](int r, int t, float(&x)[8]) {
    if constexpr (kKept) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = kept[r][t][i];
    } else if (type == TQ_TYPE_BF16) {
      rows.template unpack<TQ_TYPE_BF16>(r, t, x);
    } else {
      rows.template unpack<TQ_TYPE_F16>(r, t, x);
    }
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float cell[8];
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      float x[8];
      value(r, t, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) cell[i] = t == 0 ? x[i] * x[i] : __fmaf_rn(x[i], x[i], cell[i]);
    }
    sum[r] = ((cell[0] + cell[1]) + (cell[2] + cell[3])) + ((cell[4] + cell[5]) + (cell[6] + cell[7]));
  }
  const bool odd = lane_index() % 2 != 0;
  float norm2 = (odd ? sum[1] : sum[0]) + __shfl_xor_sync(kAll, odd ? sum[0] : sum[1], 1);
  norm2 = norm2 + __shfl_xor_sync(kAll, norm2, 2);
  const bool usual = __all_sync(kAll, norm2 >= kMinSquaredNorm && norm2 <= kMaxSquaredNorm) != 0;
  norm = root_usual(norm2);
  const float own = divide_usual(unit, norm), other = __shfl_xor_sync(kAll, own, 1);
  const float gain[2] = {odd ? other : own, odd ? own : other};
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x[8];
      value(r, t, x);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        a[2 * t + j][r] = pack_f16(x[4 * j] * gain[r], x[4 * j + 1] * gain[r]);
        a[2 * t + j][r + 2] = pack_f16(x[4 * j + 2] * gain[r], x[4 * j + 3] * gain[r]);
      }
    }
  }
  if (!usual) {
    keep_branch();
#pragma unroll
    for (int s = 0; s < kHeadDim / 16; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[s][i] = 0;
    }
  }
  return usual;
}

// What turns rotated coordinates into codes and sums, of rows 2 g + r. At 2 bits there is no table: a code is a number of
// `cells`, all of which are a threshold wide, and `begin` is 2.
template <int kHeadDim, int kBits, bool kDot>
struct PairChooser {
  float cells, begin;
  uint2 magnitudes;
  Chooser<kHeadDim, kDot> any;  // for kBits 0
  uint32_t sum[2] = {}, dot[2] = {};

  __device__ __forceinline__ PairChooser(const typename EncodeShared<kHeadDim>::Warp &warp, bool four_bits)
      : cells(warp.cells),
        begin(warp.cell_of_0),
        magnitudes(warp.magnitudes),
        any{cells, begin, magnitudes, four_bits} {}

  __device__ __forceinline__ int32_t cell(float y) const { return __float_as_int(__fmaf_rz(y, cells, begin)); }
  __device__ __forceinline__ int32_t entry(float y) const { return int32_t(load_shared_byte(uint32_t(cell(y)))); }

  // The word of a chunk.
  __device__ __forceinline__ uint32_t choose(const float (&y)[8], int r) {
    if constexpr (kBits == 0) {
      return any.choose(y, r);
    } else {
      uint32_t codes = 0, word;
#pragma unroll
      for (int c = 6; c >= 0; c -= 2) {
        codes = kBits == 4 ? pack_u4(entry(fabsf(y[c + 1])), entry(fabsf(y[c])), codes)
                           : pack_u4(entry(y[c + 1]), entry(y[c]), codes);
      }
      if constexpr (kBits == 4) {
        // Byte j has the signs of channel j above and of channel 4 + j below.
        uint32_t signs = 0;
#pragma unroll
        for (int j = 3; j >= 0; --j) signs = pack_s4(__float_as_int(y[j]), __float_as_int(y[4 + j]), signs);
        word = codes | (signs & 0x88888888);
      } else {
        word = codes;
      }
      const uint32_t low = permute(magnitudes.x, magnitudes.y, codes);
      const uint32_t high = permute(magnitudes.x, magnitudes.y, codes >> 16);
      sum[r] = __dp4a(high, high, __dp4a(low, low, sum[r]));
      return word;
    }
  }
  // At 2 bits, of two chunks; or of one and nothing.
  template <bool kTwo>
  __device__ __forceinline__ uint32_t choose_two(const float (&y0)[8], const float (&y1)[8], int r) {
    uint32_t word = 0;
#pragma unroll
    for (int c = 7; c >= 0; --c) word = pack_u2(kTwo ? cell(y1[c]) : 0, cell(y0[c]), word);
    sum[r] += uint32_t(__popc((word ^ word >> 1) & 0x55555555));  // of the smaller magnitude
    if constexpr (kDot) {
      add_own_dot(y0, word & 0x33333333, r);
      if constexpr (kTwo) add_own_dot(y1, word >> 2 & 0x33333333, r);
    }
    return word;
  }

  // Something of all sums <Y, u>.
  __device__ __forceinline__ uint32_t dots() const {
    if constexpr (!kDot) return 0;
    return kBits == 0 ? any.dot[0] ^ any.dot[1] : dot[0] ^ dot[1];
  }
  // |u|^2 from the sums of all lanes.
  __device__ __forceinline__ int squares(uint32_t sum_of_all) const {
    if constexpr (kBits != 2) return int(sum_of_all);
    const uint32_t large = magnitudes.x & 0xff, small = magnitudes.x >> 8 & 0xff;
    return int(kHeadDim * large * large - sum_of_all * (large * large - small * small));
  }

 private:
  // <Y, u>, as Chooser.
  __device__ __forceinline__ void add_own_dot(const float (&y)[8], uint32_t index, int r) {
    dot[r] = add_dot(y, permute(magnitudes.x, magnitudes.y, index), permute(magnitudes.x, magnitudes.y, index >> 16),
                     dot[r]);
  }
};

// The factor of 2 bits: the least f32 above 1 / threshold, in cells of a unit, so that thresholds are at the codes' own
// edges: |Y| times it is 1 or more from the threshold on, and less before; just above, so that -threshold is beyond.
__device__ inline float cells_of_two_bits(const SideParams &side) {
  const float threshold = float(side.thresholds[0]), inverse = 1 / threshold;
  return __fmaf_rn(threshold, inverse, -1.0f) > 0 ? inverse : __uint_as_float(__float_as_uint(inverse) + 1);
}

// Codes of what a product left of a part: words from kFirst chunks on.
template <int kHeadDim, int kBits, int kFirst, bool kDot, int kCount, int kWords>
__device__ __forceinline__ void choose_columns(const float (&sum)[kCount], PairChooser<kHeadDim, kBits, kDot> &chooser,
                                               uint32_t (&word)[2][kWords]) {
  constexpr int kChunks = kCount / 16, kStep = kBits == 2 ? 2 : 1;
#pragma unroll
  for (int t = 0; t < kChunks; t += kStep) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float y[kStep][8];
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
#pragma unroll
        for (int c = 0; c < 8; ++c)
          y[i][c] = t + i < kChunks ? sum[16 * (t + i) % kCount + c / 2 * 4 + 2 * r + c % 2] : 0;
      }
      if constexpr (kBits == 2) {
        word[r][(kFirst + t) / 2] = kChunks == 1 ? chooser.template choose_two<false>(y[0], y[1], r)
                                                 : chooser.template choose_two<true>(y[0], y[1], r);
      } else {
        word[r][kFirst + t] = chooser.choose(y[0], r);
      }
    }
  }
}

// The rotation of a pair of rows, and their codes. next(): A is in use from now on, what it was made of is not. later():
// there are registers again.
template <int kHeadDim, int kBits, bool kDot, class Next, class Later>
__device__ __forceinline__ void choose_pair(uint32_t (&a)[kHeadDim / 16][4],
                                            PairChooser<kHeadDim, kBits, kDot> &chooser,
                                            typename Rotated<kHeadDim>::template Words<kBits> &words, Next &&next,
                                            Later &&later) {
  using R = Rotated<kHeadDim>;
  using Matrix = typename R::Matrix;
  const Matrix matrix(EncodeShared<kHeadDim>::get().matrix);
  // One product at a time where there are no registers for the sums of two: other warps have something to do meanwhile.
  // The compiler would put off the codes of the first, so an operand of the second depends on them.
  const auto multiply = [&](auto part, auto first, auto count) {
    constexpr bool kLast = part == R::kParts - 1 && first + count == R::kPart;
    float sum[count / 2];
    Matrix::begin();
    matrix.template multiply<first, count / 2, part == 0 ? kHeadDim : R::kPart>(sum, a);
    if constexpr (part == 0 && first == 0) next();
    Matrix::template wait<0>(sum);
    if constexpr (kLast) later();
    choose_columns<kHeadDim, kBits, first / 32>(sum, chooser, words[part]);
    if constexpr (!kLast) {
      constexpr int kFirst = first / (kBits == 2 ? 64 : 32), kEnd = kFirst + (kBits == 2 ? 1 : count / 32);
      uint32_t all = chooser.dots();
#pragma unroll
      for (int i = kFirst; i < kEnd; ++i) all = all ^ words[part][0][i] ^ words[part][1][i];
      a[0][0] |= all & EncodeShared<kHeadDim>::warp().zero;
    }
  };
  const auto multiply_part = [&](auto part) {
    constexpr int kCount = R::kPart < 64 ? R::kPart : 64;
    multiply(part, std::integral_constant<int, 0>(), std::integral_constant<int, kCount>());
    if constexpr (R::kPart > kCount) {
      multiply(part, std::integral_constant<int, kCount>(), std::integral_constant<int, R::kPart - kCount>());
    }
  };
  multiply_part(std::integral_constant<int, 0>());
  if constexpr (R::kParts == 2) multiply_part(std::integral_constant<int, 1>());
}

// ---- where codes go

// Where a lane's words are: of its rows 2 g and 2 g + 1, or, in V's tiles, of their group of four rows.
struct PairPlaces {
  uint8_t *plane0, *plane1, *scale;  // scale: of row 2 g + q % 2
  int64_t next0, next1;              // to the second row
};

// Of a lane's words of the first part in a tile, from its codes on.
template <int kHeadDim>
struct PairOffsets {
  using R = Rotated<kHeadDim>;
  int32_t plane0, plane1, scale;

  __device__ static int plane0_bytes(int bits) { return bits == 1 ? 0 : plane_bytes(kHeadDim, bits, 0); }
  __device__ static int plane1_bytes(int bits) { return plane_bytes(kHeadDim, bits == 1 ? 3 : bits, 1); }
  __device__ static int words(int bits) { return bits == 4 ? R::kChunks : R::kChunks / 2; }

  __device__ __forceinline__ static int index0(int bits, int lane) { return words(bits) * (lane % 4); }
  __device__ __forceinline__ static int index1(int lane) { return R::kChunks == 4 ? lane % 4 : lane % 4 / 2; }

  __device__ PairOffsets(const VectorSide &v, int lane) {
    const SideParams &side = v.side;
    const int row = lane / 4 * 2, four = 16 * (row / 4);
    plane0 =
        side.is_v ? four + 64 * index0(side.bits, lane) : row * plane0_bytes(side.bits) + 4 * index0(side.bits, lane);
    plane1 = kTileTokens * plane0_bytes(side.bits) +
             (side.is_v ? four + 64 * index1(lane) : row * plane1_bytes(side.bits) + 4 * index1(lane));
    scale = int32_t(v.tiles.scales_offset - v.tiles.codes_offset) + (row + lane % 2) * scale_bytes(side);
  }
};

// Of an item without slots all of whose tokens there are, `token` the lane's first.
template <int kHeadDim, int kBits>
__device__ __forceinline__ PairPlaces find_records(const VectorSide &v, int64_t token, int lane) {
  using Offsets = PairOffsets<kHeadDim>;
  PairPlaces p;
  p.next0 = p.next1 = v.flat.codes_stride;
  p.plane0 = v.flat.codes + token * p.next0;
  p.plane1 = p.plane0 + (Offsets::plane0_bytes(kBits) + 4 * Offsets::index1(lane));
  p.plane0 += 4 * Offsets::index0(kBits, lane);
  p.scale = v.flat.scales + (token + lane % 2) * v.flat.scales_stride;
  return p;
}

// Of an item whose rows are a whole tile.
template <int kHeadDim, int kBits>
__device__ __forceinline__ PairPlaces find_tile(const typename EncodeShared<kHeadDim>::Warp &warp, uint32_t tile,
                                                uint32_t head, int lane) {
  using Offsets = PairOffsets<kHeadDim>;
  uint8_t *codes = warp.tiles.at(tile, head);
  PairPlaces p;
  p.plane0 = codes + warp.plane0_at[lane];
  p.plane1 = codes + warp.plane1_at[lane];
  p.scale = codes + warp.scale_at[lane];
  p.next0 = Offsets::plane0_bytes(kBits);
  p.next1 = Offsets::plane1_bytes(kBits);
  return p;
}

// Words of a plane from codes.
template <int kBits, int kCount, int kWords>
__device__ __forceinline__ void plane0_words(const uint32_t (&codes)[kCount], uint32_t (&word)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    word[i] = kBits == 3 ? (codes[2 * i] & 0x33333333) | (codes[2 * i + 1] << 2 & 0xcccccccc) : codes[i];
  }
}

// Of all four chunks of a word, or of two, whose other two the neighbour has.
template <int kBits, int kCount>
__device__ __forceinline__ uint32_t plane1_word(const uint32_t (&nibbles)[kCount], int lane) {
  constexpr int kFrom = kBits - 1;  // 2 or 0
  static_assert(kFrom == 2 || kFrom == 0);
  const auto bit = [](uint32_t x, int to) {
    return (to < kFrom ? x >> (kFrom - to) : x << (to - kFrom)) & (0x11111111u << to);
  };
  if constexpr (kCount == 4) {
    return (bit(nibbles[0], 2) | bit(nibbles[1], 1)) | (bit(nibbles[2], 3) | bit(nibbles[3], 0));
  } else {
    static_assert(kCount == 2);
    const bool odd = lane % 2 != 0;
    const uint32_t own = odd ? bit(nibbles[0], 3) | bit(nibbles[1], 0) : bit(nibbles[0], 2) | bit(nibbles[1], 1);
    return own | __shfl_xor_sync(kAll, own, 1);
  }
}

// A lane's neighbouring words of a row; `at` is their place.
template <int kWords>
__device__ __forceinline__ void write_row_words(uint8_t *at, const uint32_t *word) {
  if constexpr (kWords % 2 != 0) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint32_t *>(at)[i] = word[i];
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2 *>(at) = make_uint2(word[0], word[1]);
  } else {
    static_assert(kWords == 4);
    *reinterpret_cast<uint4 *>(at) = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// The same of V: a word's bytes are those of four rows, the next word is 64 bytes on. Of four rows two lanes have two
// each, and trade halves.
template <int kWords>
__device__ __forceinline__ void write_v_words(uint8_t *at, const uint32_t *word0, const uint32_t *word1, bool wanted,
                                              int lane) {
  const bool upper = (lane & 4) != 0;
  uint32_t low[kWords], high[kWords];  // bytes of both rows in turn
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    low[i] = __byte_perm(word0[i], word1[i], 0x5140);
    high[i] = __byte_perm(word0[i], word1[i], 0x7362);
  }
  const uint32_t first = upper ? 0x1054 : 0x5410, second = upper ? 0x3276 : 0x7632;
  const auto trade = [&](uint32_t mine_if_lower, uint32_t mine_if_upper, uint32_t &a, uint32_t &b) {
    const uint32_t mine = upper ? mine_if_upper : mine_if_lower;
    const uint32_t other = __shfl_xor_sync(kAll, upper ? mine_if_lower : mine_if_upper, 4);
    a = __byte_perm(mine, other, first);
    b = __byte_perm(mine, other, second);
  };
#pragma unroll
  for (int i = 0; i < kWords / 2; ++i) {
    uint4 whole;
    trade(low[i], low[i + kWords / 2], whole.x, whole.y);
    trade(high[i], high[i + kWords / 2], whole.z, whole.w);
    if (wanted) *reinterpret_cast<uint4 *>(at + 64 * i + (upper ? 64 * (kWords / 2) : 0)) = whole;
  }
  if constexpr (kWords % 2 != 0) {  // halves of the last
    constexpr int kLast = kWords - 1;
    uint2 half;
    trade(low[kLast], high[kLast], half.x, half.y);
    if (wanted) *reinterpret_cast<uint2 *>(at + 64 * kLast + (upper ? 8 : 0)) = half;
  }
}

template <int kHeadDim, int kBits>
__device__ __forceinline__ void write_pair(const typename Rotated<kHeadDim>::template Words<kBits> &words,
                                           const PairPlaces &p, bool in_tile_of_v, int lane) {
  using R = Rotated<kHeadDim>;
  constexpr int kPlane0 = kBits == 4 ? R::kChunks : kBits >= 2 ? R::kChunks / 2 : 0;  // words of a lane and part
#pragma unroll
  for (int part = 0; part < R::kParts; ++part) {
    if constexpr (kPlane0 > 0) {
      uint32_t word[2][kPlane0];
#pragma unroll
      for (int r = 0; r < 2; ++r) plane0_words<kBits>(words[part][r], word[r]);
      constexpr int kWords = 4 * kPlane0;  // of a part
      if (in_tile_of_v) {
        write_v_words<kPlane0>(p.plane0 + 64 * kWords * part, word[0], word[1], true, lane);
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) write_row_words<kPlane0>(p.plane0 + r * p.next0 + 4 * kWords * part, word[r]);
      }
    }
    if constexpr (kBits == 3 || kBits == 1) {
      const uint32_t word[2] = {plane1_word<kBits>(words[part][0], lane), plane1_word<kBits>(words[part][1], lane)};
      const bool wanted = R::kChunks == 4 || lane % 2 == 0;
      if (in_tile_of_v) {
        write_v_words<1>(p.plane1 + 64 * 4 * part, &word[0], &word[1], wanted, lane);
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (wanted) write_row_words<1>(p.plane1 + r * p.next1 + 4 * 4 * part, &word[r]);
        }
      }
    }
  }
}

// ---- the loop

inline constexpr uint32_t kBeyond = 0x80000000;  // more items than there are
inline constexpr uint32_t kNoTile = UINT32_MAX;

// Of usual rows.
struct UsualArithmetic {
  __device__ static float divide(float a, float b) { return divide_usual(a, b); }
  __device__ static float root(float x) { return root_usual(x); }
};

// kBits: 0 for any up to 4; kPaged: there are slots. All warps of a block go round as often as the first, so that they can
// multiply together. What is seldom done leaves the inner loop, which so fits the instruction cache.
template <int kHeadDim, int kBits, bool kDot, bool kPaged>
__device__ __forceinline__ void encode_pairs(const VectorCall &call, const VectorSide &v) {
  using R = Rotated<kHeadDim>;
  auto &warp = EncodeShared<kHeadDim>::warp();
  const SideParams &side = v.side;

  constexpr bool kEarly = kHeadDim <= 128 && !kDot;  // where there are registers for rows that are under way
  constexpr bool kDirect = kBits != 0 && R::whole_words(kBits);  // whole words go straight to where they belong
  const uint32_t items = uint32_t((call.tokens + kRows - 1) / kRows) * uint32_t(call.heads);
  const uint32_t stride = gridDim.x * rotated_warps(kHeadDim);
  if (lane_index() == 0) {
    warp.num_put_off = 0;
    warp.rest = make_uint2(uint32_t((call.tokens + kRows - 1) / kRows), 0);
  }
  __syncwarp();
  // Little is kept from one item to the next: there are no registers for it.
  const auto place_of = [&](uint32_t item) { return ItemPlace(item, uint32_t(call.heads), warp.per_head); };
  PairOfRows<kHeadDim> rows;
  const auto begin_slots = [&](uint32_t item, const ItemPlace &place) {
    if constexpr (kPaged) {
      const int lane = current_lane();
      const uint64_t from = warp.slots_from[lane];
      __syncwarp();  // all have read what this overwrites
      if (item < warp.whole && from != 0) {
        copy_to_shared(shared_address(warp.slots) + 8 * lane,
                       reinterpret_cast<const void *>(from + uint64_t{place.group} * (8 * kRows)));
      }
    }
  };
  uint32_t item = blockIdx.x + threadIdx.x / 32 * gridDim.x;
  int rounds = int((items - blockIdx.x + stride - 1) / stride);
  if (rounds > 0) {
    const ItemPlace first = place_of(item);
    rows.load_first(v.rows, item, first);
    rows.load_second();
    begin_slots(item, first);
  }
  while (rounds > 0) {
    typename R::template Words<kBits> words{};
    uint32_t current = item;
    ItemPlace place{};
    float norm = 0;
    int uu = 0, outcome = kFine;
    uint64_t dot = 0;
    int64_t slot = -1, exact_slot = -1;
    bool usual = false, written = false;
    const auto write_scale = [&](uint8_t *to) {
      outcome = store_scale(choose_scale<UsualArithmetic>(kDot ? side.scale_rule : TQ_SCALE_NORM, norm, int64_t(dot),
                                                          uu, side.scale_gain),
                            side.scale_type, to);
    };
    const auto write_by_memory = [&](int lane) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        const int part = i / (2 * R::kChunks), r = i / R::kChunks % 2, t = i % R::kChunks;
        const int index = part * (R::kPart / 8) + R::kChunks * (lane % 4) + t;
        const uint32_t word = words[part][r][kBits == 2 ? t / 2 : t];
        warp.nibbles[(lane / 4 * 2 + r) * EncodeShared<kHeadDim>::kStride + index] =
            kBits != 2 ? word : (t % 2 == 0 ? word : word >> 2) & 0x33333333;
      }
      const int row = lane / 4 * 2 + lane % 2;
      const int64_t own_token = int64_t{place.group} * kRows + lane % kRows;
      const int64_t own_slot = own_token >= warp.tokens ? -1 : kPaged ? slot : own_token;
      const uint32_t coded = find_places<kHeadDim>(call, v, own_token, own_slot, int(place.head), warp);
      __syncwarp();
      if (lane % 4 < 2 && (coded >> row & 1) != 0) write_scale(reinterpret_cast<uint8_t *>(warp.scale[row]));
      if constexpr (kBits != 0) {
        write_codes_of<kHeadDim, kBits>(call, v, warp, coded);
      } else {
        write_codes<kHeadDim>(call, v, warp, coded);
      }
      __syncwarp();
    };
#pragma unroll 1
    do {
      copies_wait();
      uint32_t first_tile = kNoTile;  // of an item whose rows are a whole tile
      slot = exact_slot = -1;
      if constexpr (kPaged) {
        __syncwarp();
        const int lane = current_lane();
        if constexpr (kDirect) {
          const int64_t own = warp.slots[lane], first = warp.slots[0];
          const bool follows = __all_sync(kAll, own == (lane < kRows ? first + lane : -1)) != 0;
          // A slot within a tile, or a negative one, is a tile that there is not.
          const uint64_t tile = uint64_t(first) >> 4 | uint64_t(first) << 60;
          if (follows && item < warp.whole && tile < warp.tiles.count) first_tile = uint32_t(tile);
        } else if (item < warp.whole) {
          slot = warp.slots[lane % kRows];
          exact_slot = warp.slots[kRows + lane % kRows];
        }
      }
      uint32_t a[kHeadDim / 16][4];
      usual = quantise<kHeadDim>(rows, v.rows.type, warp.unit, a, norm);
      PairChooser<kHeadDim, kBits, kDot> chooser(warp, kBits == 0 ? side.bits == 4 : kBits == 4);
      current = item;
      const auto next = [&] {
        const uint32_t after = current + warp.stride;
        const ItemPlace where = place_of(after);
        if constexpr (kEarly) rows.load_first(v.rows, after, where);
        begin_slots(after, where);
      };
      const auto later = [&] {
        const uint32_t after = current + warp.stride;
        if constexpr (!kEarly) rows.load_first(v.rows, after, place_of(after));
        rows.load_second();
      };
      choose_pair<kHeadDim, kBits, kDot>(a, chooser, words, next, later);
      item = current + warp.stride;
      --rounds;
      const bool odd = current_lane() % 2 != 0;
      // Both sums of the lane's row 2 g + q % 2.
      const auto own_sum = [&](auto x0, auto x1) {
        auto sum = (odd ? x1 : x0) + __shfl_xor_sync(kAll, odd ? x0 : x1, 1);
        return sum + __shfl_xor_sync(kAll, sum, 2);
      };
      dot = 0;
      if constexpr (kBits == 0) {
        uu = int(own_sum(chooser.any.uu[0], chooser.any.uu[1]));
        if constexpr (kDot) dot = own_sum(uint64_t{chooser.any.dot[0]}, uint64_t{chooser.any.dot[1]});
      } else {
        uu = chooser.squares(own_sum(chooser.sum[0], chooser.sum[1]));
        if constexpr (kDot) dot = own_sum(uint64_t{chooser.dot[0]}, uint64_t{chooser.dot[1]});
      }

      written = false;
      const int lane = current_lane();
      place = place_of(current);
      if constexpr (!kDirect) {
        if constexpr (kPaged) usual = usual && exact_slot == -1 && !check_slots(v, slot, -1).bad;
        if (!__all_sync(kAll, usual && current < warp.whole)) break;
      } else if constexpr (kPaged) {
        if (!usual || first_tile == kNoTile) break;
      } else {
        if (!usual || current >= warp.whole || v.flat.alignment != 16) break;
      }
      written = true;
      if constexpr (kDirect) {
        const PairPlaces places =
            kPaged ? find_tile<kHeadDim, kBits>(warp, first_tile, place.head, lane)
                   : find_records<kHeadDim, kBits>(v, int64_t{place.group} * kRows + lane / 4 * 2, lane);
        if (lane % 4 < 2) write_scale(places.scale);
        write_pair<kHeadDim, kBits>(words, places, kPaged && side.is_v, lane);
      } else {
        write_by_memory(lane);
      }
    } while (!__any_sync(kAll, outcome != kFine) && rounds > 0);

    const int lane = current_lane();
    place = place_of(current);
    const auto count = [&] {
      if (outcome == kFine) return;
      count_outcome(call.faults, outcome, call.first_token + int64_t{place.group} * kRows + (lane / 4 * 2 + lane % 2));
    };
    if (written) {
      count();
      continue;
    }
    if (current >= items) continue;
    if constexpr (kPaged) {
      slot = exact_slot = -1;
      const int64_t own_token = int64_t{place.group} * kRows + lane % kRows;
      if (own_token < warp.tokens) {
        slot = call.slots[own_token];
        if (call.exact_slots != nullptr) exact_slot = call.exact_slots[own_token];
      }
    }
    if constexpr (kPaged) usual = usual && exact_slot == -1 && !check_slots(v, slot, -1).bad;
    if (__all_sync(kAll, usual)) {
      write_by_memory(lane);
      count();
      continue;
    }
    const int n = warp.num_put_off;
    __syncwarp();
    if (lane == 0) {
      if (n == kPutOff) {
        warp.rest = make_uint2(place.group, place.head);
      } else {
        warp.put_off[n] = make_uint2(place.group, place.head);
        warp.num_put_off = n + 1;
      }
    }
    if (n == kPutOff) item = kBeyond;
    __syncwarp();
  }
  copies_wait();  // of the item after the last
}

// Sides whose scales are made of norms, which have loops of their own.
__host__ __device__ inline bool is_norms(const SideParams &side) {
  return side.scale_rule == TQ_SCALE_NORM && side.bits >= 2;
}

// Of the others, V's default at 2 bits.
__host__ __device__ inline bool is_two_bits(const SideParams &side) {
  return side.scale_rule == TQ_SCALE_LEAST_MSE && side.bits == 2;
}

// Products by mma take more registers.
template <int kHeadDim, bool kPaged>
__global__ void __launch_bounds__(32 * rotated_warps(kHeadDim), kHasWgmma ? rotated_blocks(kHeadDim) : 1)
    encode_rotated_kernel(const __grid_constant__ VectorCall call) {
  const VectorSide &v = call.side[blockIdx.y];
  const SideParams &side = v.side;
  auto &shared = EncodeShared<kHeadDim>::get();
  grid_dependency_launch();
  fill_row_signs<kHeadDim>(side, reinterpret_cast<uint32_t *>(shared.signs));
  const bool norms = is_norms(side), table = !(is_two_bits(side) || (norms && side.bits == 2));
  const Entry entry = !norms ? Entry::kTwice : side.bits == 4 ? Entry::kMagnitude : Entry::kCode;
  if (table) fill_table(side, shared.table, entry);
  auto &warp = EncodeShared<kHeadDim>::warp();
  if (lane_index() == 0) {
    warp.stride = gridDim.x * rotated_warps(kHeadDim);
    warp.per_head = UINT32_MAX / uint32_t(call.heads);
    warp.zero = 0;
    warp.unit = side.steps * 0x1p-24f;
    warp.cells = (table ? side.cells : cells_of_two_bits(side)) * kPerBit;
    const uint32_t below = entry == Entry::kMagnitude ? 0 : uint32_t(side.half_cells);
    warp.cell_of_0 = __uint_as_float(table ? shared_address(shared.table) + below : 2);
    warp.magnitudes = magnitude_bytes(side);
    warp.tokens = call.tokens;
    warp.whole = uint32_t(call.tokens / kRows) * uint32_t(call.heads);
    warp.group_stride = v.rows.token_stride * (2 * kRows);
    warp.head_stride = v.rows.head_stride * 2;
    warp.token_stride = v.rows.token_stride * 2;
    if constexpr (kPaged) warp.tiles = WholeTiles(v.tiles);
  }
  warp.rows_from[lane_index()] = reinterpret_cast<uint64_t>(
      static_cast<const uint16_t *>(v.rows.data) + lane_index() / 4 * 2 * v.rows.token_stride + 8 * (lane_index() % 4));
  if constexpr (kPaged) {
    const PairOffsets<kHeadDim> offsets(v, lane_index());
    warp.plane0_at[lane_index()] = offsets.plane0;
    warp.plane1_at[lane_index()] = offsets.plane1;
    warp.scale_at[lane_index()] = offsets.scale;
    warp.slots[lane_index()] = -1;
    const int64_t *slots = lane_index() < kRows ? call.slots : call.exact_slots;
    warp.slots_from[lane_index()] = slots != nullptr ? reinterpret_cast<uint64_t>(slots + lane_index() % kRows) : 0;
  }
  if (threadIdx.x == 0) shared.magnitudes = magnitude_bytes(side);
  __syncthreads();
  fill_matrix<kHeadDim>(side, shared.signs, shared.matrix);
  Rotated<kHeadDim>::Matrix::written();
  __syncthreads();
  grid_dependency_wait();
  if (!norms) {
    if (is_two_bits(side)) {
      encode_pairs<kHeadDim, 2, true, kPaged>(call, v);
    } else if constexpr (Rotated<kHeadDim>::kDots) {
      encode_pairs<kHeadDim, 0, true, kPaged>(call, v);
    }
  } else if (side.bits == 4) {
    encode_pairs<kHeadDim, 4, false, kPaged>(call, v);
  } else if (side.bits == 3) {
    encode_pairs<kHeadDim, 3, false, kPaged>(call, v);
  } else {
    encode_pairs<kHeadDim, 2, false, kPaged>(call, v);
  }
  // What was put off needs other tables.
  if (__syncthreads_or(EncodeShared<kHeadDim>::warp().num_put_off) == 0) return;
  fill_signs<kHeadDim>(side, reinterpret_cast<uint32_t *>(shared.signs));
  fill_operands<kHeadDim>(side, kOperandOne, shared.operands);
  fill_table(side, shared.table);
  __syncthreads();
  encode_put_off<kHeadDim, true>(call);
}

}  // namespace tqkv::cuda
