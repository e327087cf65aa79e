// SPDX-License-Identifier: Apache-2.0
// f16 and bf16 to f32 and back, round to nearest even, in integer arithmetic: the same on every target.
#pragma once

#include <bit>
#include <cstdint>

#include "codec/host_device.hpp"

namespace tqkv {

TQKV_HOST_DEVICE float f32_from_bf16(uint16_t h) {
  return std::bit_cast<float>(uint32_t(h) << 16);
}

TQKV_HOST_DEVICE uint16_t bf16_from_f32(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);  // NaN stays a NaN
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

TQKV_HOST_DEVICE float f32_from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000));
  // Subnormal: magnitude * 2^-24 is exact in f32.
  return std::bit_cast<float>(std::bit_cast<uint32_t>(float(magnitude) * 0x1p-24f) | sign);
}

TQKV_HOST_DEVICE uint16_t f16_from_f32(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f);
  const uint32_t sign = (u >> 16) & 0x8000;
  const uint32_t a = u & 0x7fffffff;
  if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
  if (a < 0x38800000) {                                 // below 2^-14: adding 1/2 aligns the last bit to 2^-24
    return uint16_t(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
}

}  // namespace tqkv
