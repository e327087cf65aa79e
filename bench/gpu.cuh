// SPDX-License-Identifier: Apache-2.0
// The means of measuring on a CUDA device: memory, graphs, and kernels that move bytes and do nothing else.
#pragma once

#include <cuda_runtime.h>
#include <tqkv/tqkv.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "common.hpp"
#include "gpu.hpp"

namespace tqkv_bench {

// Throw std::runtime_error.
void expect(cudaError_t error, const char *what);
void expect(tq_status status);

// Device memory.
struct Buffer {
  uint8_t *data = nullptr;
  explicit Buffer(size_t bytes) { expect(cudaMalloc(&data, std::max<size_t>(bytes, 256)), "allocating device memory"); }
  template <class Value>
  explicit Buffer(const std::vector<Value> &values) : Buffer(values.size() * sizeof(Value)) {
    expect(cudaMemcpy(data, values.data(), values.size() * sizeof(Value), cudaMemcpyHostToDevice), "copying arrays");
    expect(cudaDeviceSynchronize(), "copying arrays");  // the streams of graphs do not wait for the default one
  }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
};

constexpr int64_t kColdBytes = int64_t{256} << 20;  // several times the L2 cache of any device

// bf16 normals times a factor by a hash of the index, which begins at `first`, so that no value repeats. On the default
// stream.
void fill_normals(uint8_t *data, int64_t count, uint64_t first = 0, float factor = 1);

// What a stripped kernel moves: `groups` times so many bytes, multiples of 16, from one array to another.
struct Moves {
  const uint8_t *from;
  uint8_t *to;
  int64_t groups;
  int32_t read_bytes, write_bytes;  // of a group; write_bytes may be 0
  bool clear = false;  // shared memory first: what is written of it and never loaded may be left from anything
};

// call(i, stream) enqueues the i-th of the calls that a graph holds.
using Call = std::function<void(int, cudaStream_t)>;
Timing time_of(const Call &call, int calls, int replays);

// How a measurement moves on between calls, so that nothing is left in the L2 cache: call i works on set i % sets.
struct Rotation {
  int64_t sets;
  int calls;  // of one graph
};

// The first CUDA device and its memory ceilings.
class Gpu {
 public:
  explicit Gpu(bool quick);

  const Machine &machine() const { return machine_; }
  // Measures the clock and the best read of so many bytes, multiples of 4096; nothing is written to `to`.
  void measure(const Buffer &from, int64_t bytes, const Buffer &to);

  // The fastest kernel that makes the moves; that of bulk copies has stages of so many KiB.
  Ceiling ceiling(const Moves &moves, const Rotation &rotation, const std::vector<int> &stage_kib) const;

 private:
  using Launch = std::function<void(const Moves &, cudaStream_t)>;
  void consider(const std::string &name, const Launch &launch, const Moves &moves, const Rotation &rotation,
                Ceiling *best) const;
  template <int kInFlight, bool kStreaming>
  void consider_plain(const Moves &moves, const Rotation &rotation, Ceiling *best) const;
  Ceiling best_plain(const Moves &moves, const Rotation &rotation) const;
  Ceiling best_bulk(const Moves &moves, const Rotation &rotation, const std::vector<int> &stage_kib) const;

  Machine machine_;
  bool quick_ = false, has_bulk_ = false;
};

}  // namespace tqkv_bench
