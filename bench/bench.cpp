// SPDX-License-Identifier: Apache-2.0
#include "bench.hpp"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

namespace tqkv_bench {
namespace {

constexpr uint64_t kSeed = 20250428;

tq_config config_of(int32_t k_bits, int32_t v_bits, int32_t simd) {
  auto config = sized<tq_config>();
  config.kv_heads = kKvHeads;
  config.k.head_dim = config.v.head_dim = kHeadDim;
  config.k.bits = k_bits;
  config.v.bits = v_bits;
  config.block_size_tokens = kBlockTokens;
  config.simd = simd;
  return config;
}

}  // namespace

void check(tq_status status) {
  if (status == TQ_OK) return;
  std::fprintf(stderr, "tqkv-bench: %s: %s\n", tq_status_string(status), tq_last_error());
  std::exit(1);
}

Codec make_codec(int32_t k_bits, int32_t v_bits, int32_t simd) {
  const tq_config config = config_of(k_bits, v_bits, simd);
  tq_codec *codec = nullptr;
  check(tq_create(&config, &codec));
  return Codec(codec);
}

void FreeDeleter::operator()(void *p) const {
  std::free(p);
}

Memory allocate(size_t bytes) {
  bytes = (std::max<size_t>(bytes, 1) + 255) / 256 * 256;
  Memory memory(std::aligned_alloc(256, bytes));
  if (!memory) {
    std::fprintf(stderr, "tqkv-bench: out of memory\n");
    std::exit(1);
  }
  std::memset(memory.get(), 0, bytes);
  return memory;
}

std::vector<uint16_t> random_bf16(size_t count) {
  std::mt19937_64 generator(kSeed);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> values(count);
  // Drawing is slow next to what is measured: a long period is as good as none.
  constexpr size_t kPeriod = (1 << 22) + 1;
  for (size_t i = 0; i < count; ++i) {
    values[i] = i < kPeriod ? uint16_t(std::bit_cast<uint32_t>(normal(generator)) >> 16) : values[i - kPeriod];
  }
  return values;
}

std::vector<int32_t> random_blocks(int32_t count) {
  std::vector<int32_t> blocks(static_cast<size_t>(count));
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(kSeed));
  return blocks;
}

void register_per_target(const std::string &prefix, const std::function<void(benchmark::State &, int32_t simd)> &run) {
  constexpr struct {
    int32_t simd;
    const char *name;
  } kTargets[] = {
      {TQ_SIMD_SCALAR, "scalar"}, {TQ_SIMD_AVX2, "avx2"}, {TQ_SIMD_AVX512, "avx512"}, {TQ_SIMD_NEON, "neon"}};
  for (const auto &target : kTargets) {
    const tq_config config = config_of(4, 4, target.simd);
    if (tq_supports(&config) != TQ_OK) continue;
    benchmark::RegisterBenchmark((prefix + "/" + target.name).c_str(),
                                 [run, simd = target.simd](benchmark::State &state) { run(state, simd); })
        ->MeasureProcessCPUTime()
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
}

void set_rates(benchmark::State &state, int64_t bytes, const char *unit, int64_t units) {
  constexpr auto kRate = benchmark::Counter::kIsIterationInvariantRate;
  state.counters["bytes/s"] = benchmark::Counter(double(bytes), kRate);
  state.counters[std::string(unit) + "/s"] = benchmark::Counter(double(units), kRate);
}

}  // namespace tqkv_bench
