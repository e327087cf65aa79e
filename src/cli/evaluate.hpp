// SPDX-License-Identifier: Apache-2.0
// The measurement that demo and eval share: tensors are stored in pages, read back and attended to, chunk by chunk.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "safetensors.hpp"

namespace tqkv_cli {

struct EvaluationOptions {
  std::vector<std::string> presets;
  int32_t rotation = TQ_ROTATION_DEFAULT;
  int32_t hadamard_rounds = 0;
  int32_t codebook = TQ_CODEBOOK_DEFAULT;
  int32_t scale_rule = TQ_SCALE_DEFAULT;
  uint64_t seed = 0;
  int32_t queries = 32;
  int32_t exact_first = 4;
  int32_t exact_recent = 128;
  double scale = 0;
  bool per_layer = false;
  bool json = false;

  void add_to(CLI::App &app);
};

// Keys [tokens, kv heads, head_dim], values, and optional queries of the last positions [positions, q heads, head_dim].
struct Layer {
  std::string name;
  const SafetensorsFile *file;
  const Tensor *k, *v, *q;  // q: NULL if absent
};

// Names that replace the convention <prefix>.k, <prefix>.v, <prefix>.q; all empty: the convention.
struct TensorNames {
  std::string k, v, q;
};

// The layers of a file. Throws Error where a partner is missing, or types or shapes do not fit together.
std::vector<Layer> find_layers(const SafetensorsFile &file, const TensorNames &names);

// Measures all layers at all chosen presets and prints the result: as JSON, {"results": over all layers, "layers":
// [each]}, or as tables with one line for each column.
void evaluate(const std::vector<Layer> &layers, const EvaluationOptions &options);

// "4 layers of 896 tokens, 1 kv head of 128 ..." : what evaluate() works on.
std::string describe(const std::vector<Layer> &layers);

}  // namespace tqkv_cli
