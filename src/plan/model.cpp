// SPDX-License-Identifier: Apache-2.0
#include "plan/model.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "plan/fields.hpp"
#include "runtime/error.hpp"

namespace tqkv {
namespace {

constexpr int64_t kMaxLayers = 65536;
constexpr int64_t kMaxHeads = 65536;
constexpr int64_t kMaxKvHeads = 1024;
constexpr int64_t kMaxHeadDim = 65536;
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// ----------------------------------------------------------------------------------------------------- families --

// Published configs may leave out what equals the default of their configuration class. These are those defaults, for
// the classes where leaving them out is common and a generic rule would give a wrong cache. 0: no default.
struct Family {
  const char *model_type;
  int64_t q_heads = 0, kv_heads = 0, head_dim = 0, max_positions = 0;
  int64_t window_tokens = 0;
  bool all_window = false;      // no layer is full, if there is a window
  int64_t window_pattern = 0;   // every n-th layer is full, the others have the window
  int64_t linear_pattern = 0;   // every n-th layer is full, the others are linear attention
  int64_t shared_layers = 0;    // the last n layers
  int64_t global_head_dim = 0;  // of full layers
};

constexpr Family kFamilies[] = {
    {.model_type = "gemma", .head_dim = 256},
    {.model_type = "gemma2",
     .q_heads = 8,
     .kv_heads = 4,
     .head_dim = 256,
     .max_positions = 8192,
     .window_tokens = 4096,
     .window_pattern = 2},
    {.model_type = "gemma3_text",
     .q_heads = 8,
     .kv_heads = 4,
     .head_dim = 256,
     .max_positions = 131072,
     .window_tokens = 4096,
     .window_pattern = 6},
    {.model_type = "gemma3n_text",
     .q_heads = 8,
     .kv_heads = 2,
     .head_dim = 256,
     .max_positions = 32768,
     .window_tokens = 512,
     .window_pattern = 5,
     .shared_layers = 15},
    {.model_type = "gemma4_text",
     .q_heads = 8,
     .kv_heads = 4,
     .head_dim = 256,
     .max_positions = 131072,
     .window_tokens = 512,
     .window_pattern = 6,
     .global_head_dim = 512},
    {.model_type = "cohere2", .window_tokens = 4096, .window_pattern = 4},
    {.model_type = "gpt_oss", .head_dim = 64, .window_tokens = 128, .window_pattern = 2},
    {.model_type = "qwen3", .head_dim = 128},
    {.model_type = "qwen3_next", .head_dim = 256, .linear_pattern = 4},
    {.model_type = "qwen3_5_text", .head_dim = 256, .linear_pattern = 4},
    {.model_type = "qwen3_5_moe_text", .head_dim = 256, .linear_pattern = 4},
    {.model_type = "llama4_text", .head_dim = 128},
    {.model_type = "mistral", .all_window = true},
    {.model_type = "mixtral", .all_window = true},
    {.model_type = "phi3", .all_window = true},
    {.model_type = "phi3_v", .all_window = true},
    {.model_type = "phi4mm", .all_window = true},
    {.model_type = "phimoe", .all_window = true},
    {.model_type = "starcoder2", .all_window = true},
};

Family family_of(const std::string &model_type) {
  for (const Family &family : kFamilies) {
    if (model_type == family.model_type) return family;
  }
  return {.model_type = ""};
}

// --------------------------------------------------------------------------------------------------- the reader --

class Reader {
 public:
  Reader(Object object, Model *model) : object_(std::move(object)), model_(*model) {}

  tq_status read() {
    family_ = family_of(model_.model_type);
    TQKV_TRY(refuse_unknown());
    TQKV_TRY(read_layer_count());
    TQKV_TRY(read_shapes());
    TQKV_TRY(read_kinds());
    TQKV_TRY(read_global_shape());
    TQKV_TRY(read_layer_overrides());
    TQKV_TRY(read_shared());
    return check();
  }

 private:
  std::string type() const { return shown(Json(model_.model_type)); }

  // Takes the family's default and says so.
  int64_t assume(const char *name, int64_t value) {
    if (value != 0) model_.assumed.push_back(name);
    return value;
  }

  tq_status integer(const char *name, Names names, int64_t high, int64_t family_default, int64_t *out) {
    *out = 0;
    TQKV_TRY(read_integer(object_, names, 1, high, out));
    if (*out == 0) *out = assume(name, family_default);
    return TQ_OK;
  }

  tq_status refuse_unknown() {
    int64_t lora_rank = 0;
    TQKV_TRY(read_integer(object_, {"kv_lora_rank"}, 0, kMaxInt32, &lora_rank));
    if (lora_rank != 0) {
      return fail(TQ_ERROR_NOT_SUPPORTED,
                  "model_type %s uses multi-head latent attention (MLA: kv_lora_rank %lld), which is not "
                  "supported",
                  type().c_str(), (long long)lora_rank);
    }
    // Fields of models whose layers differ in ways that are not read here.
    for (const char *name :
         {"block_configs", "hybrid_layer_pattern", "attention_other_setting", "mb_per_layer", "swa_num_key_value_heads",
          "swa_head_dim", "compress_ratios", "linear_attn_config", "cross_attention_layers", "use_cla"}) {
      const Field field = object_.find({name});
      if (!field || (field.value->is_boolean() && !field.value->get<bool>()) ||
          (field.value->is_array() && field.value->empty())) {
        continue;
      }
      return fail(TQ_ERROR_NOT_SUPPORTED, "model_type %s has %s, a layer structure that is not supported",
                  type().c_str(), field.name.c_str());
    }
    return TQ_OK;
  }

  tq_status read_layer_count() {
    int64_t layers = 0;
    const Names names = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"};
    TQKV_TRY(read_integer(object_, names, 1, kMaxLayers, &layers));
    if (layers == 0) {
      const Field list = object_.find({"layer_types", "layers_block_type"});
      if (!list || !list.value->is_array() || list.value->empty() || list.value->size() > size_t(kMaxLayers)) {
        return missing(object_, "num_hidden_layers");
      }
      layers = int64_t(list.value->size());
    }
    model_.layers.resize(size_t(layers));
    return integer("max_position_embeddings",
                   {"max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length",
                    "n_ctx", "model_max_length"},
                   kMaxInt32, family_.max_positions, &model_.max_positions);
  }

  tq_status read_shapes() {
    const size_t n = model_.layers.size();
    std::vector<int64_t> q_heads(n), kv_heads(n);
    const Names q_names = {"num_attention_heads", "n_head", "n_heads", "num_heads"};
    TQKV_TRY(read_per_layer(object_, q_names, 1, kMaxHeads, &q_heads));
    if (q_heads[0] == 0) {
      const int64_t assumed = assume("num_attention_heads", family_.q_heads);
      if (assumed == 0) return missing(object_, "num_attention_heads");
      std::fill(q_heads.begin(), q_heads.end(), assumed);
    }
    TQKV_TRY(read_kv_heads(&kv_heads));
    if (kv_heads[0] == 0) {
      const int64_t assumed = assume("num_key_value_heads", family_.kv_heads);
      for (size_t i = 0; i < n; ++i) kv_heads[i] = assumed != 0 ? assumed : q_heads[i];
    }

    int64_t head_dim = 0;
    TQKV_TRY(integer("head_dim", {"head_dim", "kv_channels", "attention_head_dim"}, kMaxHeadDim, family_.head_dim,
                     &head_dim));
    if (head_dim == 0) {
      int64_t hidden = 0;
      TQKV_TRY(read_integer(object_, {"hidden_size", "n_embd", "d_model", "n_embed"}, 1, kMaxInt32, &hidden));
      const bool varies =
          std::any_of(q_heads.begin(), q_heads.end(), [&](int64_t heads) { return heads != q_heads[0]; });
      if (hidden == 0 || varies) return missing(object_, varies ? "head_dim" : "head_dim or hidden_size");
      if (hidden % q_heads[0] != 0 || hidden / q_heads[0] > kMaxHeadDim) {
        return fail(TQ_ERROR_PARSE,
                    "config_json: %shidden_size %lld divided by num_attention_heads %lld is no head_dim, and none is "
                    "given",
                    object_.path.c_str(), (long long)hidden, (long long)q_heads[0]);
      }
      head_dim = hidden / q_heads[0];
    }
    int64_t v_head_dim = head_dim;
    TQKV_TRY(read_integer(object_, {"v_head_dim"}, 1, kMaxHeadDim, &v_head_dim));

    for (size_t i = 0; i < n; ++i) {
      model_.layers[i] = {LayerKind::kFull, 0, q_heads[i], kv_heads[i], head_dim, v_head_dim};
    }
    return TQ_OK;
  }

  tq_status read_kv_heads(std::vector<int64_t> *kv_heads) {
    const std::string &family = model_.model_type;
    bool multi_query = family == "falcon" || family == "RefinedWebModel" || family == "gpt_bigcode";
    bool new_falcon = false;
    TQKV_TRY(read_bool(object_, "multi_query", &multi_query));
    TQKV_TRY(read_bool(object_, "new_decoder_architecture", &new_falcon));
    if (multi_query && !new_falcon) {
      std::fill(kv_heads->begin(), kv_heads->end(), 1);
      return TQ_OK;
    }
    bool grouped = false;
    TQKV_TRY(read_bool(object_, "multi_query_attention", &grouped));
    if (grouped) {
      if (!object_.has("multi_query_group_num")) return missing(object_, "multi_query_group_num");
      return read_per_layer(object_, {"multi_query_group_num"}, 1, kMaxKvHeads, kv_heads);
    }
    if (const Field field = object_.find({"attn_config"})) {
      Object attention;
      TQKV_TRY(check_object(field, &attention));
      std::string attn_type;
      int64_t window = 0;
      TQKV_TRY(read_string(attention, "attn_type", &attn_type));
      TQKV_TRY(read_integer(attention, {"sliding_window_size"}, -1, kMaxInt32, &window));
      if (window > 0) {
        return fail(TQ_ERROR_NOT_SUPPORTED, "model_type %s has %ssliding_window_size, which is not supported",
                    type().c_str(), attention.path.c_str());
      }
      if (attn_type == "multiquery_attention") {
        std::fill(kv_heads->begin(), kv_heads->end(), 1);
        return TQ_OK;
      }
      TQKV_TRY(read_per_layer(attention, {"kv_n_heads"}, 1, kMaxKvHeads, kv_heads));
    }
    return read_per_layer(
        object_, {"num_key_value_heads", "num_key_value_heads_per_layer", "num_kv_heads", "n_head_kv", "n_kv_heads"}, 1,
        kMaxKvHeads, kv_heads);
  }

  // ------------------------------------------------------------------------------------------- kinds of layers --

  tq_status read_windows() {
    TQKV_TRY(read_bool(object_, "use_sliding_window", &use_window_));
    TQKV_TRY(read_integer(object_, {"sliding_window", "attention_window_size", "window_size"}, 0, kMaxInt32, &window_));
    // null is a statement where absence is not: no window
    if (window_ == 0 && family_.window_tokens != 0 && !object_.json->contains("sliding_window")) {
      window_ = family_.window_tokens;
      window_assumed_ = true;
    }
    return read_integer(object_, {"attention_chunk_size"}, 1, kMaxInt32, &chunk_);
  }

  void set_window(size_t i, int64_t window) {
    model_.layers[i].kind = LayerKind::kWindow;
    model_.layers[i].window_tokens = window;
  }

  tq_status set_kind(size_t i, const std::string &where, const std::string &kind) {
    if (kind == "full_attention" || kind == "attention" || kind == "global" || kind == "hybrid") return TQ_OK;
    if (kind == "sliding_attention" || kind == "local") {
      if (!use_window_) return TQ_OK;
      if (window_ == 0) return missing(object_, "sliding_window");
      set_window(i, window_);
      return TQ_OK;
    }
    // A chunk is never longer than attention_chunk_size, so a window of that many tokens holds it.
    if (kind == "chunked_attention") {
      if (chunk_ == 0) return missing(object_, "attention_chunk_size");
      set_window(i, chunk_);
      return TQ_OK;
    }
    for (const char *uncached : {"linear_attention", "mamba", "mamba2", "recurrent", "conv", "mlp", "moe"}) {
      if (kind != uncached) continue;
      model_.layers[i].kind = LayerKind::kUncached;
      return TQ_OK;
    }
    return fail(TQ_ERROR_NOT_SUPPORTED, "config_json: %s is %s, a kind of layer that is not supported", where.c_str(),
                shown(Json(kind)).c_str());
  }

  tq_status read_kind_list(const Field &field, bool tiled) {
    const Json &list = *field.value;
    if (!tiled) TQKV_TRY(check_list(field, model_.layers.size()));
    if (!list.is_array() || list.empty()) return wrong(field.name, "an array that is not empty", list);
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      const size_t entry = i % list.size();
      const std::string where = field.at(entry);
      if (!list[entry].is_string()) return wrong(where, "a string", list[entry]);
      // Gemma's recurrent models call their windowed layers plain "attention".
      std::string kind = list[entry].get<std::string>();
      if (tiled && kind == "attention" && object_.has("attention_window_size")) kind = "sliding_attention";
      TQKV_TRY(set_kind(i, where, kind));
    }
    return TQ_OK;
  }

  // One letter a layer: M mamba, E experts, - MLP, * attention.
  tq_status read_letters(const Field &field) {
    const size_t n = model_.layers.size();
    if (!field.value->is_string() || field.value->get_ref<const std::string &>().size() != n) {
      const std::string what = "a string with a letter for each of the " + std::to_string(n) + " layers";
      return wrong(field.name, what.c_str(), *field.value);
    }
    const std::string &letters = field.value->get_ref<const std::string &>();
    for (size_t i = 0; i < n; ++i) {
      const char letter = letters[i];
      TQKV_TRY(set_kind(i, field.at(i),
                        letter == '*'                                     ? "attention"
                        : letter == 'M' || letter == 'E' || letter == '-' ? "mlp"
                                                                          : std::string(1, letter)));
    }
    return TQ_OK;
  }

  // Integers per layer: 1 means attention of the first kind, 0 of the second.
  tq_status read_flags(const Field &field, const char *one, const char *zero) {
    TQKV_TRY(check_list(field, model_.layers.size()));
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      int64_t flag = 0;
      TQKV_TRY(check_integer(field.at(i), (*field.value)[i], 0, 1, &flag));
      TQKV_TRY(set_kind(i, field.at(i), flag != 0 ? one : zero));
    }
    return TQ_OK;
  }

  // The listed layers have attention, the others none.
  tq_status read_indices(const Field &field) {
    if (!field.value->is_array()) return wrong(field.name, "an array", *field.value);
    for (Layer &layer : model_.layers) layer.kind = LayerKind::kUncached;
    for (size_t i = 0; i < field.value->size(); ++i) {
      int64_t index = 0;
      TQKV_TRY(check_integer(field.at(i), (*field.value)[i], 0, int64_t(model_.layers.size()) - 1, &index));
      model_.layers[size_t(index)].kind = LayerKind::kFull;
    }
    return TQ_OK;
  }

  // Layer i is full where i % period == offset, otherwise `other`.
  tq_status apply_period(int64_t period, int64_t offset, const char *other) {
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      if (int64_t(i) % period != offset) TQKV_TRY(set_kind(i, other, other));
    }
    return TQ_OK;
  }

  tq_status read_kinds() {
    TQKV_TRY(read_windows());
    if (const auto field = object_.find({"layer_types", "layers_block_type", "attention_layers"})) {
      return read_kind_list(field, false);
    }
    if (const auto field = object_.find({"block_types"})) return read_kind_list(field, true);
    if (const auto field = object_.find({"hybrid_override_pattern"})) return read_letters(field);
    if (const auto field = object_.find({"attn_type_list"})) return read_flags(field, "attention", "linear_attention");
    if (const auto field = object_.find({"attn_layer_indices", "full_attn_idxs"})) return read_indices(field);
    if (object_.has("attn_layer_period")) {
      int64_t period, offset = 0;
      TQKV_TRY(integer("attn_layer_period", {"attn_layer_period"}, kMaxLayers, 0, &period));
      TQKV_TRY(read_integer(object_, {"attn_layer_offset"}, 0, period - 1, &offset));
      return apply_period(period, offset, "mamba");
    }
    if (chunk_ != 0) {
      const auto field = object_.find({"no_rope_layers"});
      if (field && !(field.value->is_array() && field.value->empty())) {
        return read_flags(field, "chunked_attention", "attention");
      }
      int64_t interval = 4;
      TQKV_TRY(read_integer(object_, {"no_rope_layer_interval"}, 1, kMaxLayers, &interval));
      return apply_period(interval, interval - 1, "chunked_attention");
    }
    int64_t linear;
    TQKV_TRY(
        integer("full_attention_interval", {"full_attention_interval"}, kMaxLayers, family_.linear_pattern, &linear));
    if (linear != 0) return apply_period(linear, linear - 1, "linear_attention");
    TQKV_TRY(refuse_unmapped_recurrence());
    return window_ != 0 && use_window_ ? read_window_pattern() : TQ_OK;
  }

  tq_status refuse_unmapped_recurrence() {
    if (model_.model_type == "falcon_h1") return TQ_OK;  // attention beside mamba in every layer
    for (const char *name : {"ssm_cfg", "ssm_state_size", "state_size", "mamba_d_state", "mamba_num_heads",
                             "mamba_step", "linear_num_key_heads", "lru_width"}) {
      if (!object_.has(name)) continue;
      return fail(TQ_ERROR_NOT_SUPPORTED,
                  "model_type %s has recurrent layers (%s%s) and the config does not say which: layer_types is "
                  "missing",
                  type().c_str(), object_.path.c_str(), name);
    }
    return TQ_OK;
  }

  // A window without layer_types.
  tq_status read_window_pattern() {
    const auto field = object_.find({"sliding_window_pattern", "_sliding_window_pattern"});
    int64_t pattern = 0;
    if (field && !field.value->is_string()) {
      TQKV_TRY(check_integer(field.name, *field.value, 1, kMaxLayers, &pattern));
      // a pattern of 1 makes every layer full
      if (pattern == 1) return TQ_OK;
      return apply_period(pattern, pattern - 1, "sliding_attention");
    }
    int64_t first = 0;
    if (object_.has("max_window_layers")) {
      TQKV_TRY(read_integer(object_, {"max_window_layers"}, 0, kMaxInt32, &first));
      for (size_t i = 0; i < model_.layers.size(); ++i) {
        if (int64_t(i) >= first) set_window(i, window_);
      }
      return TQ_OK;
    }
    if (!field && family_.all_window) {
      for (size_t i = 0; i < model_.layers.size(); ++i) set_window(i, window_);
      return TQ_OK;
    }
    if (!field && family_.window_pattern != 0) {
      model_.assumed.push_back("sliding_window_pattern");
      return apply_period(family_.window_pattern, family_.window_pattern - 1, "sliding_attention");
    }
    // A window that no sequence outgrows is none.
    if (model_.max_positions != 0 && window_ >= model_.max_positions) return TQ_OK;
    return fail(TQ_ERROR_NOT_SUPPORTED,
                "model_type %s has %ssliding_window and the config does not say in which layers: layer_types is "
                "missing",
                type().c_str(), object_.path.c_str());
  }

  // ---------------------------------------------------------------------------------------- shapes by layer --

  tq_status read_global_shape() {
    const bool gemma4 = model_.model_type.starts_with("gemma4");
    // Gemma 4 ends with a full layer whatever its list says.
    if (gemma4 && model_.layers.back().kind == LayerKind::kWindow) {
      model_.layers.back().kind = LayerKind::kFull;
      model_.layers.back().window_tokens = 0;
    }
    if (object_.has("per_layer_config")) return TQ_OK;  // says the same as these fields, layer by layer
    int64_t head_dim, kv_heads = 0;
    TQKV_TRY(integer("global_head_dim", {"global_head_dim"}, kMaxHeadDim, family_.global_head_dim, &head_dim));
    TQKV_TRY(read_integer(object_, {"num_global_key_value_heads"}, 1, kMaxKvHeads, &kv_heads));
    // In models that declare it this switch also decides whether full layers have their own number of heads.
    bool own_heads = !gemma4;
    TQKV_TRY(read_bool(object_, "attention_k_eq_v", &own_heads));
    for (Layer &layer : model_.layers) {
      if (layer.kind != LayerKind::kFull) continue;
      if (head_dim != 0) layer.head_dim_k = layer.head_dim_v = head_dim;
      if (kv_heads != 0 && own_heads) layer.kv_heads = kv_heads;
    }
    return TQ_OK;
  }

  tq_status read_layer_overrides() {
    const Field field = object_.find({"per_layer_config"});
    if (!field) return TQ_OK;
    Object layers;
    TQKV_TRY(check_object(field, &layers));
    for (const auto &[key, value] : layers.json->items()) {
      const bool digits = !key.empty() && key.size() <= 9 && key.find_first_not_of("0123456789") == std::string::npos;
      const size_t index = digits ? size_t(std::stoul(key)) : model_.layers.size();
      if (index >= model_.layers.size() || !value.is_object()) {
        return fail(TQ_ERROR_PARSE, "config_json: %s has the entry %s: %s, which is no layer", field.name.c_str(),
                    shown(Json(key)).c_str(), shown(value).c_str());
      }
      const Object layer_object = {&value, layers.path + key + "."};
      if (layer_object.has("skip")) {
        return fail(TQ_ERROR_NOT_SUPPORTED, "config_json: %sskip: skipped parts of layers are not supported",
                    layer_object.path.c_str());
      }
      Layer &layer = model_.layers[index];
      int64_t head_dim = 0;
      TQKV_TRY(read_integer(layer_object, {"head_dim"}, 1, kMaxHeadDim, &head_dim));
      if (head_dim != 0) layer.head_dim_k = layer.head_dim_v = head_dim;
      TQKV_TRY(read_integer(layer_object, {"v_head_dim"}, 1, kMaxHeadDim, &layer.head_dim_v));
      TQKV_TRY(read_integer(layer_object, {"num_attention_heads"}, 1, kMaxHeads, &layer.q_heads));
      TQKV_TRY(read_integer(layer_object, {"num_key_value_heads"}, 1, kMaxKvHeads, &layer.kv_heads));
      if (layer.kind == LayerKind::kWindow) {
        TQKV_TRY(
            read_integer(layer_object, {"sliding_window", "attention_chunk_size"}, 1, kMaxInt32, &layer.window_tokens));
      }
    }
    return TQ_OK;
  }

  // Each of the last layers attends to the cache of the last own layer of its kind.
  tq_status read_shared() {
    const int64_t n = int64_t(model_.layers.size());
    int64_t shared = 0;
    TQKV_TRY(read_integer(object_, {"num_kv_shared_layers"}, 0, n, &shared));
    if (!object_.has("num_kv_shared_layers")) {
      shared = std::min(assume("num_kv_shared_layers", family_.shared_layers), n);
    }
    bool owner[2] = {};  // of full layers, of windows
    for (int64_t i = 0; i < n; ++i) {
      Layer &layer = model_.layers[size_t(i)];
      if (layer.kind == LayerKind::kUncached) continue;
      const bool window = layer.kind == LayerKind::kWindow;
      if (i < n - shared) {
        owner[window] = true;
        continue;
      }
      if (!owner[window]) {
        return fail(TQ_ERROR_NOT_SUPPORTED,
                    "model_type %s has %snum_kv_shared_layers %lld, and layer %lld finds no earlier layer of its kind "
                    "to share with",
                    type().c_str(), object_.path.c_str(), (long long)shared, (long long)i);
      }
      layer.kind = LayerKind::kShared;
    }
    return TQ_OK;
  }

  tq_status check() {
    bool any = false, window = false;
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      const Layer &layer = model_.layers[i];
      window |= layer.kind == LayerKind::kWindow;
      if (layer.kind != LayerKind::kFull && layer.kind != LayerKind::kWindow) continue;
      any = true;
      if (layer.q_heads % layer.kv_heads != 0) {
        return fail(TQ_ERROR_PARSE,
                    "config_json: %snum_attention_heads %lld is no multiple of num_key_value_heads %lld in layer %zu",
                    object_.path.c_str(), (long long)layer.q_heads, (long long)layer.kv_heads, i);
      }
    }
    if (window && window_assumed_) model_.assumed.push_back("sliding_window");
    if (any) return TQ_OK;
    return fail(TQ_ERROR_NOT_SUPPORTED, "model_type %s has no layer with a KV cache of its own", type().c_str());
  }

  Object object_;
  Model &model_;
  Family family_ = {.model_type = ""};
  bool use_window_ = true;
  int64_t window_ = 0, chunk_ = 0;
  bool window_assumed_ = false;
};

tq_status read_header(const Object &object, Model *model) {
  bool encoder_decoder = false;
  TQKV_TRY(read_string(object, "model_type", &model->model_type));
  TQKV_TRY(read_bool(object, "is_encoder_decoder", &encoder_decoder));
  if (!encoder_decoder) return TQ_OK;
  return fail(TQ_ERROR_NOT_SUPPORTED, "model_type %s is an encoder-decoder model, which is not supported",
              shown(Json(model->model_type)).c_str());
}

}  // namespace

tq_status parse_model(std::string_view text, Model *model) {
  Json config;
  TQKV_TRY(parse_json(text, &config));
  // Multimodal models keep the language model's config in an object of its own.
  Object object = {&config, ""};
  TQKV_TRY(read_header(object, model));
  while (const Field field = object.find({"text_config", "llm_config", "language_config", "thinker_config"})) {
    TQKV_TRY(check_object(field, &object));
    TQKV_TRY(read_header(object, model));
  }
  return Reader(object, model).read();
}

}  // namespace tqkv
