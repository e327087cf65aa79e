// SPDX-License-Identifier: Apache-2.0
// After attention: a block takes the segments of all splits of some rows, at most 8, of one kv head. Of its partial results, in
// the order of splits or of CUDA blocks, warp w sums up every 8th from the w-th on, for all rows; what the warps have is
// summed up in order and rotated back, a warp a row. So a row's bits do not depend on how many rows a block has. Keys
// that are read raw are added before, for all rows of the block together: a chunk has a token a thread for scores, a row
// a warp for the softmax, and two channels a thread for values.
#include "kernels/device/launch.cuh"
#include "kernels/device/rotation.cuh"
#include "kernels/device/sequence.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {
namespace {

constexpr int kMaxRows = 8;       // of a block
constexpr int kRawThreads = 256;  // tokens of a chunk
constexpr float kLn2 = 0x1.62e43p-1f;
constexpr int kFinishWarps = kRawThreads / 32;
constexpr int kChunk = 160;  // partial results whose factors are known at a time, a multiple of kFinishWarps
static_assert(kMaxRows <= kFinishWarps && kChunk % 32 == 0);

__device__ float minus_infinity() {
  return -__int_as_float(0x7f800000);
}

// A softmax so far, in units of log2; without keys the maximum is -infinity and the sum 0.
struct State {
  float max, sum;
};

// A sum that is NaN means keys, too, whose scores are NaN.
__device__ bool has_keys(State state) {
  return !(state.max == minus_infinity() && state.sum == state.sum);
}

// What a state is multiplied with where the maximum is another.
__device__ float factor_of(State state, float max) {
  return !has_keys(state) ? 0.0f : state.max == max ? 1.0f : exp2_approx(state.max - max);
}

// The rows of a block.
struct BlockRows {
  AttentionItem segment;  // the first one
  Sequence sequence;      // for rows alone: begin and q_len
  int32_t first_segment, first_token, first_head, kv_head, head_in_pack;
  int32_t first_row;  // of the block's, in the segment

  __device__ int32_t token(const AttentionCall &call, int r) const {
    return first_token + int32_t(uint32_t(first_row + r) / uint32_t(call.block_heads));
  }
  __device__ int32_t head_in_group(const AttentionCall &call, int r) const {
    return first_head + int32_t(uint32_t(first_row + r) % uint32_t(call.block_heads));
  }
  __device__ bool has(const AttentionCall &call, int r) const {
    return first_row + r < call.block_tokens * call.block_heads && token(call, r) < sequence.q_len &&
           head_in_group(call, r) < call.group;
  }
  __device__ int64_t row(const AttentionCall &call, int r) const {  // of [num_tokens, q_heads]
    return int64_t{sequence.begin + token(call, r)} * call.q_heads + kv_head * call.group + head_in_group(call, r);
  }
};

// False where there are fewer segments than the host made blocks for.
template <bool kWholeSequence>
__device__ bool find_rows(const AttentionCall &call, int first_row, BlockRows *rows) {
  rows->first_row = first_row;
  rows->first_segment = int32_t(blockIdx.x) * call.splits;
  if (rows->first_segment >= call.max_segments) return false;
  AttentionItem &segment = rows->segment;
  if (call.direct != 0) {
    const uint32_t packs = uint32_t(call.head_packs), copies = uint32_t(call.head_parts) * packs;
    const uint32_t s = blockIdx.x / copies, copy = blockIdx.x - s * copies;
    segment = {int32_t(s), 0, int32_t(copy / packs), int32_t(copy % packs), 0, 0, 0, 0};
  } else {
    segment = call.segments[rows->first_segment];
    if (rows->first_segment >= call.sequence_segments[call.num_seqs]) return false;
  }
  if (kWholeSequence || call.direct != 0) {
    rows->sequence = read_sequence(call, segment.sequence, 0);
  } else {
    const SequenceRows all = sequence_rows(call, segment.sequence);
    rows->sequence.begin = int32_t(all.begin);
    rows->sequence.q_len = int32_t(all.end - all.begin);
    rows->sequence.state = call.sequence_states[segment.sequence];
  }
  rows->first_token = segment.token_block * call.block_tokens;
  rows->first_head = segment.head_part * call.block_heads;
  rows->head_in_pack = int32_t(blockIdx.y);
  rows->kv_head = segment.head_pack * call.pack_heads + rows->head_in_pack;
  return true;
}

__device__ int segment_rows(const AttentionCall &call) {
  return call.block_tokens * call.block_heads;
}

// ---- partial results

// Of one chunk.
struct Factors {
  float of[kMaxRows][kChunk];  // what outputs are multiplied with; 0: they may be anything
  int32_t slot[kChunk];
  float correction[kMaxRows];  // of sums of earlier chunks
};

// Partial results of the rows of a block.
struct Partials {
  const int32_t *places;  // of each, an AttentionItem apart, two numbers that are equal where it has no tiles
  int32_t first_slot;     // the others follow; -1: the first of the two numbers is the slot
  int32_t count;

  // Of pages, or of k_new. In a DIRECT call after the wait.
  __device__ Partials(const AttentionCall &call, const BlockRows &rows, bool of_new) {
    if (call.split_tiles == 0) {  // parts of one segment, in slots that follow each other
      first_slot = rows.segment.first_slot;
      int32_t end_slot = rows.segment.end_slot;
      if (of_new || call.direct != 0) {
        const AttentionItem &segment = call.segments[rows.first_segment + (of_new ? 1 : 0)];
        first_slot = segment.first_slot, end_slot = segment.end_slot;
      }
      count = end_slot - first_slot;
      places = &call.items[first_slot].first_tile;
    } else {  // segments in a slot each
      first_slot = -1;
      count = of_new ? call.splits - call.page_splits : call.page_splits;
      places = &call.segments[rows.first_segment + (of_new ? call.page_splits : 0)].first_slot;
    }
  }
};

// By a warp, which takes row `row` of the block into the state and leaves factors for the chunk from `base` on; `fault` is
// not 0 any more where a part has one.
__device__ State take_states(const AttentionCall &call, const BlockRows &rows, const Partials &partials, int base,
                             int row, State all, Factors &factors, int32_t &fault) {
  constexpr int kPerLane = kChunk / 32;
  const int lane = int(threadIdx.x) % 32, index = rows.head_in_pack * segment_rows(call) + rows.first_row + row;
  int2 places[kPerLane];
  float2 loaded[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    places[i] = make_int2(0, 0);
    loaded[i] = make_float2(0, 0);
    if (base + 32 * i >= partials.count) continue;  // by the whole warp: code that is not run is not fetched
    const int j = base + 32 * i + lane;
    if (j >= partials.count || rows.first_row + row >= segment_rows(call)) continue;
    places[i] = *reinterpret_cast<const int2 *>(partials.places + int64_t{j} * (sizeof(AttentionItem) / 4));
    const int32_t slot = partials.first_slot < 0 ? places[i].x : partials.first_slot + j;
    if (call.direct != 0) fault |= call.items[slot].first_slot;
    loaded[i] = reinterpret_cast<const float2 *>(call.partials + slot * call.slot_bytes)[index];
    if (row == 0) factors.slot[32 * i + lane] = slot;
  }
  State states[kPerLane];
  float max = all.max;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    states[i] = {minus_infinity(), 0};
    if (places[i].x < places[i].y) states[i] = {loaded[i].x, loaded[i].y};
    max = fmaxf(max, states[i].max);
  }
  max = warp_max(max);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (base + 32 * i >= partials.count) continue;
    const float factor = factor_of(states[i], max);
    factors.of[row][32 * i + lane] = factor;
    if (has_keys(states[i])) sum += states[i].sum * factor;
  }
  sum = warp_sum(sum);
  const float correction = factor_of(all, max);
  if (lane == 0) factors.correction[row] = correction;
  if (has_keys(all)) sum += all.sum * correction;
  return {max, sum};
}

// How a block divides its work.
struct FinishWork {
  uint32_t queries, weights, values, raw, sums, added, bytes;  // parts of shared memory, in bytes from its start
  int32_t rows;                                                // that a block takes
  int32_t columns;                                             // of 4 channels, of all these rows
  uint32_t row_of_column;                                      // (column * row_of_column) >> 20
  int32_t per_lane;                                            // channels_per_lane() of V
};

// Adds the warp's partial results of a chunk to its sums, kMany at a time of kWide columns a lane.
template <int kMany, int kWide>
__device__ __forceinline__ void add_outputs(const AttentionCall &call, const FinishWork &work, const uint8_t *outputs,
                                            const Factors &factors, int count, bool begins, float4 *sums) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
#pragma unroll 1
  for (int first = lane; first - lane < work.columns; first += 32 * kWide) {
    float4 sum[kWide];
    int row[kWide];
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      const int column = first + 32 * k;
      row[k] = column < work.columns ? int((uint32_t(column) * work.row_of_column) >> 20) : -1;
      sum[k] = make_float4(0, 0, 0, 0);
      if (begins || row[k] < 0) continue;
      const float correction = factors.correction[row[k]];
      const float4 old = sums[column];
      sum[k] = make_float4(old.x * correction, old.y * correction, old.z * correction, old.w * correction);
    }
#pragma unroll 1
    for (int j = warp; j < count; j += kFinishWarps * kMany) {
      float4 loaded[kMany][kWide];
      float factor[kMany][kWide];
#pragma unroll
      for (int i = 0; i < kMany; ++i) {
        const int at = j + kFinishWarps * i;
        const uint8_t *from = outputs;
        if (at < count) from += factors.slot[at] * call.slot_bytes;
#pragma unroll
        for (int k = 0; k < kWide; ++k) {
          factor[i][k] = at < count && row[k] >= 0 ? factors.of[row[k]][at] : 0.0f;
          loaded[i][k] = make_float4(0, 0, 0, 0);
          if (factor[i][k] != 0) loaded[i][k] = reinterpret_cast<const float4 *>(from)[first + 32 * k];
        }
      }
#pragma unroll
      for (int i = 0; i < kMany; ++i) {
#pragma unroll
        for (int k = 0; k < kWide; ++k) {
          sum[k].x = __fmaf_rn(factor[i][k], loaded[i][k].x, sum[k].x);
          sum[k].y = __fmaf_rn(factor[i][k], loaded[i][k].y, sum[k].y);
          sum[k].z = __fmaf_rn(factor[i][k], loaded[i][k].z, sum[k].z);
          sum[k].w = __fmaf_rn(factor[i][k], loaded[i][k].w, sum[k].w);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      if (row[k] >= 0) sums[first + 32 * k] = sum[k];
    }
  }
}

// ---- keys that are read raw

// One value a row, next to each other so that a thread reads them at once.
template <int kRows>
struct alignas(kRows % 4 == 0 ? 16 : 4) PerRow {
  float of[kRows];
};

template <int kRows>
struct RawShared {
  PerRow<kRows> *queries;  // [head_dim_k], times the softmax scale
  PerRow<kRows> *weights;  // [kRawThreads]: a chunk's scores, then weights
  const void **values;     // [kRawThreads]: null where the key is not read raw, or no row sees it
  float *outputs;          // [kRows, head_dim_v]
};

__device__ void load_two(const void *from, int type, bool aligned, int at, float (&x)[2]) {
  if (!aligned) {
    for (int i = 0; i < 2; ++i) x[i] = load_element(from, type, at + i);
  } else if (type == TQ_TYPE_F32) {
    const float2 pair = *reinterpret_cast<const float2 *>(static_cast<const float *>(from) + at);
    x[0] = pair.x;
    x[1] = pair.y;
  } else {
    const uint32_t pair = *reinterpret_cast<const uint32_t *>(static_cast<const uint16_t *>(from) + at);
    for (int i = 0; i < 2; ++i) {
      const uint16_t half = uint16_t(pair >> (16 * i));
      x[i] = type == TQ_TYPE_F16 ? __half2float(__ushort_as_half(half)) : f32_from_bf16(half);
    }
  }
}

__device__ void load_eight(const void *from, int type, bool aligned, int at, float (&x)[8]) {
  if (!aligned) {
    for (int i = 0; i < 8; ++i) x[i] = load_element(from, type, at + i);
  } else if (type == TQ_TYPE_F32) {
    for (int i = 0; i < 8; i += 4) {
      const float4 four = *reinterpret_cast<const float4 *>(static_cast<const float *>(from) + at + i);
      x[i] = four.x;
      x[i + 1] = four.y;
      x[i + 2] = four.z;
      x[i + 3] = four.w;
    }
  } else {
    const uint4 eight = *reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(from) + at);
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
    for (int i = 0; i < 8; ++i) {
      const uint16_t half = uint16_t(words[i / 2] >> (16 * (i % 2)));
      x[i] = type == TQ_TYPE_F16 ? __half2float(__ushort_as_half(half)) : f32_from_bf16(half);
    }
  }
}

// Keys that may be raw: `count` in two ranges.
struct RawKeys {
  int32_t low = 0, other_low = 0, split = 0, count = 0;
  __device__ int32_t key(int32_t i) const { return i < split ? low + i : other_low + (i - split); }
};

// Of the exact pages, or of the call's own tokens; `seen` are the keys that rows of the block see.
__device__ RawKeys find_raw_keys(const AttentionCall &call, const Sequence &sequence, KeyRange seen, bool own) {
  if (own) {
    const int32_t low = max(seen.low, sequence.coded_length);
    const bool elsewhere = call.k_new.data == nullptr || call.splits > call.page_splits;
    const int32_t count = elsewhere ? 0 : max(seen.high - low, 0);
    return {low, 0, count, count};
  }
  if (sequence.exact_table == nullptr) return {};
  const int64_t low = seen.low;
  const int64_t high = min(min(int64_t{seen.high}, int64_t{sequence.coded_length}),
                           min(call.exact_columns, int64_t{1} << 31) * call.exact.block_size);
  if (low >= high) return {};
  const int64_t split = max(int64_t{0}, min(high, sequence.start + call.exact_first) - low);
  const int64_t recent = max(low + split, sequence.first_position - call.exact_recent + 1);
  return {int32_t(low), int32_t(min(recent, high)), int32_t(split), int32_t(split + max(int64_t{0}, high - recent))};
}

// Where a key and its value are; null if it is not read raw.
struct RawToken {
  const void *key = nullptr, *value = nullptr;
};

__device__ const void *row_at(const Rows &rows, int64_t token, int head) {
  const int bytes = rows.type == TQ_TYPE_F32 ? 4 : 2;
  return static_cast<const uint8_t *>(rows.data) + (token * rows.token_stride + head * rows.head_stride) * bytes;
}

__device__ RawToken find_raw_token(const AttentionCall &call, const Sequence &sequence, int kv_head, int32_t j,
                                   bool own) {
  if (own) {
    const int64_t token = int64_t{sequence.begin} + (j - sequence.coded_length);
    return {row_at(call.k_new, token, kv_head), row_at(call.v_new, token, kv_head)};
  }
  const int32_t block = exact_block(call, sequence, j);
  if (block < 0) return {};
  const AttentionPool &pool = call.exact;
  const int64_t slot = int64_t{block} * pool.block_size + j % pool.block_size;
  const int64_t storage = max(pool.block_size, kTileTokens);  // smaller blocks share one
  const uint8_t *tile = pool.base + slot / storage * pool.block_stride +
                        slot % storage / kTileTokens * pool.tile_stride + kv_head * pool.head_stride;
  const int64_t row = slot % kTileTokens * 2;
  return {tile + row * call.head_dim_k, tile + pool.v_codes + row * call.head_dim_v};
}

template <int kRows>
class RawPart {
 public:
  __device__ RawPart(const AttentionCall &call, const BlockRows &rows, const RawShared<kRows> &shared, KeyRange *keys,
                     int32_t *positions, State *states, float *corrections)
      : call_(call),
        rows_(rows),
        shared_(shared),
        keys_(keys),
        positions_(positions),
        states_(states),
        corrections_(corrections) {}

  // Leaves states and outputs in shared memory; by the block.
  __device__ void run() {
    const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int n = call_.head_dim_v, pairs = n / 2;
    for (int i = thread; i < kRows * n; i += kRawThreads) shared_.outputs[i] = 0;
    if (thread < kRows) {
      keys_[thread] = {0, 0};
      positions_[thread] = 0;
      states_[thread] = {minus_infinity(), 0};
      if (rows_.has(call_, thread)) {
        positions_[thread] = position(call_, rows_.sequence, rows_.token(call_, thread));
        keys_[thread] = visible_keys(call_, rows_.sequence, positions_[thread]);
      }
    }
    __syncthreads();
    KeyRange seen{INT32_MAX, 0};
    for (int r = 0; r < kRows; ++r) {
      const KeyRange keys = keys_[r];
      if (keys.low < keys.high) seen = {min(seen.low, keys.low), max(seen.high, keys.high)};
    }
    if (seen.low >= seen.high) return;
    const RawKeys exact = find_raw_keys(call_, rows_.sequence, seen, false);
    const RawKeys mine = find_raw_keys(call_, rows_.sequence, seen, true);
    if (exact.count == 0 && mine.count == 0) return;

    for (int r = warp; r < kRows; r += kRawThreads / 32) load_query(r, lane);
    __syncthreads();
    float sums[2][kRows][2] = {};
#pragma unroll 1
    for (int source = 0; source < 2; ++source) {
      const bool own = source != 0;
      const RawKeys keys = own ? mine : exact;
#pragma unroll 1
      for (int64_t chunk = 0; chunk < keys.count; chunk += kRawThreads) {
        const int tokens = int(min(int64_t{kRawThreads}, keys.count - chunk));
        if (thread < tokens) score(thread, keys.key(int32_t(chunk) + thread), own);
        __syncthreads();
        for (int r = warp; r < kRows; r += kRawThreads / 32) softmax(r, lane, keys, int32_t(chunk), tokens);
        __syncthreads();
        add_values(tokens, own, sums);
        __syncthreads();
      }
    }
    // A pair of channels was summed by several groups of threads.
    const int groups = max(1, kRawThreads / pairs);
    for (int group = 0; group < groups; ++group) {
      if (thread / pairs == group || groups == 1) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int c = 2 * (thread % pairs + k * kRawThreads);
          if (c >= n) continue;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            shared_.outputs[r * n + c] += sums[k][r][0];
            shared_.outputs[r * n + c + 1] += sums[k][r][1];
          }
        }
      }
      __syncthreads();
    }
  }

 private:
  __device__ void load_query(int r, int lane) {
    const bool exists = keys_[r].low < keys_[r].high;
    const int64_t token = rows_.sequence.begin + rows_.token(call_, r);
    const int head = rows_.kv_head * call_.group + rows_.head_in_group(call_, r);
    const int64_t at = token * call_.q.token_stride + head * call_.q.head_stride;
    for (int c = lane; c < call_.head_dim_k; c += 32) {
      shared_.queries[c].of[r] = exists ? load_element(call_.q.data, call_.q.type, at + c) * call_.scale : 0.0f;
    }
  }

  __device__ bool sees(int r, int32_t j) const {
    return keys_[r].low <= j && j < keys_[r].high;
  }

  __device__ void score(int t, int32_t j, bool own) {
    bool seen = false;
    for (int r = 0; r < kRows; ++r) seen = seen || sees(r, j);
    RawToken token;
    if (seen) token = find_raw_token(call_, rows_.sequence, rows_.kv_head, j, own);
    shared_.values[t] = token.value;
    if (token.value == nullptr) return;
    const int type = own ? call_.k_new.type : call_.raw_type;
    const bool aligned = !own || call_.k_new.aligned;
    PerRow<kRows> sum{};
#pragma unroll 2
    for (int c = 0; c < call_.head_dim_k; c += 8) {
      float key[8];
      load_eight(token.key, type, aligned, c, key);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const PerRow<kRows> query = shared_.queries[c + i];
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum.of[r] = __fmaf_rn(key[i], query.of[r], sum.of[r]);
      }
    }
    shared_.weights[t] = sum;
  }

  // Of row r: scores of the chunk become weights, and the state takes them in.
  __device__ void softmax(int r, int lane, const RawKeys &raw, int32_t chunk, int tokens) {
    constexpr int kPerLane = kRawThreads / 32;
    const int head = rows_.kv_head * call_.group + rows_.head_in_group(call_, r);
    const bool exists = keys_[r].low < keys_[r].high;
    const float slope = exists && call_.alibi_slopes != nullptr ? call_.alibi_slopes[head] : 0.0f;
    const State before = states_[r];
    float x[kPerLane], max = before.max, sum = 0;
    unsigned seen = 0;  // bit i: the row sees token lane + 32 i
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int t = lane + 32 * i;
      x[i] = 0;
      if (t >= tokens || shared_.values[t] == nullptr) continue;
      const int32_t j = raw.key(chunk + t);
      if (!sees(r, j)) continue;
      seen |= 1u << i;
      float score = shared_.weights[t].of[r];
      if (call_.soft_cap > 0) score = call_.soft_cap * tanhf(score / call_.soft_cap);
      score = __fmaf_rn(slope, float(int64_t{j} - positions_[r]), score);
      x[i] = score * kLog2E;
      max = fmaxf(max, x[i]);
    }
    max = warp_max(max);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int t = lane + 32 * i;
      const float weight = (seen >> i & 1) != 0 ? exp2f(x[i] - max) : 0.0f;
      if (t < tokens) shared_.weights[t].of[r] = weight;
      sum += weight;
    }
    sum = warp_sum(sum);
    __syncwarp();
    if (lane == 0) {
      const float correction = before.max == max ? 1.0f : exp2f(before.max - max);
      corrections_[r] = correction;
      states_[r] = {max, before.sum * correction + sum};
    }
    __syncwarp();
  }

  __device__ void add_values(int tokens, bool own, float (&sums)[2][kRows][2]) {
    const int n = call_.head_dim_v, pairs = n / 2, thread = int(threadIdx.x);
    const int groups = max(1, kRawThreads / pairs), group = groups == 1 ? 0 : thread / pairs;
    const int type = own ? call_.v_new.type : call_.raw_type;
    const bool aligned = !own || call_.v_new.aligned;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float correction = corrections_[r];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        sums[k][r][0] *= correction;
        sums[k][r][1] *= correction;
      }
    }
    if (group >= groups) return;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int c = 2 * (thread % pairs + k * kRawThreads);
      if (c >= n) continue;
#pragma unroll 4
      for (int t = group; t < tokens; t += groups) {
        const void *from = shared_.values[t];
        float value[2] = {};
        if (from != nullptr) load_two(from, type, aligned, c, value);
        const PerRow<kRows> weight = shared_.weights[t];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          // A row has no weight for what it does not see, which may be NaN.
          if (weight.of[r] != 0) {
            sums[k][r][0] = __fmaf_rn(weight.of[r], value[0], sums[k][r][0]);
            sums[k][r][1] = __fmaf_rn(weight.of[r], value[1], sums[k][r][1]);
          }
        }
      }
    }
  }

  const AttentionCall &call_;
  const BlockRows &rows_;
  const RawShared<kRows> shared_;
  KeyRange *const keys_;  // of each row; none if it does not exist
  int32_t *const positions_;
  State *const states_;
  float *const corrections_;
};

// ---- the kernel

__device__ void count_sequence_faults(const AttentionCall &call) {
  if (call.faults == nullptr || call.direct != 0 || blockIdx.y != 0 || blockIdx.z != 0) return;
#pragma unroll 1
  for (int64_t s = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; s < call.num_seqs;
       s += int64_t{gridDim.x} * blockDim.x) {
    if (call.sequence_states[s] != kGood) {
      count_fault(call.faults, TQ_FAULT_LENGTH, s);
    } else if (call.sequence_faults[s] != 0) {
      count_fault(call.faults, TQ_FAULT_BLOCK, s);
    }
  }
}

// Where a row goes: the caller's array, or with a dense rotation the two sums.
struct Output {
  float *merged, *raw;
};

// What both parts of a row are multiplied with.
struct Gains {
  float coded = 0, raw = 0;
};

// Stores the row's lse, too; by a warp.
__device__ Gains finish_softmax(const AttentionCall &call, int64_t row, int head, int lane, State coded, State raw) {
  Gains gains;
  float lse = minus_infinity();
  if (has_keys(coded) || has_keys(raw)) {
    float max = fmaxf(coded.max, raw.max), sink = minus_infinity();
    if (call.sinks != nullptr) sink = call.sinks[head] * kLog2E;
    max = fmaxf(max, sink);
    gains.coded = factor_of(coded, max);
    gains.raw = factor_of(raw, max);
    float sum = call.sinks != nullptr ? exp2_approx(sink - max) : 0.0f;
    if (has_keys(coded)) sum += gains.coded * coded.sum;
    if (has_keys(raw)) sum += gains.raw * raw.sum;
    const float inverse = 1.0f / sum;
    gains.coded *= inverse;
    gains.raw *= inverse;
    lse = __fmaf_rn(max, kLn2, log2f(sum) * kLn2);
  }
  if (call.lse != nullptr && lane == 0) call.lse[row] = lse;
  return gains;
}

__device__ float decode_gain(const SideParams &v) {
  return v.bits == kRawBits ? 1.0f : v.decode_gain;
}

// What is left of a row of 32 * kPerLane channels, of which `parts` warps have sums `stride` floats apart. `raw_out`
// may be null.
template <int kPerLane>
__device__ __forceinline__ void write_row(const AttentionCall &call, const SideParams &v, const Output &output,
                                          int64_t row, int64_t at, int lane, Gains gains, const float *sums, int parts,
                                          int stride, const float *raw_out) {
  using Own = Neighbours<float, kPerLane>;
  const int first = kPerLane * lane;
  float x[kPerLane] = {}, raw[kPerLane] = {};
#pragma unroll
  for (int part = 0; part < kFinishWarps; ++part) {
    if (part >= parts) break;
    const Own own = *reinterpret_cast<const Own *>(sums + part * stride + first);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] += own.of[i];
  }
  if (output.merged == nullptr) {
    gains.coded *= decode_gain(v);
    rotate_back(v, lane, x);
  }
  if (raw_out != nullptr) {
    const Own own = *reinterpret_cast<const Own *>(raw_out + first);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) raw[i] = own.of[i] * gains.raw;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] *= gains.coded;
  if (output.merged == nullptr) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] += raw[i];
    store_neighbours(call.out.data, call.out.type, call.out.aligned != 0, at + first, x);
  } else {
    store_neighbours(output.merged, TQ_TYPE_F32, true, row * (32 * kPerLane) + first, x);
    store_neighbours(output.raw, TQ_TYPE_F32, true, row * (32 * kPerLane) + first, raw);
  }
}

// Of any head_dim; sums of the first two warps are overwritten.
__device__ void write_any_row(const AttentionCall &call, const SideParams &v, const Output &output, int64_t row,
                              int64_t at, int lane, Gains gains, float *sums, int parts, int stride,
                              const float *raw_out) {
  const int n = call.head_dim_v;
#pragma unroll 1
  for (int c = lane; c < n; c += 32) {
    float sum = 0;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) sum += sums[part * stride + c];
    sums[c] = sum;
  }
  __syncwarp();
  if (output.merged == nullptr) {
    gains.coded *= decode_gain(v);
    rotate_back(v, lane, sums, sums + stride);
  }
#pragma unroll 1
  for (int c = lane; c < n; c += 32) {
    const float coded_value = sums[c] * gains.coded;
    const float raw_value = raw_out != nullptr ? raw_out[c] * gains.raw : 0.0f;
    if (output.merged == nullptr) {
      store_element(call.out.data, call.out.type, at + c, coded_value + raw_value);
    } else {
      output.merged[row * n + c] = coded_value;
      output.raw[row * n + c] = raw_value;
    }
  }
}

// Adds outputs of one softmax, if there are any, to those of another, and the state to its state.
__device__ void add_raw(State &state, const float *outputs, State other, float *sums, int n, int lane) {
  const float max = fmaxf(state.max, other.max);
  const float factor = factor_of(state, max), other_factor = factor_of(other, max);
  for (int c = lane; c < n; c += 32) {
    float sum = sums[c] * other_factor;
    if (outputs != nullptr && factor != 0) sum += outputs[c] * factor;
    sums[c] = sum;
  }
  state = {max, (has_keys(state) ? state.sum * factor : 0.0f) + other.sum * other_factor};
  __syncwarp();
}

// kRawRows: at least the rows of a block, or 0 where nothing is read raw here.
template <int kRawRows>
__device__ __forceinline__ void finish_rows(const AttentionCall &call, const SideParams &v, const Output &output,
                                            const FinishWork &work) {
  __shared__ Factors factors;
  BlockRows rows;
  // What comes before the wait is written by "prepare", whose end the kernels before have waited for; in a DIRECT call it is
  // the caller's.
  if (!find_rows<(kRawRows > 0)>(call, int(blockIdx.z) * work.rows, &rows)) return grid_dependency_wait();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, n = call.head_dim_v;
  const int32_t s = rows.segment.sequence;
  // Faults that "attention" finds are seen after the wait; before, some threads may see them.
  const auto is_good = [&] {
    return rows.sequence.state == kGood &&
           (call.direct != 0 || *const_cast<const volatile int32_t *>(&call.sequence_faults[s]) == 0);
  };
  int32_t fault = 0;
  auto *memory = static_cast<uint8_t *>(dynamic_shared());
  [[maybe_unused]] float *raw_outputs = nullptr;
  [[maybe_unused]] const State *raw_states = nullptr;
  if constexpr (kRawRows > 0) {
    __shared__ KeyRange keys[kRawRows];
    __shared__ int32_t positions[kRawRows];
    __shared__ State states[kRawRows];
    __shared__ float corrections[kRawRows];
    const RawShared<kRawRows> shared{reinterpret_cast<PerRow<kRawRows> *>(memory + work.queries),
                                     reinterpret_cast<PerRow<kRawRows> *>(memory + work.weights),
                                     reinterpret_cast<const void **>(memory + work.values),
                                     reinterpret_cast<float *>(memory + work.raw)};
    __shared__ bool usable;
    if (warp == 0) {
      bool good = is_good();
      if (good && call.direct != 0 && rows.sequence.exact_table != nullptr) {
        good = !has_bad_exact(call, rows.sequence, lane);
      }
      if (lane == 0) usable = good;
    }
    __syncthreads();
    fault = rows.sequence.state == kGood && !usable;
    if (usable) {
      RawPart<kRawRows>(call, rows, shared, keys, positions, states, corrections).run();
      __syncthreads();
    }
    raw_outputs = shared.outputs;
    raw_states = states;
  }

  bool of_new = call.splits > call.page_splits;  // k_new first, if "attention" read it
  if (call.direct != 0) grid_dependency_wait();
  Partials partials(call, rows, of_new);
  grid_dependency_wait();
  bool good = is_good();  // looked at last: it takes a while to load
  float *sums = reinterpret_cast<float *>(memory + work.sums), *added = reinterpret_cast<float *>(memory + work.added);
  const uint8_t *outputs =
      call.partials + partial_outputs(call.pack_heads, segment_rows(call)) +
      int64_t{rows.head_in_pack * segment_rows(call) + rows.first_row} * n * int64_t{sizeof(float)};
  constexpr State kNone{-INFINITY, 0};
  State coded = kNone, raw = kNone, own = kNone;
  int count = 0;
#pragma unroll 1
  for (;;) {
    count = partials.count;
    coded = kNone;
#pragma unroll 1
    for (int base = 0; base < count; base += kChunk) {
      if (base > 0) __syncthreads();
      if (warp < work.rows) coded = take_states(call, rows, partials, base, warp, coded, factors, fault);
      __syncthreads();
      float4 *own_sums = reinterpret_cast<float4 *>(sums) + warp * work.columns;
      const int chunk = min(count - base, kChunk);
      if (work.columns <= 32) {  // one row, mostly: then a chunk is read in two goes
        add_outputs<kChunk / (2 * kFinishWarps), 1>(call, work, outputs, factors, chunk, base == 0, own_sums);
      } else {
        add_outputs<4, 4>(call, work, outputs, factors, chunk, base == 0, own_sums);
      }
    }
    __syncthreads();
    if (!of_new) break;
    own = coded;
    for (int c = lane; c < n && warp < work.rows; c += 32) {
      float sum = 0;
      for (int part = 0; part < min(count, kFinishWarps); ++part) sum += sums[4 * part * work.columns + warp * n + c];
      added[warp * n + c] = sum;
    }
    of_new = false;
    partials = Partials(call, rows, false);
    __syncthreads();
  }
  if (warp >= work.rows || !rows.has(call, warp)) return;
  if (call.direct != 0) {
    good = !__any_sync(kAll, fault != 0) && good;
    const bool first = rows.kv_head + rows.first_head + rows.first_row + warp + lane == 0;
    if (!good && first && call.faults != nullptr) {
      count_fault(call.faults, rows.sequence.state != kGood ? TQ_FAULT_LENGTH : TQ_FAULT_BLOCK, s);
    }
  }
  const float *raw_out = nullptr;
  if constexpr (kRawRows > 0) {
    if (good) raw = raw_states[warp], raw_out = raw_outputs + warp * n;
  }
  if (good && has_keys(own)) {
    add_raw(raw, raw_out, own, added + warp * n, n, lane);
    raw_out = added + warp * n;
  }
  const int head = rows.kv_head * call.group + rows.head_in_group(call, warp);
  const int64_t token = rows.sequence.begin + rows.token(call, warp), index = token * call.q_heads + head;
  const int64_t at = token * call.out.token_stride + head * call.out.head_stride;
  if (!good) coded = kNone;
  const Gains gains = finish_softmax(call, index, head, lane, coded, raw);
  const int parts = good ? min(count, kFinishWarps) : 0, stride = 4 * work.columns;
  sums += warp * n;
  if (work.per_lane == 4) {
    write_row<4>(call, v, output, index, at, lane, gains, sums, parts, stride, raw_out);
  } else if (work.per_lane == 2) {
    write_row<2>(call, v, output, index, at, lane, gains, sums, parts, stride, raw_out);
  } else if (work.per_lane == 8) {
    write_row<8>(call, v, output, index, at, lane, gains, sums, parts, stride, raw_out);
  } else {
    write_any_row(call, v, output, index, at, lane, gains, sums, parts, stride, raw_out);
  }
}

template <int kRawRows>
__global__ void __launch_bounds__(kRawThreads, 2)
    attention_finish_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ SideParams v,
                            const __grid_constant__ Output output, const __grid_constant__ FinishWork work) {
  grid_dependency_launch();
  finish_rows<kRawRows>(call, v, output, work);
  count_sequence_faults(call);
}

__global__ void __launch_bounds__(32 * kMaxRows)
    attention_write_kernel(const __grid_constant__ AttentionCall call, float gain, const float *rotated_back,
                           const float *raw) {
  BlockRows rows;
  if (!find_rows<false>(call, 0, &rows)) return;
  const int lane = int(threadIdx.x) % 32, n = call.head_dim_v;
  for (int r = int(threadIdx.x) / 32; r < segment_rows(call); r += int(blockDim.x) / 32) {
    if (!rows.has(call, r)) continue;
    const int head = rows.kv_head * call.group + rows.head_in_group(call, r);
    const int64_t row = rows.row(call, r), token = rows.sequence.begin + rows.token(call, r);
    const int64_t at = token * call.out.token_stride + head * call.out.head_stride;
    for (int c = lane; c < n; c += 32) {
      store_element(call.out.data, call.out.type, at + c, rotated_back[row * n + c] * gain + raw[row * n + c]);
    }
  }
}

// At least one block, which counts faults.
dim3 grid_of(const AttentionCall &call) {
  const int64_t groups = call.max_segments / call.splits;
  return dim3(unsigned(groups > 1 ? groups : 1), unsigned(call.pack_heads));
}

size_t align16(size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

// `rows`: of a block.
FinishWork divide_work(int head_dim_k, int head_dim_v, int raw_rows, int rows, bool with_new) {
  size_t at = 0;
  const auto take = [&](size_t bytes) { return uint32_t(std::exchange(at, at + align16(bytes))); };
  FinishWork work{};
  if (raw_rows > 0) {
    work.queries = take(sizeof(float) * size_t(raw_rows * head_dim_k));
    work.weights = take(sizeof(float) * size_t(raw_rows * kRawThreads));
    work.values = take(sizeof(void *) * kRawThreads);
    work.raw = take(sizeof(float) * size_t(raw_rows * head_dim_v));
  }
  work.sums = take(sizeof(float) * size_t(kFinishWarps * rows * head_dim_v));
  work.added = take(sizeof(float) * size_t(with_new ? rows * head_dim_v : 0));
  work.bytes = uint32_t(at);
  work.rows = rows;
  work.columns = rows * head_dim_v / 4;
  work.row_of_column = (1u << 20) / uint32_t(head_dim_v / 4) + 1;
  return work;
}

template <int kRawRows>
int launch_finish_kernel(const AttentionCall &call, const SideParams &v, const Output &output, void *stream) {
  const int rows = call.block_tokens * call.block_heads;
  int block_rows = rows < kMaxRows ? rows : kMaxRows;
  dim3 grid = grid_of(call);
  // A block a row where there are multiprocessors enough; what is read raw is shared by rows.
  if (kRawRows == 0 && int64_t{grid.x} * grid.y * rows <= 2 * call.blocks) block_rows = 1;
  grid.z = unsigned((rows + block_rows - 1) / block_rows);
  FinishWork work = divide_work(call.head_dim_k, call.head_dim_v, kRawRows, block_rows, call.splits > call.page_splits);
  work.per_lane = channels_per_lane(v);
  return launch_dependent(attention_finish_kernel<kRawRows>, grid, unsigned(kRawThreads), work.bytes, stream, call, v,
                          output, work);
}

template <int kRawRows>
int load_finish_kernel() {
  constexpr int kMostDim = 256;  // of attention's kernels
  const int most = int(divide_work(kMostDim, kMostDim, kRawRows, kMaxRows, true).bytes);
  return cudaFuncSetAttribute(attention_finish_kernel<kRawRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

}  // namespace

int launch_attention_finish(const AttentionCall &call, const SideParams &v, float *merged, float *raw, void *stream) {
  if (call.num_seqs == 0) return 0;
  const Output output{merged, raw};
  const int rows = call.block_tokens * call.block_heads;
  if (call.exact.base == nullptr && (call.k_new.data == nullptr || call.splits > call.page_splits)) {
    return launch_finish_kernel<0>(call, v, output, stream);
  }
  if (rows == 1) return launch_finish_kernel<1>(call, v, output, stream);
  if (rows <= 4) return launch_finish_kernel<4>(call, v, output, stream);
  return launch_finish_kernel<kMaxRows>(call, v, output, stream);
}

int launch_attention_write(const AttentionCall &call, float gain, const float *rotated_back, const float *raw,
                           void *stream) {
  if (call.num_seqs == 0) return 0;
  const int rows = call.block_tokens * call.block_heads;
  const unsigned threads = unsigned(32 * (rows < kMaxRows ? rows : kMaxRows));
  return launch(attention_write_kernel, grid_of(call), threads, 0, stream, call, gain, rotated_back, raw);
}

int load_attention_finish() {
  for (const auto load :
       {load_finish_kernel<0>, load_finish_kernel<1>, load_finish_kernel<4>, load_finish_kernel<kMaxRows>}) {
    if (const int error = load()) return error;
  }
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, attention_write_kernel);
}

}  // namespace tqkv::cuda
