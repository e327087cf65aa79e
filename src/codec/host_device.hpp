// SPDX-License-Identifier: Apache-2.0
// Marks functions that the CPU path and the CUDA kernels share, so that both give the same bits. They must not be
// contracted into fused multiply-adds on either side. Internal linkage: translation units built for different
// instruction sets must not exchange their copies.
#pragma once

#if defined(__CUDACC__)
#define TQKV_HOST_DEVICE static inline __host__ __device__ __attribute__((always_inline))
#else
#define TQKV_HOST_DEVICE [[maybe_unused]] static inline __attribute__((always_inline))
#endif
