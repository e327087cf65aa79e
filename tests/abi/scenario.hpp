// SPDX-License-Identifier: Apache-2.0
// Random attention calls over random pages, with everything the interface offers.
#pragma once

#include "support.hpp"

struct ScenarioLimits {
  ConfigLimits config;
  int max_seqs = 5;
  int max_blocks_of_16 = 24;  // keys of the longest sequence, about
  bool faults = true;         // some sequences may have bad lengths or blocks
  double peak = 0;            // standard deviation of the logits; 0: drawn
};

struct Scenario {
  ConfigStorage storage;
  tq_config config{};
  CodecPtr codec;
  tq_codec_info info{};
  std::unique_ptr<oracle::Codec> reader;
  PoolImage pool, exact;
  AttentionCall call;

  std::string describe() const;
  AttentionRun run_on(const Target &target) const {
    return run(target, codec.get(), call, reader->v.head_dim, call.args.lse == nullptr);
  }
};

// A scenario on `target`'s device; `seed` decides all of it but the target.
std::unique_ptr<Scenario> random_scenario(uint64_t seed, const Target &target, const ScenarioLimits &limits = {});

// All slots of a pool stored with random tokens through tq_cache_store.
void fill_pool(Random &random, const Target &target, const Scenario &scenario, PoolImage *pool);

// Replaces each byte that the call must not read by 0xff, and each table entry that it must not look at by garbage.
void spoil_unseen(Random &random, const oracle::Attention &expected, Scenario *scenario);
