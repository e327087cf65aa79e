// SPDX-License-Identifier: Apache-2.0
// What tests that need a CUDA device share.
#pragma once

#include <cstdio>

#include "support.hpp"

// A CUDA device, or nullptr after a line that makes ctest report the entry as skipped: all tests of such an entry need
// the same devices.
inline Device *gpu_or_skip(bool captured = false, int ordinal = 0) {
  tq_build build = {};
  build.struct_size = sizeof build;
  REQUIRE(tq_build_info(&build) == TQ_OK);
  const bool built = std::string(build.cuda) != "not built";
  Device *device = built ? cuda_device(captured, ordinal) : nullptr;
  if (device != nullptr) return device;
  std::printf("tqkv test skipped: %s\n", !built         ? "this build has no CUDA kernels"
                                         : ordinal == 0 ? "no CUDA device"
                                                        : "fewer than two CUDA devices");
  std::fflush(stdout);
  return nullptr;
}

inline Target gpu_target(Device *device) {
  return {device, 0, "cuda"};
}

// Device memory that nobody has touched: on the CPU it takes no pages.
class Memory {
 public:
  Memory(Device &device, size_t bytes) : device_(device), data_(static_cast<uint8_t *>(device.allocate(bytes))) {
    REQUIRE(data_ != nullptr);
  }
  ~Memory() { device_.release(data_); }
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;

  uint8_t *data() const { return data_; }
  template <class T>
  T *as() const {
    return reinterpret_cast<T *>(data_);
  }
  void upload(const void *host, size_t bytes, size_t at = 0) const { device_.upload(data_ + at, host, bytes); }
  void download(void *host, size_t bytes, size_t at = 0) const { device_.download(host, data_ + at, bytes); }

 private:
  Device &device_;
  uint8_t *data_;
};
