// SPDX-License-Identifier: Apache-2.0
// Memory of a model's KV cache under one preset.
#pragma once

#include <tqkv/tqkv.h>

#include <string>

#include "plan/model.hpp"

namespace tqkv {

// Bytes of attention workspace for one layer at a number of sequences and tokens each. Errors: OVERFLOW.
using LayerWorkspace = tq_status (*)(const Layer &layer, int block_size, int64_t batch, int64_t context,
                                     int64_t *bytes);

// Makes the plan of validated arguments (ranges and block size; not the config or the preset): `result` without its
// struct_size, and `json` the same numbers as a JSON object. Errors: PARSE, NOT_SUPPORTED, INVALID_ARGUMENT (unknown
// preset), OVERFLOW.
//
// What is counted for one sequence of `context` tokens, in blocks of `block_size`:
//   codes   A vector takes head_dim * bits / 8 bytes and a 2-byte scale; bf16 2 * head_dim; fp8 head_dim. A full layer
//           keeps ceil(context / block) blocks. A window of W tokens keeps at most ceil(min(context, W) / block) + 1
//           of them: it moves token by token, so it covers a part of a block at either end. Padding is what these
//           blocks hold beyond min(context, W) tokens.
//   exact   Layers with codes keep the first S and the last R tokens in raw 16 bits too, in blocks of 16: ceil(S / 16),
//           and ceil(min(R, W) / 16) + 1 for the ring of the last ones; never more than the context has. The exact
//           tier's block tables count here.
//   tables  4 bytes for every block of the context, once for all full layers and once for each width of window: layers
//           of one kind have the same blocks, so they share a table. Tables are indexed by position, so that of a
//           window spans the context too.
// The workspace serves all layers, one after the other: the largest one's.
// Draft layers (multi-token prediction) and the state of recurrent layers are not counted.
[[nodiscard]] tq_status make_plan(const tq_plan_args &args, LayerWorkspace workspace, tq_plan_result *result,
                                  std::string *json);

}  // namespace tqkv
