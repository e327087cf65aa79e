// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <tqkv/tqkv.h>

#include <cstring>

namespace tqkv {

struct Preset {
  const char *name;
  int k_bits, v_bits;
};

inline constexpr Preset kPresets[] = {
    {"k4v4", 4, 4}, {"safe", 4, 4}, {"k4v3", 4, 3},       {"balanced", 4, 3}, {"k3v3", 3, 3},  {"compact", 3, 3},
    {"k4v2", 4, 2}, {"k3v2", 3, 2}, {"aggressive", 3, 2}, {"k2v2", 2, 2},     {"raw", 16, 16},
};
inline constexpr const char *kDefaultPreset = "safe";

// False for an unknown name; NULL is the default preset.
inline bool find_preset(const char *name, int *k_bits, int *v_bits) {
  if (name == nullptr) name = kDefaultPreset;
  for (const Preset &preset : kPresets) {
    if (std::strcmp(preset.name, name) != 0) continue;
    *k_bits = preset.k_bits;
    *v_bits = preset.v_bits;
    return true;
  }
  return false;
}

// A preset's bits for one side.
inline void set_preset_bits(tq_side_config &side, int bits) {
  side.bits = bits;
  if (bits == 2) side.codebook = TQ_CODEBOOK_UNIFORM;
}

}  // namespace tqkv
