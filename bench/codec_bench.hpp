// SPDX-License-Identifier: Apache-2.0
// tqkv-bench codec: what codec.cu measures and codec.cpp reports.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "gpu.hpp"

namespace tqkv_bench {

struct CodecOptions {
  std::vector<int> head_dims;
  bool quick = false;  // few replays
};

struct Row {
  std::string operation;
  int head_dim = 0, bits = 0;
  int64_t vectors = 0, bytes = 0;  // of one call; bytes: read and written
  Timing time;
  Ceiling ceiling;

  double share() const { return ceiling.seconds / time.median; }
};

struct CodecSink {
  std::function<void(const Machine &)> machine;  // called first
  std::function<void(const Row &)> row;
  std::function<void(const std::string &)> refused;  // what this machine cannot run, in the library's words
};

// Measures on the first CUDA device. Throws std::runtime_error.
void measure_codec(const CodecOptions &options, const CodecSink &sink);

// The command. Returns its exit status.
int run_codec(int argc, char **argv);

}  // namespace tqkv_bench
