// SPDX-License-Identifier: Apache-2.0
// Every call of the interface that runs on a device, but attention, each on small inputs prepared on the host: a test
// makes one of them first in its process, or on a device that is not current.
#pragma once

#include "support.hpp"

enum class Operation { kEncode, kDecode, kStore, kLoad, kCopy, kMerge };
inline constexpr Operation kOperations[] = {Operation::kEncode, Operation::kDecode, Operation::kStore,
                                            Operation::kLoad,   Operation::kCopy,   Operation::kMerge};
const char *name_of(Operation operation);

struct OperationInputs {
  tq_config config;  // of the CPU codec that prepared them
  std::vector<uint8_t> k, v, states;
  std::vector<int64_t> slots, exact_slots, pairs;
  std::vector<float> lse, key_offset;
  Encoded encoded;               // k, one head after the other
  PoolImage pool, exact_pool;    // filled with the tokens
  PoolImage empty, exact_empty;  // before
};
OperationInputs make_inputs(Random &random, int32_t rotation);

// The configuration of the inputs for another device. Fingerprints do not depend on it.
tq_config config_for(const Target &target, const OperationInputs &inputs);

// What a call wrote: whole arrays, faults included.
using Outputs = std::vector<std::vector<uint8_t>>;
Outputs run(Operation operation, const Target &target, const tq_codec *codec, const OperationInputs &inputs);

// Bytes for bytes, but merged states to 1e-5: exponentials are no part of the format.
bool agree(Operation operation, const Outputs &a, const Outputs &b);
