// SPDX-License-Identifier: Apache-2.0
#include "attention/cpu_simd.inl"

static_assert(HWY_TARGET == HWY_NEON);

namespace tqkv {

const AttentionKernels kAttentionNeon = kKernels;

}  // namespace tqkv
