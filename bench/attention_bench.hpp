// SPDX-License-Identifier: Apache-2.0
// tqkv-bench attention: what attention.cu measures and attention_report.cpp chooses and reports.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "gpu.hpp"

namespace tqkv_bench {

constexpr int kModelHeadDim = 128;

// bf16 tensors of a model, the kv heads of its layers side by side.
struct ModelTensors {
  int64_t tokens = 0, positions = 0;  // with keys and values; with queries
  int kv_heads = 0, group = 0;        // group: query heads of a kv head
  std::vector<uint16_t> k, v;         // [tokens, kv_heads, kModelHeadDim]
  std::vector<uint16_t> q;            // [positions, kv_heads, group, kModelHeadDim]
};

// Of a safetensors file: NAME.k and NAME.v [tokens, heads, head_dim], NAME.q [positions, query heads, head_dim]. Throws
// std::runtime_error.
ModelTensors read_model_tensors(const std::string &path);

// One call over random pages, and what it has to reach; 0: nothing.
struct AttentionCase {
  std::string shape, preset, feature;  // feature: what differs from a plain call, or nothing
  std::vector<int32_t> lengths;        // of the sequences
  int q_heads = 32, kv_heads = 8, head_dim = 128, block_tokens = 16;
  int q_len = 1, window = 0, exact_first = 0, exact_recent = 0;
  float soft_cap = 0;
  bool sinks = false, lse = false;
  bool chunk = false;                     // the last q_len keys are k_new
  const ModelTensors *tensors = nullptr;  // repeated to the length; none: normals

  double least_share = 0;
  std::string relative_to;  // name of the case whose time this one's is compared with, or nothing
  double most_relative = 0;
  double peer_seconds = 0;  // FlashInfer bf16 on the same shape
  double least_speed = 0;   // times that

  int32_t coded_length(int32_t length) const { return chunk ? length - q_len : length; }
  std::string name() const;
};

struct AttentionRow {
  AttentionCase what;
  int64_t bytes = 0;  // of pages, that a call must read
  Timing time;
  Ceiling ceiling;           // of reading as many
  double plain_seconds = 0;  // of the case that it is compared with, the mean of just before and just after

  double flops = 0;  // of both products over the keys that queries see

  double share() const { return ceiling.seconds / time.median; }
};

struct AttentionSink {
  std::function<void(const Machine &)> machine;  // called first
  std::function<void(const AttentionRow &)> row;
  std::function<void(const AttentionCase &, const std::string &)> refused;  // in the library's words
};

// Measures on the first CUDA device. Cases of one preset, head_dim, block size and origin of keys share their pages if they
// follow each other. Throws std::runtime_error.
void measure_attention(const std::vector<AttentionCase> &cases, bool quick, const AttentionSink &sink);

// The command. Returns its exit status.
int run_attention(int argc, char **argv);

}  // namespace tqkv_bench
