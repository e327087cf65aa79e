// SPDX-License-Identifier: Apache-2.0
// Encode and store of rows of 16-bit types after one Hadamard round: a warpgroup's tensor cores rotate four items at a
// time, signs included. At head_dim 128, 4 bits and bf16 a vector moves 256 + 66 bytes; an H200 has about 19 issue slots
// an element in that time.
//
// Lane 4 g + q has rows 2 g and 2 g + 1. Of each it reads the chunks of 8 channels 4 t + q, and gets rotated channels
// that follow each other: kChunks chunks of each part of kPart channels, from kChunks q on. So its codes are whole words
// of a record, or nearly.
#pragma once

#include "kernels/encode_any.cuh"

namespace tqkv::cuda {

template <int kHeadDim>
struct Rotated {
  static constexpr int kSteps = kHeadDim / 32;
  static constexpr int kPart = EncodeShared<kHeadDim>::kPart, kParts = kHeadDim / kPart, kChunks = kPart / 32;
  static constexpr bool kDots = kHeadDim <= 128;                  // whether there are registers for <Y, u>
  static constexpr bool kWholeWords = is_power_of_two(kHeadDim);  // of every plane, at least between two lanes
  using Matrix = SharedMatrix<kHeadDim, kPart>;
  using Words =
      uint32_t[kParts][2][kChunks];  // codes of row 2 g + r, nibble by nibble, or at 4 bits as they are stored
};

__device__ __forceinline__ uint32_t parity(uint32_t x) {
  return uint32_t(__popc(x)) & 1;
}

// The rotation as SharedMatrix. Column 8 (4 t + i) + 2 q + b is rotated channel 2 i + b of chunk kChunks q + t; row
// 16 (2 t + j) + 8 h + 2 q + i is channel 4 j + 2 h + i of chunk 4 t + q.
template <int kHeadDim>
__device__ inline void fill_matrix(const SideParams &side, uint4 *matrix) {
  using R = Rotated<kHeadDim>;
  constexpr int kThreads = 32 * kEncodeWarps, kAtOnce = R::kPart < kThreads ? kThreads / R::kPart : 1;
  const int column = int(threadIdx.x) % R::kPart, first = int(threadIdx.x) / R::kPart;
  if (first >= kAtOnce) return;
  const int tile = column / 8, chunk = R::kChunks * (column % 8 / 2) + tile / 4;
  const int channel = 8 * chunk + tile % 4 * 2 + column % 2;
  const uint32_t one = kOperandOne ^ (channel % 2 != 0 ? 0x80000000 : 0);
#pragma unroll 2
  for (int eight = first; eight < kHeadDim / 8; eight += kAtOnce) {
    const int from = 32 * (eight / 4) + eight % 4 * 2;  // the channel of the first row
    const uint32_t pairs = side.signs[0][eight / 4] >> (eight % 4 * 2);
    uint32_t word[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      bool negative;
      if constexpr (is_power_of_two(kHeadDim)) {
        negative = (parity(channel & from) ^ parity(channel & (8 * q))) != 0;
      } else {
        negative = is_negative<kHeadDim>(side, chunk, from / 8 + q) != (parity(channel & from & 7) != 0);
      }
      const uint32_t signs = pairs >> (8 * q);
      word[q] = one ^ (negative ? 0x80008000 : 0) ^ (signs & 1) << 15 ^ (signs & 2) << 30;
    }
    R::Matrix::at(matrix, eight, column) = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// The lane's two rows as they are in memory.
template <int kHeadDim>
struct PairOfRows {
  static constexpr int kSteps = kHeadDim / 32;
  uint4 raw[2][kSteps];

  // Row 2 g + r.
  __device__ __forceinline__ void load(const VectorCall &call, const Rows &rows, const ItemStep &step, int r) {
    const uint16_t *from = row(call, rows, step, r) + 8 * (current_lane() % 4);
#pragma unroll
    for (int t = 0; t < kSteps; ++t) raw[r][t] = __ldg(reinterpret_cast<const uint4 *>(from + 32 * t));
  }
  // Both rows into the L2 cache.
  __device__ __forceinline__ static void prefetch(const VectorCall &call, const Rows &rows, const ItemStep &step) {
    for (int r = 0; r < 2; ++r) prefetch_l2(row(call, rows, step, r) + kHeadDim / 4 * (current_lane() % 4));
  }
  template <int kType>
  __device__ __forceinline__ void unpack(int r, int t, float (&x)[8]) const {
    unpack_chunk(kType, raw[r][t], raw[r][t], x);
  }

 private:
  __device__ __forceinline__ static const uint16_t *row(const VectorCall &call, const Rows &rows, const ItemStep &step,
                                                        int r) {
    // The last row also for what there would be past it.
    const int64_t token = min(int64_t{step.group} * kRows + current_lane() / 4 * 2 + r, call.tokens - 1);
    return static_cast<const uint16_t *>(rows.data) + token * rows.token_stride + int64_t{step.head} * rows.head_stride;
  }
};

// Exact operands A of both rows, as Rotated's matrix wants them; of unusual rows zeros. Of the lane's row 2 g + q % 2 the
// norm; whether all rows are usual.
template <int kHeadDim, int kType>
__device__ __forceinline__ bool quantise(const PairOfRows<kHeadDim> &rows, float unit, uint32_t (&a)[kHeadDim / 16][4],
                                         float &norm) {
  constexpr int kSteps = kHeadDim / 32;
  constexpr bool kKept = kHeadDim <= 128;  // the values, in registers; else what they are made of
  float kept[kKept ? 2 : 1][kKept ? kSteps : 1][8], sum[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float cell[8];
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      float x[8];
      rows.template unpack<kType>(r, t, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if constexpr (kKept) kept[r][t][i] = x[i];
        cell[i] = t == 0 ? x[i] * x[i] : __fmaf_rn(x[i], x[i], cell[i]);
      }
    }
    sum[r] = ((cell[0] + cell[1]) + (cell[2] + cell[3])) + ((cell[4] + cell[5]) + (cell[6] + cell[7]));
  }
  const bool odd = lane_index() % 2 != 0;
  float norm2 = (odd ? sum[1] : sum[0]) + __shfl_xor_sync(kAll, odd ? sum[0] : sum[1], 1);
  norm2 = norm2 + __shfl_xor_sync(kAll, norm2, 2);
  const bool usual = __all_sync(kAll, norm2 >= kMinSquaredNorm && norm2 <= kMaxSquaredNorm) != 0;
  norm = sqrtf(norm2);
  const float own = unit / norm, other = __shfl_xor_sync(kAll, own, 1);
  const float gain[2] = {odd ? other : own, odd ? own : other};
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x[8];
      if constexpr (kKept) {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = kept[r][t][i];
      } else {
        rows.template unpack<kType>(r, t, x);
      }
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

// Codes of what a product left of a part: chunks from kFirstChunk on.
template <int kHeadDim, bool kDot, int kCount>
__device__ __forceinline__ void choose_columns(const float (&sum)[kCount], Chooser<kHeadDim, kDot> &chooser,
                                               uint32_t (&word)[2][Rotated<kHeadDim>::kChunks], int first_chunk) {
#pragma unroll
  for (int t = 0; t < kCount / 16; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float y[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) y[c] = sum[16 * t + c / 2 * 4 + 2 * r + c % 2];
      word[r][first_chunk + t] = chooser.choose(y, r);
    }
  }
}

// The rotation of a pair of rows, and their codes. next(): A is in use still, but what it was made of is not. later():
// there are registers again.
template <int kHeadDim, bool kDot, class Next, class Later>
__device__ __forceinline__ void choose_pair(const typename Rotated<kHeadDim>::Matrix &matrix,
                                            const uint32_t (&a)[kHeadDim / 16][4], Chooser<kHeadDim, kDot> &chooser,
                                            typename Rotated<kHeadDim>::Words &words, Next &&next, Later &&later) {
  using R = Rotated<kHeadDim>;
  using Matrix = typename R::Matrix;
  if constexpr (R::kPart == 64) {
    float sum[32];
    Matrix::begin();
    matrix.template multiply<0>(sum, a);
    next();
    later();
    Matrix::template wait<0>(sum);
    choose_columns(sum, chooser, words[0], 0);
  } else {
    constexpr bool kBoth = R::kParts == 1;  // where there are registers for two sums at a time
    constexpr int kRest = (R::kPart - 64) / 2;
#pragma unroll
    for (int part = 0; part < R::kParts; ++part) {
      const bool last = part == R::kParts - 1;
      float first[32], second[kRest];
      const auto multiply_second = [&] {
        if (part == 0) {
          matrix.template multiply<64>(second, a);
        } else {
          matrix.template multiply<64, kRest, R::kPart>(second, a);
        }
      };
      Matrix::begin();
      if (part == 0) {
        matrix.template multiply<0>(first, a);
      } else {
        matrix.template multiply<0, 32, R::kPart>(first, a);
      }
      if (kBoth) multiply_second();
      if (last) next();
      Matrix::template wait<kBoth ? 1 : 0>(first);
      choose_columns(first, chooser, words[part], 0);
      if (!kBoth) {
        Matrix::begin();
        multiply_second();
      }
      if (kBoth) later();
      Matrix::template wait<0>(second);
      if (last && !kBoth) later();
      choose_columns(second, chooser, words[part], 2);
    }
  }
}

// ---- where codes go

// Of the lane's two rows: where their records are, or, of a whole tile of V, their group of four rows.
struct PairPlaces {
  uint8_t *plane0, *plane1;
  int64_t next0, next1;  // to the second row
  uint8_t *scale;        // of row 2 g + q % 2
  bool coded[2], wide;   // wide: 16-byte aligned
};

// Of an item without slots, or of one whose rows are the whole tile that begins at `slot`.
template <int kHeadDim, int kBits, bool kPaged>
__device__ __forceinline__ PairPlaces find_pair(const VectorCall &call, const VectorSide &v, int64_t token, int head,
                                                int64_t slot, int lane) {
  const SideParams &side = v.side;
  const int plane1_bytes = plane_bytes(kHeadDim, kBits == 1 ? 3 : kBits, 1);
  const int plane0_bytes = kBits == 1 ? 0 : plane_bytes(kHeadDim, kBits, 0);
  const int second = lane % 2;
  PairPlaces p;
  if constexpr (!kPaged) {
    p.coded[0] = token < call.tokens;
    p.coded[1] = token + 1 < call.tokens;
    p.wide = v.flat.alignment == 16;
    p.plane0 = v.flat.codes + token * v.flat.codes_stride;
    p.plane1 = p.plane0 + plane0_bytes;
    p.next0 = p.next1 = v.flat.codes_stride;
    p.scale = v.flat.scales + (token + second) * v.flat.scales_stride;
  } else {
    p.coded[0] = p.coded[1] = p.wide = true;
    uint8_t *tile = tile_at(v.tiles, slot, head);
    const int row = lane / 4 * 2;
    p.plane0 = tile + v.tiles.codes_offset + (side.is_v ? 16 * (row / 4) : row * plane0_bytes);
    p.plane1 =
        tile + v.tiles.codes_offset + kTileTokens * plane0_bytes + (side.is_v ? 16 * (row / 4) : row * plane1_bytes);
    p.next0 = plane0_bytes;
    p.next1 = plane1_bytes;
    p.scale = tile + v.tiles.scales_offset + (row + second) * scale_bytes(side);
  }
  return p;
}

// Words of a plane from codes.
template <int kBits, int kCount>
__device__ __forceinline__ void plane0_words(const uint32_t (&nibbles)[kCount], uint32_t *word) {
  if constexpr (kBits == 4) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) word[i] = nibbles[i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      word[i] = (nibbles[2 * i] & 0x33333333) | (nibbles[2 * i + 1] << 2 & 0xcccccccc);
    }
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
__device__ __forceinline__ void write_row_words(uint8_t *at, const uint32_t *word, bool wide) {
  auto *to = reinterpret_cast<uint32_t *>(at);
  if (kWords == 1 || !wide) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) to[i] = word[i];
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2 *>(at) = make_uint2(word[0], word[1]);
  } else {
    static_assert(kWords == 4 || kWords == 1);
    *reinterpret_cast<uint4 *>(at) = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// The same of V: word i of a plane is at 64 i, its bytes those of four rows. Of four rows two lanes have two each, and
// trade halves.
template <int kWords>
__device__ __forceinline__ void write_v_words(uint8_t *plane, int index, const uint32_t *word0, const uint32_t *word1,
                                              bool wanted, int lane) {
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
  if constexpr (kWords == 1) {
    uint2 half;
    trade(low[0], high[0], half.x, half.y);
    if (wanted) *reinterpret_cast<uint2 *>(plane + 64 * index + (upper ? 8 : 0)) = half;
  } else {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      uint4 whole;
      trade(low[i], low[i + kWords / 2], whole.x, whole.y);
      trade(high[i], high[i + kWords / 2], whole.z, whole.w);
      if (wanted) *reinterpret_cast<uint4 *>(plane + 64 * (index + i + (upper ? kWords / 2 : 0))) = whole;
    }
  }
}

template <int kHeadDim, int kBits, bool kPaged>
__device__ __forceinline__ void write_pair(const VectorSide &v, const typename Rotated<kHeadDim>::Words &words,
                                           const PairPlaces &p, int lane) {
  using R = Rotated<kHeadDim>;
  constexpr int kPlane0 = kBits == 4 ? R::kChunks : kBits >= 2 ? R::kChunks / 2 : 0;  // words of a lane and part
  const bool in_tile_of_v = kPaged && v.side.is_v;
#pragma unroll
  for (int part = 0; part < R::kParts; ++part) {
    if constexpr (kPlane0 > 0) {
      uint32_t word[2][kPlane0];
#pragma unroll
      for (int r = 0; r < 2; ++r) plane0_words<kBits>(words[part][r], word[r]);
      const int index = kPlane0 * (4 * part + lane % 4);
      if (in_tile_of_v) {
        write_v_words<kPlane0>(p.plane0, index, word[0], word[1], true, lane);
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (p.coded[r]) write_row_words<kPlane0>(p.plane0 + r * p.next0 + 4 * index, word[r], p.wide);
        }
      }
    }
    if constexpr (kBits == 3 || kBits == 1) {
      const uint32_t word[2] = {plane1_word<kBits>(words[part][0], lane), plane1_word<kBits>(words[part][1], lane)};
      const bool wanted = R::kChunks == 4 || lane % 2 == 0;
      const int index = R::kChunks == 4 ? 4 * part + lane % 4 : lane % 4 / 2;
      if (in_tile_of_v) {
        write_v_words<1>(p.plane1, index, &word[0], &word[1], wanted, lane);
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (p.coded[r] && wanted) write_row_words<1>(p.plane1 + r * p.next1 + 4 * index, &word[r], p.wide);
        }
      }
    }
  }
}

// ---- the loop

inline constexpr uint32_t kBeyond = 0x80000000;  // more groups than there are

// kBits: 0 for any up to 4; kPaged: there are slots. All warps of a block go round as often as the first, so that they can multiply together.
template <int kHeadDim, int kBits, bool kDot, bool kPaged>
__device__ __forceinline__ void encode_pairs(const VectorCall &call, const VectorSide &v) {
  using R = Rotated<kHeadDim>;
  auto &shared = EncodeShared<kHeadDim>::get();
  auto &warp = EncodeShared<kHeadDim>::warp();
  const SideParams &side = v.side;
  const typename R::Matrix matrix(shared.matrix);
  const bool odd = lane_index() % 2 != 0;

  constexpr bool kEarly = kHeadDim <= 128;  // where there are registers for rows that are under way
  ItemStep step(call, kEncodeWarps);
  const uint32_t items = uint32_t((call.tokens + kRows - 1) / kRows) * uint32_t(call.heads);
  const uint32_t stride = gridDim.x * kEncodeWarps;
  PairOfRows<kHeadDim> rows;
  rows.load(call, v.rows, step, 0);
  rows.load(call, v.rows, step, 1);
  if (lane_index() == 0) {
    warp.num_put_off = 0;
    warp.rest = make_uint2(uint32_t((call.tokens + kRows - 1) / kRows), 0);
  }
  __syncwarp();
#pragma unroll 1
  for (uint32_t first_item = blockIdx.x; first_item < items; first_item += stride) {
    const uint32_t group = step.group;
    const int head = int(step.head);
    const bool left = step.left();
    uint32_t a[kHeadDim / 16][4];
    float norm;
    bool usual;
    if (v.rows.type == TQ_TYPE_BF16) {
      usual = quantise<kHeadDim, TQ_TYPE_BF16>(rows, shared.unit, a, norm);
    } else {
      usual = quantise<kHeadDim, TQ_TYPE_F16>(rows, shared.unit, a, norm);
    }
    Chooser<kHeadDim, kDot> chooser{shared.cells, shared.cell_of_0, shared.magnitudes,
                                    kBits == 0 ? side.bits == 4 : kBits == 4};
    typename R::Words words;
    const int64_t own_token = int64_t{group} * kRows + lane_index() % kRows;
    int64_t slot = -1;
    const auto read_first = [&] {
      step.advance();
      if constexpr (kEarly) {
        rows.load(call, v.rows, step, 0);
      } else {
        rows.prefetch(call, v.rows, step);
      }
    };
    const auto read_rest = [&] {
      if constexpr (kPaged) {
        if (own_token < call.tokens) {
          slot = call.slots[own_token];
          if (call.exact_slots != nullptr) usual = usual && call.exact_slots[own_token] == -1;
        }
      }
      if constexpr (!kEarly) rows.load(call, v.rows, step, 0);
      rows.load(call, v.rows, step, 1);
    };
    choose_pair(matrix, a, chooser, words, read_first, read_rest);
    if (!left) continue;
    // Both sums of the lane's row 2 g + q % 2.
    const auto own_sum = [&](auto x0, auto x1) {
      auto sum = (odd ? x1 : x0) + __shfl_xor_sync(kAll, odd ? x0 : x1, 1);
      return sum + __shfl_xor_sync(kAll, sum, 2);
    };
    const uint32_t uu = own_sum(chooser.uu[0], chooser.uu[1]);
    const uint64_t dot = kDot ? own_sum(uint64_t{chooser.dot[0]}, uint64_t{chooser.dot[1]}) : 0;

    constexpr bool kDirect = R::kWholeWords && kBits != 0;  // whole words go straight to where they belong
    bool simple = kDirect;
    int64_t first_slot = 0;
    if constexpr (kPaged) {
      first_slot = __shfl_sync(kAll, slot, 0);
      simple = simple && __all_sync(kAll, usual && slot == first_slot + lane_index() % kRows && slot >= 0 &&
                                              slot < v.tiles.num_slots && first_slot % kTileTokens == 0) != 0;
      usual = usual && !check_slots(v, slot, -1).bad;
    }
    if ((!kPaged || !simple) && !__all_sync(kAll, usual)) {
      const int n = warp.num_put_off;
      __syncwarp();
      if (n == kPutOff) {
        if (lane_index() == 0) warp.rest = make_uint2(group, uint32_t(head));
        step.group += kBeyond;
        continue;
      }
      if (lane_index() == 0) {
        warp.put_off[n] = make_uint2(group, uint32_t(head));
        warp.num_put_off = n + 1;
      }
      __syncwarp();
      continue;
    }
    const int lane = current_lane(), row = lane / 4 * 2 + lane % 2;
    const auto write_scale = [&](uint8_t *to) {
      const float value =
          choose_scale(kDot ? side.scale_rule : TQ_SCALE_NORM, norm, int64_t(dot), int(uu), side.scale_gain);
      const int outcome = store_scale(value, side.scale_type, to);
      count_outcome(call.faults, outcome, call.first_token + int64_t{group} * kRows + row);
    };
    if (simple) {
      [[maybe_unused]] const auto write = [&](auto bits) {
        const int64_t token = int64_t{group} * kRows + lane / 4 * 2;
        const PairPlaces places = find_pair<kHeadDim, bits, kPaged>(call, v, token, head, first_slot, lane);
        if (lane % 4 < 2 && (lane % 2 != 0 ? places.coded[1] : places.coded[0])) write_scale(places.scale);
        write_pair<kHeadDim, bits, kPaged>(v, words, places, lane);
      };
      if constexpr (kDirect) write(std::integral_constant<int, kBits>());
    } else {
      // By way of shared memory.
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        const int part = i / (2 * R::kChunks), r = i / R::kChunks % 2, t = i % R::kChunks;
        const int index = part * (R::kPart / 8) + R::kChunks * (lane % 4) + t;
        warp.nibbles[(lane / 4 * 2 + r) * EncodeShared<kHeadDim>::kStride + index] = words[part][r][t];
      }
      const int64_t own_slot = own_token >= call.tokens ? -1 : kPaged ? slot : own_token;
      const uint32_t coded = find_places<kHeadDim>(call, v, own_token, own_slot, head, warp);
      __syncwarp();
      if (lane % 4 < 2 && (coded >> row & 1) != 0) write_scale(reinterpret_cast<uint8_t *>(warp.scale[row]));
      if constexpr (kBits != 0) {
        write_codes_of<kHeadDim, kBits>(call, v, warp, coded);
      } else {
        write_codes<kHeadDim>(call, v, warp, coded);
      }
      __syncwarp();
    }
  }
}

// Sides whose scales are made of norms, which have loops of their own.
__host__ __device__ inline bool is_norms(const SideParams &side) {
  return side.scale_rule == TQ_SCALE_NORM && side.bits >= 2;
}

template <int kHeadDim, bool kPaged>
__global__ void __launch_bounds__(32 * kEncodeWarps, encode_blocks(kHeadDim))
    encode_rotated_kernel(const __grid_constant__ VectorCall call) {
  const VectorSide &v = call.side[blockIdx.y];
  const SideParams &side = v.side;
  auto &shared = EncodeShared<kHeadDim>::get();
  grid_dependency_launch();
  fill_matrix<kHeadDim>(side, shared.matrix);
  Rotated<kHeadDim>::Matrix::written();
  fill_table(side, shared.table);
  if (threadIdx.x == 0) {
    shared.magnitudes = magnitude_bytes(side);
    shared.put_off = 0;
    shared.unit = side.steps * 0x1p-24f;
    shared.cells = side.cells * kPerBit;
    shared.cell_of_0 = __uint_as_float(shared_address(shared.table) + uint32_t(side.half_cells));
  }
  __syncthreads();
  grid_dependency_wait();
  if (!is_norms(side)) {
    if constexpr (Rotated<kHeadDim>::kDots) {
      if (side.scale_rule == TQ_SCALE_LEAST_MSE && side.bits == 2) {  // V's default
        encode_pairs<kHeadDim, 2, true, kPaged>(call, v);
      } else {
        encode_pairs<kHeadDim, 0, true, kPaged>(call, v);
      }
    }
  } else if (side.bits == 4) {
    encode_pairs<kHeadDim, 4, false, kPaged>(call, v);
  } else if (side.bits == 3) {
    encode_pairs<kHeadDim, 3, false, kPaged>(call, v);
  } else {
    encode_pairs<kHeadDim, 2, false, kPaged>(call, v);
  }
  // What was put off needs other tables.
  if (lane_index() == 0 && EncodeShared<kHeadDim>::warp().num_put_off != 0) shared.put_off = 1;
  __syncthreads();
  if (shared.put_off == 0) return;
  fill_signs<kHeadDim>(side, reinterpret_cast<uint32_t *>(shared.signs));
  fill_operands<kHeadDim>(side, kOperandOne, shared.operands);
  __syncthreads();
  encode_put_off<kHeadDim, true>(call);
}

}  // namespace tqkv::cuda
