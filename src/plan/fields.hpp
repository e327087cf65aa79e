// SPDX-License-Identifier: Apache-2.0
// Fields of a config.json: read with their type and range, or refused in a sentence that names them.
#pragma once

#include <tqkv/tqkv.h>

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace tqkv {

using Json = nlohmann::json;
using Names = std::initializer_list<const char *>;

// Parses a text whose top level is an object. Errors: PARSE, also for duplicate keys and deep nesting.
[[nodiscard]] tq_status parse_json(std::string_view text, Json *json);

// A value as an error sentence shows it: short, printable ASCII.
std::string shown(const Json &value);

// A field that was found, with its whole name: "text_config.head_dim".
struct Field {
  std::string name;
  const Json *value = nullptr;
  explicit operator bool() const { return value != nullptr; }
  std::string at(size_t i) const { return name + "[" + std::to_string(i) + "]"; }
};

// An object of the config and what its fields' names begin with.
struct Object {
  const Json *json;
  std::string path;

  // The first of these fields that is there. One that is null counts as absent.
  Field find(Names names) const;
  bool has(const char *name) const { return bool(find({name})); }
};

// "config_json: NAME must be WHAT, it is VALUE"
[[nodiscard]] tq_status wrong(const std::string &name, const char *what, const Json &value);
[[nodiscard]] tq_status missing(const Object &object, const char *name);

[[nodiscard]] tq_status check_integer(const std::string &name, const Json &value, int64_t low, int64_t high,
                                      int64_t *out);
// An array with one entry for each of `length` layers.
[[nodiscard]] tq_status check_list(const Field &field, size_t length);
[[nodiscard]] tq_status check_object(const Field &field, Object *out);

// These leave *out alone where the field is absent.
[[nodiscard]] tq_status read_integer(const Object &object, Names names, int64_t low, int64_t high, int64_t *out);
[[nodiscard]] tq_status read_bool(const Object &object, const char *name, bool *out);
[[nodiscard]] tq_status read_string(const Object &object, const char *name, std::string *out);
// One integer for all layers, or an array with one for each; *out has the number of layers.
[[nodiscard]] tq_status read_per_layer(const Object &object, Names names, int64_t low, int64_t high,
                                       std::vector<int64_t> *out);

}  // namespace tqkv
