// SPDX-License-Identifier: Apache-2.0
// tqkv-bench: the hot path on all cores, per SIMD target. Filter with --benchmark_filter=attention/k4v4.
#include <benchmark/benchmark.h>

#include <string_view>

#include "bench.hpp"
#include "codec_bench.hpp"

int main(int argc, char **argv) {
#ifdef TQKV_HAVE_CUDA
  if (argc > 1 && std::string_view(argv[1]) == "codec") {
    return tqkv_bench::run_codec(argc > 2 ? argv[2] : nullptr, false);
  }
#endif
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  tq_build build{};
  build.struct_size = sizeof build;
  if (tq_build_info(&build) == TQ_OK) {
    benchmark::AddCustomContext("tqkv", build.version);
    benchmark::AddCustomContext("simd_auto", build.simd_target);
  }
  tqkv_bench::register_vectors();
  tqkv_bench::register_pages();
  tqkv_bench::register_attention();
#ifdef TQKV_HAVE_GGML
  tqkv_bench::register_ggml();
#endif
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
