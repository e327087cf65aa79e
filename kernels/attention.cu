// SPDX-License-Identifier: Apache-2.0
// The choice of the main kernel of paged attention.
#include <cuda_runtime.h>

#include "kernels/attention.hpp"
#include "kernels/device/operands.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {

// Instantiated in inst/; sources.cmake lists the shapes.
template <int kDimK, int kDimV, int kBitsK, int kBitsV, int kBlocks>
int load_attention();
template <int kDimK, int kDimV, int kBitsK, int kBitsV, int kBlocks>
int launch_attention_of(const AttentionCall &call, void *stream);

namespace {

struct AttentionKernel {
  int dim_k, dim_v, bits_k, bits_v, blocks;
  int (*load)();
  int (*launch)(const AttentionCall &, void *);
};

template <int kDimK, int kDimV, int kBitsK, int kBitsV, int kBlocks>
constexpr AttentionKernel kernel_of() {
  return {kDimK,
          kDimV,
          kBitsK,
          kBitsV,
          kBlocks,
          load_attention<kDimK, kDimV, kBitsK, kBitsV, kBlocks>,
          launch_attention_of<kDimK, kDimV, kBitsK, kBitsV, kBlocks>};
}

#define TQKV_ATTENTION(...) kernel_of<__VA_ARGS__>(),
constexpr AttentionKernel kKernels[] = {
#include "attention_shapes.inc"
};
#undef TQKV_ATTENTION

// The first that takes the call; those of fixed bits come first, and of them those of fewer rows. The last, of any bits,
// takes more rows in parts.
const AttentionKernel *find(const AttentionCall &call, int64_t rows) {
  // What the kernels of fixed bits take for granted.
  const bool plain =
      call.k_scale_type == TQ_TYPE_F16 && call.v_scale_type == TQ_TYPE_F16 && call.pool.block_size >= kTileTokens;
  const int bits_k = call.k_uniform != 0 ? 20 : call.k_bits, bits_v = call.v_uniform != 0 ? 20 : call.v_bits;
  for (const AttentionKernel &kernel : kKernels) {
    const bool any = kernel.bits_k == 0;
    if (kernel.dim_k != call.head_dim_k || kernel.dim_v != call.head_dim_v) continue;
    if (!any && (!plain || kernel.bits_k != bits_k || kernel.bits_v != bits_v)) continue;
    if (rows <= 4 * kernel.blocks || any || kernel.blocks == 2) return &kernel;
  }
  return nullptr;
}

template <class Codes>
QueryOrder order_of() {
  QueryOrder order;
  int i = 0;
  for (int q = 0; q < 4; ++q) {
    for (int step = 0; step < Codes::kSteps; ++step) {
      for (int byte = 0; byte < 8; ++byte) order.channel[i++] = int16_t(Codes::channel(step, byte / 4, byte % 4, q));
    }
  }
  return order;
}

template <int kDim>
bool order_of_dim(const AttentionCall &call, QueryOrder *order) {
  if (call.head_dim_k != kDim) return false;
  *order = call.k_uniform != 0 ? order_of<KCodes<2, kDim, true>>()
           : call.k_bits == 2  ? order_of<KCodes<2, kDim>>()
           : call.k_bits == 3  ? order_of<KCodes<3, kDim>>()
           : call.k_bits == 4  ? order_of<KCodes<4, kDim>>()
                               : order_of<KCodes<8, kDim>>();
  return true;
}

template <int... kDims>
QueryOrder order_of_any(const AttentionCall &call) {
  QueryOrder order{};
  (order_of_dim<kDims>(call, &order) || ...);
  return order;
}

}  // namespace

bool find_attention(const AttentionCall &call, int64_t rows, AttentionLimits *limits) {
  const AttentionKernel *kernel = find(call, rows);
  if (kernel == nullptr) return false;
  *limits = {attention_warps(kernel->dim_k, kernel->dim_v, kernel->blocks), 4 * kernel->blocks};
  return true;
}

QueryOrder query_order(const AttentionCall &call) {
  return order_of_any<64, 80, 96, 112, 128, 192, 256>(call);
}

int launch_attention(const AttentionCall &call, void *stream) {
  const AttentionKernel *kernel = find(call, int64_t{call.max_q_len} * call.group);
  return kernel == nullptr ? int(cudaErrorInvalidValue) : kernel->launch(call, stream);
}

int load_attention_kernels() {
  int device = 0, major = 0;
  if (const int error = cudaGetDevice(&device)) return error;
  if (const int error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  if (major < 9) return 0;
  for (const AttentionKernel &kernel : kKernels) {
    if (const int error = kernel.load()) return error;
  }
  return 0;
}

}  // namespace tqkv::cuda
