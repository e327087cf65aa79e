// SPDX-License-Identifier: Apache-2.0
// Where a codec's arrays live. Tests touch device memory only through this.
#pragma once

#include <tqkv/tqkv.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "catch.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

class Device {
 public:
  virtual ~Device() = default;
  virtual int32_t kind() const = 0;
  virtual int32_t ordinal() const = 0;
  virtual void *allocate(size_t bytes) = 0;  // 256-byte aligned
  virtual void release(void *pointer) = 0;
  virtual void upload(void *to, const void *host, size_t bytes) = 0;
  virtual void download(void *host, const void *from, size_t bytes) = 0;  // after all queued work
  // Makes one call of the library, on a stream of the device's.
  tq_status call(const std::function<tq_status(void *stream)> &body) { return repeatable(body)(); }
  // What makes it as often as it is called: by one graph, where calls are captured.
  virtual std::function<tq_status()> repeatable(std::function<tq_status(void *stream)> body) {
    return [body] { return body(nullptr); };
  }
  // Makes any access to these bytes an error, where the device has a way to find it, and legal again.
  virtual void forbid(void *, size_t) {}
  virtual void allow(void *, size_t) {}
};

// A CUDA device, its calls made directly or captured into a graph that is then launched; nullptr without one. The
// first one becomes current in the thread that asks first; nothing else here changes what is current.
Device *cuda_device(bool captured, int ordinal = 0);
// The calling thread's current CUDA device.
int cuda_current_device();
// One more stream of a CUDA device, for the rest of the process.
void *cuda_new_stream(int ordinal = 0);

class CpuDevice : public Device {
 public:
  int32_t kind() const override { return TQ_DEVICE_CPU; }
  int32_t ordinal() const override { return 0; }
  void *allocate(size_t bytes) override { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
  void release(void *pointer) override { std::free(pointer); }
  void upload(void *to, const void *host, size_t bytes) override { std::memcpy(to, host, bytes); }
  void download(void *host, const void *from, size_t bytes) override { std::memcpy(host, from, bytes); }
#if defined(__SANITIZE_ADDRESS__)
  void forbid(void *pointer, size_t bytes) override {
    ASAN_POISON_MEMORY_REGION(pointer, bytes);
  }
  void allow(void *pointer, size_t bytes) override {
    ASAN_UNPOISON_MEMORY_REGION(pointer, bytes);
  }
#endif
};

// A way to run the library: a device and, on the CPU, an instruction set.
struct Target {
  Device *device;
  int32_t simd;
  std::string name;
};

// Every CPU target this machine can run; the scalar one comes first. With TQKV_TEST_DEVICE=cuda in the environment that
// one and the CUDA device, called directly and by graphs.
const std::vector<Target> &targets();

// Device bytes between guards that nobody may touch, poisoned with NaN patterns (0xff) until uploaded.
class Bytes {
 public:
  static constexpr size_t kGuard = 256;

  // `misalign`: bytes past a 256-byte boundary.
  Bytes(Device &device, size_t bytes, size_t misalign = 0) : device_(device), bytes_(bytes), misalign_(misalign) {
    block_ = static_cast<uint8_t *>(device.allocate(total()));
    std::vector<uint8_t> image(total(), 0xc5);
    std::fill(image.begin() + std::ptrdiff_t(begin()), image.begin() + std::ptrdiff_t(begin() + bytes), uint8_t(0xff));
    device.upload(block_, image.data(), image.size());
    forbid_guards();
  }
  template <class T>
  Bytes(Device &device, const std::vector<T> &host, size_t misalign = 0)
      : Bytes(device, host.size() * sizeof(T), misalign) {
    upload(host.data());
  }
  ~Bytes() {
    device_.allow(block_, total());
    device_.release(block_);
  }
  Bytes(const Bytes &) = delete;
  Bytes &operator=(const Bytes &) = delete;

  size_t size() const { return bytes_; }
  void *data() const { return block_ + begin(); }
  template <class T>
  T *as() const {
    return reinterpret_cast<T *>(block_ + begin());
  }
  void upload(const void *host) {
    if (bytes_) device_.upload(data(), host, bytes_);
  }
  // The content, after a check that the guards are whole.
  template <class T = uint8_t>
  std::vector<T> download() const {
    std::vector<uint8_t> image(total());
    device_.allow(block_, total());
    device_.download(image.data(), block_, image.size());
    forbid_guards();
    bool guards_intact = true;
    for (size_t i = 0; i < image.size(); ++i) {
      if (i < begin() || i >= begin() + bytes_) guards_intact = guards_intact && image[i] == 0xc5;
    }
    CHECK(guards_intact);
    std::vector<T> host(bytes_ / sizeof(T));
    if (bytes_) std::memcpy(host.data(), image.data() + begin(), host.size() * sizeof(T));
    return host;
  }
  bool poisoned() const {
    for (uint8_t byte : download()) {
      if (byte != 0xff) return false;
    }
    return true;
  }

 private:
  void forbid_guards() const {
    device_.forbid(block_, begin());
    device_.forbid(block_ + begin() + bytes_, kGuard);
  }
  size_t begin() const { return kGuard + misalign_; }
  size_t total() const { return begin() + bytes_ + kGuard; }

  Device &device_;
  uint8_t *block_ = nullptr;
  size_t bytes_, misalign_;
};
