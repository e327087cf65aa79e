// SPDX-License-Identifier: Apache-2.0
// The inner loops of CPU attention, once per instruction set. attention/cpu.cpp drives them.
#pragma once

#include <cstdint>

#include "codec/side.hpp"

namespace tqkv {

inline constexpr int kChunkTokens = 256;  // keys that are scored before their softmax
inline constexpr int kRowBlock = 16;      // query rows (token, head) that share the decoding of a tile

// Scores and weights are [rows, kChunkTokens]; queries and outputs are [rows, kMaxHeadDim].
struct AttentionKernels {
  // scores[r][t] = scales[t] * <queries[r], levels of token t> + bias[r] for the tokens of K tiles, levels being the odd
  // integers of Side::levels (2 b + 1 at 8 bits). A row's result does not depend on the number of rows; likewise below.
  void (*score_tiles)(const Side &k, const uint8_t *const *codes, int num_tiles, const float *scales,
                      const float *queries, int rows, const float *bias, float *scores);
  // scores[r] = <queries[r], key> + bias[r], for one raw key.
  void (*score_key)(const float *key, int head_dim, const float *queries, int rows, const float *bias, float *scores);
  // One row of scores x, keys [low, high) of n visible: x = soft_cap tanh(x / soft_cap) if soft_cap > 0, then
  // x += slope * (t + first_distance). Replaces them by exp(x - max) with `max` raised to their largest, all others by
  // zero; multiplies `sum` by the returned exp(old max - new max) and adds the new terms. low < high.
  float (*softmax)(float *scores, int n, int low, int high, float soft_cap, float slope, float first_distance,
                   float *max, float *sum);
  // Multiplies weights[r][t] by scales[t], whatever that is where the weight is zero; then outputs[r] += sum over the
  // tokens of the V tiles of weights[r][t] * levels of token t.
  void (*add_tiles)(const Side &v, const uint8_t *const *codes, int num_tiles, const float *scales, float *weights,
                    int rows, float *outputs);
  // outputs[r] += weights[r] * value where the weight is not zero, for one raw value.
  void (*add_value)(const float *value, int head_dim, const float *weights, int rows, float *outputs);
};

extern const AttentionKernels kAttentionScalar, kAttentionAvx2, kAttentionAvx512, kAttentionNeon;

}  // namespace tqkv
