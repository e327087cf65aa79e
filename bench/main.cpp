// SPDX-License-Identifier: Apache-2.0
// tqkv-bench: the hot path on all cores, per SIMD target. Filter with --benchmark_filter=attention/k4v4.
// tqkv-bench codec, tqkv-bench attention: the codec, and attention, on a CUDA device.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <string_view>

#include "attention_bench.hpp"
#include "bench.hpp"
#include "codec_bench.hpp"

int main(int argc, char **argv) {
  const std::string_view command = argc > 1 ? argv[1] : "";
  if (command == "codec" || command == "attention") {
#ifdef TQKV_HAVE_CUDA
    return (command == "codec" ? tqkv_bench::run_codec : tqkv_bench::run_attention)(argc - 1, argv + 1);
#else
    std::fprintf(stderr, "tqkv-bench: %s measures CUDA kernels, and this build has none; configure with TQKV_CUDA=ON\n",
                 argv[1]);
    return 1;
#endif
  }
  if (std::any_of(argv + 1, argv + argc, [](const char *arg) { return std::string_view(arg) == "--help"; })) {
    std::printf(
        "tqkv-bench codec [--help] ...\n          measures the codec on a CUDA device\n"
        "tqkv-bench attention [--help] ...\n          measures attention on a CUDA device; without either:\n");
    std::fflush(stdout);
  }
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
