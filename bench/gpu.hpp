// SPDX-License-Identifier: Apache-2.0
// What is measured of a CUDA device and on it; gpu.cuh has the means.
#pragma once

#include <cstdint>
#include <string>

namespace tqkv_bench {

// Seconds of one call, over replays of a graph of many.
struct Timing {
  double median = 0, least = 0, p90 = 0;
};

// The fastest of the kernels that move the same bytes and do nothing else.
struct Ceiling {
  double seconds = 0;
  std::string kernel;
};

struct Machine {
  std::string device, driver, cuda_driver, cuda_runtime;
  int compute_capability = 0, multiprocessors = 0;
  double clock_mhz = 0;           // of the multiprocessors, measured
  int64_t read_bytes = 0;         // by each of:
  Ceiling plain_read, bulk_read;  // bulk: without a kernel where the device or the build has no bulk copies
};

}  // namespace tqkv_bench
