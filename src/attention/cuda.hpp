// SPDX-License-Identifier: Apache-2.0
// What of attention runs on CUDA devices.
#pragma once

#include "attention/call.hpp"

namespace tqkv {

// What the call needs; refuses, by name, what the kernels cannot do.
[[nodiscard]] tq_status cuda_attention_workspace(const AttentionCall &call, size_t *bytes);
// Checks the workspace that the call has, too.
[[nodiscard]] tq_status cuda_attention(const AttentionCall &call, size_t workspace_bytes, void *stream);

[[nodiscard]] tq_status cuda_merge(const Codec &codec, const tq_merge_args &args);

}  // namespace tqkv
