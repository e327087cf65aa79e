// SPDX-License-Identifier: Apache-2.0
// What every plan must satisfy, on random models: a slow model of the cache written for this test, the library's own
// page layout and workspace query, and the answers to "what fits" checked by planning them.
#include <algorithm>
#include <cstdint>
#include <random>
#include <set>

#include "plan_test.hpp"

using namespace plan_test;

namespace {

using Random = std::mt19937_64;

int64_t pick(Random &random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

template <class T>
T choose(Random &random, std::initializer_list<T> values) {
  return values.begin()[pick(random, 0, int64_t(values.size()) - 1)];
}

struct RandomModel {
  std::vector<std::string> kinds;
  int64_t window, q_heads, kv_heads, head_dim, shared;
  std::string text;
};

RandomModel random_model(Random &random) {
  RandomModel model;
  const int64_t layers = pick(random, 1, 40);
  for (int64_t i = 0; i < layers; ++i) {
    model.kinds.push_back(choose<std::string>(random, {"full_attention", "sliding_attention", "linear_attention"}));
  }
  model.kinds[0] = choose<std::string>(random, {"full_attention", "sliding_attention"});
  model.window = pick(random, 1, 700);
  model.kv_heads = pick(random, 1, 16);
  model.q_heads = model.kv_heads * pick(random, 1, 8);
  model.head_dim = choose<int64_t>(random, {16, 48, 64, 80, 96, 112, 128, 144, 160, 192, 256, 576});
  // Only trailing layers of the first one's kind may share.
  model.shared = 0;
  while (model.shared + 1 < layers && model.kinds[size_t(layers - 1 - model.shared)] == model.kinds[0]) ++model.shared;
  model.shared = pick(random, 0, model.shared);
  model.text = Json{{"model_type", "random"},
                    {"num_hidden_layers", layers},
                    {"num_attention_heads", model.q_heads},
                    {"num_key_value_heads", model.kv_heads},
                    {"head_dim", model.head_dim},
                    {"sliding_window", model.window},
                    {"layer_types", model.kinds},
                    {"num_kv_shared_layers", model.shared}}
                   .dump();
  return model;
}

// Blocks that the tokens (last - count, last] lie in, one token after the other.
int64_t count_blocks(int64_t last, int64_t count, int64_t block) {
  std::set<int64_t> blocks;
  for (int64_t token = std::max<int64_t>(0, last - count + 1); token <= last; ++token) blocks.insert(token / block);
  return int64_t(blocks.size());
}

// The most blocks that a layer ever needs at once while a sequence grows to `context` tokens.
int64_t most_blocks(int64_t context, int64_t visible, int64_t block) {
  int64_t most = 0;
  // the count repeats with the block, so the last positions show every case
  for (int64_t last = std::max<int64_t>(0, context - 2 * block); last < context; ++last) {
    most = std::max(most, count_blocks(last, visible, block));
  }
  return most;
}

int64_t side_bytes(int64_t head_dim, int bits) {
  return bits == 16 ? 2 * head_dim : head_dim * bits / 8 + 2;
}

struct Bits {
  const char *name;
  int k, v;
};
constexpr Bits kPresets[] = {{"k4v4", 4, 4}, {"k4v3", 4, 3}, {"k3v3", 3, 3}, {"k4v2", 4, 2},
                             {"k3v2", 3, 2}, {"k2v2", 2, 2}, {"raw", 16, 16}};

}  // namespace

TEST_CASE("plan: random models against a cache that is counted token by token") {
  Random random(tqkv_test::seed());
  for (int round = 0; round < 300; ++round) {
    const RandomModel model = random_model(random);
    const Bits preset = kPresets[pick(random, 0, 6)];
    const int64_t context = pick(random, 1, 1500);
    const int64_t block = choose<int64_t>(random, {1, 8, 16, 32, 48, 256});
    tq_plan_args args = plan_args(model.text, preset.name, context, pick(random, 1, 50));
    args.block_size_tokens = int32_t(block);
    args.exact_first_tokens = choose<int64_t>(random, {0, 1, 4, 16, 33});
    args.exact_recent_tokens = choose<int64_t>(random, {0, 1, 16, 100, 128});
    INFO(model.text << " " << preset.name << " context " << context << " block " << block);
    const Plan p = plan(args);
    REQUIRE(p.status == TQ_OK);

    const int64_t token =
        model.kv_heads * (side_bytes(model.head_dim, preset.k) + side_bytes(model.head_dim, preset.v));
    const int64_t raw_token = preset.k == 16 ? 0 : model.kv_heads * model.head_dim * 4;
    int64_t own = 0, least = 0, most = 0, padding_least = 0, padding_most = 0, exact_least = 0, exact_most = 0;
    std::set<std::string> tables;
    for (size_t i = 0; i < model.kinds.size() - size_t(model.shared); ++i) {
      if (model.kinds[i] == "linear_attention") continue;
      ++own;
      tables.insert(model.kinds[i]);
      const bool full = model.kinds[i] == "full_attention";
      const int64_t visible = full ? context : std::min(context, model.window);
      // A window may hold one block more than the tokens ever touch: those that leave and come in one step.
      const int64_t blocks = most_blocks(context, visible, block);
      const int64_t slack = full || context <= model.window ? 0 : 1;
      least += blocks * block * token;
      most += std::min(blocks + slack, (context + block - 1) / block) * block * token;
      padding_least += (blocks * block - visible) * token;
      padding_most += ((blocks + slack) * block - visible) * token;
      const int64_t recent = full ? args.exact_recent_tokens : std::min(args.exact_recent_tokens, model.window);
      const int64_t first = std::min(context, args.exact_first_tokens);
      const int64_t ring = recent == 0 ? 0 : most_blocks(context, recent, 16);
      exact_least += std::max((first + 15) / 16, ring) * 16 * raw_token;
      exact_most += ((args.exact_first_tokens + 15) / 16 + (recent == 0 ? 0 : ring + 1)) * 16 * raw_token;
    }
    const int64_t table_bytes = int64_t(tables.size()) * ((context + block - 1) / block) * 4;
    const int64_t exact_table_bytes = int64_t(tables.size()) * ((context + 15) / 16) * 4;
    CHECK(p.result.kv_layers == own);
    CHECK(p.result.shared_layers + p.result.uncached_layers + own == int64_t(model.kinds.size()));
    CHECK(p.result.bytes_per_token == own * token);
    const int64_t codes = p.result.bytes_per_sequence - p.result.exact_bytes_per_sequence - table_bytes;
    CHECK(codes >= least);
    CHECK(codes <= most);
    CHECK(p.result.padding_bytes_per_sequence >= padding_least);
    CHECK(p.result.padding_bytes_per_sequence <= padding_most);
    CHECK(p.result.exact_bytes_per_sequence >= exact_least);
    CHECK(p.result.exact_bytes_per_sequence <= exact_most + exact_table_bytes);
  }
}

TEST_CASE("plan: bytes and workspace are those of the library's pages and attention") {
  Random random(tqkv_test::seed());
  for (const Bits &preset : kPresets) {
    const RandomModel model = random_model(random);
    tq_config config;
    REQUIRE(tq_config_init(&config, sizeof config, preset.name) == TQ_OK);
    config.kv_heads = int32_t(model.kv_heads);
    config.k.head_dim = int32_t(model.head_dim);
    config.block_size_tokens = choose<int32_t>(random, {1, 8, 16, 64});
    config.threads = 1;
    tq_codec *codec = nullptr;
    REQUIRE(tq_create(&config, &codec) == TQ_OK);
    tq_layout layout = {};
    layout.struct_size = sizeof layout;
    REQUIRE(tq_page_layout(codec, TQ_PAGES_CODED, &layout) == TQ_OK);

    const int32_t batch = int32_t(pick(random, 1, 100));
    const int64_t context = pick(random, 1, 100000);
    tq_pages pages = {};
    pages.struct_size = sizeof pages;
    pages.fingerprint = layout.fingerprint;
    const int32_t table = 0;
    tq_attention_args attention = {};
    attention.struct_size = sizeof attention;
    attention.num_seqs = attention.num_tokens = batch;
    attention.q_heads = int32_t(model.q_heads);
    attention.q_type = attention.out_type = TQ_TYPE_F16;
    attention.pages = &pages;
    attention.block_table = &table;
    attention.table_columns = (context + config.block_size_tokens - 1) / config.block_size_tokens;
    size_t workspace = 0;
    REQUIRE(tq_attention_workspace(codec, &attention, &workspace) == TQ_OK);
    tq_destroy(codec);

    INFO(preset.name << " " << model.text);
    tq_plan_args args = plan_args(model.text, preset.name, context, batch);
    args.block_size_tokens = config.block_size_tokens;
    const Plan p = plan(args);
    REQUIRE(p.status == TQ_OK);
    CHECK(p.result.bytes_per_token == p.result.kv_layers * layout.bytes_per_token);
    CHECK(p.json.at("bytes_per_token_and_layer") == layout.bytes_per_token);
    CHECK(p.result.workspace_bytes == int64_t(workspace));
  }
}

TEST_CASE("plan: what is said to fit does, and one more does not") {
  Random random(tqkv_test::seed());
  std::vector<std::string> texts;
  for (const auto &[name, text] : golden_configs()) {
    if (name != "deepseek-v3" && name != "t5-base") texts.push_back(text);
  }
  for (int round = 0; round < 300; ++round) {
    const bool real = round % 2 == 0;
    const std::string text =
        real ? texts[size_t(pick(random, 0, int64_t(texts.size()) - 1))] : random_model(random).text;
    const char *preset = choose<const char *>(random, {"safe", "k3v2", "bf16", "fp8"});
    const int64_t context = pick(random, 1, 200000), batch = pick(random, 1, 300);
    tq_plan_args args = plan_args(text, preset, context, batch);
    args.block_size_tokens = choose<int32_t>(random, {1, 8, 16, 256});
    args.exact_recent_tokens = choose<int64_t>(random, {0, 128});
    args.memory_bytes = int64_t(std::exp2(std::uniform_real_distribution<>(10, 45)(random)));
    INFO(text << " " << preset << " context " << context << " batch " << batch << " block " << args.block_size_tokens
              << " memory " << args.memory_bytes);
    const Plan p = plan(args);
    REQUIRE(p.status == TQ_OK);

    const auto total = [&](int64_t tokens, int64_t sequences) {
      tq_plan_args other = args;
      other.memory_bytes = 0;
      other.context_tokens = tokens;
      other.batch = sequences;
      return plan(other).result.total_bytes;
    };
    const int64_t block = args.block_size_tokens;
    CHECK(p.result.max_context_tokens % block == 0);
    if (p.result.max_context_tokens > 0) CHECK(total(p.result.max_context_tokens, batch) <= args.memory_bytes);
    if (p.result.max_context_tokens + block <= INT32_MAX) {
      CHECK(total(p.result.max_context_tokens + block, batch) > args.memory_bytes);
    }
    if (p.result.max_batch > 0) CHECK(total(context, p.result.max_batch) <= args.memory_bytes);
    if (p.result.max_batch < INT32_MAX) CHECK(total(context, p.result.max_batch + 1) > args.memory_bytes);
    CHECK((p.result.max_batch >= batch) == (p.result.total_bytes <= args.memory_bytes));
  }
  // Without a limit nothing is said to fit.
  const Plan p = plan(texts[0], "safe", 4096);
  CHECK(p.result.max_context_tokens == 0);
  CHECK(p.result.max_batch == 0);
}

TEST_CASE("plan: a longer context never takes less, more bits never either") {
  Random random(tqkv_test::seed());
  for (int round = 0; round < 50; ++round) {
    const RandomModel model = random_model(random);
    int64_t before = 0;
    for (int64_t context = 1; context < 2000; context += pick(random, 1, 100)) {
      INFO(model.text << " context " << context);
      const Plan p = plan(model.text, "k3v3", context);
      CHECK(p.result.bytes_per_sequence >= before);
      before = p.result.bytes_per_sequence;
    }
    before = 0;
    for (const char *preset : {"k2v2", "k3v2", "k3v3", "k4v3", "k4v4", "fp8", "bf16"}) {
      INFO(model.text << " " << preset);
      const Plan p = plan(model.text, preset, 1000);
      CHECK(p.result.bytes_per_sequence >= before);
      before = p.result.bytes_per_sequence;
    }
  }
}
