// SPDX-License-Identifier: Apache-2.0
// The emulated device in place of abi/cuda_device.cpp: its memory is the host's, and AddressSanitizer its memory check.
#include "abi/device.hpp"
#include "runtime.hpp"

namespace {

class EmulatedDevice final : public CpuDevice {
 public:
  explicit EmulatedDevice(bool captured) : captured_(captured) {}
  int32_t kind() const override { return TQ_DEVICE_CUDA; }
  std::function<tq_status()> repeatable(std::function<tq_status(void *)> body) override {
    if (!captured_) {
      return [body] {
        char stream;  // its address is its name
        return body(&stream);
      };
    }
    char stream;
    emulation::begin_capture(&stream);
    const tq_status status = body(&stream);
    return [status, graph = emulation::end_capture()] {
      for (const auto &work : graph) {
        if (status == TQ_OK) work();
      }
      return status;
    };
  }

 private:
  bool captured_;
};

}  // namespace

Device *cuda_device(bool captured, int ordinal) {
  static EmulatedDevice direct(false), by_graph(true);
  return ordinal != 0 ? nullptr : captured ? &by_graph : &direct;
}

int cuda_current_device() {
  return 0;
}

void *cuda_new_stream(int) {
  return new char;  // its address is its name
}
