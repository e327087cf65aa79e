// SPDX-License-Identifier: Apache-2.0
// attention/ggml-TYPE: what bench/attention.cpp measures, by ggml's flash attention over a contiguous cache.
#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

#include "bench.hpp"

namespace tqkv_bench {
namespace {

constexpr int64_t kTokens = 32768, kQueryHeads = 32;
constexpr int64_t kMinCacheBytes = int64_t{256} << 20;

struct ContextDeleter {
  void operator()(ggml_context *context) const { ggml_free(context); }
};
struct PoolDeleter {
  void operator()(ggml_threadpool *pool) const { ggml_threadpool_free(pool); }
};

void run(benchmark::State &state, ggml_type type) {
  const int64_t bytes = int64_t(ggml_row_size(type, kHeadDim)) * kTokens * kKvHeads * 2;
  const int64_t sequences = kMinCacheBytes / bytes + 1;
  const std::unique_ptr<ggml_context, ContextDeleter> context(
      ggml_init({size_t(sequences * bytes) + (size_t{64} << 20), nullptr, false}));
  const int threads = std::max(1, int(std::thread::hardware_concurrency()));
  auto parameters = ggml_threadpool_params_default(threads);
  const std::unique_ptr<ggml_threadpool, PoolDeleter> pool(ggml_threadpool_new(&parameters));

  std::vector<float> row(kHeadDim);
  const auto fill = [&](ggml_tensor *tensor, const std::vector<uint16_t> &bf16) {
    for (int64_t r = 0; r < ggml_nrows(tensor); ++r) {
      for (int64_t i = 0; i < kHeadDim; ++i) {
        const uint32_t bits = uint32_t(bf16[size_t((r * kHeadDim + i) % int64_t(bf16.size()))]) << 16;
        std::memcpy(&row[size_t(i)], &bits, 4);
      }
      ggml_quantize_chunk(tensor->type, row.data(),
                          static_cast<char *>(tensor->data) + size_t(r) * ggml_row_size(tensor->type, kHeadDim), 0, 1,
                          kHeadDim, nullptr);
    }
  };
  ggml_tensor *q = ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, kHeadDim, 1, kQueryHeads);
  fill(q, random_bf16(kQueryHeads * kHeadDim));

  const std::vector<uint16_t> values = random_bf16(size_t{1} << 20);
  std::vector<ggml_cgraph *> graphs;
  std::vector<ggml_cplan> plans;
  std::vector<std::vector<uint8_t>> work;
  for (int64_t i = 0; i < sequences; ++i) {
    ggml_tensor *k = ggml_new_tensor_3d(context.get(), type, kHeadDim, kTokens, kKvHeads);
    ggml_tensor *v = ggml_new_tensor_3d(context.get(), type, kHeadDim, kTokens, kKvHeads);
    fill(k, values);
    fill(v, values);
    ggml_tensor *out = ggml_flash_attn_ext(context.get(), q, k, v, nullptr, 1 / std::sqrt(float(kHeadDim)), 0, 0);
    graphs.push_back(ggml_new_graph(context.get()));
    ggml_build_forward_expand(graphs.back(), out);
    plans.push_back(ggml_graph_plan(graphs.back(), threads, pool.get()));
    work.emplace_back(plans.back().work_size + 1);
    plans.back().work_data = work.back().data();
  }
  size_t sequence = 0;
  for (auto _ : state) {
    if (ggml_graph_compute(graphs[sequence], &plans[sequence]) != GGML_STATUS_SUCCESS) {
      state.SkipWithError("ggml failed");
      break;
    }
    sequence = (sequence + 1) % graphs.size();
  }
  set_rates(state, bytes, "tokens", kTokens);
}

}  // namespace

void register_ggml() {
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
    benchmark::RegisterBenchmark((std::string("attention/ggml-") + ggml_type_name(type)).c_str(),
                                 [type](benchmark::State &state) { run(state, type); })
        ->MeasureProcessCPUTime()
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
}

}  // namespace tqkv_bench
