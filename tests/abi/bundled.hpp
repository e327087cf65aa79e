// SPDX-License-Identifier: Apache-2.0
// A model's keys, values and queries, bench/data/tinylm_kv.safetensors.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

inline constexpr int kBundledHeadDim = 128;

// "layers.N.k", ".v" and ".q" of four layers: bf16 vectors of 896 tokens of a kv head, and of 32 positions of its four
// query heads.
std::map<std::string, std::vector<uint8_t>> bundled_tensors();
