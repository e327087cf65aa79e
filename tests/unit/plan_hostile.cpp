// SPDX-License-Identifier: Apache-2.0
// Arguments and configs that are wrong: each gives its status and a sentence that names the field.
#include <cstdint>
#include <random>

#include "plan_test.hpp"

using namespace plan_test;

namespace {

// The config of a plain model with some fields replaced.
std::string with(Json fields) {
  Json json = {{"model_type", "llama"},    {"num_hidden_layers", 4}, {"num_attention_heads", 8},
               {"num_key_value_heads", 2}, {"hidden_size", 1024},    {"max_position_embeddings", 4096}};
  json.update(fields);
  return json.dump();
}

std::string without(const char *name) {
  Json json = Json::parse(with(Json::object()));
  json.erase(name);
  return json.dump();
}

void refuses(const std::string &text, tq_status status, const std::string &word, const char *preset = "safe") {
  INFO(text);
  const Plan p = plan(text, preset, 0);
  INFO(p.error);
  CHECK(p.status == status);
  CHECK(p.error.find(word) != std::string::npos);
}

}  // namespace

TEST_CASE("plan: the base of these tests is a good config") {
  REQUIRE(plan(with(Json::object()), "safe", 0).status == TQ_OK);
}

TEST_CASE("plan: texts that are not JSON") {
  const std::string good = with(Json::object());
  refuses("", TQ_ERROR_PARSE, "JSON");
  refuses(" ", TQ_ERROR_PARSE, "JSON");
  refuses("[]", TQ_ERROR_PARSE, "object");
  refuses("null", TQ_ERROR_PARSE, "object");
  refuses("17", TQ_ERROR_PARSE, "object");
  refuses(good + "x", TQ_ERROR_PARSE, "JSON");
  refuses(std::string("\0{}", 3), TQ_ERROR_PARSE, "JSON");
  refuses("{\"model_type\":\"\xff\xfe\"}", TQ_ERROR_PARSE, "UTF-8");
  refuses("{\"model_type\":\"\xed\xa0\x80\"}", TQ_ERROR_PARSE, "UTF-8");
  refuses("{\"num_hidden_layers\":1e999}", TQ_ERROR_PARSE, "JSON");
  refuses("{\"num_hidden_layers\":NaN}", TQ_ERROR_PARSE, "JSON");
  for (size_t length = 0; length < good.size(); ++length) {
    INFO(length);
    CHECK(plan(good.substr(0, length), "safe", 0).status == TQ_ERROR_PARSE);
  }
  refuses(std::string(100000, '['), TQ_ERROR_PARSE, "nested");
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += "{\"text_config\":";
  refuses(deep, TQ_ERROR_PARSE, "nested");
  refuses("{\"hidden_size\":1,\"hidden_size\":2}", TQ_ERROR_PARSE, "hidden_size");
  refuses("{\"rope_scaling\":{\"factor\":1,\"factor\":1}}", TQ_ERROR_PARSE, "factor");
}

TEST_CASE("plan: fields of a wrong type or size") {
  const std::vector<Json> wrong = {-1,
                                   0,
                                   1.5,
                                   32.0,
                                   "32",
                                   true,
                                   Json::array(),
                                   Json::object(),
                                   1e308,
                                   -1e308,
                                   INT64_MAX,
                                   UINT64_MAX,
                                   INT64_MIN,
                                   "",
                                   Json::parse("100000000000000000000000")};
  for (const char *field : {"num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                            "hidden_size", "max_position_embeddings", "v_head_dim"}) {
    for (const Json &value : wrong) refuses(with({{field, value}}), TQ_ERROR_PARSE, field);
  }
  for (const Json &value : wrong) {
    if (value == 0) continue;  // these may be off
    refuses(with({{"num_kv_shared_layers", value}}), TQ_ERROR_PARSE, "num_kv_shared_layers");
    refuses(with({{"sliding_window", value}}), TQ_ERROR_PARSE, "sliding_window");
    refuses(with({{"kv_lora_rank", value}}), TQ_ERROR_PARSE, "kv_lora_rank");
  }
  for (const Json &value : wrong) {
    if (!value.is_boolean()) refuses(with({{"is_encoder_decoder", value}}), TQ_ERROR_PARSE, "is_encoder_decoder");
    if (!value.is_boolean()) refuses(with({{"multi_query", value}}), TQ_ERROR_PARSE, "multi_query");
    if (!value.is_string()) refuses(with({{"model_type", value}}), TQ_ERROR_PARSE, "model_type");
    if (!value.is_object()) refuses(with({{"text_config", value}}), TQ_ERROR_PARSE, "text_config");
    if (!value.is_object()) refuses(with({{"attn_config", value}}), TQ_ERROR_PARSE, "attn_config");
    if (!value.is_object()) refuses(with({{"per_layer_config", value}}), TQ_ERROR_PARSE, "per_layer_config");
    refuses(with({{"layer_types", value}}), TQ_ERROR_PARSE, "layer_types");
    refuses(with({{"block_types", value}}), TQ_ERROR_PARSE, "block_types");
    refuses(with({{"hybrid_override_pattern", value}}), TQ_ERROR_PARSE, "hybrid_override_pattern");
    refuses(with({{"attn_type_list", value}}), TQ_ERROR_PARSE, "attn_type_list");
  }
  for (const char *field : {"num_hidden_layers", "num_attention_heads", "max_position_embeddings"}) {
    refuses(without(field), TQ_ERROR_PARSE, field);
    refuses(with({{field, nullptr}}), TQ_ERROR_PARSE, field);
  }
  refuses(without("hidden_size"), TQ_ERROR_PARSE, "hidden_size");
  // num_key_value_heads may be missing: then every query head has its own.
  CHECK(plan(without("num_key_value_heads"), "bf16", 0).result.bytes_per_token == 4 * 8 * 512);

  refuses(with({{"hidden_size", 1023}}), TQ_ERROR_PARSE, "head_dim");
  refuses(with({{"num_key_value_heads", 3}}), TQ_ERROR_PARSE, "num_key_value_heads");
  refuses(with({{"num_key_value_heads", 1025}}), TQ_ERROR_PARSE, "num_key_value_heads");
  refuses(with({{"num_key_value_heads", {2, 2, 2}}}), TQ_ERROR_PARSE, "num_key_value_heads");
  refuses(with({{"num_key_value_heads", {2, 2, "2", 2}}}), TQ_ERROR_PARSE, "num_key_value_heads[2]");
  CHECK(plan(with({{"num_key_value_heads", {1, 2, 4, 8}}}), "bf16", 0).result.bytes_per_token == 15 * 512);
}

TEST_CASE("plan: structures of layers") {
  const char *full = "full_attention", *window = "sliding_attention";
  refuses(with({{"layer_types", {full, full, full}}}), TQ_ERROR_PARSE, "layer_types");
  refuses(with({{"layer_types", {full, full, full, full, full}}}), TQ_ERROR_PARSE, "layer_types");
  refuses(with({{"layer_types", {full, full, 3, full}}}), TQ_ERROR_PARSE, "layer_types[2]");
  refuses(with({{"layer_types", {full, full, nullptr, full}}}), TQ_ERROR_PARSE, "layer_types[2]");
  refuses(with({{"layer_types", {full, full, full, "psychic"}}}), TQ_ERROR_NOT_SUPPORTED, "psychic");
  refuses(with({{"layer_types", {full, full, full, std::string(100000, 'x')}}}), TQ_ERROR_NOT_SUPPORTED,
          "layer_types[3]");
  refuses(with({{"layer_types", {full, window, full, full}}}), TQ_ERROR_PARSE, "sliding_window");
  refuses(with({{"layer_types", {full, "chunked_attention", full, full}}}), TQ_ERROR_PARSE, "attention_chunk_size");
  refuses(with({{"layer_types", {"mamba", "mamba", "conv", "mlp"}}}), TQ_ERROR_NOT_SUPPORTED, "no layer");
  refuses(with({{"hybrid_override_pattern", "M-*"}}), TQ_ERROR_PARSE, "hybrid_override_pattern");
  refuses(with({{"hybrid_override_pattern", "M-*?"}}), TQ_ERROR_NOT_SUPPORTED, "hybrid_override_pattern[3]");
  refuses(with({{"attn_layer_indices", {0, 4}}}), TQ_ERROR_PARSE, "attn_layer_indices[1]");
  refuses(with({{"attn_layer_period", 2}, {"attn_layer_offset", 2}}), TQ_ERROR_PARSE, "attn_layer_offset");
  refuses(with({{"num_kv_shared_layers", 4}}), TQ_ERROR_NOT_SUPPORTED, "num_kv_shared_layers");
  refuses(with({{"num_kv_shared_layers", 5}}), TQ_ERROR_PARSE, "num_kv_shared_layers");
  refuses(with({{"layer_types", {full, full, full, window}}, {"sliding_window", 8}, {"num_kv_shared_layers", 1}}),
          TQ_ERROR_NOT_SUPPORTED, "num_kv_shared_layers");
  // What the config does not say is not guessed.
  refuses(with({{"sliding_window", 512}}), TQ_ERROR_NOT_SUPPORTED, "layer_types");
  refuses(with({{"sliding_window", 512}, {"sliding_window_pattern", "LLLG"}}), TQ_ERROR_NOT_SUPPORTED, "layer_types");
  refuses(with({{"mamba_d_state", 16}}), TQ_ERROR_NOT_SUPPORTED, "mamba_d_state");
  for (const char *field : {"block_configs", "hybrid_layer_pattern", "attention_other_setting", "swa_head_dim",
                            "cross_attention_layers", "linear_attn_config", "compress_ratios"}) {
    refuses(with({{field, {1, 2}}}), TQ_ERROR_NOT_SUPPORTED, field);
  }
  refuses(with({{"per_layer_config", {{"4", Json::object()}}}}), TQ_ERROR_PARSE, "per_layer_config");
  refuses(with({{"per_layer_config", {{"one", Json::object()}}}}), TQ_ERROR_PARSE, "per_layer_config");
  refuses(with({{"per_layer_config", {{"1", {{"head_dim", "wide"}}}}}}), TQ_ERROR_PARSE, "per_layer_config.1.head_dim");
  refuses(with({{"per_layer_config", {{"1", {{"skip", {"attention"}}}}}}}), TQ_ERROR_NOT_SUPPORTED, "skip");
  refuses(with({{"text_config", Json::object()}}), TQ_ERROR_PARSE, "text_config.num_hidden_layers");
  refuses(with({{"text_config", {{"num_hidden_layers", "x"}}}}), TQ_ERROR_PARSE, "text_config.num_hidden_layers");
}

TEST_CASE("plan: head sizes that no codec takes are planned for bf16 and fp8 only") {
  // no multiple of 16; over 576; 176 = 11 * 16 and 416 = 13 * 32 have no Hadamard matrix
  for (const int head_dim : {8, 72, 120, 592, 176, 416}) {
    const std::string text = with({{"head_dim", head_dim}});
    refuses(text, TQ_ERROR_NOT_SUPPORTED, "head_dim", "k4v4");
    CHECK(plan(text, "bf16", 0).result.bytes_per_token == 4 * 2 * 4 * head_dim);
    CHECK(plan(text, "fp8", 0).result.bytes_per_token == 4 * 2 * 2 * head_dim);
  }
  // raw pages need no Hadamard matrix, but steps of 16
  CHECK(plan(with({{"head_dim", 176}}), "raw", 0).status == TQ_OK);
  refuses(with({{"head_dim", 120}}), TQ_ERROR_NOT_SUPPORTED, "head_dim", "raw");
  refuses(with({{"head_dim", 128}, {"v_head_dim", 40}}), TQ_ERROR_NOT_SUPPORTED, "head_dim", "safe");
}

TEST_CASE("plan: arguments out of range") {
  const std::string text = with(Json::object());
  const tq_plan_args good = plan_args(text, "safe", 100);
  const auto refuses_args = [](const tq_plan_args &args, tq_status status, const char *word) {
    const Plan p = plan(args);
    INFO(p.error);
    CHECK(p.status == status);
    CHECK(p.error.find(word) != std::string::npos);
  };
  tq_plan_args args = good;
  args.config_json = nullptr;
  refuses_args(args, TQ_ERROR_NULL_POINTER, "config_json");
  args = good;
  args.preset = "k5v5";
  refuses_args(args, TQ_ERROR_INVALID_ARGUMENT, "k5v5");
  for (const int block : {-16, -1, 2, 12, 24, 257, 272, INT32_MIN, INT32_MAX}) {
    args = good;
    args.block_size_tokens = block;
    refuses_args(args, TQ_ERROR_INVALID_ARGUMENT, "block_size_tokens");
  }
  struct Range {
    int64_t tq_plan_args::*field;
    const char *name;
    bool int32;
  };
  for (const Range &range :
       {Range{&tq_plan_args::context_tokens, "context_tokens", true}, Range{&tq_plan_args::batch, "batch", true},
        Range{&tq_plan_args::memory_bytes, "memory_bytes", false},
        Range{&tq_plan_args::exact_first_tokens, "exact_first_tokens", true},
        Range{&tq_plan_args::exact_recent_tokens, "exact_recent_tokens", true}}) {
    for (const int64_t value : {int64_t{-1}, INT64_MIN, int64_t{INT32_MAX} + 1, INT64_MAX}) {
      if (value > 0 && !range.int32) continue;
      args = good;
      args.*range.field = value;
      refuses_args(args, TQ_ERROR_INVALID_ARGUMENT, range.name);
    }
  }
  args = good;
  args.struct_size = sizeof args - 1;
  refuses_args(args, TQ_ERROR_STRUCT_SIZE, "struct_size");

  // A struct of a later version is fine if what is new is zero.
  struct {
    tq_plan_args args;
    int64_t later;
  } longer = {good, 0};
  longer.args.struct_size = sizeof longer;
  CHECK(plan(longer.args).status == TQ_OK);
  longer.later = 1;
  CHECK(plan(longer.args).status == TQ_ERROR_RESERVED_NOT_ZERO);

  tq_plan_result result = {};
  CHECK(tq_plan(nullptr, &result, nullptr, 0, nullptr) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_plan(&good, nullptr, nullptr, 0, nullptr) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_plan(&good, &result, nullptr, 0, nullptr) == TQ_ERROR_STRUCT_SIZE);
}

TEST_CASE("plan: a JSON buffer that is too small stays as it was") {
  const std::string text = with(Json::object());
  const tq_plan_args args = plan_args(text, "safe", 100);
  tq_plan_result result = {};
  result.struct_size = sizeof result;
  size_t needed = 0;
  REQUIRE(tq_plan(&args, &result, nullptr, 0, &needed) == TQ_OK);
  for (const size_t capacity : {size_t{0}, size_t{1}, needed - 1}) {
    std::string buffer(needed, '\x5a');
    tq_plan_result untouched = {};
    untouched.struct_size = sizeof untouched;
    size_t bytes = 0;
    CHECK(tq_plan(&args, &untouched, buffer.data(), capacity, &bytes) == TQ_ERROR_INVALID_ARGUMENT);
    CHECK(std::string(tq_last_error()).find("json_capacity") != std::string::npos);
    CHECK(bytes == needed);
    CHECK(buffer == std::string(needed, '\x5a'));
    CHECK(untouched.kv_layers == 0);
  }
}

TEST_CASE("plan: sizes beyond 63 bits are an overflow, not a small number") {
  const std::string text = with({{"num_hidden_layers", 65536},
                                 {"num_key_value_heads", 1024},
                                 {"head_dim", 65536},
                                 {"num_attention_heads", 65536}});
  const Plan p = plan(text, "bf16", INT32_MAX, INT32_MAX);
  CHECK(p.status == TQ_ERROR_OVERFLOW);
  // One sequence of one token of the same model is fine: 65536 layers * 1024 heads * 4 * 65536 bytes = 2^44 a token.
  CHECK(plan(text, "bf16", 1, 1).result.bytes_per_token == int64_t{1} << 44);
  // A search over sizes that overflow ends below them, whatever the limit.
  tq_plan_args args = plan_args(text, "bf16", 1, 1);
  args.memory_bytes = INT64_MAX;
  const Plan search = plan(args);
  REQUIRE(search.status == TQ_OK);
  CHECK(search.result.max_context_tokens > 0);
  CHECK(search.result.max_context_tokens <= (int64_t{1} << 19));
}

TEST_CASE("plan: 20000 mutated configs crash nothing") {
  std::mt19937_64 random(tqkv_test::seed());
  const auto below = [&](size_t n) { return size_t(random() % n); };
  std::vector<std::string> texts;
  for (const auto &[name, text] : golden_configs()) texts.push_back(text);
  const std::vector<std::string> tokens = {"{",
                                           "}",
                                           "[",
                                           "]",
                                           ",",
                                           ":",
                                           "\"",
                                           "null",
                                           "true",
                                           "-1",
                                           "0",
                                           "1.5",
                                           "1e308",
                                           "1e999",
                                           "\\u0000",
                                           "\xff",
                                           "99999",
                                           "false",
                                           "\"\"",
                                           "2147483648",
                                           "9223372036854775807",
                                           "18446744073709551616",
                                           "\"full_attention\"",
                                           "[1,2]",
                                           "{\"a\":0}",
                                           "text_config",
                                           "layer_types",
                                           "sliding_window",
                                           "head_dim",
                                           "kv_lora_rank"};
  const char *presets[] = {"safe", "k3v2", "raw", "bf16", "fp8", "nonsense"};
  int planned = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string text = texts[below(texts.size())];
    for (size_t edits = 1 + below(4); edits > 0; --edits) {
      const size_t at = below(text.size() + 1), length = std::min(below(24), text.size() - at);
      switch (below(8)) {
        case 0:  // a byte
          if (at < text.size()) text[at] = char(random());
          break;
        case 1:
          text.resize(at);
          break;
        case 2:
          text.insert(at, tokens[below(tokens.size())]);
          break;
        case 3:
          text.erase(at, length);
          break;
        case 4:
          text.insert(at, text.substr(below(text.size() + 1), below(200)));
          break;
        default: {  // a value, so that most texts stay JSON
          size_t begin = text.find(": ", at);
          if (begin == std::string::npos) break;
          begin += 2;
          const size_t end = text.find_first_of(",\n}", begin);
          if (end != std::string::npos) text.replace(begin, end - begin, tokens[below(tokens.size())]);
        }
      }
      if (text.empty()) text = " ";
    }
    tq_plan_args args = plan_args(text, presets[below(6)], int64_t(below(3)) * 1000, int64_t(below(3)));
    args.memory_bytes = below(2) == 0 ? 0 : int64_t(random() >> (1 + below(60)));
    const Plan p = plan(args);
    INFO(text);
    CAPTURE(p.error);
    const bool known = p.status == TQ_OK || p.status == TQ_ERROR_PARSE || p.status == TQ_ERROR_NOT_SUPPORTED ||
                       p.status == TQ_ERROR_INVALID_ARGUMENT || p.status == TQ_ERROR_OVERFLOW;
    REQUIRE(known);
    planned += p.status == TQ_OK;
  }
  // Otherwise the mutations no longer reach what is behind the parser.
  CHECK(planned > 500);
}
