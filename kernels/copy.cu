// SPDX-License-Identifier: Apache-2.0
// Copies of blocks: reads and writes each byte once, 16 bytes a thread; blocks below a tile token by token.
#include "kernels/device/launch.cuh"
#include "kernels/device/vector.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {
namespace {

constexpr int kCopyThreads = 256;

__device__ void copy_token(const SideShape &side, int64_t codes, int64_t scales, const uint8_t *from, uint8_t *to,
                           int from_row, int to_row) {
  const int lane = int(threadIdx.x);
  const int bytes = record_bytes(side.head_dim, side.bits), first = plane_bytes(side.head_dim, side.bits, 0);
  for (int e = lane; e < bytes; e += kCopyThreads) {
    const int plane = e >= first, start = plane * first, in_plane = plane ? bytes - first : first;
    const bool interleaved = side.is_v && side.bits != kRawBits;
    const auto at = [&](int row) {
      return codes + kTileTokens * start +
             (interleaved ? v_plane_offset(in_plane, e - start, row) : row * in_plane + e - start);
    };
    to[at(to_row)] = from[at(from_row)];
  }
  const int scale = scale_bytes(side);
  if (lane < scale) to[scales + to_row * scale + lane] = from[scales + from_row * scale + lane];
}

// One block a pair and head.
template <bool kHost>
__global__ void __launch_bounds__(kCopyThreads)
    copy_kernel(const __grid_constant__ CopyCall call, const __grid_constant__ HostPairs host, int64_t first_pair) {
  const int64_t index = first_pair + blockIdx.x;
  const int64_t from = kHost ? host.pair[2 * blockIdx.x] : call.pairs[2 * index];
  const int64_t to = kHost ? host.pair[2 * blockIdx.x + 1] : call.pairs[2 * index + 1];
  if (from == -1 && to == -1) return;
  if (from < 0 || from >= call.src_blocks || to < 0 || to >= call.dst_blocks) {
    if (blockIdx.y == 0 && threadIdx.x == 0) count_fault(call.faults, TQ_FAULT_BLOCK, index);
    return;
  }
  for (int head = int(blockIdx.y); head < call.heads; head += int(gridDim.y)) {
    if (call.block_size >= kTileTokens) {
      for (int tile = 0; tile < call.block_size / kTileTokens; ++tile) {
        const auto *a = reinterpret_cast<const uint4 *>(call.src + from * call.src_block_stride +
                                                        tile * call.src_tile_stride + head * call.src_head_stride);
        auto *b = reinterpret_cast<uint4 *>(call.dst + to * call.dst_block_stride + tile * call.dst_tile_stride +
                                            head * call.dst_head_stride);
        for (int64_t i = threadIdx.x; i < call.tile_bytes / 16; i += kCopyThreads) b[i] = a[i];
      }
      continue;
    }
    for (int token = 0; token < call.block_size; ++token) {
      const int64_t a = from * call.block_size + token, b = to * call.block_size + token;
      const uint8_t *source = call.src + a / kTileTokens * call.src_block_stride + head * call.src_head_stride;
      uint8_t *target = call.dst + b / kTileTokens * call.dst_block_stride + head * call.dst_head_stride;
      copy_token(call.k, call.k_codes, call.k_scales, source, target, int(a % kTileTokens), int(b % kTileTokens));
      copy_token(call.v, call.v_codes, call.v_scales, source, target, int(a % kTileTokens), int(b % kTileTokens));
    }
  }
}

}  // namespace

int launch_copy(const CopyCall &call, const HostPairs *host_pairs, int64_t first_pair, int64_t count, void *stream) {
  const dim3 grid(unsigned(count), unsigned(call.heads < 65535 ? call.heads : 65535));
  if (host_pairs != nullptr)
    return launch(copy_kernel<true>, grid, kCopyThreads, 0, stream, call, *host_pairs, first_pair);
  return launch(copy_kernel<false>, grid, kCopyThreads, 0, stream, call, HostPairs{}, first_pair);
}

int load_copy() {
  cudaFuncAttributes attributes;
  if (const int error = cudaFuncGetAttributes(&attributes, copy_kernel<true>)) return error;
  return cudaFuncGetAttributes(&attributes, copy_kernel<false>);
}

}  // namespace tqkv::cuda
