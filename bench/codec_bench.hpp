// SPDX-License-Identifier: Apache-2.0
// tqkv-bench codec: what codec.cu measures and codec.cpp reports.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace tqkv_bench {

struct CodecOptions {
  std::vector<int> head_dims;
  bool quick = false;  // few replays
};

// Seconds of one call, over replays of a graph of many.
struct Timing {
  double median = 0, least = 0, p90 = 0;
};

// The fastest of the kernels that move the same bytes and do nothing else.
struct Ceiling {
  double seconds = 0;
  std::string kernel;
};

struct Row {
  std::string operation;
  int head_dim = 0, bits = 0;
  int64_t vectors = 0, bytes = 0;  // of one call; bytes: read and written
  Timing time;
  Ceiling ceiling;

  double share() const { return ceiling.seconds / time.median; }
};

struct Machine {
  std::string device, driver, cuda_driver, cuda_runtime;
  int compute_capability = 0, multiprocessors = 0;
  double clock_mhz = 0;           // of the multiprocessors, measured
  int64_t read_bytes = 0;         // by each of:
  Ceiling plain_read, bulk_read;  // bulk: without a kernel where the device or the build has no bulk copies
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
