// SPDX-License-Identifier: Apache-2.0
// After attention: a block takes the segments of all splits of some rows, of one kv head. Partial results are merged in
// the order of splits and CUDA blocks, a warp a row, and rotated back. Keys that are read raw are added before, for all
// rows of the block together: a chunk has a token a thread for scores, a row a warp for the softmax, and two channels a
// thread for values.
#include "kernels/device/launch.cuh"
#include "kernels/device/rotation.cuh"
#include "kernels/device/sequence.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {
namespace {

constexpr int kMaxRows = 8;       // of a segment
constexpr int kRawThreads = 256;  // tokens of a chunk
constexpr float kLog2E = 0x1.715476p+0f;
constexpr double kLn2 = 0x1.62e42fefa39efp-1;

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
  return !has_keys(state) ? 0.0f : state.max == max ? 1.0f : exp2f(state.max - max);
}

// The rows of a block.
struct BlockRows {
  Sequence sequence;
  int32_t state;  // of the sequence, as attention found it
  int64_t first_segment, sequence_index;
  int32_t first_token, first_head, kv_head, head_in_pack;

  __device__ int32_t token(const AttentionCall &call, int r) const { return first_token + r / call.block_heads; }
  __device__ int32_t head_in_group(const AttentionCall &call, int r) const { return first_head + r % call.block_heads; }
  __device__ bool has(const AttentionCall &call, int r) const {
    return token(call, r) < sequence.q_len && head_in_group(call, r) < call.group;
  }
  __device__ int64_t row(const AttentionCall &call, int r) const {  // of [num_tokens, q_heads]
    return int64_t{sequence.begin + token(call, r)} * call.q_heads + kv_head * call.group + head_in_group(call, r);
  }
};

// False where there are fewer segments than the host made blocks for; by a warp.
__device__ bool find_rows(const AttentionCall &call, BlockRows *rows) {
  rows->first_segment = int64_t{blockIdx.x} * call.splits;
  if (rows->first_segment >= call.sequence_segments[call.num_seqs]) return false;
  const SegmentGroup group = find_segment_group(call, rows->first_segment);
  rows->sequence = read_sequence(call, group.sequence, 0);
  rows->sequence_index = group.sequence;
  rows->state = call.sequence_states[group.sequence];
  rows->first_token = group.token_block * call.block_tokens;
  rows->first_head = group.head_part * call.block_heads;
  rows->head_in_pack = int32_t(blockIdx.y);
  rows->kv_head = group.head_pack * call.pack_heads + rows->head_in_pack;
  return true;
}

__device__ int segment_rows(const AttentionCall &call) {
  return call.block_tokens * call.block_heads;
}

// Merges the partial results of row r; their outputs are summed up in `out`. By a warp.
__device__ State merge_partials(const AttentionCall &call, const BlockRows &rows, int r, int lane, float *out) {
  const int n = call.head_dim_v, index = rows.head_in_pack * segment_rows(call) + r;
  const int64_t outputs_at = partial_outputs(call.pack_heads, segment_rows(call));
  const int64_t units = call.segment_units[call.sequence_segments[call.num_seqs]];
  // Either one segment that blocks one after the other have parts of, or segments of one block each.
  const int64_t segment = rows.first_segment;
  int64_t first_slot = 0, count = call.splits;
  if (call.split_tiles == 0) {
    const int64_t first = call.segment_units[segment], end = call.segment_units[segment + 1];
    count = 0;
    if (first < end) {
      first_slot = block_of_unit(call, first, units) + segment;
      count = block_of_unit(call, end - 1, units) + segment + 1 - first_slot;
    }
  }
  for (int c = lane; c < n; c += 32) out[c] = 0;
  __syncwarp();

  State all{minus_infinity(), 0};
  for (int64_t base = 0; base < count; base += 32) {
    const int64_t i = base + lane;
    int64_t slot = -1;
    if (i < count) {
      bool empty = false;
      if (call.split_tiles == 0) {
        slot = first_slot + i;
        empty = !has_units(call, slot - segment, units);
      } else {
        const int64_t first = call.segment_units[segment + i];
        empty = first == call.segment_units[segment + i + 1];
        if (!empty) slot = block_of_unit(call, first, units) + segment + i;
      }
      if (empty) slot = -1;
    }
    State state{minus_infinity(), 0};
    const uint8_t *partial = call.partials + slot * call.slot_bytes;
    if (slot >= 0) {
      const float2 loaded = reinterpret_cast<const float2 *>(partial)[index];
      state = {loaded.x, loaded.y};
    }
    const float max = fmaxf(all.max, warp_max(state.max)), correction = factor_of(all, max);
    const float factor = factor_of(state, max);
    all = {max, (has_keys(all) ? all.sum * correction : 0.0f) + warp_sum(has_keys(state) ? state.sum * factor : 0.0f)};
    if (!__any_sync(kAll, factor != 0)) continue;

    const int64_t outputs = slot * call.slot_bytes + outputs_at + int64_t{index} * n * int64_t{sizeof(float)};
    constexpr int kBatch = 8, kWide = 64;
    for (int slab = 0; slab < n; slab += 2 * kWide) {
      const int c[2] = {slab + 2 * lane, slab + kWide + 2 * lane};
      float2 sum[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        sum[k] = c[k] < n ? make_float2(out[c[k]] * correction, out[c[k] + 1] * correction) : make_float2(0, 0);
      }
      for (int first = 0; first < 32 && base + first < count; first += kBatch) {
        float2 loaded[kBatch][2];
        float factors[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          factors[b] = __shfl_sync(kAll, factor, first + b);
          const int64_t at = __shfl_sync(kAll, outputs, first + b);
          const auto *from = reinterpret_cast<const float *>(call.partials + at);
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            loaded[b][k] = make_float2(0, 0);
            if (factors[b] != 0 && c[k] < n) loaded[b][k] = *reinterpret_cast<const float2 *>(from + c[k]);
          }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            sum[k].x = __fmaf_rn(factors[b], loaded[b][k].x, sum[k].x);
            sum[k].y = __fmaf_rn(factors[b], loaded[b][k].y, sum[k].y);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (c[k] >= n) continue;
        out[c[k]] = sum[k].x;
        out[c[k] + 1] = sum[k].y;
      }
    }
  }
  __syncwarp();
  return all;
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
    const int32_t count = call.k_new.data == nullptr ? 0 : max(seen.high - low, 0);
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
      if (thread < segment_rows(call_) && rows_.has(call_, thread)) {
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
  if (blockIdx.y != 0) return;
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

__device__ void write_row(const AttentionCall &call, const SideParams &v, const Output &output, const BlockRows &rows,
                          int r, int lane, bool good, State coded, State raw, float *out, const float *raw_out,
                          float *scratch) {
  const int n = call.head_dim_v, head = rows.kv_head * call.group + rows.head_in_group(call, r);
  const int64_t row = rows.row(call, r);
  const int64_t at = (rows.sequence.begin + rows.token(call, r)) * call.out.token_stride + head * call.out.head_stride;
  const bool any = good && (has_keys(coded) || has_keys(raw));
  float lse = minus_infinity(), coded_gain = 0, raw_gain = 0;
  if (any) {
    float max = fmaxf(coded.max, raw.max), sink = minus_infinity();
    if (call.sinks != nullptr) sink = call.sinks[head] * kLog2E;
    max = fmaxf(max, sink);
    const float coded_factor = factor_of(coded, max), raw_factor = factor_of(raw, max);
    double sum = call.sinks != nullptr ? double(exp2f(sink - max)) : 0;
    if (has_keys(coded)) sum += double(coded_factor) * double(coded.sum);
    if (has_keys(raw)) sum += double(raw_factor) * double(raw.sum);
    const float inverse = float(1 / sum);
    coded_gain = coded_factor * inverse;
    raw_gain = raw_factor * inverse;
    lse = float((double(max) + log2(sum)) * kLn2);
    if (output.merged == nullptr) {
      coded_gain *= v.decode_gain;
      rotate_back(v, lane, out, scratch);
    }
  }
  for (int c = lane; c < n; c += 32) {
    const float coded_value = any ? out[c] * coded_gain : 0.0f;
    const float raw_value = any && raw_out != nullptr ? raw_out[c] * raw_gain : 0.0f;
    if (output.merged == nullptr) {
      store_element(call.out.data, call.out.type, at + c, coded_value + raw_value);
    } else {
      output.merged[row * n + c] = coded_value;
      output.raw[row * n + c] = raw_value;
    }
  }
  if (call.lse != nullptr && lane == 0) call.lse[row] = lse;
  __syncwarp();
}

size_t align16(size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

// The parts of the block's shared memory, in bytes from its start.
struct FinishLayout {
  uint32_t queries, weights, values, raw, out, bytes;
};

FinishLayout layout_of(int head_dim_k, int head_dim_v, int raw_rows, int warps) {
  size_t at = 0;
  const auto take = [&](size_t bytes) { return uint32_t(std::exchange(at, at + align16(bytes))); };
  FinishLayout layout{};
  if (raw_rows > 0) {
    layout.queries = take(sizeof(float) * size_t(raw_rows * head_dim_k));
    layout.weights = take(sizeof(float) * size_t(raw_rows * kRawThreads));
    layout.values = take(sizeof(void *) * kRawThreads);
    layout.raw = take(sizeof(float) * size_t(raw_rows * head_dim_v));
  }
  layout.out = take(sizeof(float) * size_t(2 * warps * head_dim_v));
  layout.bytes = uint32_t(at);
  return layout;
}

// kRawRows: at least the rows of a segment, or 0 where  is read raw.
template <int kRawRows>
__global__ void __launch_bounds__(kRawThreads, 2)
    attention_finish_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ SideParams v,
                            const Output output, const FinishLayout layout) {
  grid_dependency_wait();
  count_sequence_faults(call);
  BlockRows rows;
  if (!find_rows(call, &rows)) return;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, n = call.head_dim_v;
  const bool good = rows.state == kGood && call.sequence_faults[rows.sequence_index] == 0;
  auto *memory = static_cast<uint8_t *>(dynamic_shared());
  float *raw_outputs = nullptr;
  [[maybe_unused]] const State *raw_states = nullptr;
  if constexpr (kRawRows > 0) {
    __shared__ KeyRange keys[kRawRows];
    __shared__ int32_t positions[kRawRows];
    __shared__ State states[kRawRows];
    __shared__ float corrections[kRawRows];
    const RawShared<kRawRows> shared{reinterpret_cast<PerRow<kRawRows> *>(memory + layout.queries),
                                     reinterpret_cast<PerRow<kRawRows> *>(memory + layout.weights),
                                     reinterpret_cast<const void **>(memory + layout.values),
                                     reinterpret_cast<float *>(memory + layout.raw)};
    if (good) {
      RawPart<kRawRows>(call, rows, shared, keys, positions, states, corrections).run();
      __syncthreads();
    }
    raw_outputs = shared.outputs;
    raw_states = states;
  }
  float *out = reinterpret_cast<float *>(memory + layout.out) + 2 * warp * n;
  for (int r = warp; r < segment_rows(call); r += int(blockDim.x) / 32) {
    if (!rows.has(call, r)) continue;
    State coded{minus_infinity(), 0}, raw{minus_infinity(), 0};
    if (good) {
      coded = merge_partials(call, rows, r, lane, out);
      if constexpr (kRawRows > 0) raw = raw_states[r];
    }
    write_row(call, v, output, rows, r, lane, good, coded, raw, out,
              raw_outputs == nullptr ? nullptr : raw_outputs + r * n, out + n);
  }
}

__global__ void __launch_bounds__(32 * kMaxRows)
    attention_write_kernel(const __grid_constant__ AttentionCall call, float gain, const float *rotated_back,
                           const float *raw) {
  BlockRows rows;
  if (!find_rows(call, &rows)) return;
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

template <int kRawRows>
int launch_finish_kernel(const AttentionCall &call, const SideParams &v, const Output &output, void *stream) {
  const int rows = call.block_tokens * call.block_heads, threads = kRawRows > 0 ? kRawThreads : 32 * rows;
  const FinishLayout layout = layout_of(call.head_dim_k, call.head_dim_v, kRawRows, threads / 32);
  return launch_dependent(attention_finish_kernel<kRawRows>, grid_of(call), unsigned(threads), layout.bytes, stream,
                          call, v, output, layout);
}

template <int kRawRows>
int load_finish_kernel() {
  const int most = int(layout_of(kMaxDim, kMaxDim, kRawRows, kRawThreads / 32).bytes);
  return cudaFuncSetAttribute(attention_finish_kernel<kRawRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

}  // namespace

int launch_attention_finish(const AttentionCall &call, const SideParams &v, float *merged, float *raw, void *stream) {
  if (call.num_seqs == 0) return 0;
  const Output output{merged, raw};
  const int rows = call.block_tokens * call.block_heads;
  if (call.exact.base == nullptr && call.k_new.data == nullptr) {
    return launch_finish_kernel<0>(call, v, output, stream);
  }
  if (rows == 1) return launch_finish_kernel<1>(call, v, output, stream);
  if (rows <= 4) return launch_finish_kernel<4>(call, v, output, stream);
  return launch_finish_kernel<kMaxRows>(call, v, output, stream);
}

int launch_attention_write(const AttentionCall &call, float gain, const float *rotated_back, const float *raw,
                           void *stream) {
  if (call.num_seqs == 0) return 0;
  const unsigned threads = unsigned(32 * call.block_tokens * call.block_heads);
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
