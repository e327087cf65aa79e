// SPDX-License-Identifier: Apache-2.0
// The part of cuBLAS that dense rotations take, opened at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "runtime/error.hpp"

namespace tqkv {

// One handle; calls from several threads and on several streams take turns while they enqueue.
class Cublas {
 public:
  static constexpr size_t kWorkspaceBytes = size_t{4} << 20;

  Cublas() = default;
  ~Cublas();
  Cublas(const Cublas &) = delete;
  Cublas &operator=(const Cublas &) = delete;

  // Opens the library and makes a handle on the current device.
  [[nodiscard]] tq_status open();

  // y[n, dim] = x[n, dim] times m, or its transpose, in f32; m is [dim, dim] row-major. Device memory.
  [[nodiscard]] tq_status multiply(const float *x, const float *m, bool transpose, int64_t n, int dim, float *y,
                                   void *workspace, void *stream);
  // y[n, dim] = x[n, dim] times m's transpose, all of them bf16, added in f32.
  [[nodiscard]] tq_status multiply_bf16(const void *x, const void *m, int64_t n, int dim, void *y, void *workspace,
                                        void *stream);

 private:
  void *handle_ = nullptr;
  std::mutex mutex_;
};

// Whether cuBLAS can be opened at all; the refusal names what is missing.
[[nodiscard]] tq_status check_cublas();

}  // namespace tqkv
