// SPDX-License-Identifier: Apache-2.0
// The main kernel of paged attention: codes from pages, through shared memory, to both products on integer tensor
// cores. attention.hpp says what it is given and what it leaves.
//
// BLOCK. One a multiprocessor. Warps form teams of `pack_heads`, a warp a kv head; of an item's tiles (an item is a segment
// or a part of one) team i takes every teams-th from the i-th on. A team has its own ring of stages; a stage holds one tile
// of all its heads, adjacent in a page. Items are listed kMaxItems at a time, and a team's tiles of the list are numbered
// through: tile n is in stage n % stages. When the warps of a team have left tile n - 1, one of them, each in its turn,
// copies tile n - 1 + stages over it. That warp waits for the others' arrivals at tile n - 1, so it comes after the turn
// before.
//
// WARP. Lane = 4 g + q, as in operands.cuh. Row r of an item is a query; with kBlocks = 1 there are 4, rows g and g + 4 are
// copies, with 2 there are 8. A tile goes: scores (16-bit queries as two bytes), weights p = 2^(x - ref), products
// w = p * v_scale rounded to 16 bits, as two bytes again, and sums of w * level in integers. The scores of one tile are
// computed beside the sums of the one before.
//
// Sums of values. Four queries share one instruction's 8 columns: columns 0 .. 3 and 4 .. 7 see different halves of the A
// operand. Where levels come from a table (kPairs) its bytes are by turns of two channels, and weights of queries stand in
// even or odd bytes; else halves are tiles of V's operand.
//
// SCALE OF WEIGHTS. ref is a row's, chosen by the distribution of a tile's weights so that few later ones pass 2^16. When
// one does, or weights become so small on average that their rounding would show, sums go to memory as f32 ("flush") and
// ref is chosen anew.
#pragma once

#include <algorithm>

#include "kernels/attention.hpp"
#include "kernels/device/launch.cuh"
#include "kernels/device/operands.cuh"
#include "kernels/device/sequence.cuh"
#include "kernels/device/vector.cuh"

namespace tqkv::cuda {

inline constexpr int kFirstCheck = 8;  // tiles after which a warp first looks at its weights
inline constexpr int kMaxItems = 16, kMaxStages = 64;
inline constexpr int kBatch = 32, kTable = 4 * kBatch;   // tiles whose places are looked up at a time, and kept
inline constexpr int kAttentionSharedBytes = 227 << 10;  // of a block, from compute capability 9.0 on
inline constexpr float kMinusInfinity = -INFINITY;

// The dynamic shared memory: rings, then what each warp and team has, in bytes from the start.
struct AttentionRing {
  int32_t stages;       // of a team
  int32_t stage_bytes;  // a multiple of 128
  int32_t in_one_copy;  // the heads of a tile are adjacent
  int32_t scratch_at, rows_at, tables_at, shared_at;
};

struct ListedItem {
  AttentionItem item;
  Sequence sequence;
};

// A team's tiles of the list, tile n at n % kTable.
struct TileTable {
  const uint8_t *address[kTable];  // of the pack's first head, or no_tile(); null: not read, or to be gathered
  uint16_t exact[kTable];          // tokens that are read raw, as bits
};

// What of a warp's row is not looked at for every tile.
struct RowState {
  float base, total;  // the reference of what is in the scratch, and the sum of its weights p
  float slope;
  int32_t position, low, high;  // keys [low, high) of the pages are visible
  QueryRow query;
  const uint8_t *operands;  // null: there is no such row
  int32_t interval;         // of the first row: how often the warp looks at its weights, in tiles
};

struct AttentionShared {
  uint64_t full[kMaxStages], empty[kMaxStages];
  ListedItem items[kMaxItems];
  int32_t num_items;
};

// A warp's team.
struct Team {
  int32_t index, count;  // of all teams
};

// Stands for the address of a tile past the list's last.
__device__ inline const uint8_t *no_tile() {
  return reinterpret_cast<const uint8_t *>(uintptr_t{1});
}

// Tiles of an item that are a team's.
__device__ inline int tiles_of(const AttentionItem &item, Team team) {
  const int tiles = item.end_tile - item.first_tile - team.index;
  return tiles > 0 ? (tiles + team.count - 1) / team.count : 0;
}

// ---- finding tiles

// Whether some row of the item reads the codes of key j.
__device__ inline bool is_needed(const AttentionCall &call, const ListedItem &listed, int j) {
  const Sequence &sequence = listed.sequence;
  if (j >= sequence.coded_length || is_exact(call, sequence, j)) return false;
  const int first = listed.item.token_block * call.block_tokens;
#pragma unroll 1
  for (int token = first; token < min(sequence.q_len, first + call.block_tokens); ++token) {
    const KeyRange keys = visible_keys(call, sequence, position(call, sequence, token));
    if (j >= keys.low && j < keys.high) return true;
  }
  return false;
}

// Small blocks that follow each other from the first row of a tile on are a tile of the pool; null if they do not.
__device__ inline const uint8_t *whole_tile(const AttentionCall &call, const Sequence &sequence, int tile) {
  const AttentionPool &pool = call.pool;
  const int count = kTileTokens / pool.block_size;
  if ((tile + 1) * kTileTokens > sequence.coded_length) return nullptr;
  const int32_t *blocks = sequence.table + int64_t{tile} * count;
  const int64_t first = blocks[0];
  if (first < 0 || first % count != 0 || first + count > pool.num_blocks) return nullptr;
#pragma unroll 1
  for (int i = 1; i < count; ++i) {
    if (blocks[i] != first + i) return nullptr;
  }
  return pool.base + first / count * pool.block_stride;
}

// Looks up tiles first .. first + kBatch - 1 of a team's list, a lane each.
__device__ inline void find_tiles(const AttentionCall &call, AttentionShared &shared, TileTable &table, Team team,
                                  int first) {
  const AttentionPool &pool = call.pool;
  const int n = first + lane_index();
  int in_item = n, i = 0;
  for (; i < shared.num_items; ++i) {
    const int tiles = tiles_of(shared.items[i].item, team);
    if (in_item < tiles) break;
    in_item -= tiles;
  }
  if (i == shared.num_items) {
    table.address[n % kTable] = no_tile();
    return;
  }
  const ListedItem &listed = shared.items[i];
  const Sequence &sequence = listed.sequence;
  const int tile = listed.item.first_tile + team.index + in_item * team.count;
  const uint8_t *at = nullptr;
  bool bad = false;
  if (pool.block_size < kTileTokens) {
    at = whole_tile(call, sequence, tile);
  } else {
    const int tiles = pool.block_size / kTileTokens, block = tile / tiles, id = sequence.table[block];
    bad = id < 0 || id >= pool.num_blocks;
    if (!bad) at = pool.base + id * pool.block_stride + (tile - block * tiles) * pool.tile_stride;
  }
  if (at != nullptr) at += int64_t{listed.item.head_pack} * call.pack_heads * pool.head_stride;
  unsigned exact = 0;
  const int j = tile * kTileTokens;
  if (bad || !none_exact(call, sequence, j, j + kTileTokens)) {
#pragma unroll 1
    for (int t = 0; t < kTileTokens; ++t) {
      if (j + t < sequence.coded_length && is_exact(call, sequence, j + t)) exact |= 1u << t;
      if (bad && is_needed(call, listed, j + t)) atomicMax(&call.sequence_faults[listed.item.sequence], 1);
    }
  }
  table.address[n % kTable] = at;
  table.exact[n % kTable] = uint16_t(exact);
}

__device__ inline void copy_codes(const uint8_t *from, uint8_t *to, int head_dim, int bits, bool is_v, int from_row,
                                  int to_row) {
#pragma unroll 1
  for (int plane = 0; plane < 2; ++plane) {
    const int bytes = plane_bytes(head_dim, bits, plane);
#pragma unroll 1
    for (int e = lane_index(); e < bytes; e += 32) {
      if (is_v) {
        to[v_plane_offset(bytes, e, to_row)] = from[v_plane_offset(bytes, e, from_row)];
      } else {
        to[to_row * bytes + e] = from[from_row * bytes + e];
      }
    }
    from += kTileTokens * bytes;
    to += kTileTokens * bytes;
  }
}

__device__ inline void copy_scale(const uint8_t *from, uint8_t *to, int type, int from_row, int to_row) {
  const int bytes = type == TQ_TYPE_F32 ? 4 : 2, i = lane_index();
  if (i < bytes) to[to_row * bytes + i] = from[from_row * bytes + i];
}

// Copies the tokens of tile n from small blocks, wherever they are, to a stage that is free.
__device__ __noinline__ inline void gather_tile(const AttentionCall &call, AttentionShared &shared, Team team, int n,
                                                uint8_t *to) {
  const AttentionPool &pool = call.pool;
  const int lane = lane_index();
  int in_item = n, i = 0;
  for (; in_item >= tiles_of(shared.items[i].item, team); ++i) in_item -= tiles_of(shared.items[i].item, team);
  const ListedItem &listed = shared.items[i];
  int64_t slot = -1;  // of the lane's token
  if (lane < kTileTokens) {
    const int j = (listed.item.first_tile + team.index + in_item * team.count) * kTileTokens + lane;
    if (is_needed(call, listed, j)) {
      const int32_t id = listed.sequence.table[j / pool.block_size];
      if (id >= 0 && id < pool.num_blocks) {
        slot = int64_t{id} * pool.block_size + j % pool.block_size;
      } else {
        atomicMax(&call.sequence_faults[listed.item.sequence], 1);
      }
    }
  }
#pragma unroll 1
  for (int t = 0; t < kTileTokens; ++t) {
    const int64_t from_slot = __shfl_sync(kAll, slot, t);
    if (from_slot < 0) continue;
    const int row = int(from_slot % kTileTokens);
#pragma unroll 1
    for (int head = 0; head < call.pack_heads; ++head) {
      const uint8_t *from = pool.base + from_slot / kTileTokens * pool.block_stride +
                            (int64_t{listed.item.head_pack} * call.pack_heads + head) * pool.head_stride;
      uint8_t *tile = to + head * int64_t{pool.tile_bytes};
      copy_codes(from, tile, call.head_dim_k, call.k_bits, false, row, t);
      copy_codes(from + pool.v_codes, tile + pool.v_codes, call.head_dim_v, call.v_bits, true, row, t);
      copy_scale(from + pool.k_scales, tile + pool.k_scales, call.k_scale_type, row, t);
      copy_scale(from + pool.v_scales, tile + pool.v_scales, call.v_scale_type, row, t);
    }
  }
  bulk_copy_fence();
  __syncwarp();
}

// Begins to copy a tile to a stage that is free, by a warp. With kSmall blocks may be smaller than a tile.
template <bool kSmall>
__device__ __forceinline__ void copy_tile(const AttentionCall &call, const AttentionRing &ring, AttentionShared &shared,
                                          Team team, int n, const uint8_t *from, uint8_t *to, uint64_t *full) {
  if constexpr (kSmall) {
    if (from == nullptr && call.pool.block_size < kTileTokens) gather_tile(call, shared, team, n, to);
  }
  if (lane_index() != 0) return;
  const uint32_t bytes = uint32_t(call.pool.tile_bytes);
  if (from == nullptr) {
    barrier_arrive(full);
    return;
  }
  barrier_arrive_expect(full, bytes * uint32_t(call.pack_heads));
  if (ring.in_one_copy) {
    bulk_copy(to, from, bytes * uint32_t(call.pack_heads), full);
  } else {
#pragma unroll 1
    for (int i = 0; i < call.pack_heads; ++i) {
      bulk_copy(to + i * int(bytes), from + i * call.pool.head_stride, bytes, full);
    }
  }
}

// ---- codes to products

// body(i) for i = 0 .. kCount - 1, constants.
template <int kCount, class Body>
__device__ __forceinline__ void unrolled(Body &&body) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (body(std::integral_constant<int, i>{}), ...);
  }
  (std::make_integer_sequence<int, kCount>{});
}

// K of one kind, and of a kind that the call names.
template <int kBits, int kDim, bool kUniform>
struct FixedK {
  using Codes = KCodes<kBits, kDim, kUniform>;
  static constexpr int kSteps = Codes::kSteps;

  // The scores of the tile's tokens.
  __device__ static void score(const AttentionCall &call, const uint8_t *codes, int g, int q,
                               const uint32_t (&a)[kSteps][4], const int32_t (&bias)[4], int32_t (&c)[2][4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Codes k;
      uint32_t b[kSteps][2];
      Codes::load(k, codes, k_token(j, g), q);
      Codes::expand(k, {call.k_levels[0], call.k_levels[1]}, q, b);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        using Byte = std::conditional_t<kUniform, uint8_t, int8_t>;
        if (s == 0) mma_m16n8k32<int8_t, Byte>(c[j], a[s], b[s], bias);
        if (s != 0) mma_m16n8k32<int8_t, Byte>(c[j], a[s], b[s], c[j]);
      }
    }
  }
};

template <int kDim>
struct AnyK {
  static constexpr int kSteps = FixedK<4, kDim, false>::kSteps;

  __device__ static void score(const AttentionCall &call, const uint8_t *codes, int g, int q,
                               const uint32_t (&a)[kSteps][4], const int32_t (&bias)[4], int32_t (&c)[2][4]) {
    if (call.k_uniform != 0) return FixedK<2, kDim, true>::score(call, codes, g, q, a, bias, c);
    if (call.k_bits == 2) return FixedK<2, kDim, false>::score(call, codes, g, q, a, bias, c);
    if (call.k_bits == 3) return FixedK<3, kDim, false>::score(call, codes, g, q, a, bias, c);
    if (call.k_bits == 4) return FixedK<4, kDim, false>::score(call, codes, g, q, a, bias, c);
    FixedK<8, kDim, false>::score(call, codes, g, q, a, bias, c);
  }
};

// The same of V.
template <int kBits, int kDim, bool kUniform>
struct FixedV {
  using Codes = VCodes<kBits, kDim, kUniform>;
  static constexpr int kTiles = Codes::kTiles, kProducts = (kTiles + 1) / 2;  // instructions a tile, byte and block
  static constexpr bool kPairs = !kUniform && kBits != 8;

  __device__ static bool pairs(const AttentionCall &) { return kPairs; }

  template <int kBlocks>
  __device__ static void add(const AttentionCall &call, const uint8_t *codes, int g, int q,
                             const uint32_t (&b_high)[kBlocks][2], const uint32_t (&b_low)[kBlocks][2],
                             int32_t (&high)[kProducts][kBlocks][4], int32_t (&low)[kProducts][kBlocks][4]) {
    using Byte = std::conditional_t<kUniform, uint8_t, int8_t>;
    Codes v;
    uint32_t a[kTiles][2];
    Codes::load(v, codes, g, q);
    Codes::template expand<kPairs>(v, {call.v_levels[0], call.v_levels[1]}, g, a);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      uint32_t second[2] = {0, 0};
      if (2 * n + 1 < kTiles) second[0] = a[2 * n + 1][0], second[1] = a[2 * n + 1][1];
      const uint32_t left[4] = {a[2 * n][0], kPairs ? second[0] : a[2 * n][1], kPairs ? a[2 * n][1] : second[0],
                                second[1]};
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        mma_m16n8k32<Byte, uint8_t>(high[n][block], left, b_high[block], high[n][block]);
        mma_m16n8k32<Byte, uint8_t>(low[n][block], left, b_low[block], low[n][block]);
      }
    }
  }

  // set(row of queries)(channel, sum of w * byte, what a level is more than 2 * byte) for all of the lane's sums.
  template <int kBlocks, class Set>
  __device__ static void for_each_sum(const AttentionCall &, const int32_t (&high)[kProducts][kBlocks][4],
                                      const int32_t (&low)[kProducts][kBlocks][4], int g, int q, Set &&set) {
    const bool upper = q >= 2;  // lanes of columns 4 to 7
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto set_row = set(4 * block + 2 * (q & 1) + i);
        unrolled<2 * kProducts>([&](auto index) {
          constexpr int n = index / 2, half = index % 2;
          constexpr int kTile = kPairs ? std::min<int>(index, kTiles - 1) : 2 * n;       // of the lower lanes
          constexpr int kUpperTile = kPairs || 2 * n + 1 == kTiles ? kTile : 2 * n + 1;  // of the upper ones
          if (kPairs && index >= kTiles) return;
          if (!kPairs && 2 * n + 1 == kTiles && upper) return;
          float bytes = __fmaf_rn(256.0f, float(high[n][block][2 * half + i]), float(low[n][block][2 * half + i]));
          const int r = kPairs ? upper : half;
          const int channel =
              upper ? Codes::template channel_of<kUpperTile>(r, g) : Codes::template channel_of<kTile>(r, g);
          if constexpr (kUniform) {
            constexpr float kLower = 1.0f / float(1 << Codes::shift(kTile, half));
            constexpr float kUpper = 1.0f / float(1 << Codes::shift(kUpperTile, half));
            bytes *= upper ? kUpper : kLower;
          }
          set_row(channel, bytes, kUniform ? -3.0f : 1.0f);
        });
      }
    }
  }
};

template <int kDim>
struct AnyV {
  static constexpr int kProducts = FixedV<4, kDim, false>::kProducts;

  __device__ static bool pairs(const AttentionCall &call) { return call.v_uniform == 0 && call.v_bits != 8; }

  template <int kBlocks>
  __device__ static void add(const AttentionCall &call, const uint8_t *codes, int g, int q,
                             const uint32_t (&b_high)[kBlocks][2], const uint32_t (&b_low)[kBlocks][2],
                             int32_t (&high)[kProducts][kBlocks][4], int32_t (&low)[kProducts][kBlocks][4]) {
    if (call.v_uniform != 0)
      return FixedV<2, kDim, true>::template add<kBlocks>(call, codes, g, q, b_high, b_low, high, low);
    if (call.v_bits == 2)
      return FixedV<2, kDim, false>::template add<kBlocks>(call, codes, g, q, b_high, b_low, high, low);
    if (call.v_bits == 3)
      return FixedV<3, kDim, false>::template add<kBlocks>(call, codes, g, q, b_high, b_low, high, low);
    if (call.v_bits == 4)
      return FixedV<4, kDim, false>::template add<kBlocks>(call, codes, g, q, b_high, b_low, high, low);
    FixedV<8, kDim, false>::template add<kBlocks>(call, codes, g, q, b_high, b_low, high, low);
  }

  template <int kBlocks, class Set>
  __device__ static void for_each_sum(const AttentionCall &call, const int32_t (&high)[kProducts][kBlocks][4],
                                      const int32_t (&low)[kProducts][kBlocks][4], int g, int q, Set &&set) {
    if (call.v_uniform != 0) return FixedV<2, kDim, true>::template for_each_sum<kBlocks>(call, high, low, g, q, set);
    if (call.v_bits == 2) return FixedV<2, kDim, false>::template for_each_sum<kBlocks>(call, high, low, g, q, set);
    if (call.v_bits == 3) return FixedV<3, kDim, false>::template for_each_sum<kBlocks>(call, high, low, g, q, set);
    if (call.v_bits == 4) return FixedV<4, kDim, false>::template for_each_sum<kBlocks>(call, high, low, g, q, set);
    FixedV<8, kDim, false>::template for_each_sum<kBlocks>(call, high, low, g, q, set);
  }
};

template <class KSide, class VSide, int kDimK, int kDimV, int kBlocksOfRows, bool kAnyPages>
struct AttentionShape {
  using K = KSide;
  using V = VSide;
  static constexpr bool kAny = kAnyPages;  // scales of any type, blocks of any size
  static constexpr int kHeadDimV = kDimV;
  static constexpr int kBlocks = kBlocksOfRows, kRows = 4 * kBlocks;
  static constexpr int kWarps = attention_warps(kDimK, kDimV, kBlocks);
  static constexpr int kScratch = kRows * kDimV;  // floats a warp
};

// ---- one warp's rows

// Describes the rows of a warp's kv head, lanes 0 .. 7 one each; gives the tiles [x, y) that are visible to every row, and
// coded.
template <int kRows>
__device__ __noinline__ int2 describe_rows(const AttentionCall &call, const ListedItem &listed, int pack_head,
                                           RowState *states) {
  const Sequence &sequence = listed.sequence;
  const AttentionItem &item = listed.item;
  const int row = lane_index(), token = item.token_block * call.block_tokens + row / call.block_heads;
  const int in_group = item.head_part * call.block_heads + row % call.block_heads;
  int begin = INT32_MIN, end = INT32_MAX;
  RowState state{kMinusInfinity, 0, 0, 0, 0, 0, {0, kMinusInfinity, 0, 0}, nullptr, kFirstCheck};
  if (row < call.block_tokens * call.block_heads && token < sequence.q_len && in_group < call.group) {
    const int head = (item.head_pack * call.pack_heads + pack_head) * call.group + in_group;
    const int64_t at = int64_t{sequence.begin + token} * call.q_heads + head;
    state.position = position(call, sequence, token);
    const KeyRange keys = visible_keys(call, sequence, state.position);
    begin = state.low = keys.low;
    end = state.high = min(keys.high, sequence.coded_length);
    if (call.alibi_slopes != nullptr) state.slope = call.alibi_slopes[head] * kLog2E;
    state.query = call.query_rows[at];
    state.operands = call.query_operands + at * 2 * call.operand_bytes;
  }
  if (row < kRows) states[row] = state;
  for (int lane = 4; lane > 0; lane /= 2) {
    begin = max(begin, __shfl_xor_sync(kAll, begin, lane));
    end = min(end, __shfl_xor_sync(kAll, end, lane));
  }
  begin = __shfl_sync(kAll, begin, 0);
  end = __shfl_sync(kAll, end, 0);
  if (call.exact.base != nullptr) {
    begin = int(max(int64_t{begin}, min(sequence.start + call.exact_first, int64_t{INT32_MAX})));
    end = int(min(int64_t{end}, max(sequence.first_position - call.exact_recent + 1, int64_t{INT32_MIN})));
  }
  __syncwarp();
  const bool adjusted = call.soft_cap > 0 || call.alibi_slopes != nullptr || begin >= end;
  if (adjusted || end < 0) return make_int2(0, 0);
  return make_int2((max(begin, 0) + kTileTokens - 1) / kTileTokens, end / kTileTokens);
}

template <class Shape>
class WarpRows {
 public:
  using K = typename Shape::K;
  using V = typename Shape::V;
  static constexpr int kBlocks = Shape::kBlocks;

  // Operands of one tile's weights.
  struct Weights {
    uint32_t low[kBlocks][2], high[kBlocks][2];
  };
  using Scores = int32_t[2][4];
  // Of keys and values 4 q .. 4 q + 3, as they are stored.
  struct Scales {
    uint32_t k[Shape::kAny ? 4 : 2], v[Shape::kAny ? 4 : 2];
  };

  __device__ WarpRows(const AttentionCall &call, float *scratch, RowState *states)
      : call_(call), scratch_(scratch), states_(states), g_(lane_index() / 4), q_(lane_index() % 4) {}

  __device__ void begin(const ListedItem &listed, int pack_head) {
    const int2 plain = describe_rows<Shape::kRows>(call_, listed, pack_head, states_);
    plain_first_ = plain.x, plain_end_ = plain.y;
    const RowState &state = row();
    gain_ = state.query.gain, shifted_ = state.query.offset;
    bias_[0] = bias_[1] = state.query.bias_high;
    bias_[2] = bias_[3] = state.query.bias_low;
    const uint8_t *bytes = state.operands + q_ * 16 * K::kSteps;
#pragma unroll
    for (int s = 0; s < K::kSteps; ++s) {
      uint4 word = make_uint4(0, 0, 0, 0);
      if (state.operands != nullptr) word = *reinterpret_cast<const uint4 *>(bytes + 16 * s);
      a_[s][0] = word.x, a_[s][1] = word.y, a_[s][2] = word.z, a_[s][3] = word.w;
    }
    sum_ = 0;
    flags_ = kUnset;
    check_ = kFirstCheck;
    reset();
  }

  __device__ void score(const uint8_t *tile, Scores &c) const {
    K::score(call_, tile, g_, q_, a_, bias_, c);
  }

  __device__ Scales scales(const uint8_t *tile) const {
    Scales result;
    load_scales(tile + call_.pool.k_scales, call_.k_scale_type, result.k);
    load_scales(tile + call_.pool.v_scales, call_.v_scale_type, result.v);
    return result;
  }

  // `number`: of the tile in its sequence; `exact`: its tokens that are read raw.
  __device__ Weights weigh(const Scales &scales, int number, const uint16_t *exact, const Scores &c) {
    float k_scale[4], v_scale[4], y[4];  // y: log2 of the weight p
    convert_scales(scales.k, call_.k_scale_type, k_scale);
    convert_scales(scales.v, call_.v_scale_type, v_scale);
    if (number >= plain_first_ && number < plain_end_) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = __fmaf_rn(score_of(c, i), k_scale[i] * gain_, shifted_);
    } else {
      adjust(c, k_scale, number * kTileTokens + 4 * q_, unsigned(*exact) >> (4 * q_), y, v_scale);
    }
    float p[4];
    uint32_t w[4];
    weights_of(y, v_scale, p, w);
    const bool over = ((w[0] | w[1] | w[2] | w[3]) & 0xffff0000) != kOne;
    if (__any_sync(kAll, over || (flags_ & (kFall | kUnset)) != 0)) {
      choose_references(v_scale, over, y);
      weights_of(y, v_scale, p, w);
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = min(max(w[i], kOne), kOne + 0xffff);
    }
    sum_ += (p[0] + p[1]) + (p[2] + p[3]);
    weights_ += w[0] + w[1] + (w[2] + w[3]);
    if (++run_ >= check_) check_average();
    return operands_of(w);
  }

  __device__ void add(const uint8_t *tile, const Weights &b) {
    V::template add<kBlocks>(call_, tile + call_.pool.v_codes, g_, q_, b.high, b.low, high_sums_, low_sums_);
  }

  // Whether there are weights of the item.
  __device__ bool has_tiles() const {
    return run_ > 0 || (flags_ & kFlushed) != 0;
  }

  // Leaves the rows' outputs in the scratch, and their reference and sum in the states.
  __device__ void end() {
    if (run_ > 0) flush();
  }

 private:
  static constexpr uint32_t kOne = 0x4b000000;  // 2^23: integers are a float's low bits
  static constexpr int kMostTiles = 2048;       // so that sums stay below 2^31
  // The row's weights are too small; its reference is not chosen yet, or the row does not exist; the scratch holds sums.
  static constexpr unsigned kFall = 1, kUnset = 2, kFlushed = 4;

  __device__ RowState &row() const {
    return states_[kBlocks == 1 ? g_ & 3 : g_];
  }

  __device__ void reset() {
#pragma unroll
    for (int n = 0; n < V::kProducts; ++n) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) high_sums_[n][block][i] = low_sums_[n][block][i] = 0;
      }
    }
    weights_ = 0;
    run_ = 0;
  }

  // The score of token 4 q + i, an integer.
  __device__ static float score_of(const Scores &c, int i) {
    return float(256 * c[i >> 1][i & 1] + c[i >> 1][2 + (i & 1)]);
  }

  template <int kWords>
  __device__ void load_scales(const uint8_t *scales, int type, uint32_t (&word)[kWords]) const {
    if (Shape::kAny && type == TQ_TYPE_F32) {
      const uint4 v = *reinterpret_cast<const uint4 *>(scales + 16 * q_);
      word[0] = v.x, word[1] = v.y, word[kWords - 2] = v.z, word[kWords - 1] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2 *>(scales + 8 * q_);
      word[0] = v.x, word[1] = v.y;
    }
  }

  template <int kWords>
  __device__ static void convert_scales(const uint32_t (&word)[kWords], int type, float (&scale)[4]) {
    if (Shape::kAny && type == TQ_TYPE_F32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scale[i] = __uint_as_float(word[i % kWords]);
    } else {
      f32_pair_from_f16(word[0], scale[0], scale[1]);
      f32_pair_from_f16(word[1], scale[2], scale[3]);
    }
  }

  // y of keys j .. j + 3 with all that changes or hides scores: -infinity where hidden, and there no value.
  __device__ void adjust(const Scores &c, const float (&k_scale)[4], int j, unsigned exact, float (&y)[4],
                         float (&v_scale)[4]) const {
    const RowState &state = row();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float score = __fmaf_rn(score_of(c, i), k_scale[i] * gain_, state.query.offset);
      if (call_.soft_cap > 0) {  // cap * tanh(score / cap)
        const float power = exp2_approx(score * call_.cap_factor);
        score = call_.cap_log2 * (1.0f - 2.0f * reciprocal_approx(1.0f + power));
      }
      if (call_.alibi_slopes != nullptr) score = __fmaf_rn(state.slope, float(j + i - state.position), score);
      const bool seen = j + i >= state.low && j + i < state.high && (exact >> i & 1) == 0;
      y[i] = seen ? score + (shifted_ - state.query.offset) : kMinusInfinity;
      if (!seen) v_scale[i] = 0;  // it may be anything
    }
  }

  __device__ void weights_of(const float (&y)[4], const float (&v_scale)[4], float (&p)[4], uint32_t (&w)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[i] = exp2_approx(y[i]);
      w[i] = __float_as_uint(__fmaf_rn(p[i], v_scale[i], 0x1p23f));
    }
  }

  __device__ Weights operands_of(const uint32_t (&w)[4]) const {
    Weights b;
    const bool odd = g_ >= 4, pairs = V::pairs(call_);
    const uint32_t first = permute(w[0], w[1], 0x5410), second = permute(w[2], w[3], 0x5410);
    uint32_t other_first = first, other_second = second;
    if constexpr (kBlocks == 2) {
      other_first = __shfl_xor_sync(kAll, first, 16);
      other_second = __shfl_xor_sync(kAll, second, 16);
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const bool own = kBlocks == 1 || odd == (block == 1);
      const uint32_t u = own ? first : other_first, v = own ? second : other_second;
      if (pairs) {
        const uint32_t low = odd ? 0x2404 : 0x4240, high = odd ? 0x3414 : 0x4341;
        b.low[block][0] = permute(u, 0, low), b.low[block][1] = permute(v, 0, low);
        b.high[block][0] = permute(u, 0, high), b.high[block][1] = permute(v, 0, high);
      } else {
        const uint32_t low = permute(u, v, 0x6420), high = permute(u, v, 0x7531);
        b.low[block][0] = odd ? 0 : low, b.low[block][1] = odd ? low : 0;
        b.high[block][0] = odd ? 0 : high, b.high[block][1] = odd ? high : 0;
      }
    }
    return b;
  }

  // The sum of the row's weights since the last flush.
  __device__ uint32_t row_weights() const {
    uint32_t w = weights_ - uint32_t(run_) * (4 * kOne);
    w += __shfl_xor_sync(kAll, w, 1);
    w += __shfl_xor_sync(kAll, w, 2);
    return w;
  }

  __device__ void check_average() {
    const float least = call_.out.type == TQ_TYPE_F32 ? 768.0f : 192.0f;
    const bool small = float(row_weights()) < least * float(run_ * kTileTokens) && (flags_ & kUnset) == 0;
    if (small || run_ >= kMostTiles) flags_ |= kFall;
    const int interval = states_[0].interval;
    check_ = min(run_ + interval, kMostTiles);
    if (__any_sync(kAll, (flags_ & kFall) != 0) && lane_index() == 0) {
      states_[0].interval = min(2 * interval, kMostTiles);  // a flush costs much
    }
    __syncwarp();
  }

  // New references where there are none yet, a weight is too large, or weights have become small; `y` with them. Sums so
  // far go to the scratch.
  __device__ void choose_references(const float (&v_scale)[4], bool over, float (&y)[4]) {
    if (run_ > 0) flush();
    check_ = states_[0].interval;
    // log2 of the row's weights w: the largest, and the moments of what the others are below it.
    float weight[4], most = kMinusInfinity, most_score = kMinusInfinity;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[i] = v_scale[i] > 0 ? y[i] + log2_approx(v_scale[i]) : kMinusInfinity;
      most = fmaxf(most, weight[i]);
      most_score = fmaxf(most_score, y[i]);
    }
    int changes = (over ? 1 : 0) | ((flags_ & (kFall | kUnset)) != 0 ? 2 : 0);
#pragma unroll
    for (int lane = 1; lane <= 2; lane *= 2) {
      most = fmaxf(most, __shfl_xor_sync(kAll, most, lane));
      most_score = fmaxf(most_score, __shfl_xor_sync(kAll, most_score, lane));
      changes |= __shfl_xor_sync(kAll, changes, lane);
    }
    float count = 0, mean = 0, square = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (weight[i] == kMinusInfinity) continue;
      const float below = weight[i] - most;
      count += 1, mean += below, square = __fmaf_rn(below, below, square);
    }
#pragma unroll
    for (int lane = 1; lane <= 2; lane *= 2) {
      count += __shfl_xor_sync(kAll, count, lane);
      mean += __shfl_xor_sync(kAll, mean, lane);
      square += __shfl_xor_sync(kAll, square, lane);
    }
    mean *= reciprocal_approx(fmaxf(count, 1));
    square *= reciprocal_approx(fmaxf(count, 1));
    const float spread = exp2_approx(0.5f * log2_approx(fmaxf(__fmaf_rn(-mean, mean, square), 1e-6f)));
    // A weight that was too large is an outlier; else the largest of some thousand keys is expected at 2^16, if that leaves
    // the largest of these large enough.
    const float most_expected = call_.out.type == TQ_TYPE_F32 ? 2.0f : 4.0f;
    const float expected =
        (changes & 2) != 0 ? fminf(fmaxf(__fmaf_rn(3.25f, spread, mean), 0) + 0.1f, most_expected) : 2.0f;
    if (most == kMinusInfinity) most = most_score;  // no value, but a weight
    if (changes != 0 && most != kMinusInfinity) {
      const float rise = most + expected - 16;
      shifted_ -= rise;
      flags_ &= ~kUnset;
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] -= rise;
    }
    flags_ &= ~kFall;
    if (gain_ == 0) flags_ &= ~kUnset;  // no such row, or all its scores are equal
  }

  // Adds the integer sums to the scratch, whose unit is that of the state's base.
  __device__ void flush() {
    RowState &state = row();
    sum_ += __shfl_xor_sync(kAll, sum_, 1);
    sum_ += __shfl_xor_sync(kAll, sum_, 2);
    const bool set = (flags_ & kUnset) == 0 && sum_ != 0, flushed = (flags_ & kFlushed) != 0;
    const float old_base = state.base, ref = state.query.offset - shifted_,
                base = set ? fmaxf(old_base, ref) : old_base;
    const float keep = old_base == kMinusInfinity ? 0.0f : exp2_approx(old_base - base);
    const float gain = set ? exp2_approx(ref - base) : 0.0f;
    __syncwarp();
    if (q_ == 0 && g_ < Shape::kRows) {
      state.base = base;
      state.total = __fmaf_rn(sum_, gain, state.total * keep);
    }
    __syncwarp();
    sum_ = 0;
    const float weights = float(row_weights());
    V::template for_each_sum<kBlocks>(call_, high_sums_, low_sums_, g_, q_, [&](int row) {
      const float row_keep = __shfl_sync(kAll, keep, 4 * row), row_gain = __shfl_sync(kAll, gain, 4 * row);
      const float row_weight = __shfl_sync(kAll, weights, 4 * row);
      float *to = scratch_ + row * Shape::kHeadDimV;
      return [=](int channel, float bytes, float ones) {  // level = 2 * byte + ones
        const float levels = __fmaf_rn(2.0f, bytes, ones * row_weight);
        to[channel] = flushed ? __fmaf_rn(levels, row_gain, to[channel] * row_keep) : levels * row_gain;
      };
    });
    flags_ |= kFlushed;
    reset();
  }

  const AttentionCall &call_;
  float *scratch_;
  RowState *states_;
  int g_, q_;

  // The item's.
  uint32_t a_[K::kSteps][4];
  int32_t bias_[4];
  float gain_;
  int plain_first_, plain_end_;

  // Of the lane's row and tokens.
  float shifted_;     // the row's offset less its reference
  float sum_;         // of p since the last flush
  uint32_t weights_;  // of w since then, as the words they come in
  unsigned flags_;
  // The warp's.
  int run_, check_;  // tiles since the last flush, and when to look at their weights
  int32_t high_sums_[V::kProducts][kBlocks][4], low_sums_[V::kProducts][kBlocks][4];
};

// ---- the kernel

// Adds up what the teams have of a head's rows, and leaves it as a partial result.
template <class Shape>
__device__ __noinline__ void write_partial(const AttentionCall &call, int64_t slot_number, int head, Team team,
                                           const float *scratch, const RowState *states) {
  const int lane = lane_index(), rows = call.block_tokens * call.block_heads;
  uint8_t *slot = call.partials + slot_number * call.slot_bytes;
  float2 *to_states = reinterpret_cast<float2 *>(slot) + head * rows;
  float *to = reinterpret_cast<float *>(slot + partial_outputs(call.pack_heads, rows)) +
              int64_t{head} * rows * Shape::kHeadDimV;
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
    float most = kMinusInfinity, sum = 0;
    for (int i = 0; i < team.count; ++i) {
      most = fmaxf(most, states[(i * call.pack_heads + head) * Shape::kRows + row].base);
    }
    for (int i = 0; i < team.count; ++i) {
      const RowState &state = states[(i * call.pack_heads + head) * Shape::kRows + row];
      if (state.base != kMinusInfinity) sum = __fmaf_rn(state.total, exp2_approx(state.base - most), sum);
    }
    if (team.index == 0 && lane == 0) to_states[row] = make_float2(most, sum);
    for (int c = 4 * (lane + 32 * team.index); c < Shape::kHeadDimV; c += 128 * team.count) {
      float4 out = make_float4(0, 0, 0, 0);
      for (int i = 0; i < team.count; ++i) {
        const int warp = i * call.pack_heads + head;
        const float base = states[warp * Shape::kRows + row].base;
        if (base == kMinusInfinity) continue;
        const float factor = exp2_approx(base - most);
        const float4 v =
            *reinterpret_cast<const float4 *>(scratch + warp * Shape::kScratch + row * Shape::kHeadDimV + c);
        out.x = __fmaf_rn(v.x, factor, out.x), out.y = __fmaf_rn(v.y, factor, out.y);
        out.z = __fmaf_rn(v.z, factor, out.z), out.w = __fmaf_rn(v.w, factor, out.w);
      }
      *reinterpret_cast<float4 *>(to + row * Shape::kHeadDimV + c) = out;
    }
  }
}

template <class Shape>
__global__ void __launch_bounds__(32 * Shape::kWarps, 1)
    attention_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ AttentionRing ring) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint8_t *memory = static_cast<uint8_t *>(dynamic_shared());
  AttentionShared &shared = *reinterpret_cast<AttentionShared *>(memory + ring.shared_at);
  const int warp = int(threadIdx.x) / 32, lane = lane_index();
  const int head = warp % call.pack_heads;
  const Team team{warp / call.pack_heads, int(blockDim.x) / 32 / call.pack_heads};
  float *scratch = reinterpret_cast<float *>(memory + ring.scratch_at);
  RowState *states = reinterpret_cast<RowState *>(memory + ring.rows_at);
  TileTable &table = reinterpret_cast<TileTable *>(memory + ring.tables_at)[team.index];
  uint8_t *stages = memory + team.index * ring.stages * ring.stage_bytes;
  uint64_t *full = shared.full + team.index * ring.stages, *empty = shared.empty + team.index * ring.stages;
  for (int i = int(threadIdx.x); i < team.count * ring.stages; i += int(blockDim.x)) {
    barrier_init(&shared.full[i], 1);
    barrier_init(&shared.empty[i], uint32_t(call.pack_heads));
  }
  barrier_init_fence();
  grid_dependency_wait();
  BlockItems block = call.block_items[blockIdx.x];

  WarpRows<Shape> rows(call, scratch + warp * Shape::kScratch, states + warp * Shape::kRows);
  int stage = 0;  // of the next tile, and the parity of its barriers' phase
  uint32_t parity = 0;
#pragma unroll 1
  for (; block.count > 0; block.first += kMaxItems, block.count -= kMaxItems) {
    if (warp == 0) {
      if (lane < min(block.count, kMaxItems)) {
        ListedItem listed;
        listed.item = call.items[block.first + lane];
        listed.sequence = read_sequence(call, listed.item.sequence, 0);
        shared.items[lane] = listed;
      }
      if (lane == 0) shared.num_items = min(block.count, kMaxItems);
    }
    __syncthreads();
    if (head == 0) {
      find_tiles(call, shared, table, team, 0);
      find_tiles(call, shared, table, team, kBatch);
      __syncwarp();
#pragma unroll 1
      for (int n = 0, to = stage; n < ring.stages && table.address[n] != no_tile(); ++n) {  // all stages are free
        copy_tile<Shape::kAny>(call, ring, shared, team, n, table.address[n], stages + to * ring.stage_bytes,
                               &full[to]);
        if (++to == ring.stages) to = 0;
      }
    }
    int n = 0, turn = 0;  // the next tile, and whose turn it is to copy
#pragma unroll 1
    for (int i = 0; i < shared.num_items; ++i) {
      const ListedItem &listed = shared.items[i];
      if (listed.item.first_tile >= listed.item.end_tile) continue;  // nothing, and its slot is not read
      rows.begin(listed, head);
      int left = tiles_of(listed.item, team), tile = listed.item.first_tile + team.index;
      const uint8_t *now = stages + stage * ring.stage_bytes + head * call.pool.tile_bytes;
      typename WarpRows<Shape>::Weights weights{};  // before the first tile: of nothing
      // Leaves tile n - 1 and, in turn, copies the one that takes the place of tile n - 2.
      const auto release = [&] {
        const int old = stage == 0 ? ring.stages - 1 : stage - 1;
        __syncwarp();
        if (turn == head && n >= 2) {
          const int next = n - 2 + ring.stages, free = old == 0 ? ring.stages - 1 : old - 1;
          const uint8_t *from = table.address[next % kTable];
          if (from != no_tile()) {
            barrier_wait(&empty[free], stage >= 2 ? parity : parity ^ 1);
            copy_tile<Shape::kAny>(call, ring, shared, team, next, from, stages + free * ring.stage_bytes, &full[free]);
          }
        }
        if (lane == 0) barrier_arrive(&empty[old]);
        if (++turn == call.pack_heads) turn = 0;
      };
#pragma unroll 1
      while (left > 0) {
        if (n % kBatch == 0 && n > 0 && head == 0) find_tiles(call, shared, table, team, n + kBatch);
        __syncwarp();
        const int end = n + min(left, kBatch - n % kBatch);
        left -= end - n;
#pragma unroll 1
        for (; n < end; ++n, tile += team.count) {
          typename WarpRows<Shape>::Scores scores;
          const uint8_t *next = stages + stage * ring.stage_bytes + head * call.pool.tile_bytes;
          barrier_wait(&full[stage], parity);
          const typename WarpRows<Shape>::Scales scales = rows.scales(next);
          rows.add(now, weights);
          rows.score(next, scores);
          if (rows.has_tiles()) release();
          weights = rows.weigh(scales, tile, &table.exact[n % kTable], scores);
          now = next;
          if (++stage == ring.stages) stage = 0, parity ^= 1;
        }
      }
      if (rows.has_tiles()) {
        rows.add(now, weights);
        release();
      }
      rows.end();
      group_barrier(1 + head, 32 * team.count);
      write_partial<Shape>(call, int64_t{block.first} + i, head, team, scratch, states);
      group_barrier(1 + head, 32 * team.count);
    }
    __syncthreads();
  }
#endif
}

// ---- starting it

// The shape of K and V bits, 0: any that the call names, and pages of any kind; 20: 2 bits with uniform levels.
template <int kDimK, int kDimV, int kBitsK, int kBitsV, int kBlocks>
auto shape_of() {
  using K = std::conditional_t<kBitsK == 0, AnyK<kDimK>, FixedK<kBitsK == 20 ? 2 : kBitsK, kDimK, kBitsK == 20>>;
  using V = std::conditional_t<kBitsV == 0, AnyV<kDimV>, FixedV<kBitsV == 20 ? 2 : kBitsV, kDimV, kBitsV == 20>>;
  return AttentionShape<K, V, kDimK, kDimV, kBlocks, kBitsK == 0>{};
}

template <int kDimK, int kDimV, int kBitsK, int kBitsV, int kBlocks>
int load_attention() {
  using Shape = decltype(shape_of<kDimK, kDimV, kBitsK, kBitsV, kBlocks>());
  cudaFuncAttributes attributes;
  if (const int error = cudaFuncGetAttributes(&attributes, attention_kernel<Shape>)) return error;
  return cudaFuncSetAttribute(attention_kernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kAttentionSharedBytes);
}

template <int kDimK, int kDimV, int kBitsK, int kBitsV, int kBlocks>
int launch_attention_of(const AttentionCall &call, void *stream) {
  using Shape = decltype(shape_of<kDimK, kDimV, kBitsK, kBitsV, kBlocks>());
  constexpr int kLeastStages = 3;  // the kernel's order of steps takes them
  AttentionRing ring{};
  ring.stage_bytes = (call.pack_heads * call.pool.tile_bytes + 127) / 128 * 128;
  ring.in_one_copy = call.pool.head_stride == call.pool.tile_bytes;
  for (int teams = Shape::kWarps / call.pack_heads; teams > 0; --teams) {
    const int warps = teams * call.pack_heads, scratch = warps * Shape::kScratch * int(sizeof(float));
    const int states = warps * Shape::kRows * int(sizeof(RowState)), tables = teams * int(sizeof(TileTable));
    const int others = scratch + states + tables + int(sizeof(AttentionShared));
    ring.stages =
        std::min((kAttentionSharedBytes - others) / (teams * ring.stage_bytes), std::min(kMaxStages / teams, 16));
    if (ring.stages < kLeastStages) continue;
    ring.scratch_at = teams * ring.stages * ring.stage_bytes;
    ring.rows_at = ring.scratch_at + scratch;
    ring.tables_at = ring.rows_at + states;
    ring.shared_at = ring.tables_at + tables;
    return launch_dependent(attention_kernel<Shape>, unsigned(call.blocks), unsigned(32 * warps),
                            size_t(ring.stages * teams * ring.stage_bytes + others), stream, call, ring);
  }
  return int(cudaErrorInvalidConfiguration);
}

}  // namespace tqkv::cuda
