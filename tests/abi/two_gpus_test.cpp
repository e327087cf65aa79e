// SPDX-License-Identifier: Apache-2.0
// A codec belongs to the device it was made for, whatever device is current.
#include <thread>

#include "gpu.hpp"
#include "operations.hpp"

namespace {

// Calls on the second device while the first is current give what they give on the first.
void check_second_device(const OperationInputs &inputs, bool captured) {
  const Target first{cuda_device(captured, 0), 0, "cuda 0"}, second{cuda_device(captured, 1), 0, "cuda 1"};
  REQUIRE(cuda_current_device() == 0);
  CodecPtr own = make_codec(config_for(first, inputs)), other = make_codec(config_for(second, inputs));
  CHECK(cuda_current_device() == 0);
  CHECK(info_of(other.get()).device_ordinal == 1);
  for (const Operation operation : kOperations) {
    INFO(name_of(operation) << (captured ? ", captured" : ""));
    const Outputs want = run(operation, first, own.get(), inputs);
    const Outputs got = run(operation, second, other.get(), inputs);
    CHECK(cuda_current_device() == 0);
    CHECK(got == want);
  }
  other.reset();
  CHECK(cuda_current_device() == 0);
}

}  // namespace

TEST_CASE("a codec of the second GPU works while the first is current", "[gpu]") {
  FRESH(random, "two gpus");
  if (gpu_or_skip(false, 0) == nullptr || gpu_or_skip(false, 1) == nullptr) return;
  for (const int32_t rotation : {TQ_ROTATION_HADAMARD, TQ_ROTATION_NONE, TQ_ROTATION_DENSE}) {
    INFO("rotation " << rotation);
    const OperationInputs inputs = make_inputs(random, rotation);
    for (const bool captured : {false, true}) check_second_device(inputs, captured);
  }
}

TEST_CASE("a thread that never chose a device may use the second GPU's codec", "[gpu]") {
  FRESH(random, "two gpus thread");
  Device *device = gpu_or_skip(false, 0) == nullptr ? nullptr : gpu_or_skip(false, 1);
  if (device == nullptr) return;
  const Target first{cuda_device(false, 0), 0, "cuda 0"}, second{device, 0, "cuda 1"};
  const OperationInputs inputs = make_inputs(random, TQ_ROTATION_HADAMARD);
  const CodecPtr own = make_codec(config_for(first, inputs)), other = make_codec(config_for(second, inputs));
  for (const Operation operation : kOperations) {
    INFO(name_of(operation));
    const Outputs want = run(operation, first, own.get(), inputs);
    Outputs got;
    std::thread([&] { got = run(operation, second, other.get(), inputs); }).join();
    CHECK(got == want);
  }
  CHECK(cuda_current_device() == 0);
}

TEST_CASE("two GPUs of one process work side by side", "[gpu]") {
  FRESH(random, "two gpus at once");
  if (gpu_or_skip(false, 0) == nullptr || gpu_or_skip(false, 1) == nullptr) return;
  const OperationInputs inputs = make_inputs(random, TQ_ROTATION_HADAMARD);
  const Target targets[] = {{cuda_device(false, 0), 0, "cuda 0"}, {cuda_device(false, 1), 0, "cuda 1"}};
  const CodecPtr codecs[] = {make_codec(config_for(targets[0], inputs)), make_codec(config_for(targets[1], inputs))};
  CpuDevice cpu;
  const Target reference{&cpu, 0, "cpu"};
  const CodecPtr cpu_codec = make_codec(inputs.config);
  for (int round = 0; round < 20; ++round) {
    for (const Operation operation : kOperations) {
      INFO(name_of(operation));
      const Outputs want = run(operation, reference, cpu_codec.get(), inputs);
      for (int i : {round % 2, 1 - round % 2}) {
        CHECK(agree(operation, run(operation, targets[i], codecs[i].get(), inputs), want));
      }
    }
  }
}
