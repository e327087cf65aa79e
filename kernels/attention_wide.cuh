// SPDX-License-Identifier: Apache-2.0
// The other main kernel of paged attention, on 16-bit tensor cores: for many query rows of a kv head (prefill), and for
// what attention.cuh does not take (raw pages, 1 bit, sides of different kinds). attention.hpp says what both are given
// and what they leave.
//
// BLOCK. Four warps make, the others consume stages of keys in shared memory, a row of 16-bit channels a key. Codes become
// their levels, odd integers below 256, which f16 holds exactly; raw rows are copied as they are. So a block expands every
// code once for all its rows, and there is no dense copy of the history outside of its few stages. Stages go round; whoever
// makes them is ahead of those who read them, across items, too.
//
// ROWS. With kMany every consumer has 16 rows of its own and all keys of a stage, and four of them, a warpgroup, take their
// products together by wgmma where the device has it; else all have the same 16 rows and a part of the keys each, and what
// they have is added up at the end of an item.
//
// SHARED MEMORY. Of a matrix of rows, chunks of 8 channels of all rows follow each other: 8 rows by 8 channels are 128 bytes,
// read by wgmma and by ldmatrix without bank conflicts, as keys by channels and, transposed, as channels by keys. 16 bytes
// after a chunk's rows let neighbouring chunks of a row be written without them.
//
// NEW KEYS. Segments of k_new are read the same way. Queries of coded keys are rotated, those of raw ones are not, and so
// with values: what is read of pages and of k_new goes to different segments, and "finish" brings them together.
//
// ARITHMETIC. Queries are 16-bit floats, in one part where that is exact or the output is bf16, else in two, high and low:
// 22 bits of f16 or 16 of bf16. A score is an f32 sum, x = gain * key scale * sum. Weights w = 2^(x - reference) * v scale
// go to 16 bits: f16 has 11, so that outputs are off by up to 2^-12 where all weight is on one key, and by 2e-4 where it is
// spread; that is little beside bf16's own 2^-9, and other outputs take the low part, too. bf16 weights (raw bf16 values)
// always have both. The reference makes the largest weight 2^12 when it is chosen and follows when one passes 2^15.5, so
// weights keep all bits down to 2^-14, 2^-26 of the largest: a flat tail of 2^17 keys beside a key that has most of the
// weight is above that. A reference belongs to a row and looks at the scales of keys that it sees, nothing else.
#pragma once

#include <algorithm>

#include "kernels/attention.hpp"
#include "kernels/device/launch.cuh"
#include "kernels/device/operands.cuh"
#include "kernels/device/sequence.cuh"
#include "kernels/device/vector.cuh"

namespace tqkv::cuda {

inline constexpr int kWideSharedBytes = 227 << 10;  // of a block, from compute capability 9.0 on
inline constexpr int kMakers = 4, kMakerThreads = 32 * kMakers;
inline constexpr int kMostWideStages = 8;
inline constexpr int kConsumerBarrier = 1, kWarpgroupBarrier = 2;  // group_barrier(); of the first warpgroup

template <int kDimension, bool kManyRows>
struct WideShape {
  static constexpr int kDim = kDimension;  // at least the head_dims
  static constexpr bool kMany = kManyRows;
  static constexpr int kConsumers = kDim > 128 ? 4 : 8, kThreads = 32 * (kConsumers + kMakers);
  static constexpr int kRowWarps = kMany ? kConsumers : 1, kKeyWarps = kMany ? 1 : kConsumers;
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kKeys = kMany ? 64 : 16, kStageKeys = kKeys * kKeyWarps;  // of a warp, of a stage
  static constexpr int kChunkBytes = 16 * kStageKeys + 16, kSideBytes = kDim / 8 * kChunkBytes;
  static constexpr int kMakerTiles = kStageKeys / 16 / kMakers;  // that a maker makes of a stage
  static_assert(kMakerTiles * 16 * kMakers == kStageKeys);
  // Two parts of queries, of a warpgroup or of all; or sums that warps have in common.
  static constexpr int kQueryRows = kMany ? 64 : 16, kQueryGroups = kRows / kQueryRows;
  static constexpr int kQueryChunkBytes = 16 * kQueryRows + 16, kQueryPartBytes = kDim / 8 * kQueryChunkBytes;
  static constexpr int kQueryBytes = 2 * kQueryPartBytes * kQueryGroups;
  static_assert(kMany || kQueryBytes >= 4 * kRows * kDim);
};

// Keys that every row of a warp sees, and those that some may see.
struct RowRanges {
  int32_t plain_low, plain_high, low, high;
};

// What a row sees, for its scores where not all rows see all keys or scores are adjusted.
struct RowLimits {
  int32_t low, high, shift;  // keys; key + shift: its position less the row's
  float offset, slope;
};

// What of a stage is not rows.
template <class Shape>
struct alignas(16) StageKeys {
  float k_scale[Shape::kStageKeys], v_scale[Shape::kStageKeys];  // 0 where hidden
  // Of 16 keys each: bits of those that are read here and that some row sees; a power of two above their v scales.
  uint32_t shown[Shape::kStageKeys / 16];
  float exponent[Shape::kStageKeys / 16];
};

// An item, and the keys that are read for it: numbered from coded_length on where they are new.
struct WideItem {
  AttentionItem item;
  Sequence sequence;
  int32_t is_new, low, high;  // keys [low, high), by some row

  __device__ int steps(int stage_keys) const {
    return ((item.end_tile - item.first_tile) * kTileTokens + stage_keys - 1) / stage_keys;
  }
};

// What slot `slot` of block `block` has; false where it has no tiles.
__device__ inline bool read_item(const AttentionCall &call, int32_t slot, int32_t block, WideItem &wide) {
  wide.item = call.items[slot];
  if (wide.item.first_tile >= wide.item.end_tile) return false;
  wide.sequence = read_sequence(call, wide.item.sequence, 0);
  const uint32_t segment = uint32_t(slot - block - int32_t(call.sequence_segments[wide.item.sequence]));
  wide.is_new = segment % uint32_t(call.splits) >= uint32_t(call.page_splits);
  const Sequence &sequence = wide.sequence;
  const int first = wide.item.token_block * call.block_tokens, end = min(sequence.q_len, first + call.block_tokens);
  const KeyRange seen =
      keys_of_tokens(call, sequence, first, end, wide.is_new ? sequence.length : sequence.coded_length);
  const int base = wide.is_new ? sequence.coded_length : 0;
  wide.low = max(seen.low - base, wide.item.first_tile * kTileTokens);
  wide.high = min(seen.high - base, wide.item.end_tile * kTileTokens);
  return true;
}

template <class Shape>
struct WideShared {
  uint64_t full[kMostWideStages], empty[kMostWideStages];
  StageKeys<Shape> keys[kMostWideStages];
  RowRanges ranges[Shape::kConsumers];
  RowLimits limits[Shape::kConsumers][16];
  WideItem items[kMakers];
  float references[Shape::kKeyWarps][16], sums[16];
};

struct WideMemory {
  int32_t stages, stages_at, shared_at;  // queries come first; bytes from the start
};

// The compiler knows of this that it is one number for the warp.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(kAll, int(threadIdx.x) / 32, 0);
}

// ---- making stages

// Whether some row sees key j, which is in their common range.
__device__ inline bool is_seen(const AttentionCall &call, const WideItem &wide, int j) {
  if (call.q_positions == nullptr || call.window == 0) return true;  // ranges without gaps between them
  const int first = wide.item.token_block * call.block_tokens;
#pragma unroll 1
  for (int token = first; token < min(wide.sequence.q_len, first + call.block_tokens); ++token) {
    const KeyRange keys = visible_keys(call, wide.sequence, position(call, wide.sequence, token));
    if (j >= keys.low && j < keys.high) return true;
  }
  return false;
}

__device__ inline const uint8_t *new_row(const Rows &rows, int64_t token, int head) {
  return static_cast<const uint8_t *>(rows.data) + 2 * (token * rows.token_stride + head * rows.head_stride);
}

// The block of a key of the maker's next tile, read a tile before.
struct NextBlock {
  int32_t key = -1, id = 0;  // -1: none
};

__device__ __forceinline__ const uint8_t *pointer_of_lane(const uint8_t *pointer, int lane) {
  return reinterpret_cast<const uint8_t *>(__shfl_sync(kAll, reinterpret_cast<unsigned long long>(pointer), lane));
}

// Where the keys of a maker's tile are: lanes i and i + 16 have key i.
struct KeyPlace {
  const uint8_t *k, *v;   // of a raw side the key's row, null where it is hidden; else its tile's codes
  int32_t row;            // in the tile
  uint32_t scale;         // bits of K's in lanes 0 .. 15, of V's in the others
  uint32_t shown;         // bits of keys that are read here and that some row sees
  bool is_new, one_tile;  // one_tile: lane i has row i % 16 of the same tile
};

// The key's place in a tile of pages. kCoded: no side of pages is raw.
template <bool kCoded>
__device__ __forceinline__ void point_to(const AttentionCall &call, const uint8_t *tile, bool seen, KeyPlace &place) {
  const bool of_k = lane_index() < kTileTokens, raw_k = !kCoded && call.k_bits == kRawBits,
             raw_v = !kCoded && call.v_bits == kRawBits;
  if (seen || !raw_k) place.k = tile + (raw_k ? place.row * call.head_dim_k * 2 : 0);
  if (seen || !raw_v) place.v = tile + call.pool.v_codes + (raw_v ? place.row * call.head_dim_v * 2 : 0);
  if (!(of_k ? raw_k : raw_v)) {
    const int type = of_k ? call.k_scale_type : call.v_scale_type;
    place.scale = load_scale_bits(
        type, tile + (of_k ? call.pool.k_scales : call.pool.v_scales) + place.row * (type == TQ_TYPE_F32 ? 4 : 2));
  }
}

// The tile that begins with key `first`; the maker's next one begins with `next_first`. Codes of hidden keys may be
// anything, as all are finite levels: keys without a tile have another's, or `no_tile`. Nothing here waits for what it
// loads.
__device__ __forceinline__ KeyPlace find_place(const AttentionCall &call, const WideItem &wide, int first,
                                               int next_first, const uint8_t *no_tile, NextBlock &next) {
  const Sequence &sequence = wide.sequence;
  const AttentionPool &pool = call.pool;
  const int lane = lane_index(), key = first + lane % kTileTokens, kv_head = wide.item.head_pack;
  KeyPlace place{nullptr, nullptr, key % kTileTokens, 0, 0, wide.is_new != 0, false};
  bool seen =
      key >= wide.low && key < wide.high && is_seen(call, wide, wide.is_new ? sequence.coded_length + key : key);
  if (wide.is_new) {
    if (seen) {
      place.k = new_row(call.k_new, int64_t{sequence.begin} + key, kv_head);
      place.v = new_row(call.v_new, int64_t{sequence.begin} + key, kv_head);
    }
  } else {
    const uint8_t *tile = nullptr;
    seen = seen && !is_exact(call, sequence, key);
    if (first < wide.high && first + kTileTokens > wide.low && key < sequence.coded_length) {
      const uint32_t block = uint32_t(key) / uint32_t(pool.block_size),
                     in_block = uint32_t(key) % uint32_t(pool.block_size);
      const int32_t id = next.key == key ? next.id : sequence.table[block];
      if (id < 0 || id >= pool.num_blocks) {
        if (seen) atomicMax(&call.sequence_faults[wide.item.sequence], 1);
        seen = false;
      } else if (pool.block_size < kTileTokens) {
        const int64_t slot = int64_t{id} * pool.block_size + in_block;
        tile = pool.base + slot / kTileTokens * pool.block_stride;
        place.row = int(slot % kTileTokens);
      } else {
        tile = pool.base + id * pool.block_stride + in_block / kTileTokens * pool.tile_stride;
      }
    }
    const unsigned have = __ballot_sync(kAll, tile != nullptr);
    const uint8_t *other = pointer_of_lane(tile, have != 0 ? __ffs(int(have)) - 1 : 0);
    tile = tile != nullptr ? tile : other;
    tile = tile != nullptr ? tile + kv_head * pool.head_stride : no_tile;
    point_to<false>(call, tile, seen, place);
  }
  place.shown = __ballot_sync(kAll, seen) & 0xffff;
  next.key = -1;
  if (!wide.is_new && sequence.exact_table == nullptr && call.q_positions == nullptr) {
    const int next_key = next_first + lane % kTileTokens;
    if (next_key >= wide.low && next_key < wide.high) {  // it is needed
      next.key = next_key;
      next.id = sequence.table[uint32_t(next_key) / uint32_t(pool.block_size)];
    }
  }
  return place;
}

// Calls body() with the number of bits of codes, 1 .. 4 or 8, as a constant; kFixed is it, or 0.
template <int kFixed, class Body>
__device__ __forceinline__ void with_bits(int bits, Body &&body) {
  switch (kFixed != 0 ? kFixed : bits) {
    case 1:
      body(std::integral_constant<int, 1>{});
      break;
    case 2:
      body(std::integral_constant<int, 2>{});
      break;
    case 3:
      body(std::integral_constant<int, 3>{});
      break;
    case 4:
      body(std::integral_constant<int, 4>{});
      break;
    default:
      body(std::integral_constant<int, 8>{});
  }
}

// Calls body() with whether a row of the 1-bit plane ends in half a word, as a constant; kWhole: that none does.
template <int bits, bool kWhole, class Body>
__device__ __forceinline__ void with_halves(int head_dim, Body &&body) {
  if (!kWhole && (bits == 1 || bits == 3) && head_dim % 32 != 0) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

// Eight channels of a key in a stage.
template <class Shape>
__device__ __forceinline__ uint8_t *chunk_at(uint8_t *side, int key, int chunk) {
  return side + chunk * Shape::kChunkBytes + 16 * key;
}

// Levels as f16 by their index (at 4 bits by magnitude): bytes 0 .. 7 of the low and of the high halves.
struct HalfTable {
  uint32_t low[2], high[2];
};

// Eight f16 numbers of indices in nibbles; `signs` has the signs of channels 0 .. 3 at 7 of each byte, of 4 .. 7 at 3.
__device__ __forceinline__ uint4 levels_of(const HalfTable &table, uint32_t nibbles, uint32_t signs) {
  const uint32_t second = nibbles >> 16;
  const uint32_t low0 = permute(table.low[0], table.low[1], nibbles),
                 low1 = permute(table.low[0], table.low[1], second);
  const uint32_t high0 = permute(table.high[0], table.high[1], nibbles) | (signs & 0x80808080);
  const uint32_t high1 = permute(table.high[0], table.high[1], second) | (signs << 4 & 0x80808080);
  return make_uint4(permute(low0, high0, 0x5140), permute(low0, high0, 0x7362), permute(low1, high1, 0x5140),
                    permute(low1, high1, 0x7362));
}

// Eight f16 numbers 2 b + 1 of signed bytes b: 1024 + (b + 128) is one whose last byte is b + 128.
__device__ __forceinline__ uint4 levels_of_bytes(uint32_t first, uint32_t second) {
  const auto pair = [](uint32_t bytes, uint32_t selector) {
    constexpr uint32_t kOne = 0x3c003c00, kTwo = 0x40004000, kLess = 0xe480e480;  // 1, 2, -1152
    return fma_f16x2(fma_f16x2(permute(bytes ^ 0x80808080, 0x64646464, selector), kOne, kLess), kTwo, kOne);
  };
  return make_uint4(pair(first, 0x4140), pair(first, 0x4342), pair(second, 0x4140), pair(second, 0x4342));
}

// Nibbles with the 1-bit plane's bits of octet o, of the word that has it; whatever the order of the word's bytes.
__device__ __forceinline__ uint32_t ones_of(uint32_t word, int octet) {
  return word >> ones_bit(octet) & 0x11111111;
}
// The same of the half word that ends a row of 16 channels more than full words.
__device__ __forceinline__ uint32_t ones_of_half(uint32_t word, int octet) {
  const uint32_t field = word >> (2 * (octet & 1));
  return (field & 0x1111) | (field & 0x2222) << 15;
}

// Level indices in nibbles of an octet of 1, 2 or 3 bits, of the word of the 2-bit plane and the nibbles of the other.
template <int bits>
__device__ __forceinline__ uint32_t indices_of(uint32_t word, uint32_t ones, int octet) {
  if (bits == 1) return ones;
  const uint32_t two = word >> (2 * (octet & 1)) & 0x33333333;
  return bits == 2 ? two : two | ones << 2;
}

// Codes of K of a maker's tile: a piece is 16 channels of a key. Neighbouring lanes have different keys. kWhole: head_dim is
// a multiple of 32.
template <class Shape>
struct KeyCodes {
  static constexpr int kUnits = Shape::kDim / 16, kPieces = kUnits / 2;  // of a key, of a lane
  uint32_t word[kPieces][4];  // at 1 and 3 bits the last is of the 1-bit plane, or two halves

  __device__ static int key_of(int i) { return 8 * (i / (kUnits / 4)) + lane_index() % 8; }
  __device__ static int unit_of(int i) { return i % (kUnits / 4) * 4 + lane_index() / 8; }

  template <int bits, bool kWhole>
  __device__ __forceinline__ void load(const AttentionCall &call, const KeyPlace &place) {
    const int dim = call.head_dim_k;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = 8 * half + lane_index() % 8;
      int row = key;
      const uint8_t *tile = place.k;
      if (!place.one_tile) {
        row = __shfl_sync(kAll, place.row, key);
        tile = pointer_of_lane(place.k, key);
      }
      const uint8_t *codes = tile + row * ((bits == 3 ? 2 : bits) * dim / 8);
      const uint8_t *ones = tile + (bits == 3 ? kTileTokens * dim / 4 : 0) + row * dim / 8;
#pragma unroll
      for (int j = 0; j < kUnits / 4; ++j) {
        const int i = half * (kUnits / 4) + j, unit = 16 * unit_of(i) < dim ? unit_of(i) : 0;
        if (bits == 4) {
          const uint2 v = *reinterpret_cast<const uint2 *>(codes + 8 * unit);
          word[i][0] = v.x, word[i][1] = v.y;
        } else if (bits == 8) {
          const uint4 v = *reinterpret_cast<const uint4 *>(codes + 16 * unit);
          word[i][0] = v.x, word[i][1] = v.y, word[i][2] = v.z, word[i][3] = v.w;
        } else {
          if (bits != 1) word[i][0] = *reinterpret_cast<const uint32_t *>(codes + 4 * unit);
          if (bits != 2) {
            const uint8_t *at = ones + (unit >> 1) * 4;
            if (kWhole || dim % 32 == 0) {
              word[i][3] = *reinterpret_cast<const uint32_t *>(at);
            } else {  // half words; the last unit has one
              word[i][3] = *reinterpret_cast<const uint16_t *>(at);
              word[i][2] = *reinterpret_cast<const uint16_t *>(at + (16 * unit < (dim & ~31) ? 2 : 0));
            }
          }
        }
      }
    }
  }

  // `side`: of the tile's first key.
  template <int bits, bool kWhole>
  __device__ __forceinline__ void expand(const AttentionCall &call, uint8_t *side) const {
    with_halves<bits, kWhole>(call.head_dim_k, [&](auto halves) { expand_pieces<bits, halves>(call, side); });
  }

 private:
  template <int bits, bool kHalves>
  __device__ __forceinline__ void expand_pieces(const AttentionCall &call, uint8_t *side) const {
    const HalfTable table{{call.k_halves[0], call.k_halves[1]}, {call.k_halves[2], call.k_halves[3]}};
    const int dim = call.head_dim_k;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int key = key_of(i), unit = unit_of(i);
      if (16 * unit >= dim) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int octet = 2 * (lane_index() / 8) + h;  // modulo 4
        uint4 levels;
        if (bits == 8) {
          levels = levels_of_bytes(word[i][2 * h], word[i][2 * h + 1]);
        } else if (bits == 4) {
          levels = levels_of(table, word[i][h] & 0x77777777, word[i][h]);
        } else {
          uint32_t ones = 0;
          if (kHalves) {
            ones = 16 * unit >= (dim & ~31) ? ones_of_half(word[i][3], octet)
                                            : ones_of(word[i][3] | word[i][2] << 16, octet);
          } else if (bits != 2) {
            ones = ones_of(word[i][3], octet);
          }
          levels = levels_of(table, indices_of<bits>(word[i][0], ones, octet), 0);
        }
        *reinterpret_cast<uint4 *>(chunk_at<Shape>(side, key, 2 * unit + h)) = levels;
      }
    }
  }
};

// Bytes of four tokens, one word a byte, become words of the tokens.
__device__ __forceinline__ uint4 tokens_of(uint4 bytes) {
  const uint32_t a = permute(bytes.x, bytes.y, 0x5140), b = permute(bytes.x, bytes.y, 0x7362);
  const uint32_t c = permute(bytes.z, bytes.w, 0x5140), d = permute(bytes.z, bytes.w, 0x7362);
  return make_uint4(permute(a, c, 0x5410), permute(a, c, 0x7632), permute(b, d, 0x5410), permute(b, d, 0x7632));
}

__device__ __forceinline__ uint32_t word_of(uint4 words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// Codes of V of a maker's tile: a piece is 8 channels of four keys. Neighbouring lanes have different channels.
template <class Shape>
struct ValueCodes {
  static constexpr int kPieces = Shape::kDim / 64;
  uint4 first[kPieces], second[kPieces];  // words of planes; bytes of a word are tokens

  __device__ static int octet_of(int i) { return 8 * i + lane_index() % 8; }
  __device__ static int first_key() { return lane_index() / 8 * 4; }

  template <int bits, bool kWhole>
  __device__ __forceinline__ void load(const AttentionCall &call, const KeyPlace &place) {
    const int dim = call.head_dim_v;
    int row = first_key();
    const uint8_t *codes = place.v;
    if (!place.one_tile) {
      row = __shfl_sync(kAll, place.row, first_key());
      codes = pointer_of_lane(place.v, first_key());
    }
    const bool together = call.pool.block_size >= 4;  // the four keys are neighbours
    // Bytes 4 `word` .. of the keys, of a plane of `bytes` bytes at `plane` from the tile's codes on.
    const auto load_word = [&](int plane, int bytes, int word) {
      if (bytes <= 4 * word) word = 0;  // of channels that there are not
      const bool halves = !kWhole && (bits == 1 || bits == 3) && bytes % 4 != 0;
      const int word_bytes = halves && bytes - 4 * word < 4 ? 2 : 4;
      if (together) {
        const uint8_t *at = codes + plane + 64 * word + 4 * word_bytes * (row >> 2);
        if (!halves) return *reinterpret_cast<const uint4 *>(at);
        uint4 loaded = make_uint4(0, 0, 0, 0);
        if (word_bytes == 4) {
          loaded = *reinterpret_cast<const uint4 *>(at);
        } else {
          const uint2 half = *reinterpret_cast<const uint2 *>(at);
          loaded.x = half.x, loaded.y = half.y;
        }
        return loaded;
      }
      uint32_t result[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const uint8_t *of_key = pointer_of_lane(place.v, first_key() + i);
        const int its_row = __shfl_sync(kAll, place.row, first_key() + i);
        const uint8_t *at = of_key + plane + v_plane_offset(bytes, 4 * word, its_row);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (e < word_bytes) result[e] |= uint32_t{at[4 * e]} << (8 * i);
        }
      }
      return make_uint4(result[0], result[1], result[2], result[3]);
    };
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int octet = octet_of(i);
      if (bits == 4) {
        first[i] = load_word(0, dim / 2, octet);
      } else if (bits == 8) {
        first[i] = load_word(0, dim, 2 * octet);
        second[i] = load_word(0, dim, 2 * octet + 1);
      } else {
        if (bits != 1) first[i] = load_word(0, dim / 4, octet >> 1);
        if (bits != 2) second[i] = load_word(bits == 3 ? kTileTokens * dim / 4 : 0, dim / 8, octet >> 2);
      }
    }
  }

  // `side`: of the tile's first key.
  template <int bits, bool kWhole>
  __device__ __forceinline__ void expand(const AttentionCall &call, uint8_t *side) const {
    with_halves<bits, kWhole>(call.head_dim_v, [&](auto halves) { expand_pieces<bits, halves>(call, side); });
  }

 private:
  template <int bits, bool kHalves>
  __device__ __forceinline__ void expand_pieces(const AttentionCall &call, uint8_t *side) const {
    const HalfTable table{{call.v_halves[0], call.v_halves[1]}, {call.v_halves[2], call.v_halves[3]}};
    const int dim = call.head_dim_v, o = lane_index() % 4;  // the octet modulo 4
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int key = first_key(), octet = octet_of(i);
      if (8 * octet >= dim) continue;
      uint4 words = first[i], others = make_uint4(0, 0, 0, 0);
      if (bits == 8 || kHalves) {
        others = tokens_of(second[i]);
      } else if (bits < 4) {
        const uint4 ones = bits == 2 ? second[i]
                                     : make_uint4(ones_of(second[i].x, o), ones_of(second[i].y, o),
                                                  ones_of(second[i].z, o), ones_of(second[i].w, o));
        words = make_uint4(indices_of<bits>(words.x, ones.x, o), indices_of<bits>(words.y, ones.y, o),
                           indices_of<bits>(words.z, ones.z, o), indices_of<bits>(words.w, ones.w, o));
      }
      words = tokens_of(words);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint32_t word = word_of(words, t), other = word_of(others, t);
        uint4 levels;
        if (bits == 8) {
          levels = levels_of_bytes(word, other);
        } else if (bits == 4) {
          levels = levels_of(table, word & 0x77777777, word);
        } else if (kHalves) {
          const uint32_t ones = 8 * octet >= (dim & ~31) ? ones_of_half(other, o) : ones_of(other, o);
          levels = levels_of(table, indices_of<bits>(word, ones, o), 0);
        } else {
          levels = levels_of(table, word, 0);
        }
        *reinterpret_cast<uint4 *>(chunk_at<Shape>(side, key + t, octet)) = levels;
      }
    }
  }
};

// Rows of 16-bit numbers, of lanes 0 .. 15. Keys without a place become zeros.
template <class Shape>
__device__ __forceinline__ void copy_rows(const uint8_t *row, int dim, bool aligned, uint8_t *side) {
  constexpr int kChunks = Shape::kDim / 8;
#pragma unroll 4
  for (int i = 0; i < kTileTokens * kChunks / 32; ++i) {
    const int x = 32 * i + lane_index(), key = x / kChunks, chunk = x % kChunks;
    const uint8_t *from = pointer_of_lane(row, key);
    if (8 * chunk >= dim) continue;
    uint8_t *to = chunk_at<Shape>(side, key, chunk);
    if (aligned) {
      async_copy(to, from != nullptr ? from + 16 * chunk : to, from == nullptr);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8; ++e) {
        reinterpret_cast<uint16_t *>(to)[e] =
            from != nullptr ? reinterpret_cast<const uint16_t *>(from)[8 * chunk + e] : uint16_t(0);
      }
    }
  }
}

// The tiles that a maker makes for a block's items, one after the other: kMakerTiles of every step. kCoded: no side of
// pages is raw.
template <class Shape, bool kCoded>
class MakerTiles {
 public:
  // `item`: of the maker's own, in shared memory; `no_tile`: as for find_place().
  __device__ MakerTiles(const AttentionCall &call, int maker, WideItem *item, const uint8_t *no_tile)
      : call_(call),
        maker_(maker),
        item_(item),
        no_tile_(no_tile),
        next_slot_(call.block_items[blockIdx.x].first),
        end_slot_(next_slot_ + call.block_items[blockIdx.x].count),
        tiles_(uint32_t(max(call.pool.block_size / kTileTokens, 1))),
        reciprocal_(0xffffffff / tiles_ + 1) {}

  // The next one; false: there is none.
  __device__ __forceinline__ bool find(KeyPlace &place) {
    constexpr int kStep = kMakers * kTileTokens;
    first_ += kStep;
    if (first_ >= end_ && !begin_item()) return false;
    if (first_ < plain_low_ || first_ + kTileTokens > plain_high_ || !find_plain(first_ + kStep, place)) {
      place = find_place(call_, *item_, first_, first_ + kStep, no_tile_, next_);
    }
    return true;
  }

 private:
  __device__ __forceinline__ bool begin_item() {
    WideItem wide;
    do {
      if (next_slot_ >= end_slot_) return false;
    } while (!read_item(call_, next_slot_++, int32_t(blockIdx.x), wide));
    __syncwarp();  // the item before has been read
    if (lane_index() == 0) *item_ = wide;
    __syncwarp();
    next_.key = -1;
    first_ = (wide.item.first_tile + maker_) * kTileTokens;
    end_ = wide.item.first_tile * kTileTokens + wide.steps(Shape::kStageKeys) * Shape::kStageKeys;
    const bool plain = wide.is_new == 0 && wide.sequence.exact_table == nullptr && call_.q_positions == nullptr &&
                       call_.pool.block_size >= kTileTokens;
    plain_low_ = plain ? wide.low : INT32_MAX, plain_high_ = wide.high;
    base_ = call_.pool.base + wide.item.head_pack * call_.pool.head_stride;
    return true;
  }

  __device__ __forceinline__ uint32_t block_of(uint32_t tile) const {
    return tiles_ == 1 ? tile : __umulhi(tile, reciprocal_);  // tiles_ is at most 16, `tile` less than 2^28
  }

  // As find_place() for a tile of which every key is seen; false where its block's id is bad.
  __device__ __forceinline__ bool find_plain(int next_first, KeyPlace &place) {
    const int row = lane_index() % kTileTokens;
    const uint32_t tile = uint32_t(first_) / kTileTokens, block = block_of(tile);
    const int32_t *table = item_->sequence.table;
    const int32_t id = next_.key == first_ + row ? next_.id : table[block];
    if (id < 0 || id >= call_.pool.num_blocks) return false;
    const uint8_t *at = base_ + id * call_.pool.block_stride + (tile - block * tiles_) * call_.pool.tile_stride;
    place.row = row;
    place.shown = 0xffff;
    place.is_new = false, place.one_tile = true;
    point_to<kCoded>(call_, at, true, place);
    next_.key = -1;
    if (next_first + row < plain_high_) {
      next_.key = next_first + row;
      next_.id = table[block_of(uint32_t(next_first) / kTileTokens)];
    }
    return true;
  }

  const AttentionCall &call_;
  const int maker_;
  WideItem *const item_;
  const uint8_t *const no_tile_;
  int32_t next_slot_;
  const int32_t end_slot_;
  const uint32_t tiles_, reciprocal_;  // of a block; 2^32 divided by that, rounded up
  int32_t first_ = 0, end_ = 0;        // the tile's first key; after the item's last
  int32_t plain_low_ = 0, plain_high_ = 0;
  const uint8_t *base_ = nullptr;  // of the item's kv head in the pool
  NextBlock next_;
};

// A tile in registers of its maker. Bits: of every tile of pages, whose head_dims are multiples of 32, or 0. Where they are
// not fixed, what is loaded may be waited for to be moved.
template <class Shape, int kBitsK, int kBitsV>
struct TileCodes {
  KeyPlace place;
  KeyCodes<Shape> keys;
  ValueCodes<Shape> values;

  __device__ __forceinline__ void load(const AttentionCall &call) {
    if (place.is_new) return;
    if (kBitsK != 0 || call.k_bits != kRawBits) {
      with_bits<kBitsK>(call.k_bits, [&](auto bits) { keys.template load<bits, kBitsK != 0>(call, place); });
    }
    if (kBitsV != 0 || call.v_bits != kRawBits) {
      with_bits<kBitsV>(call.v_bits, [&](auto bits) { values.template load<bits, kBitsV != 0>(call, place); });
    }
  }

  // `first`: the number of the tile's first key in the stage.
  __device__ __forceinline__ void expand(const AttentionCall &call, int first, StageKeys<Shape> &described,
                                         uint8_t *k_side, uint8_t *v_side) const {
    const int lane = lane_index();
    const bool of_k = lane < kTileTokens;
    const bool raw =
        place.is_new || (of_k ? kBitsK == 0 && call.k_bits == kRawBits : kBitsV == 0 && call.v_bits == kRawBits);
    float scale = raw ? 1.0f : scale_from_bits(of_k ? call.k_scale_type : call.v_scale_type, place.scale);
    if ((place.shown >> lane % kTileTokens & 1) == 0) scale = 0;
    float most = scale;
#pragma unroll
    for (int step = 1; step < kTileTokens; step *= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, step));
    (of_k ? described.k_scale : described.v_scale)[first + lane % kTileTokens] = scale;
    if (lane == kTileTokens) {
      described.shown[first / kTileTokens] = place.shown;
      described.exponent[first / kTileTokens] = float((__float_as_uint(most) >> 23 & 0xff)) - 126.0f;
    }
    k_side += 16 * first, v_side += 16 * first;
    if (place.is_new || (kBitsK == 0 && call.k_bits == kRawBits)) {
      copy_rows<Shape>(place.k, call.head_dim_k, !place.is_new || call.k_new.aligned != 0, k_side);
    } else {
      with_bits<kBitsK>(call.k_bits, [&](auto bits) { keys.template expand<bits, kBitsK != 0>(call, k_side); });
    }
    if (place.is_new || (kBitsV == 0 && call.v_bits == kRawBits)) {
      copy_rows<Shape>(place.v, call.head_dim_v, !place.is_new || call.v_new.aligned != 0, v_side);
    } else {
      with_bits<kBitsV>(call.v_bits, [&](auto bits) { values.template expand<bits, kBitsV != 0>(call, v_side); });
    }
  }
};

// Codes are loaded a tile before they are expanded, and a block's id a tile before that: nothing here waits for memory.
template <class Shape, int kBitsK, int kBitsV>
__device__ __forceinline__ void make_stages_of(const AttentionCall &call, const WideMemory &memory, uint8_t *stages,
                                               WideShared<Shape> &shared) {
  const int maker = warp_index() - Shape::kConsumers;
  // Not the stages where it can be avoided: others write there.
  const uint8_t *no_tile = call.pool.num_blocks > 0 ? call.pool.base : stages;
  MakerTiles<Shape, kBitsK != 0> tiles(call, maker, &shared.items[maker], no_tile);
  int stage = 0, in_stage = 0;
  uint32_t parity = 0;
  TileCodes<Shape, kBitsK, kBitsV> codes;
  bool more = tiles.find(codes.place);
  if (more) codes.load(call);
#pragma unroll 1
  while (more) {
    TileCodes<Shape, kBitsK, kBitsV> next;
    more = tiles.find(next.place);
    if (more) next.load(call);
    barrier_wait(&shared.empty[stage], parity ^ 1);
    uint8_t *k_side = stages + stage * 2 * Shape::kSideBytes;
    codes.expand(call, (in_stage * kMakers + maker) * kTileTokens, shared.keys[stage], k_side,
                 k_side + Shape::kSideBytes);
    codes = next;
    if (++in_stage < Shape::kMakerTiles) continue;
    if constexpr (Shape::kMany && kHasWgmma) wgmma_memory_fence();
    barrier_arrive(&shared.full[stage]);
    barrier_arrive_copied(&shared.full[stage]);
    in_stage = 0;
    if (++stage == memory.stages) stage = 0, parity ^= 1;
  }
}

template <class Shape>
__device__ __forceinline__ void make_stages(const AttentionCall &call, const WideMemory &memory, uint8_t *stages,
                                            WideShared<Shape> &shared) {
  const int bits = call.k_bits == call.v_bits && (call.head_dim_k | call.head_dim_v) % 32 == 0 ? call.k_bits : 0;
  if (Shape::kMany && bits == 4) {
    make_stages_of<Shape, 4, 4>(call, memory, stages, shared);
  } else if (Shape::kMany && bits == 3) {
    make_stages_of<Shape, 3, 3>(call, memory, stages, shared);
  } else if (Shape::kMany && bits == 2) {
    make_stages_of<Shape, 2, 2>(call, memory, stages, shared);
  } else {
    make_stages_of<Shape, 0, 0>(call, memory, stages, shared);
  }
}

// ---- consuming them

// The 16 rows of a warp. Lane 4 g + q has rows g and g + 8, of each stage keys 8 n + 2 q and the next.
template <class Shape>
class WideRows {
 public:
  static constexpr int kKeyTiles = Shape::kKeys / 8, kValueTiles = Shape::kDim / 8;
  static constexpr bool kWarpgroup = Shape::kMany && kHasWgmma;

  // `queries`: of the warp's warpgroup, or of all, in shared memory.
  __device__ WideRows(const AttentionCall &call, uint8_t *queries, RowLimits *limits)
      : call_(call), queries_(queries), limits_(limits), lane_(lane_index()), g_(lane_ / 4), q_(lane_ % 4) {}

  // `first_row`: of the warp's in the segment.
  __device__ void begin(const WideItem &wide, int first_row) {
    is_new_ = wide.is_new != 0;
    k_bf16_ = (is_new_ ? call_.q.type : call_.query_type) == TQ_TYPE_BF16;
    v_raw_ = is_new_ || call_.v_bits == kRawBits;
    copied_ = v_raw_ || call_.k_bits == kRawBits;
    v_bf16_ = v_raw_ && (is_new_ ? call_.v_new.type : call_.raw_type) == TQ_TYPE_BF16;
    query_parts_ = is_new_ ? 1 : call_.query_parts;
    adjusted_ = call_.soft_cap > 0 || call_.alibi_slopes != nullptr;
    const Sequence &sequence = wide.sequence;
    __syncwarp();  // all lanes have read the limits of the item before
    const int base = is_new_ ? sequence.coded_length : 0;
    int plain_low = INT32_MIN, plain_high = INT32_MAX, low = INT32_MAX, high = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + g_ + 8 * i,
                token = wide.item.token_block * call_.block_tokens + row / call_.block_heads;
      const int in_group = wide.item.head_part * call_.block_heads + row % call_.block_heads;
      RowLimits limits{wide.low, wide.high, 0, 0, 0};
      gain_[i] = 0;
      reference_[i] = -INFINITY;
      sum_[i] = 0;
      if (row < call_.block_tokens * call_.block_heads && token < sequence.q_len && in_group < call_.group) {
        const int head = wide.item.head_pack * call_.group + in_group, at = position(call_, sequence, token);
        const KeyRange keys = visible_keys(call_, sequence, at);
        limits.low = max(keys.low - base, wide.low);
        limits.high = min(keys.high - base, wide.high);
        plain_low = max(plain_low, limits.low);
        plain_high = min(plain_high, limits.high);
        low = min(low, limits.low);
        high = max(high, limits.high);
        const QueryRow &query = call_.query_rows[int64_t{sequence.begin + token} * call_.q_heads + head];
        gain_[i] = is_new_ ? call_.new_gain : query.gain;
        if (!is_new_) limits.offset = query.offset;
        if (call_.alibi_slopes != nullptr) limits.slope = call_.alibi_slopes[head] * kLog2E;
        limits.shift = base - at;
      }
      if (q_ == 0) limits_[g_ + 8 * i] = limits;
    }
    __syncwarp();
#pragma unroll
    for (int lane = 4; lane < 32; lane *= 2) {
      plain_low = max(plain_low, __shfl_xor_sync(kAll, plain_low, lane));
      plain_high = min(plain_high, __shfl_xor_sync(kAll, plain_high, lane));
      low = min(low, __shfl_xor_sync(kAll, low, lane));
      high = max(high, __shfl_xor_sync(kAll, high, lane));
    }
    ranges_ = {plain_low, plain_high, low, high};
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[n][i] = 0;
    }
  }

  __device__ const RowRanges &ranges() const {
    return ranges_;
  }

  // Of now on ranges are those of all rows of the warpgroup, whose warps have these.
  __device__ void join(const RowRanges *of_warps) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const RowRanges other = of_warps[i];
      ranges_.plain_low = max(ranges_.plain_low, other.plain_low);
      ranges_.plain_high = min(ranges_.plain_high, other.plain_high);
      ranges_.low = min(ranges_.low, other.low);
      ranges_.high = max(ranges_.high, other.high);
    }
  }

  // Copies rows [first, end) of those in shared memory, which are the segment's from `first_row` on.
  __device__ void load_queries(const WideItem &wide, int first_row, int first, int end) {
    constexpr int chunks = Shape::kDim / 8;
    const int parts = query_parts_, part_bytes = 2 * call_.head_dim_k;
    const uint8_t *from = is_new_ ? call_.new_operands : call_.query_operands;
    for (int x = first * chunks * parts + lane_; x < end * chunks * parts; x += 32) {
      const int row = x / (chunks * parts), in_row = x % (chunks * parts), part = in_row / chunks,
                chunk = in_row % chunks;
      const int in_segment = first_row + row,
                token = wide.item.token_block * call_.block_tokens + in_segment / call_.block_heads;
      const int in_group = wide.item.head_part * call_.block_heads + in_segment % call_.block_heads;
      uint4 value = make_uint4(0, 0, 0, 0);
      if (in_segment < call_.block_tokens * call_.block_heads && token < wide.sequence.q_len &&
          in_group < call_.group && 16 * chunk < part_bytes) {
        const int64_t at =
            int64_t{wide.sequence.begin + token} * call_.q_heads + wide.item.head_pack * call_.group + in_group;
        value = *reinterpret_cast<const uint4 *>(from + (at * parts + part) * part_bytes + 16 * chunk);
      }
      *reinterpret_cast<uint4 *>(queries_ + part * Shape::kQueryPartBytes + chunk * Shape::kQueryChunkBytes +
                                 16 * row) = value;
    }
  }

  // The warp's keys of a stage, from key `first` of the item's on: sides of K and V from the first of them on, and what is
  // known of them. Warps of a warpgroup come here together.
  __device__ void step(const uint8_t *k_side, const uint8_t *v_side, const StageKeys<Shape> &keys, int in_stage,
                       int first) {
    if (first >= ranges_.high || first + Shape::kKeys <= ranges_.low) return;
    float s[kKeyTiles][4];
    const uint32_t k = shared_address(k_side), v = shared_address(v_side);
    if (kWarpgroup && copied_) wgmma_memory_fence();
    if (k_bf16_) {
      score<true>(k, s);
    } else {
      score<false>(k, s);
    }
    const bool all =
        first >= ranges_.plain_low && first + Shape::kKeys <= ranges_.plain_high && all_shown(keys, in_stage);
    uint32_t seen = ~0u;  // bit 4 n + i of s[n][i]
    float scale[2];
    if (all && !adjusted_) {
      weigh(keys, in_stage, s, scale);
    } else {
      seen = adjust(keys, in_stage, first, s);
      scale[0] = scale[1] = 1;
    }
    if (v_bf16_) {
      if (all) {
        add<true, true>(v, keys, in_stage, s, scale, seen);
      } else {
        add<true, false>(v, keys, in_stage, s, scale, seen);
      }
    } else if (all) {
      add<false, true>(v, keys, in_stage, s, scale, seen);
    } else {
      add<false, false>(v, keys, in_stage, s, scale, seen);
    }
  }

  // The row's reference and sum as a partial result has them; by the lanes of a row together.
  __device__ float2 state(int i) const {
    float sum = sum_[i];
    sum += __shfl_xor_sync(kAll, sum, 1);
    sum += __shfl_xor_sync(kAll, sum, 2);
    return make_float2(reference_[i] + (adjusted_ ? 0.0f : limits_[g_ + 8 * i].offset), sum);
  }

  float out_[kValueTiles][4];
  float reference_[2];

 private:
  __device__ static bool all_shown(const StageKeys<Shape> &keys, int in_stage) {
    uint32_t shown = 0xffff;
#pragma unroll
    for (int i = 0; i < Shape::kKeys / 16; ++i) shown &= keys.shown[in_stage / 16 + i];
    return shown == 0xffff;
  }

  template <bool kBf16>
  __device__ __forceinline__ void score(uint32_t k, float (&s)[kKeyTiles][4]) const {
    const uint32_t queries = shared_address(queries_);
    if constexpr (kWarpgroup) {
      float(&sums)[4 * kKeyTiles] = reinterpret_cast<float(&)[4 * kKeyTiles]>(s);
      constexpr int kQueryStep = 2 * Shape::kQueryChunkBytes, kStep = 2 * Shape::kChunkBytes;  // 16 channels
      const uint64_t a = wgmma_descriptor(queries, Shape::kQueryChunkBytes, 128);
      const uint64_t b = wgmma_descriptor(k, Shape::kChunkBytes, 128);
      wgmma_fence();
      wgmma_m64n64k16_shared<kBf16, true>(sums, a, b);
#pragma unroll
      for (int c = 1; c < Shape::kDim / 16; ++c) {
        wgmma_m64n64k16_shared<kBf16, false>(sums, a + c * kQueryStep / 16, b + c * kStep / 16);
      }
      wgmma_commit();
      wgmma_wait<0>(sums);
      if (query_parts_ == 2) {
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < Shape::kDim / 16; ++c) {
          wgmma_m64n64k16_shared<kBf16, false>(sums, a + (Shape::kQueryPartBytes + c * kQueryStep) / 16,
                                               b + c * kStep / 16);
        }
        wgmma_commit();
        wgmma_wait<0>(sums);
      }
    } else {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = 0;
      }
      const uint32_t k_lane = k + uint32_t(lane_ / 8 % 2 * Shape::kChunkBytes + (lane_ / 16 * 8 + lane_ % 8) * 16);
      const int warp_row = Shape::kMany ? warp_index() % 4 * 16 : 0;
      uint32_t q_lane = queries + uint32_t(lane_ / 16 * Shape::kQueryChunkBytes + (warp_row + lane_ % 16) * 16);
#pragma unroll 1
      for (int part = 0; part < query_parts_; ++part, q_lane += Shape::kQueryPartBytes) {
#pragma unroll
        for (int c = 0; c < Shape::kDim / 16; ++c) {
          uint32_t a[4];
          load_matrices(a, q_lane + uint32_t(2 * c * Shape::kQueryChunkBytes));
#pragma unroll
          for (int n = 0; n < kKeyTiles; n += 2) {
            uint32_t b[4];
            load_matrices(b, k_lane + uint32_t(2 * c * Shape::kChunkBytes + 128 * n));
            mma_add_m16n8k16<kBf16>(s[n], a, b[0], b[1]);
            mma_add_m16n8k16<kBf16>(s[n + 1], a, b[2], b[3]);
          }
        }
      }
    }
  }

  // New references where `most` of log2 of the weights asks for them; a lane's of both rows.
  __device__ __forceinline__ void raise(float (&most)[2]) {
    constexpr float kMost = 15.5f, kChosen = 12.0f;
    bool passed = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = fmaxf(most[i], __shfl_xor_sync(kAll, most[i], 1));
      most[i] = fmaxf(most[i], __shfl_xor_sync(kAll, most[i], 2));
      passed = passed || most[i] - reference_[i] > kMost;  // false for two infinities
    }
    if (!__any_sync(kAll, passed)) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!(most[i] - reference_[i] > kMost)) continue;
      const float reference = most[i] - kChosen, keep = exp2_approx(reference_[i] - reference);
      reference_[i] = reference;
      sum_[i] *= keep;
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n) out_[n][2 * i] *= keep, out_[n][2 * i + 1] *= keep;
    }
    __syncwarp();  // products are taken by the warp together
  }

  __device__ static float2 scales_of(const float *scales, int in_stage, int n, int q) {
    return *reinterpret_cast<const float2 *>(scales + in_stage + 8 * n + 2 * q);
  }

  // Scores become x / scale[row], where every row sees every key.
  __device__ __forceinline__ void weigh(const StageKeys<Shape> &keys, int in_stage, float (&s)[kKeyTiles][4],
                                        float (&scale)[2]) {
    float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      const float2 k_scale = scales_of(keys.k_scale, in_stage, n, q_);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] *= i % 2 == 0 ? k_scale.x : k_scale.y;
        most[i / 2] = fmaxf(most[i / 2], s[n][i]);
      }
    }
    float exponent = keys.exponent[in_stage / 16];
#pragma unroll
    for (int i = 1; i < Shape::kKeys / 16; ++i) exponent = fmaxf(exponent, keys.exponent[in_stage / 16 + i]);
    exponent = clamp_exponent(exponent);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[i] = gain_[i];
      most[i] = __fmaf_rn(most[i], gain_[i], exponent);
    }
    raise(most);
  }

  // Scales outside of these would take sums of weights out of f32.
  __device__ static float clamp_exponent(float exponent) {
    return fminf(fmaxf(exponent, -90.0f), 100.0f);
  }

  // Scores become x with all that changes or hides scores; gives what is seen.
  __device__ __forceinline__ uint32_t adjust(const StageKeys<Shape> &keys, int in_stage, int first,
                                             float (&s)[kKeyTiles][4]) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      const float2 k_scale = scales_of(keys.k_scale, in_stage, n, q_);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= (i % 2 == 0 ? k_scale.x : k_scale.y) * gain_[i / 2];
    }
    const RowLimits limits[2] = {limits_[g_], limits_[g_ + 8]};
    if (adjusted_) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] += limits[i / 2].offset;
      }
    }
    if (call_.soft_cap > 0) {  // cap * tanh(x / cap)
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float power = exp2_approx(s[n][i] * call_.cap_factor);
          s[n][i] = call_.cap_log2 * (1.0f - 2.0f * reciprocal_approx(1.0f + power));
        }
      }
    }
    const int key = first + 2 * q_;
    if (call_.alibi_slopes != nullptr) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[n][i] = __fmaf_rn(limits[i / 2].slope, float(key + 8 * n + i % 2 + limits[i / 2].shift), s[n][i]);
        }
      }
    }
    float most[2] = {-INFINITY, -INFINITY}, v_most[2] = {0, 0};
    uint32_t seen = 0;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      const float2 v_scale = scales_of(keys.v_scale, in_stage, n, q_);
      const uint32_t shown = keys.shown[in_stage / 16 + n / 2] >> (8 * (n % 2) + 2 * q_);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i / 2, at = key + 8 * n + i % 2;
        const bool sees = at >= limits[row].low && at < limits[row].high && (shown >> (i % 2) & 1) != 0;
        s[n][i] = sees ? s[n][i] : -INFINITY;
        seen |= sees ? 1u << (4 * n + i) : 0u;
        most[row] = fmaxf(most[row], s[n][i]);
        v_most[row] = fmaxf(v_most[row], !sees ? 0.0f : i % 2 == 0 ? v_scale.x : v_scale.y);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v_most[i] = fmaxf(v_most[i], __shfl_xor_sync(kAll, v_most[i], 1));
      v_most[i] = fmaxf(v_most[i], __shfl_xor_sync(kAll, v_most[i], 2));
      most[i] += clamp_exponent(float(__float_as_uint(v_most[i]) >> 23 & 0xff) - 126.0f);
    }
    raise(most);
    return seen;
  }

  // Weights of keys 16 m .. 16 m + 15, in the order of an operand.
  template <bool kPlain>
  __device__ __forceinline__ void weigh_keys(const StageKeys<Shape> &keys, int in_stage, const float (&s)[kKeyTiles][4],
                                             const float (&scale)[2], const float (&reference)[2], uint32_t seen, int m,
                                             float (&w)[8], bool summed = true) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float2 v_scale = scales_of(keys.v_scale, in_stage, 2 * m + j, q_);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float p = exp2_approx(__fmaf_rn(s[2 * m + j][i], scale[i / 2], reference[i / 2]));
        if (summed) sum_[i / 2] += p;
        w[4 * j + i] = p * (i % 2 == 0 ? v_scale.x : v_scale.y);
        if (!kPlain && (seen >> (4 * (2 * m + j) + i) & 1) == 0) w[4 * j + i] = 0;  // the scale may be anything
      }
    }
  }

  template <bool kBf16>
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    return kBf16 ? pack_bf16(low, high) : pack_f16(low, high);
  }

  // What packing left of two numbers.
  template <bool kBf16>
  __device__ __forceinline__ static uint32_t pack_rest(float low, float high, uint32_t packed) {
    float packed_low, packed_high;
    if (kBf16) {
      packed_low = __uint_as_float(packed << 16), packed_high = __uint_as_float(packed & 0xffff0000);
    } else {
      f32_pair_from_f16(packed, packed_low, packed_high);
    }
    return pack<kBf16>(low - packed_low, high - packed_high);
  }

  // Adds weights times values.
  template <bool kBf16, bool kPlain>
  __device__ __forceinline__ void add(uint32_t v, const StageKeys<Shape> &keys, int in_stage,
                                      const float (&s)[kKeyTiles][4], const float (&scale)[2], uint32_t seen) {
    float reference[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) reference[i] = reference_[i] == -INFINITY ? 0.0f : -reference_[i];
    const int parts = kBf16 ? 2 : call_.weight_parts;
    if constexpr (kWarpgroup && kPlain) {
      add_together<kBf16, kPlain>(v, keys, in_stage, s, scale, reference, seen, parts);
    } else if (kWarpgroup && !v_raw_) {
      add_together<kBf16, kPlain>(v, keys, in_stage, s, scale, reference, seen, parts);
    } else {
      add_alone<kBf16, kPlain>(v, keys, in_stage, s, scale, reference, seen, parts);
    }
  }

  // By the warp.
  template <bool kBf16, bool kPlain>
  __device__ __forceinline__ void add_alone(uint32_t v, const StageKeys<Shape> &keys, int in_stage,
                                            const float (&s)[kKeyTiles][4], const float (&scale)[2],
                                            const float (&reference)[2], uint32_t seen, int parts) {
#pragma unroll
    for (int m = 0; m < kKeyTiles / 2; ++m) {
      float w[8];
      weigh_keys<kPlain>(keys, in_stage, s, scale, reference, seen, m, w);
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = pack<kBf16>(w[2 * i], w[2 * i + 1]);
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        if (part == 1) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = pack_rest<kBf16>(w[2 * i], w[2 * i + 1], a[i]);
        }
        multiply<kBf16, kPlain>(a, v, m, seen);
      }
    }
  }

  // By the warpgroup.
  template <bool kBf16, bool kPlain>
  __device__ __forceinline__ void add_together(uint32_t v, const StageKeys<Shape> &keys, int in_stage,
                                               const float (&s)[kKeyTiles][4], const float (&scale)[2],
                                               const float (&reference)[2], uint32_t seen, int parts) {
    uint32_t a[kKeyTiles / 2][4];
#pragma unroll
    for (int m = 0; m < kKeyTiles / 2; ++m) {
      float w[8];
      weigh_keys<kPlain>(keys, in_stage, s, scale, reference, seen, m, w);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = pack<kBf16>(w[2 * i], w[2 * i + 1]);
    }
    float(&out)[4 * kValueTiles] = reinterpret_cast<float(&)[4 * kValueTiles]>(out_);
    const uint64_t b = wgmma_descriptor(v, 128, Shape::kChunkBytes);
    wgmma_fence();
#pragma unroll
    for (int m = 0; m < kKeyTiles / 2; ++m) {
      wgmma_m64k16_transposed<kBf16, Shape::kDim>(out, a[m], b + m * 256 / 16);
    }
    wgmma_commit();
    wgmma_wait<0>(out);
    if (parts == 2) {
#pragma unroll
      for (int m = 0; m < kKeyTiles / 2; ++m) {
        float w[8];
        weigh_keys<kPlain>(keys, in_stage, s, scale, reference, seen, m, w, false);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = pack_rest<kBf16>(w[2 * i], w[2 * i + 1], a[m][i]);
      }
      wgmma_fence();
#pragma unroll
      for (int m = 0; m < kKeyTiles / 2; ++m) {
        wgmma_m64k16_transposed<kBf16, Shape::kDim>(out, a[m], b + m * 256 / 16);
      }
      wgmma_commit();
      wgmma_wait<0>(out);
    }
  }

  // With weights of keys 16 m .. 16 m + 15. Where some rows do not see some keys, a raw value that is no finite
  // number makes outputs NaN of rows that see it, and no others: it is taken out of the product, and counted by a product of
  // ones.
  template <bool kBf16, bool kPlain>
  __device__ __forceinline__ void multiply(const uint32_t (&a)[4], uint32_t v, int m, uint32_t seen) {
    constexpr uint32_t kOnes = kBf16 ? 0x3f803f80 : 0x3c003c00, kExponent = kBf16 ? 0x7f80 : 0x7c00;
    constexpr int kChunks = Shape::kDim / 16;
    uint32_t loaded[2][4];  // of this step and of the next
    const uint32_t v_rows = v + uint32_t(lane_ / 16 * Shape::kChunkBytes + (16 * m + lane_ % 16) * 16);
    load_matrices_transposed(loaded[0], v_rows);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      uint32_t(&b)[4] = loaded[c % 2];
      if (c + 1 < kChunks) {
        load_matrices_transposed(loaded[(c + 1) % 2], v_rows + uint32_t(2 * (c + 1) * Shape::kChunkBytes));
      }
      if (!kPlain && v_raw_) {
        uint32_t bad[4], any = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t low = (b[i] & kExponent) == kExponent ? 0xffff : 0;
          const uint32_t high = (b[i] >> 16 & kExponent) == kExponent ? 0xffff0000 : 0;
          bad[i] = low | high;
          b[i] &= ~bad[i];
          any |= bad[i];
        }
        if (__any_sync(kAll, any != 0)) {
          uint32_t ones[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {  // a[2 j + r]: s[2 m + j][2 r], [2 r + 1]
            const uint32_t bits = seen >> (4 * (2 * m + i / 2) + 2 * (i % 2));
            ones[i] = ((bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u)) & kOnes;
          }
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float count[4] = {0, 0, 0, 0};
            mma_add_m16n8k16<kBf16>(count, ones, bad[2 * j] & kOnes, bad[2 * j + 1] & kOnes);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (count[i] > 0) out_[2 * c + j][i] = __int_as_float(0x7fc00000);
            }
          }
        }
      }
      mma_add_m16n8k16<kBf16>(out_[2 * c], a, b[0], b[1]);
      mma_add_m16n8k16<kBf16>(out_[2 * c + 1], a, b[2], b[3]);
    }
  }

  const AttentionCall &call_;
  uint8_t *queries_;
  RowLimits *limits_;  // of the warp's rows, in shared memory
  const int lane_, g_, q_;

  // The item's.
  bool is_new_, k_bf16_, v_raw_, v_bf16_, copied_, adjusted_;
  int query_parts_;
  RowRanges ranges_;
  // Of the lane's rows.
  float gain_[2];

 public:
  float sum_[2];
};

// Where a segment's partial result goes.
struct WidePartial {
  float2 *states;
  float *outputs;

  __device__ WidePartial(const AttentionCall &call, int32_t slot_number) {
    uint8_t *slot = call.partials + slot_number * call.slot_bytes;
    states = reinterpret_cast<float2 *>(slot);
    outputs = reinterpret_cast<float *>(slot + partial_outputs(1, call.block_tokens * call.block_heads));
  }
};

// Rows of the warp's own.
template <class Shape>
__device__ __forceinline__ void write_rows(const AttentionCall &call, int32_t slot, int first_row,
                                           const WideRows<Shape> &rows) {
  const WidePartial partial(call, slot);
  const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + g + 8 * i;
    const float2 state = rows.state(i);
    if (row >= call.block_tokens * call.block_heads) continue;
    if (q == 0) partial.states[row] = state;
    float *to = partial.outputs + row * call.head_dim_v + 2 * q;
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; ++n) {
      if (8 * n >= call.head_dim_v) break;
      *reinterpret_cast<float2 *>(to + 8 * n) = make_float2(rows.out_[n][2 * i], rows.out_[n][2 * i + 1]);
    }
  }
}

// Rows that all consumers have, of different keys; added up in their order in the memory of queries.
template <class Shape>
__device__ __forceinline__ void write_shared_rows(const AttentionCall &call, int32_t slot, int warp,
                                                  WideRows<Shape> &rows, WideShared<Shape> &shared, uint8_t *memory) {
  const WidePartial partial(call, slot);
  const int g = lane_index() / 4, q = lane_index() % 4;
  float *sums = reinterpret_cast<float *>(memory);
  float2 own[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    own[i] = rows.state(i);
    if (q == 0) shared.references[warp][g + 8 * i] = own[i].x;
  }
  group_barrier(kConsumerBarrier, 32 * Shape::kConsumers);
  float most[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    most[i] = -INFINITY;
    for (int w = 0; w < Shape::kKeyWarps; ++w) most[i] = fmaxf(most[i], shared.references[w][g + 8 * i]);
    // A sum that is NaN without a reference stays one.
    const float factor = own[i].x == most[i] ? 1.0f : exp2_approx(own[i].x - most[i]);
    own[i].y *= factor;
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; ++n) rows.out_[n][2 * i] *= factor, rows.out_[n][2 * i + 1] *= factor;
  }
#pragma unroll 1
  for (int w = 0; w < Shape::kKeyWarps; ++w) {
    if (w == warp) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = g + 8 * i;
        if (q == 0) shared.sums[row] = w == 0 ? own[i].y : shared.sums[row] + own[i].y;
        float2 *to = reinterpret_cast<float2 *>(sums + row * Shape::kDim) + q;
#pragma unroll
        for (int n = 0; n < Shape::kDim / 8; ++n) {
          float2 sum = make_float2(rows.out_[n][2 * i], rows.out_[n][2 * i + 1]);
          if (w > 0) {
            const float2 before = to[4 * n];
            sum.x += before.x, sum.y += before.y;
          }
          to[4 * n] = sum;
        }
      }
    }
    group_barrier(kConsumerBarrier, 32 * Shape::kConsumers);
  }
  const int count = call.block_tokens * call.block_heads, chunks = call.head_dim_v / 4;
  for (int x = int(threadIdx.x); x < count * chunks; x += 32 * Shape::kConsumers) {
    const int row = x / chunks, chunk = x % chunks;
    reinterpret_cast<float4 *>(partial.outputs)[x] = reinterpret_cast<const float4 *>(sums + row * Shape::kDim)[chunk];
  }
  if (warp == 0 && q == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (g + 8 * i < count) partial.states[g + 8 * i] = make_float2(most[i], shared.sums[g + 8 * i]);
    }
  }
}

template <class Shape>
__device__ __forceinline__ void consume_stages(const AttentionCall &call, const WideMemory &memory, uint8_t *queries,
                                               const uint8_t *stages, WideShared<Shape> &shared) {
  const int warp = warp_index(), lane = lane_index();
  const int first_row = Shape::kMany ? 16 * warp : 0, in_stage = Shape::kMany ? 0 : warp * Shape::kKeys;
  const int group = first_row / Shape::kQueryRows, in_group = first_row % Shape::kQueryRows;
  WideRows<Shape> rows(call, queries + group * 2 * Shape::kQueryPartBytes, shared.limits[warp]);
  const BlockItems block = call.block_items[blockIdx.x];
  int stage = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int32_t slot = block.first; slot < block.first + block.count; ++slot) {
    WideItem wide;
    if (!read_item(call, slot, int32_t(blockIdx.x), wide)) continue;
    rows.begin(wide, first_row);
    if constexpr (Shape::kMany) {
      group_barrier(kWarpgroupBarrier + group, 128);  // the queries and ranges there have been read
      rows.load_queries(wide, group * Shape::kQueryRows, in_group, in_group + 16);
      if (lane == 0) shared.ranges[warp] = rows.ranges();
      if constexpr (kHasWgmma) wgmma_memory_fence();
      group_barrier(kWarpgroupBarrier + group, 128);
      rows.join(shared.ranges + 4 * group);
    } else {
      constexpr int kEach = 16 / Shape::kKeyWarps;
      group_barrier(kConsumerBarrier, 32 * Shape::kConsumers);  // what was added up there has been read
      rows.load_queries(wide, 0, kEach * warp, kEach * (warp + 1));
      group_barrier(kConsumerBarrier, 32 * Shape::kConsumers);
    }
    const int steps = wide.steps(Shape::kStageKeys);
    int first = wide.item.first_tile * kTileTokens + in_stage;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, first += Shape::kStageKeys) {
      barrier_wait(&shared.full[stage], parity);
      const uint8_t *k_side = stages + stage * 2 * Shape::kSideBytes + 16 * in_stage;
      rows.step(k_side, k_side + Shape::kSideBytes, shared.keys[stage], in_stage, first);
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.empty[stage]);
      if (++stage == memory.stages) stage = 0, parity ^= 1;
    }
    if constexpr (Shape::kMany) {
      write_rows<Shape>(call, slot, first_row, rows);
    } else {
      write_shared_rows<Shape>(call, slot, warp, rows, shared, queries);
    }
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_wide_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ WideMemory memory) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint8_t *bytes = static_cast<uint8_t *>(dynamic_shared());
  uint8_t *stages = bytes + memory.stages_at;
  WideShared<Shape> &shared = *reinterpret_cast<WideShared<Shape> *>(bytes + memory.shared_at);
  if (int(threadIdx.x) < memory.stages) {
    barrier_init(&shared.full[threadIdx.x], 2 * kMakerThreads);
    barrier_init(&shared.empty[threadIdx.x], Shape::kConsumers);
  }
  barrier_init_fence();
  if (call.head_dim_k < Shape::kDim) {  // channels that nobody writes; those of queries are zeros, too
    for (int at = 16 * int(threadIdx.x); at < memory.stages * 2 * Shape::kSideBytes; at += 16 * Shape::kThreads) {
      *reinterpret_cast<uint4 *>(stages + at) = make_uint4(0, 0, 0, 0);
    }
    if constexpr (Shape::kMany && kHasWgmma) wgmma_memory_fence();
  }
  __syncthreads();
  grid_dependency_wait();
  if (int(threadIdx.x) >= 32 * Shape::kConsumers) {
    make_stages<Shape>(call, memory, stages, shared);
  } else {
    consume_stages<Shape>(call, memory, bytes, stages, shared);
  }
#endif
}

// ---- starting it

template <int kDim, bool kMany>
int load_wide() {
  using Shape = WideShape<kDim, kMany>;
  cudaFuncAttributes attributes;
  if (const int error = cudaFuncGetAttributes(&attributes, attention_wide_kernel<Shape>)) return error;
  return cudaFuncSetAttribute(attention_wide_kernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kWideSharedBytes);
}

template <int kDim, bool kMany>
int launch_wide(const AttentionCall &call, void *stream) {
  using Shape = WideShape<kDim, kMany>;
  constexpr int kStageBytes = 2 * Shape::kSideBytes;
  constexpr int kOthers = Shape::kQueryBytes + int(sizeof(WideShared<Shape>));
  static_assert(kOthers + 2 * kStageBytes <= kWideSharedBytes);
  WideMemory memory{};
  memory.stages = std::min((kWideSharedBytes - kOthers) / kStageBytes, kMostWideStages);
  memory.stages_at = Shape::kQueryBytes;
  memory.shared_at = memory.stages_at + memory.stages * kStageBytes;
  return launch_dependent(attention_wide_kernel<Shape>, unsigned(call.blocks), unsigned(Shape::kThreads),
                          size_t(memory.shared_at) + sizeof(WideShared<Shape>), stream, call, memory);
}

}  // namespace tqkv::cuda
