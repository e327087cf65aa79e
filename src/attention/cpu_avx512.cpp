// SPDX-License-Identifier: Apache-2.0
#include "attention/cpu_simd.inl"

static_assert(HWY_TARGET == HWY_AVX3);

namespace tqkv {

const AttentionKernels kAttentionAvx512 = kKernels;

}  // namespace tqkv
