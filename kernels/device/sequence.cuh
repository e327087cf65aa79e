// SPDX-License-Identifier: Apache-2.0
// What an attention call says of a sequence, a segment and a key; src/attention/cpu.cpp gives the same answers.
#pragma once

#include "codec/record.hpp"
#include "kernels/attention.hpp"
#include "kernels/device/vector.cuh"

namespace tqkv::cuda {

struct Sequence {
  int32_t state = kBadRows;
  int32_t begin = 0, q_len = 0;  // rows of q; none with kBadRows
  // Of good sequences only.
  int32_t length = 0, start = 0;
  int32_t coded_length = 0;    // keys before this are in pages, the others in k_new
  int32_t first_position = 0;  // of the first query
  int64_t table_columns = 0;
  const int32_t *table = nullptr, *exact_table = nullptr;
};

// Rows [begin, end) of q as the caller gives them.
struct SequenceRows {
  int64_t begin, end;
};

__device__ inline SequenceRows sequence_rows(const AttentionCall &call, int64_t s) {
  if (call.cu_seqlens_q == nullptr) return {s, s + 1};
  return {call.cu_seqlens_q[s], call.cu_seqlens_q[s + 1]};
}

__device__ inline bool bad_rows(const AttentionCall &call, const SequenceRows &rows, int64_t rows_end) {
  return rows.begin < rows_end || rows.end < rows.begin || rows.end > call.num_tokens;
}

// The sequence without the rule about rows.
__device__ inline Sequence describe_sequence(const AttentionCall &call, int64_t s, const SequenceRows &rows) {
  Sequence sequence;
  sequence.state = kBadLength;
  sequence.begin = int32_t(rows.begin);
  sequence.q_len = int32_t(rows.end - rows.begin);
  const int32_t length = call.lengths[s];
  if (sequence.q_len > call.max_q_len || length < 0) return sequence;
  sequence.start = call.starts != nullptr ? max(call.starts[s], 0) : 0;
  if (length == 0) {
    sequence.state = kGood;
    return sequence;
  }
  const int32_t coded_length = call.k_new.data == nullptr ? length : length - sequence.q_len;
  if (call.block_table != nullptr) {
    sequence.table = call.block_table + s * call.table_stride;
    sequence.table_columns = call.table_columns;
  } else {
    const int64_t first = call.block_indptr[s], last = call.block_indptr[s + 1];
    if (first < 0 || last < first || last > call.num_block_indices) return sequence;
    sequence.table = call.block_indices + first;
    sequence.table_columns = last - first;
  }
  if (length > call.max_length || coded_length < 0 || coded_length > sequence.table_columns * call.pool.block_size) {
    return sequence;
  }
  if (call.exact.base != nullptr) sequence.exact_table = call.exact_table + s * call.exact_stride;
  sequence.state = kGood;
  sequence.length = length;
  sequence.coded_length = coded_length;
  if (sequence.q_len > 0) {
    sequence.first_position = call.q_positions != nullptr ? call.q_positions[sequence.begin] : length - sequence.q_len;
  }
  return sequence;
}

// `rows_end` is the end of the rows of the last sequence before it that has not kBadRows; 0 where it is known to have
// not.
__device__ inline Sequence read_sequence(const AttentionCall &call, int64_t s, int64_t rows_end) {
  const SequenceRows rows = sequence_rows(call, s);
  return bad_rows(call, rows, rows_end) ? Sequence{} : describe_sequence(call, s, rows);
}

__device__ inline int32_t token_blocks(const AttentionCall &call, const Sequence &sequence) {
  return int32_t((uint32_t(sequence.q_len) + uint32_t(call.block_tokens) - 1) / uint32_t(call.block_tokens));
}

__device__ inline int32_t position(const AttentionCall &call, const Sequence &sequence, int32_t i) {
  return call.q_positions != nullptr ? call.q_positions[sequence.begin + i] : sequence.length - sequence.q_len + i;
}

// Keys [low, high); none where low >= high.
struct KeyRange {
  int32_t low, high;
};

__device__ inline KeyRange visible_keys(const AttentionCall &call, const Sequence &sequence, int32_t position) {
  int64_t low = sequence.start, high = sequence.length;
  if (call.causal) high = min(high, int64_t{position} + 1);
  if (call.window > 0) low = max(low, position - call.window + 1);
  return {int32_t(low), int32_t(high)};
}

// The keys that some of tokens [first, end) of the sequence see: all of them and, where positions have gaps, others
// between.
// Keys of `limit` and after are left out.
__device__ inline KeyRange keys_of_tokens(const AttentionCall &call, const Sequence &sequence, int32_t first,
                                          int32_t end, int32_t limit) {
  KeyRange seen{INT32_MAX, 0};
  const auto add = [&](KeyRange keys) {
    keys.high = min(keys.high, limit);
    if (keys.low < keys.high) seen = {min(seen.low, keys.low), max(seen.high, keys.high)};
  };
  if (first >= end) return {0, 0};
  if (call.q_positions == nullptr) {
    // Positions that follow each other: both ends grow with them, and what is between is seen.
    add({visible_keys(call, sequence, position(call, sequence, first)).low,
         visible_keys(call, sequence, position(call, sequence, end - 1)).high});
  } else {
#pragma unroll 1
    for (int32_t i = first; i < end; ++i) add(visible_keys(call, sequence, position(call, sequence, i)));
  }
  return seen.low < seen.high ? seen : KeyRange{0, 0};
}

// Tiles [first, end) of 16 keys.
struct TileRange {
  int32_t first, end;
};

// The tiles that hold keys of pages which a token of the block sees. Some may hold only keys that is_exact().
__device__ inline TileRange tile_range(const AttentionCall &call, const Sequence &sequence, int32_t token_block) {
  if (sequence.state != kGood) return {0, 0};
  const int32_t first = token_block * call.block_tokens;
  const KeyRange keys = keys_of_tokens(call, sequence, first, min(sequence.q_len - first, call.block_tokens) + first,
                                       sequence.coded_length);
  if (keys.low >= keys.high) return {0, 0};
  return {keys.low / kTileTokens, (keys.high - 1) / kTileTokens + 1};
}

// Units of a segment with these tiles, see attention.hpp.
__device__ inline int32_t units_of(const AttentionCall &call, TileRange tiles) {
  return tiles.first < tiles.end ? tiles.end - tiles.first + call.item_units : 0;
}

// Units [low, high) of a DIRECT call's `all`, which times `blocks` are below 2^32.
struct UnitRange {
  uint32_t low, high;
};

__device__ inline UnitRange block_units(const AttentionCall &call, uint32_t all, int block) {
  const uint32_t blocks = uint32_t(call.blocks);
  return {uint32_t(block) * all / blocks, (uint32_t(block) + 1) * all / blocks};
}

// The block that has a unit.
__device__ inline int block_of_unit(const AttentionCall &call, uint32_t all, uint32_t unit) {
  return int(((unit + 1) * uint32_t(call.blocks) - 1) / all);
}

// A thread's part of the work of a DIRECT call, a token block of a sequence: part t is block t % token_blocks of sequence
// t / token_blocks.
struct DirectPart {
  Sequence sequence;
  TileRange tiles;
  uint32_t units;          // of each of the part's segments; 0 if the thread has no part
  uint32_t begin, before;  // units, and segments that have units, of the threads before
  uint32_t all;            // units of all threads
};

// The end of the rows of sequences before s that have not kBadRows.
__device__ inline int64_t rows_end_before(const AttentionCall &call, int32_t s) {
  int64_t rows_end = 0;
#pragma unroll 1
  for (int32_t i = 0; i < s; ++i) {
    const SequenceRows rows = sequence_rows(call, i);
    if (!bad_rows(call, rows, rows_end)) rows_end = rows.end;
  }
  return rows_end;
}

// By the block, whose warps have a number each in `sums`, in shared memory.
__device__ __forceinline__ DirectPart direct_part(const AttentionCall &call, uint64_t *sums) {
  constexpr int kUnitBits = 32;  // of a number; above: how many segments have units
  constexpr uint64_t kJudge = ~uint64_t{0};
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int32_t s = int32_t(uint32_t(thread) / uint32_t(call.token_blocks));
  const uint32_t copies = uint32_t(call.head_parts) * uint32_t(call.head_packs);
  DirectPart part;
#pragma unroll 1
  for (bool judge = false;; judge = true) {
    // If no sequence has bad rows by itself each begins where the one before it ends.
    part.sequence = {}, part.tiles = {0, 0};
    bool bad = false;
    if (s < call.num_seqs) {
      const SequenceRows rows = sequence_rows(call, s);
      bad = bad_rows(call, rows, judge ? rows_end_before(call, s) : 0);
      if (!bad) part.sequence = describe_sequence(call, s, rows);
      part.tiles = tile_range(call, part.sequence, thread - s * call.token_blocks);
    }
    part.units = uint32_t(units_of(call, part.tiles));
    const uint64_t own = uint64_t{part.units} * copies + (uint64_t{part.units > 0 ? copies : 0} << kUnitBits);
    uint64_t sum = own;
#pragma unroll 1
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t other = __shfl_up_sync(kAll, sum, unsigned(step));
      if (lane >= step) sum += other;
    }
    const bool some_bad = __any_sync(kAll, bad && !judge) != 0;
    if (lane == 31) sums[warp] = some_bad ? kJudge : sum;
    __syncthreads();
    uint64_t all = 0;
    sum -= own;
    bool again = false;
#pragma unroll 1
    for (int w = 0; w < (call.num_seqs * call.token_blocks + 31) / 32; ++w) {
      if (w < warp) sum += sums[w];
      all += sums[w];
      again = again || sums[w] == kJudge;
    }
    part.begin = uint32_t(sum), part.before = uint32_t(sum >> kUnitBits), part.all = uint32_t(all);
    if (!again) return part;
    __syncthreads();
  }
}

// The tiles of k_new, counted from its first key on, that a token of the block sees.
__device__ inline TileRange new_tile_range(const AttentionCall &call, const Sequence &sequence, int32_t token_block) {
  if (sequence.state != kGood) return {0, 0};
  const int32_t first = token_block * call.block_tokens;
  const KeyRange keys =
      keys_of_tokens(call, sequence, first, min(sequence.q_len - first, call.block_tokens) + first, sequence.length);
  const int32_t low = max(keys.low, sequence.coded_length);
  if (low >= keys.high) return {0, 0};
  return {(low - sequence.coded_length) / kTileTokens, (keys.high - 1 - sequence.coded_length) / kTileTokens + 1};
}

// The block of the exact pool where key j of the pages is read, or -1: its codes are.
__device__ inline int32_t exact_block(const AttentionCall &call, const Sequence &sequence, int32_t j) {
  if (sequence.exact_table == nullptr) return -1;
  if (j - sequence.start >= call.exact_first && j <= sequence.first_position - call.exact_recent) return -1;
  const int32_t column = j / call.exact.block_size;
  return column < call.exact_columns ? max(sequence.exact_table[column], -1) : -1;
}

__device__ inline bool is_exact(const AttentionCall &call, const Sequence &sequence, int32_t j) {
  return exact_block(call, sequence, j) >= 0;
}

// The tokens of a tile that are exact, as bits.
__device__ inline unsigned exact_tokens(const AttentionCall &call, const Sequence &sequence, int32_t tile) {
  const int32_t step = min(call.exact.block_size, kTileTokens), first = tile * kTileTokens;
  unsigned bits = 0;
#pragma unroll 1
  for (int32_t j = first; j < min(first + kTileTokens, sequence.coded_length); j += step) {  // by blocks
    const int32_t column = j / call.exact.block_size;
    if (column >= call.exact_columns || sequence.exact_table[column] < 0) continue;
#pragma unroll 1
    for (int32_t k = j; k < min(j + step, sequence.coded_length); ++k) {
      if (k - sequence.start < call.exact_first || k > sequence.first_position - call.exact_recent) {
        bits |= 1u << (k - first);
      }
    }
  }
  return bits;
}

// Whether it is known without the table that no key of [low, high) is exact.
__device__ inline bool none_exact(const AttentionCall &call, const Sequence &sequence, int32_t low, int32_t high) {
  return sequence.exact_table == nullptr ||
         (low - sequence.start >= call.exact_first && high - 1 <= sequence.first_position - call.exact_recent);
}

// Whether a token of the sequence sees a key that is read from this column of the exact table.
__device__ inline bool sees_exact(const AttentionCall &call, const Sequence &sequence, int64_t column) {
  const int64_t size = call.exact.block_size, column_low = column * size, column_high = column_low + size;
  const int64_t first_end = sequence.start + call.exact_first;
  const int64_t recent_begin = sequence.first_position - call.exact_recent + 1;
#pragma unroll 1
  for (int32_t i = 0; i < sequence.q_len; ++i) {
    const KeyRange keys = visible_keys(call, sequence, position(call, sequence, i));
    const int64_t low = max(int64_t{keys.low}, column_low);
    const int64_t high = min(int64_t{min(keys.high, sequence.coded_length)}, column_high);
    if (low < min(high, first_end) || max(low, recent_begin) < high) return true;
  }
  return false;
}

// Whether a needed entry of the exact table is no block; by a warp.
__device__ inline bool has_bad_exact(const AttentionCall &call, const Sequence &sequence, int lane) {
  const int64_t size = call.exact.block_size;
  const int64_t columns = min(call.exact_columns, (sequence.coded_length + size - 1) / size);
  const int64_t first_columns = min(columns, (sequence.start + call.exact_first + size - 1) / size);
  const int64_t recent_begin = sequence.first_position - call.exact_recent + 1;
  const int64_t recent_column = max(first_columns, recent_begin > 0 ? recent_begin / size : 0);
  bool bad = false;
  const auto check = [&](int64_t low, int64_t high) {
#pragma unroll 1
    for (int64_t column = low + lane; column < high && !bad; column += 32) {
      bad = sequence.exact_table[column] >= call.exact.num_blocks && sees_exact(call, sequence, column);
    }
  };
  check(sequence.start / size, first_columns);
  check(recent_column, columns);
  return __any_sync(kAll, bad);
}

}  // namespace tqkv::cuda
