// SPDX-License-Identifier: Apache-2.0
// From measured keys, values and queries of a layer to a preset.
#pragma once

#include <tqkv/tqkv.h>

#include <string>

namespace tqkv {

// Makes the recommendation of validated arguments, strides filled in: `result` without its struct_size, and `json`.
// Errors: INVALID_ARGUMENT (values that are not finite), NOT_SUPPORTED (head_dim), OUT_OF_MEMORY.
[[nodiscard]] tq_status make_recommendation(const tq_recommend_args &args, tq_recommend_result *result,
                                            std::string *json);

}  // namespace tqkv
