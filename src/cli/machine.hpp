// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <tqkv/tqkv.h>

#include <string>

namespace tqkv_cli {

tq_build build_info();
tq_device_info device_info(int32_t device, int32_t ordinal);

// "Some CPU, 8 cores, avx512; tqkv 0.1.0": what a measurement was made on.
std::string machine_text();

}  // namespace tqkv_cli
