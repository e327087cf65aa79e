// SPDX-License-Identifier: Apache-2.0
// After attention: a block takes the segments of all splits of some rows, at most 8, of one kv head. Of its partial results, in
// the order of splits or of CUDA blocks, warp w of 8 sums up every 8th from the w-th on (of 4 every 4th), for all rows, without
// waiting for the others; what the warps have is summed up in order and rotated back, a warp a row. Where partial results are
// few, that warp takes all of its row itself. Keys that are read raw are added before, for all rows of the block together. With
// a fixed split a row's bits do not depend on how many rows a block has.
#include <algorithm>
#include <bit>

#include "kernels/device/launch.cuh"
#include "kernels/device/rotation.cuh"
#include "kernels/device/sequence.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {
namespace {

constexpr int kMaxRows = 8;  // of a block
constexpr int kRawThreads = 256;
constexpr int kMostRawTokens = 160;      // of a chunk, a multiple of 32
constexpr int kMostRawBytes = 96 << 10;  // that they take, if not less than eight
constexpr float kLn2 = 0x1.62e43p-1f;
constexpr int kFinishWarps = kRawThreads / 32;
constexpr int kFewParts = 20;    // of a segment, which a warp adds up alone,
constexpr int kFewChannels = 4;  // where this is a lane's part of head_dim
constexpr int kFewWarps = 4;     // of blocks of which there are many, so that all run at once,
constexpr int kFewLoads = 8;     // and, if a warp loads so many parts at a time, six a multiprocessor, and early
static_assert(kMaxRows <= kFinishWarps);

// Whether "attention" reads k_new, so that it has parts of its own.
__host__ __device__ bool reads_new(const AttentionCall &call) {
  return call.splits > call.page_splits;
}

__device__ float minus_infinity() {
  return -__int_as_float(0x7f800000);
}

// A softmax so far, in units of log2; without keys the maximum is -infinity and the sum 0.
struct alignas(8) State {
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
  // Goes on to the next tokens, if they are nobody's: those of a sequence that is longer than the call says, whose rows
  // become zeros.
  __device__ bool next(const AttentionCall &call, int r) {
    if (call.direct == 0 || segment.token_block + 1 < call.token_blocks) return false;
    first_token += call.block_tokens;
    return has(call, r);
  }
};

// False where there are fewer segments than the host made blocks for.
template <bool kWholeSequence>
__device__ bool find_rows(const AttentionCall &call, int first_row, BlockRows *rows) {
  rows->first_row = first_row;
  rows->first_segment = int32_t(blockIdx.x) * call.splits;
  if (rows->first_segment >= call.max_segments) return false;
  rows->segment = call.segments[rows->first_segment];
  const AttentionItem &segment = rows->segment;
  if (call.direct == 0 && rows->first_segment >= call.sequence_segments[call.num_seqs]) return false;
  rows->sequence = {};
  const int32_t state = call.sequence_states[segment.sequence];
  if (kWholeSequence && state == kGood) {
    rows->sequence = read_sequence(call, segment.sequence, 0);
  } else if (state != kBadRows) {
    const SequenceRows all = sequence_rows(call, segment.sequence);
    rows->sequence.state = state;
    rows->sequence.begin = int32_t(all.begin);
    rows->sequence.q_len = int32_t(all.end - all.begin);
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

// What a warp has of each row.
struct WarpPart {
  State states[kMaxRows];
  float correction[kMaxRows];  // what its sums so far are to be multiplied with
  float factors[32];           // likewise, of a chunk's outputs, `lanes` a row; 0: they may be anything
  int32_t slots[32];
};

// Partial results of the rows of a block.
struct Partials {
  // Of each, an AttentionItem apart, two numbers that are equal where it has no tiles. Null: blocks from first_block on have
  // one each, with tiles if they have units.
  const int32_t *places;
  int32_t first_slot;  // the others follow; -1: the first of the two numbers is the slot
  int32_t count, first_block;
  bool all_have_tiles;  // known without looking

  // Of pages, or of k_new.
  __device__ Partials(const AttentionCall &call, const BlockRows &rows, bool of_new)
      : first_block(0), all_have_tiles(false) {
    if (call.split_tiles == 0) {  // parts of one segment, in slots that follow each other
      const AttentionItem &segment = of_new ? call.segments[rows.first_segment + 1] : rows.segment;
      first_slot = segment.first_slot;
      count = segment.end_slot - first_slot;
      places = &call.items[first_slot].first_tile;
      if (call.direct != 0) {
        places = nullptr;
        first_block = first_slot - rows.first_segment;
        all_have_tiles = call.segment_units[0] >= call.blocks;
      }
    } else {  // segments in a slot each
      first_slot = -1;
      count = of_new ? call.splits - call.page_splits : call.page_splits;
      places = &call.segments[rows.first_segment + (of_new ? call.page_splits : 0)].first_slot;
    }
  }

  // The slot of part j and whether it has tiles.
  __device__ int32_t slot(const AttentionCall &call, int j, bool *has_tiles) const {
    *has_tiles = all_have_tiles;
    if (all_have_tiles) return first_slot + j;
    if (places == nullptr) {
      const UnitRange range = block_units(call, uint32_t(call.segment_units[0]), first_block + j);
      *has_tiles = range.low < range.high;
      return first_slot + j;
    }
    const int2 place = *reinterpret_cast<const int2 *>(places + int64_t{j} * (sizeof(AttentionItem) / 4));
    *has_tiles = place.x < place.y;
    return first_slot < 0 ? place.x : first_slot + j;
  }
};

// How a block divides its work.
struct FinishWork {
  uint32_t chunk, raw, sums, added, bytes;  // parts of shared memory, in bytes from its start
  int32_t chunk_tokens;                     // of keys that are read raw
  int32_t rows;                             // that a block takes
  int32_t log2_warps;                       // of a block
  int32_t log2_lanes;                       // of a warp, for the states of each
  int32_t columns;                          // of 4 channels, of all these rows
  uint32_t row_of_column;                   // (column * row_of_column) >> 20
  int32_t per_lane;                         // channels_per_lane() of V
};

// The state that a lane takes, of one of the warp's partial results in the chunk from `base` on, and its slot.
struct LaneState {
  State state;
  int32_t slot, row, i;  // i: which of the warp's
};
__device__ __forceinline__ LaneState load_state(const AttentionCall &call, const BlockRows &rows,
                                                const Partials &partials, const FinishWork &work, int base) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int row = lane >> work.log2_lanes, i = lane - (row << work.log2_lanes);
  const int j = base + warp + (i << work.log2_warps);
  bool has_tiles = false;
  const int32_t slot = j < partials.count ? partials.slot(call, j, &has_tiles) : 0;
  State state{minus_infinity(), 0};
  if (has_tiles && row < work.rows && rows.first_row + row < segment_rows(call)) {
    state = (reinterpret_cast<const State *>(call.partials + slot * call.slot_bytes) +
             rows.head_in_pack * segment_rows(call) + rows.first_row)[row];
  }
  return {state, slot, row, i};
}

// Takes the states of a chunk into those that the warp has already, unless it begins.
__device__ __forceinline__ void take_states(const FinishWork &work, const LaneState &loaded, bool begins,
                                            WarpPart &own) {
  const int lane = int(threadIdx.x) % 32, lanes = 1 << work.log2_lanes, num_rows = work.rows;
  const auto &[state, slot, row, i] = loaded;
  State all{minus_infinity(), 0};
  if (!begins && row < num_rows) all = own.states[row];
  float max = fmaxf(all.max, state.max);
#pragma unroll 1
  for (int step = 1; step < lanes; step *= 2) max = fmaxf(max, __shfl_xor_sync(kAll, max, step));
  const float factor = factor_of(state, max), correction = factor_of(all, max);
  float sum = has_keys(state) ? state.sum * factor : 0.0f;
#pragma unroll 1
  for (int step = 1; step < lanes; step *= 2) sum += __shfl_xor_sync(kAll, sum, step);
  if (has_keys(all)) sum += all.sum * correction;
  own.factors[lane] = factor;
  if (row == 0) own.slots[i] = slot;
  __syncwarp();  // all lanes have read the state
  if (i == 0 && row < num_rows) own.states[row] = {max, sum}, own.correction[row] = correction;
  __syncwarp();
}

// The state of all the warp's lanes together, and what the lane's own is multiplied with in it.
__device__ __forceinline__ State join_lanes(State state, float &factor) {
  const float max = warp_max(state.max);
  factor = factor_of(state, max);
  return {max, warp_sum(has_keys(state) ? state.sum * factor : 0.0f)};
}

// The state of row r, of which `count` warps have parts, and their corrections; by a warp.
__device__ __forceinline__ State join_states(WarpPart *parts, int count, int r) {
  const int lane = int(threadIdx.x) % 32;
  State state{minus_infinity(), 0};
  if (lane < count) state = parts[lane].states[r];
  float factor;
  const State all = join_lanes(state, factor);
  if (lane < count) parts[lane].correction[r] = factor;
  __syncwarp();
  return all;
}

// The warp's partial results of a chunk: kLoads / kWide of them at a time, of kWide columns a lane.
template <int kLoads>
class Outputs {
 public:
  // `outputs`: of the rows, in slot 0; `count`: of all warps' partial results.
  __device__ Outputs(const AttentionCall &call, const FinishWork &work, const uint8_t *outputs, int count)
      : call_(call),
        work_(work),
        outputs_(outputs),
        count_((count - warp() + (1 << work.log2_warps) - 1) >> work.log2_warps) {}

  // Loads the first ones, whose slots follow `slot`: factors are not known yet.
  template <int kWide>
  __device__ __forceinline__ void load_first(int32_t slot) {
    load<kWide>(
        lane(), 0, [&](int i) { return slot + warp() + (i << work_.log2_warps); }, [](int, int) { return true; });
  }

  // Adds all to the warp's sums.
  template <int kWide>
  __device__ __forceinline__ void add(const WarpPart &own, bool loaded_first, bool begins, float4 *sums) {
    constexpr int kMany = kLoads / kWide;
#pragma unroll 1
    for (int first = lane(); first - lane() < work_.columns; first += 32 * kWide) {
      float4 sum[kWide];
#pragma unroll
      for (int k = 0; k < kWide; ++k) {
        const int row = row_of(first + 32 * k);
        sum[k] = make_float4(0, 0, 0, 0);
        if (begins || row < 0) continue;
        const float correction = own.correction[row];
        const float4 old = sums[first + 32 * k];
        sum[k] = make_float4(old.x * correction, old.y * correction, old.z * correction, old.w * correction);
      }
#pragma unroll 1
      for (int begin = 0; begin < count_; begin += kMany) {
        const auto factor_at = [&](int i, int column) {
          const int row = row_of(column);
          return row >= 0 ? own.factors[(row << work_.log2_lanes) + i] : 0.0f;
        };
        if (!loaded_first || first != lane() || begin != 0) {
          load<kWide>(
              first, begin, [&](int i) { return own.slots[i]; },
              [&](int i, int column) { return factor_at(i, column) != 0; });
        }
#pragma unroll
        for (int i = 0; i < kMany; ++i) {
          if (begin + i >= count_) break;
#pragma unroll
          for (int k = 0; k < kWide; ++k) {
            const float factor = factor_at(begin + i, first + 32 * k);
            if (factor == 0) continue;  // what was loaded may be anything
            sum[k].x = __fmaf_rn(factor, loaded_[i * kWide + k].x, sum[k].x);
            sum[k].y = __fmaf_rn(factor, loaded_[i * kWide + k].y, sum[k].y);
            sum[k].z = __fmaf_rn(factor, loaded_[i * kWide + k].z, sum[k].z);
            sum[k].w = __fmaf_rn(factor, loaded_[i * kWide + k].w, sum[k].w);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kWide; ++k) {
        if (row_of(first + 32 * k) >= 0) sums[first + 32 * k] = sum[k];
      }
    }
  }

 private:
  __device__ static int warp() {
    return int(threadIdx.x) / 32;
  }
  __device__ static int lane() {
    return int(threadIdx.x) % 32;
  }

  // The row that has a column, -1: none.
  __device__ int row_of(int column) const {
    return column < work_.columns ? int((uint32_t(column) * work_.row_of_column) >> 20) : -1;
  }

  // Of the warp's partial results from the `begin`-th on.
  template <int kWide, class SlotOf, class IsWanted>
  __device__ __forceinline__ void load(int first, int begin, SlotOf &&slot_of, IsWanted &&is_wanted) {
#pragma unroll
    for (int i = 0; i < kLoads / kWide; ++i) {
      if (begin + i >= count_) break;  // by the whole warp
      const uint8_t *from = outputs_ + slot_of(begin + i) * call_.slot_bytes;
#pragma unroll
      for (int k = 0; k < kWide; ++k) {
        const int column = first + 32 * k;
        if (column < work_.columns && is_wanted(begin + i, column))
          loaded_[i * kWide + k] = reinterpret_cast<const float4 *>(from)[column];
      }
    }
  }

  const AttentionCall &call_;
  const FinishWork &work_;
  const uint8_t *const outputs_;
  const int count_;  // of the warp's
  float4 loaded_[kLoads];
};

// ---- keys that are read raw

// One value a row, next to each other so that a thread reads them at once.
template <int kRows>
struct alignas(kRows % 4 == 0 ? 16 : 4) PerRow {
  float of[kRows];
};

template <int kRows>
struct RawShared {
  uint64_t copied;  // a barrier
  KeyRange keys[kRows];
  int32_t positions[kRows];
  State states[kRows];
  float corrections[kRows];
  PerRow<kRows> weights[kMostRawTokens];  // a chunk's scores, then weights
  uint8_t type[kMostRawTokens];  // of its keys and values, kUnseen where they are not read raw or no row sees them
};

constexpr uint8_t kUnseen = 255;

// Keys that may be raw: `count` in two ranges.
struct RawKeys {
  int32_t low = 0, other_low = 0, split = 0, count = 0;
  __device__ int32_t key(int32_t i) const { return i < split ? low + i : other_low + (i - split); }
};

// Of the exact pages, or of the call's own tokens; `seen` are the keys that rows of the block see.
__device__ RawKeys find_raw_keys(const AttentionCall &call, const Sequence &sequence, KeyRange seen, bool own) {
  if (own) {
    const int32_t low = max(seen.low, sequence.coded_length);
    const bool elsewhere = call.k_new.data == nullptr || reads_new(call);
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

// Bytes of an element of a chunk.
TQKV_HOST_DEVICE int element_bytes(const AttentionCall &call) {
  return call.k_new.data != nullptr && (call.k_new.type == TQ_TYPE_F32 || call.v_new.type == TQ_TYPE_F32) ? 4 : 2;
}

// Softmax and outputs of keys that are read raw, for all rows of a block. A chunk of keys and values is copied to shared
// memory, a token a thread; then a warp takes every eighth token, and a lane has kWide of its channels.
template <int kRows, int kWide>
class RawPart {
 public:
  // `staging`: for a chunk; `sums`: as many floats as every warp's outputs are; `outputs`: [kRows, head_dim_v].
  __device__ RawPart(const AttentionCall &call, const BlockRows &rows, RawShared<kRows> &shared, int chunk_tokens,
                     uint8_t *staging, float *sums, float *outputs)
      : call_(call),
        rows_(rows),
        shared_(shared),
        chunk_tokens_(chunk_tokens),
        row_bytes_(element_bytes(call) * (call.head_dim_k + call.head_dim_v)),
        staging_(staging),
        sums_(sums),
        outputs_(outputs) {}

  // Leaves states and outputs; by the block.
  __device__ void run() {
    const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32, n = call_.head_dim_v;
    if (thread == 0) barrier_init(&shared_.copied, unsigned(kRawThreads));
    barrier_init_fence();
    if (thread < kRows) {
      KeyRange keys{0, 0};
      shared_.positions[thread] = 0;
      if (rows_.has(call_, thread)) {
        shared_.positions[thread] = position(call_, rows_.sequence, rows_.token(call_, thread));
        keys = visible_keys(call_, rows_.sequence, shared_.positions[thread]);
      }
      shared_.keys[thread] = keys;
      shared_.states[thread] = {minus_infinity(), 0};
    }
    __syncthreads();
    KeyRange seen{INT32_MAX, 0};
    for (int r = 0; r < kRows; ++r) {
      const KeyRange keys = shared_.keys[r];
      if (keys.low < keys.high) seen = {min(seen.low, keys.low), max(seen.high, keys.high)};
    }
    RawKeys exact, mine;
    if (seen.low < seen.high) {
      exact = find_raw_keys(call_, rows_.sequence, seen, false);
      mine = find_raw_keys(call_, rows_.sequence, seen, true);
    }
    float sums[kRows][kWide] = {};
    uint32_t parity = 0;
    const int64_t count = int64_t{exact.count} + mine.count;
#pragma unroll 1
    for (int64_t chunk = 0; chunk < count; chunk += chunk_tokens_, parity ^= 1) {
      const int tokens = int(min(int64_t{chunk_tokens_}, count - chunk));
      const auto key_of = [&](int t) {
        const int64_t i = chunk + t;
        return i < exact.count ? exact.key(int32_t(i)) : mine.key(int32_t(i - exact.count));
      };
      const bool own = chunk + thread >= exact.count;
      if (thread < tokens) {
        copy(thread, key_of(thread), own);
      } else {
        barrier_arrive(&shared_.copied);
      }
      if (chunk == 0) load_queries();
      __syncthreads();
      score(tokens, warp, lane, parity);
      __syncthreads();
      if (warp < kRows) softmax(warp, lane, tokens, key_of);
      __syncthreads();
      add_values(tokens, warp, lane, sums);
      __syncthreads();
    }
    if (kWide * lane < n) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kWide; ++i) sums_[(warp * kRows + r) * n + kWide * lane + i] = sums[r][i];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int c = thread; c < kRows * n; c += kRawThreads) {
      float sum = 0;
      for (int w = 0; w < kFinishWarps; ++w) sum += sums_[w * kRows * n + c];
      outputs_[c] = sum;
    }
    __syncthreads();
  }

 private:
  __device__ bool sees(int r, int32_t j) const {
    return shared_.keys[r].low <= j && j < shared_.keys[r].high;
  }

  // Where the chunk's token is; `value_of`: its value.
  __device__ uint8_t *staged(int t) const {
    return staging_ + t * row_bytes_;
  }
  __device__ uint8_t *value_of(uint8_t *token) const {
    return token + element_bytes(call_) * call_.head_dim_k;
  }

  // Begins to copy a token, if a row sees it; by its thread.
  __device__ void copy(int t, int32_t j, bool own) {
    bool seen = false;
    for (int r = 0; r < kRows; ++r) seen = seen || sees(r, j);
    RawToken from;
    if (seen) from = find_raw_token(call_, rows_.sequence, rows_.kv_head, j, own);
    if (from.value == nullptr) {
      shared_.type[t] = kUnseen;
      barrier_arrive(&shared_.copied);
      return;
    }
    const int k_type = own ? call_.k_new.type : call_.raw_type, v_type = own ? call_.v_new.type : call_.raw_type;
    shared_.type[t] = uint8_t(k_type | v_type << 4);
    uint8_t *to = staged(t);
    const uint32_t k_bytes = uint32_t((k_type == TQ_TYPE_F32 ? 4 : 2) * call_.head_dim_k);
    const uint32_t v_bytes = uint32_t((v_type == TQ_TYPE_F32 ? 4 : 2) * call_.head_dim_v);
    if (!own || (call_.k_new.aligned != 0 && call_.v_new.aligned != 0)) {
      barrier_arrive_expect(&shared_.copied, k_bytes + v_bytes);
      bulk_copy(to, from.key, k_bytes, &shared_.copied);
      bulk_copy(value_of(to), from.value, v_bytes, &shared_.copied);
      return;
    }
    copy_halves(to, from.key, k_bytes);
    copy_halves(value_of(to), from.value, v_bytes);
    bulk_copy_fence();
    barrier_arrive(&shared_.copied);
  }

  __device__ static void copy_halves(uint8_t *to, const void *from, uint32_t bytes) {
#pragma unroll 1
    for (uint32_t i = 0; i < bytes / 2; ++i) {
      reinterpret_cast<uint16_t *>(to)[i] = static_cast<const uint16_t *>(from)[i];
    }
  }

  // The lane's channels of a row of n.
  __device__ __forceinline__ static void load(const uint8_t *row, int type, int lane, int n, float (&x)[kWide]) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) x[i] = 0;
    if (kWide * lane >= n) return;
    if (type == TQ_TYPE_F32) {
      const auto four = reinterpret_cast<const Neighbours<float, kWide> *>(row)[lane];
#pragma unroll
      for (int i = 0; i < kWide; ++i) x[i] = four.of[i];
    } else {
      const auto words = reinterpret_cast<const Neighbours<uint32_t, kWide / 2> *>(row)[lane];
#pragma unroll
      for (int i = 0; i < kWide; i += 2) {
        const uint32_t word = words.of[i / 2];
        f32_pair_from_f16(word, x[i], x[i + 1]);
        if (type != TQ_TYPE_F16) x[i] = __uint_as_float(word << 16), x[i + 1] = __uint_as_float(word & 0xffff0000);
      }
    }
  }

  // Queries times the scale to shared memory, where sums will be: short code.
  __device__ void load_queries() {
    const int n = call_.head_dim_k;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kRows * n; i += kRawThreads) {
      const int r = int(uint32_t(i) / uint32_t(n)), c = i - r * n;
      float query = 0;
      if (rows_.has(call_, r)) {
        const int64_t token = rows_.sequence.begin + rows_.token(call_, r);
        const int head = rows_.kv_head * call_.group + rows_.head_in_group(call_, r);
        query =
            load_element(call_.q.data, call_.q.type, token * call_.q.token_stride + head * call_.q.head_stride + c) *
            call_.scale;
      }
      sums_[i] = query;
    }
  }

  // Scores of the chunk's tokens, when it is copied; by all warps.
  __device__ void score(int tokens, int warp, int lane, uint32_t parity) {
    float query[kRows][kWide] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (kWide * lane >= call_.head_dim_k) continue;
      const auto own = reinterpret_cast<const Neighbours<float, kWide> *>(sums_ + r * call_.head_dim_k)[lane];
#pragma unroll
      for (int i = 0; i < kWide; ++i) query[r][i] = own.of[i];
    }
    barrier_wait(&shared_.copied, parity);
#pragma unroll 2
    for (int t = warp; t < tokens; t += kFinishWarps) {
      const uint8_t type = shared_.type[t];
      if (type == kUnseen) continue;
      float key[kWide], sums[kRows];
      load(staged(t), type & 15, lane, call_.head_dim_k, key);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums[r] = 0;
#pragma unroll
        for (int i = 0; i < kWide; ++i) sums[r] = __fmaf_rn(key[i], query[r][i], sums[r]);
      }
      const float sum = sums_of_rows(sums, lane);
      if (lane % (32 / kRows) == 0) shared_.weights[t].of[lane / (32 / kRows)] = sum;
    }
  }

  // Sums over all lanes; a lane gets the one of row lane / (32 / kRows).
  __device__ __forceinline__ static float sums_of_rows(float (&sums)[kRows], int lane) {
    int rows = kRows;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      if (rows == 1) {
        sums[0] += __shfl_xor_sync(kAll, sums[0], step);
        continue;
      }
      rows /= 2;
      const bool upper = (lane & step) != 0;
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const float mine = upper ? sums[r + rows] : sums[r], other = upper ? sums[r] : sums[r + rows];
        sums[r] = mine + __shfl_xor_sync(kAll, other, step);
      }
    }
    return sums[0];
  }

  // Of row r: scores of the chunk become weights, and the state takes them in.
  template <class KeyOf>
  __device__ void softmax(int r, int lane, int tokens, KeyOf &&key_of) {
    const int head = rows_.kv_head * call_.group + rows_.head_in_group(call_, r);
    const bool exists = shared_.keys[r].low < shared_.keys[r].high;
    const float slope = exists && call_.alibi_slopes != nullptr ? call_.alibi_slopes[head] : 0.0f;
    const State before = shared_.states[r];
    float max = before.max, sum = 0;
    unsigned seen = 0;  // bit i: the row sees token lane + 32 i
#pragma unroll 1
    for (int t = lane; t < tokens; t += 32) {
      if (shared_.type[t] == kUnseen) continue;
      const int32_t j = key_of(t);
      if (!sees(r, j)) continue;
      seen |= 1u << t / 32;
      float score = shared_.weights[t].of[r];
      if (call_.soft_cap > 0) score = call_.soft_cap * tanhf(score / call_.soft_cap);
      score = __fmaf_rn(slope, float(int64_t{j} - shared_.positions[r]), score) * kLog2E;
      shared_.weights[t].of[r] = score;
      max = fmaxf(max, score);
    }
    max = warp_max(max);
#pragma unroll 1
    for (int t = lane; t < tokens; t += 32) {
      const float weight = (seen >> t / 32 & 1) != 0 ? exp2f(shared_.weights[t].of[r] - max) : 0.0f;
      shared_.weights[t].of[r] = weight;
      sum += weight;
    }
    sum = warp_sum(sum);
    __syncwarp();  // all lanes have read the state
    if (lane != 0) return;
    const float correction = before.max == max ? 1.0f : exp2f(before.max - max);
    shared_.corrections[r] = correction;
    shared_.states[r] = {max, before.sum * correction + sum};
  }

  __device__ void add_values(int tokens, int warp, int lane, float (&sums)[kRows][kWide]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float correction = shared_.corrections[r];
#pragma unroll
      for (int i = 0; i < kWide; ++i) sums[r][i] *= correction;
    }
#pragma unroll 2
    for (int t = warp; t < tokens; t += kFinishWarps) {
      const uint8_t type = shared_.type[t];
      if (type == kUnseen) continue;
      float value[kWide];
      load(value_of(staged(t)), type >> 4, lane, call_.head_dim_v, value);
      const PerRow<kRows> weight = shared_.weights[t];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (weight.of[r] == 0) continue;  // a row has no weight for what it does not see, which may be NaN
#pragma unroll
        for (int i = 0; i < kWide; ++i) sums[r][i] = __fmaf_rn(weight.of[r], value[i], sums[r][i]);
      }
    }
  }

  const AttentionCall &call_;
  const BlockRows &rows_;
  RawShared<kRows> &shared_;
  const int chunk_tokens_, row_bytes_;
  uint8_t *const staging_;
  float *const sums_, *const outputs_;
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

// A row's sums, `stride` floats apart, of as many warps as have parts; row r of the block's.
struct RowSums {
  const float *sums;
  int stride, count, r;
  const WarpPart *parts;
  __device__ float correction(int part) const { return parts[part].correction[r]; }
};

// What is left of a row, of which a lane has these sums: 32 * kPerLane channels. `raw_out` may be null.
template <int kPerLane>
__device__ __forceinline__ void write_channels(const AttentionCall &call, const SideParams &v, const Output &output,
                                               int64_t row, int64_t at, int lane, Gains gains, float (&x)[kPerLane],
                                               const float *raw_out) {
  using Own = Neighbours<float, kPerLane>;
  const int first = kPerLane * lane;
  float raw[kPerLane] = {};
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

// The same of the sums of as many warps as have parts.
template <int kPerLane>
__device__ __forceinline__ void write_row(const AttentionCall &call, const SideParams &v, const Output &output,
                                          int64_t row, int64_t at, int lane, Gains gains, const RowSums &sums,
                                          const float *raw_out) {
  using Own = Neighbours<float, kPerLane>;
  float x[kPerLane] = {};
#pragma unroll
  for (int part = 0; part < kFinishWarps; ++part) {
    if (part >= sums.count) break;
    const Own own = *reinterpret_cast<const Own *>(sums.sums + part * sums.stride + kPerLane * lane);
    const float correction = sums.correction(part);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = __fmaf_rn(own.of[i], correction, x[i]);
  }
  write_channels(call, v, output, row, at, lane, gains, x, raw_out);
}

// Of any head_dim, in `scratch`: twice its floats, the second `stride` after the first. They may be the first warps' sums.
__device__ void write_any_row(const AttentionCall &call, const SideParams &v, const Output &output, int64_t row,
                              int64_t at, int lane, Gains gains, const RowSums &sums, float *scratch,
                              const float *raw_out) {
  const int n = call.head_dim_v;
#pragma unroll 1
  for (int c = lane; c < n; c += 32) {
    float sum = 0;
#pragma unroll 1
    for (int part = 0; part < sums.count; ++part) {
      sum = __fmaf_rn(sums.sums[part * sums.stride + c], sums.correction(part), sum);
    }
    scratch[c] = sum;
  }
  __syncwarp();
  if (output.merged == nullptr) {
    gains.coded *= decode_gain(v);
    rotate_back(v, lane, scratch, scratch + sums.stride);
  }
#pragma unroll 1
  for (int c = lane; c < n; c += 32) {
    const float coded_value = scratch[c] * gains.coded;
    const float raw_value = raw_out != nullptr ? raw_out[c] * gains.raw : 0.0f;
    if (output.merged == nullptr) {
      store_element(call.out.data, call.out.type, at + c, coded_value + raw_value);
    } else {
      output.merged[row * n + c] = coded_value;
      output.raw[row * n + c] = raw_value;
    }
  }
}

// The sums of row r of few partial results that all have tiles, and their state: by a warp, without shared memory, because
// code that is run once costs more than what it does. kLoads: at a time.
template <int kLoads, int kPerLane>
__device__ __forceinline__ State add_few(const AttentionCall &call, const BlockRows &rows, const Partials &partials,
                                         int r, int lane, float (&x)[kPerLane]) {
  using Own = Neighbours<float, kPerLane>;
  const int row = rows.head_in_pack * segment_rows(call) + rows.first_row + r;
  const uint8_t *states = call.partials + partials.first_slot * call.slot_bytes + row * int(sizeof(State));
  const uint8_t *outputs = call.partials + partials.first_slot * call.slot_bytes +
                           partial_outputs(call.pack_heads, segment_rows(call)) +
                           (row * 32 + lane) * int64_t{sizeof(Own)};
  Own own[kLoads];
  const auto load = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (begin + i >= partials.count) break;
      own[i] = *reinterpret_cast<const Own *>(outputs + (begin + i) * call.slot_bytes);
    }
  };
  load(0);
  State state{minus_infinity(), 0};
  if (lane < partials.count) state = *reinterpret_cast<const State *>(states + lane * call.slot_bytes);
  float factor;
  const State all = join_lanes(state, factor);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = 0;
  for (int begin = 0;;) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (begin + i >= partials.count) break;
      const float part_factor = __shfl_sync(kAll, factor, begin + i);
      if (part_factor == 0) continue;  // what was loaded may be anything
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) x[k] = __fmaf_rn(part_factor, own[i].of[k], x[k]);
    }
    begin += kLoads;
    if (kLoads >= kFewParts || begin >= partials.count) return all;
    load(begin);
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

// kRawRows: at least the rows of a block, or 0 where nothing is read raw here. kFew: of few parts of a segment so many are
// loaded at a time; 0: no segment has few; kFewLoads: blocks of kFewWarps, for kFewChannels and without parts of k_new.
template <int kRawRows, int kFew>
__device__ __forceinline__ void finish_rows(const AttentionCall &call, const SideParams &v, const Output &output,
                                            const FinishWork &work) {
  __shared__ WarpPart parts[kFinishWarps];
  __shared__ uint32_t touched[kFinishWarps];
  touch_parameter<kRawRows == 0 ? kFewWarps : kFinishWarps>(call, touched);
  // What comes before the wait is written by "prepare", whose end "attention" has waited for.
  BlockRows rows;
  if (!find_rows<(kRawRows > 0)>(call, int(blockIdx.z) * work.rows, &rows)) return;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, n = call.head_dim_v;
  const int32_t s = rows.segment.sequence;
  constexpr bool kSmall = kFew == kFewLoads;
  // Read where it is used, because registers are few.
  const auto per_lane = [&] { return kSmall ? kFewChannels : work.per_lane; };
  bool of_new = !kSmall && reads_new(call);  // k_new first, if "attention" read it
  Partials partials(call, rows, of_new);
  // Faults that "attention" finds are seen after the wait; before, some threads may see them.
  const auto is_good = [&] {
    return rows.sequence.state == kGood && *const_cast<const volatile int32_t *>(&call.sequence_faults[s]) == 0;
  };
  auto *memory = static_cast<uint8_t *>(dynamic_shared());
  float *sums = reinterpret_cast<float *>(memory + work.sums), *added = reinterpret_cast<float *>(memory + work.added);
  [[maybe_unused]] float *raw_outputs = nullptr;
  [[maybe_unused]] const State *raw_states = nullptr;
  if constexpr (kRawRows > 0) {
    __shared__ RawShared<kRawRows> shared;
    __shared__ bool usable;
    raw_outputs = reinterpret_cast<float *>(memory + work.raw);
    raw_states = shared.states;
    if (threadIdx.x == 0) usable = is_good();
    __syncthreads();
    if (usable) {
      uint8_t *chunk = memory + work.chunk;
      if (call.head_dim_k <= 128 && n <= 128) {
        RawPart<kRawRows, 4>(call, rows, shared, work.chunk_tokens, chunk, sums, raw_outputs).run();
      } else {
        RawPart<kRawRows, 8>(call, rows, shared, work.chunk_tokens, chunk, sums, raw_outputs).run();
      }
    }
  }
  if (call.counts_parts != 0 && partials.all_have_tiles) {
    // All blocks of "attention" are running or done, so these come; other sequences' are not waited for.
    if (threadIdx.x == 0) {
      const uint32_t *parts_done = &call.part_counts[rows.first_segment * call.pack_heads + rows.head_in_pack];
      while (load_acquired(parts_done) < uint32_t(partials.count)) continue;
    }
    __syncthreads();
  } else {
    grid_dependency_wait();
  }
  const int32_t fault = *const_cast<const volatile int32_t *>(&call.sequence_faults[s]);  // looked at last
  const uint8_t *outputs =
      call.partials + partial_outputs(call.pack_heads, segment_rows(call)) +
      int64_t{rows.head_in_pack * segment_rows(call) + rows.first_row} * n * int64_t{sizeof(float)};
  constexpr State kNone{-INFINITY, 0};
  State coded = kNone, raw = kNone, own = kNone;
  int count = 0;  // of warps that have parts
  const bool few =
      kFew > 0 && per_lane() == kFewChannels && !of_new && partials.all_have_tiles && partials.count <= kFewParts;
  float few_sums[kFewChannels];
  if constexpr (kFew > 0) {
    if (few && warp < work.rows) coded = add_few<kFew>(call, rows, partials, warp, lane, few_sums);
  }
#pragma unroll 1
  while (!few) {
    count = min(partials.count, 1 << work.log2_warps);
    const int most = 1 << (work.log2_lanes + work.log2_warps);  // that are taken together
#pragma unroll 1
    for (int base = 0; base < partials.count; base += most) {
      __syncwarp();  // all lanes have used the chunk before
      const LaneState loaded = load_state(call, rows, partials, work, base);
      // As many loads as registers allow.
      Outputs<(kSmall ? 4 : kRawRows == 0 ? 12 : 8)> chunk(call, work, outputs, min(partials.count - base, most));
      const bool early = partials.all_have_tiles, narrow = work.columns <= 32;  // narrow: one row, mostly
      if (early && narrow) chunk.template load_first<1>(partials.first_slot + base);
      if (early && !narrow) chunk.template load_first<4>(partials.first_slot + base);
      take_states(work, loaded, base == 0, parts[warp]);
      float4 *own_sums = reinterpret_cast<float4 *>(sums) + warp * work.columns;
      if (narrow) {
        chunk.template add<1>(parts[warp], early, base == 0, own_sums);
      } else {
        chunk.template add<4>(parts[warp], early, base == 0, own_sums);
      }
    }
    __syncthreads();
    if (warp < work.rows) coded = join_states(parts, count, warp);
    if (!of_new) break;
    own = coded;
    for (int c = lane; c < n && warp < work.rows; c += 32) {
      float sum = 0;
      for (int part = 0; part < count; ++part) {
        sum = __fmaf_rn(sums[4 * part * work.columns + warp * n + c], parts[part].correction[warp], sum);
      }
      added[warp * n + c] = sum;
    }
    of_new = false;
    partials = Partials(call, rows, false);
    __syncthreads();
  }
  const bool good = rows.sequence.state == kGood && fault == 0;
  if (call.direct != 0 && !good && call.faults != nullptr && threadIdx.x == 0) {
    const int others = rows.kv_head + rows.first_head + rows.first_token + rows.first_row;
    if (others == 0) count_fault(call.faults, rows.sequence.state != kGood ? TQ_FAULT_LENGTH : TQ_FAULT_BLOCK, s);
  }
  if (warp >= work.rows || !rows.has(call, warp)) return;
  const float *raw_out = nullptr;
  if constexpr (kRawRows > 0) {
    if (good) raw = raw_states[warp], raw_out = raw_outputs + warp * n;
  }
  if (good && has_keys(own)) {
    add_raw(raw, raw_out, own, added + warp * n, n, lane);
    raw_out = added + warp * n;
  }
  if (!good) coded = kNone;
  const int head = rows.kv_head * call.group + rows.head_in_group(call, warp);
  sums += warp * n;
  const RowSums row_sums{sums, 4 * work.columns, good ? count : 0, warp, parts};
#pragma unroll 1
  do {
    const int64_t token = rows.sequence.begin + rows.token(call, warp), index = token * call.q_heads + head;
    const int64_t at = token * call.out.token_stride + head * call.out.head_stride;
    const Gains gains = finish_softmax(call, index, head, lane, coded, raw);
    if (few) {
      if (!good) {
#pragma unroll
        for (float &sum : few_sums) sum = 0;
      }
      write_channels(call, v, output, index, at, lane, gains, few_sums, raw_out);
    } else if (per_lane() == 4) {
      write_row<4>(call, v, output, index, at, lane, gains, row_sums, raw_out);
    } else if (per_lane() == 2) {
      write_row<2>(call, v, output, index, at, lane, gains, row_sums, raw_out);
    } else if (per_lane() == 8) {
      write_row<8>(call, v, output, index, at, lane, gains, row_sums, raw_out);
    } else {
      write_any_row(call, v, output, index, at, lane, gains, row_sums, sums, raw_out);
    }
  } while (rows.next(call, warp));
}

template <int kRawRows, int kFew>
__global__ void __launch_bounds__(kRawThreads, kRawRows == kMaxRows ? 1
                                               : kFew == kFewLoads  ? 3
                                                                    : 2)
    attention_finish_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ SideParams v,
                            const __grid_constant__ Output output, const __grid_constant__ FinishWork work) {
  grid_dependency_launch();
  finish_rows<kRawRows, kFew>(call, v, output, work);
  grid_dependency_wait();  // so that what waits for this kernel waits for "attention", too
  count_sequence_faults(call);
}

__global__ void __launch_bounds__(32 * kMaxRows)
    attention_write_kernel(const __grid_constant__ AttentionCall call, float gain, const float *rotated_back,
                           const float *raw) {
  BlockRows rows;
  if (!find_rows<false>(call, 0, &rows)) return;
  const int lane = int(threadIdx.x) % 32, n = call.head_dim_v;
  for (int r = int(threadIdx.x) / 32; r < segment_rows(call); r += int(blockDim.x) / 32) {
    BlockRows own = rows;
    if (!own.has(call, r)) continue;
    do {
      const int head = own.kv_head * call.group + own.head_in_group(call, r);
      const int64_t token = own.sequence.begin + own.token(call, r), row = token * call.q_heads + head;
      const int64_t at = token * call.out.token_stride + head * call.out.head_stride;
      for (int c = lane; c < n; c += 32) {
        store_element(call.out.data, call.out.type, at + c, rotated_back[row * n + c] * gain + raw[row * n + c]);
      }
    } while (own.next(call, r));
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

// `rows`, `warps`: of a block; `raw_tokens`: that are read raw at most, 0 where nothing is.
FinishWork divide_work(int head_dim_k, int head_dim_v, int element_bytes, int64_t raw_tokens, int raw_rows, int rows,
                       int warps, bool with_new) {
  size_t at = 0;
  const auto take = [&](size_t bytes) { return uint32_t(std::exchange(at, at + align16(bytes))); };
  FinishWork work{};
  const int token_bytes = element_bytes * (head_dim_k + head_dim_v);
  if (raw_tokens > 0) {
    work.chunk_tokens = int32_t(std::min<int64_t>({raw_tokens, kMostRawTokens, kMostRawBytes / token_bytes}));
    work.chunk = take(size_t(work.chunk_tokens * token_bytes));
    work.raw = take(sizeof(float) * size_t(raw_rows * head_dim_v));
  }
  // First the queries of what is read raw, then sums.
  work.sums =
      take(sizeof(float) * size_t(std::max(warps * std::max(rows, raw_rows) * head_dim_v, raw_rows * head_dim_k)));
  work.added = take(sizeof(float) * size_t(with_new ? rows * head_dim_v : 0));
  work.bytes = uint32_t(at);
  work.rows = rows;
  work.log2_warps = std::countr_zero(unsigned(warps));
  work.columns = rows * head_dim_v / 4;
  work.row_of_column = (1u << 20) / uint32_t(head_dim_v / 4) + 1;
  return work;
}

template <int kRawRows, int kFew = 0>
int launch_finish_kernel(const AttentionCall &call, const SideParams &v, const Output &output, void *stream) {
  const int rows = call.block_tokens * call.block_heads;
  int block_rows = rows < kMaxRows ? rows : kMaxRows;
  dim3 grid = grid_of(call);
  // A block a row where there are multiprocessors enough; what is read raw is shared by rows.
  if (kRawRows == 0 && int64_t{grid.x} * grid.y * rows <= 2 * call.blocks) block_rows = 1;
  grid.z = unsigned((rows + block_rows - 1) / block_rows);
  int64_t raw_tokens = 0;
  if (kRawRows > 0) {
    if (call.exact.base != nullptr)
      raw_tokens += std::min(call.exact_first, int64_t{INT32_MAX}) + std::min(call.exact_recent, int64_t{INT32_MAX});
    if (call.k_new.data != nullptr) raw_tokens += call.max_q_len;
    raw_tokens = std::max<int64_t>(raw_tokens, 1);
  }
  // With a fixed split always the same, because the number of warps decides about the bits of sums, too.
  const bool many = kRawRows == 0 && call.split_tiles == 0 && block_rows <= kFewWarps &&
                    int64_t{grid.x} * grid.y * grid.z > 2 * call.blocks;
  const int warps = many ? kFewWarps : kFinishWarps;
  FinishWork work = divide_work(call.head_dim_k, call.head_dim_v, element_bytes(call), raw_tokens, kRawRows, block_rows,
                                warps, reads_new(call));
  // With a fixed split of the segment's rows, because what is taken together decides about the bits of sums.
  const int lane_rows = call.split_tiles == 0 ? block_rows : std::min(rows, kMaxRows);
  for (work.log2_lanes = 5; lane_rows << work.log2_lanes > 32;) --work.log2_lanes;
  work.per_lane = channels_per_lane(v);
  auto kernel = attention_finish_kernel<kRawRows, kFew>;
  if constexpr (kFew > 0) {
    const bool is_small = many && work.per_lane == kFewChannels && !reads_new(call);
    if (is_small) kernel = attention_finish_kernel<kRawRows, kFewLoads>;
  }
  return launch_dependent(kernel, grid, unsigned(32 * warps), work.bytes, stream, call, v, output, work);
}

template <int kRawRows, int kFew = 0>
int load_finish_kernel() {
  constexpr int kMostDim = 256;  // of attention's kernels
  const int most =
      int(divide_work(kMostDim, kMostDim, 4, kRawRows > 0 ? kMostRawTokens : 0, kRawRows, kMaxRows, kFinishWarps, true)
              .bytes);
  return cudaFuncSetAttribute(attention_finish_kernel<kRawRows, kFew>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              most);
}

}  // namespace

int launch_attention_finish(const AttentionCall &call, const SideParams &v, float *merged, float *raw, void *stream) {
  if (call.num_seqs == 0) return 0;
  const Output output{merged, raw};
  const int rows = call.block_tokens * call.block_heads;
  if (call.exact.base == nullptr && (call.k_new.data == nullptr || reads_new(call))) {
    // Where segments have many parts on average the kernel that does not ask how many is faster.
    if (call.direct == 0 || call.max_segments * kFewParts < call.blocks) {
      return launch_finish_kernel<0>(call, v, output, stream);
    }
    return launch_finish_kernel<0, kFewParts>(call, v, output, stream);
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
  for (const auto load : {load_finish_kernel<0>, load_finish_kernel<0, kFewParts>, load_finish_kernel<0, kFewLoads>,
                          load_finish_kernel<1>, load_finish_kernel<4>, load_finish_kernel<kMaxRows>}) {
    if (const int error = load()) return error;
  }
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, attention_write_kernel);
}

}  // namespace tqkv::cuda
