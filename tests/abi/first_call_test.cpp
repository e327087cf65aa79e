// SPDX-License-Identifier: Apache-2.0
// Rule of the hot path: nothing is allocated, loaded or waited for, from the very first call. Each of these tests runs
// in a process of its own, where nothing was called on the device but tq_create; the call is captured, in the mode in
// which everything of that kind fails, and only then are there results to compare.
#include "gpu.hpp"
#include "operations.hpp"

namespace {

void check_first_call(Operation operation, int32_t rotation) {
  FRESH(random, "first call");
  Device *device = gpu_or_skip(true);
  if (device == nullptr) return;
  const Target target{device, 0, "cuda, captured"};
  const OperationInputs inputs = make_inputs(random, rotation);
  const CodecPtr codec = make_codec(config_for(target, inputs));
  const Outputs first = run(operation, target, codec.get(), inputs);
  if (rotation != TQ_ROTATION_DENSE) {
    CpuDevice cpu;
    const Target reference{&cpu, 0, "cpu"};
    CHECK(agree(operation, first, run(operation, reference, make_codec(inputs.config).get(), inputs)));
  } else {  // the CPU adds in another order
    CHECK(first == run(operation, gpu_target(gpu_or_skip()), codec.get(), inputs));
  }
}

}  // namespace

TEST_CASE("the first call of a process can be captured: encode", "[alone][gpu]") {
  check_first_call(Operation::kEncode, TQ_ROTATION_HADAMARD);
}

TEST_CASE("the first call of a process can be captured: decode", "[alone][gpu]") {
  check_first_call(Operation::kDecode, TQ_ROTATION_HADAMARD);
}

TEST_CASE("the first call of a process can be captured: store", "[alone][gpu]") {
  check_first_call(Operation::kStore, TQ_ROTATION_HADAMARD);
}

TEST_CASE("the first call of a process can be captured: load", "[alone][gpu]") {
  check_first_call(Operation::kLoad, TQ_ROTATION_HADAMARD);
}

TEST_CASE("the first call of a process can be captured: copy", "[alone][gpu]") {
  check_first_call(Operation::kCopy, TQ_ROTATION_HADAMARD);
}

TEST_CASE("the first call of a process can be captured: merge", "[alone][gpu]") {
  check_first_call(Operation::kMerge, TQ_ROTATION_HADAMARD);
}

TEST_CASE("the first call of a process can be captured: dense encode", "[alone][gpu]") {
  check_first_call(Operation::kEncode, TQ_ROTATION_DENSE);
}

TEST_CASE("the first call of a process can be captured: dense decode", "[alone][gpu]") {
  check_first_call(Operation::kDecode, TQ_ROTATION_DENSE);
}

TEST_CASE("the first call of a process can be captured: dense store", "[alone][gpu]") {
  check_first_call(Operation::kStore, TQ_ROTATION_DENSE);
}
