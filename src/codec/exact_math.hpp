// SPDX-License-Identifier: Apache-2.0
// exp and log from IEEE basic operations only, so that codebooks and rotations are the same on every machine whatever
// its libm. Accurate to a few units in the last place on the ranges used here.
#pragma once

#include <bit>
#include <cstdint>

namespace tqkv {

// 2^n for |n| < 1000.
inline double power_of_two(int n) {
  return std::bit_cast<double>(uint64_t(1023 + n) << 52);
}

inline double exact_exp(double x) {
  constexpr double kLog2e = 1.4426950408889634, kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  if (x < -600) return 0;
  const int n = int(x * kLog2e + (x < 0 ? -0.5 : 0.5));
  const double r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= 0.35
  double sum = 1;
  for (int i = 18; i >= 1; --i) sum = 1 + sum * r / i;
  return sum * power_of_two(n);
}

// Positive normal x.
inline double exact_log(double x) {
  constexpr double kLn2 = 0.6931471805599453, kSqrt2 = 1.4142135623730951;
  const uint64_t u = std::bit_cast<uint64_t>(x);
  int n = int(u >> 52) - 1023;
  double m = std::bit_cast<double>((u & 0xfffffffffffff) | 0x3ff0000000000000);
  if (m > kSqrt2) m /= 2, ++n;
  const double s = (m - 1) / (m + 1), s2 = s * s;  // |s| <= 0.172
  double sum = 0;
  for (int i = 23; i >= 1; i -= 2) sum = sum * s2 + 1.0 / i;
  return 2 * s * sum + n * kLn2;
}

}  // namespace tqkv
