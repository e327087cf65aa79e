// SPDX-License-Identifier: Apache-2.0
#include "plan/plan.hpp"

#include <algorithm>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>
#include <vector>

#include "codec/codec.hpp"
#include "codec/presets.hpp"
#include "codec/record.hpp"
#include "plan/model.hpp"
#include "runtime/error.hpp"

namespace tqkv {
namespace {

// Sizes are never negative; what does not fit in 63 bits is kTooLarge, which stays kTooLarge and fits nowhere.
constexpr int64_t kTooLarge = std::numeric_limits<int64_t>::max();

int64_t add(int64_t a, int64_t b) {
  int64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? kTooLarge : sum;
}

int64_t mul(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? kTooLarge : product;
}

int64_t blocks_of(int64_t tokens, int64_t block) {
  return tokens / block + (tokens % block != 0);
}

constexpr int64_t kExactBlockTokens = kTileTokens;
constexpr int64_t kTableEntryBytes = 4;
constexpr int64_t kScaleBytes = 2;
// Lengths and numbers of sequences are int32 in every call.
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// How vectors are stored: a preset of the library, or one of the two formats it is compared with.
struct Storage {
  std::string name;
  int k_bits, v_bits;
  bool ours;  // the codec's restrictions hold

  bool coded() const { return ours && (k_bits != kRawBits || v_bits != kRawBits); }

  int64_t vector_bytes(int64_t head_dim, int bits) const {
    if (bits == kRawBits) return 2 * head_dim;
    return ours ? record_bytes(int(head_dim), bits) + kScaleBytes : head_dim;
  }
};

tq_status find_storage(const char *preset, Storage *storage) {
  storage->name = preset != nullptr ? preset : kDefaultPreset;
  storage->ours = find_preset(preset, &storage->k_bits, &storage->v_bits);
  if (storage->ours) return TQ_OK;
  if (storage->name == "bf16" || storage->name == "fp8") {
    storage->k_bits = storage->v_bits = storage->name == "bf16" ? kRawBits : 8;
    return TQ_OK;
  }
  return fail(TQ_ERROR_INVALID_ARGUMENT, "preset \"%.64s\" is unknown", preset);
}

// Layers of one kind and shape.
struct Group {
  Layer layer;
  int64_t layers;
  int64_t token_bytes;        // one token of one layer, K and V, all heads
  int64_t exact_token_bytes;  // the same in the exact tier; 0 where there is none
};

// Bytes of one sequence at one context.
struct Sequence {
  int64_t total = 0, exact = 0, padding = 0;
};

class Planner {
 public:
  Planner(const tq_plan_args &args, std::vector<Group> groups, LayerWorkspace workspace)
      : args_(args),
        block_(args.block_size_tokens != 0 ? args.block_size_tokens : kTileTokens),
        groups_(std::move(groups)),
        workspace_(workspace) {
    for (const Group &group : groups_) {
      Layer shape = group.layer;
      shape.kind = LayerKind::kFull;
      shape.window_tokens = 0;
      shapes_.insert(shape);
    }
  }

  int64_t block() const { return block_; }
  const std::vector<Group> &groups() const { return groups_; }

  // Blocks that a sequence of `context` tokens holds in a layer.
  int64_t held_blocks(const Layer &layer, int64_t context) const {
    const int64_t blocks = blocks_of(context, block_);
    if (layer.kind == LayerKind::kFull) return blocks;
    return std::min(blocks, blocks_of(layer.window_tokens, block_) + 1);
  }

  int64_t exact_blocks(const Layer &layer, int64_t context) const {
    int64_t recent = args_.exact_recent_tokens;
    if (layer.kind == LayerKind::kWindow) recent = std::min(recent, layer.window_tokens);
    const int64_t ring = recent == 0 ? 0 : blocks_of(recent, kExactBlockTokens) + 1;
    return std::min(blocks_of(context, kExactBlockTokens),
                    blocks_of(args_.exact_first_tokens, kExactBlockTokens) + ring);
  }

  Sequence sequence(int64_t context) const {
    Sequence bytes;
    std::map<int64_t, bool> tables;  // by width of window, 0 for full layers: has an exact tier
    for (const Group &group : groups_) {
      const Layer &layer = group.layer;
      const int64_t visible = layer.kind == LayerKind::kFull ? context : std::min(context, layer.window_tokens);
      const int64_t held = mul(held_blocks(layer, context), block_);
      bytes.total = add(bytes.total, mul(group.layers, mul(held, group.token_bytes)));
      bytes.padding = add(bytes.padding, mul(group.layers, mul(held - visible, group.token_bytes)));
      const int64_t exact = mul(exact_blocks(layer, context), kExactBlockTokens);
      bytes.exact = add(bytes.exact, mul(group.layers, mul(exact, group.exact_token_bytes)));
      tables[layer.window_tokens] |= exact != 0 && group.exact_token_bytes != 0;
    }
    // Without a ring the exact table ends after the first tokens.
    const int64_t exact_span = args_.exact_recent_tokens != 0 ? context : std::min(context, args_.exact_first_tokens);
    for (const auto &[window, exact] : tables) {
      bytes.total = add(bytes.total, mul(kTableEntryBytes, blocks_of(context, block_)));
      if (exact) bytes.exact = add(bytes.exact, mul(kTableEntryBytes, blocks_of(exact_span, kExactBlockTokens)));
    }
    bytes.total = add(bytes.total, bytes.exact);
    return bytes;
  }

  int64_t workspace(int64_t batch, int64_t context) const {
    int64_t largest = 0;
    for (const Layer &shape : shapes_) {
      int64_t bytes = 0;
      if (workspace_(shape, int(block_), batch, context, &bytes) != TQ_OK) return kTooLarge;
      largest = std::max(largest, bytes);
    }
    return largest;
  }

  int64_t total(int64_t batch, int64_t context) const {
    return add(mul(batch, sequence(context).total), workspace(batch, context));
  }

  bool fits(int64_t batch, int64_t context) const {
    const int64_t bytes = total(batch, context);
    return bytes != kTooLarge && bytes <= args_.memory_bytes;
  }

 private:
  const tq_plan_args &args_;
  int64_t block_;
  std::vector<Group> groups_;
  LayerWorkspace workspace_;
  std::set<Layer> shapes_;  // what decides the workspace
};

// An n in [0, limit] that fits (or 0) and whose successor does not (or is past the limit): the largest, as memory grows
// with n.
template <class Fits>
int64_t largest(int64_t limit, Fits &&fits) {
  int64_t low = 0, high = limit;
  while (low < high) {
    const int64_t middle = high - (high - low) / 2;
    if (fits(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Whether a codec of this preset takes a layer's shape.
tq_status check_layer(const Storage &storage, const Layer &layer) {
  tq_config config = {};
  config.kv_heads = int32_t(layer.kv_heads);
  config.k.head_dim = int32_t(layer.head_dim_k);
  config.v.head_dim = int32_t(layer.head_dim_v);
  config.k.bits = storage.k_bits;
  config.v.bits = storage.v_bits;
  if (make_codec(config, nullptr) == TQ_OK) return TQ_OK;
  const std::string reason = last_error();
  return fail(TQ_ERROR_NOT_SUPPORTED, "preset \"%s\" cannot store head_dim %lld: %s", storage.name.c_str(),
              (long long)layer.head_dim_k, reason.c_str());
}

// Layers that store keys and values, grouped, in order of first appearance.
tq_status make_groups(const Model &model, const Storage &storage, std::vector<Group> *groups) {
  std::map<Layer, size_t> index;
  for (const Layer &layer : model.layers) {
    if (layer.kind != LayerKind::kFull && layer.kind != LayerKind::kWindow) continue;
    const auto [it, added] = index.emplace(layer, groups->size());
    if (!added) {
      ++(*groups)[it->second].layers;
      continue;
    }
    if (storage.ours) TQKV_TRY(check_layer(storage, layer));
    const int64_t vectors =
        storage.vector_bytes(layer.head_dim_k, storage.k_bits) + storage.vector_bytes(layer.head_dim_v, storage.v_bits);
    const int64_t raw = storage.coded() ? 2 * (layer.head_dim_k + layer.head_dim_v) : 0;
    groups->push_back({layer, 1, layer.kv_heads * vectors, layer.kv_heads * raw});
  }
  return TQ_OK;
}

const char *kind_name(LayerKind kind) {
  return kind == LayerKind::kFull ? "full" : "window";
}

std::string to_json(const Model &model, const Storage &storage, const Planner &planner, const tq_plan_result &result) {
  using Json = nlohmann::ordered_json;
  const Layer &first = planner.groups()[0].layer;
  Json groups = Json::array();
  for (const Group &group : planner.groups()) {
    groups.push_back({{"kind", kind_name(group.layer.kind)},
                      {"layers", group.layers},
                      {"window_tokens", group.layer.window_tokens},
                      {"q_heads", group.layer.q_heads},
                      {"kv_heads", group.layer.kv_heads},
                      {"head_dim_k", group.layer.head_dim_k},
                      {"head_dim_v", group.layer.head_dim_v},
                      {"bytes_per_token_and_layer", group.token_bytes},
                      {"blocks_per_sequence_and_layer", planner.held_blocks(group.layer, result.context_tokens)}});
  }
  const Json json = {{"model_type", model.model_type},
                     {"preset", storage.name},
                     {"k_bits", storage.k_bits},
                     {"v_bits", storage.v_bits},
                     {"kv_heads", first.kv_heads},
                     {"head_dim", first.head_dim_k},
                     {"block_size_tokens", planner.block()},
                     {"kv_layers", result.kv_layers},
                     {"full_layers", result.full_layers},
                     {"window_layers", result.window_layers},
                     {"shared_layers", result.shared_layers},
                     {"uncached_layers", result.uncached_layers},
                     {"context_tokens", result.context_tokens},
                     {"batch", result.batch},
                     {"bytes_per_token", result.bytes_per_token},
                     {"bytes_per_token_and_layer", planner.groups()[0].token_bytes},
                     {"bytes_per_sequence", result.bytes_per_sequence},
                     {"exact_bytes_per_sequence", result.exact_bytes_per_sequence},
                     {"padding_bytes_per_sequence", result.padding_bytes_per_sequence},
                     {"workspace_bytes", result.workspace_bytes},
                     {"total_bytes", result.total_bytes},
                     {"max_context_tokens", result.max_context_tokens},
                     {"max_batch", result.max_batch},
                     {"layer_groups", groups},
                     {"assumed_fields", model.assumed}};
  return json.dump();
}

}  // namespace

tq_status make_plan(const tq_plan_args &args, LayerWorkspace workspace, tq_plan_result *result, std::string *json) {
  Storage storage;
  TQKV_TRY(find_storage(args.preset, &storage));
  Model model;
  TQKV_TRY(parse_model({args.config_json, args.config_json_bytes}, &model));
  std::vector<Group> groups;
  TQKV_TRY(make_groups(model, storage, &groups));
  const Planner planner(args, std::move(groups), workspace);

  tq_plan_result plan = {};
  for (const Layer &layer : model.layers) {
    switch (layer.kind) {
      case LayerKind::kFull:
        ++plan.full_layers;
        break;
      case LayerKind::kWindow:
        ++plan.window_layers;
        break;
      case LayerKind::kShared:
        ++plan.shared_layers;
        break;
      case LayerKind::kUncached:
        ++plan.uncached_layers;
        break;
    }
  }
  plan.kv_layers = plan.full_layers + plan.window_layers;
  for (const Group &group : planner.groups()) {
    plan.bytes_per_token = add(plan.bytes_per_token, mul(group.layers, group.token_bytes));
  }

  plan.context_tokens = args.context_tokens != 0 ? args.context_tokens : model.max_positions;
  if (plan.context_tokens == 0) {
    return fail(TQ_ERROR_PARSE, "config_json: max_position_embeddings is missing, and context_tokens is 0");
  }
  plan.batch = args.batch != 0 ? args.batch : 1;
  const Sequence sequence = planner.sequence(plan.context_tokens);
  plan.bytes_per_sequence = sequence.total;
  plan.exact_bytes_per_sequence = sequence.exact;
  plan.padding_bytes_per_sequence = sequence.padding;
  plan.workspace_bytes = planner.workspace(plan.batch, plan.context_tokens);
  plan.total_bytes = planner.total(plan.batch, plan.context_tokens);
  if (plan.total_bytes == kTooLarge) {
    return fail(TQ_ERROR_OVERFLOW, "batch %lld of %lld tokens takes more than 2^63 - 2 bytes", (long long)plan.batch,
                (long long)plan.context_tokens);
  }
  if (args.memory_bytes != 0) {
    plan.max_context_tokens = planner.block() * largest(kMaxInt32 / planner.block(), [&](int64_t blocks) {
                                return planner.fits(plan.batch, blocks * planner.block());
                              });
    plan.max_batch = largest(kMaxInt32, [&](int64_t batch) { return planner.fits(batch, plan.context_tokens); });
  }
  *json = to_json(model, storage, planner, plan);
  *result = plan;
  return TQ_OK;
}

}  // namespace tqkv
