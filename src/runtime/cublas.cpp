// SPDX-License-Identifier: Apache-2.0
#include "runtime/cublas.hpp"

#ifdef TQKV_HAVE_CUDA

#include <dlfcn.h>

#include <climits>
#include <type_traits>

namespace tqkv {
namespace {

// The library's documented C interface, version 2; statuses and enumerations are ints, 0 is success.
struct Library {
  int (*create)(void **handle) = nullptr;
  int (*destroy)(void *handle) = nullptr;
  int (*set_stream)(void *handle, void *stream) = nullptr;
  int (*set_workspace)(void *handle, void *workspace, size_t bytes) = nullptr;
  int (*set_math_mode)(void *handle, int mode) = nullptr;
  int (*sgemm)(void *handle, int transpose_a, int transpose_b, int m, int n, int k, const float *alpha, const float *a,
               int lda, const float *b, int ldb, const float *beta, float *c, int ldc) = nullptr;
  int (*gemm_ex)(void *handle, int transpose_a, int transpose_b, int m, int n, int k, const void *alpha, const void *a,
                 int type_a, int lda, const void *b, int type_b, int ldb, const void *beta, void *c, int type_c,
                 int ldc, int compute_type, int algorithm) = nullptr;
  const char *reason = nullptr;

  Library() {
    void *library = nullptr;
    for (const char *name : {"libcublas.so.13", "libcublas.so.12"}) {
      library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      if (library != nullptr) break;
    }
    if (library == nullptr) {
      reason = "neither libcublas.so.13 nor libcublas.so.12 can be loaded";
      return;
    }
    const auto load = [&](auto &function, const char *name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      return function != nullptr;
    };
    if (!load(create, "cublasCreate_v2") || !load(destroy, "cublasDestroy_v2") ||
        !load(set_stream, "cublasSetStream_v2") || !load(set_workspace, "cublasSetWorkspace_v2") ||
        !load(set_math_mode, "cublasSetMathMode") || !load(sgemm, "cublasSgemm_v2") || !load(gemm_ex, "cublasGemmEx")) {
      reason = "the cuBLAS library found lacks a function of its interface";
    }
  }
};

const Library &library() {
  static const Library opened;
  return opened;
}

constexpr int kPlain = 0, kTransposed = 1;          // CUBLAS_OP_N, CUBLAS_OP_T
constexpr int kDefaultMath = 0, kPedanticMath = 2;  // pedantic: f32 products are not rounded to fewer bits

}  // namespace

tq_status check_cublas() {
  if (library().reason == nullptr) return TQ_OK;
  return fail(TQ_ERROR_NOT_SUPPORTED, "a dense or custom rotation on CUDA takes cuBLAS, but %s", library().reason);
}

Cublas::~Cublas() {
  if (handle_ != nullptr) library().destroy(handle_);
}

tq_status Cublas::open() {
  TQKV_TRY(check_cublas());
  if (const int status = library().create(&handle_)) {
    handle_ = nullptr;
    return fail(TQ_ERROR_CUBLAS, "cublasCreate failed with status %d", status);
  }
  if (const int status = library().set_math_mode(handle_, kPedanticMath)) {
    return fail(TQ_ERROR_CUBLAS, "cublasSetMathMode failed with status %d", status);
  }
  return TQ_OK;
}

tq_status Cublas::multiply(const float *x, const float *m, bool transpose, int64_t n, int dim, float *y,
                           void *workspace, void *stream) {
  if (n > INT_MAX) return fail(TQ_ERROR_INTERNAL, "%lld rows in one product", (long long)n);
  const float one = 1, zero = 0;
  // cuBLAS counts columns first: y^T [dim, n] = op(m^T) x^T.
  const std::lock_guard lock(mutex_);
  int status = library().set_stream(handle_, stream);
  if (status == 0) status = library().set_workspace(handle_, workspace, kWorkspaceBytes);
  if (status == 0) {
    status = library().sgemm(handle_, transpose ? kTransposed : kPlain, kPlain, dim, int(n), dim, &one, m, dim, x, dim,
                             &zero, y, dim);
  }
  return status == 0 ? TQ_OK : fail(TQ_ERROR_CUBLAS, "cublasSgemm failed with status %d", status);
}

tq_status Cublas::multiply_bf16(const void *x, const void *m, int64_t n, int dim, void *y, void *workspace,
                                void *stream) {
  if (n > INT_MAX) return fail(TQ_ERROR_INTERNAL, "%lld rows in one product", (long long)n);
  const float one = 1, zero = 0;
  // CUDA_R_16BF, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT
  constexpr int kBf16 = 14, kComputeF32 = 68, kDefaultAlgorithm = -1;
  const std::lock_guard lock(mutex_);
  int status = library().set_stream(handle_, stream);
  if (status == 0) status = library().set_workspace(handle_, workspace, kWorkspaceBytes);
  if (status == 0) status = library().set_math_mode(handle_, kDefaultMath);
  if (status == 0) {
    status = library().gemm_ex(handle_, kTransposed, kPlain, dim, int(n), dim, &one, m, kBf16, dim, x, kBf16, dim,
                               &zero, y, kBf16, dim, kComputeF32, kDefaultAlgorithm);
    const int restored = library().set_math_mode(handle_, kPedanticMath);
    if (status == 0) status = restored;
  }
  return status == 0 ? TQ_OK : fail(TQ_ERROR_CUBLAS, "cublasGemmEx failed with status %d", status);
}

}  // namespace tqkv

#endif  // TQKV_HAVE_CUDA
