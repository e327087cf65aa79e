// SPDX-License-Identifier: Apache-2.0
// Encode and store of one head_dim with one Hadamard round: 16-bit integers, as a low and a high byte, times a matrix of
// +-1, exact; codes by a table of which every lane has its own bank. At head_dim 128, 4 bits and bf16 a vector moves
// 256 + 66 bytes; an H200 has about 19 issue slots an element in that time, of which this takes about 15.
#pragma once

#include "kernels/device/launch.cuh"
#include "kernels/device/rows.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {

// One block a multiprocessor, so that the matrix and the table are there once: 128 registers a thread, or 255.
constexpr int encode_warps(int head_dim) {
  return head_dim == 256 ? 8 : 16;
}

// The table has a row of 32 equal entries for each 2^7 units of Y, from -2^7 * `side` on.
inline constexpr int kCellShift = 7;
inline constexpr int kTableAlign = 1 << 16;

template <int kHeadDim>
struct EncodeShape {
  static constexpr int kSteps = kHeadDim / 32, kWords = kHeadDim / 8;
  static constexpr int kStride = kWords + 4;  // words of a row in `nibbles`: rows of lanes in different banks
  struct Warp {
    uint32_t nibbles[kRows * kStride];  // codes of 8 channels a word; at 4 bits as they are stored
    // Where each row goes: its planes, or V's in its tile, and its scale.
    uint64_t plane0[kRows], plane1[kRows], scale[kRows];
    int64_t dot[kRows];
    float norm[kRows];
    uint32_t uu[kRows];
    int32_t exponent[kRows];
  };
  static constexpr int kWarpBytes = encode_warps(kHeadDim) * int(sizeof(Warp)), kMatrixBytes = kHeadDim * kHeadDim;
  // The table begins at a multiple of 2^16, so that an entry's address is bits in different places. The matrix is before
  // or behind it; a launch's memory begins within the first 2 KB.
  static constexpr bool kMatrixFirst = kWarpBytes + kMatrixBytes + 2048 <= kTableAlign;
  static_assert(kWarpBytes + 2048 <= kTableAlign);
  static constexpr int bytes(int table_bytes) { return kTableAlign + table_bytes + (kMatrixFirst ? 0 : kMatrixBytes); }
};

// Cells on each side of zero: up to the largest threshold and one more.
inline __host__ __device__ int table_side(const SideParams &side) {
  const int count = 1 << (side.bits - 1);
  return (count > 1 ? side.thresholds[count - 2] >> kCellShift : 0) + 1;
}

// An entry has the code in its lowest 4 bits, the sign above the magnitude at 4 bits, and above them u^2 << 10 or, where
// the scale rule needs <Y, u>, u << 10.
inline constexpr int kEntryShift = 10;
__device__ inline void fill_table(const SideParams &side, bool wants_dot, uint32_t *table) {
  const int half = table_side(side);
  for (int i = int(threadIdx.x); i < 2 * half * 8; i += int(blockDim.x)) {
    const unsigned code = choose_code((i / 8 - half) * (1 << kCellShift), side.thresholds, side.bits);
    const int u = int(side.levels[code]);
    const uint32_t entry = uint32_t(wants_dot ? u : u * u) << kEntryShift | code;
    reinterpret_cast<uint4 *>(table)[i] = make_uint4(entry, entry, entry, entry);
  }
}

// The lowest bytes of four words.
__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// The codes of 8 channels from their entries: nibble j for channel j, or at 4 bits the word of a record.
__device__ __forceinline__ uint32_t gather_codes(const uint32_t (&entry)[8], bool four_bits) {
  const uint32_t a = low_bytes(entry[0], entry[1], entry[2], entry[3]);
  const uint32_t b = low_bytes(entry[4], entry[5], entry[6], entry[7]);
  const auto pack = [](uint32_t v) { return (v & 0x0f0f0f0f) | (v >> 4 & 0xf0f0f0f0); };
  const uint32_t word = __byte_perm(pack(a), pack(b), 0x6420);
  if (!four_bits) return word;
  const uint32_t signs = (a << 4 & 0x80808080) | (b & 0x08080808);
  return (word & 0x77777777) | signs;
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
__device__ __forceinline__ void write_rows(const typename EncodeShape<kHeadDim>::Warp &warp, uint32_t coded,
                                           bool wide) {
  constexpr int kStride = EncodeShape<kHeadDim>::kStride;
  constexpr int kPlaneWords[2] = {kBits == 1 ? 0 : kHeadDim * (kBits == 3 ? 2 : kBits) / 32,
                                  kBits == 1 || kBits == 3 ? kHeadDim / 32 : 0};
#pragma unroll
  for (int plane = 0; plane < 2; ++plane) {
    const int words = kPlaneWords[plane];
    const int vector = words % 4 == 0 ? 4 : words % 2 == 0 ? 2 : 1;
    const uint64_t *starts = plane == 0 ? warp.plane0 : warp.plane1;
#pragma unroll
    for (int i = 0; i < kRows * words / vector; i += 32) {
      const int piece = i + lane_index();
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

// V's tiles. `quads`: bit i, i a multiple of 4: rows i .. i + 3 are one group of four of a tile, written as words; of the
// other rows single bytes. `own_row`: of the lane's row in its tile.
template <int kHeadDim, int kBits>
__device__ __forceinline__ void write_v_rows(const typename EncodeShape<kHeadDim>::Warp &warp, uint32_t coded,
                                             uint32_t quads, int own_row) {
  constexpr int kStride = EncodeShape<kHeadDim>::kStride;
  constexpr int kPlaneWords[2] = {kBits == 1 ? 0 : kHeadDim * (kBits == 3 ? 2 : kBits) / 32,
                                  kBits == 1 || kBits == 3 ? kHeadDim / 32 : 0};
#pragma unroll
  for (int plane = 0; plane < 2; ++plane) {
    const int words = kPlaneWords[plane];
    const uint64_t *starts = plane == 0 ? warp.plane0 : warp.plane1;
#pragma unroll 2
    for (int i = lane_index(); i < (words * 4 + 31) / 32 * 32; i += 32) {
      const int index = i / 4, row = i % 4 * 4;  // neighbours write neighbouring 16 bytes
      const int in_tile = __shfl_sync(kAll, own_row, row);
      if ((quads >> row & 1) == 0 || index >= words) continue;
      uint32_t word[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) word[k] = plane_word<kBits>(warp.nibbles + (row + k) * kStride, plane, index);
      const uint32_t a = __byte_perm(word[0], word[1], 0x5140), b = __byte_perm(word[2], word[3], 0x5140);
      const uint32_t c = __byte_perm(word[0], word[1], 0x7362), d = __byte_perm(word[2], word[3], 0x7362);
      auto *to = reinterpret_cast<uint8_t *>(starts[row]) + 64 * index + 16 * (in_tile / 4);
      *reinterpret_cast<uint4 *>(to) = make_uint4(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632),
                                                  __byte_perm(c, d, 0x5410), __byte_perm(c, d, 0x7632));
    }
    for (int row = 0; row < kRows; ++row) {
      const int in_tile = __shfl_sync(kAll, own_row, row);
      if ((coded >> row & 1) == 0 || (quads >> (row & ~3) & 1) != 0) continue;
      for (int e = lane_index(); e < 4 * words; e += 32) {
        const uint32_t word = plane_word<kBits>(warp.nibbles + row * kStride, plane, e / 4);
        reinterpret_cast<uint8_t *>(starts[row])[64 * (e / 4) + 16 * (in_tile / 4) + 4 * (e % 4) + in_tile % 4] =
            uint8_t(word >> (8 * (e % 4)));
      }
    }
  }
}

// Copies rows raw into exact slots; the slot of row i is lane i's. What became of the lane's row.
static __device__ __noinline__ int store_exact(const VectorSide &v, uint32_t rows, int64_t own_slot, int64_t first,
                                               int head) {
  int outcome = kFine;
  const int n = v.side.head_dim;
  const float limit = raw_limit(v.side.raw_type);
  for (; rows != 0; rows &= rows - 1) {
    const int row = __ffs(int(rows)) - 1;
    const int64_t slot = __shfl_sync(kAll, own_slot, row);
    uint8_t *tile = tile_at(v.exact, slot, head) + v.exact.codes_offset;
    const int64_t at = (first + row) * v.rows.token_stride + head * v.rows.head_stride;
    bool finite = true, clamped = false;
    for (int c = lane_index(); c < n; c += 32) {
      const float x = load_element(v.rows.data, v.rows.type, at + c);
      finite = finite && isfinite(x);
      clamped = clamped || fabsf(x) > limit;
    }
    finite = __all_sync(kAll, finite);
    clamped = __any_sync(kAll, clamped);
    for (int c = lane_index(); c < n; c += 32) {
      const float x = load_element(v.rows.data, v.rows.type, at + c);
      store_element(tile, v.side.raw_type, slot % kTileTokens * n + c,
                    !finite      ? 0.0f
                    : x < -limit ? -limit
                    : x > limit  ? limit
                                 : x);
    }
    if (lane_index() == row) outcome = !finite ? kNonFinite : clamped ? kClamped : kFine;
  }
  return outcome;
}

// Where the chunks of a lane in rows g and g + 8 come from; ones in rows that are not wanted.
struct RowInput {
  const VectorSide &v;
  const float *offset;  // of the lane's first channel
  int64_t at, next;     // of the first chunk in row g, and from there to row g + 8
  bool wanted[2];
  bool scaled = false;  // by 2^-exponent
  int exponent[2] = {0, 0};

  // `kType`: 0 for everything, else rows of this type with neither offset nor exponent.
  template <int kType>
  __device__ __forceinline__ void load(int r, int t, float *x) const {
    if (!wanted[r]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = 1;
    } else if constexpr (kType != 0) {
      load_chunk(v.rows, kType, at + r * next + 32 * t, x);
    } else {
      const Chunk chunk = load_any(v.rows, offset, at, r * next, t, -exponent[r]);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = chunk.x[i];
    }
  }

  // Calls body(integral_constant) with the kType that reads these rows.
  template <class Body>
  __device__ __forceinline__ void with_type(Body &&body) const {
    if (offset != nullptr || scaled) {
      body(std::integral_constant<int, 0>());
    } else if (v.rows.type == TQ_TYPE_BF16) {
      body(std::integral_constant<int, TQ_TYPE_BF16>());
    } else if (v.rows.type == TQ_TYPE_F16) {
      body(std::integral_constant<int, TQ_TYPE_F16>());
    } else {
      body(std::integral_constant<int, TQ_TYPE_F32>());
    }
  }

 private:
  struct Chunk {
    float x[8];
  };
  __device__ __noinline__ static Chunk load_any(const Rows &rows, const float *offset, int64_t at, int64_t row, int t,
                                                int exponent) {
    Chunk chunk;
    load_chunk(rows, rows.type, at + row + 32 * t, chunk.x);
    for (int i = 0; i < 8; ++i) {
      if (offset != nullptr) chunk.x[i] = chunk.x[i] - offset[32 * t + i];
      chunk.x[i] = times_power_of_two(chunk.x[i], exponent);
    }
    return chunk;
  }
};

// Rows of few enough channels stay in registers; longer ones are read again, from the L1 cache.
template <int kHeadDim>
struct RowValues {
  static constexpr int kSteps = kHeadDim / 32;
  static constexpr bool kKept = kHeadDim <= 128;
  float x[kKept ? 2 : 1][kKept ? kSteps : 1][8];

  // squared_norm() of both rows. A lane has the cells 8 q .. 8 q + 7.
  __device__ __forceinline__ void measure(const RowInput &input, float (&norm2)[2]) {
    input.with_type([&](auto type) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float cell[8] = {};
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
          float *y = x[kKept ? r : 0][kKept ? t : 0];
          input.load<type>(r, t, y);
#pragma unroll
          for (int i = 0; i < 8; ++i) cell[i] = __fmaf_rn(y[i], y[i], cell[i]);
        }
        norm2[r] = ((cell[0] + cell[1]) + (cell[2] + cell[3])) + ((cell[4] + cell[5]) + (cell[6] + cell[7]));
      }
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      norm2[r] = norm2[r] + __shfl_xor_sync(kAll, norm2[r], 1);
      norm2[r] = norm2[r] + __shfl_xor_sync(kAll, norm2[r], 2);
    }
  }

  // X as operands A of the products: its low and high bytes.
  __device__ __forceinline__ void to_integers(const RowInput &input, const float (&gain)[2], uint32_t (&low)[kSteps][4],
                                              uint32_t (&high)[kSteps][4]) {
    const auto convert = [&](int r, int t, const float *y) {
      uint32_t bits[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) bits[i] = __float_as_uint(__fmaf_rn(y[i], gain[r], kRoundingBias));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t ab = __byte_perm(bits[4 * h], bits[4 * h + 1], 0x5410);
        const uint32_t cd = __byte_perm(bits[4 * h + 2], bits[4 * h + 3], 0x5410);
        low[t][r + 2 * h] = __byte_perm(ab, cd, 0x6420);
        high[t][r + 2 * h] = __byte_perm(ab, cd, 0x7531);
      }
    };
    if constexpr (kKept) {
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) convert(i / kSteps, i % kSteps, x[i / kSteps][i % kSteps]);
    } else {
      input.with_type([&](auto type) {
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) {
          input.load<type>(i / kSteps, i % kSteps, x[0][0]);
          convert(i / kSteps, i % kSteps, x[0][0]);
        }
      });
    }
  }
};

// Y, its codes to `warp`, and the sums of both rows.
template <int kHeadDim, bool kDot>
__device__ __forceinline__ void choose_codes(const uint32_t (&low)[kHeadDim / 32][4],
                                             const uint32_t (&high)[kHeadDim / 32][4], const uint32_t *matrix,
                                             uint32_t table, int half, bool four_bits,
                                             typename EncodeShape<kHeadDim>::Warp &warp, int64_t (&dot)[2],
                                             uint32_t (&uu)[2]) {
  constexpr int kSteps = kHeadDim / 32, kStride = EncodeShape<kHeadDim>::kStride;
  const int bias = half << kCellShift, most = (half << (kCellShift + 1)) - 1;
  uint32_t sum[2] = {};
  int32_t products[2] = {};
#pragma unroll 1
  for (int t = 0; t < kSteps; ++t) {
    int32_t y[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int32_t upper[4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) y[i][j] = bias;
#pragma unroll
      for (int s = 0; s < kSteps; s += kRotationRun<kSteps>) {
        uint32_t b[kRotationRun<kSteps>][2];
        load_rotation<kSteps>(matrix, 4 * t + i, s, b);
#pragma unroll
        for (int k = 0; k < kRotationRun<kSteps>; ++k) {
          mma_m16n8k32<int8_t, int8_t>(upper, high[s + k], b[k], upper);
          mma_m16n8k32<uint8_t, int8_t>(y[i], low[s + k], b[k], y[i]);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) y[i][j] = upper[j] * 256 + y[i][j];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t entry[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int value = y[c / 2][2 * r + c % 2];
        entry[c] = load_shared((uint32_t(clamp_from_zero(value, most)) & ~127u) | table);
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if constexpr (kDot) {
          const int u = int(entry[c]) >> kEntryShift;
          products[r] += (y[c / 2][2 * r + c % 2] - bias) * u;
          sum[r] += uint32_t(u * u);
        } else {
          sum[r] += entry[c];
        }
      }
      warp.nibbles[(lane_row() + 8 * r) * kStride + 4 * t + lane_part()] = gather_codes(entry, four_bits);
    }
    if constexpr (kDot) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        dot[r] += products[r];
        products[r] = 0;
      }
    }
  }
  // Without products a sum has the squares above the codes, of which 64 stay below 2^10.
#pragma unroll
  for (int r = 0; r < 2; ++r) uu[r] = kDot ? sum[r] : sum[r] >> kEntryShift;
}

template <class T>
__device__ __forceinline__ T sum_of_four(T x) {
  x += __shfl_xor_sync(kAll, x, 1);
  return x + __shfl_xor_sync(kAll, x, 2);
}

template <int kHeadDim>
__device__ void encode_rows(const VectorCall &call, const VectorSide &v, const uint32_t *matrix, uint32_t table,
                            bool wants_dot, typename EncodeShape<kHeadDim>::Warp &warp) {
  constexpr int kSteps = kHeadDim / 32;
  const SideParams &side = v.side;
  const bool tiles = call.slots != nullptr;
  // A 1-bit plane is the second, also where it is the only one.
  const int plane1_bytes = side.bits == 1 || side.bits == 3 ? kHeadDim / 8 : 0;
  const int plane0_bytes = record_bytes(kHeadDim, side.bits) - plane1_bytes;
  const uint32_t heads = uint32_t(call.heads), items = uint32_t((call.tokens + kRows - 1) / kRows) * heads;
  for (uint32_t item = blockIdx.x + threadIdx.x / 32 * gridDim.x; item < items;
       item += gridDim.x * encode_warps(kHeadDim)) {
    // Heads first: neighbours read whole tokens.
    const int head = int(item % heads);
    const int64_t first = int64_t{item / heads} * kRows;
    const int64_t own_token = first + lane_index() % kRows;
    int64_t slot = -1, exact_slot = -1;
    uint8_t *plane0 = nullptr, *plane1 = nullptr, *scale_at = nullptr;
    if (own_token < call.tokens) {
      if (!tiles) {
        slot = own_token;
        plane0 = v.flat.codes + own_token * v.flat.codes_stride;
        plane1 = plane0 + plane0_bytes;
        scale_at = v.flat.scales + own_token * v.flat.scales_stride;
      } else {
        const Slots slots = read_slots(call, v, own_token);
        if (!slots.bad) {
          slot = slots.coded;
          exact_slot = slots.exact;
        } else if (lane_index() < kRows && head == 0 && v.counts_slots) {
          count_fault(call.faults, TQ_FAULT_SLOT, call.first_token + own_token);
        }
        if (slot != -1) {
          uint8_t *tile = tile_at(v.tiles, slot, head);
          const int row = int(slot) % kTileTokens;
          plane0 = tile + v.tiles.codes_offset + (side.is_v ? 0 : row * plane0_bytes);
          plane1 = tile + v.tiles.codes_offset + kTileTokens * plane0_bytes + (side.is_v ? 0 : row * plane1_bytes);
          scale_at = tile + v.tiles.scales_offset + row * scale_bytes(side);
        }
      }
    }
    if (lane_index() < kRows) {
      warp.plane0[lane_index()] = uint64_t(plane0);
      warp.plane1[lane_index()] = uint64_t(plane1);
      warp.scale[lane_index()] = uint64_t(scale_at);
    }
    const int own_row = int(slot & (kTileTokens - 1));
    // Groups of four rows that are one of a tile.
    const int64_t group = slot - lane_index() % 4, first_group = __shfl_sync(kAll, group, lane_index() & ~3);
    uint32_t quads = __ballot_sync(kAll, slot != -1 && (group & 3) == 0 && group == first_group);
    quads &= quads >> 1;
    quads &= quads >> 2;
    quads &= 0x1111;
    const uint32_t coded = __ballot_sync(kAll, slot != -1) & 0xffff;
    const uint32_t exact = __ballot_sync(kAll, exact_slot != -1) & 0xffff;
    int outcome = exact == 0 ? kFine : store_exact(v, exact, exact_slot, first, head);
    if (coded == 0) {
      if (lane_index() < kRows) count_outcome(call.faults, outcome, call.first_token + own_token);
      continue;
    }

    RowInput input{v,
                   v.offset == nullptr ? nullptr : v.offset + head * kHeadDim + 8 * lane_part(),
                   (first + lane_row()) * v.rows.token_stride + head * v.rows.head_stride + 8 * lane_part(),
                   8 * v.rows.token_stride,
                   {(coded >> lane_row() & 1) != 0, (coded >> (lane_row() + 8) & 1) != 0}};
    RowValues<kHeadDim> values;
    float norm2[2];
    uint32_t zero = 0, not_finite = 0;  // bits of rows
#pragma unroll 1
    for (;;) {
      values.measure(input, norm2);
      const auto usual = [&](int r) { return norm2[r] >= kMinSquaredNorm && norm2[r] <= kMaxSquaredNorm; };
      if (input.scaled || __all_sync(kAll, usual(0) && usual(1))) break;
        // Again, scaled where that is needed: by 2^0 the others come out the same.
#pragma unroll 1
      for (int r = 0; r < 2; ++r) {
        uint32_t largest = 0;
#pragma unroll 1
        for (int t = 0; t < kSteps; ++t) {
          float x[8];
          input.load<0>(r, t, x);
#pragma unroll
          for (int i = 0; i < 8; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffff);
        }
        largest = max(largest, __shfl_xor_sync(kAll, largest, 1));
        largest = max(largest, __shfl_xor_sync(kAll, largest, 2));
        const bool bad = largest >= 0x7f800000, nothing = largest == 0;
        not_finite |= uint32_t(bad) << (lane_row() + 8 * r);
        zero |= uint32_t(bad || nothing) << (lane_row() + 8 * r);
        const bool extreme = r == 0 ? !usual(0) : !usual(1);
        const int exponent = extreme && !bad && !nothing ? exponent_of(__uint_as_float(largest)) : 0;
        (r == 0 ? input.exponent[0] : input.exponent[1]) = exponent;
        if (bad || nothing) (r == 0 ? input.wanted[0] : input.wanted[1]) = false;
      }
      for (int lane = 4; lane < 32; lane *= 2) {
        zero |= __shfl_xor_sync(kAll, zero, lane);
        not_finite |= __shfl_xor_sync(kAll, not_finite, lane);
      }
      input.scaled = true;
    }
    const float norm[2] = {sqrtf(norm2[0]), sqrtf(norm2[1])};
    const float gain[2] = {side.steps / norm[0], side.steps / norm[1]};
    uint32_t low[kSteps][4], high[kSteps][4];
    values.to_integers(input, gain, low, high);

    int64_t dot[2] = {};
    uint32_t uu[2];
    const int half = table_side(side);
    if (wants_dot) {
      choose_codes<kHeadDim, true>(low, high, matrix, table, half, side.bits == 4, warp, dot, uu);
    } else {
      choose_codes<kHeadDim, false>(low, high, matrix, table, half, side.bits == 4, warp, dot, uu);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t total = sum_of_four(uu[r]);
      const int64_t total_dot = wants_dot ? sum_of_four(dot[r]) : 0;
      if (lane_part() == 0) {
        const int row = lane_row() + 8 * r;
        warp.norm[row] = norm[r];
        warp.uu[row] = total;
        warp.dot[row] = total_dot;
        warp.exponent[row] = input.exponent[r];
      }
    }
    __syncwarp();
    // What is stored of zeros and of what is not finite: all codes zero.
    for (int row = 0; zero != 0 && row < kRows; ++row) {
      if ((zero >> row & 1) == 0) continue;
      for (int i = lane_index(); i < kHeadDim / 8; i += 32) warp.nibbles[row * EncodeShape<kHeadDim>::kStride + i] = 0;
    }
    __syncwarp();
    if (lane_index() < kRows) {
      const int row = lane_index();
      if ((coded >> row & 1) != 0) {
        float value = choose_scale(side.scale_rule, warp.norm[row], warp.dot[row], int(warp.uu[row]), side.scale_gain);
        if (warp.exponent[row] != 0) value = times_power_of_two(value, warp.exponent[row]);
        if ((zero >> row & 1) != 0) value = 0;
        const int stored = store_scale(value, side.scale_type, reinterpret_cast<uint8_t *>(warp.scale[row]));
        const int became = (not_finite >> row & 1) != 0 ? int(kNonFinite) : stored;
        if (became != kFine) outcome = became;
      }
      count_outcome(call.faults, outcome, call.first_token + own_token);
    }

    if (tiles && side.is_v) {
      if (side.bits == 4) write_v_rows<kHeadDim, 4>(warp, coded, quads, own_row);
      if (side.bits == 3) write_v_rows<kHeadDim, 3>(warp, coded, quads, own_row);
      if (side.bits == 2) write_v_rows<kHeadDim, 2>(warp, coded, quads, own_row);
      if (side.bits == 1) write_v_rows<kHeadDim, 1>(warp, coded, quads, own_row);
    } else {
      const bool wide = tiles || v.flat.alignment == 16;
      if (side.bits == 4) write_rows<kHeadDim, 4>(warp, coded, wide);
      if (side.bits == 3) write_rows<kHeadDim, 3>(warp, coded, wide);
      if (side.bits == 2) write_rows<kHeadDim, 2>(warp, coded, wide);
      if (side.bits == 1) write_rows<kHeadDim, 1>(warp, coded, wide);
    }
    __syncwarp();
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(32 * encode_warps(kHeadDim), 1)
    encode_kernel(const __grid_constant__ VectorCall call) {
  using Shape = EncodeShape<kHeadDim>;
  const VectorSide &v = call.side[blockIdx.y];
  auto *memory = static_cast<uint8_t *>(dynamic_shared());
  const uint32_t begin = shared_address(memory);
  const uint32_t table = (begin + Shape::kWarpBytes + kTableAlign - 1) & ~uint32_t(kTableAlign - 1);
  auto *warps = reinterpret_cast<typename Shape::Warp *>(memory);
  uint8_t *behind = memory + (table - begin) + 256 * table_side(v.side);
  auto *matrix = reinterpret_cast<uint32_t *>(Shape::kMatrixFirst ? memory + Shape::kWarpBytes : behind);
  const bool wants_dot = v.side.scale_rule != TQ_SCALE_NORM;
  fill_rotation<kHeadDim, false>(v.side, matrix);
  fill_table(v.side, wants_dot, reinterpret_cast<uint32_t *>(memory + (table - begin)));
  __syncthreads();
  encode_rows<kHeadDim>(call, v, matrix, table + 4 * threadIdx.x % 128, wants_dot, warps[threadIdx.x / 32]);
}

// Cells of 2^7 units must not straddle thresholds, which are multiples of half a grid step, and the table must fit.
template <int kHeadDim>
bool takes_encode(const VectorSide &v, bool tiles, const DeviceLimits &limits) {
  const SideParams &side = v.side;
  return side.rounds == 1 && v.rows.aligned != 0 && (tiles || v.flat.alignment >= 4) && side.bits <= 4 &&
         (side.bits == 1 || side.unit_shift > kCellShift) && 256 * table_side(side) <= kTableAlign &&
         EncodeShape<kHeadDim>::bytes(256 * table_side(side)) <= limits.shared_bytes;
}

template <int kHeadDim>
int load_encode() {
  int device = 0, most = 0;
  if (const int error = cudaGetDevice(&device)) return error;
  if (const int error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  return cudaFuncSetAttribute(encode_kernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

template <int kHeadDim>
int launch_encode_fast(const VectorCall &call, const DeviceLimits &limits, void *stream) {
  int half = 0;
  for (int i = 0; i < call.num_sides; ++i) {
    const int one = table_side(call.side[i].side);
    half = one > half ? one : half;
  }
  const int64_t items = (call.tokens + kRows - 1) / kRows * call.heads;
  const int64_t resident = limits.multiprocessors / call.num_sides;
  return launch(encode_kernel<kHeadDim>, dim3(unsigned(items < resident ? items : resident), unsigned(call.num_sides)),
                32 * encode_warps(kHeadDim), EncodeShape<kHeadDim>::bytes(256 * half), stream, call);
}

}  // namespace tqkv::cuda
