// SPDX-License-Identifier: Apache-2.0
// One codec from many threads, the caller's parallel loop, and error texts that belong to their thread.
#include <atomic>
#include <cstring>
#include <thread>

#include "scenario.hpp"

namespace {

struct LoopCounts {
  std::atomic<int64_t> calls{0}, bodies{0};
};

// Backwards and from two threads, to show that the order does not matter.
void loop_in_two_threads(void *context, int64_t count, void (*body)(void *, int64_t), void *body_context) {
  auto *counts = static_cast<LoopCounts *>(context);
  ++counts->calls;
  std::thread other([&] {
    for (int64_t i = count - 1; i >= count / 2; --i) ++counts->bodies, body(body_context, i);
  });
  for (int64_t i = count / 2 - 1; i >= 0; --i) ++counts->bodies, body(body_context, i);
  other.join();
}

}  // namespace

TEST_CASE("the caller's parallel loop gives the pool's bits") {
  FRESH(random, "threads loop");
  for (const Target &target : targets()) {
    if (target.device->kind() != TQ_DEVICE_CPU) continue;
    for (int round = 0; round < 8; ++round) {
      const std::unique_ptr<Scenario> scenario =
          random_scenario(random.bits(), target, {.config = {.max_head_dim = 96, .allow_matrices = false}});
      const AttentionRun want = scenario->run_on(target);
      LoopCounts counts;
      tq_config config = scenario->config;
      config.threads = 0;
      config.parallel_for = loop_in_two_threads;
      config.parallel_context = &counts;
      scenario->codec = make_codec(config);
      const AttentionRun got = scenario->run_on(target);
      CHECK(same_bits(want, got));
      CHECK(std::memcmp(&want.faults, &got.faults, sizeof got.faults) == 0);
      if (!scenario->call.lengths.empty() && scenario->call.args.num_tokens > 0) CHECK(counts.calls > 0);

      const std::vector<uint8_t> input =
          encode_elements(normals(random, 200 * scenario->reader->k.head_dim), TQ_TYPE_F32);
      const Encoded with_loop = encode(target, scenario->codec.get(), TQ_SIDE_K, input, TQ_TYPE_F32);
      config.parallel_for = nullptr;
      config.parallel_context = nullptr;
      config.threads = 2;
      const Encoded with_pool = encode(target, make_codec(config).get(), TQ_SIDE_K, input, TQ_TYPE_F32);
      CHECK(with_loop.codes == with_pool.codes);
      CHECK(with_loop.scales == with_pool.scales);
    }
  }
}

TEST_CASE("many threads share one codec") {
  FRESH(random, "threads shared");
  for (const Target &target : targets()) {
    if (target.device->kind() != TQ_DEVICE_CPU) continue;
    std::unique_ptr<Scenario> scenario;
    do {
      scenario =
          random_scenario(random.bits(), target,
                          {.config = {.max_head_dim = 64, .allow_matrices = false}, .max_seqs = 8, .faults = false});
    } while (scenario->call.lengths.empty() || scenario->call.args.num_tokens == 0);
    tq_config config = scenario->config;
    config.threads = 3;
    scenario->codec = make_codec(config);
    const AttentionRun want = scenario->run_on(target);
    REQUIRE(want.status == TQ_OK);
    // Catch's assertions are not for threads: each counts what differs, with calls of its own made directly.
    const AttentionCall &call = scenario->call;
    const oracle::Side &k = scenario->reader->k;
    const std::vector<uint8_t> input = encode_elements(normals(random, 64 * k.head_dim), TQ_TYPE_F32);
    const Encoded want_codes = encode(target, scenario->codec.get(), TQ_SIDE_K, input, TQ_TYPE_F32);
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 6; ++thread) {
      threads.emplace_back([&] {
        tq_pages pages, exact_pages;
        tq_attention_args args = call.host_args(&pages, &exact_pages);
        std::vector<uint8_t> out(want.raw_out.size());
        std::vector<float> lse(want.lse.size());
        args.out = out.data();
        args.lse = lse.data();
        size_t bytes = 0;
        if (tq_attention_workspace(scenario->codec.get(), &args, &bytes) != TQ_OK) ++wrong;
        CpuDevice cpu;
        void *workspace = cpu.allocate(bytes + 256);
        args.workspace = workspace;
        args.workspace_bytes = bytes;
        std::vector<uint8_t> codes(want_codes.codes.size()), scales(want_codes.scales.size());
        tq_encode_args encode_args = {};
        encode_args.struct_size = sizeof encode_args;
        encode_args.side = TQ_SIDE_K;
        encode_args.count = 64;
        encode_args.input = input.data();
        encode_args.input_type = TQ_TYPE_F32;
        encode_args.codes = codes.data();
        encode_args.scales = scales.empty() ? nullptr : scales.data();
        for (int repeat = 0; repeat < 30; ++repeat) {
          std::fill(out.begin(), out.end(), uint8_t(0xff));
          std::memset(lse.data(), 0xff, lse.size() * sizeof(float));
          if (tq_paged_attention(scenario->codec.get(), &args) != TQ_OK) ++wrong;
          if (out != want.raw_out || std::memcmp(lse.data(), want.lse.data(), lse.size() * sizeof(float)) != 0) ++wrong;
          if (tq_encode(scenario->codec.get(), &encode_args) != TQ_OK) ++wrong;
          if (codes != want_codes.codes || scales != want_codes.scales) ++wrong;
        }
        cpu.release(workspace);
      });
    }
    for (std::thread &thread : threads) thread.join();
    CHECK(wrong == 0);
  }
}

TEST_CASE("an error's sentence belongs to the thread that made it") {
  tq_config config = make_config(targets().front(), 64, 4, 4);
  config.k.bits = 5;
  REQUIRE(tq_supports(&config) != TQ_OK);
  const std::string mine = tq_last_error();
  REQUIRE(!mine.empty());
  std::string others_before, others_after;
  std::thread([&] {
    others_before = tq_last_error();
    tq_config other = make_config(targets().front(), 64, 4, 4);
    other.kv_heads = 5000;
    (void)tq_supports(&other);
    others_after = tq_last_error();
  }).join();
  CHECK(others_before.empty());
  CHECK(others_after.find("5000") != std::string::npos);
  CHECK(mine == tq_last_error());
}

TEST_CASE("codecs are made and ended from many threads at once") {
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < 10; ++i) {
        tq_config config = make_config(targets().front(), 64 + 64 * (i % 3), 2 + i % 3, 4);
        config.threads = 1 + thread;
        tq_codec *codec = nullptr;
        if (tq_create(&config, &codec) != TQ_OK) ++wrong;
        tq_destroy(codec);
      }
    });
  }
  for (std::thread &thread : threads) thread.join();
  CHECK(wrong == 0);
  tq_destroy(nullptr);
}
