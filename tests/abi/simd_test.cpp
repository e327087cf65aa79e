// SPDX-License-Identifier: Apache-2.0
// Every instruction set and device gives the scalar target's bytes, and its numbers to within rounding.
#include <algorithm>
#include <cstring>

#include "scenario.hpp"

TEST_CASE("codes and scales are the scalar target's on every target") {
  FRESH(random, "simd encode");
  for (int round = 0; round < 150; ++round) {
    ConfigStorage storage;
    tq_config config =
        random_config(random, targets().front(), &storage, {.max_head_dim = 288, .allow_matrices = round % 5 == 0});
    const int32_t type = random.pick({TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16});
    const int32_t which = int32_t(random.integer(0, 1));
    const int head_dim = which == TQ_SIDE_K ? config.k.head_dim : config.v.head_dim;
    const int64_t count = random.chance(0.1) ? random.integer(300, 700) : random.integer(1, 40);
    std::vector<double> values;
    for (int64_t i = 0; i < count; ++i) {
      const double sigma = std::exp(random.uniform(-12, 9));
      for (int c = 0; c < head_dim; ++c) {
        // Small integers make sums exact and put coordinates right on thresholds.
        values.push_back(i % 3 == 0 ? double(random.integer(-3, 3)) : sigma * random.normal());
      }
      if (random.chance(0.05)) values[size_t(i * head_dim)] = std::nan("");
      if (random.chance(0.05)) std::fill_n(values.begin() + i * head_dim, head_dim, -0.0);
      if (random.chance(0.05)) std::fill_n(values.begin() + i * head_dim, head_dim, 1e-42);
      if (random.chance(0.05)) std::fill_n(values.begin() + i * head_dim, head_dim, 3e38);
    }
    const std::vector<uint8_t> input = encode_elements(values, type);
    const int32_t rotation = which == TQ_SIDE_K ? config.k.rotation : config.v.rotation;
    const bool exact = rotation != TQ_ROTATION_DENSE && rotation != TQ_ROTATION_CUSTOM;
    const int32_t out_type = exact ? random.pick({TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16}) : TQ_TYPE_F32;
    std::optional<Encoded> want;
    std::vector<double> want_decoded;
    for (const Target &target : targets()) {
      const bool cpu = target.device->kind() == TQ_DEVICE_CPU;
      if (!cpu && !exact) continue;  // another library multiplies there
      config.device = target.device->kind();
      config.simd = target.simd;
      config.threads = cpu ? int32_t(random.integer(1, 3)) : 0;
      INFO(target.name << " side " << which << " type " << type << ' ' << describe(config));
      const CodecPtr codec = make_codec(config);
      CHECK(info_of(codec.get()).simd == target.simd);
      const Encoded got = encode(target, codec.get(), which, input, type);
      // From the same bytes, so that a rotation's sums are all that may differ.
      const std::vector<double> decoded = decode(target, codec.get(), which, want ? *want : got, count, out_type);
      if (!want) {
        want = got;
        want_decoded = decoded;
        continue;
      }
      CHECK(got.codes == want->codes);
      CHECK(got.scales == want->scales);
      CHECK(std::memcmp(&got.faults, &want->faults, sizeof got.faults) == 0);
      bool same = true;
      for (int64_t i = 0; i < count; ++i) {
        double size = 0;
        for (int c = 0; c < head_dim; ++c) size = std::max(size, std::fabs(want_decoded[size_t(i * head_dim + c)]));
        for (int c = 0; c < head_dim; ++c) {
          const double a = decoded[size_t(i * head_dim + c)], b = want_decoded[size_t(i * head_dim + c)];
          // A Hadamard's sums have one order everywhere; a matrix product's may differ: head_dim roundings of 2^-24.
          same = same && (a == b || (!exact && std::fabs(a - b) <= head_dim * 0x1p-24 * size));
        }
      }
      CHECK(same);
    }
  }
}

TEST_CASE("fingerprints do not depend on the target") {
  for (int bits : {1, 2, 3, 4, 8, 16}) {
    std::optional<tq_codec_info> want;
    for (const Target &target : targets()) {
      const CodecPtr codec = make_codec(make_config(target, 96, bits, bits));
      const tq_codec_info info = info_of(codec.get());
      if (!want) want = info;
      CHECK(info.page_fingerprint == want->page_fingerprint);
      CHECK(info.tile_fingerprint == want->tile_fingerprint);
      CHECK(info.exact_fingerprint == want->exact_fingerprint);
    }
  }
}

TEST_CASE("attention over the same pages agrees between targets") {
  FRESH(random, "simd attention");
  for (int round = 0; round < 40; ++round) {
    const std::unique_ptr<Scenario> scenario =
        random_scenario(random.bits(), targets().front(), {.config = {.max_head_dim = 160, .allow_matrices = false}});
    const AttentionRun want = scenario->run_on(targets().front());
    REQUIRE(want.status == TQ_OK);
    const oracle::Attention reference = expected(*scenario->reader, scenario->call);
    for (const Target &target : targets()) {
      if (target.device->kind() != TQ_DEVICE_CPU) continue;
      tq_config config = scenario->config;
      config.simd = target.simd;
      INFO(target.name << " round " << round << ' ' << scenario->describe());
      const CodecPtr codec = make_codec(config);
      const AttentionRun got = run(target, codec.get(), scenario->call, scenario->reader->v.head_dim);
      REQUIRE(got.status == TQ_OK);
      check_attention(got, reference, scenario->call.args.out_type,
                      attention_tolerance(target, scenario->call.args.out_type));
      CHECK(std::memcmp(&got.faults, &want.faults, sizeof got.faults) == 0);
    }
  }
}

TEST_CASE("automatic choice is a target of this machine, named by tq_build_info") {
  if (targets().back().device->kind() != TQ_DEVICE_CPU) return;  // not all of this machine's are listed then
  tq_build build = {};
  build.struct_size = sizeof build;
  REQUIRE(tq_build_info(&build) == TQ_OK);
  REQUIRE(build.simd_target != nullptr);
  REQUIRE(build.simd_targets != nullptr);
  CHECK(std::string(build.simd_targets).find(build.simd_target) != std::string::npos);
  tq_config config = make_config(targets().front(), 64, 4, 4);
  config.simd = TQ_SIMD_AUTO;
  const int32_t chosen = info_of(make_codec(config).get()).simd;
  CHECK(chosen == targets().back().simd);
}
