// SPDX-License-Identifier: Apache-2.0
// The CPU implementation of the scalar codec, once per instruction set. Every target gives the same codes and scales.
#pragma once

#include <cstdint>

#include "codec/side.hpp"

namespace tqkv {

// Vectors are handled in groups, which the SIMD targets keep one a lane; a group is as many as a tile has tokens.
inline constexpr int kGroup = 16;

// What became of an encoded vector.
enum class Encoded : uint8_t { kFine, kNonFinite, kClamped };

struct CodecKernels {
  // `count` values between f32 and the type of a caller's array, round to nearest even.
  void (*to_f32)(const void *input, int type, int count, float *output);
  void (*from_f32)(const float *input, int type, int count, void *output);

  // rows [n, head_dim] (n <= kGroup, destroyed) to records [n, code_bytes] and scales [n] of the side's scale type.
  void (*encode)(const Side &side, float *rows, int n, uint8_t *records, void *scales, Encoded *encoded);
  // The reverse.
  void (*decode)(const Side &side, const uint8_t *records, const void *scales, int n, float *rows);
};

// One vector, by the shared functions of quantize.hpp; also what SIMD targets do with a vector whose squared norm is
// zero, extreme or not a number.
Encoded encode_vector(const Side &side, float *row, uint8_t *record, void *scale);

// nullptr where the target is not compiled in or the processor lacks it.
const CodecKernels *codec_kernels(int simd);
extern const CodecKernels kCodecScalar, kCodecAvx2, kCodecAvx512, kCodecNeon;

}  // namespace tqkv
