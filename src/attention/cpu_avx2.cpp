// SPDX-License-Identifier: Apache-2.0
#include "attention/cpu_simd.inl"

static_assert(HWY_TARGET == HWY_AVX2);

namespace tqkv {

const AttentionKernels kAttentionAvx2 = kKernels;

}  // namespace tqkv
