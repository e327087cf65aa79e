// SPDX-License-Identifier: Apache-2.0
// Between the translation units of the kernels.
#pragma once

#include "kernels/launch.hpp"

namespace tqkv::cuda {

int load_generic();
int encode_generic(const VectorCall &call, const DeviceLimits &limits, void *stream);
int decode_generic(const VectorCall &call, const DeviceLimits &limits, void *stream);
int load_copy();
int load_merge();
int load_attention_kernels();
int load_wide_attention();
int load_attention_prepare();
int load_attention_finish();

}  // namespace tqkv::cuda
