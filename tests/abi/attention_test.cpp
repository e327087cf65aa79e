// SPDX-License-Identifier: Apache-2.0
// Attention over compressed pages against the double-precision oracle over the same pages.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "scenario.hpp"

namespace {

void check(const Target &target, const Scenario &scenario) {
  const AttentionRun got = scenario.run_on(target);
  INFO("status " << got.status << ' ' << (got.status == TQ_OK ? "" : tq_last_error()));
  REQUIRE(got.status == TQ_OK);
  check_attention(got, expected(*scenario.reader, scenario.call), scenario.call.args.out_type,
                  attention_tolerance(target, scenario.call.args.out_type));
}

void check_random(const char *salt, int rounds, const ScenarioLimits &limits) {
  FRESH(random, salt);
  for (const Target &target : targets()) {
    for (int round = 0; round < rounds; ++round) {
      const std::unique_ptr<Scenario> scenario = random_scenario(random.bits(), target, limits);
      INFO(target.name << " round " << round << ' ' << scenario->describe());
      check(target, *scenario);
    }
  }
}

// A plain call: one token a sequence, a table of consecutive blocks.
std::unique_ptr<Scenario> plain_scenario(Random &random, const Target &target, tq_config config, int q_heads,
                                         const std::vector<int32_t> &lengths, int64_t columns) {
  auto scenario = std::make_unique<Scenario>();
  Scenario &s = *scenario;
  s.config = config;
  s.codec = make_codec(config);
  s.info = info_of(s.codec.get());
  s.reader = std::make_unique<oracle::Codec>(s.config, s.info);
  const int64_t num_blocks = std::max<int64_t>(1, columns * int64_t(lengths.size()));
  s.pool = make_pool(random, *s.reader, s.info.page_fingerprint, false, num_blocks, PoolShape::kPacked);
  fill_pool(random, target, s, &s.pool);
  s.call.pool = &s.pool;
  s.call.lengths = lengths;
  for (int64_t i = 0; i < num_blocks; ++i) s.call.block_table.push_back(int32_t(i));
  tq_attention_args &args = s.call.args;
  args.q_heads = q_heads;
  args.q_type = args.out_type = TQ_TYPE_F32;
  args.num_tokens = int32_t(lengths.size());
  args.table_columns = columns;
  s.call.q = encode_elements(normals(random, int64_t(lengths.size()) * q_heads * s.reader->k.head_dim), TQ_TYPE_F32);
  return scenario;
}

}  // namespace

TEST_CASE("random calls with every feature equal the oracle") {
  check_random("attention random", 60, {.config = {.max_head_dim = 112}});
}

TEST_CASE("random calls of many rows at head_dim 128") {
  check_random("attention rows", 25, {.config = {.max_head_dim = 128, .allow_matrices = false, .many_rows = true}});
}

TEST_CASE("random calls at large and unequal head sizes") {
  check_random("attention dims", 8,
               {.config = {.max_head_dim = 576, .allow_matrices = false}, .max_seqs = 2, .max_blocks_of_16 = 6});
}

TEST_CASE("peaked logits") {
  check_random("attention peaked", 20, {.config = {.max_head_dim = 128}, .max_seqs = 3, .peak = 8});
}

TEST_CASE("long contexts", "[long]") {
  check_random("attention long", 6,
               {.config = {.max_head_dim = 128, .allow_matrices = false}, .max_seqs = 2, .max_blocks_of_16 = 512});
}

TEST_CASE("every pair of widths, plain decoding", "[slow]") {
  FRESH(random, "attention widths");
  for (const Target &target : targets()) {
    for (int bits_k : {1, 2, 3, 4, 8, 16}) {
      for (int bits_v : {1, 2, 3, 4, 8, 16}) {
        tq_config config = make_config(target, 128, bits_k, bits_v);
        config.kv_heads = 2;
        const auto scenario = plain_scenario(random, target, config, 8, {131, 16, 1}, 9);
        INFO(target.name << ' ' << scenario->describe());
        if (attends(target, config)) {
          check(target, *scenario);
        } else {
          CHECK(scenario->run_on(target).status == TQ_ERROR_NOT_SUPPORTED);
        }
      }
    }
  }
}

TEST_CASE("many sequences of unequal lengths") {
  FRESH(random, "attention batch");
  for (const Target &target : targets()) {
    tq_config config = make_config(target, 128, 8, 8);
    config.kv_heads = 4;
    const int64_t columns = 160;
    const auto scenario = plain_scenario(random, target, config, 16, {0}, columns);
    Scenario &s = *scenario;
    // With 132 multiprocessors more than two pairs of a sequence and a kv head for each; and one, several and many partial
    // results of a pair.
    s.call.lengths = {0, 300, 800, 2500};
    while (s.call.lengths.size() < 68) s.call.lengths.push_back(int32_t(std::pow(64, random.uniform(0, 1))));
    std::shuffle(s.call.lengths.begin(), s.call.lengths.end(), random.engine());
    const int64_t num_seqs = int64_t(s.call.lengths.size());
    s.call.block_table.resize(size_t(num_seqs * columns));
    for (int32_t &entry : s.call.block_table) entry = int32_t(random.integer(0, columns - 1));
    s.call.args.num_tokens = int32_t(num_seqs);
    s.call.q = encode_elements(normals(random, num_seqs * 16 * 128), TQ_TYPE_F32);
    INFO(target.name << ' ' << s.describe());
    check(target, s);
  }
}

TEST_CASE("head_dims that no kernel takes are refused by name") {
  FRESH(random, "attention refusals");
  for (const Target &target : targets()) {
    for (const auto &[k, v] : {std::pair{288, 64}, {64, 288}}) {
      tq_config config = make_config(target, k, 4, 16);
      config.v.head_dim = v;
      const auto scenario = plain_scenario(random, target, config, 2, {20}, 2);
      INFO(target.name << ' ' << scenario->describe());
      if (attends(target, config)) {
        check(target, *scenario);
      } else {
        CHECK(scenario->run_on(target).status == TQ_ERROR_NOT_SUPPORTED);
        CHECK(std::strstr(tq_last_error(), "head_dims up to 256") != nullptr);
      }
    }
  }
}

TEST_CASE("lengths around the edges, and bad ones") {
  FRESH(random, "attention lengths");
  for (const Target &target : targets()) {
    for (int block : {1, 8, 16, 64}) {
      tq_config config = make_config(target, 64, 4, 4);
      config.block_size_tokens = block;
      const int64_t columns = 3;
      const int32_t capacity = int32_t(3 * block);
      const std::vector<int32_t> lengths = {
          0, 1, block - 1, block, block + 1, capacity - 1, capacity, capacity + 1, -1, INT32_MIN, INT32_MAX};
      const auto scenario = plain_scenario(random, target, config, 3, lengths, columns);
      INFO(target.name << ' ' << scenario->describe());
      const AttentionRun got = scenario->run_on(target);
      REQUIRE(got.status == TQ_OK);
      const oracle::Attention want = expected(*scenario->reader, scenario->call);
      check_attention(got, want, TQ_TYPE_F32, attention_tolerance(target));
      CHECK(got.faults.count[TQ_FAULT_LENGTH] == 4);
      CHECK(TQ_FAULT_FIRST_KIND(got.faults.first) == TQ_FAULT_LENGTH);
      CHECK(TQ_FAULT_FIRST_INDEX(got.faults.first) == 7);
      // The others are what they are without any bad neighbour.
      Scenario alone;
      auto good = plain_scenario(random, target, config, 3, {1, 1}, columns);
      good->pool = scenario->pool;
      good->call.block_table.assign(scenario->call.block_table.begin() + 18, scenario->call.block_table.begin() + 21);
      good->call.lengths = {capacity};
      good->call.args.num_tokens = 1;
      good->call.q.assign(scenario->call.q.begin() + 6 * 3 * 64 * 4, scenario->call.q.begin() + 7 * 3 * 64 * 4);
      const AttentionRun single = good->run_on(target);
      REQUIRE(single.status == TQ_OK);
      // On CUDA weights are rounded to 16 bits, after a factor that depends on the keys before them: both calls are within
      // the tolerance of what is exact.
      const double most = target.device->kind() == TQ_DEVICE_CUDA ? 2 * attention_tolerance(target) : 1e-6;
      CHECK(relative_error(single.out, got.out.data() + 6 * 3 * 64) <= most);
    }
  }
}

TEST_CASE("nothing that a sequence does not see changes a bit of its output") {
  FRESH(random, "attention unseen");
  for (const Target &target : targets()) {
    for (int round = 0; round < 60; ++round) {
      const uint64_t seed = random.bits();
      const std::unique_ptr<Scenario> scenario = random_scenario(seed, target, {.config = {.max_head_dim = 96}});
      INFO(target.name << " round " << round << ' ' << scenario->describe());
      const AttentionRun clean = scenario->run_on(target);
      REQUIRE(clean.status == TQ_OK);
      spoil_unseen(random, expected(*scenario->reader, scenario->call), scenario.get());
      const AttentionRun spoiled = scenario->run_on(target);
      CHECK(same_bits(clean, spoiled));
      CHECK(std::memcmp(&clean.faults, &spoiled.faults, sizeof clean.faults) == 0);
    }
  }
}

TEST_CASE("the same call gives the same bits, whatever the threads") {
  FRESH(random, "attention threads");
  for (const Target &target : targets()) {
    for (int round = 0; round < 12; ++round) {
      const std::unique_ptr<Scenario> scenario = random_scenario(
          random.bits(), target, {.config = {.max_head_dim = 96, .allow_matrices = false}, .max_blocks_of_16 = 60});
      const AttentionRun first = scenario->run_on(target);
      CHECK(same_bits(first, scenario->run_on(target)));
      if (target.device->kind() == TQ_DEVICE_CUDA) continue;
      for (int threads : {1, 2, 5}) {
        tq_config config = scenario->config;
        config.threads = threads;
        scenario->codec = make_codec(config);
        CHECK(same_bits(first, scenario->run_on(target)));
      }
    }
  }
}

TEST_CASE("a fixed split size makes a sequence's bits independent of its neighbours") {
  FRESH(random, "attention split");
  for (const Target &target : targets()) {
    for (int round = 0; round < 10; ++round) {
      tq_config config = make_config(target, 64, random.pick({2, 3, 4}), random.pick({2, 3, 4}));
      config.kv_heads = 2;
      const int64_t columns = 20;
      std::vector<int32_t> lengths;
      for (int i = 0; i < 4; ++i) lengths.push_back(int32_t(random.integer(1, columns * 16)));
      const auto batch = plain_scenario(random, target, config, 6, lengths, columns);
      batch->call.args.split_tokens = int32_t(16 * random.integer(1, 8));
      const AttentionRun all = batch->run_on(target);
      REQUIRE(all.status == TQ_OK);
      check_attention(all, expected(*batch->reader, batch->call), TQ_TYPE_F32, attention_tolerance(target));
      const size_t which = size_t(random.integer(0, 3)), row_bytes = 6 * 64 * 4;
      Scenario &s = *batch;
      s.call.lengths = {lengths[which]};
      s.call.block_table.assign(s.call.block_table.begin() + std::ptrdiff_t(which) * columns,
                                s.call.block_table.begin() + std::ptrdiff_t(which + 1) * columns);
      s.call.q.assign(s.call.q.begin() + std::ptrdiff_t(which * row_bytes),
                      s.call.q.begin() + std::ptrdiff_t((which + 1) * row_bytes));
      s.call.args.num_tokens = 1;
      const AttentionRun alone = s.run_on(target);
      REQUIRE(alone.status == TQ_OK);
      INFO(target.name << ' ' << batch->describe());
      CHECK(std::memcmp(alone.raw_out.data(), all.raw_out.data() + which * row_bytes, row_bytes) == 0);
      CHECK(std::memcmp(alone.lse.data(), all.lse.data() + which * 6, 6 * sizeof(float)) == 0);
      // Nor does the bound on lengths or a wider table matter.
      s.call.args.max_length_tokens = lengths[which] + int32_t(random.integer(0, 500));
      const AttentionRun bounded = s.run_on(target);
      REQUIRE(bounded.status == TQ_OK);
      CHECK(same_bits(alone, bounded));
    }
  }
}

TEST_CASE("without a fixed split size neighbours change at most rounding") {
  FRESH(random, "attention neighbours");
  for (const Target &target : targets()) {
    tq_config config = make_config(target, 64, 4, 4);
    const int64_t columns = 150;  // more keys than one automatic split
    const auto batch = plain_scenario(random, target, config, 4, {2400, 7, 1500}, columns);
    const AttentionRun all = batch->run_on(target);
    Scenario &s = *batch;
    s.call.lengths = {2400};
    s.call.block_table.resize(size_t(columns));
    s.call.q.resize(4 * 64 * 4);
    s.call.args.num_tokens = 1;
    s.call.args.table_columns = columns;
    const AttentionRun alone = s.run_on(target);
    INFO(target.name);
    // As above.
    const double most = target.device->kind() == TQ_DEVICE_CUDA ? 2 * attention_tolerance(target) : 1e-6;
    CHECK(relative_error(alone.out, all.out.data()) <= most);
  }
}

TEST_CASE("the key offset restores the original logits") {
  FRESH(random, "attention offset");
  for (const Target &target : targets()) {
    // Keys with one huge constant channel, which one Hadamard round would turn into a flat large vector.
    tq_config config = make_config(target, 128, 4, 4);
    config.kv_heads = 2;
    const auto scenario = plain_scenario(random, target, config, 4, {100}, 7);
    Scenario &s = *scenario;
    std::vector<double> k = normals(random, 112 * 2 * 128), v = normals(random, 112 * 2 * 128);
    std::vector<float> offset(2 * 128, 0.0f);
    offset[5] = 300, offset[128 + 99] = -200;
    for (size_t i = 0; i < k.size(); ++i) k[i] += offset[i % 256];
    const auto error_with = [&](bool with_offset) {
      StoreCall call;
      call.pool = &s.pool;
      for (int64_t i = 0; i < 112; ++i) call.slots.push_back(i);
      call.k = encode_elements(k, TQ_TYPE_F32), call.v = encode_elements(v, TQ_TYPE_F32);
      if (with_offset) call.key_offset = offset;
      REQUIRE(store(target, s.codec.get(), &call) == TQ_OK);
      s.call.key_offset = with_offset ? offset : std::vector<float>();
      const AttentionRun got = s.run_on(target);
      REQUIRE(got.status == TQ_OK);
      check_attention(got, expected(*s.reader, s.call), TQ_TYPE_F32, attention_tolerance(target));
      // Exact attention over the original keys and values.
      const oracle::Loader original = [&](bool, int32_t side, int64_t slot, int head) {
        const std::vector<double> &source = side == TQ_SIDE_K ? k : v;
        oracle::Vector row(source.begin() + (slot * 2 + head) * 128, source.begin() + (slot * 2 + head + 1) * 128);
        for (int c = 0; c < 128 && side == TQ_SIDE_K && with_offset; ++c)
          row[size_t(c)] -= offset[size_t(head * 128 + c)];
        return row;
      };
      const oracle::Attention exact = expected(*s.reader, s.call, original);
      return relative_error(exact.out, got.out.data());
    };
    const double with = error_with(true), without = error_with(false);
    INFO(target.name << " relative error " << with << " with, " << without << " without");
    CHECK(with < 0.3);
    CHECK(without > 2 * with);
  }
}

TEST_CASE("exact pages: keys in range are read raw, all others coded") {
  FRESH(random, "attention exact");
  for (const Target &target : targets()) {
    // Two-bit codes and a raw copy differ so much that one key from the wrong place shows.
    tq_config config = make_config(target, 64, 2, 2);
    config.exact_block_size_tokens = 8;
    for (int round = 0; round < 10; ++round) {
      const int32_t length = int32_t(random.integer(1, 160));
      const auto scenario = plain_scenario(random, target, config, 2, {length}, 10);
      Scenario &s = *scenario;
      s.exact = make_pool(random, *s.reader, s.info.exact_fingerprint, true, 6, PoolShape::kPacked);
      fill_pool(random, target, s, &s.exact);
      s.call.exact_pool = &s.exact;
      s.call.args.exact_columns = 20;
      for (int i = 0; i < 20; ++i) s.call.exact_table.push_back(i == 0 ? 5 : i % 5);  // a ring of 40 tokens
      s.call.args.exact_first_tokens = int32_t(random.integer(0, 5));
      s.call.args.exact_recent_tokens = int32_t(random.integer(0, 32));
      INFO(target.name << ' ' << s.describe());
      check(target, s);
      if (length > 48) {
        CHECK(expected(*s.reader, s.call).exact_slots.size() ==
              size_t(s.call.args.exact_first_tokens + s.call.args.exact_recent_tokens));
      }
    }
  }
}

TEST_CASE("prefill: the call's own tokens read raw equal causal attention over them") {
  FRESH(random, "attention prefill");
  for (const Target &target : targets()) {
    tq_config config = make_config(target, 64, 4, 3);
    config.kv_heads = 2;
    for (int chunk : {1, 7, 16, 40}) {
      const int32_t past = int32_t(random.pick({0, 5, 33}));
      const auto scenario = plain_scenario(random, target, config, 4, {past + chunk}, 3);
      Scenario &s = *scenario;
      s.call.args.flags = TQ_ATTENTION_CAUSAL;
      s.call.cu_seqlens = {0, chunk};
      s.call.args.num_tokens = chunk;
      s.call.q = encode_elements(normals(random, int64_t(chunk) * 4 * 64), TQ_TYPE_F32);
      s.call.k_new = encode_elements(normals(random, int64_t(chunk) * 2 * 64), TQ_TYPE_F32);
      s.call.v_new = encode_elements(normals(random, int64_t(chunk) * 2 * 64), TQ_TYPE_F32);
      INFO(target.name << ' ' << s.describe());
      check(target, s);
    }
  }
}

TEST_CASE("many rows: chunks over codes and raw pages") {
  FRESH(random, "attention chunks");
  struct Chunk {
    int bits_k, bits_v, head_dim, q_len;
    bool with_new;
  };
  for (const Target &target : targets()) {
    for (const Chunk &chunk : {Chunk{4, 4, 128, 130, true},
                               {16, 16, 128, 40, true},
                               {3, 2, 64, 300, false},
                               {8, 1, 80, 70, true},
                               {1, 16, 112, 40, true},
                               {16, 3, 192, 40, false},
                               {2, 8, 256, 37, true}}) {
      tq_config config = make_config(target, chunk.head_dim, chunk.bits_k, chunk.bits_v);
      config.block_size_tokens = random.pick({1, 8, 16, 64});
      config.exact_block_size_tokens = 16;
      const int32_t past = int32_t(random.integer(1, 200)), length = past + chunk.q_len;
      const int64_t columns = (length + 15) / config.block_size_tokens + 1;
      const int group = chunk.q_len > 100 ? 1 : 5;
      const auto scenario = plain_scenario(random, target, config, group, {length, 9, 77}, columns);
      Scenario &s = *scenario;
      tq_attention_args &args = s.call.args;
      args.flags = random.chance(0.8) ? TQ_ATTENTION_CAUSAL : 0;
      args.q_type = random.pick({TQ_TYPE_F16, TQ_TYPE_BF16, TQ_TYPE_F32});
      args.out_type = random.pick({TQ_TYPE_F16, TQ_TYPE_BF16, TQ_TYPE_F32});
      s.call.cu_seqlens = {0, chunk.q_len, chunk.q_len + 1, chunk.q_len + 4};
      args.num_tokens = chunk.q_len + 4;
      if (random.chance(0.5)) args.window_tokens = int32_t(random.integer(1, length));
      if (random.chance(0.3)) args.soft_cap = 20;
      if (random.chance(0.3)) args.scale = -0.1f;
      if (random.chance(0.3)) args.split_tokens = 64;
      if (random.chance(0.3)) {
        for (int i = 0; i < args.num_tokens; ++i) s.call.q_positions.push_back(int32_t(random.integer(-2, length)));
      }
      s.call.q = encode_elements(normals(random, int64_t{args.num_tokens} * group * chunk.head_dim), args.q_type);
      if (chunk.with_new) {
        s.call.k_new = encode_elements(normals(random, int64_t{args.num_tokens} * chunk.head_dim), args.q_type);
        s.call.v_new = encode_elements(normals(random, int64_t{args.num_tokens} * chunk.head_dim), args.q_type);
      }
      if (random.chance(0.4)) {
        s.exact = make_pool(random, *s.reader, s.info.exact_fingerprint, true, 6, PoolShape::kPacked);
        fill_pool(random, target, s, &s.exact);
        s.call.exact_pool = &s.exact;
        args.exact_columns = length / 16 + 1;
        for (int64_t i = 0; i < 3 * args.exact_columns; ++i) s.call.exact_table.push_back(int32_t(i % 6));
        args.exact_first_tokens = int32_t(random.integer(0, 20));
        args.exact_recent_tokens = int32_t(random.integer(0, 50));
      }
      INFO(target.name << ' ' << s.describe());
      check(target, s);
      const AttentionRun clean = s.run_on(target);
      spoil_unseen(random, expected(*s.reader, s.call), &s);
      CHECK(same_bits(clean, s.run_on(target)));
    }
  }
}

TEST_CASE("a value that is no number changes the rows that see it") {
  FRESH(random, "attention values");
  for (const Target &target : targets()) {
    for (int bits : {4, 16}) {
      tq_config config = make_config(target, 64, bits, bits);
      const int32_t past = 21, chunk = 40, bad = 17;
      const auto scenario = plain_scenario(random, target, config, 2, {past + chunk}, 4);
      Scenario &s = *scenario;
      s.call.args.flags = TQ_ATTENTION_CAUSAL;
      s.call.args.q_type = TQ_TYPE_BF16;
      s.call.cu_seqlens = {0, chunk};
      s.call.args.num_tokens = chunk;
      s.call.q = encode_elements(normals(random, int64_t{chunk} * 2 * 64), TQ_TYPE_BF16);
      s.call.k_new = encode_elements(normals(random, int64_t{chunk} * 64), TQ_TYPE_BF16);
      s.call.v_new = encode_elements(normals(random, int64_t{chunk} * 64), TQ_TYPE_BF16);
      const AttentionRun clean = s.run_on(target);
      for (int c = 3; c < 64; c += 7) s.call.v_new[size_t(2 * (bad * 64 + c) + 1)] = 0xff;  // with 0x80 and more: NaN
      for (int c = 3; c < 64; c += 7) s.call.v_new[size_t(2 * (bad * 64 + c))] = 0xff;
      const AttentionRun got = s.run_on(target);
      INFO(target.name << ' ' << s.describe());
      for (int row = 0; row < 2 * chunk; ++row) {
        for (int c = 0; c < 64; ++c) {
          const double value = got.out[size_t(row * 64 + c)];
          if (row / 2 < bad || c % 7 != 3) {
            REQUIRE(value == clean.out[size_t(row * 64 + c)]);
          } else {
            REQUIRE(std::isnan(value));
          }
        }
      }
    }
  }
}

TEST_CASE("bad row offsets, and queries or lengths over their bounds, cost only their own sequence") {
  FRESH(random, "attention offsets");
  for (const Target &target : targets()) {
    const auto fresh = [&] {
      auto scenario = plain_scenario(random, target, make_config(target, 64, 4, 4), 2, {20, 30, 40, 10}, 3);
      scenario->call.cu_seqlens = {0, 2, 3, 5, 6};
      scenario->call.args.num_tokens = 7;
      scenario->call.q = encode_elements(normals(random, 7 * 2 * 64), TQ_TYPE_F32);
      return scenario;
    };
    const auto check_fault = [&](const Scenario &s, uint64_t count, int64_t first) {
      INFO(target.name << ' ' << s.describe());
      check(target, s);
      const AttentionRun got = s.run_on(target);
      CHECK(got.faults.count[TQ_FAULT_LENGTH] == count);
      CHECK(TQ_FAULT_FIRST_KIND(got.faults.first) == TQ_FAULT_LENGTH);
      CHECK(TQ_FAULT_FIRST_INDEX(got.faults.first) == first);
    };
    // A sequence whose rows are unknown is not written: the oracle marks its rows as untouched.
    for (const std::vector<int32_t> &offsets : {std::vector<int32_t>{0, 2, 1, 5, 6},
                                                {0, 2, 3, 5, 8},
                                                {0, 2, 3, INT32_MAX, 6},
                                                {-1, 2, 3, 5, 6},
                                                {INT32_MIN, 2, 3, 5, 6},
                                                {0, INT32_MIN, 3, 5, 6}}) {
      auto s = fresh();
      s->call.cu_seqlens = offsets;
      INFO(s->describe());
      const AttentionRun got = s->run_on(target);
      REQUIRE(got.status == TQ_OK);
      check_attention(got, expected(*s->reader, s->call), TQ_TYPE_F32, attention_tolerance(target));
      CHECK(got.faults.count[TQ_FAULT_LENGTH] >= 1);
    }
    auto s = fresh();
    s->call.args.max_q_len = 1;  // sequences 0 and 2 have two queries
    check_fault(*s, 2, 0);
    s = fresh();
    s->call.args.max_length_tokens = 35;
    check_fault(*s, 1, 2);
    s = fresh();
    s->call.block_indptr = {0, 3, 6, 5, 12};  // sequence 2 goes backwards, its start is still inside
    s->call.block_indices = s->call.block_table;
    s->call.args.table_columns = 0;
    check_fault(*s, 1, 2);
    for (const std::vector<int32_t> &indptr :
         {std::vector<int32_t>{0, 3, 6, 9, 13}, {-1, 3, 6, 9, 12}, {0, 3, 6, 9, INT32_MAX}}) {
      s->call.block_indptr = indptr;
      check_fault(*s, 1, indptr[0] < 0 ? 0 : 3);
    }
    s = fresh();
    s->call.k_new = encode_elements(normals(random, 7 * 64), TQ_TYPE_F32);
    s->call.v_new = encode_elements(normals(random, 7 * 64), TQ_TYPE_F32);
    s->call.lengths[2] = 1;  // its call brings two tokens
    check_fault(*s, 1, 2);
  }
}

TEST_CASE("faults are optional") {
  FRESH(random, "attention no faults");
  const Target &target = targets().front();
  if (target.device->kind() != TQ_DEVICE_CPU) return;
  auto s = plain_scenario(random, target, make_config(target, 64, 4, 4), 2, {20, -1, 17}, 2);
  s->call.block_table[5] = 99;
  const AttentionRun counted = s->run_on(target);
  CHECK(counted.faults.count[TQ_FAULT_LENGTH] == 1);
  CHECK(counted.faults.count[TQ_FAULT_BLOCK] == 1);
  tq_pages pages, exact;
  tq_attention_args args = s->call.host_args(&pages, &exact);
  std::vector<float> out(3 * 2 * 64, std::nanf(""));
  args.out = out.data();
  size_t bytes = 0;
  REQUIRE(tq_attention_workspace(s->codec.get(), &args, &bytes) == TQ_OK);
  const Bytes workspace(*target.device, bytes);
  args.workspace = workspace.data();
  args.workspace_bytes = bytes;
  REQUIRE(tq_paged_attention(s->codec.get(), &args) == TQ_OK);
  CHECK(std::memcmp(out.data(), counted.raw_out.data(), out.size() * sizeof(float)) == 0);
}

TEST_CASE("an empty batch is no work") {
  FRESH(random, "attention empty");
  for (const Target &target : targets()) {
    const auto scenario = plain_scenario(random, target, make_config(target, 64, 4, 4), 2, {}, 4);
    const AttentionRun got = scenario->run_on(target);
    INFO(tq_last_error());
    CHECK(got.status == TQ_OK);
  }
}

TEST_CASE("log-sum-exp is optional and changes nothing") {
  FRESH(random, "attention lse");
  for (const Target &target : targets()) {
    const auto scenario = plain_scenario(random, target, make_config(target, 64, 4, 4), 2, {40, 3}, 4);
    const AttentionRun with = run(target, scenario->codec.get(), scenario->call, 64, true);
    const AttentionRun without = run(target, scenario->codec.get(), scenario->call, 64, false);
    CHECK(with.raw_out == without.raw_out);
    for (float value : without.lse) CHECK(std::isnan(value));
  }
}

TEST_CASE("a call made a thousand times has the lengths and tables of each time", "[slow]") {
  FRESH(random, "attention replays");
  const char *fewer = std::getenv("TQKV_TEST_CONFIGURATIONS");  // of the engine simulator, where all is slow
  const int times = fewer != nullptr ? 2 * std::atoi(fewer) : 1000;
  for (const Target &target : targets()) {
    tq_config config = make_config(target, 128, 4, random.pick({2, 3, 4}));
    config.kv_heads = 2;
    const int64_t columns = 160, num_seqs = 5;
    const auto scenario = plain_scenario(random, target, config, 8, std::vector<int32_t>(size_t(num_seqs), 0), columns);
    Scenario &s = *scenario;
    s.call.args.max_length_tokens = int32_t(columns * 16);
    if (random.chance(0.5)) s.call.args.split_tokens = 256;
    AttentionCaller caller(target, s.codec.get(), s.call, 128);
    for (int time = 0; time < times; ++time) {
      AttentionCall changed = s.call;
      for (int32_t &length : changed.lengths) {
        const double most = double(columns) * 16;
        length = random.pick({0, 1, int32_t(most), int32_t(std::pow(most, random.uniform(0, 1)))});
      }
      for (int32_t &entry : changed.block_table) entry = int32_t(random.integer(0, num_seqs * columns - 1));
      caller.change(changed.lengths, changed.block_table);
      const AttentionRun again = caller.run();
      INFO(target.name << " time " << time);
      CHECK(same_bits(again, run(target, s.codec.get(), changed, 128)));
      if (time % 100 == 0) {
        check_attention(again, expected(*s.reader, changed), TQ_TYPE_F32, attention_tolerance(target));
      }
    }
  }
}
