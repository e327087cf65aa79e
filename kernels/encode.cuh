// SPDX-License-Identifier: Apache-2.0
// Encode and store of one head_dim with one Hadamard round or none: the kernels and the choice among them.
#pragma once

#include "kernels/device/launch.cuh"
#include "kernels/encode_few.cuh"
#include "kernels/encode_rotated.cuh"

namespace tqkv::cuda {

// The warp's next item, whose number is in warp.rest.x; whether there was one. The kernel that calls this keeps nothing in
// registers, of which encode_any() wants all.
template <int kHeadDim>
__device__ __noinline__ bool encode_next(const VectorCall &call) {
  auto &warp = EncodeShared<kHeadDim>::warp();
  const VectorSide &v = call.side[blockIdx.y];
  const uint32_t item = warp.rest.x, group = item / uint32_t(call.heads), head = item % uint32_t(call.heads);
  if (int64_t{group} * kRows >= call.tokens) return false;
  __syncwarp();
  if (lane_index() == 0) warp.rest.x = item + gridDim.x * kEncodeWarps;
  if (v.side.rounds == 1) {
    encode_any<kHeadDim, true>(call, v, group, int(head));
  } else {
    encode_unusual<kHeadDim, false>(call, v, group, int(head));
  }
  __syncwarp();
  return true;
}

// `kAny`: everything, else rows of 16-bit types without offset, all of them with one round or none.
template <int kHeadDim, bool kAny, bool kRotated = false>
__global__ void __launch_bounds__(32 * kEncodeWarps, encode_blocks(kHeadDim))
    encode_kernel(const __grid_constant__ VectorCall call) {
  const VectorSide &v = call.side[blockIdx.y];
  auto &shared = EncodeShared<kHeadDim>::get();
  if constexpr (kAny || kRotated) {
    fill_signs<kHeadDim>(v.side, reinterpret_cast<uint32_t *>(shared.signs));
    fill_operands<kHeadDim>(v.side, kOperandOne, shared.operands);
  }
  fill_table(v.side, shared.table);
  if (threadIdx.x == 0) shared.magnitudes = magnitude_bytes(v.side);
  if constexpr (!kAny) {
    encode_rows<kHeadDim, kRotated>(call, v);
  } else {
    if (lane_index() == 0) EncodeShared<kHeadDim>::warp().rest.x = blockIdx.x + threadIdx.x / 32 * gridDim.x;
    __syncthreads();
    while (encode_next<kHeadDim>(call)) {
    }
  }
}

template <int kHeadDim>
bool takes_encode(const VectorSide &v, bool tiles, const DeviceLimits &limits) {
  const SideParams &side = v.side;
  return side.rounds <= 1 && v.rotated == nullptr && v.rows.aligned != 0 && (tiles || v.flat.alignment >= 4) &&
         side.bits <= 4 && EncodeShared<kHeadDim>::bytes(side.half_cells) <= limits.shared_bytes;
}

template <int kHeadDim>
int load_encode() {
  int device = 0, most = 0;
  if (const int error = cudaGetDevice(&device)) return error;
  if (const int error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  for (const auto kernel : {encode_rotated_kernel<kHeadDim, false>, encode_rotated_kernel<kHeadDim, true>,
                            encode_kernel<kHeadDim, false>, encode_kernel<kHeadDim, true>}) {
    if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) return error;
  }
  if constexpr (!Rotated<kHeadDim>::kDots) {
    const auto kernel = encode_kernel<kHeadDim, false, true>;
    if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) return error;
  }
  if constexpr (is_power_of_two(kHeadDim)) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, encode_few_kernel<kHeadDim>);
  }
  return 0;
}

template <int kHeadDim>
int launch_encode_fast(const VectorCall &call, const DeviceLimits &limits, void *stream) {
  const int rounds = call.side[0].side.rounds;
  int half = 0;
  bool any = false, all_rotated = true, all_norms = true;
  for (int i = 0; i < call.num_sides; ++i) {
    const VectorSide &v = call.side[i];
    all_rotated = all_rotated && v.side.rounds == 1;
    all_norms = all_norms && (is_norms(v.side) || is_two_bits(v.side));
    half = v.side.half_cells > half ? v.side.half_cells : half;
    any = any || v.side.rounds != rounds || v.rows.type == TQ_TYPE_F32 || v.offset != nullptr;
  }
  // Kernels that wait for the one before themselves start while it runs.
  const auto start = [&](auto kernel, dim3 grid, unsigned threads, int bytes) {
    return limits.compute_capability < 90 ? launch(kernel, grid, threads, size_t(bytes), stream, call)
                                          : launch_dependent(kernel, grid, threads, size_t(bytes), stream, call);
  };
  if constexpr (is_power_of_two(kHeadDim)) {
    const int64_t vectors = call.tokens * call.heads;
    if (all_rotated && vectors * call.num_sides <= int64_t{limits.multiprocessors} * kFewPerMultiprocessor) {
      const dim3 grid(unsigned((vectors + kFewWarps - 1) / kFewWarps), unsigned(call.num_sides));
      return start(encode_few_kernel<kHeadDim>, grid, 32 * kFewWarps, 0);
    }
  }
  const dim3 grid = item_grid(call, limits, encode_blocks(kHeadDim));
  const int bytes = EncodeShared<kHeadDim>::bytes(half);
  if constexpr (!Rotated<kHeadDim>::kDots) {
    if (!any && all_rotated && !all_norms) {
      return launch(encode_kernel<kHeadDim, false, true>, grid, 32 * kEncodeWarps, size_t(bytes), stream, call);
    }
  }
  if (!any && all_rotated) {
    return start(call.slots != nullptr ? encode_rotated_kernel<kHeadDim, true> : encode_rotated_kernel<kHeadDim, false>,
                 item_grid(call, limits, rotated_blocks(kHeadDim)), 32 * rotated_warps(kHeadDim), bytes);
  }
  return launch(any ? encode_kernel<kHeadDim, true> : encode_kernel<kHeadDim, false>, grid, 32 * kEncodeWarps,
                size_t(bytes), stream, call);
}

}  // namespace tqkv::cuda
