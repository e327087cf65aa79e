// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <benchmark/benchmark.h>
#include <tqkv/tqkv.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common.hpp"

namespace tqkv_bench {

inline constexpr int32_t kHeadDim = 128;
inline constexpr int32_t kKvHeads = 8;
inline constexpr int32_t kBlockTokens = 16;

void register_vectors();
void register_pages();
void register_attention();
void register_ggml();  // where it was built in

// Ends the program with the library's sentence: a benchmark that cannot run must not report.
void check(tq_status status);

Codec make_codec(int32_t k_bits, int32_t v_bits, int32_t simd);

struct FreeDeleter {
  void operator()(void *p) const;
};
using Memory = std::unique_ptr<void, FreeDeleter>;
Memory allocate(size_t bytes);  // 256-byte aligned and touched

// bf16 values of a standard normal distribution, from a fixed seed: runs are comparable.
std::vector<uint16_t> random_bf16(size_t count);

// Block ids 0 .. count - 1 in random order.
std::vector<int32_t> random_blocks(int32_t count);

// One benchmark "PREFIX/TARGET" for each SIMD target of this machine.
void register_per_target(const std::string &prefix, const std::function<void(benchmark::State &, int32_t simd)> &run);

// Rates from what one iteration handles.
void set_rates(benchmark::State &state, int64_t bytes, const char *unit, int64_t units);

}  // namespace tqkv_bench
