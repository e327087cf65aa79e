// SPDX-License-Identifier: Apache-2.0
#include "codec/cpu_simd.inl"

static_assert(HWY_STATIC_TARGET == HWY_AVX2, "the build's flags for this file do not match its name");

namespace tqkv {

const CodecKernels kCodecAvx2 = kTarget;

}  // namespace tqkv
