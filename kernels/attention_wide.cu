// SPDX-License-Identifier: Apache-2.0
// The choice among the wide kernels of paged attention.
#include <cuda_runtime.h>

#include "kernels/attention.hpp"
#include "kernels/inst.hpp"

namespace tqkv::cuda {

// Instantiated in inst/; sources.cmake lists the shapes.
template <int kDim, bool kMany>
int load_wide();
template <int kDim, bool kMany>
int launch_wide(const AttentionCall &call, void *stream);

namespace {

struct WideKernel {
  int dim;
  bool many;
  int (*load)();
  int (*launch)(const AttentionCall &, void *);
};

template <int kDim, bool kMany>
constexpr WideKernel kernel_of() {
  return {kDim, kMany, load_wide<kDim, kMany>, launch_wide<kDim, kMany>};
}

#define TQKV_WIDE(...) kernel_of<__VA_ARGS__>(),
constexpr WideKernel kKernels[] = {
#include "attention_wide_shapes.inc"
};
#undef TQKV_WIDE

constexpr int kFewRows = 16;

const WideKernel *find(const AttentionCall &call, int64_t rows) {
  for (const WideKernel &kernel : kKernels) {
    if (call.head_dim_k <= kernel.dim && call.head_dim_v <= kernel.dim && (kernel.many || rows <= kFewRows)) {
      return &kernel;
    }
  }
  return nullptr;
}

}  // namespace

int find_wide_attention(const AttentionCall &call, int64_t rows) {
  const WideKernel *kernel = find(call, rows);
  return kernel == nullptr ? 0 : !kernel->many ? kFewRows : kernel->dim > 128 ? 64 : 128;
}

int launch_wide_attention(const AttentionCall &call, void *stream) {
  const WideKernel *kernel = find(call, int64_t{call.max_q_len} * call.group);
  return kernel == nullptr ? int(cudaErrorInvalidValue) : kernel->launch(call, stream);
}

int load_wide_attention() {
  int device = 0, major = 0;
  if (const int error = cudaGetDevice(&device)) return error;
  if (const int error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  if (major < 9) return 0;
  for (const WideKernel &kernel : kKernels) {
    if (const int error = kernel.load()) return error;
  }
  return 0;
}

}  // namespace tqkv::cuda
