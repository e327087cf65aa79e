// SPDX-License-Identifier: Apache-2.0
// How every kernel starts: through the runtime's typed call, which is plain C++. Gives the launch's cudaError_t; work
// that was queued before does not show in it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace tqkv::cuda {

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared_bytes, void *stream, A &&...args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = cudaStream_t(stream);
  return cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
}

// The same for a kernel that may start before the kernel queued before it has ended: it calls grid_dependency_wait()
// before it touches what that one writes or reads. For devices of compute capability 9.0 on.
template <class... P, class... A>
int launch_dependent(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared_bytes, void *stream,
                     A &&...args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = cudaStream_t(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
}

// Brings a kernel's parameter to the constant cache, by kWarps warps at once: what they would miss later, each miss as long
// as that of a load, would be one after the other. `scratch`: a word a warp, in shared memory.
template <int kWarps, class Parameter>
__device__ __forceinline__ void touch_parameter(const Parameter &parameter, uint32_t *scratch) {
  constexpr int kLine = 64;
  const int warp = int(threadIdx.x) / 32;
  if (threadIdx.x % 32 != 0) return;
#pragma unroll
  for (int line = 0; line < int(sizeof parameter) / kLine; ++line) {
    if (warp != line % kWarps) continue;
    *static_cast<volatile uint32_t *>(scratch + warp) =
        reinterpret_cast<const uint32_t *>(&parameter)[line * kLine / 4];
  }
}

}  // namespace tqkv::cuda
