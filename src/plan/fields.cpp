// SPDX-License-Identifier: Apache-2.0
#include "plan/fields.hpp"

#include <algorithm>
#include <set>

#include "runtime/error.hpp"

namespace tqkv {
namespace {

// First pass over the text: syntax, nesting, and duplicate keys, of which the second pass would silently keep one.
class SyntaxCheck : public nlohmann::json_sax<Json> {
 public:
  tq_status status = TQ_OK;

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t &) override { return true; }
  bool string(string_t &) override { return true; }
  bool binary(binary_t &) override { return true; }
  bool start_object(std::size_t) override { return push(); }
  bool end_object() override { return pop(); }
  bool start_array(std::size_t) override { return push(); }
  bool end_array() override { return pop(); }
  bool key(string_t &name) override {
    if (keys_.back().insert(name).second) return true;
    status = fail(TQ_ERROR_PARSE, "config_json: the field %s appears twice in one object", shown(Json(name)).c_str());
    return false;
  }
  bool parse_error(std::size_t position, const std::string &, const nlohmann::detail::exception &error) override {
    status = fail(TQ_ERROR_PARSE, "config_json is not JSON at byte %zu: %.300s", position, error.what());
    return false;
  }

 private:
  static constexpr size_t kMaxDepth = 64;

  bool push() {
    keys_.emplace_back();
    if (keys_.size() <= kMaxDepth) return true;
    status = fail(TQ_ERROR_PARSE, "config_json is nested deeper than %zu levels", kMaxDepth);
    return false;
  }
  bool pop() {
    keys_.pop_back();
    return true;
  }

  std::vector<std::set<std::string>> keys_;
};

}  // namespace

tq_status parse_json(std::string_view text, Json *json) {
  SyntaxCheck check;
  if (!Json::sax_parse(text.begin(), text.end(), &check)) return check.status;
  *json = Json::parse(text.begin(), text.end());
  if (json->is_object()) return TQ_OK;
  return fail(TQ_ERROR_PARSE, "config_json must be an object, it is %s", shown(*json).c_str());
}

std::string shown(const Json &value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array of " + std::to_string(value.size());
  std::string text = value.dump(-1, ' ', true);
  if (text.size() > 48) text = text.substr(0, 45) + "...";
  return text;
}

Field Object::find(Names names) const {
  for (const char *name : names) {
    const auto it = json->find(name);
    if (it != json->end() && !it->is_null()) return {path + name, &*it};
  }
  return {};
}

tq_status wrong(const std::string &name, const char *what, const Json &value) {
  return fail(TQ_ERROR_PARSE, "config_json: %s must be %s, it is %s", name.c_str(), what, shown(value).c_str());
}

tq_status missing(const Object &object, const char *name) {
  return fail(TQ_ERROR_PARSE, "config_json: %s%s is missing", object.path.c_str(), name);
}

tq_status check_integer(const std::string &name, const Json &value, int64_t low, int64_t high, int64_t *out) {
  const bool fits = value.is_number_unsigned() ? value.get<uint64_t>() <= uint64_t(high)
                                               : value.is_number_integer() && value.get<int64_t>() <= high;
  if (fits && value.get<int64_t>() >= low) {
    *out = value.get<int64_t>();
    return TQ_OK;
  }
  const std::string what = "a whole number from " + std::to_string(low) + " to " + std::to_string(high);
  return wrong(name, what.c_str(), value);
}

tq_status check_list(const Field &field, size_t length) {
  if (field.value->is_array() && field.value->size() == length) return TQ_OK;
  const std::string what = "an array with an entry for each of the " + std::to_string(length) + " layers";
  return wrong(field.name, what.c_str(), *field.value);
}

tq_status check_object(const Field &field, Object *out) {
  if (!field.value->is_object()) return wrong(field.name, "an object", *field.value);
  *out = {field.value, field.name + "."};
  return TQ_OK;
}

tq_status read_integer(const Object &object, Names names, int64_t low, int64_t high, int64_t *out) {
  const Field field = object.find(names);
  return field ? check_integer(field.name, *field.value, low, high, out) : TQ_OK;
}

tq_status read_bool(const Object &object, const char *name, bool *out) {
  const Field field = object.find({name});
  if (!field) return TQ_OK;
  if (!field.value->is_boolean()) return wrong(field.name, "true or false", *field.value);
  *out = field.value->get<bool>();
  return TQ_OK;
}

tq_status read_string(const Object &object, const char *name, std::string *out) {
  const Field field = object.find({name});
  if (!field) return TQ_OK;
  if (!field.value->is_string()) return wrong(field.name, "a string", *field.value);
  *out = field.value->get<std::string>();
  return TQ_OK;
}

tq_status read_per_layer(const Object &object, Names names, int64_t low, int64_t high, std::vector<int64_t> *out) {
  const Field field = object.find(names);
  if (!field) return TQ_OK;
  if (!field.value->is_array()) {
    int64_t value = 0;
    TQKV_TRY(check_integer(field.name, *field.value, low, high, &value));
    std::fill(out->begin(), out->end(), value);
    return TQ_OK;
  }
  TQKV_TRY(check_list(field, out->size()));
  for (size_t i = 0; i < out->size(); ++i) {
    TQKV_TRY(check_integer(field.at(i), (*field.value)[i], low, high, &(*out)[i]));
  }
  return TQ_OK;
}

}  // namespace tqkv
