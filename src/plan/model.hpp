// SPDX-License-Identifier: Apache-2.0
// What a Hugging Face config.json says about a model's KV cache.
#pragma once

#include <tqkv/tqkv.h>

#include <compare>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tqkv {

enum class LayerKind {
  kFull,      // every token is kept
  kWindow,    // sliding or chunked attention: only the last `window_tokens` are ever read again
  kShared,    // attends to the cache of an earlier layer
  kUncached,  // recurrent, convolution or MLP layers
};

struct Layer {
  LayerKind kind;
  int64_t window_tokens;  // kWindow only, else 0
  int64_t q_heads, kv_heads, head_dim_k, head_dim_v;
  auto operator<=>(const Layer &) const = default;
};

struct Model {
  std::string model_type;
  std::vector<Layer> layers;
  int64_t max_positions = 0;  // 0: the config does not say
  // Fields that the config leaves to the defaults of its model_type, and that were taken from there.
  std::vector<std::string> assumed;
};

// Errors: PARSE (names the field), NOT_SUPPORTED (names what is not understood: nothing is guessed).
[[nodiscard]] tq_status parse_model(std::string_view text, Model *model);

}  // namespace tqkv
