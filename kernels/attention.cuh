// SPDX-License-Identifier: Apache-2.0
// The main kernel of paged attention: codes from pages, through shared memory, to both products on integer tensor
// cores. attention.hpp says what it is given and what it leaves.
//
// BLOCK. One a multiprocessor. Warps form teams of `pack_heads`, a warp a kv head; of an item's tiles (an item is a
// segment or a part of one) team i takes every teams-th from the i-th on. A team has its own ring of stages; a stage holds
// one tile of all its heads, adjacent in a page. The warp of head 0 issues the copies: after it has released tile n it
// refills the stage of the tile before, which the other warps have left by then.
//
// WARP. Lane = 4 g + q, as in operands.cuh. Row r of an item is a query; with kBlocks = 1 there are 4, rows g and g + 4 are
// copies, with 2 there are 8. A tile goes: scores (16-bit queries as two bytes), weights p = 2^(x - ref), products
// w = p * v_scale rounded to 16 bits, as two bytes again, and sums of w * level in integers. The scores of one tile are
// computed between the weights and the sums of the one before.
//
// Sums of values. Four queries share one instruction's 8 columns: columns 0 .. 3 and 4 .. 7 see different halves of the
// A operand. Where levels come from a table (kPairs) its bytes are by turns of two channels, and weights of queries
// stand in even or odd bytes; else halves are tiles of V's operand.
//
// SCALE OF WEIGHTS. ref is a row's, chosen so that a first weight is at most 2^12 (2^14 for f32 output). When a weight passes 2^16, or weights
// become so small on average that their rounding would show, sums go to memory as f32 ("flush") and ref is chosen anew.
#pragma once

#include "kernels/attention.hpp"
#include "kernels/device/launch.cuh"
#include "kernels/device/operands.cuh"
#include "kernels/device/sequence.cuh"
#include "kernels/device/vector.cuh"

namespace tqkv::cuda {

inline constexpr int kMaxItems = 32, kMaxStages = 64, kMaxTeams = 16, kMaxWarps = 16;
inline constexpr int kAttentionSharedBytes = 227 << 10;  // of a block, from compute capability 9.0 on
inline constexpr float kMinusInfinity = -INFINITY;
inline constexpr float kLog2E = 1.4426950408889634f;

// Part of a segment, or all of it.
struct Item {
  int32_t sequence, token_block, head_part, head_pack, first_tile, end_tile;
  int64_t slot;
  Sequence described;
};

struct AttentionRing {
  int32_t stages;       // of a team
  int32_t stage_bytes;  // a multiple of 128
  int32_t in_one_copy;  // the heads of a tile are adjacent
};

// Tiles of one item that a team takes, at most 32.
struct Batch {
  int32_t item, first, count;
};

// The state of a team's producer, which walks the list ahead of the consumers; in shared memory, because it is not
// looked at while a tile is worked on.
struct Producer {
  uint32_t issued;  // tiles
  int32_t stage;
  uint32_t parity;
  int32_t at;  // in the batch
  Batch batch, next;
  int32_t next_ids[32];        // of the next batch's blocks
  const uint8_t *address[32];  // null: not read, or gathered
};

// What of a warp's row is not looked at for every tile.
struct RowState {
  float base, total;  // the reference of what is in the scratch, and the sum of its weights p
  float slope;
  int32_t position, low, high;  // keys [low, high) of the pages are visible
  QueryRow query;
  const uint8_t *operands;  // null: there is no such row
};

// What a block shares, but for the ring and the scratch.
struct AttentionShared {
  uint64_t full[kMaxStages], empty[kMaxStages];
  Producer producers[kMaxTeams];
  Item items[kMaxItems];
  int32_t bad[kMaxItems];  // a needed block id of the item is bad
  int32_t num_items;
  RowState rows[kMaxWarps][8];
};

// ---- the schedule

__device__ inline int count(TileRange range) {
  return range.end - range.first;
}

// Of all token blocks of a sequence.
__device__ inline int64_t count_tiles(const AttentionCall &call, const Sequence &sequence) {
  int64_t sum = 0;
  for (int i = 0; i < token_blocks(call, sequence); ++i) sum += count(tile_range(call, sequence, i));
  return sum;
}

// Tiles of a split of [first, end).
__device__ inline TileRange split_of(const AttentionCall &call, TileRange range, int split) {
  if (call.split_tiles == 0) return range;
  const int64_t begin = int64_t{split} * call.split_tiles, end = begin + call.split_tiles;
  const int first = int(max(int64_t{range.first}, begin)), last = int(min(int64_t{range.end}, end));
  return {first, max(first, last)};
}

// Number of all units; the first block writes the tables that launches after this one read.
__device__ __noinline__ inline int64_t count_units(const AttentionCall &call) {
  const int lane = int(threadIdx.x) % 32, copies = call.head_parts * call.head_packs;
  int64_t units = 0, segments = 0;
  int64_t rows_end = 0;
  for (int first = 0; first < call.num_seqs; first += 32) {
    const Sequence sequence = read_sequences(call, first, &rows_end);
    const int blocks = token_blocks(call, sequence);
    const int64_t own = count_tiles(call, sequence) * copies, own_segments = int64_t{blocks} * copies * call.splits;
    int64_t units_to = own, segments_to = own_segments;  // inclusive sums
    for (int step = 1; step < 32; step *= 2) {
      const int64_t u = __shfl_up_sync(kAll, units_to, unsigned(step));
      const int64_t s = __shfl_up_sync(kAll, segments_to, unsigned(step));
      if (lane >= step) units_to += u, segments_to += s;
    }
    if (blockIdx.x == 0 && first + lane < call.num_seqs) {
      call.sequence_states[first + lane] = sequence.state;
      int64_t segment = segments + segments_to - own_segments;
      int64_t unit = units + units_to - own;
      call.sequence_segments[first + lane] = segment;
      for (int i = 0; i < blocks; ++i) {
        const TileRange range = tile_range(call, sequence, i);
        for (int copy = 0; copy < copies; ++copy) {
          for (int split = 0; split < call.splits; ++split) {
            call.segment_units[segment++] = unit;
            unit += count(split_of(call, range, split));
          }
        }
      }
    }
    units += __shfl_sync(kAll, units_to, 31);
    segments += __shfl_sync(kAll, segments_to, 31);
  }
  if (blockIdx.x == 0 && lane == 0) {
    call.sequence_segments[call.num_seqs] = segments;
    call.segment_units[segments] = units;
  }
  return units;
}

// Lists the block's items from unit `begin` on, as many as there is room for; gives the unit to go on from.
__device__ __noinline__ inline int64_t list_items(const AttentionCall &call, int64_t begin, int64_t end,
                                                  AttentionShared &shared) {
  const int lane = int(threadIdx.x) % 32, copies = call.head_parts * call.head_packs;
  int listed = 0;
  int64_t unit = 0, segment = 0;
  int64_t rows_end = 0;
  for (int first = 0; first < call.num_seqs && unit < end && listed < kMaxItems; first += 32) {
    const Sequence own = read_sequences(call, first, &rows_end);
    const int own_blocks = token_blocks(call, own);
    const int64_t own_units = count_tiles(call, own) * copies;
    for (int i = 0; i < 32 && first + i < call.num_seqs && unit < end && listed < kMaxItems; ++i) {
      const int64_t units = __shfl_sync(kAll, own_units, i);
      const int blocks = __shfl_sync(kAll, own_blocks, i);
      if (unit + units <= begin) {
        unit += units;
        segment += int64_t{blocks} * copies * call.splits;
        continue;
      }
      const Sequence sequence = read_sequence(call, first + i, 0);
      for (int t = 0; t < blocks && unit < end && listed < kMaxItems; ++t) {
        const TileRange range = tile_range(call, sequence, t);
        if (unit + int64_t{count(range)} * copies <= begin) {
          unit += int64_t{count(range)} * copies;
          segment += int64_t{copies} * call.splits;
          continue;
        }
        for (int copy = 0; copy < copies && listed < kMaxItems; ++copy) {
          for (int split = 0; split < call.splits && listed < kMaxItems; ++split, ++segment) {
            const TileRange part = split_of(call, range, split);
            const int64_t first_unit = unit;
            unit += count(part);
            int64_t low = max(begin, first_unit), high = min(end, unit);
            if (call.split_tiles != 0) {  // all of it, where its first unit is
              const bool mine = first_unit >= begin && first_unit < end;
              low = first_unit, high = mine ? unit : first_unit;
            }
            if (low >= high) continue;
            if (lane == 0) {
              shared.items[listed] = {first + i,
                                      t,
                                      copy / call.head_packs,
                                      copy % call.head_packs,
                                      part.first + int(low - first_unit),
                                      part.first + int(high - first_unit),
                                      int64_t{blockIdx.x} + segment,
                                      sequence};
              shared.bad[listed] = 0;
            }
            ++listed;
            begin = unit;
          }
        }
      }
    }
  }
  if (lane == 0) shared.num_items = listed;
  return listed < kMaxItems ? end : begin;
}

// ---- filling stages

// What the functions of a team's first warp, which fills its stages, are given. Cold ones are not inlined: they would take
// registers from the loop.
struct Team {
  int32_t index, count;  // of all teams
};

// Sets `next` to the first batch at or after tile `from` of an item (-1: its first one).
__device__ inline void find_batch(const AttentionCall &call, AttentionShared &shared, Team team, int item, int from) {
  const int lane = int(threadIdx.x) % 32;
  Producer &state = shared.producers[team.index];
  Batch batch{0, 0, 0};
  for (; item < shared.num_items; ++item, from = -1) {
    const Item &it = shared.items[item];
    if (from < 0) from = it.first_tile + team.index;
    if (from >= it.end_tile) continue;
    batch = {item, from, min(32, (it.end_tile - from + team.count - 1) / team.count)};
    if (lane < batch.count && call.pool.block_size >= kTileTokens) {
      state.next_ids[lane] = it.described.table[(from + lane * team.count) / (call.pool.block_size / kTileTokens)];
    }
    break;
  }
  __syncwarp();
  if (lane == 0) state.next = batch;
  __syncwarp();
}

// Whether some row of the item reads the codes of key j.
__device__ inline bool is_needed(const AttentionCall &call, const Item &item, int j) {
  const Sequence &sequence = item.described;
  if (j >= sequence.coded_length || is_exact(call, sequence, j)) return false;
  const int first = item.token_block * call.block_tokens;
#pragma unroll 1
  for (int token = first; token < min(sequence.q_len, first + call.block_tokens); ++token) {
    const KeyRange keys = visible_keys(call, sequence, position(call, sequence, token));
    if (j >= keys.low && j < keys.high) return true;
  }
  return false;
}

// Small blocks that follow each other from the first row of a tile on are a tile of the pool; null if they do not.
__device__ inline const uint8_t *whole_tile(const AttentionCall &call, const Item &item, int tile) {
  const AttentionPool &pool = call.pool;
  const int count = kTileTokens / pool.block_size;
  if ((tile + 1) * kTileTokens > item.described.coded_length) return nullptr;
  const int32_t *blocks = item.described.table + int64_t{tile} * count;
  const int64_t first = blocks[0];
  if (first < 0 || first % count != 0 || first + count > pool.num_blocks) return nullptr;
#pragma unroll 1
  for (int i = 1; i < count; ++i) {
    if (blocks[i] != first + i) return nullptr;
  }
  return pool.base + first / count * pool.block_stride;
}

// Makes the next batch the one that is issued, and looks for the one after it, whose block ids are then on their way.
__device__ __forceinline__ void switch_batch(const AttentionCall &call, AttentionShared &shared, Team team) {
  const int lane = int(threadIdx.x) % 32;
  Producer &state = shared.producers[team.index];
  const Batch batch = state.next;
  if (lane < batch.count) {
    const AttentionPool &pool = call.pool;
    const Item &item = shared.items[batch.item];
    const int tile = batch.first + lane * team.count;
    const uint8_t *at = nullptr;
    if (pool.block_size < kTileTokens) {
      at = whole_tile(call, item, tile);
    } else if (const int id = state.next_ids[lane]; id >= 0 && id < pool.num_blocks) {
      at = pool.base + id * pool.block_stride + tile % (pool.block_size / kTileTokens) * pool.tile_stride;
    } else {
#pragma unroll 1
      for (int t = 0; t < kTileTokens; ++t) {
        if (is_needed(call, item, tile * kTileTokens + t)) shared.bad[batch.item] = 1;
      }
    }
    if (at != nullptr) at += int64_t{item.head_pack} * call.pack_heads * pool.head_stride;
    state.address[lane] = at;
  }
  __syncwarp();
  if (lane == 0) state.batch = batch, state.at = 0;
  __syncwarp();
  if (batch.count > 0) find_batch(call, shared, team, batch.item, batch.first + batch.count * team.count);
}

__device__ inline void copy_codes(const uint8_t *from, uint8_t *to, int head_dim, int bits, bool is_v, int from_row,
                                  int to_row) {
#pragma unroll 1
  for (int plane = 0; plane < 2; ++plane) {
    const int bytes = plane_bytes(head_dim, bits, plane);
#pragma unroll 1
    for (int e = int(threadIdx.x) % 32; e < bytes; e += 32) {
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
  const int bytes = type == TQ_TYPE_F32 ? 4 : 2, i = int(threadIdx.x) % 32;
  if (i < bytes) to[to_row * bytes + i] = from[from_row * bytes + i];
}

// Copies the tokens of the next tile from small blocks wherever they are. The stage is free.
__device__ __forceinline__ void gather_tile(const AttentionCall &call, AttentionShared &shared, Team team,
                                            uint8_t *to) {
  const AttentionPool &pool = call.pool;
  const int lane = int(threadIdx.x) % 32;
  const Producer &state = shared.producers[team.index];
  const Item &item = shared.items[state.batch.item];
  int64_t slot = -1;  // of the lane's token
  if (lane < kTileTokens) {
    const int j = (state.batch.first + state.at * team.count) * kTileTokens + lane;
    if (is_needed(call, item, j)) {
      const int32_t id = item.described.table[j / pool.block_size];
      if (id >= 0 && id < pool.num_blocks) {
        slot = int64_t{id} * pool.block_size + j % pool.block_size;
      } else {
        shared.bad[state.batch.item] = 1;
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
                            (int64_t{item.head_pack} * call.pack_heads + head) * pool.head_stride;
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

// Fills stages of the team's ring until `limit` tiles are issued in all.
__device__ __forceinline__ void fill(const AttentionCall &call, const AttentionRing &ring, AttentionShared &shared,
                                     Team team, uint8_t *stages, uint32_t limit) {
  Producer &state = shared.producers[team.index];
  uint64_t *full = shared.full + team.index * ring.stages, *empty = shared.empty + team.index * ring.stages;
  while (state.issued != limit && state.at < state.batch.count) {
    const int stage = state.stage;
    const uint8_t *from = state.address[state.at];
    uint8_t *to = stages + stage * ring.stage_bytes;
    if (state.issued >= uint32_t(ring.stages)) barrier_wait(&empty[stage], state.parity ^ 1);
    if (from == nullptr && call.pool.block_size < kTileTokens) gather_tile(call, shared, team, to);
    __syncwarp();
    if (int(threadIdx.x) % 32 == 0) {
      const uint32_t bytes = uint32_t(call.pool.tile_bytes);
      if (from == nullptr) {
        barrier_arrive(&full[stage]);
      } else {
        barrier_arrive_expect(&full[stage], bytes * uint32_t(call.pack_heads));
        const int copies = ring.in_one_copy ? 1 : call.pack_heads;
        const uint32_t size = ring.in_one_copy ? bytes * uint32_t(call.pack_heads) : bytes;
        for (int i = 0; i < copies; ++i) {
          bulk_copy(to + i * int(bytes), from + i * call.pool.head_stride, size, &full[stage]);
        }
      }
      ++state.at;
      ++state.issued;
      if (stage + 1 == ring.stages)
        state.stage = 0, state.parity ^= 1;
      else
        state.stage = stage + 1;
    }
    __syncwarp();
    if (state.at == state.batch.count) switch_batch(call, shared, team);
  }
}

// The first stages of a list.
__device__ __noinline__ inline void begin_list(const AttentionCall &call, const AttentionRing &ring,
                                               AttentionShared &shared, Team team, uint8_t *stages, uint32_t limit) {
  find_batch(call, shared, team, 0, -1);
  switch_batch(call, shared, team);
  fill(call, ring, shared, team, stages, limit);
}

// ---- one warp's rows

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

  // Adds the scores of the tile's tokens.
  __device__ static void score(const AttentionCall &call, const uint8_t *codes, int g, int q,
                               const uint32_t (&a)[kSteps][4], int32_t (&c)[2][4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Codes k;
      uint32_t b[kSteps][2];
      Codes::load(k, codes, k_token(j, g), q);
      Codes::expand(k, {call.k_levels[0], call.k_levels[1]}, q, b);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        mma_m16n8k32<int8_t, std::conditional_t<kUniform, uint8_t, int8_t>>(c[j], a[s], b[s], c[j]);
      }
    }
  }
};

template <int kDim>
struct AnyK {
  static constexpr int kSteps = FixedK<4, kDim, false>::kSteps;

  __device__ static void score(const AttentionCall &call, const uint8_t *codes, int g, int q,
                               const uint32_t (&a)[kSteps][4], int32_t (&c)[2][4]) {
    if (call.k_uniform != 0) return FixedK<2, kDim, true>::score(call, codes, g, q, a, c);
    if (call.k_bits == 2) return FixedK<2, kDim, false>::score(call, codes, g, q, a, c);
    if (call.k_bits == 3) return FixedK<3, kDim, false>::score(call, codes, g, q, a, c);
    if (call.k_bits == 4) return FixedK<4, kDim, false>::score(call, codes, g, q, a, c);
    FixedK<8, kDim, false>::score(call, codes, g, q, a, c);
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

template <class KSide, class VSide, int kDimK, int kDimV, int kBlocksOfRows>
struct AttentionShape {
  using K = KSide;
  using V = VSide;
  static constexpr int kHeadDimV = kDimV;
  static constexpr int kBlocks = kBlocksOfRows, kRows = 4 * kBlocks;
  static constexpr int kWarps = kDimK > 128 || kDimV > 128 ? 8 : 16;
  static constexpr int kScratch = kRows * kDimV;  // floats a warp
};

// Describes the rows of a warp's kv head, lanes 0 .. 7 one each; gives the tokens [x, y) that are visible to every row, and
// coded.
__device__ __noinline__ inline int2 describe_rows(const AttentionCall &call, const Item &item, int pack_head,
                                                  RowState *states) {
  const Sequence &sequence = item.described;
  const int row = int(threadIdx.x) % 32, token = item.token_block * call.block_tokens + row / call.block_heads;
  const int in_group = item.head_part * call.block_heads + row % call.block_heads;
  int begin = INT32_MIN, end = INT32_MAX;
  RowState state{kMinusInfinity, 0, 0, 0, 0, 0, {0, kMinusInfinity, 0, 0}, nullptr};
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
  if (row < 8) states[row] = state;
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
  return make_int2(begin, end);
}

// Which of tokens j .. j + 3 a row reads from their codes, as bits.
__device__ __forceinline__ unsigned visible_tokens(const AttentionCall &call, const Sequence &sequence, int j, int low,
                                                   int high) {
  unsigned visible = 0;
  for (int i = 0; i < 4; ++i) visible |= unsigned(j + i >= low && j + i < high) << i;
  if (call.exact.base == nullptr || visible == 0) return visible;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    if ((visible >> i & 1) != 0 && is_exact(call, sequence, j + i)) visible &= ~(1u << i);
  }
  return visible;
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

  // `scratch`: of the block.
  __device__ WarpRows(const AttentionCall &call, AttentionShared &shared, float *scratch)
      : call_(call), shared_(shared), scratch_(scratch), g_(int(threadIdx.x) % 32 / 4), q_(int(threadIdx.x) % 4) {}

  // `index`: of the item in the list.
  __device__ void begin(int index, int pack_head) {
    const Item &item = shared_.items[index];
    const int2 plain = describe_rows(call_, item, pack_head, states());
    plain_begin_ = plain.x, plain_end_ = plain.y;
    if (call_.soft_cap > 0 || call_.alibi_slopes != nullptr) plain_begin_ = INT32_MAX;
    item_ = index;
    const RowState &state = states()[kBlocks == 1 ? g_ & 3 : g_];
    gain_ = state.query.gain, shifted_ = offset_ = state.query.offset;
    bias_high_ = state.query.bias_high, bias_low_ = state.query.bias_low;
    const uint8_t *bytes = state.operands + q_ * 8 * K::kSteps;
#pragma unroll
    for (int s = 0; s < K::kSteps; ++s) {
      uint2 high = make_uint2(0, 0), low = make_uint2(0, 0);
      if (state.operands != nullptr) {
        high = *reinterpret_cast<const uint2 *>(bytes + 8 * s);
        low = *reinterpret_cast<const uint2 *>(bytes + call_.operand_bytes + 8 * s);
      }
      a_[s][0] = high.x, a_[s][2] = high.y;
      a_[s][1] = low.x, a_[s][3] = low.y;
    }
    ref_ = 0;
    sum_ = 0;
    fall_ = false;
    set_ = false;
    unset_ = true;
    flushed_ = false;
    check_ = interval_ = kFirstCheck;
    reset();
  }

  __device__ void score(const uint8_t *tile, Scores &c) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      c[j][0] = c[j][1] = bias_high_;
      c[j][2] = c[j][3] = bias_low_;
    }
    K::score(call_, tile, g_, q_, a_, c);
  }

  __device__ Weights weigh(const uint8_t *tile, int number, const Scores &c) {
    float k_scale[4], v_scale[4], y[4];  // y: log2 of the weight p
    load_scales(tile + call_.pool.k_scales, call_.k_scale_type, k_scale);
    load_scales(tile + call_.pool.v_scales, call_.v_scale_type, v_scale);
    const int first = number * kTileTokens;
    if (first >= plain_begin_ && first + kTileTokens <= plain_end_) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = __fmaf_rn(score_of(c, i), k_scale[i] * gain_, shifted_);
    } else {
      adjust(c, k_scale, first, y, v_scale);
    }
    float p[4];
    uint32_t w[4];
    weights_of(y, v_scale, p, w);
    const bool over = ((w[0] | w[1] | w[2] | w[3]) & 0xffff0000) != kOne;
    if (__any_sync(kAll, over || fall_) || unset_) {
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

  // Leaves the rows' outputs in the scratch, and their reference and sum in the states.
  __device__ void end() {
    if (run_ > 0) flush();
  }

 private:
  __device__ RowState *states() const {
    return shared_.rows[threadIdx.x / 32];
  }

  static constexpr uint32_t kOne = 0x4b000000;              // 2^23: integers are a float's low bits
  static constexpr int kFirstCheck = 8, kMostTiles = 2048;  // so that sums stay below 2^31

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

  __device__ void load_scales(const uint8_t *scales, int type, float (&scale)[4]) const {
    if (type == TQ_TYPE_F32) {
      const float4 v = *reinterpret_cast<const float4 *>(scales + 16 * q_);
      scale[0] = v.x, scale[1] = v.y, scale[2] = v.z, scale[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2 *>(scales + 8 * q_);
      f32_pair_from_f16(v.x, scale[0], scale[1]);
      f32_pair_from_f16(v.y, scale[2], scale[3]);
    }
  }

  // y with all that changes or hides scores: -infinity where hidden, and there no value.
  __device__ void adjust(const Scores &c, const float (&k_scale)[4], int first, float (&y)[4],
                         float (&v_scale)[4]) const {
    const RowState &state = states()[kBlocks == 1 ? g_ & 3 : g_];
    const int j = first + 4 * q_;
    const unsigned visible = visible_tokens(call_, shared_.items[item_].described, j, state.low, state.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float score = __fmaf_rn(score_of(c, i), k_scale[i] * gain_, offset_);
      if (call_.soft_cap > 0) {  // cap * tanh(score / cap)
        const float power = exp2_approx(score * call_.cap_factor);
        score = call_.cap_log2 * (1.0f - 2.0f * reciprocal_approx(1.0f + power));
      }
      if (call_.alibi_slopes != nullptr) score = __fmaf_rn(state.slope, float(j + i - state.position), score);
      const bool seen = (visible >> i & 1) != 0;
      y[i] = seen ? score - ref_ : kMinusInfinity;
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
    const bool small = float(row_weights()) < least * float(run_ * kTileTokens);
    fall_ = run_ >= kMostTiles || (small && set_);
    if (__any_sync(kAll, fall_)) interval_ = min(2 * interval_, kMostTiles);  // a check costs little, a flush much
    check_ = min(run_ + interval_, kMostTiles);
  }

  // New references where there are none yet, a weight is too large, or weights have become small; `y` with them. Sums so
  // far go to the scratch.
  __device__ void choose_references(const float (&v_scale)[4], bool over, float (&y)[4]) {
    if (run_ > 0) flush();
    check_ = interval_;
    float most = kMinusInfinity, most_score = kMinusInfinity;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      most_score = fmaxf(most_score, y[i]);
      if (v_scale[i] > 0) most = fmaxf(most, y[i] + log2_approx(v_scale[i]));
    }
    int changes = over || fall_ || !set_;
#pragma unroll
    for (int lane = 1; lane <= 2; lane *= 2) {
      most = fmaxf(most, __shfl_xor_sync(kAll, most, lane));
      most_score = fmaxf(most_score, __shfl_xor_sync(kAll, most_score, lane));
      changes |= __shfl_xor_sync(kAll, changes, lane);
    }
    if (most == kMinusInfinity) most = most_score;  // no value, but a weight
    if (changes && most != kMinusInfinity) {
      const float rise = most - (call_.out.type == TQ_TYPE_F32 ? 14.0f : 12.0f);
      ref_ += rise;
      set_ = true;
      shifted_ = offset_ - ref_;
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] -= rise;
    }
    fall_ = false;
    unset_ = __any_sync(kAll, !set_ && gain_ != 0);
  }

  // Adds the integer sums to the scratch, whose unit is that of the state's base.
  __device__ void flush() {
    const float old_base = states()[g_].base, base = set_ ? fmaxf(old_base, ref_) : old_base;
    const float keep = old_base == kMinusInfinity ? 0.0f : exp2_approx(old_base - base);
    const float gain = set_ ? exp2_approx(ref_ - base) : 0.0f;
    sum_ += __shfl_xor_sync(kAll, sum_, 1);
    sum_ += __shfl_xor_sync(kAll, sum_, 2);
    __syncwarp();
    if (q_ == 0) {
      states()[g_].base = base;
      states()[g_].total = __fmaf_rn(sum_, gain, states()[g_].total * keep);
    }
    __syncwarp();
    sum_ = 0;
    const float weights = float(row_weights());
    V::template for_each_sum<kBlocks>(call_, high_sums_, low_sums_, g_, q_, [&](int row) {
      const float row_keep = __shfl_sync(kAll, keep, 4 * row), row_gain = __shfl_sync(kAll, gain, 4 * row);
      const float row_weight = __shfl_sync(kAll, weights, 4 * row);
      float *to = scratch_ + int(threadIdx.x) / 32 * Shape::kScratch + row * Shape::kHeadDimV;
      return [=, this](int channel, float bytes, float ones) {  // level = 2 * byte + ones
        const float levels = __fmaf_rn(2.0f, bytes, ones * row_weight);
        to[channel] = flushed_ ? __fmaf_rn(levels, row_gain, to[channel] * row_keep) : levels * row_gain;
      };
    });
    flushed_ = true;
    reset();
  }

  const AttentionCall &call_;
  AttentionShared &shared_;
  float *scratch_;
  int g_, q_;

  // The item's.
  uint32_t a_[K::kSteps][4];
  int32_t bias_high_, bias_low_;
  float gain_, offset_;
  int plain_begin_, plain_end_, item_;

  // Of the lane's row and tokens.
  float ref_, shifted_;  // shifted_: offset_ - ref_
  float sum_;            // of p since the last flush
  uint32_t weights_;     // of w since then, as the words they come in
  bool fall_, set_;      // set_: ref_ is chosen
  // The warp's.
  int run_, check_, interval_;  // tiles since the last flush, when to look at their weights, and how often
  bool unset_, flushed_;        // unset_: some row's ref_ is not
  int32_t high_sums_[V::kProducts][kBlocks][4], low_sums_[V::kProducts][kBlocks][4];
};

// ---- the kernel

template <class Shape>
__device__ __noinline__ void write_partial(const AttentionCall &call, const Item &item, int head, Team team,
                                           const float *scratch, const RowState (*states)[8]) {
  const int lane = int(threadIdx.x) % 32, rows = call.block_tokens * call.block_heads;
  uint8_t *slot = call.partials + item.slot * call.slot_bytes;
  float2 *to_states = reinterpret_cast<float2 *>(slot) + head * rows;
  float *to = reinterpret_cast<float *>(slot + partial_outputs(call.pack_heads, rows)) +
              int64_t{head} * rows * Shape::kHeadDimV;
  for (int row = 0; row < rows; ++row) {
    float most = kMinusInfinity, sum = 0;
    for (int i = 0; i < team.count; ++i) {
      most = fmaxf(most, states[i * call.pack_heads + head][row].base);
    }
    for (int c = 4 * (lane + 32 * team.index); c < Shape::kHeadDimV; c += 128 * team.count) {
      float4 out = make_float4(0, 0, 0, 0);
      for (int i = 0; i < team.count; ++i) {
        const int warp = i * call.pack_heads + head;
        const float base = states[warp][row].base;
        if (base == kMinusInfinity) continue;
        const float factor = exp2_approx(base - most);
        const float4 v =
            *reinterpret_cast<const float4 *>(scratch + int64_t{warp} * Shape::kScratch + row * Shape::kHeadDimV + c);
        out.x = __fmaf_rn(v.x, factor, out.x), out.y = __fmaf_rn(v.y, factor, out.y);
        out.z = __fmaf_rn(v.z, factor, out.z), out.w = __fmaf_rn(v.w, factor, out.w);
      }
      *reinterpret_cast<float4 *>(to + row * Shape::kHeadDimV + c) = out;
    }
    if (team.index != 0) continue;
    for (int i = 0; i < team.count; ++i) {
      const RowState &state = states[i * call.pack_heads + head][row];
      if (state.base != kMinusInfinity) sum = __fmaf_rn(state.total, exp2_approx(state.base - most), sum);
    }
    if (lane == 0) to_states[row] = make_float2(most, sum);
  }
}

template <class Shape>
__global__ void __launch_bounds__(32 * Shape::kWarps, 1)
    attention_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ AttentionRing ring) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ AttentionShared shared;
  __shared__ int64_t range[2], next_unit;
  uint8_t *stages = static_cast<uint8_t *>(dynamic_shared());
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int head = warp % call.pack_heads;
  const Team team{warp / call.pack_heads, int(blockDim.x) / 32 / call.pack_heads};
  float *scratch = reinterpret_cast<float *>(stages + team.count * ring.stages * ring.stage_bytes);
  stages += team.index * ring.stages * ring.stage_bytes;
  if (warp == 0) {
    for (int i = lane; i < team.count * ring.stages; i += 32) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], uint32_t(call.pack_heads));
    }
    barrier_init_fence();
    if (lane < team.count) shared.producers[lane] = {};
    __syncwarp();
    const int64_t units = count_units(call);
    if (lane == 0) {
      range[0] = int64_t{blockIdx.x} * units / call.blocks;
      range[1] = (int64_t{blockIdx.x} + 1) * units / call.blocks;
    }
  }
  __syncthreads();
  int64_t unit = range[0];
  const int64_t end = range[1];

  WarpRows<Shape> rows(call, shared, scratch);
  const bool fills = head == 0;
  const uint32_t lag = ring.stages >= 4 ? 1 : 0;
  uint64_t *full = shared.full + team.index * ring.stages, *empty = shared.empty + team.index * ring.stages;
  uint32_t released = 0;
  int stage = 0;
  uint32_t parity = 0;
  bool waits = true;  // for the launch before this one
  while (unit < end) {
    if (warp == 0) {
      const int64_t next = list_items(call, unit, end, shared);
      if (lane == 0) next_unit = next;
    }
    __syncthreads();
    unit = next_unit;
    if (fills) begin_list(call, ring, shared, team, stages, released + uint32_t(ring.stages));
    if (waits) grid_dependency_wait();
    waits = false;
    for (int i = 0; i < shared.num_items; ++i) {
      const Item &item = shared.items[i];
      rows.begin(i, head);
      int tile = item.first_tile + team.index;
      const int end_tile = item.end_tile;
      if (tile < end_tile) {
        const uint8_t *now = stages + stage * ring.stage_bytes + head * call.pool.tile_bytes;
        typename WarpRows<Shape>::Weights weights{};  // before the first tile: of nothing
        for (int old = -1;; tile += team.count) {
          typename WarpRows<Shape>::Scores scores;
          const bool more = tile < end_tile;
          const uint8_t *next = now;
          if (more) {
            next = stages + stage * ring.stage_bytes + head * call.pool.tile_bytes;
            barrier_wait(&full[stage], parity);
          }
          rows.score(next, scores);
          rows.add(now, weights);
          if (old >= 0) {
            __syncwarp();
            if (lane == 0) barrier_arrive(&empty[old]);
            ++released;
            if (fills) fill(call, ring, shared, team, stages, released - lag + uint32_t(ring.stages));
          }
          if (!more) break;
          weights = rows.weigh(next, tile, scores);
          now = next;
          old = stage;
          if (++stage == ring.stages) stage = 0, parity ^= 1;
        }
      }
      rows.end();
      if (shared.bad[i] != 0 && fills && lane == 0) call.sequence_faults[item.sequence] = 1;
      group_barrier(1 + head, 32 * team.count);
      write_partial<Shape>(call, item, head, team, scratch, shared.rows);
      group_barrier(1 + head, 32 * team.count);
    }
    __syncthreads();
  }
  grid_dependency_launch();
#endif
}

// ---- starting it

// The shape of K and V bits, 0: any that the call names, 20: 2 bits with uniform levels.
template <int kDimK, int kDimV, int kBitsK, int kBitsV, int kBlocks>
auto shape_of() {
  using K = std::conditional_t<kBitsK == 0, AnyK<kDimK>, FixedK<kBitsK == 20 ? 2 : kBitsK, kDimK, kBitsK == 20>>;
  using V = std::conditional_t<kBitsV == 0, AnyV<kDimV>, FixedV<kBitsV == 20 ? 2 : kBitsV, kDimV, kBitsV == 20>>;
  return AttentionShape<K, V, kDimK, kDimV, kBlocks>{};
}

template <int kDimK, int kDimV, int kBitsK, int kBitsV, int kBlocks>
int load_attention() {
  using Shape = decltype(shape_of<kDimK, kDimV, kBitsK, kBitsV, kBlocks>());
  cudaFuncAttributes attributes;
  if (const int error = cudaFuncGetAttributes(&attributes, attention_kernel<Shape>)) return error;
  const int most = kAttentionSharedBytes - int(sizeof(AttentionShared)) - 64;
  return cudaFuncSetAttribute(attention_kernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

template <int kDimK, int kDimV, int kBitsK, int kBitsV, int kBlocks>
int launch_attention_of(const AttentionCall &call, void *stream) {
  using Shape = decltype(shape_of<kDimK, kDimV, kBitsK, kBitsV, kBlocks>());
  const int teams = Shape::kWarps / call.pack_heads, warps = teams * call.pack_heads;
  const int scratch = warps * Shape::kScratch * int(sizeof(float));
  const int bytes = kAttentionSharedBytes - int(sizeof(AttentionShared)) - 64 - scratch;
  AttentionRing ring{};
  ring.stage_bytes = (call.pack_heads * call.pool.tile_bytes + 127) / 128 * 128;
  ring.stages = min(bytes / (teams * ring.stage_bytes), min(kMaxStages / teams, 16));
  ring.in_one_copy = call.pool.head_stride == call.pool.tile_bytes;
  const int shared = teams * ring.stages * ring.stage_bytes + scratch;
  return launch_dependent(attention_kernel<Shape>, unsigned(call.blocks), unsigned(32 * warps), size_t(shared), stream,
                          call, ring);
}

}  // namespace tqkv::cuda
