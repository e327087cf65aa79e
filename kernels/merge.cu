// SPDX-License-Identifier: Apache-2.0
// tq_merge_states: reads each state once and writes one; a warp a row, states in order. The output may be the first
// state: a lane reads all states of a channel before it writes that channel.
#include "kernels/device/launch.cuh"
#include "kernels/device/vector.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {
namespace {

constexpr int kMergeThreads = 128;

__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ MergeCall call) {
  const int lane = int(threadIdx.x) % 32;
  constexpr int kWarps = kMergeThreads / 32;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < call.num_rows;
       row += int64_t{gridDim.x} * kWarps) {
    const float minus_infinity = -__int_as_float(0x7f800000);
    float max = minus_infinity;
    for (int i = 0; i < call.num_states; ++i) max = fmaxf(max, call.lse[i * call.num_rows + row]);
    const auto weight = [&](int i) {
      const float lse = call.lse[i * call.num_rows + row];
      return lse == minus_infinity ? 0.0f : expf(lse - max);
    };
    double sum = 0;
    for (int i = 0; i < call.num_states; ++i) sum += double(weight(i));
    const float inverse = sum > 0 ? float(1 / sum) : 0.0f;
    for (int c = lane; c < call.head_dim; c += 32) {
      float out = 0;
      for (int i = 0; i < call.num_states; ++i) {
        const float w = weight(i) * inverse;
        if (w == 0) continue;
        out += w * load_element(call.states, call.type, (i * call.num_rows + row) * call.head_dim + c);
      }
      store_element(call.out, call.type, row * call.head_dim + c, out);
    }
    __syncwarp();  // the new log-sum-exp may lie over the old ones
    if (call.out_lse != nullptr && lane == 0) {
      call.out_lse[row] = sum > 0 ? float(double(max) + log(sum)) : minus_infinity;
    }
  }
}

}  // namespace

int launch_merge(const MergeCall &call, void *stream) {
  constexpr int kWarps = kMergeThreads / 32;
  const int64_t blocks = (call.num_rows + kWarps - 1) / kWarps;
  return launch(merge_kernel, unsigned(blocks < 65536 ? blocks : 65536), kMergeThreads, 0, stream, call);
}

int load_merge() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, merge_kernel);
}

}  // namespace tqkv::cuda
