// SPDX-License-Identifier: Apache-2.0
// Devices of this machine. The CUDA driver is opened at run time: the library needs none to load.
#pragma once

#include <tqkv/tqkv.h>

namespace tqkv {

// Number of CUDA devices; 0 with a reason (a static string) where there is no driver or no device.
int cuda_device_count(const char **reason);
[[nodiscard]] tq_status cuda_device_info(int ordinal, tq_device_info &info);
void cpu_device_info(tq_device_info &info);

// The best of TQ_SIMD_* that is compiled in and that this processor runs.
int best_simd();
bool simd_available(int simd);
const char *simd_name(int simd);
const char *compiled_simd_names();

}  // namespace tqkv
