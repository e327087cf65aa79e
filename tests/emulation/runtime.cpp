// SPDX-License-Identifier: Apache-2.0
// One device of compute capability 9.0 with two multiprocessors, so that loops over the grid turn more than once: the
// runtime's functions, and those of the driver and of cuBLAS that the library looks up in libraries it opens.
#include "runtime.hpp"

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/device/ptx.cuh"

namespace emulation {
namespace {

bool capturing = false;
void *captured_stream = nullptr;
Graph captured;

constexpr int kMultiprocessors = 2, kMajor = 9, kMinor = 0;

}  // namespace

void begin_capture(void *stream) {
  capturing = true;
  captured_stream = stream;
}

Graph end_capture() {
  capturing = false;
  return std::exchange(captured, {});
}

int enqueue(void *stream, std::function<void()> work) {
  if (!capturing) {
    work();
  } else if (stream == captured_stream) {
    captured.push_back(std::move(work));
  } else {
    return cudaErrorStreamCaptureUnsupported;
  }
  return cudaSuccess;
}

int enqueue_kernel(dim3 grid, dim3 block, size_t shared_bytes, void *stream, std::function<void()> kernel) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || shared_bytes > kMaxSharedBytes || grid.x == 0 ||
      grid.x > INT32_MAX || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  return enqueue(stream, [=, kernel = std::move(kernel)] { run(grid, block, shared_bytes, kernel); });
}

}  // namespace emulation

const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDevice(int *ordinal) {
  *ordinal = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int ordinal) {
  return ordinal == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int ordinal) {
  if (ordinal != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulation::kMajor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulation::kMinor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(emulation::kMaxSharedBytes);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  if (emulation::capturing) return cudaErrorStreamCaptureUnsupported;
  *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void *pointer) {
  if (emulation::capturing) return cudaErrorStreamCaptureUnsupported;
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
  if (emulation::capturing) return cudaErrorStreamCaptureUnsupported;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream) {
  return cudaError_t(emulation::enqueue(stream, [=] { std::memset(at, value, bytes); }));
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return emulation::capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

// ---- what the library opens

#define TQKV_OPENED extern "C" __attribute__((visibility("default")))

// The program is linked with --wrap=dlopen, and these two libraries are the program itself.
TQKV_OPENED void *__real_dlopen(const char *name, int flags);
TQKV_OPENED void *__wrap_dlopen(const char *name, int flags) {
  const bool ours =
      name != nullptr && (std::strcmp(name, "libcuda.so.1") == 0 || std::strcmp(name, "libcublas.so.13") == 0);
  return __real_dlopen(ours ? nullptr : name, flags);
}

TQKV_OPENED int cuInit(unsigned) {
  return 0;
}
TQKV_OPENED int cuDeviceGetCount(int *count) {
  *count = 1;
  return 0;
}
TQKV_OPENED int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return 0;
}
TQKV_OPENED int cuDeviceGetName(char *name, int size, int) {
  std::snprintf(name, size_t(size), "CUDA emulation");
  return 0;
}
TQKV_OPENED int cuDeviceTotalMem_v2(size_t *bytes, int) {
  *bytes = size_t{1} << 30;
  return 0;
}
TQKV_OPENED int cuDeviceGetAttribute(int *value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, cudaDeviceAttr(attribute), device);
}

namespace {
struct Handle {
  void *stream = nullptr;
};
}  // namespace

TQKV_OPENED int cublasCreate_v2(void **handle) {
  *handle = new Handle;
  return 0;
}
TQKV_OPENED int cublasDestroy_v2(void *handle) {
  delete static_cast<Handle *>(handle);
  return 0;
}
TQKV_OPENED int cublasSetStream_v2(void *handle, void *stream) {
  static_cast<Handle *>(handle)->stream = stream;
  return 0;
}
TQKV_OPENED int cublasSetWorkspace_v2(void *, void *, size_t) {
  return 0;
}
TQKV_OPENED int cublasSetMathMode(void *, int) {
  return 0;
}

namespace {
// op(a) [m, k] op(b) [k, n], columns first. load_a(i) and load_b(i) give elements, set(i, sum) writes c's element i.
template <class LoadA, class LoadB, class Set>
int multiply(void *handle, bool transpose_a, bool transpose_b, int m, int n, int k, LoadA load_a, int lda, LoadB load_b,
             int ldb, Set set, int ldc) {
  return emulation::enqueue(static_cast<Handle *>(handle)->stream, [=] {
    for (int64_t column = 0; column < n; ++column) {
      for (int64_t row = 0; row < m; ++row) {
        float sum = 0;
        for (int64_t i = 0; i < k; ++i) {
          sum += load_a(transpose_a ? i + row * lda : row + i * lda) *
                 load_b(transpose_b ? column + i * ldb : i + column * ldb);
        }
        set(row + column * ldc, sum);
      }
    }
  });
}
}  // namespace

TQKV_OPENED int cublasSgemm_v2(void *handle, int transpose_a, int transpose_b, int m, int n, int k, const float *alpha,
                               const float *a, int lda, const float *b, int ldb, const float *beta, float *c, int ldc) {
  return multiply(
      handle, transpose_a, transpose_b, m, n, k, [=](int64_t i) { return a[i]; }, lda, [=](int64_t i) { return b[i]; },
      ldb,
      [=, alpha = *alpha, beta = *beta](int64_t i, float sum) {
        c[i] = beta == 0 ? alpha * sum : alpha * sum + beta * c[i];
      },
      ldc);
}
// Products of bf16 matrices in f32.
TQKV_OPENED int cublasGemmEx(void *handle, int transpose_a, int transpose_b, int m, int n, int k, const void *alpha,
                             const void *a, int type_a, int lda, const void *b, int type_b, int ldb, const void *beta,
                             void *c, int type_c, int ldc, int compute_type, int) {
  constexpr int kBf16 = 14, kComputeF32 = 68, kNotSupported = 15;
  const float one = *static_cast<const float *>(alpha), zero = *static_cast<const float *>(beta);
  if (type_a != kBf16 || type_b != kBf16 || type_c != kBf16 || compute_type != kComputeF32 || one != 1 || zero != 0) {
    return kNotSupported;
  }
  const auto load = [](const void *from) {
    return [=](int64_t i) { return __uint_as_float(uint32_t{static_cast<const uint16_t *>(from)[i]} << 16); };
  };
  return multiply(
      handle, transpose_a, transpose_b, m, n, k, load(a), lda, load(b), ldb,
      [=](int64_t i, float sum) { static_cast<uint16_t *>(c)[i] = uint16_t(tqkv::cuda::pack_bf16(sum, 0)); }, ldc);
}
