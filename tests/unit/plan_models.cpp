// SPDX-License-Identifier: Apache-2.0
// The plan of real models against numbers worked out by hand. K and V vectors of head_dim d at b bits take d*b/8 + 2
// bytes each; blocks have 16 tokens unless said otherwise; a table entry has 4 bytes.
#include "plan_test.hpp"

using namespace plan_test;

namespace {

struct Layers {
  int full, window, shared, uncached;
};

void check_layers(const Plan &plan, Layers layers) {
  REQUIRE(plan.status == TQ_OK);
  CHECK(plan.result.full_layers == layers.full);
  CHECK(plan.result.window_layers == layers.window);
  CHECK(plan.result.shared_layers == layers.shared);
  CHECK(plan.result.uncached_layers == layers.uncached);
}

}  // namespace

TEST_CASE("plan: Llama 3.1 8B, full attention in every layer") {
  // 32 layers, 8 kv heads, head_dim 4096/32 = 128.
  const std::string config = golden("llama-3.1-8b");
  const Plan safe = plan(config, nullptr, 8192);
  check_layers(safe, {32, 0, 0, 0});
  // 4 bits: 66 bytes a vector, 132 K + V, * 8 heads = 1056 a layer, * 32 = 33792 a token.
  CHECK(safe.result.bytes_per_token == 33792);
  // 8192 * 33792 = 276824064; table 512 * 4 = 2048.
  CHECK(safe.result.bytes_per_sequence == 276826112);
  CHECK(safe.result.padding_bytes_per_sequence == 0);
  CHECK(safe.result.exact_bytes_per_sequence == 0);
  CHECK(safe.json.at("model_type") == "llama");
  CHECK(safe.json.at("preset") == "safe");
  CHECK(safe.json.at("k_bits") == 4);
  CHECK(safe.json.at("v_bits") == 4);
  CHECK(safe.json.at("kv_heads") == 8);
  CHECK(safe.json.at("head_dim") == 128);
  CHECK(safe.json.at("bytes_per_token_and_layer") == 1056);
  CHECK(safe.json.at("assumed_fields").empty());

  // The tables of tqkv.h: bytes per token and head at head_dim 128, here * 8 * 32.
  for (const auto &[preset, bytes] : std::map<const char *, int>{{"k4v4", 132},
                                                                 {"k4v3", 116},
                                                                 {"balanced", 116},
                                                                 {"k3v3", 100},
                                                                 {"compact", 100},
                                                                 {"k4v2", 100},
                                                                 {"k3v2", 84},
                                                                 {"aggressive", 84},
                                                                 {"k2v2", 68},
                                                                 {"raw", 512},
                                                                 {"bf16", 512},
                                                                 {"fp8", 256}}) {
    INFO(preset);
    CHECK(plan(config, preset, 8192).result.bytes_per_token == bytes * 256);
  }

  // 8200 tokens: 513 blocks = 8208 tokens. 8208 * 33792 = 277364736, table 513 * 4 = 2052; padding 8 * 33792.
  const Plan odd = plan(config, "k4v4", 8200);
  CHECK(odd.result.bytes_per_sequence == 277366788);
  CHECK(odd.result.padding_bytes_per_sequence == 270336);

  // Exact tier: the first 4 tokens are 1 block, the last 128 a ring of 8 + 1: 160 tokens. Raw 8 * 2 * 256 = 4096 bytes a
  // token and layer: 160 * 4096 * 32 = 20971520, its table 2052.
  tq_plan_args args = plan_args(config, "k4v4", 8200, 3);
  args.exact_first_tokens = 4;
  args.exact_recent_tokens = 128;
  const Plan exact = plan(args);
  CHECK(exact.result.exact_bytes_per_sequence == 20973572);
  CHECK(exact.result.bytes_per_sequence == 277366788 + 20973572);
  CHECK(exact.result.padding_bytes_per_sequence == 270336);
  CHECK(exact.result.batch == 3);
  // Only first tokens: 1 block of 16 tokens and 1 table entry.
  args.exact_recent_tokens = 0;
  CHECK(plan(args).result.exact_bytes_per_sequence == 16 * 4096 * 32 + 4);
  // A short context holds no more exact blocks than it has: 20 tokens are 2, with 2 table entries.
  args.exact_recent_tokens = 128;
  args.context_tokens = 20;
  CHECK(plan(args).result.exact_bytes_per_sequence == 32 * 4096 * 32 + 8);
  // Layers stored raw have no second copy.
  for (const char *preset : {"raw", "bf16", "fp8"}) {
    args.preset = preset;
    CHECK(plan(args).result.exact_bytes_per_sequence == 0);
  }

  // max_position_embeddings is the default context: 131072 * 33792 = 4429185024, table 8192 * 4 = 32768.
  const Plan all = plan(config, "k4v4", 0);
  CHECK(all.result.context_tokens == 131072);
  CHECK(all.result.bytes_per_sequence == 4429217792);
}

TEST_CASE("plan: Gemma 2 9B alternates windows and full layers") {
  // 42 layers, even ones with a window of 4096; 8 kv heads, head_dim 256. k4v2: 130 + 66 = 196 a head, 1568 a layer.
  const Plan p = plan(golden("gemma-2-9b"), "k4v2", 0);
  check_layers(p, {21, 21, 0, 0});
  CHECK(p.result.context_tokens == 8192);
  CHECK(p.result.bytes_per_token == 1568 * 42);
  // full 8192 * 1568 * 21 = 269746176; windows (256 + 1) * 16 * 1568 * 21 = 135399936; two tables of 512 entries: 4096.
  CHECK(p.result.bytes_per_sequence == 269746176 + 135399936 + 4096);
  // the extra block: 16 * 1568 * 21
  CHECK(p.result.padding_bytes_per_sequence == 526848);
  CHECK(p.json.at("assumed_fields") == Json{"sliding_window_pattern"});
  // What the class's defaults say as well may be left out.
  Json json = Json::parse(golden("gemma-2-9b"));
  json.erase("sliding_window");
  json.erase("head_dim");
  const Plan assumed = plan(json.dump(), "k4v2", 0);
  REQUIRE(assumed.status == TQ_OK);
  CHECK(assumed.result.bytes_per_sequence == p.result.bytes_per_sequence);
  CHECK(assumed.json.at("assumed_fields") == Json{"head_dim", "sliding_window_pattern", "sliding_window"});
}

TEST_CASE("plan: Gemma 3 12B, nested config with omitted defaults") {
  // 48 layers, every sixth full (8), the others a window of 1024; 8 kv heads, head_dim 256 (not 3840 / 16).
  // k3v3: 98 + 98 = 196 a head, 1568 a layer. Blocks of 32: 10000 tokens are 313 blocks = 10016.
  const std::string config = golden("gemma-3-12b");
  tq_plan_args args = plan_args(config, "k3v3", 10000);
  args.block_size_tokens = 32;
  const Plan p = plan(args);
  check_layers(p, {8, 40, 0, 0});
  CHECK(p.result.bytes_per_token == 75264);
  // full 10016 * 1568 * 8 = 125640704; windows (32 + 1) * 32 * 1568 * 40 = 66232320; tables 2 * 313 * 4 = 2504.
  CHECK(p.result.bytes_per_sequence == 191875528);
  // full 16 * 1568 * 8 = 200704; windows 32 * 1568 * 40 = 2007040.
  CHECK(p.result.padding_bytes_per_sequence == 2207744);
  CHECK(p.json.at("model_type") == "gemma3_text");
  CHECK(p.json.at("head_dim") == 256);
  CHECK(plan(config, "k3v3", 0).result.context_tokens == 131072);
}

TEST_CASE("plan: Gemma 3n E4B shares the caches of its last 15 layers") {
  // Of 20 own layers every fifth is full (4), 16 have a window of 512; 2 kv heads, head_dim 256: 2 * 260 = 520 a layer.
  const Plan p = plan(golden("gemma-3n-e4b"), "safe", 4096);
  check_layers(p, {4, 16, 15, 0});
  CHECK(p.result.bytes_per_token == 20 * 520);
  // full 4096 * 520 * 4 = 8519680; windows (32 + 1) * 16 * 520 * 16 = 4392960; tables 2 * 256 * 4 = 2048.
  CHECK(p.result.bytes_per_sequence == 12914688);
}

TEST_CASE("plan: Gemma 4 31B, full layers of another shape") {
  // 50 windows of 1024 with 16 heads of 256: 16 * 260 = 4160; 10 full layers with 4 heads of 512: 4 * 2 * 258 = 2064.
  const std::string config = golden("gemma-4-31b");
  const Plan p = plan(config, "k4v4", 2048);
  check_layers(p, {10, 50, 0, 0});
  CHECK(p.result.bytes_per_token == 50 * 4160 + 10 * 2064);
  // windows (64 + 1) * 16 * 4160 * 50 = 216320000; full 2048 * 2064 * 10 = 42270720; tables 2 * 128 * 4 = 1024.
  CHECK(p.result.bytes_per_sequence == 258591744);

  // The same model as newer tools write it: a mapping of layers instead of the global fields.
  Json json = Json::parse(config);
  json["text_config"].erase("global_head_dim");
  json["text_config"].erase("num_global_key_value_heads");
  for (int i = 5; i < 60; i += 6) {
    const std::string key = i < 10 ? "0" + std::to_string(i) : std::to_string(i);
    json["text_config"]["per_layer_config"][key] = {{"head_dim", 512}, {"num_key_value_heads", 4}};
  }
  const Plan layered = plan(json.dump(), "k4v4", 2048);
  REQUIRE(layered.status == TQ_OK);
  CHECK(std::memcmp(&layered.result, &p.result, sizeof p.result) == 0);

  // Without attention_k_eq_v full layers keep the common number of heads: 16 * 516 = 8256.
  json = Json::parse(config);
  json["text_config"]["attention_k_eq_v"] = false;
  CHECK(plan(json.dump(), "k4v4", 2048).result.bytes_per_token == 50 * 4160 + 10 * 8256);
}

TEST_CASE("plan: Mistral 7B v0.1 has a window in every layer") {
  // 32 layers, 8 kv heads, head_dim 128. k2v2: 68 * 8 = 544 a layer. (256 + 1) * 16 * 544 * 32 = 71581696, one table of
  // 2048 entries: 8192.
  const std::string config = golden("mistral-7b-v0.1");
  const Plan p = plan(config, "k2v2", 0);
  check_layers(p, {0, 32, 0, 0});
  CHECK(p.result.context_tokens == 32768);
  CHECK(p.result.bytes_per_sequence == 71589888);
  // Below the window it is like any other: 63 blocks, 1008 * 544 * 32 = 17547264, table 252; padding 8 * 544 * 32.
  const Plan small = plan(config, "k2v2", 1000);
  CHECK(small.result.bytes_per_sequence == 17547516);
  CHECK(small.result.padding_bytes_per_sequence == 139264);
  // null means no window.
  Json json = Json::parse(config);
  json["sliding_window"] = nullptr;
  check_layers(plan(json.dump(), "k2v2", 0), {32, 0, 0, 0});
}

TEST_CASE("plan: gpt-oss-20b, windows of 128 and head_dim 64") {
  // 12 full and 12 windows; 8 kv heads: 2 * 34 * 8 = 544 a layer.
  const std::string config = golden("gpt-oss-20b");
  const Plan p = plan(config, "safe", 131072);
  check_layers(p, {12, 12, 0, 0});
  // full 131072 * 544 * 12 = 855638016; windows (8 + 1) * 16 * 544 * 12 = 940032; tables 2 * 8192 * 4 = 65536.
  CHECK(p.result.bytes_per_sequence == 856643584);
  // Exact: 1 + 8 + 1 blocks = 160 tokens of 8 * 2 * 128 = 2048 bytes in 24 layers: 7864320; two more tables: 65536. In
  // windows the ring is no longer than the window, which is 128 too.
  tq_plan_args args = plan_args(config, "safe", 131072);
  args.exact_first_tokens = 4;
  args.exact_recent_tokens = 128;
  CHECK(plan(args).result.exact_bytes_per_sequence == 7929856);
  // 1000 recent tokens: full 1 + 63 + 1 = 65 blocks, windows 1 + 8 + 1: (65 + 10) * 16 * 2048 * 12 = 29491200.
  args.exact_recent_tokens = 1000;
  CHECK(plan(args).result.exact_bytes_per_sequence == 29491200 + 65536);
}

TEST_CASE("plan: hybrid models cache attention layers only") {
  // Qwen3-Next: every fourth of 48 layers; 2 kv heads of 256. k4v3: (130 + 98) * 2 = 456 a layer.
  const Plan qwen = plan(golden("qwen3-next-80b"), "balanced", 0);
  check_layers(qwen, {12, 0, 0, 36});
  // 262144 * 456 * 12 = 1434451968, table 16384 * 4 = 65536.
  CHECK(qwen.result.bytes_per_sequence == 1434517504);
  // Jamba: layers 4, 12, 20, 28 of 32; Nemotron-H: 4 of 52 letters. Both 8 heads of 128: 1056 a layer.
  const Plan jamba = plan(golden("jamba-v0.1"), "safe", 16);
  check_layers(jamba, {4, 0, 0, 28});
  CHECK(jamba.result.bytes_per_token == 4 * 1056);
  const Plan nemotron = plan(golden("nemotron-h-8b"), "safe", 16);
  check_layers(nemotron, {4, 0, 0, 48});
  CHECK(nemotron.result.bytes_per_token == 4 * 1056);
}

TEST_CASE("plan: Phi-3 mini 4k, head_dim 96 and a window that is no multiple of the block") {
  // 32 windows of 2047; 32 kv heads of 3072 / 32 = 96. k3v2: 38 + 26 = 64 a head, 2048 a layer.
  const Plan p = plan(golden("phi-3-mini-4k"), "aggressive", 0);
  check_layers(p, {0, 32, 0, 0});
  // (128 + 1) * 16 * 2048 * 32 = 135266304, table 256 * 4 = 1024; padding (2064 - 2047) * 2048 * 32.
  CHECK(p.result.bytes_per_sequence == 135267328);
  CHECK(p.result.padding_bytes_per_sequence == 1114112);
}

TEST_CASE("plan: the names of older configs") {
  // GPT-2: n_layer 12, n_head 12, n_embd 768: 12 heads of 64. fp8: 2 * 64 * 12 * 12 = 18432 a token, table 64 * 4.
  const Plan gpt2 = plan(golden("gpt2"), "fp8", 0);
  check_layers(gpt2, {12, 0, 0, 0});
  CHECK(gpt2.result.bytes_per_sequence == 1024 * 18432 + 256);
  // Falcon 7B: one kv head of 4544 / 71 = 64 whatever num_kv_heads says: 68 * 32. The 40B has num_kv_heads 8: 8 * 68 * 60.
  CHECK(plan(golden("falcon-7b"), "safe", 2048).result.bytes_per_token == 2176);
  CHECK(plan(golden("falcon-40b"), "safe", 2048).result.bytes_per_token == 32640);
  // DBRX: n_layers 40, d_model 6144 / n_heads 48 = 128, attn_config.kv_n_heads 8.
  CHECK(plan(golden("dbrx"), "safe", 0).result.bytes_per_token == 1056 * 40);
  // Qwen2.5: use_sliding_window false switches the window off; 4 heads of 128 in 28 layers.
  const Plan qwen = plan(golden("qwen2.5-7b"), "safe", 0);
  check_layers(qwen, {28, 0, 0, 0});
  CHECK(qwen.result.bytes_per_token == 528 * 28);
  Json json = Json::parse(golden("qwen2.5-7b"));
  json["max_window_layers"] = 20;
  check_layers(plan(json.dump(), "safe", 0), {28, 0, 0, 0});
  json["layer_types"] = std::vector<std::string>(28, "sliding_attention");
  check_layers(plan(json.dump(), "safe", 0), {28, 0, 0, 0});
  json.erase("layer_types");
  json["use_sliding_window"] = true;
  check_layers(plan(json.dump(), "safe", 0), {20, 8, 0, 0});
  // Llama 4: chunks of 8192 but for every fourth layer.
  check_layers(plan(golden("llama-4-scout"), "safe", 16384), {12, 36, 0, 0});
}

TEST_CASE("plan: block sizes 1 and 8") {
  // Llama: 100 tokens in blocks of 8: 13 blocks, 104 * 33792 + 13 * 4. In blocks of 1 nothing is padded.
  tq_plan_args args = {};
  const std::string config = golden("llama-3.1-8b");
  args = plan_args(config, "k4v4", 100);
  args.block_size_tokens = 8;
  CHECK(plan(args).result.bytes_per_sequence == 104 * 33792 + 52);
  args.block_size_tokens = 1;
  const Plan p = plan(args);
  CHECK(p.result.bytes_per_sequence == 100 * 33792 + 400);
  CHECK(p.result.padding_bytes_per_sequence == 0);
}

TEST_CASE("plan: models that cannot be planned are refused by name") {
  const Plan mla = plan(golden("deepseek-v3"), "safe", 0);
  CHECK(mla.status == TQ_ERROR_NOT_SUPPORTED);
  CHECK(mla.error.find("deepseek_v3") != std::string::npos);
  CHECK(mla.error.find("MLA") != std::string::npos);
  const Plan t5 = plan(golden("t5-base"), "safe", 0);
  CHECK(t5.status == TQ_ERROR_NOT_SUPPORTED);
  CHECK(t5.error.find("t5") != std::string::npos);
  // Falcon's config does not say how long its context is.
  const Plan falcon = plan(golden("falcon-7b"), "safe", 0);
  CHECK(falcon.status == TQ_ERROR_PARSE);
  CHECK(falcon.error.find("max_position_embeddings") != std::string::npos);
}
