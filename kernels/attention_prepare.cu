// SPDX-License-Identifier: Apache-2.0
// Before attention: queries become integer operands, a warp a row; one block cuts the work into items; ids of exact
// blocks are checked, a warp a sequence. This takes a few microseconds, most of them to fetch code and data for the
// first time: short code is fast code.
#include <algorithm>

#include "kernels/device/launch.cuh"
#include "kernels/device/rotation.cuh"
#include "kernels/device/sequence.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {
namespace {

constexpr int kPrepareWarps = 8, kPrepareThreads = 32 * kPrepareWarps;
constexpr int kMostQuery = 32639;         // 127 * 256 + 127: both bytes of it and of its negative are signed ones
constexpr int64_t kMostBlocks = 1 << 20;  // rows beyond these are reached by steps of the grid

// ---- the schedule

constexpr int kCached = 512;

// Of the block that makes it.
struct Schedule {
  int64_t sequence_segments[kCached + 1], segment_units[kCached + 1];  // the workspace's, where they are few
  int64_t block_units[kMaxAttentionBlocks + 1];
  int32_t first_slot[kMaxAttentionBlocks], last_slot[kMaxAttentionBlocks];  // of items with tiles
  int64_t sums[2][kPrepareWarps];
  int32_t bad_rows;  // of some sequence, or of one before it
};

// Tiles of a split of [first, end).
__device__ TileRange split_of(const AttentionCall &call, TileRange range, uint32_t split) {
  if (call.split_tiles == 0) return range;
  const int64_t begin = int64_t{split} * call.split_tiles, end = begin + call.split_tiles;
  const int first = int(max(int64_t{range.first}, begin)), last = int(min(int64_t{range.end}, end));
  return first < last ? TileRange{first, last} : TileRange{0, 0};
}

// The sequence that has a segment.
__device__ int32_t sequence_of(const AttentionCall &call, const int64_t *sequence_segments, int32_t segment) {
  int32_t low = 0;
#pragma unroll 1
  for (int32_t count = call.num_seqs; count > 1;) {
    const int32_t half = count / 2;
    if (sequence_segments[low + half] <= segment) low += half;
    count -= half;
  }
  return low;
}

// Which sequences have bad rows, one after the other, because that depends on those before.
__device__ void judge_rows(const AttentionCall &call) {
  int64_t rows_end = 0;
#pragma unroll 1
  for (int32_t s = 0; s < call.num_seqs; ++s) {
    const SequenceRows rows = sequence_rows(call, s);
    const bool bad = bad_rows(call, rows, rows_end);
    if (!bad) rows_end = rows.end;
    call.sequence_states[s] = bad ? kBadRows : kGood;
  }
}

// Segments of each sequence, then units of each segment, and sums of what is before; gives the number of all units.
__device__ int64_t number_units(const AttentionCall &call, Schedule &shared, int64_t *sequence_segments,
                                int64_t *segment_units) {
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const uint32_t splits = uint32_t(call.splits), packs = uint32_t(call.head_packs);
  const uint32_t copies = uint32_t(call.head_parts) * packs;
  bool judged = false;
  int buffer = 0;
  int32_t count = call.num_seqs;
  int64_t total;
#pragma unroll 1
  for (bool of_segments = false;;) {
    total = 0;
#pragma unroll 1
    for (int32_t first = 0; first < count; first += kPrepareThreads) {
      const int32_t i = first + thread;
      int64_t own = 0;
      if (i < count) {
        const int32_t s = of_segments ? sequence_of(call, sequence_segments, i) : i;
        const SequenceRows rows = sequence_rows(call, s);
        // If none is bad by itself each begins where the one before it ends.
        bool bad = bad_rows(call, rows, max(rows.begin, int64_t{0}));
        if (judged && !of_segments) bad = call.sequence_states[s] == kBadRows;
        Sequence sequence;
        if (!bad) sequence = describe_sequence(call, s, rows);
        if (!of_segments) {
          if (bad) atomicMax(&shared.bad_rows, 1);
          call.sequence_states[s] = sequence.state;
          if (call.exact.base == nullptr) call.sequence_faults[s] = 0;
          own = int64_t{token_blocks(call, sequence)} * int32_t(copies * splits);
        } else {
          const uint32_t local = uint32_t(i - int32_t(sequence_segments[s])), group = local / splits;
          const uint32_t block = group / copies, copy = group % copies;
          const int32_t split = int32_t(local % splits);
          const TileRange range = split < call.page_splits
                                      ? split_of(call, tile_range(call, sequence, int32_t(block)), uint32_t(split))
                                      : new_tile_range(call, sequence, int32_t(block));
          call.segments[i] = {
              s, int32_t(block), int32_t(copy / packs), int32_t(copy % packs), range.first, range.end, 0, 0};
          own = units_of(call, range);
        }
      }
      int64_t to_own = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int64_t other = __shfl_up_sync(kAll, to_own, unsigned(step));
        if (lane >= step) to_own += other;
      }
      int64_t *sums = shared.sums[buffer ^= 1];  // by turns, because some warps may still read those of before
      if (lane == 31) sums[warp] = to_own;
      __syncthreads();
      int64_t before = total + to_own - own;
#pragma unroll
      for (int w = 0; w < kPrepareWarps; ++w) {
        if (w < warp) before += sums[w];
        total += sums[w];
      }
      if (i < count) {
        (of_segments ? call.segment_units : call.sequence_segments)[i] = before;
        (of_segments ? segment_units : sequence_segments)[i] = before;
      }
    }
    if (thread == 0) {
      (of_segments ? call.segment_units : call.sequence_segments)[count] = total;
      (of_segments ? segment_units : sequence_segments)[count] = total;
    }
    __syncthreads();
    if (of_segments) return total;
    if (shared.bad_rows != 0 && !judged) {  // once more
      if (thread == 0) judge_rows(call);
      judged = true;
      __syncthreads();
      continue;
    }
    of_segments = true;
    count = int32_t(total);
  }
}

// By the block.
__device__ void write_schedule(const AttentionCall &call, Schedule &shared) {
  const int thread = int(threadIdx.x);
  int64_t *sequence_segments = call.num_seqs <= kCached ? shared.sequence_segments : call.sequence_segments;
  int64_t *segment_units = call.max_segments <= kCached ? shared.segment_units : call.segment_units;
#pragma unroll 1
  for (int b = thread; b < call.blocks; b += kPrepareThreads) {
    shared.first_slot[b] = INT32_MAX;
    shared.last_slot[b] = -1;
  }
  if (thread == 0) shared.bad_rows = 0;
  __syncthreads();
  const int64_t units = number_units(call, shared, sequence_segments, segment_units);
  const bool small = units >> 32 == 0;
  const int64_t quotient = small ? uint32_t(units) / uint32_t(call.blocks) : units / call.blocks;
  const uint32_t rest = uint32_t(units - quotient * call.blocks);
#pragma unroll 1
  for (int b = thread; b <= call.blocks; b += kPrepareThreads) {  // b * units / blocks
    shared.block_units[b] = b * quotient + uint32_t(b) * rest / uint32_t(call.blocks);
  }
  __syncthreads();
  const int32_t segments = int32_t(sequence_segments[call.num_seqs]);
#pragma unroll 1
  for (int32_t slot = thread; slot < segments + call.blocks; slot += kPrepareThreads) {
    // Of the first block b that ends after segment slot - b begins: no other has tiles in this slot.
    int32_t b = max(0, slot - (segments - 1));
#pragma unroll 1
    for (int32_t end = min(slot, call.blocks - 1) + 1; b < end;) {
      const int32_t middle = (b + end) / 2;
      if (segment_units[slot - middle] < shared.block_units[middle + 1]) {
        end = middle;
      } else {
        b = middle + 1;
      }
    }
    if (b > min(slot, call.blocks - 1)) continue;
    const int32_t segment = slot - b;
    const int64_t begin = segment_units[segment], end = segment_units[segment + 1];
    int64_t low = begin, high = end;
    if (call.split_tiles == 0) {
      low = max(low, shared.block_units[b]);
      high = min(high, shared.block_units[b + 1]);
    } else if (begin < shared.block_units[b]) {
      continue;
    }
    AttentionItem *from = call.segments + segment, item{};
    item.sequence = from->sequence;
    item.token_block = from->token_block;
    item.head_part = from->head_part;
    item.head_pack = from->head_pack;
    const int32_t first = max(int32_t(low - begin) - call.item_units, 0);
    item.first_tile = from->first_tile + first;
    item.end_tile = from->first_tile + max(int32_t(high - begin) - call.item_units, first);
    call.items[slot] = item;
    if (item.first_tile == item.end_tile) continue;
    atomicMin(&shared.first_slot[b], slot);
    atomicMax(&shared.last_slot[b], slot);
    if (first == 0) from->first_slot = slot;
    if (high == end) from->end_slot = slot + 1;
  }
  __syncthreads();
#pragma unroll 1
  for (int b = thread; b < call.blocks; b += kPrepareThreads) {
    const int32_t first = shared.first_slot[b], last = shared.last_slot[b];
    call.block_items[b] = last < 0 ? BlockItems{0, 0} : BlockItems{first, last + 1 - first};
  }
}

// Slots of a DIRECT call's segments and what is known of its sequences, by the block.
__device__ void write_direct(const AttentionCall &call, Schedule &shared) {
  const DirectPart part = direct_part(call, reinterpret_cast<uint64_t *>(shared.sums));
  const int thread = int(threadIdx.x), blocks = call.token_blocks, s = thread / blocks;
  if (thread == 0) call.segment_units[0] = int64_t(part.all);
  if (s >= call.num_seqs) return;
  if (thread % blocks == 0) {
    call.sequence_states[s] = part.sequence.state;
    if (call.exact.base == nullptr) call.sequence_faults[s] = 0;
  }
  const int copies = call.head_parts * call.head_packs;
  uint32_t begin = part.begin;
#pragma unroll 1
  for (int copy = 0; copy < copies; ++copy, begin += part.units) {
    const int segment = thread * copies + copy;
    AttentionItem item{s, thread % blocks, copy / call.head_packs, copy % call.head_packs, 0, 0, 0, 0};
    if (part.units > 0) {  // blocks that have units after those of the beginning
      item.first_slot = segment + block_of_unit(call, part.all, begin + uint32_t(call.item_units));
      item.end_slot = segment + block_of_unit(call, part.all, begin + part.units - 1) + 1;
    }
    call.segments[segment] = item;
    if (call.counts_parts == 0) continue;
#pragma unroll 1
    for (int head = 0; head < call.pack_heads; ++head) call.part_counts[segment * call.pack_heads + head] = 0;
  }
}

// ---- ids of exact blocks

// Only with an exact pool.
__device__ void check_sequence(const AttentionCall &call, int64_t s, int lane) {
  // Whether its rows lie before those of another does not matter here: then it has another fault.
  const Sequence sequence = read_sequence(call, s, 0);
  bool bad = false;
  if (sequence.state == kGood && sequence.exact_table != nullptr) bad = has_bad_exact(call, sequence, lane);
  if (lane == 0) call.sequence_faults[s] = bad;
}

// ---- queries

// What a warp needs: of any head_dim, or integers of one that rotates in registers.
struct RowScratch {
  float x[kMaxDim], other[kMaxDim];
};
constexpr int kMostInRegisters = 256;
using RowIntegers = uint16_t[kMostInRegisters];

// Multiplied with the unit of a query's integers: of 2 byte + 1, or of byte / 32 - 3.
double query_gain(const AttentionCall &call, const SideParams &k) {
  const double gain = double(call.scale) * double(kLog2E) * (k.bits == kRawBits ? 1.0 : double(k.decode_gain));
  if (call.wide_rows > 0) return gain;
  return call.k_uniform ? gain / 32 : gain * 2;
}

// A row's integers: Q = y / unit, rounded.
struct Quantizer {
  float unit;  // 0 where all are 0
  float up, inverse;
  bool finite;

  // `largest`: the bits of the largest |y|.
  __device__ explicit Quantizer(uint32_t largest) {
    largest = __reduce_max_sync(kAll, largest);
    finite = largest < 0x7f800000;
    unit = finite ? __uint_as_float(largest) * (1.0f / float(kMostQuery)) : 0.0f;
    up = unit < 0x1p-100f ? 0x1p64f : 1.0f;  // the inverse of what is subnormal may be no number
    inverse = unit == 0 ? 0.0f : reciprocal_approx(unit * up);
  }
  __device__ int32_t operator()(float y) const {
    return min(max(__float2int_rn(y * up * inverse), -kMostQuery), kMostQuery);  // of a NaN 0
  }
};

// Both bytes of an integer, which are signed: the lower one as it is, the upper one of what is left.
__device__ uint32_t bytes_of(int32_t q) {
  return uint32_t((q + 128) & 0xff00) | uint32_t(q & 0xff);
}

// Writes a word of high bytes and one of low bytes.
__device__ void write_words(uint8_t *operand, int word, const uint32_t (&bytes)[4]) {
  const uint32_t first = bytes[0] | bytes[1] << 16, second = bytes[2] | bytes[3] << 16;
  reinterpret_cast<uint2 *>(operand)[word] =
      make_uint2(__byte_perm(first, second, 0x7531), __byte_perm(first, second, 0x6420));
}

__device__ void write_query_row(const AttentionCall &call, int32_t row, int lane, double gain,
                                const Quantizer &quantizer, int32_t sum, float offset) {
  sum = __reduce_add_sync(kAll, sum);
  if (lane != 0) return;
  const int32_t bias = call.k_uniform ? -96 * sum : sum / 2, bias_low = int8_t(bias);
  const float row_gain = quantizer.finite ? float(gain * double(quantizer.unit)) : __int_as_float(0x7fc00000);
  static_assert(sizeof(QueryRow) == sizeof(int4));
  reinterpret_cast<int4 *>(call.query_rows)[row] = make_int4(
      __float_as_int(row_gain), __float_as_int(offset * (call.scale * kLog2E)), (bias - bias_low) / 256, bias_low);
}

// ---- queries of the wide kernels

// Two neighbours as 16-bit numbers, and what is left of them.
__device__ uint32_t take_pair(int type, float (&x)[2]) {
  const uint32_t pair = type == TQ_TYPE_BF16 ? pack_bf16(x[0], x[1]) : pack_f16(x[0], x[1]);
  float taken[2];
  if (type == TQ_TYPE_BF16) {
    taken[0] = __uint_as_float(pair << 16), taken[1] = __uint_as_float(pair & 0xffff0000);
  } else {
    f32_pair_from_f16(pair, taken[0], taken[1]);
  }
  x[0] -= taken[0], x[1] -= taken[1];
  return pair;
}

// A row for f16 is brought to 2^14 .. 2^15 by a power of two, so that both parts keep their bits; bf16 has f32's range.
// With a negative gain the row has the opposite sign.
struct WideRow {
  const AttentionCall &call;
  double gain;
  int exponent;  // what the row is multiplied with is 2^-exponent
  bool finite;

  // `largest`: the bits of the largest |y|.
  __device__ WideRow(const AttentionCall &of, double query_gain, uint32_t largest) : call(of), gain(query_gain) {
    largest = __reduce_max_sync(kAll, largest);
    finite = largest < 0x7f800000;
    const bool moves = call.query_type == TQ_TYPE_F16 && finite && largest != 0;
    exponent = moves ? exponent_of(__uint_as_float(largest)) - 14 : 0;
  }
  __device__ float moved(float y) const {
    y = finite ? times_power_of_two(y, -exponent) : 0.0f;
    return gain < 0 ? -y : y;
  }
  // Channels c and c + 1.
  __device__ void store(int32_t row, int c, float y, float next) const {
    float x[2] = {moved(y), moved(next)};
    const int parts = call.query_parts;
    uint8_t *to = call.query_operands + (int64_t{row} * parts * call.head_dim_k + c) * 2;
#pragma unroll 1
    for (int part = 0; part < parts; ++part, to += 2 * call.head_dim_k) {
      *reinterpret_cast<uint32_t *>(to) = take_pair(call.query_type, x);
    }
  }
  __device__ void store_gain(int32_t row, int lane, float offset) const {
    if (lane != 0) return;
    const double unit = exponent >= 0 ? ldexp_of_one(exponent) : 1.0 / ldexp_of_one(-exponent);
    const float row_gain = finite ? float((gain < 0 ? -gain : gain) * unit) : __int_as_float(0x7fc00000);
    call.query_rows[row] = {row_gain, offset * (call.scale * kLog2E), 0, 0};
  }

 private:
  __device__ static double ldexp_of_one(int n) {  // n below 1000
    double power = 1, base = 2;
    for (; n > 0; n /= 2, base *= base) {
      if (n % 2 != 0) power *= base;
    }
    return power;
  }
};

// Queries of k_new, whose type is theirs: as they are, but for the sign.
__device__ void copy_new_row(const AttentionCall &call, int32_t row, int lane, int64_t at) {
  if (call.new_operands == nullptr) return;
  const uint16_t *from = static_cast<const uint16_t *>(call.q.data) + at;
  uint16_t *to = reinterpret_cast<uint16_t *>(call.new_operands) + int64_t{row} * call.head_dim_k;
  const uint16_t sign = call.scale < 0 ? 0x8000 : 0;
#pragma unroll 1
  for (int c = lane; c < call.head_dim_k; c += 32) to[c] = from[c] ^ sign;
}

// Where a row of queries is.
struct QueryPlace {
  int64_t at;               // in q
  const float *key_offset;  // null: none
  uint8_t *operand;

  __device__ QueryPlace(const AttentionCall &call, int32_t row) {
    const uint32_t token = uint32_t(row) / uint32_t(call.q_heads), head = uint32_t(row) % uint32_t(call.q_heads);
    operand = call.query_operands + row * (2 * int64_t{call.operand_bytes});
    at = token * call.q.token_stride + head * call.q.head_stride;
    key_offset = call.key_offset;
    if (key_offset != nullptr) key_offset += int64_t{head / uint32_t(call.group)} * call.head_dim_k;
  }
};

// A row of 32 * kPerLane channels.
template <int kPerLane>
__device__ __forceinline__ void prepare_row(const AttentionCall &call, const SideParams &k, const QueryOrder &order,
                                            const float *rotated, double gain, int32_t row, int lane,
                                            RowIntegers &integers) {
  const QueryPlace place(call, row);
  const int first = kPerLane * lane;
  constexpr int kWords = 8 * kPerLane;
  using Channels = Neighbours<int16_t, 4>;  // of a word
  Channels channels[(kWords + 31) / 32];
#pragma unroll
  for (int i = 0; i < (kWords + 31) / 32; ++i) {  // before there is something to wait for
    const int word = min(lane + 32 * i, kWords - 1);
    channels[i] = *reinterpret_cast<const Channels *>(order.channel + 4 * word);
  }
  float x[kPerLane], offset = 0;
  if (rotated == nullptr || place.key_offset != nullptr) {
    load_neighbours(call.q.data, call.q.type, call.q.aligned != 0, place.at + first, x);
  }
  if (place.key_offset != nullptr) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) offset = __fmaf_rn(x[i], place.key_offset[first + i], offset);
    offset = warp_sum(offset);
  }
  if (rotated != nullptr) {
    load_neighbours(rotated, TQ_TYPE_F32, true, int64_t{row} * (32 * kPerLane) + first, x);
  } else {
    rotate(k, lane, x);
  }
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffff);
  if (call.wide_rows > 0) {
    const WideRow wide(call, gain, largest);
#pragma unroll
    for (int i = 0; i < kPerLane; i += 2) wide.store(row, first + i, x[i], x[i + 1]);
    wide.store_gain(row, lane, offset);
    copy_new_row(call, row, lane, place.at);
    return;
  }
  const Quantizer quantizer(largest);
  int32_t sum = 0;
  Neighbours<uint16_t, kPerLane> bytes;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int32_t q = quantizer(x[i]);
    sum += q;
    bytes.of[i] = uint16_t(bytes_of(q));
  }
  *reinterpret_cast<Neighbours<uint16_t, kPerLane> *>(integers + first) = bytes;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < (kWords + 31) / 32; ++i) {
    if (lane + 32 * i >= kWords) break;
    uint32_t operand[4];
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
      const int channel = channels[i].of[byte];
      operand[byte] = channel < 0 ? 0 : integers[channel];
    }
    write_words(place.operand, lane + 32 * i, operand);
  }
  write_query_row(call, row, lane, gain, quantizer, sum, offset);
  __syncwarp();
}

// A row of any head_dim.
__device__ void prepare_any_row(const AttentionCall &call, const SideParams &k, const QueryOrder &order,
                                const float *rotated, double gain, int32_t row, int lane, RowScratch &s) {
  const QueryPlace place(call, row);
  const int n = k.head_dim;
  float offset = 0;
#pragma unroll 1
  for (int c = lane; c < n; c += 32) {
    float q = 0;
    if (rotated == nullptr || place.key_offset != nullptr) q = load_element(call.q.data, call.q.type, place.at + c);
    if (place.key_offset != nullptr) offset = __fmaf_rn(q, place.key_offset[c], offset);
    s.x[c] = rotated != nullptr ? rotated[int64_t{row} * n + c] : q;
  }
  __syncwarp();
  if (rotated == nullptr) rotate(k, lane, s.x, s.other);
  if (place.key_offset != nullptr) offset = warp_sum(offset);
  uint32_t largest = 0;
#pragma unroll 1
  for (int c = lane; c < n; c += 32) largest = max(largest, __float_as_uint(s.x[c]) & 0x7fffffff);
  if (call.wide_rows > 0) {
    const WideRow wide(call, gain, largest);
#pragma unroll 1
    for (int c = 2 * lane; c < n; c += 64) wide.store(row, c, s.x[c], s.x[c + 1]);
    wide.store_gain(row, lane, offset);
    copy_new_row(call, row, lane, place.at);
    __syncwarp();
    return;
  }
  const Quantizer quantizer(largest);
  auto *bytes = reinterpret_cast<uint32_t *>(s.other);
  int32_t sum = 0;
#pragma unroll 1
  for (int c = lane; c < n; c += 32) {
    const int32_t q = quantizer(s.x[c]);
    sum += q;
    bytes[c] = bytes_of(q);
  }
  __syncwarp();
#pragma unroll 1
  for (int word = lane; word < call.operand_bytes / 4; word += 32) {
    uint32_t operand[4];
    for (int i = 0; i < 4; ++i) {
      const int channel = order.channel[4 * word + i];
      operand[i] = channel < 0 ? 0 : bytes[channel];
    }
    write_words(place.operand, word, operand);
  }
  write_query_row(call, row, lane, gain, quantizer, sum, offset);
  __syncwarp();
}

// ---- the kernels

constexpr size_t kPrepareBytes = std::max(sizeof(Schedule), kPrepareWarps * sizeof(RowScratch));

// What the kernel is given beside the call.
struct PrepareWork {
  const float *rotated;
  double gain;
  int32_t row_blocks, per_lane;  // per_lane: channels_per_lane()
};

// The first block makes the schedule, so that it starts before the others; the next `row_blocks` take rows, what is left
// sequences.
__global__ void __launch_bounds__(kPrepareThreads)
    attention_prepare_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ SideParams k,
                             const __grid_constant__ QueryOrder order, const __grid_constant__ PrepareWork work) {
  alignas(16) __shared__ uint8_t memory[kPrepareBytes];
  __shared__ uint32_t touched[kPrepareWarps];
  touch_parameter<kPrepareWarps>(call, touched);
  grid_dependency_wait();
  grid_dependency_launch();
  if (blockIdx.x == 0) {
    auto &schedule = *reinterpret_cast<Schedule *>(memory);
    return call.direct != 0 ? write_direct(call, schedule) : write_schedule(call, schedule);
  }
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, block = int(blockIdx.x) - 1;
  if (block >= work.row_blocks) {
    const int sequence_blocks = int(gridDim.x) - 1 - work.row_blocks;
    for (int64_t s = int64_t{block - work.row_blocks} * kPrepareWarps + warp; s < call.num_seqs;
         s += int64_t{sequence_blocks} * kPrepareWarps) {
      check_sequence(call, s, lane);
    }
    return;
  }
  const int32_t rows = call.num_tokens * call.q_heads;
  RowIntegers &integers = reinterpret_cast<RowIntegers *>(memory)[warp];
#pragma unroll 1
  for (int32_t row = block * kPrepareWarps + warp; row < rows; row += work.row_blocks * kPrepareWarps) {
    if (work.per_lane == 4) {
      prepare_row<4>(call, k, order, work.rotated, work.gain, row, lane, integers);
    } else if (work.per_lane == 2) {
      prepare_row<2>(call, k, order, work.rotated, work.gain, row, lane, integers);
    } else if (work.per_lane == 8) {
      prepare_row<8>(call, k, order, work.rotated, work.gain, row, lane, integers);
    } else {
      prepare_any_row(call, k, order, work.rotated, work.gain, row, lane, reinterpret_cast<RowScratch *>(memory)[warp]);
    }
  }
}

__global__ void __launch_bounds__(kPrepareThreads)
    attention_widen_kernel(const __grid_constant__ AttentionCall call, float *rows) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, n = call.head_dim_k;
  const int64_t count = int64_t{call.num_tokens} * call.q_heads;
#pragma unroll 1
  for (int64_t row = int64_t{blockIdx.x} * kPrepareWarps + warp; row < count;
       row += int64_t{gridDim.x} * kPrepareWarps) {
    const int64_t at = row / call.q_heads * call.q.token_stride + row % call.q_heads * call.q.head_stride;
    for (int c = lane; c < n; c += 32) rows[row * n + c] = load_element(call.q.data, call.q.type, at + c);
  }
}

int blocks_of(int64_t warps) {
  const int64_t blocks = (warps + kPrepareWarps - 1) / kPrepareWarps;
  return int(blocks < kMostBlocks ? blocks : kMostBlocks);
}

}  // namespace

int launch_attention_prepare(const AttentionCall &call, const SideParams &k, const QueryOrder &order,
                             const float *rotated, void *stream) {
  if (call.num_seqs == 0) return 0;
  const PrepareWork work{rotated, query_gain(call, k), blocks_of(int64_t{call.num_tokens} * call.q_heads),
                         channels_per_lane(k)};
  const int blocks = 1 + work.row_blocks + (call.exact.base != nullptr ? blocks_of(call.num_seqs) : 0);
  return launch_dependent(attention_prepare_kernel, unsigned(blocks), kPrepareThreads, 0, stream, call, k, order, work);
}

int launch_attention_widen(const AttentionCall &call, float *rows, void *stream) {
  const int blocks = blocks_of(int64_t{call.num_tokens} * call.q_heads);
  if (blocks == 0) return 0;
  return launch(attention_widen_kernel, unsigned(blocks), kPrepareThreads, 0, stream, call, rows);
}

int load_attention_prepare() {
  cudaFuncAttributes attributes;
  for (const void *kernel : {(const void *)attention_prepare_kernel, (const void *)attention_widen_kernel}) {
    if (const int error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  }
  return 0;
}

}  // namespace tqkv::cuda
