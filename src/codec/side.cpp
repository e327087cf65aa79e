// SPDX-License-Identifier: Apache-2.0
#include "codec/side.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "codec/quantize.hpp"
#include "codec/rotation.hpp"
#include "runtime/error.hpp"

namespace tqkv {
namespace {

// The rule with the smallest error of attention weights (K) and outputs (V) on real keys and values: README, "Scale
// rules".
int default_scale_rule(int side, int bits) {
  return side == TQ_SIDE_K || bits > 2 ? TQ_SCALE_NORM : TQ_SCALE_LEAST_MSE;
}

tq_status check_custom_levels(const tq_side_config &config, const char *name) {
  const int count = 1 << config.bits;
  if (config.num_levels != count) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "%s.num_levels is %d; %d bits take %d levels", name, config.num_levels,
                config.bits, count);
  }
  if (config.levels == nullptr) return fail(TQ_ERROR_NULL_POINTER, "%s.levels is NULL with a custom codebook", name);
  for (int i = 0; i < count; ++i) {
    const float level = config.levels[i], mirror = config.levels[count - 1 - i];
    if (!std::isfinite(level) || (i > 0 && !(level > config.levels[i - 1]))) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "%s.levels[%d] is %g; levels must be finite and ascending", name, i,
                  double(level));
    }
    if (std::fabs(level + mirror) > 1e-6f * std::fabs(config.levels[0])) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "%s.levels[%d] is %g and its mirror %g; levels must be symmetric", name, i,
                  double(level), double(mirror));
    }
  }
  return TQ_OK;
}

void set_rotation(const tq_side_config &config, uint64_t seed, Side &side) {
  if (side.rotation == TQ_ROTATION_HADAMARD) {
    side.base = hadamard_base(side.head_dim);
    side.base_matrix = hadamard_matrix(side.base);
    for (int round = 0; round < side.hadamard_rounds; ++round) {
      const auto signs = hadamard_signs(seed, side.side, round, side.head_dim);
      side.signs.insert(side.signs.end(), signs.begin(), signs.end());
      side.rotation_gain /= std::sqrt(double(side.head_dim));
    }
  } else if (side.rotation == TQ_ROTATION_DENSE) {
    side.matrix = dense_rotation(seed, side.side, side.head_dim);
  } else if (side.rotation == TQ_ROTATION_CUSTOM) {
    side.matrix.assign(config.matrix, config.matrix + size_t(side.head_dim) * size_t(side.head_dim));
  }
}

[[nodiscard]] tq_status set_codebook(const tq_side_config &config, const char *name, Side &side) {
  const int bits = side.bits;
  const double units_per_sigma = bits == 8 ? kUnits8 : kUnits;
  if (bits == 8) {
    side.level_unit = 0x1p-4f;  // the largest of 576 coordinates is about 3.5 times their root mean square
  } else {
    const int dim = side.codebook == TQ_CODEBOOK_GAUSSIAN ? 0 : side.head_dim;
    if (side.codebook == TQ_CODEBOOK_CUSTOM) {
      const int half = 1 << (bits - 1);
      const std::vector<double> positive(config.levels + half, config.levels + 2 * half);
      side.book = custom_codebook(positive, dim);
      if (side.book.count == 0) {
        return fail(TQ_ERROR_NOT_SUPPORTED, "%s.levels are too close together for the int8 grid (127 steps)", name);
      }
    } else {
      side.book = side.codebook == TQ_CODEBOOK_UNIFORM ? uniform_codebook(bits, dim) : lloyd_max_codebook(bits, dim);
    }
    const int count = side.book.count;
    const auto odd = [&](int k) { return 2 * side.book.magnitude[size_t(k)] + 1; };
    for (int k = 0; k < count; ++k) {
      if (bits == 4) {
        side.levels[k] = float(odd(k));
        side.levels[8 + k] = float(-odd(k));
      } else {
        side.levels[count + k] = float(odd(k));
        side.levels[count - 1 - k] = float(-odd(k));
      }
    }
    // A cell is half a step, which thresholds are multiples of.
    const auto cells = std::bit_cast<uint32_t>(float(2 * side.book.steps_per_sigma / units_per_sigma));
    side.cells = std::bit_cast<float>(cells | 1);
    for (int k = 0; k + 1 < count; ++k) {
      const int cell = (odd(k) + odd(k + 1)) / 2;
      int least = int(cell / double(side.cells)) - 2;
      while (cell_of(least, side.cells) < cell) ++least;
      side.thresholds[k] = least;
    }
    // A stored scale then is about the root mean square of the vector's coordinates, so that fp16 scales cover what fp16
    // vectors can hold. Only the unbiased rule may exceed it, by a little where a vector's error is unusually large.
    side.level_unit = float(std::ldexp(1.0, -std::ilogb(side.book.steps_per_sigma * (1 - side.book.mse))));
  }
  const double root = std::sqrt(double(side.head_dim)), y_norm = units_per_sigma * root;
  side.y_norm = float(y_norm);
  side.steps = float(side.hadamard_rounds > 0 ? units_per_sigma : y_norm);
  side.round_gain = float(std::pow(root, 1 - side.hadamard_rounds));
  side.scale_gain = float(side.scale_rule == TQ_SCALE_LEAST_MSE ? 2 / (y_norm * double(side.level_unit))
                          : side.scale_rule == TQ_SCALE_NORM    ? 2 / double(side.level_unit)
                                                                : 2 * y_norm / double(side.level_unit));
  side.decode_gain = float(side.rotation_gain * double(side.level_unit) / 2);
  return TQ_OK;
}

}  // namespace

tq_status make_side(const tq_side_config &config, int which, uint64_t seed, int raw_type, const char *name,
                    Side *side) {
  for (int32_t value : config.reserved) {
    if (value != 0) return fail(TQ_ERROR_RESERVED_NOT_ZERO, "%s.reserved holds %d, must be zero", name, value);
  }
  const int dim = config.head_dim;
  if (dim < 16 || dim > kMaxHeadDim || dim % 16 != 0) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "%s.head_dim is %d; it must be a multiple of 16 from 16 to %d", name, dim,
                kMaxHeadDim);
  }
  const int bits = config.bits == 0 ? 4 : config.bits;
  if ((bits < 1 || bits > 4) && bits != 8 && bits != kRawBits) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "%s.bits is %d; supported are 1, 2, 3, 4, 8 and 16 (raw)", name, bits);
  }
  const bool raw = bits == kRawBits;
  if (config.rotation < TQ_ROTATION_DEFAULT || config.rotation > TQ_ROTATION_CUSTOM) {
    return fail(TQ_ERROR_UNKNOWN_ENUM, "%s.rotation is %d, not a TQ_ROTATION_ value", name, config.rotation);
  }
  if (config.codebook < TQ_CODEBOOK_DEFAULT || config.codebook > TQ_CODEBOOK_CUSTOM) {
    return fail(TQ_ERROR_UNKNOWN_ENUM, "%s.codebook is %d, not a TQ_CODEBOOK_ value", name, config.codebook);
  }
  if (config.scale_rule < TQ_SCALE_DEFAULT || config.scale_rule > TQ_SCALE_UNBIASED) {
    return fail(TQ_ERROR_UNKNOWN_ENUM, "%s.scale_rule is %d, not a TQ_SCALE_ value", name, config.scale_rule);
  }
  if (config.scale_type != 0 && config.scale_type != TQ_TYPE_F16 && config.scale_type != TQ_TYPE_F32) {
    return fail(TQ_ERROR_UNKNOWN_ENUM, "%s.scale_type is %d; it must be TQ_TYPE_F16 or TQ_TYPE_F32", name,
                config.scale_type);
  }
  const int rotation = config.rotation != TQ_ROTATION_DEFAULT ? config.rotation
                       : raw                                  ? TQ_ROTATION_NONE
                                                              : TQ_ROTATION_HADAMARD;
  if (raw && rotation != TQ_ROTATION_NONE) {
    return fail(TQ_ERROR_NOT_SUPPORTED, "%s is raw (16 bits) and takes no rotation; %s.rotation is %d", name, name,
                rotation);
  }
  if (raw && (config.codebook != 0 || config.scale_rule != 0 || config.scale_type != 0)) {
    return fail(TQ_ERROR_NOT_SUPPORTED, "%s is raw (16 bits): codebook, scale_rule and scale_type must be 0", name);
  }
  if (config.hadamard_rounds < 0 || config.hadamard_rounds > 3 ||
      (config.hadamard_rounds != 0 && rotation != TQ_ROTATION_HADAMARD)) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "%s.hadamard_rounds is %d; it must be 0 to 3, and 0 without Hadamard", name,
                config.hadamard_rounds);
  }
  if (rotation == TQ_ROTATION_HADAMARD && hadamard_base(dim) == 0) {
    return fail(TQ_ERROR_NOT_SUPPORTED,
                "%s.rotation: no Hadamard matrix of order %d is built in (2^k, or 12, 20, 28, 36 times 2^k); choose "
                "TQ_ROTATION_DENSE or TQ_ROTATION_NONE",
                name, dim);
  }
  if ((config.matrix != nullptr) != (rotation == TQ_ROTATION_CUSTOM)) {
    return config.matrix == nullptr ? fail(TQ_ERROR_NULL_POINTER, "%s.matrix is NULL with a custom rotation", name)
                                    : fail(TQ_ERROR_INVALID_ARGUMENT,
                                           "%s.matrix is given, but %s.rotation is not TQ_ROTATION_CUSTOM", name, name);
  }
  if (rotation == TQ_ROTATION_CUSTOM) {
    const double error = orthogonality_error({config.matrix, size_t(dim) * size_t(dim)}, dim);
    if (!(error <= 1e-3)) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "%s.matrix is not orthogonal: an entry of M M^T is off by %g", name,
                  error);
    }
  }
  const int codebook = config.codebook != TQ_CODEBOOK_DEFAULT || raw ? config.codebook
                       : bits == 8                                   ? TQ_CODEBOOK_UNIFORM
                                                                     : TQ_CODEBOOK_BETA;
  if (bits == 8 && codebook != TQ_CODEBOOK_UNIFORM) {
    return fail(TQ_ERROR_NOT_SUPPORTED, "%s.codebook is %d; 8 bits use the uniform int8 grid", name, codebook);
  }
  if (codebook == TQ_CODEBOOK_CUSTOM) {
    tq_side_config resolved = config;
    resolved.bits = bits;
    TQKV_TRY(check_custom_levels(resolved, name));
  } else if (config.levels != nullptr || config.num_levels != 0) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "%s.levels are given, but %s.codebook is not TQ_CODEBOOK_CUSTOM", name,
                name);
  }
  if (side == nullptr && codebook != TQ_CODEBOOK_CUSTOM) return TQ_OK;

  Side result;
  result.side = which;
  result.head_dim = dim;
  result.bits = bits;
  result.rotation = rotation;
  result.raw_type = raw_type;
  if (!raw) {
    result.hadamard_rounds = rotation != TQ_ROTATION_HADAMARD ? 0
                             : config.hadamard_rounds == 0    ? 1
                                                              : config.hadamard_rounds;
    result.codebook = codebook;
    result.scale_rule = config.scale_rule != 0 ? config.scale_rule : default_scale_rule(which, bits);
    result.scale_type = config.scale_type != 0 ? config.scale_type : TQ_TYPE_F16;
    set_rotation(config, seed, result);
    TQKV_TRY(set_codebook(config, name, result));
  }
  if (side != nullptr) *side = std::move(result);
  return TQ_OK;
}

tq_side_info describe(const Side &side) {
  tq_side_info info{};
  info.head_dim = side.head_dim;
  info.bits = side.bits;
  info.rotation = side.rotation;
  info.hadamard_rounds = side.hadamard_rounds;
  info.codebook = side.codebook;
  info.scale_rule = side.scale_rule;
  info.scale_type = side.scale_type;
  info.code_bytes = side.code_bytes();
  info.scale_bytes = side.scale_bytes();
  if (side.raw()) return info;
  info.level_unit = side.level_unit;
  if (side.bits == 8) {
    info.num_levels = 256;
    return info;
  }
  const int count = side.book.count;
  info.num_levels = 2 * count;
  for (int k = 0; k < count; ++k) {
    info.grid[count + k] = int8_t(side.book.magnitude[size_t(k)]);
    info.grid[count - 1 - k] = int8_t(~side.book.magnitude[size_t(k)]);
  }
  info.codebook_mse = side.book.mse;
  info.codebook_loss = side.book.loss;
  return info;
}

namespace {

template <class T>
void apply_base(const Side &side, bool transpose, T *x) {
  const int m = side.base, stride = side.head_dim / m;
  T y[36];
  for (T *v = x; v < x + stride; ++v) {
    for (int i = 0; i < m; ++i) {
      T sum = 0;
      for (int j = 0; j < m; j += 4) {
        const auto term = [&](int k) {
          const int8_t h = side.base_matrix[size_t(transpose ? (j + k) * m + i : i * m + j + k)];
          return h < 0 ? -v[(j + k) * stride] : v[(j + k) * stride];
        };
        const T group = (term(0) + term(1)) + (term(2) + term(3));
        sum = j == 0 ? group : sum + group;
      }
      y[i] = sum;
    }
    for (int i = 0; i < m; ++i) v[i * stride] = y[i];
  }
}

template <class T>
void butterflies(const Side &side, T *x) {
  for (int stride = 1; stride < side.head_dim / side.base; stride *= 2) {
    for (int i = 0; i < side.head_dim; i += 2 * stride) {
      for (int j = i; j < i + stride; ++j) {
        const T a = x[j], b = x[j + stride];
        x[j] = a + b;
        x[j + stride] = a - b;
      }
    }
  }
}

void flip_signs(const uint32_t *signs, int n, float *x) {
  for (int c = 0; c < n; ++c) x[c] = std::bit_cast<float>(std::bit_cast<uint32_t>(x[c]) ^ signs[c]);
}

// y = M x, or M^T x, summed channel after channel.
void apply_matrix(const Side &side, bool transpose, float *x) {
  const int n = side.head_dim;
  float y[kMaxHeadDim];
  for (int i = 0; i < n; ++i) {
    float sum = 0;
    for (int j = 0; j < n; ++j) sum = sum + side.matrix[size_t(transpose ? j * n + i : i * n + j)] * x[j];
    y[i] = sum;
  }
  std::copy_n(y, n, x);
}

}  // namespace

void rotate(const Side &side, float *x) {
  if (!side.matrix.empty()) return apply_matrix(side, false, x);
  for (int round = 0; round < side.hadamard_rounds; ++round) {
    flip_signs(&side.signs[size_t(round * side.head_dim)], side.head_dim, x);
    if (side.base > 1) apply_base(side, false, x);
    butterflies(side, x);
  }
}

void rotate_back(const Side &side, float *x) {
  if (!side.matrix.empty()) return apply_matrix(side, true, x);
  for (int round = side.hadamard_rounds - 1; round >= 0; --round) {
    if (side.base > 1) apply_base(side, true, x);
    butterflies(side, x);
    flip_signs(&side.signs[size_t(round * side.head_dim)], side.head_dim, x);
  }
}

void rotate(const Side &side, int32_t *x) {
  const int n = side.head_dim;
  for (int round = 0; round < side.hadamard_rounds; ++round) {
    const uint32_t *signs = &side.signs[size_t(round * n)];
    for (int c = 0; c < n; ++c) x[c] = signs[c] != 0 ? -x[c] : x[c];
    if (side.base > 1) apply_base(side, false, x);
    butterflies(side, x);
  }
  if (side.hadamard_rounds < 2) return;
  for (int c = 0; c < n; ++c) x[c] = to_integer(float(x[c]), side.round_gain);
}

}  // namespace tqkv
