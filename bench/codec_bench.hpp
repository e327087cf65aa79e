// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace tqkv_bench {

// Measures the codec on the first CUDA device; prints a table and writes JSON (`json_path` may be null). `quick`: pages
// only, where head_dim is not 128.
int run_codec(const char *json_path, bool quick);

}  // namespace tqkv_bench
