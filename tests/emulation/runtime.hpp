// SPDX-License-Identifier: Apache-2.0
// Streams and graphs of the emulated device. Its memory is the host's; work is done when it is queued, or when the
// graph that captured it is launched.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "block.hpp"

namespace emulation {

using Graph = std::vector<std::function<void()>>;

// Between the two, work on this stream is recorded, and calls that CUDA does not allow during a capture fail.
void begin_capture(void *stream);
Graph end_capture();

// These give a cudaError_t.
int enqueue(void *stream, std::function<void()> work);
int enqueue_kernel(dim3 grid, dim3 block, size_t shared_bytes, void *stream, std::function<void()> kernel);

}  // namespace emulation
