// SPDX-License-Identifier: Apache-2.0
// What the tests of tq_plan share: the golden configs, and a call that checks what holds for every call.
#pragma once

#include <tqkv/tqkv.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "catch.hpp"

namespace plan_test {

using Json = nlohmann::json;

inline const std::map<std::string, std::string> &golden_configs() {
  static const std::map<std::string, std::string> configs = [] {
    std::map<std::string, std::string> result;
    const auto directory = std::filesystem::path(__FILE__).parent_path().parent_path() / "golden" / "configs";
    for (const auto &entry : std::filesystem::directory_iterator(directory)) {
      std::ifstream file(entry.path(), std::ios::binary);
      result[entry.path().stem().string()] = {std::istreambuf_iterator<char>(file), {}};
    }
    return result;
  }();
  return configs;
}

inline std::string golden(const std::string &name) {
  return golden_configs().at(name);
}

struct Plan {
  tq_status status;
  tq_plan_result result;
  Json json;
  std::string error;
};

inline tq_plan_args plan_args(const std::string &text, const char *preset, int64_t context, int64_t batch = 0) {
  tq_plan_args args = {};
  args.struct_size = sizeof args;
  args.config_json = text.data();
  args.config_json_bytes = text.size();
  args.preset = preset;
  args.context_tokens = context;
  args.batch = batch;
  return args;
}

// Calls tq_plan twice, for the size of the JSON and for its text, on poisoned outputs. A failed call must leave them
// alone and say why; the JSON of a successful one must hold the numbers of the struct.
inline Plan plan(const tq_plan_args &args) {
  Plan plan = {};
  tq_plan_result poisoned;
  std::memset(&poisoned, 0xa5, sizeof poisoned);
  poisoned.struct_size = sizeof poisoned;
  plan.result = poisoned;
  size_t bytes = 0;
  plan.status = tq_plan(&args, &plan.result, nullptr, 0, &bytes);
  if (plan.status != TQ_OK) {
    plan.error = tq_last_error();
    REQUIRE(!plan.error.empty());
    REQUIRE(std::memcmp(&plan.result, &poisoned, sizeof poisoned) == 0);
    return plan;
  }
  std::string text(bytes + 8, '\x5a');
  REQUIRE(tq_plan(&args, &plan.result, text.data(), bytes, &bytes) == TQ_OK);
  REQUIRE(std::strlen(text.c_str()) + 1 == bytes);
  REQUIRE(text.substr(bytes) == std::string(8, '\x5a'));
  plan.json = Json::parse(text.c_str());

  const tq_plan_result &r = plan.result;
  REQUIRE(r.struct_size == sizeof r);
  const std::map<const char *, int64_t> fields = {{"kv_layers", r.kv_layers},
                                                  {"full_layers", r.full_layers},
                                                  {"window_layers", r.window_layers},
                                                  {"shared_layers", r.shared_layers},
                                                  {"uncached_layers", r.uncached_layers},
                                                  {"context_tokens", r.context_tokens},
                                                  {"batch", r.batch},
                                                  {"bytes_per_token", r.bytes_per_token},
                                                  {"bytes_per_sequence", r.bytes_per_sequence},
                                                  {"exact_bytes_per_sequence", r.exact_bytes_per_sequence},
                                                  {"padding_bytes_per_sequence", r.padding_bytes_per_sequence},
                                                  {"workspace_bytes", r.workspace_bytes},
                                                  {"total_bytes", r.total_bytes},
                                                  {"max_context_tokens", r.max_context_tokens},
                                                  {"max_batch", r.max_batch}};
  for (const auto &[name, value] : fields) {
    INFO(name);
    REQUIRE(plan.json.at(name).get<int64_t>() == value);
    REQUIRE(value >= 0);
  }
  REQUIRE(r.kv_layers == r.full_layers + r.window_layers);
  REQUIRE(r.total_bytes == r.batch * r.bytes_per_sequence + r.workspace_bytes);
  return plan;
}

inline Plan plan(const std::string &text, const char *preset, int64_t context, int64_t batch = 0) {
  return plan(plan_args(text, preset, context, batch));
}

}  // namespace plan_test
