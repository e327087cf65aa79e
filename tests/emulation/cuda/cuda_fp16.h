// SPDX-License-Identifier: Apache-2.0
// Stands in for CUDA's header of this name: see cuda_runtime.h.
#pragma once

#include <cuda_runtime.h>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) {
  return {bits};
}

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  const float magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                          : exponent == 0 ? ldexpf(float(fraction), -24)
                                          : ldexpf(float(1024 + fraction), exponent - 25);
  return h.bits & 0x8000 ? -magnitude : magnitude;
}

struct alignas(4) __half2 {
  __half x, y;
};

inline __half2 __halves2half2(__half x, __half y) {
  return {x, y};
}

inline float2 __half22float2(__half2 pair) {
  return {__half2float(pair.x), __half2float(pair.y)};
}
