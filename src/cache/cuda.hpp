// SPDX-License-Identifier: Apache-2.0
// Store, load and copy on CUDA devices.
#pragma once

#include "cache/pages.hpp"

namespace tqkv {

[[nodiscard]] tq_status cuda_store(const Codec &codec, const tq_store_args &args, const Pool &pool, const Pool *exact);
[[nodiscard]] tq_status cuda_load(const Codec &codec, const tq_load_args &args, const Pool &pool, const Pool *exact);
// The pairs of one kind of pages.
[[nodiscard]] tq_status cuda_copy(const Codec &codec, const tq_copy_args &args, const Pool &src, const Pool &dst,
                                  const int64_t *pairs, int64_t num_pairs);

}  // namespace tqkv
