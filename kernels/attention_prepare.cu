// SPDX-License-Identifier: Apache-2.0
// Before attention: the first block writes the schedule; queries become integer operands, a warp a row; ids of exact blocks
// are checked, a warp a sequence.
#include "kernels/device/launch.cuh"
#include "kernels/device/rotation.cuh"
#include "kernels/device/schedule.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {
namespace {

constexpr int kPrepareWarps = 4;
constexpr int kMostQuery = 32639;  // 127 * 256 + 127: both bytes of it and of its negative are signed ones
constexpr float kLog2E = 0x1.715476p+0f;
constexpr int64_t kMostBlocks = 1 << 24;  // rows beyond these are reached by steps of the grid

struct PrepareScratch {
  float x[kMaxDim], other[kMaxDim];
};

// Whether a token of the sequence sees a key that is read from this column of the exact table.
__device__ bool sees_exact(const AttentionCall &call, const Sequence &sequence, int64_t column) {
  const int64_t size = call.exact.block_size, column_low = column * size, column_high = column_low + size;
  const int64_t first_end = sequence.start + call.exact_first;
  const int64_t recent_begin = sequence.first_position - call.exact_recent + 1;
  for (int32_t i = 0; i < sequence.q_len; ++i) {
    const KeyRange keys = visible_keys(call, sequence, position(call, sequence, i));
    const int64_t low = max(int64_t{keys.low}, column_low);
    const int64_t high = min(int64_t{min(keys.high, sequence.coded_length)}, column_high);
    if (low < min(high, first_end) || max(low, recent_begin) < high) return true;
  }
  return false;
}

// Whether a needed entry of the exact table is no block; by a warp.
__device__ bool has_bad_exact(const AttentionCall &call, const Sequence &sequence, int lane) {
  const int64_t size = call.exact.block_size;
  const int64_t columns = min(call.exact_columns, (sequence.coded_length + size - 1) / size);
  const int64_t first_columns = min(columns, (sequence.start + call.exact_first + size - 1) / size);
  const int64_t recent_begin = sequence.first_position - call.exact_recent + 1;
  const int64_t recent_column = max(first_columns, recent_begin > 0 ? recent_begin / size : 0);
  bool bad = false;
  const auto check = [&](int64_t low, int64_t high) {
    for (int64_t column = low + lane; column < high && !bad; column += 32) {
      bad = sequence.exact_table[column] >= call.exact.num_blocks && sees_exact(call, sequence, column);
    }
  };
  check(sequence.start / size, first_columns);
  check(recent_column, columns);
  return __any_sync(kAll, bad);
}

__device__ void check_sequence(const AttentionCall &call, int64_t s, int lane) {
  bool bad = false;
  if (call.exact.base != nullptr) {
    // Whether its rows lie before those of another does not matter here: then it has another fault.
    const Sequence sequence = read_sequence(call, s, 0);
    if (sequence.state == kGood && sequence.exact_table != nullptr) bad = has_bad_exact(call, sequence, lane);
  }
  if (lane == 0) call.sequence_faults[s] = bad;
}

// Splits Q, of which s.other has one a channel, into bytes.
__device__ void write_operand(const AttentionCall &call, const QueryOrder &order, int64_t row, int lane,
                              const int32_t *integers) {
  uint2 *words = reinterpret_cast<uint2 *>(call.query_operands + row * 2 * call.operand_bytes);
  for (int word = lane; word < call.operand_bytes / 4; word += 32) {
    uint32_t high = 0, low = 0;
    for (int i = 0; i < 4; ++i) {
      const int channel = order.channel[4 * word + i];
      const int q = channel >= 0 ? integers[channel] : 0;
      const int q_low = int8_t(q);
      low |= uint32_t(uint8_t(q_low)) << (8 * i);
      high |= uint32_t(uint8_t((q - q_low) / 256)) << (8 * i);
    }
    words[word] = make_uint2(high, low);
  }
}

__device__ void prepare_row(const AttentionCall &call, const SideParams &k, const QueryOrder &order,
                            const float *rotated, int64_t row, int lane, PrepareScratch &s) {
  const int n = k.head_dim;
  const int64_t token = row / call.q_heads;
  const int head = int(row % call.q_heads);
  const int64_t at = token * call.q.token_stride + head * call.q.head_stride;
  const float *key_offset = call.key_offset == nullptr ? nullptr : call.key_offset + int64_t{head / call.group} * n;
  double offset = 0;
  for (int c = lane; c < n; c += 32) {
    float q = 0;
    if (rotated == nullptr || key_offset != nullptr) q = load_element(call.q.data, call.q.type, at + c);
    if (key_offset != nullptr) offset += double(q) * double(key_offset[c]);
    s.x[c] = rotated != nullptr ? rotated[row * n + c] : q;
  }
  __syncwarp();
  if (rotated == nullptr) rotate(k, lane, s.x, s.other);
  if (key_offset != nullptr) offset = warp_sum(offset);

  float largest = 0;
  bool finite = true;
  for (int c = lane; c < n; c += 32) {
    finite = finite && isfinite(s.x[c]);
    largest = fmaxf(largest, fabsf(s.x[c]));
  }
  finite = __all_sync(kAll, finite);
  largest = warp_max(largest);
  const float unit = finite ? largest / float(kMostQuery) : 0.0f;  // 0, too, where the largest is next to nothing
  auto *integers = reinterpret_cast<int32_t *>(s.other);
  int32_t sum = 0;
  for (int c = lane; c < n; c += 32) {
    constexpr float kMost = kMostQuery;
    const int32_t q = unit == 0 ? 0 : int32_t(fminf(fmaxf(rintf(s.x[c] / unit), -kMost), kMost));
    integers[c] = q;
    sum += q;
  }
  sum = warp_sum(sum);
  __syncwarp();
  write_operand(call, order, row, lane, integers);
  if (lane == 0) {
    // The sum of Q * level: of 2 byte + 1, or of byte / 32 - 3.
    const double gain = double(call.scale) * double(kLog2E) * double(k.decode_gain) * double(unit);
    const int32_t bias = call.k_uniform ? -96 * sum : sum / 2, bias_low = int8_t(bias);
    QueryRow result;
    result.gain = finite ? float(call.k_uniform ? gain / 32 : gain * 2) : __int_as_float(0x7fc00000);
    result.offset = float(offset * double(call.scale) * double(kLog2E));
    result.bias_high = (bias - bias_low) / 256;
    result.bias_low = bias_low;
    call.query_rows[row] = result;
  }
  __syncwarp();
}

// After the first block `row_blocks` take rows, the others sequences.
__global__ void __launch_bounds__(32 * kPrepareWarps)
    attention_prepare_kernel(const __grid_constant__ AttentionCall call, const __grid_constant__ SideParams k,
                             const __grid_constant__ QueryOrder order, const float *rotated, int row_blocks) {
  __shared__ PrepareScratch scratch[kPrepareWarps];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, block = int(blockIdx.x) - 1;
  grid_dependency_launch();  // the next kernel may come; it waits for this one's end
  if (block < 0) {
    write_schedule(call);
  } else if (block < row_blocks) {
    const int64_t rows = int64_t{call.num_tokens} * call.q_heads;
    for (int64_t row = int64_t{block} * kPrepareWarps + warp; row < rows; row += int64_t{row_blocks} * kPrepareWarps) {
      prepare_row(call, k, order, rotated, row, lane, scratch[warp]);
    }
  } else {
    for (int64_t s = int64_t{block - row_blocks} * kPrepareWarps + warp; s < call.num_seqs;
         s += int64_t{int(gridDim.x) - 1 - row_blocks} * kPrepareWarps) {
      check_sequence(call, s, lane);
    }
  }
}

__global__ void __launch_bounds__(32 * kPrepareWarps)
    attention_widen_kernel(const __grid_constant__ AttentionCall call, float *rows) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, n = call.head_dim_k;
  const int64_t count = int64_t{call.num_tokens} * call.q_heads;
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
  const int row_blocks = blocks_of(int64_t{call.num_tokens} * call.q_heads), sequence_blocks = blocks_of(call.num_seqs);
  return launch(attention_prepare_kernel, unsigned(1 + row_blocks + sequence_blocks), 32 * kPrepareWarps, 0, stream,
                call, k, order, rotated, row_blocks);
}

int launch_attention_widen(const AttentionCall &call, float *rows, void *stream) {
  const int blocks = blocks_of(int64_t{call.num_tokens} * call.q_heads);
  if (blocks == 0) return 0;
  return launch(attention_widen_kernel, unsigned(blocks), 32 * kPrepareWarps, 0, stream, call, rows);
}

int load_attention_prepare() {
  cudaFuncAttributes attributes;
  for (const void *kernel : {(const void *)attention_prepare_kernel, (const void *)attention_widen_kernel}) {
    if (const int error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  }
  return 0;
}

}  // namespace tqkv::cuda
