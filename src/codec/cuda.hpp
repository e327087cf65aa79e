// SPDX-License-Identifier: Apache-2.0
// Codecs on CUDA devices. Without TQKV_HAVE_CUDA nothing of this is built.
#pragma once

#include "codec/codec.hpp"

namespace tqkv {

// Whether a device can run the kernels, and whether what the sides' rotations take can be opened.
[[nodiscard]] tq_status cuda_check_device(int ordinal);
[[nodiscard]] tq_status cuda_check_rotations(const tq_config &config);
[[nodiscard]] tq_status make_cuda_codec(const Codec &codec, std::shared_ptr<CudaCodec> *made);

// Workspace for `tokens` vectors of one side, or tokens of both.
[[nodiscard]] tq_status cuda_workspace(const Codec &codec, bool k, bool v, int64_t tokens, size_t *bytes);

[[nodiscard]] tq_status cuda_encode(const Codec &codec, const tq_encode_args &args);
[[nodiscard]] tq_status cuda_decode(const Codec &codec, const tq_decode_args &args);

}  // namespace tqkv
