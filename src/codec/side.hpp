// SPDX-License-Identifier: Apache-2.0
// One side (K or V) of a codec with everything that encoding and decoding need, ready to use.
#pragma once

#include <tqkv/tqkv.h>

#include <cstdint>
#include <vector>

#include "codec/codebook.hpp"
#include "codec/record.hpp"

namespace tqkv {

// Largest code of an array index into levels: 16 levels at 4 bits.
inline constexpr int kMaxLevels = 16;

struct Side {
  int side = 0;  // TQ_SIDE_*
  int head_dim = 0, bits = 0, rotation = 0, hadamard_rounds = 0, codebook = 0, scale_rule = 0, scale_type = 0;
  int raw_type = 0;  // TQ_TYPE_F16 or TQ_TYPE_BF16, where raw

  // Rotation: y = rotation_gain * (product of unnormalised rounds, or matrix) * x.
  int base = 1;                     // order of the Hadamard base matrix
  std::vector<int8_t> base_matrix;  // [base, base]
  std::vector<uint32_t> signs;      // [rounds, head_dim], 0 or 0x80000000
  std::vector<float> matrix;        // [head_dim, head_dim], dense and custom rotations
  double rotation_gain = 1;

  // Codebook. levels[code] is the odd integer 2 * grid + 1 of a code as record.hpp numbers them.
  Codebook book;
  float levels[kMaxLevels] = {};
  float level_unit = 0;
  float decode_gain = 0;  // rotation_gain * level_unit / 2

  // Encoding: quantize.hpp.
  int thresholds[kMaxMagnitudes] = {};  // between magnitudes, in units
  float cells = 0;                      // a unit
  float y_norm = 0, steps = 0, round_gain = 0;
  float scale_gain = 0;  // of the scale rule

  bool raw() const { return bits == kRawBits; }
  int code_bytes() const { return record_bytes(head_dim, bits); }
  int scale_bytes() const { return raw() ? 0 : scale_type == TQ_TYPE_F32 ? 4 : 2; }
};

// Checks a configuration and fills `side` in; `side` may be null: then nothing expensive is computed, which is how
// support queries are answered. `name` ("k" or "v") goes into the error sentence.
[[nodiscard]] tq_status make_side(const tq_side_config &config, int which, uint64_t seed, int raw_type,
                                  const char *name, Side *side);

// What tq_info reports.
tq_side_info describe(const Side &side);

// Applies the rotation without rotation_gain, in place: Hadamard in the order of rotation.hpp; a matrix row by row,
// channel after channel.
void rotate(const Side &side, float *x);
// The transpose, likewise.
void rotate_back(const Side &side, float *x);
// All Hadamard rounds of integers, and round_gain.
void rotate(const Side &side, int32_t *x);

}  // namespace tqkv
