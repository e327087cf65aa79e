// SPDX-License-Identifier: Apache-2.0
// What of attention runs on CUDA devices.
#pragma once

#include "codec/codec.hpp"

namespace tqkv {

[[nodiscard]] tq_status cuda_merge(const Codec &codec, const tq_merge_args &args);

}  // namespace tqkv
