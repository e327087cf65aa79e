// SPDX-License-Identifier: Apache-2.0
// Codebooks: Lloyd-Max levels of a coordinate's distribution, fitted to the int8 half-integer grid.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace tqkv {

inline constexpr int kMaxMagnitudes = 8;

// A symmetric codebook on the grid: the levels are +-(magnitude[i] + 1/2) steps, and one step is 1 / steps_per_sigma of
// the source's standard deviation.
struct Codebook {
  int count = 0;  // magnitudes: 2^(bits - 1)
  std::array<uint8_t, kMaxMagnitudes> magnitude{};
  double steps_per_sigma = 0;
  double mse = 0;   // for a source of unit variance, with the least-MSE scale
  double loss = 0;  // mse / (that of the levels before the fit) - 1
};

// head_dim 0: N(0, 1). Otherwise a coordinate of a uniformly random vector of norm sqrt(head_dim): density proportional
// to (1 - x^2 / head_dim)^((head_dim - 3) / 2).
Codebook lloyd_max_codebook(int bits, int head_dim);
Codebook uniform_codebook(int bits, int head_dim);
// `positive`: the 2^(bits-1) positive levels, ascending, in any unit.
Codebook custom_codebook(std::span<const double> positive, int head_dim);

// The unfitted Lloyd-Max levels (positive half), for tests and reports.
std::array<double, kMaxMagnitudes> lloyd_max_levels(int bits, int head_dim);

}  // namespace tqkv
