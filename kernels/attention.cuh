// SPDX-License-Identifier: Apache-2.0
// The main kernel of paged attention: codes from pages, through shared memory, to both products on integer tensor
// cores. attention.hpp says what it is given and what it leaves.
//
// BLOCK. One a multiprocessor. Warps form teams of `pack_heads`, a warp a kv head. A step is two tiles; of an item's steps
// (an item is a segment or a part of one) team i takes every teams-th from the i-th on. A team has its own ring of stages;
// a stage holds one step of all its heads, which are adjacent in a page. Items are listed kMaxItems at a time, and a team's
// steps of the list are numbered through: step n is in stage n % stages. Amid step n one of the team's warps, each in its
// turn, waits until all have left step n + ahead - stages and copies step n + ahead over it. With 8 rows, whose warps have
// more to do than memory has, four other warps of few registers find and copy all steps.
//
// WARP. Lane = 4 g + q, as in operands.cuh. Row r of an item is a query: with kBlocks = 1 there are 4, with 2 there are 8. A
// lane has row q, or rows q and 4 + q, and of each of the step's tiles two tokens. A step goes: scores (16-bit queries as
// two bytes), weights p = 2^(x - ref), products w = p * v_scale rounded to 16 bits, as two bytes again, and sums of
// w * level in integers, of which a lane has both bytes of its rows.
//
// SCALE OF WEIGHTS. ref is a row's, chosen by the distribution of a step's weights so that few later ones pass 2^16. When
// one does, or weights become so small on average that their rounding would show, ref moves by a whole number and the sums
// are shifted by as many bits.
#pragma once

#include <algorithm>

#include "kernels/attention.hpp"
#include "kernels/device/launch.cuh"
#include "kernels/device/operands.cuh"
#include "kernels/device/sequence.cuh"
#include "kernels/device/vector.cuh"

namespace tqkv::cuda {

inline constexpr int kStepTiles = 2;
inline constexpr int kMostSteps = 512;  // a power of two; a step past its multiples low sums are carried to high ones
inline constexpr int kMaxItems = 16, kMostWarps = 16;
inline constexpr int kMaxStages = 3 * kMostWarps;  // three for each team if a warp is one
// Steps whose places are looked up at a time, a lane a tile, and kept.
inline constexpr int kBatch = 32 / kStepTiles, kTable = 4 * kBatch;
inline constexpr int kMostTeamStages = kBatch - 4;       // those of steps that are looked up in time
inline constexpr int kAttentionSharedBytes = 227 << 10;  // of a block, from compute capability 9.0 on
inline constexpr float kMinusInfinity = -INFINITY;

// What numbers from 0 to 2^27 - 1 are divided by, at most 16: as a product, because a division is 20 instructions.
struct Divisor {
  uint32_t reciprocal;  // 2^31 divided by it, rounded up
};
inline Divisor divisor(int number) {
  return {((1u << 31) + uint32_t(number) - 1) / uint32_t(number)};
}
__device__ inline int divided(int n, Divisor by) {
  return int(__umulhi(2 * uint32_t(n), by.reciprocal));
}

// The dynamic shared memory: rings, then what each warp and team has, in bytes from the start.
struct AttentionRing {
  int32_t teams, stages, ahead;     // stages: of a team; ahead: how far the step is that is copied
  int32_t tile_bytes, stage_bytes;  // of a tile of all heads, of a stage: a multiple of 128
  int32_t in_one_copy;              // the heads of a tile are adjacent
  int32_t scratch_at, rows_at, ends_at, tables_at, shared_at;
  int32_t outputs_at;  // partial_outputs() of a slot
  Divisor by_teams, by_pack_heads, by_block_heads;
  Divisor by_block_tiles;  // of a block of the pool
};

struct ListedItem {
  AttentionItem item;
  Sequence sequence;
  int32_t slot;
};

// A team's steps of the list, step n at n % kTable.
struct StepTable {
  // Of a tile's first head of the pack; null: not read, or to be gathered. Or no_tile(), or of the first tile no_step().
  const uint8_t *address[kTable][kStepTiles];
  uint16_t exact[kTable][kStepTiles];  // tokens that are read raw, as bits
};

// What a warp has of a row at the end: the reference, -infinity where there are no keys, and the sum of weights p.
struct RowEnd {
  float base, total;
};

// What of a warp's row is not looked at for every tile.
struct RowState {
  float offset;  // QueryRow's; -infinity: there is no such row
  float slope;
  int32_t position, low, high;  // keys [low, high) of the item are visible
};

struct AttentionShared {
  uint64_t full[kMaxStages], empty[kMaxStages];  // next to each other
  ListedItem items[kMaxItems];
  int32_t num_items, listed_before, more;  // of the block's items
  int32_t current[kMostWarps];             // the item that a warp is at
  int2 plain[kMostWarps];                  // tiles [x, y) that all of a warp's rows see, with nothing to adjust
  // Of list_items().
  uint64_t sums[kMostWarps];
  uint32_t first_segment, last_segment;
};

// A warp's team.
struct Team {
  int32_t index, count;  // of all teams
  Divisor by_count;
};

// Stand for the address of a tile that an item has not, and of one past the list's last step.
__device__ inline const uint8_t *no_tile() {
  return reinterpret_cast<const uint8_t *>(uintptr_t{1});
}
__device__ inline const uint8_t *no_step() {
  return reinterpret_cast<const uint8_t *>(uintptr_t{2});
}

// Steps of an item that are a team's.
__device__ inline int steps_of(const AttentionItem &item, Team team) {
  const int steps = (item.end_tile - item.first_tile + kStepTiles - 1) / kStepTiles - team.index;
  return steps > 0 ? divided(steps + team.count - 1, team.by_count) : 0;
}

// The first tile of an item's step.
__device__ inline int tile_of(const AttentionItem &item, Team team, int step) {
  return item.first_tile + kStepTiles * (team.index + step * team.count);
}

// ---- listing items

// The block's items from the `before`-th on, in a DIRECT call. By the block; ends with all threads together.
__device__ __forceinline__ void list_items(const AttentionCall &call, AttentionShared &shared, int before) {
  const uint32_t packs = uint32_t(call.head_packs), copies = uint32_t(call.head_parts) * packs;
  const DirectPart part = direct_part(call, shared.sums);
  const uint32_t end = part.begin + part.units * copies;
  const UnitRange block = block_units(call, part.all, int(blockIdx.x));
  if (part.begin <= block.low && block.low < end) {
    shared.first_segment = part.before + (block.low - part.begin) / part.units;
  }
  if (part.begin < block.high && block.high <= end) {
    shared.last_segment = part.before + (block.high - 1 - part.begin) / part.units;
  }
  __syncthreads();
  const int count = block.low < block.high ? int(shared.last_segment + 1 - shared.first_segment) : 0;
  if (threadIdx.x == 0) shared.num_items = min(count - before, kMaxItems), shared.more = count - before > kMaxItems;
  if (part.units > 0 && block.low < end && part.begin < block.high) {
    uint32_t copy = block.low > part.begin ? (block.low - part.begin) / part.units : 0;
    int at = int(part.before + copy - shared.first_segment) - before;
#pragma unroll 1
    for (uint32_t unit = part.begin + copy * part.units; copy < copies && unit < block.high;
         ++copy, ++at, unit += part.units) {
      if (at < 0 || at >= kMaxItems) continue;
      const uint32_t from = block.low > unit ? block.low - unit : 0, to = min(block.high - unit, part.units);
      const int first = max(int(from) - call.item_units, 0);
      ListedItem &listed = shared.items[at];
      listed.slot = int32_t(blockIdx.x + threadIdx.x * copies + copy);
      listed.item = {int32_t(threadIdx.x / uint32_t(call.token_blocks)),
                     int32_t(threadIdx.x % uint32_t(call.token_blocks)),
                     int32_t(copy / packs),
                     int32_t(copy % packs),
                     part.tiles.first + first,
                     part.tiles.first + max(int(to) - call.item_units, first),
                     0,
                     0};
      listed.sequence = part.sequence;
    }
  }
}

// The same of a list that "prepare" made, by a warp.
__device__ inline void read_items(const AttentionCall &call, AttentionShared &shared, int before) {
  const int lane = lane_index();
  const BlockItems block = call.block_items[blockIdx.x];
  const int count = min(block.count - before, kMaxItems);
  if (lane < count) {
    ListedItem listed;
    listed.slot = block.first + before + lane;
    listed.item = call.items[listed.slot];
    listed.sequence = read_sequence(call, listed.item.sequence, 0);
    shared.items[lane] = listed;
  }
  if (lane == 0) shared.num_items = count, shared.more = block.count - before > kMaxItems;
}

// ---- finding tiles

// A needed id is bad.
__device__ inline void note_fault(const AttentionCall &call, const ListedItem &listed) {
  atomicMax(&call.sequence_faults[listed.item.sequence], 1);
}

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

// A team's step of the list.
struct ListedStep {
  int item, in_item;  // item: num_items if it is past the last
};
__device__ inline ListedStep find_step(const AttentionShared &shared, Team team, int n) {
  ListedStep step{0, n};
  for (; step.item < shared.num_items; ++step.item) {
    const int steps = steps_of(shared.items[step.item].item, team);
    if (step.in_item < steps) break;
    step.in_item -= steps;
  }
  return step;
}

// Looks up steps first .. first + kBatch - 1 of a team's list, a lane a tile; true where the id of the lane's is bad.
__device__ inline bool find_steps(const AttentionCall &call, const AttentionRing &ring, AttentionShared &shared,
                                  StepTable &table, Team team, int first) {
  const AttentionPool &pool = call.pool;
  const int lane = thread_index_now() % 32, n = first + lane / kStepTiles, t = lane % kStepTiles;
  const uint8_t *&address = table.address[n % kTable][t];
  const ListedStep step = find_step(shared, team, n);
  if (step.item == shared.num_items) {
    address = no_step();
    return false;
  }
  const ListedItem &listed = shared.items[step.item];
  const Sequence &sequence = listed.sequence;
  const int tile = tile_of(listed.item, team, step.in_item) + t;
  if (tile >= listed.item.end_tile) {
    address = no_tile();
    return false;
  }
  const uint8_t *at = nullptr;
  bool bad = false;
  if (pool.block_size < kTileTokens) {
    at = whole_tile(call, sequence, tile);
  } else {
    const int tiles = pool.block_size / kTileTokens, block = divided(tile, ring.by_block_tiles),
              id = sequence.table[block];
    const int later = min(tile + kBatch * kStepTiles * team.count, listed.item.end_tile - 1);
    prefetch_l1(&sequence.table[divided(later, ring.by_block_tiles)]);
    bad = id < 0 || id >= pool.num_blocks;
    if (!bad) at = pool.base + id * pool.block_stride + (tile - block * tiles) * pool.tile_stride;
  }
  if (at != nullptr) at += int64_t{listed.item.head_pack} * call.pack_heads * pool.head_stride;
  const int j = tile * kTileTokens;
  const unsigned exact = none_exact(call, sequence, j, j + kTileTokens) ? 0 : exact_tokens(call, sequence, tile);
  address = at;
  table.exact[n % kTable][t] = uint16_t(exact);
  return bad;
}

// After find_steps(), by the lanes whose ids are bad.
__device__ inline void note_bad_ids(const AttentionCall &call, const AttentionShared &shared, Team team, int first) {
  const int lane = thread_index_now() % 32;
  const ListedStep step = find_step(shared, team, first + lane / kStepTiles);
  const ListedItem &listed = shared.items[step.item];
  const int tile = tile_of(listed.item, team, step.in_item) + lane % kStepTiles;
#pragma unroll 1
  for (int k = 0; k < kTileTokens; ++k) {
    if (is_needed(call, listed, tile * kTileTokens + k)) note_fault(call, listed);
  }
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

// Copies the tokens of a step's tile from small blocks, wherever they are, to a stage that is free.
__device__ __noinline__ inline void gather_tile(const AttentionCall &call, AttentionShared &shared, Team team, int n,
                                                int tile, uint8_t *to) {
  const AttentionPool &pool = call.pool;
  const int lane = lane_index();
  const ListedStep step = find_step(shared, team, n);
  const ListedItem &listed = shared.items[step.item];
  int64_t slot = -1;  // of the lane's token
  if (lane < kTileTokens) {
    const int j = (tile_of(listed.item, team, step.in_item) + tile) * kTileTokens + lane;
    if (is_needed(call, listed, j)) {
      const int32_t id = listed.sequence.table[j / pool.block_size];
      if (id >= 0 && id < pool.num_blocks) {
        slot = int64_t{id} * pool.block_size + j % pool.block_size;
      } else {
        note_fault(call, listed);
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
      uint8_t *own = to + head * int64_t{pool.tile_bytes};
      copy_codes(from, own, call.head_dim_k, call.k_bits, false, row, t);
      copy_codes(from + pool.v_codes, own + pool.v_codes, call.head_dim_v, call.v_bits, true, row, t);
      copy_scale(from + pool.k_scales, own + pool.k_scales, call.k_scale_type, row, t);
      copy_scale(from + pool.v_scales, own + pool.v_scales, call.v_scale_type, row, t);
    }
  }
  bulk_copy_fence();
  __syncwarp();
}

// Begins to copy step n to a stage that is free, by a warp. With kSmall blocks may be smaller than a tile. Arrives for 32 lanes:
// each does so itself where others read what it wrote, codes or its steps in the table. One for all would do, after a
// __syncwarp(), but racecheck does not know it.
template <bool kSmall, bool kEachLane = kSmall>
__device__ __forceinline__ void copy_step(const AttentionCall &call, const AttentionRing &ring, AttentionShared &shared,
                                          const StepTable &table, Team team, int n, uint8_t *to, uint64_t *full) {
  const uint8_t *const *from = table.address[n % kTable];
  if constexpr (kSmall) {
#pragma unroll 1
    for (int t = 0; t < kStepTiles; ++t) {
      if (from[t] == nullptr && call.pool.block_size < kTileTokens) {
        gather_tile(call, shared, team, n, t, to + t * ring.tile_bytes);
      }
    }
  }
  if (lane_index() != 0) {
    if constexpr (kEachLane) barrier_arrive(full);
    return;
  }
  constexpr uint32_t kArrivals = kEachLane ? 1 : 32;
  uint32_t tiles = 0;
#pragma unroll
  for (int t = 0; t < kStepTiles; ++t) tiles += from[t] != nullptr && from[t] != no_tile() ? 1 : 0;
  if (tiles == 0) {
    barrier_arrive(full, kArrivals);
    return;
  }
  barrier_expect(full, tiles * uint32_t(ring.tile_bytes));
  barrier_arrive(full, kArrivals);
#pragma unroll
  for (int t = 0; t < kStepTiles; ++t) {
    if (from[t] == nullptr || from[t] == no_tile()) continue;
    uint8_t *tile = to + t * ring.tile_bytes;
    if (ring.in_one_copy) {
      bulk_copy(tile, from[t], uint32_t(ring.tile_bytes), full);
    } else {
#pragma unroll 1
      for (int i = 0; i < call.pack_heads; ++i) {
        bulk_copy(tile + i * call.pool.tile_bytes, from[t] + i * call.pool.head_stride, uint32_t(call.pool.tile_bytes),
                  full);
      }
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

// Operands B of a lane: of rows 4 b + q of a warp, high bytes in even columns and low ones in odd.
template <int kBlocks, int kSteps>
using Queries = uint32_t[kBlocks][kSteps][2];

// Of a lane's rows and its two tokens of each tile.
template <int kBlocks>
using Scores = uint32_t[kBlocks][kStepTiles][2];

// K of one kind, and of a kind that the call names.
template <int kCodeBits, int kDim, bool kUniform, bool kTogetherTokens>
struct FixedK {
  static constexpr int kBits = kCodeBits;
  using Codes = KCodes<kBits, kDim, kUniform>;
  static constexpr int kSteps = Codes::kSteps;
  static constexpr bool kTogether = kTogetherTokens;

  // Of the lane's rows and its two tokens of two tiles, tile_bytes apart; modulo 2^32.
  template <int kBlocks>
  __device__ static void score(const AttentionCall &call, const uint8_t *codes, int tile_bytes, int g, int q,
                               const Queries<kBlocks, kSteps> &queries, Scores<kBlocks> &scores) {
    Codes loaded[kStepTiles][2];
#pragma unroll
    for (int t = 0; t < kStepTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Codes::load(loaded[t][i], codes + t * tile_bytes, k_token<kTogether>(i, g), q);
      }
    }
#pragma unroll
    for (int t = 0; t < kStepTiles; ++t) multiply(call, loaded[t], q, queries, t, scores);
  }

  template <int kBlocks>
  __device__ static void multiply(const AttentionCall &call, const Codes (&loaded)[2], int q,
                                  const Queries<kBlocks, kSteps> &queries, int t, Scores<kBlocks> &scores) {
    using Byte = std::conditional_t<kUniform, uint8_t, int8_t>;
    const LevelTable levels{call.k_levels[0], call.k_levels[1]};
    uint32_t x[kSteps][2], y[kSteps][2];
    Codes::expand(loaded[0], levels, q, x);
    Codes::expand(loaded[1], levels, q, y);
    // Uniform levels are 16 times as large in second registers, so two steps' first ones are a product, and their second
    // ones another.
    constexpr int kParts = kUniform ? 2 : 1;
    int32_t sums[kParts][kBlocks][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; s += kParts) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const auto half = [&](const auto(&of)[kSteps][2], int i) {
          return !kUniform ? of[s][i] : s + i < kSteps ? of[min(s + i, kSteps - 1)][part] : 0;
        };
        const uint32_t left[4] = {half(x, 0), half(y, 0), half(x, 1), half(y, 1)};
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          const uint32_t right[2] = {half(queries[b], 0), half(queries[b], 1)};
          int32_t(&sum)[4] = sums[part][b];
          mma_m16n8k32<Byte, int8_t>(sum, left, right, sum);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto both = [&](const auto &sum) { return 256 * uint32_t(sum[2 * i]) + uint32_t(sum[2 * i + 1]); };
        uint32_t score = both(sums[0][b]);
        if constexpr (kUniform) score = 16 * score + both(sums[1][b]);
        scores[b][t][i] = score;
      }
    }
  }
};

template <int kDim>
struct AnyK {
  static constexpr int kBits = 0;
  template <int kBits, bool kUniform = false>
  using Fixed = FixedK<kBits, kDim, kUniform, true>;
  static constexpr int kSteps = Fixed<4>::kSteps;
  static constexpr bool kTogether = true;

  template <int kBlocks>
  __device__ static void score(const AttentionCall &call, const uint8_t *codes, int tile_bytes, int g, int q,
                               const Queries<kBlocks, kSteps> &queries, Scores<kBlocks> &scores) {
    if (call.k_uniform != 0) return Fixed<2, true>::score(call, codes, tile_bytes, g, q, queries, scores);
    if (call.k_bits == 2) return Fixed<2>::score(call, codes, tile_bytes, g, q, queries, scores);
    if (call.k_bits == 3) return Fixed<3>::score(call, codes, tile_bytes, g, q, queries, scores);
    if (call.k_bits == 4) return Fixed<4>::score(call, codes, tile_bytes, g, q, queries, scores);
    Fixed<8>::score(call, codes, tile_bytes, g, q, queries, scores);
  }
};

// V of one kind. Weights are two bytes, and an instruction's 8 columns are shared:
//   two columns a row, its low bytes and its high ones; both tiles of a step at once, and four rows. Or, where levels come
//   from a table (kPairs, four rows at most), which gives bytes by turns of two channels: one column has weights in even
//   bytes, the other in odd ones; an instruction a tile and byte.
template <int kCodeBits, int kDim, bool kUniform, int kBlocksOfRows>
struct FixedV {
  static constexpr int kBits = kCodeBits;
  using Codes = VCodes<kBits, kDim, kUniform>;
  using Byte = std::conditional_t<kUniform, uint8_t, int8_t>;
  static constexpr int kBlocks = kBlocksOfRows, kTiles = Codes::kTiles;
  static constexpr bool kPairs = kBlocks == 1 && !kUniform && kBits != 8;
  static constexpr int kChannels = 2 * kTiles;  // that a lane has of each of its rows
  static_assert(!kPairs || kTiles % 2 == 0);

  // Low sums and high ones of (row, channel) are at low_of() and high_of().
  using Sums = int32_t[kBlocks * kTiles][4];
  template <class SumsOf>
  __device__ static auto &low_of(SumsOf &sums, int block, int channel) {
    if constexpr (kPairs) return sums[channel / 4 * 2][channel % 4];
    return sums[kBlocks * (channel / 2) + block][channel % 2 * 2];
  }
  template <class SumsOf>
  __device__ static auto &high_of(SumsOf &sums, int block, int channel) {
    if constexpr (kPairs) return sums[channel / 4 * 2 + 1][channel % 4];
    return sums[kBlocks * (channel / 2) + block][channel % 2 * 2 + 1];
  }

  // 16-bit weights of a row and a tile: of the lane's own two tokens, then of four tokens, as operands have them.
  __device__ static uint32_t pack(uint32_t first, uint32_t second) {
    return permute(first, second, kPairs ? 0x5410 : 0x5140);
  }
  struct Columns {
    uint32_t word[kBlocks][kStepTiles][kPairs ? 2 : 1];
  };
  __device__ static Columns transpose(const uint32_t (&words)[kBlocks][kStepTiles]) {
    Columns columns;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int t = 0; t < kStepTiles; ++t) {
        const uint32_t word = words[b][t];
        if constexpr (kPairs) {  // of a row's two columns both have all of it
          columns.word[b][t][0] = transpose_halves(permute(word, 0, 0x1010));
          columns.word[b][t][1] = transpose_halves(permute(word, 0, 0x3232));
        } else {
          columns.word[b][t][0] = transpose_halves(word);
        }
      }
    }
    return columns;
  }

  // V's codes of two tiles, tile_bytes apart. Loaded early where they are few.
  static constexpr bool kEarly = !kPairs && Codes::kWords <= 4;
  struct Loaded {
    Codes tile[kEarly ? kStepTiles : 1];
  };
  __device__ static void load(const uint8_t *codes, int tile_bytes, int g, int q, Loaded &loaded) {
    if constexpr (kEarly) {
#pragma unroll
      for (int t = 0; t < kStepTiles; ++t) Codes::load(loaded.tile[t], codes + t * tile_bytes, g, q);
    }
  }

  // Adds a step.
  __device__ static void add(const AttentionCall &call, const uint8_t *codes, int tile_bytes, int g, int q,
                             const Columns &weights, const Loaded &loaded, Sums &sums) {
    const LevelTable levels{call.v_levels[0], call.v_levels[1]};
    if constexpr (kPairs) {
      const uint32_t selector[2] = {g % 2 != 0 ? 0x2404u : 0x4240u, g % 2 != 0 ? 0x3414u : 0x4341u};
#pragma unroll
      for (int tile = 0; tile < kStepTiles; ++tile) {
        uint32_t right[2][2];  // by byte
#pragma unroll
        for (int byte = 0; byte < 2; ++byte) {
#pragma unroll
          for (int i = 0; i < 2; ++i) right[byte][i] = permute(weights.word[0][tile][i], 0, selector[byte]);
        }
        Codes v;
        uint32_t a[kTiles][2];
        Codes::load(v, codes + tile * tile_bytes, g, q);
        Codes::template expand<true>(v, levels, g, a);
#pragma unroll
        for (int n = 0; n < kTiles / 2; ++n) {
          const uint32_t left[4] = {a[2 * n][0], a[2 * n + 1][0], a[2 * n][1], a[2 * n + 1][1]};
#pragma unroll
          for (int byte = 0; byte < 2; ++byte) {
            int32_t(&sum)[4] = sums[2 * n + byte];
            mma_m16n8k32<Byte, uint8_t>(sum, left, right[byte], sum);
          }
        }
      }
    } else {
      Codes first, second;
      uint32_t a[kTiles][2], b[kTiles][2];
      if constexpr (kEarly) {
        first = loaded.tile[0], second = loaded.tile[1];
      } else {
        Codes::load(first, codes, g, q);
        Codes::load(second, codes + tile_bytes, g, q);
      }
      Codes::template expand<false>(first, levels, g, a);
      Codes::template expand<false>(second, levels, g, b);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const uint32_t left[4] = {a[m][0], a[m][1], b[m][0], b[m][1]};
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          const uint32_t right[2] = {weights.word[block][0][0], weights.word[block][1][0]};
          int32_t(&sum)[4] = sums[kBlocks * m + block];
          mma_m16n8k32<Byte, uint8_t>(sum, left, right, sum);
        }
      }
    }
  }

  // Sums of w * level of a row, the sum of whose w is `weights`.
  __device__ static void add_up(const AttentionCall &, const Sums &sums, int block, float weights,
                                float (&levels)[kChannels]) {
    unrolled<kChannels>([&](auto channel) {
      const float bytes = __fmaf_rn(256.0f, float(high_of(sums, block, channel)), float(low_of(sums, block, channel)));
      // level = 2 byte + 1, or 2 (byte >> shift) - 3
      const float factor = kUniform ? 2.0f / float(1 << Codes::shift(channel / 2, channel % 2)) : 2.0f;
      levels[channel] = __fmaf_rn(factor, bytes, kUniform ? -3.0f * weights : weights);
    });
  }

  // set(index, channel) for the index of those.
  template <class Set>
  __device__ static void for_each_channel(const AttentionCall &, int g, Set &&set) {
    unrolled<kChannels>([&](auto channel) {
      constexpr int kTile = channel / 2, half = channel % 2;
      set(channel, Codes::template channel_of<kTile>(half, g));
    });
  }
};

// V of a kind that the call names.
template <int kDim>
struct AnyV : FixedV<4, kDim, false, 2> {
  using Base = FixedV<4, kDim, false, 2>;
  struct Loaded {};
  __device__ static void load(const uint8_t *, int, int, int, Loaded &) {}

  // take(V of that kind)
  template <class Take>
  __device__ static void choose(const AttentionCall &call, Take &&take) {
    if (call.v_uniform != 0) return take(FixedV<2, kDim, true, 2>());
    if (call.v_bits == 2) return take(FixedV<2, kDim, false, 2>());
    if (call.v_bits == 3) return take(FixedV<3, kDim, false, 2>());
    if (call.v_bits == 4) return take(Base());
    take(FixedV<8, kDim, false, 2>());
  }

  __device__ static void add(const AttentionCall &call, const uint8_t *codes, int tile_bytes, int g, int q,
                             const typename Base::Columns &weights, const Loaded &, typename Base::Sums &sums) {
    choose(call, [&](auto v) {
      using V = decltype(v);
      typename V::Columns same;
      std::memcpy(&same, &weights, sizeof same);
      typename V::Loaded loaded;
      V::load(codes, tile_bytes, g, q, loaded);
      V::add(call, codes, tile_bytes, g, q, same, loaded, sums);
    });
  }
  __device__ static void add_up(const AttentionCall &call, const typename Base::Sums &sums, int block, float weights,
                                float (&levels)[Base::kChannels]) {
    if (call.v_uniform != 0) return FixedV<2, kDim, true, 2>::add_up(call, sums, block, weights, levels);
    Base::add_up(call, sums, block, weights, levels);  // the same for all others
  }
  template <class Set>
  __device__ static void for_each_channel(const AttentionCall &call, int g, Set &&set) {
    choose(call, [&](auto v) { decltype(v)::for_each_channel(call, g, set); });
  }
};

template <class KSide, class VSide, int kDimK, int kDimV, int kBlocksOfRows, bool kAnyPages>
struct AttentionShape {
  using K = KSide;
  using V = VSide;
  static constexpr bool kAny = kAnyPages;  // scales of any type, blocks of any size
  static constexpr int kHeadDimV = kDimV;
  // Bytes of a tile's codes, of fixed bits. Scales follow: K's, then V's.
  static constexpr int kBytesK = kTileTokens * kDimK * K::kBits / 8, kBytesV = kTileTokens * kDimV * V::kBits / 8;
  static constexpr int kBlocks = kBlocksOfRows, kRows = 4 * kBlocks;
  static constexpr int kScratch = kBlocks * V::kChannels * 32;  // floats that a warp has
  static constexpr int kWarps = attention_warps(kDimK, kDimV, kBlocks);
  // Warps beside these that find and copy steps, 0 where they do it themselves; and what registers both have then.
  static constexpr int kCopyWarps = kBlocks > 1 && !kAny ? 4 : 0;
  static constexpr int kRegisters = 152, kCopyRegisters = 56;
  static_assert(kCopyWarps == 0 || 32 * (kWarps * kRegisters + kCopyWarps * kCopyRegisters) <= 1 << 16);
};

// ---- one warp's rows

// Where row `row` of an item is in [num_tokens, q_heads], or -1.
__device__ __forceinline__ int64_t row_at(const AttentionCall &call, const AttentionRing &ring,
                                          const ListedItem &listed, int pack_head, int row) {
  const AttentionItem &item = listed.item;
  const int block_token = divided(row, ring.by_block_heads);
  const int token = item.token_block * call.block_tokens + block_token;
  const int in_group = item.head_part * call.block_heads + row - block_token * call.block_heads;
  if (row >= call.block_tokens * call.block_heads || token >= listed.sequence.q_len || in_group >= call.group)
    return -1;
  return int64_t{listed.sequence.begin + token} * call.q_heads +
         (item.head_pack * call.pack_heads + pack_head) * call.group + in_group;
}

// Describes the rows of a warp's kv head, lanes 0 .. 7 one each; gives the item's tiles [x, y) that are visible to every
// row, and coded.
template <int kRows>
__device__ __forceinline__ int2 describe_rows(const AttentionCall &call, const AttentionRing &ring,
                                              const ListedItem &listed, int pack_head, RowState *states) {
  const Sequence &sequence = listed.sequence;
  const AttentionItem &item = listed.item;
  const int row = lane_index();
  const int64_t at = row_at(call, ring, listed, pack_head, row);
  int begin = INT32_MIN, end = INT32_MAX;
  RowState state{kMinusInfinity, 0, 0, 0, 0};
  if (at >= 0) {
    state.position = position(call, sequence, item.token_block * call.block_tokens + divided(row, ring.by_block_heads));
    const KeyRange keys = visible_keys(call, sequence, state.position);
    begin = state.low = keys.low;
    end = state.high = min(min(keys.high, sequence.coded_length), item.end_tile * kTileTokens);
    if (call.alibi_slopes != nullptr) state.slope = call.alibi_slopes[at % call.q_heads] * kLog2E;
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
  const bool adjusted = call.alibi_slopes != nullptr || begin >= end;
  if (adjusted || end < 0) return make_int2(0, 0);
  return make_int2((max(begin, 0) + kTileTokens - 1) / kTileTokens, end / kTileTokens);
}

template <class Shape>
class WarpRows {
 public:
  using K = typename Shape::K;
  using V = typename Shape::V;
  static constexpr int kBlocks = Shape::kBlocks;  // and rows that a lane has
  static constexpr int kKeys = 2;                 // of a tile that a lane has

  // `states`, `plain`: of all warps.
  __device__ WarpRows(const AttentionCall &call, RowState *states, int2 *plain)
      : call_(call),
        all_states_(states),
        all_plain_(plain),
        g_(lane_index() / 4),
        q_(lane_index() % 4),
        part_(pinned(kFirstPart + uint32_t(g_) * kMorePart)) {}

  // Loads the queries of an item's rows; begin() comes next.
  __device__ __forceinline__ void load(const AttentionRing &ring, const ListedItem &listed, int pack_head) {
    // What is seldom needed is computed anew where registers are few.
    const int g = kBlocks == 1 ? g_ : lane_now() / 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t at = row_at(call_, ring, listed, pack_head, 4 * b + g / 2);  // of the lane's column
      int4 query = make_int4(0, __float_as_int(kMinusInfinity), 0, 0);
      const uint8_t *bytes = call_.query_operands + at * 2 * call_.operand_bytes + q_ * 16 * K::kSteps;
      if (at >= 0) query = reinterpret_cast<const int4 *>(call_.query_rows)[at];
#pragma unroll
      for (int s = 0; s < K::kSteps; ++s) {
        uint4 word = make_uint4(0, 0, 0, 0);
        if (at >= 0) word = *reinterpret_cast<const uint4 *>(bytes + 16 * s);
        queries_[b][s][0] = g % 2 == 0 ? word.x : word.y;
        queries_[b][s][1] = g % 2 == 0 ? word.z : word.w;
      }
      const int bias = int(256 * uint32_t(query.z) + uint32_t(query.w)), column = 8 * (lane_now() % 4);
      gain_[b] = __int_as_float(__shfl_sync(kAll, query.x, column));
      shifted_[b] = __int_as_float(__shfl_sync(kAll, query.y, column));
      bias_[b] = float(__shfl_sync(kAll, bias, column));
    }
  }

  // `number`: of the first tile.
  __device__ void begin(const AttentionRing &ring, const ListedItem &listed, int pack_head, int number) {
    const int2 plain = describe_rows<Shape::kRows>(call_, ring, listed, pack_head, states());
    plain_end_ = number >= plain.x && call_.soft_cap <= 0 ? plain.y : 0;
#pragma unroll
    for (int n = 0; n < kBlocks * V::kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums_[n][i] = 0;
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (call_.soft_cap > 0) gain_[b] = fminf(gain_[b] * call_.cap_factor, 0x1p90f);  // times sums still finite
      bias_[b] *= gain_[b];
      sum_[b] = 0;
      weights_[b] = 0;
      squares_[b] = 0;
      flags_[b] = kUnset;
      if (lane_index() < 4) row(b).offset = shifted_[b];
    }
    if (lane_index() == 0) all_plain_[thread_index_now() / 32] = plain;
    __syncwarp();
    steps_ = 0;
    turn_ = 0;
    next_look_ = 1;
  }

  // Takes a step: tiles at `codes` and `tile_bytes` after, `number` and the next in their sequence. `exact`: tokens that are
  // read raw, by tiles. `left`: the warp's steps of the item from this one on. `between` is called once, where it may take a
  // while.
  template <class Between>
  __device__ __forceinline__ void take(const uint8_t *codes, int tile_bytes, int number, const uint16_t *exact,
                                       int left, Between &&between) {
    uint32_t words[kBlocks][kStepTiles];  // 16-bit weights of the lane's keys
    weigh(codes, tile_bytes, number, exact, left, words);
    const uint8_t *v_codes = codes + (Shape::kAny ? call_.pool.v_codes : Shape::kBytesK);
    typename V::Loaded loaded;
    V::load(v_codes, tile_bytes, g_, q_, loaded);
    const typename V::Columns columns = V::transpose(words);
    between();
    V::add(call_, v_codes, tile_bytes, g_, q_, columns, loaded, sums_);
  }

  // Of the lane's row 4 b + q.
  __device__ RowEnd end(int b) const {
    const float sum = row_sum(sum_[b]);
    const bool set = (flags_[b] & kUnset) == 0 && sum != 0;
    return {set ? row(b).offset - shifted_[b] : kMinusInfinity, sum};
  }

  // The lane's sums of w * level, see FixedV.
  __device__ void add_up(float (&levels)[kBlocks][V::kChannels]) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) V::add_up(call_, sums_, b, float(row_weights(b, steps_)), levels[b]);
  }
  template <class Set>
  __device__ void for_each_channel(Set &&set) const {
    V::for_each_channel(call_, lane_now() / 4, set);
  }
  __device__ static int row_of(int b) {
    return 4 * b + lane_now() % 4;
  }

 private:
  static constexpr uint32_t kOne = 0x4b000000;  // 2^23: integers are a float's low bits
  static constexpr int kLaneKeys = kStepTiles * kKeys, kRowKeys = kStepTiles * kTileTokens;  // of a row and step
  // The row's reference is not chosen yet, or the row does not exist; it is to be moved, and from kFall on: how far down.
  static constexpr unsigned kUnset = 1, kMove = 2, kFall = 4;
  // log2 of what the root of the mean w^2 is not left below, where rounding adds 1 / (sqrt(6) * 2350) = 1.7e-4 to the root
  // of the sum of squares, or 8e-4 (512) where the output is of 16 bits; of what a first reference is to make of it; and
  // the first step after which it is looked at.
  __device__ bool is_precise() const {
    return call_.out.type == TQ_TYPE_F32;
  }
  __device__ float least_weight() const {
    return is_precise() ? 11.2f : 9.0f;
  }
  __device__ float good_weight() const {
    return is_precise() ? 11.9f : 9.9f;
  }
  __device__ int first_look() const {
    return is_precise() ? 1 : 8;
  }
  // Sums of weights that are so large that smaller weights' rounding does not show, and that are too large.
  __device__ uint32_t large_sum() const {
    return is_precise() ? 1u << 27 : 1u << 24;
  }
  static constexpr uint32_t kMostSum = 1u << 29;
  // A few keys, a sink say, may have most of a row's weight, and the others' rounding show in f32 outputs. There looks
  // count squares apart from those before, of which this is left; and a reference that rises above weights of this size
  // (log2) falls again in the next step.
  static constexpr float kTrace = 0x1p-14f, kFaint = 5.0f;

  __device__ RowState &row(int b) const {
    return states()[row_of(b)];
  }

  // Whether all of the warp's rows see tile `number` and the next, with nothing to adjust but a soft cap.
  __device__ bool is_plain(int number) const {
    const int2 plain = all_plain_[thread_index_now() / 32];
    return number >= plain.x && number + kStepTiles <= plain.y;
  }

  // Of all lanes that have keys of the row.
  template <class Number>
  __device__ static Number row_sum(Number x) {
    x += __shfl_xor_sync(kAll, x, 4);
    x += __shfl_xor_sync(kAll, x, 8);
    x += __shfl_xor_sync(kAll, x, 16);
    return x;
  }
  __device__ static float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAll, x, 4));
    x = fmaxf(x, __shfl_xor_sync(kAll, x, 8));
    x = fmaxf(x, __shfl_xor_sync(kAll, x, 16));
    return x;
  }

  // The sum of the row's weights.
  __device__ uint32_t row_weights(int b, int steps) const {
    return row_sum(weights_[b] - uint32_t(steps) * (kLaneKeys * kOne));
  }

  // Of the lane's keys of a tile.
  __device__ void load_scales(const uint8_t *scales, int type, float (&scale)[kKeys]) const {
    if (Shape::kAny && type == TQ_TYPE_F32) {
      static_assert(!Shape::kAny || K::kTogether);
      const float2 v = *reinterpret_cast<const float2 *>(scales + 8 * g_);
      scale[0] = v.x, scale[1] = v.y;
    } else if constexpr (K::kTogether) {
      f32_pair_from_f16(*reinterpret_cast<const uint32_t *>(scales + 4 * g_), scale[0], scale[1]);
    } else {
      const uint2 v = *reinterpret_cast<const uint2 *>(scales + 8 * (g_ / 2));
      f32_pair_from_f16(permute(v.x, v.y, g_ % 2 != 0 ? 0x7632 : 0x5410), scale[0], scale[1]);
    }
  }

  __device__ __forceinline__ void weigh(const uint8_t *codes, int tile_bytes, int number, const uint16_t *exact,
                                        int left, uint32_t (&words)[kBlocks][kStepTiles]) {
    ++steps_;
    turn_ += part_;
    Scores<kBlocks> integers;
    K::score(call_, codes, tile_bytes, g_, q_, queries_, integers);
    float scores[kBlocks][kStepTiles][kKeys];  // times gain
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int t = 0; t < kStepTiles; ++t) {
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          scores[b][t][i] = __fmaf_rn(float(int32_t(integers[b][t][i])), gain_[b], bias_[b]);
        }
      }
    }
    float k_scale[kStepTiles][kKeys], v_scale[kStepTiles][kKeys];
    constexpr int kScales = Shape::kBytesK + Shape::kBytesV;
#pragma unroll
    for (int t = 0; t < kStepTiles; ++t) {
      const uint8_t *tile = codes + t * tile_bytes;
      load_scales(tile + (Shape::kAny ? call_.pool.k_scales : kScales), call_.k_scale_type, k_scale[t]);
      load_scales(tile + (Shape::kAny ? call_.pool.v_scales : kScales + 2 * kTileTokens), call_.v_scale_type,
                  v_scale[t]);
    }
    float y[kBlocks][kStepTiles][kKeys];  // log2 of the weight p
    if (number + kStepTiles <= plain_end_) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int t = 0; t < kStepTiles; ++t) {
#pragma unroll
          for (int i = 0; i < kKeys; ++i) {
            y[b][t][i] = __fmaf_rn(scores[b][t][i], k_scale[t][i], shifted_[b]);
          }
        }
      }
    } else if (call_.soft_cap > 0 && is_plain(number)) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const float offset = row(b).offset, start = offset * call_.cap_factor,
                    end = call_.cap_log2 + (shifted_[b] - offset);
#pragma unroll
        for (int t = 0; t < kStepTiles; ++t) {
#pragma unroll
          for (int i = 0; i < kKeys; ++i) {
            y[b][t][i] = cap(__fmaf_rn(scores[b][t][i], k_scale[t][i], start), end);
          }
        }
      }
    } else {
      adjust(scores, k_scale, number, exact, y, v_scale);
    }
    float p[kBlocks][kStepTiles][kKeys];
    uint32_t w[kBlocks][kStepTiles][kKeys], bits[kBlocks];
    weights_of(y, v_scale, p, w, bits);
    bool moves[kBlocks], any = false;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      moves[b] = (bits[b] & 0xffff0000) != kOne || flags_[b] != 0;
      any = any || moves[b];
    }
    if (__any_sync(kAll, any)) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if (kBlocks == 1 || __any_sync(kAll, moves[b])) move_reference(b, v_scale, left, y[b]);
      }
      weights_of(y, v_scale, p, w, bits);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int t = 0; t < kStepTiles; ++t) {
#pragma unroll
          for (int i = 0; i < kKeys; ++i) w[b][t][i] = min(max(w[b][t][i], kOne), kOne + 0xffff);
        }
        bits[b] = kOne | (bits[b] & 0xffff);
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      sum_[b] += (p[b][0][0] + p[b][0][1]) + (p[b][1][0] + p[b][1][1]);
      weights_[b] += w[b][0][0] + w[b][0][1] + (w[b][1][0] + w[b][1][1]);
#pragma unroll
      for (int t = 0; t < kStepTiles; ++t) words[b][t] = V::pack(w[b][t][0], w[b][t][1]);
      const float largest = __uint_as_float(bits[b]) - __uint_as_float(kOne);
      squares_[b] = __fmaf_rn(largest, largest, squares_[b]);
    }
    if (steps_ == next_look_) {
      next_look_ += min(next_look_, kMostSteps);
      const int2 plain = all_plain_[thread_index_now() / 32];
      if (number >= plain.x && call_.soft_cap <= 0) plain_end_ = plain.y;
      if (steps_ >= first_look()) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) look(b);
      }
    }
  }

  // soft_cap * tanh(x / soft_cap) in units of log2, plus `end` - cap_log2; of x * cap_factor.
  __device__ float cap(float x, float end) const {
    return __fmaf_rn(-2.0f * call_.cap_log2, reciprocal_approx(1.0f + exp2_approx(x)), end);
  }

  // y with all that changes or hides scores: -infinity where hidden, and no value where no row sees it.
  __device__ void adjust(const float (&scores)[kBlocks][kStepTiles][kKeys], const float (&k_scale)[kStepTiles][kKeys],
                         int number, const uint16_t *exact, float (&y)[kBlocks][kStepTiles][kKeys],
                         float (&v_scale)[kStepTiles][kKeys]) const {
#pragma unroll
    for (int t = 0; t < kStepTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const int token = k_token<K::kTogether>(i, g_), j = (number + t) * kTileTokens + token;
        const bool coded = (exact[t] >> token & 1) == 0;
        bool any = false;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          const RowState &state = row(b);
          float score = __fmaf_rn(scores[b][t][i], k_scale[t][i],
                                  call_.soft_cap > 0 ? state.offset * call_.cap_factor : state.offset);
          if (call_.soft_cap > 0) score = cap(score, call_.cap_log2);
          if (call_.alibi_slopes != nullptr) score = __fmaf_rn(state.slope, float(j - state.position), score);
          const bool seen = j >= state.low && j < state.high && coded;
          y[b][t][i] = seen ? score + (shifted_[b] - state.offset) : kMinusInfinity;
          any = any || seen;
        }
        // It may be anything, and what one row sees is times zero for the other.
        v_scale[t][i] = !any ? 0 : kBlocks > 1 ? fminf(v_scale[t][i], 0x1.fffffep127f) : v_scale[t][i];
      }
    }
  }

  // Weights p, and w as kOne + w; all bits of a row's w. w is p * v_scale rounded down after an addition in [0, 1) that
  // goes round with the steps, in each lane of a row by another irrational part of a turn: many equal weights, as small as
  // they may be, keep their sum, which rounding to the nearest would change by up to a half of each.
  __device__ void weights_of(const float (&y)[kBlocks][kStepTiles][kKeys], const float (&v_scale)[kStepTiles][kKeys],
                             float (&p)[kBlocks][kStepTiles][kKeys], uint32_t (&w)[kBlocks][kStepTiles][kKeys],
                             uint32_t (&bits)[kBlocks]) const {
    const float addition = __uint_as_float(turn_ >> 9 | 0x3f800000);  // plus 1
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      bits[b] = 0;
#pragma unroll
      for (int t = 0; t < kStepTiles; ++t) {
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          p[b][t][i] = exp2_approx(y[b][t][i]);
          w[b][t][i] = __float_as_uint(__fadd_rz(__fmaf_rn(p[b][t][i], v_scale[t][i], addition), 0x1p23f - 1));
          bits[b] |= w[b][t][i];
        }
      }
    }
  }

  // After 1, 2, 4 .. steps: whether weights are so small that their rounding shows, or sums too large; the next step does
  // what is needed. Rounding adds an error of about sqrt(n / 6) to a sum of n values, if they are independent of size
  // sqrt(sum of w^2).
  __device__ void look(int b) {
    const uint32_t sum = row_weights(b, steps_);
    const float size = recent_size(b, steps_);
    if (is_precise()) squares_[b] *= kTrace;
    if ((flags_[b] & kUnset) != 0) return;
    if (size < least_weight() && sum < large_sum() && shows(sum)) flags_[b] |= fall_from(size);
    if (sum >= kMostSum || steps_ % kMostSteps == 0) flags_[b] |= kMove;
  }

  // log2 of the root of the row's mean w^2 in `steps`: in all, or since the last look before the present step's.
  __device__ float recent_size(int b, int steps) const {
    const int before = steps_ - 1;
    int last = 0;
    if (is_precise() && before > 0) last = before < kMostSteps ? 1 << (31 - __clz(before)) : before & -kMostSteps;
    const float keys = __fmaf_rn(float(last), 0.5f * kTrace, float(steps - last)) * float(kRowKeys);
    return 0.5f * log2_approx(fmaxf(0.5f * row_sum(squares_[b]), 1e-30f) * reciprocal_approx(keys));
  }
  // Whether weights of less than the least size have a part of the sum that matters.
  __device__ bool shows(uint32_t sum) const {
    return float(sum) < exp2_approx(least_weight()) * float(steps_ * kRowKeys);
  }
  // Flags for a reference that is to fall, because weights have this size.
  __device__ unsigned fall_from(float size) const {
    return kMove + kFall * unsigned(fminf(least_weight() - size + 1, 60));
  }

  // How far above the largest of a step's weights, `most`, the reference of a row is to be that sees its first step: as far
  // as the largest of the `left` steps is expected from normal scores, but so that the mean square, which grows with the
  // number of keys half as fast, is good.
  __device__ float expected_rise(const float (&weight)[kStepTiles][kKeys], float most, int left) const {
    float count = 0, mean = 0, square = 0, power = 0;
#pragma unroll
    for (int t = 0; t < kStepTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (weight[t][i] == kMinusInfinity) continue;
        const float below = weight[t][i] - most;
        count += 1, mean += below, square = __fmaf_rn(below, below, square);
        power += exp2_approx(2 * below);
      }
    }
    count = reciprocal_approx(fmaxf(row_sum(count), 1));
    mean = row_sum(mean) * count;
    square = row_sum(square) * count;
    power = row_sum(power) * count;
    const float spread = exp2_approx(0.5f * log2_approx(fmaxf(__fmaf_rn(-mean, mean, square), 1e-6f)));
    const float more = log2_approx(float(left)) * spread;  // E of the largest of 32 n: 2.07 + 0.22 log2 n
    const float room = fmaxf(0.5f * log2_approx(power) + (16 - good_weight()), 0);
    return fminf(fmaxf(2.07f * spread + 0.22f * more + mean, 0), room + 0.08f * more);
  }

  // Moves the references of rows 4 b + q that are not chosen yet, that a weight exceeds, or that look() wants moved; `y` and
  // the sums with them.
  __device__ void move_reference(int b, const float (&v_scale)[kStepTiles][kKeys], int left,
                                 float (&y)[kStepTiles][kKeys]) {
    // log2 of the row's largest weights w and p.
    float weight[kStepTiles][kKeys], most = kMinusInfinity, most_score = kMinusInfinity;
#pragma unroll
    for (int t = 0; t < kStepTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        weight[t][i] = v_scale[t][i] > 0 ? y[t][i] + log2_approx(v_scale[t][i]) : kMinusInfinity;
        most = fmaxf(most, weight[t][i]);
        most_score = fmaxf(most_score, y[t][i]);
      }
    }
    most = row_max(most);
    const bool unset = (flags_[b] & kUnset) != 0;
    float above = left > 1 ? 1.0f : 0.1f;
    unsigned next = 0;  // flags
    if (__any_sync(kAll, unset)) {
      most_score = row_max(most_score);
      const float expected = expected_rise(weight, most, left);
      if (unset && left > 1) above = expected + 1.1f;
      if (unset && most == kMinusInfinity) most = most_score;  // no value, but a weight
    }
    int rise = 0, fall = -int(flags_[b] / kFall);
    if (most >= 16 || (unset && most != kMinusInfinity)) rise = __float2int_rn(ceilf(most + above - 16));
    const int steps = steps_ - 1;  // before this one
    uint32_t sum = row_weights(b, steps);
    if (!unset) {
      if (fall != 0 && rise == 0) {
        // Not so far that a weight of this step is too large, nor the sum.
        rise = most == kMinusInfinity ? fall : max(fall, __float2int_rn(ceilf(most + 0.1f - 16)));
        rise = -min(-rise, max(__clz(int(sum)) - 3, 0));
      }
      if (sum >= kMostSum / 2) rise = max(rise, 4);
    }
    if (__any_sync(kAll, !unset && (rise != 0 || (flags_[b] & kMove) != 0))) {
      const int shift = unset ? 0 : rise;
      if (is_precise()) {
        const float size = recent_size(b, steps) - float(shift);
        if (shift > 0 && size < kFaint) next = fall_from(size);
      }
      shift_sums(b, shift);
      sum = shift >= 32 ? 0 : shift >= 0 ? sum >> shift : sum << -shift;
      sum_[b] = shift > 126 ? 0.0f : sum_[b] * __int_as_float((127 - shift) << 23);
      weights_[b] = uint32_t(steps) * (kLaneKeys * kOne);
      if (lane_now() < 4) weights_[b] += sum;
      squares_[b] = shift > 60 ? 0.0f : squares_[b] * __int_as_float((127 - 2 * shift) << 23);
    }
    shifted_[b] -= float(rise);
#pragma unroll
    for (int t = 0; t < kStepTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) y[t][i] -= float(rise);
    }
    // gain 0: no such row, or all its scores are equal
    flags_[b] = unset && most == kMinusInfinity && gain_[b] != 0 ? kUnset : next;
  }

  // Divides all sums of the lane's row by 2^shift. Low sums, of at most 255 * 127 * 32 a step, are carried to high ones before
  // 2 * kMostSteps steps.
  __device__ void shift_sums(int b, int shift) {
    const bool simple = !__any_sync(kAll, shift < 0 || shift > 16 || (steps_ - 1) % kMostSteps == 0);
    if (simple) {
      const int32_t mask = (1 << shift) - 1;
#pragma unroll
      for (int i = 0; i < V::kChannels; ++i) {
        int32_t &low = V::low_of(sums_, b, i), &high = V::high_of(sums_, b, i);
        low = (low + 256 * (high & mask)) >> shift;
        high >>= shift;
      }
    } else if (!__any_sync(kAll, shift > 0 || shift < -16)) {
#pragma unroll
      for (int i = 0; i < V::kChannels; ++i) {
        int32_t &low = V::low_of(sums_, b, i), &high = V::high_of(sums_, b, i);
        high = (high + (low >> 8)) << -shift;
        low = (low & 255) << -shift;
      }
    } else {
#pragma unroll
      for (int i = 0; i < V::kChannels; ++i) {
        int32_t &low = V::low_of(sums_, b, i), &high = V::high_of(sums_, b, i);
        int64_t sum = 256 * int64_t{high} + low;
        sum = shift >= 0 ? sum >> min(shift, 63) : sum * (int64_t{1} << -shift);
        low = int32_t(sum & 255), high = int32_t(sum >> 8);
      }
    }
  }

  // Of the warp; what is seldom needed is computed anew, because registers are few.
  __device__ RowState *states() const {
    return all_states_ + thread_index_now() / 32 * Shape::kRows;
  }
  __device__ static int lane_now() {
    return thread_index_now() % 32;
  }

  static constexpr uint32_t kFirstPart = 0x67c04f43, kMorePart = 0x77d0947e;

  const AttentionCall &call_;
  RowState *const all_states_;  // an offset from the start of shared memory that the launch gives
  int2 *const all_plain_;
  const int g_, q_;
  const uint32_t part_;  // see weights_of()

  // The item's.
  Queries<kBlocks, K::kSteps> queries_;
  float gain_[kBlocks], bias_[kBlocks];  // with a soft cap times cap_factor; what is added to scores, times gain
  int plain_end_;                        // steps that end there or before need no adjusting and have no soft cap

  // Of the lane's rows and keys.
  float shifted_[kBlocks];     // the row's offset less its reference
  float sum_[kBlocks];         // of p
  uint32_t weights_[kBlocks];  // of w, with kOne for each of the steps
  float squares_[kBlocks];     // of the bits of every step's w: about twice the sum of w^2; see kTrace
  unsigned flags_[kBlocks];
  // The warp's.
  int steps_, next_look_;  // of the item, with the one that is being taken
  uint32_t turn_;          // see weights_of(); in units of 2^-32
  typename V::Sums sums_;
};

// ---- the kernel

// Adds up what the teams have of a head's rows, and leaves it as a partial result. Short, because it is run once: fetching
// code takes longer than running it. Teams wait for each other before, so that those that are done go on to the next item.
template <class Shape>
__device__ __forceinline__ void write_partial(const AttentionCall &call, const AttentionRing &ring, uint8_t *memory,
                                              const ListedItem &listed, const WarpRows<Shape> &rows) {
  constexpr int kRows = Shape::kBlocks, kColumns = Shape::V::kChannels, kWarpScratch = Shape::kScratch;
  const int thread = thread_index_now(), lane = thread % 32, warp = thread / 32;
  const Team team{divided(warp, ring.by_pack_heads), ring.teams, ring.by_teams};
  const int head = warp - team.index * call.pack_heads;
  const int num_rows = call.block_tokens * call.block_heads;
  // Of the head in the second team, and of the first if that is alone; those of the next are pack_heads warps further.
  float *scratch = reinterpret_cast<float *>(memory + ring.scratch_at) + head * kWarpScratch;
  RowEnd *ends = reinterpret_cast<RowEnd *>(memory + ring.ends_at) + head * Shape::kRows;
  const int end_stride = call.pack_heads * Shape::kRows;  // of teams
  group_barrier(1 + head, 32 * team.count);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const RowEnd end = rows.end(r);
    if (lane < 4) ends[team.index * end_stride + rows.row_of(r)] = end;
  }
  float sums[kRows][kColumns];
  rows.add_up(sums);
  if (team.index > 0) {
    float *own = scratch + (team.index - 1) * call.pack_heads * kWarpScratch + lane;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) own[32 * (r * kColumns + i)] = sums[r][i];
    }
  }
  group_barrier(1 + head, 32 * team.count);
  if (team.index == 0) {
    uint8_t *slot = call.partials + listed.slot * call.slot_bytes;
    if (lane < num_rows) {
      float most = kMinusInfinity, sum = 0;
#pragma unroll 1
      for (int i = 0; i < team.count; ++i) most = fmaxf(most, ends[i * end_stride + lane].base);
#pragma unroll 1
      for (int i = 0; i < team.count; ++i) {
        const RowEnd other = ends[i * end_stride + lane];
        if (other.base != kMinusInfinity) sum = __fmaf_rn(other.total, exp2_approx(other.base - most), sum);
      }
      (reinterpret_cast<float2 *>(slot) + head * num_rows)[lane] = make_float2(most, sum);
    }
    float most[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const RowEnd *row_ends = ends + rows.row_of(r);
      const float own = row_ends->base;
      most[r] = own;
#pragma unroll 1
      for (int i = 1; i < team.count; ++i) most[r] = fmaxf(most[r], row_ends[i * end_stride].base);
      const float factor = own == kMinusInfinity ? 0.0f : exp2_approx(own - most[r]);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sums[r][i] *= factor;
    }
#pragma unroll 1
    for (int other = 1; other < team.count; ++other) {
      const float *from = scratch + (other - 1) * call.pack_heads * kWarpScratch + lane;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float base = ends[other * end_stride + rows.row_of(r)].base;
        const float factor = base == kMinusInfinity ? 0.0f : exp2_approx(base - most[r]);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          sums[r][i] = __fmaf_rn(from[32 * (r * kColumns + i)], factor, sums[r][i]);
        }
      }
    }
    // By way of the scratch, whose floats have been read, to stores of whole sectors. Of each four floats those 32 apart have
    // banks of their own.
    const auto place = [](int i) { return uint32_t(i) ^ (uint32_t(i) / 32 % 8 * 4); };
    __syncwarp();
    rows.for_each_channel([&](int i, int channel) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) scratch[place(rows.row_of(r) * Shape::kHeadDimV + channel)] = sums[r][i];
    });
    __syncwarp();
    constexpr int kFloats = Shape::kRows * Shape::kHeadDimV;
    static_assert(kFloats <= kWarpScratch && kFloats % 32 == 0);
    const int floats = num_rows * Shape::kHeadDimV;
    float *to = reinterpret_cast<float *>(slot + ring.outputs_at) + head * floats;
#pragma unroll
    for (int i = 4 * lane; i < kFloats; i += 128) {
      if (i < floats) *reinterpret_cast<float4 *>(to + i) = *reinterpret_cast<const float4 *>(scratch + place(i));
    }
  }
}

// Says that the warp's parts of all listed items are written, if it writes any. After the last of them, because it waits
// for what has been stored; "finish" has no room to run before.
__device__ inline void count_parts(const AttentionCall &call, const AttentionShared &shared) {
  const int thread = thread_index_now(), lane = thread % 32, head = thread / 32;
  static_assert(kMaxItems <= 32);
  __syncwarp();
  if (head >= call.pack_heads || lane >= shared.num_items) return;  // other teams
  const ListedItem &listed = shared.items[lane];
  if (listed.item.first_tile >= listed.item.end_tile) return;
  add_released(&call.part_counts[(listed.slot - int32_t(blockIdx.x)) * call.pack_heads + head]);
}

// Lists the block's next items; by all its threads together.
__device__ __forceinline__ void list_next(const AttentionCall &call, AttentionShared &shared) {
  if (call.direct != 0) {
    list_items(call, shared, shared.listed_before);
  } else if (thread_index_now() < 32) {
    read_items(call, shared, shared.listed_before);
  }
  __syncthreads();
  if (threadIdx.x == 0) shared.listed_before += kMaxItems;
}

// A warp that finds and copies the steps of every kCopyWarps-th team.
template <class Shape>
class Copier {
 public:
  // `first`: team.
  __device__ Copier(const AttentionRing &ring, int first) : ring_(ring), first_(first) {}

  // All steps of the list.
  __device__ __forceinline__ void run(const AttentionCall &call, AttentionShared &shared, uint8_t *memory) {
    unsigned live = 0;  // of its teams those that may have steps left, as bits
    for (int team = first_; team < ring_.teams; team += Shape::kCopyWarps) live = 2 * live + 1;
#pragma unroll 1
    for (int n = 0; live != 0; ++n) {
#pragma unroll 1
      for (int i = 0; live >> i != 0; ++i) {
        if ((live >> i & 1) == 0) continue;
        const Team team{first_ + i * Shape::kCopyWarps, ring_.teams, ring_.by_teams};
        StepTable &table = reinterpret_cast<StepTable *>(memory + ring_.tables_at)[team.index];
        if (n % kBatch == 0) {
          const bool bad = find_steps(call, ring_, shared, table, team, n);
          // "Prepare" clears what this may find.
          if (__any_sync(kAll, bad)) grid_dependency_wait();
          if (bad) note_bad_ids(call, shared, team, n);
          __syncwarp();
        }
        if (table.address[n % kTable][0] == no_step()) {
          live &= ~(1u << i);
          continue;
        }
        const int at = team.index * ring_.stages + __shfl_sync(kAll, stage_, i);
        barrier_wait(shared.full + kMaxStages + at, __shfl_sync(kAll, parity_, i) ^ 1);
        copy_step<Shape::kAny, true>(call, ring_, shared, table, team, n, memory + at * ring_.stage_bytes,
                                     &shared.full[at]);
        __syncwarp();
        if (lane_index() == i && ++stage_ == ring_.stages) stage_ = 0, parity_ ^= 1;
      }
      if (n == 0) grid_dependency_wait();  // queries come now, which many pages would make slow
    }
  }

 private:
  const AttentionRing &ring_;
  const int first_;
  // Of the next step, in lane i for the warp's i-th team: its stage, and the parity of its barriers' phase.
  int stage_ = 0;
  uint32_t parity_ = 0;
};

template <class Shape>
__global__ void __launch_bounds__(32 * (Shape::kWarps + Shape::kCopyWarps), 1)
    attention_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ AttentionRing ring) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr bool kCopies = Shape::kCopyWarps == 0;  // the warps that have rows
  uint8_t *memory = static_cast<uint8_t *>(dynamic_shared());
  AttentionShared &shared = *reinterpret_cast<AttentionShared *>(memory + ring.shared_at);
  touch_parameter<kMostWarps>(call, reinterpret_cast<uint32_t *>(shared.sums));
  for (int i = int(threadIdx.x); i < ring.teams * ring.stages; i += int(blockDim.x)) {
    barrier_init(&shared.full[i], 32);
    barrier_init(&shared.empty[i], uint32_t(call.pack_heads));
  }
  if (threadIdx.x == 0) shared.listed_before = 0;
  // Pinned, or the compiler keeps an address from the first list on, in local memory.
  const auto list_more = [&] {
    list_next(call, *reinterpret_cast<AttentionShared *>(memory + pinned(uint32_t(ring.shared_at))));
  };
  barrier_init_fence();
  __syncthreads();
  if (call.direct == 0) grid_dependency_wait();
  if constexpr (!kCopies) {
    list_next(call, shared);
    if (int(threadIdx.x) >= 32 * Shape::kWarps) {
      set_registers<Shape::kCopyRegisters, false>();
      Copier<Shape> copier(ring, thread_index_now() / 32 - Shape::kWarps);
#pragma unroll 1
      for (;;) {
        copier.run(call, shared, memory);
        if (shared.more == 0) return;
        __syncthreads();
        list_more();
      }
    }
    set_registers<Shape::kRegisters, true>();
  }
  const int warp = thread_index_now() / 32, lane = thread_index_now() % 32;
  const Team team{divided(warp, ring.by_pack_heads), ring.teams, ring.by_teams};
  const int head = warp - team.index * call.pack_heads;
  StepTable &table = reinterpret_cast<StepTable *>(memory + ring.tables_at)[team.index];
  uint8_t *stages = memory + team.index * ring.stages * ring.stage_bytes;
  uint64_t *full = shared.full + team.index * ring.stages;
  const uint32_t own_at =  // the warp's codes in the team's first stage
      pinned(uint32_t(team.index * ring.stages * ring.stage_bytes + head * call.pool.tile_bytes));
  WarpRows<Shape> rows(call, reinterpret_cast<RowState *>(memory + ring.rows_at), shared.plain);
  int stage = 0;  // of the next step, and the parity of its barriers' phase
  uint32_t parity = 0;
#pragma unroll 1
  for (;;) {
    if constexpr (kCopies) list_next(call, shared);
    const bool finds = kCopies && head == 0 && shared.num_items > 0;
    const bool bad = finds && find_steps(call, ring, shared, table, team, 0);
    int first = kCopies || team.index < team.count ? 0 : shared.num_items;  // item that has tiles
#pragma unroll 1
    while (first < shared.num_items && shared.items[first].item.first_tile >= shared.items[first].item.end_tile)
      ++first;
    if (lane == 0) shared.current[warp] = first;
    const auto take_queries = [&] {
      grid_dependency_wait();
      grid_dependency_launch();
      if (first < shared.num_items) rows.load(ring, shared.items[first], head);
    };
    if constexpr (kCopies) {
      // The first step is copied before queries are there, which are loaded before many pages make that slow. What may find
      // faults waits for "prepare", too, which clears them.
      constexpr int kEarly = Shape::kAny ? 0 : 1;
#pragma unroll 1
      for (int step = 0, to = stage; step < ring.stages; ++step) {  // all stages are free
        if (step == kEarly) {
          take_queries();
          if (bad) note_bad_ids(call, shared, team, 0);
        }
        __syncwarp();
        if (finds && table.address[step][0] != no_step()) {
          copy_step<Shape::kAny, true>(call, ring, shared, table, team, step, stages + to * ring.stage_bytes,
                                       &full[to]);
        }
        if (++to == ring.stages) to = 0;
      }
    } else {
      take_queries();
    }
    // The next step, and those before which the warp finds and amid which it copies next.
    int n = 0, finds_at = head == 0 ? 1 : -1, copies_at = head;
#pragma unroll 1
    while (copies_at < ring.stages - ring.ahead) copies_at += call.pack_heads;
#pragma unroll 1
    for (int i = first; i < shared.num_items; i = shared.current[thread_index_now() / 32] + 1) {
      const ListedItem &listed = shared.items[i];
      __syncwarp();
      const bool loaded = shared.current[warp] == i;
      __syncwarp();  // all lanes know i
      if (lane == 0) shared.current[warp] = i;
      __syncwarp();
      if (listed.item.first_tile >= listed.item.end_tile) continue;  // nothing, and its slot is not read
      if (!loaded) rows.load(ring, listed, head);
      int tile = tile_of(listed.item, team, 0);
      rows.begin(ring, listed, head, tile);
#pragma unroll 1
      for (int left = steps_of(listed.item, team); left > 0; --left) {
        if (kCopies && n == finds_at) {
          finds_at += kBatch;
          const int next = n - 1 + kBatch;
          if (find_steps(call, ring, shared, table, team, next)) note_bad_ids(call, shared, team, next);
          __syncwarp();
        }
        barrier_wait(&full[stage], parity);
        rows.take(memory + (own_at + uint32_t(stage * ring.stage_bytes)), ring.tile_bytes, tile,
                  table.exact[n % kTable], left, [&] {
                    if (kCopies && n == copies_at) {  // the step that takes the place of one before
                      copies_at += call.pack_heads;
                      const int next = n + ring.ahead;
                      int free = stage + ring.ahead;
                      const bool before = free < ring.stages;  // it was there in the turn before
                      if (!before) free -= ring.stages;
                      barrier_wait(full + kMaxStages + free, before ? parity ^ 1 : parity);
                      if (table.address[next % kTable][0] != no_step()) {
                        copy_step<Shape::kAny>(call, ring, shared, table, team, next, stages + free * ring.stage_bytes,
                                               &full[free]);
                      }
                    }
                  });
        __syncwarp();
        if (elected()) barrier_arrive(full + kMaxStages + stage);
        if (++stage == ring.stages) stage = 0, parity ^= 1;
        ++n;
        tile += kStepTiles * team.count;
      }
      write_partial<Shape>(call, ring, memory, shared.items[shared.current[thread_index_now() / 32]], rows);
    }
    if (call.counts_parts != 0) count_parts(call, shared);
    if (shared.more == 0) break;
    __syncthreads();
    if constexpr (!kCopies) list_more();
  }
#endif
}

// ---- starting it

// The shape of K and V bits, 0: any that the call names, and pages of any kind; 20: 2 bits with uniform levels.
template <int kDimK, int kDimV, int kBitsK, int kBitsV, int kBlocks>
auto shape_of() {
  using V =
      std::conditional_t<kBitsV == 0, AnyV<kDimV>, FixedV<kBitsV == 20 ? 2 : kBitsV, kDimV, kBitsV == 20, kBlocks>>;
  // Pairs of channels need tokens apart.
  constexpr bool kTogether = !V::kPairs;
  using K =
      std::conditional_t<kBitsK == 0, AnyK<kDimK>, FixedK<kBitsK == 20 ? 2 : kBitsK, kDimK, kBitsK == 20, kTogether>>;
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
  AttentionRing ring{};
  ring.tile_bytes = call.pack_heads * call.pool.tile_bytes;
  ring.stage_bytes = (kStepTiles * ring.tile_bytes + 127) / 128 * 128;
  ring.in_one_copy = call.pool.head_stride == call.pool.tile_bytes;
  ring.by_pack_heads = divisor(call.pack_heads);
  ring.by_block_heads = divisor(call.block_heads);
  ring.by_block_tiles = divisor(std::max(call.pool.block_size / kTileTokens, 1));
  ring.outputs_at = int32_t(partial_outputs(call.pack_heads, call.block_tokens * call.block_heads));
  for (const int least_stages : {3, 2}) {  // with two, copies wait for each other
    for (int teams = Shape::kWarps / call.pack_heads; teams > 0; --teams) {
      const int warps = teams * call.pack_heads;
      const int scratch = std::max(warps - call.pack_heads, call.pack_heads) * Shape::kScratch * int(sizeof(float));
      const int states = warps * Shape::kRows * int(sizeof(RowState)),
                ends = warps * Shape::kRows * int(sizeof(RowEnd));
      const int tables = teams * int(sizeof(StepTable));
      const int others = scratch + states + ends + tables + int(sizeof(AttentionShared));
      ring.stages = std::min((kAttentionSharedBytes - others) / (teams * ring.stage_bytes),
                             std::min(kMaxStages / teams, kMostTeamStages));
      if (ring.stages < least_stages) continue;
      ring.teams = teams;
      ring.by_teams = divisor(teams);
      ring.ahead = ring.stages - (ring.stages >= 4 ? 2 : 1);
      ring.scratch_at = teams * ring.stages * ring.stage_bytes;
      ring.rows_at = ring.scratch_at + scratch;
      ring.ends_at = ring.rows_at + states;
      ring.tables_at = ring.ends_at + ends;
      ring.shared_at = ring.tables_at + tables;
      return launch_dependent(attention_kernel<Shape>, unsigned(call.blocks),
                              unsigned(32 * (Shape::kCopyWarps > 0 ? Shape::kWarps + Shape::kCopyWarps : warps)),
                              size_t(ring.shared_at) + sizeof(AttentionShared), stream, call, ring);
    }
  }
  return int(cudaErrorInvalidConfiguration);
}

}  // namespace tqkv::cuda
