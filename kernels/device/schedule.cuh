// SPDX-License-Identifier: Apache-2.0
// The schedule of an attention call, by one block: attention.hpp says what segments, units and items are.
#pragma once

#include "kernels/device/sequence.cuh"

namespace tqkv::cuda {

inline constexpr int kCachedSegments = 512;  // and sequences: beyond, tables are searched in global memory

__device__ inline int count(TileRange range) {
  return range.end - range.first;
}

// Tiles of a split of a range.
__device__ inline TileRange split_of(const AttentionCall &call, TileRange range, int split) {
  if (call.split_tiles == 0) return range;
  const int64_t begin = int64_t{split} * call.split_tiles, end = begin + call.split_tiles;
  const int first = int(max(int64_t{range.first}, begin)), last = int(min(int64_t{range.end}, end));
  return {first, max(first, last)};
}

// By a warp: the states and the first segments of sequences, the first units of segments.
__device__ inline void count_units(const AttentionCall &call) {
  const int lane = int(threadIdx.x) % 32, copies = call.head_parts * call.head_packs;
  int64_t units = 0, segments = 0, rows_end = 0;
  for (int first = 0; first < call.num_seqs; first += 32) {
    const Sequence sequence = read_sequences(call, first, &rows_end);
    const int blocks = token_blocks(call, sequence);
    int64_t own_units = 0;
    for (int i = 0; i < blocks; ++i) own_units += count(tile_range(call, sequence, i));
    own_units *= copies;
    const int64_t own_segments = int64_t{blocks} * copies * call.splits;
    int64_t units_to = own_units, segments_to = own_segments;  // inclusive sums
    for (int step = 1; step < 32; step *= 2) {
      const int64_t u = __shfl_up_sync(kAll, units_to, unsigned(step));
      const int64_t s = __shfl_up_sync(kAll, segments_to, unsigned(step));
      if (lane >= step) units_to += u, segments_to += s;
    }
    if (first + lane < call.num_seqs) {
      int64_t segment = segments + segments_to - own_segments, unit = units + units_to - own_units;
      call.sequence_states[first + lane] = sequence.state;
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
  if (lane == 0) {
    call.sequence_segments[call.num_seqs] = segments;
    call.segment_units[segments] = units;
  }
}

// How many of `n` ascending numbers are below a limit.
template <class Limit>
__device__ int count_below(const int64_t *numbers, int n, Limit &&below) {
  int low = 0;
  while (n > 0) {
    const int half = n / 2;
    const bool is_below = below(numbers[low + half]);
    low = is_below ? low + half + 1 : low;
    n = is_below ? n - half - 1 : half;
  }
  return low;
}

// By a whole block of at least one warp.
__device__ inline void write_schedule(const AttentionCall &call) {
  __shared__ int64_t cached_units[kCachedSegments + 1], cached_segments[kCachedSegments + 1];
  if (threadIdx.x < 32) count_units(call);
  __syncthreads();
  const int segments = int(call.sequence_segments[call.num_seqs]);
  const int64_t *unit_of = call.segment_units, *segment_of = call.sequence_segments;
  if (segments <= kCachedSegments && call.num_seqs <= kCachedSegments) {
    for (int i = int(threadIdx.x); i <= segments; i += int(blockDim.x)) cached_units[i] = unit_of[i];
    for (int i = int(threadIdx.x); i <= call.num_seqs; i += int(blockDim.x)) cached_segments[i] = segment_of[i];
    __syncthreads();
    unit_of = cached_units, segment_of = cached_segments;
  }
  const int64_t units = unit_of[segments];
  for (int block = int(threadIdx.x); block < call.blocks; block += int(blockDim.x)) {
    const int64_t begin = block * units / call.blocks, end = (block + 1) * units / call.blocks;
    // Without fixed splits segments are cut, and the first may begin before the block does.
    const bool cut = call.split_tiles == 0;
    const int first = count_below(unit_of, segments, [&](int64_t unit) { return cut ? unit <= begin : unit < begin; }) -
                      (cut ? 1 : 0);
    const int last = count_below(unit_of, segments, [&](int64_t unit) { return unit < end; });
    BlockItems listed{0, 0};
    if (begin < end && first < last) listed = {block + first, last - first};
    call.block_items[block] = listed;
    for (int segment = first; segment < first + listed.count; ++segment) {
      const int s = count_below(segment_of, call.num_seqs + 1, [&](int64_t of) { return of <= segment; }) - 1;
      const int in_sequence = segment - int(segment_of[s]), split = in_sequence % call.splits;
      const int copy = in_sequence / call.splits % (call.head_parts * call.head_packs);
      AttentionItem item{};
      item.sequence = s;
      item.token_block = in_sequence / call.splits / (call.head_parts * call.head_packs);
      item.head_part = copy / call.head_packs;
      item.head_pack = copy % call.head_packs;
      const TileRange range = split_of(call, tile_range(call, read_sequence(call, s, 0), item.token_block), split);
      const int64_t unit = unit_of[segment];
      item.first_tile = range.first + (cut ? int(max(begin - unit, int64_t{0})) : 0);
      item.end_tile = cut ? range.first + int(min(end - unit, int64_t{count(range)})) : range.end;
      call.items[block + segment] = item;
    }
  }
}

}  // namespace tqkv::cuda
