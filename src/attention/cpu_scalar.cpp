// SPDX-License-Identifier: Apache-2.0
// The scalar target of attention.
#include <algorithm>
#include <cmath>

#include "attention/cpu.hpp"
#include "codec/quantize.hpp"

namespace tqkv {
namespace {

float level_of(const Side &side, unsigned code) {
  return side.bits == 8 ? float(2 * int(int8_t(code)) + 1) : side.levels[code];
}

// Token `row` of a tile, as levels. A record's bytes are gathered first: adjacent on the K side, interleaved on the V
// side.
void tile_levels(const Side &side, const uint8_t *codes, int row, float *levels) {
  uint8_t record[kMaxHeadDim];
  int start = 0;
  for (int plane = 0; plane < 2; ++plane) {
    const int bytes = plane_bytes(side.head_dim, side.bits, plane);
    for (int e = 0; e < bytes; ++e) {
      const int offset = side.side == TQ_SIDE_K ? row * bytes + e : v_plane_offset(bytes, e, row);
      record[start + e] = codes[kTileTokens * start + offset];
    }
    start += bytes;
  }
  for (int c = 0; c < side.head_dim; ++c) levels[c] = level_of(side, get_code(record, side.head_dim, side.bits, c));
}

float dot(const float *a, const float *b, int n) {
  float sums[8] = {};
  for (int c = 0; c < n; c += 8) {
    for (int i = 0; i < 8; ++i) sums[i] += a[c + i] * b[c + i];
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

void score_tiles(const Side &k, const uint8_t *const *codes, int num_tiles, const float *scales, const float *queries,
                 int rows, const float *bias, float *scores) {
  float levels[kMaxHeadDim];
  for (int t = 0; t < num_tiles * kTileTokens; ++t) {
    tile_levels(k, codes[t / kTileTokens], t % kTileTokens, levels);
    for (int r = 0; r < rows; ++r) {
      scores[r * kChunkTokens + t] = scales[t] * dot(queries + r * kMaxHeadDim, levels, k.head_dim) + bias[r];
    }
  }
}

void score_key(const float *key, int head_dim, const float *queries, int rows, const float *bias, float *scores) {
  for (int r = 0; r < rows; ++r) scores[r * kChunkTokens] = dot(queries + r * kMaxHeadDim, key, head_dim) + bias[r];
}

float softmax(float *scores, int n, int low, int high, float soft_cap, float slope, float first_distance, float *max,
              float *sum) {
  float largest = *max;
  for (int t = low; t < high; ++t) {
    if (soft_cap > 0) scores[t] = soft_cap * std::tanh(scores[t] / soft_cap);
    scores[t] += slope * (float(t) + first_distance);
    largest = std::max(largest, scores[t]);
  }
  double added = 0;
  for (int t = low; t < high; ++t) added += scores[t] = std::exp(scores[t] - largest);
  std::fill(scores, scores + low, 0.0f);
  std::fill(scores + high, scores + n, 0.0f);
  const float correction = std::exp(*max - largest);
  *max = largest;
  *sum = *sum * correction + float(added);
  return correction;
}

void add_tiles(const Side &v, const uint8_t *const *codes, int num_tiles, const float *scales, float *weights, int rows,
               float *outputs) {
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < num_tiles * kTileTokens; ++t) {
      float &weight = weights[r * kChunkTokens + t];
      weight = weight != 0 ? weight * scales[t] : 0.0f;
    }
  }
  float levels[kTileTokens * kMaxHeadDim];
  for (int tile = 0; tile < num_tiles; ++tile) {
    for (int t = 0; t < kTileTokens; ++t) tile_levels(v, codes[tile], t, levels + t * kMaxHeadDim);
    for (int r = 0; r < rows; ++r) {
      const float *weight = weights + r * kChunkTokens + tile * kTileTokens;
      for (int c = 0; c < v.head_dim; ++c) {
        float sum = 0;
        for (int t = 0; t < kTileTokens; ++t) sum += weight[t] * levels[t * kMaxHeadDim + c];
        outputs[r * kMaxHeadDim + c] += sum;
      }
    }
  }
}

void add_value(const float *value, int head_dim, const float *weights, int rows, float *outputs) {
  for (int r = 0; r < rows; ++r) {
    const float weight = weights[r * kChunkTokens];
    if (weight == 0) continue;
    for (int c = 0; c < head_dim; ++c) outputs[r * kMaxHeadDim + c] += weight * value[c];
  }
}

}  // namespace

const AttentionKernels kAttentionScalar = {score_tiles, score_key, softmax, add_tiles, add_value};

}  // namespace tqkv
