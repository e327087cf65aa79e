// SPDX-License-Identifier: Apache-2.0
// A codec: two sides, the shape of a layer, and the means to run.
#pragma once

#include <memory>

#include "codec/cpu.hpp"
#include "codec/side.hpp"
#include "runtime/parallel.hpp"

namespace tqkv {

class CudaCodec;

struct Codec {
  int device = TQ_DEVICE_CPU, device_ordinal = 0;
  int kv_heads = 1;
  int block_size = 16, exact_block_size = 16;
  int raw_type = TQ_TYPE_BF16;
  int simd = TQ_SIMD_SCALAR;
  uint64_t seed = 0;
  Side k, v;
  Side exact_k, exact_v;  // the raw sides of exact pages
  uint64_t tile_fingerprint = 0, page_fingerprint = 0, exact_fingerprint = 0;
  const CodecKernels *kernels = nullptr;
  std::unique_ptr<Parallel> parallel;  // CPU only
  std::shared_ptr<CudaCodec> cuda;     // CUDA only

  const Side &side(int which) const { return which == TQ_SIDE_K ? k : v; }
};

// Validates and builds; with `codec` null only validates, expensive tables not computed.
[[nodiscard]] tq_status make_codec(const tq_config &config, std::unique_ptr<Codec> *codec);

// 0, which means 16, or a size that pages can have.
[[nodiscard]] tq_status check_block_size(int size, const char *name);

inline int type_bytes(int type) {
  return type == TQ_TYPE_F32 ? 4 : 2;
}

// Encodes rows [n, head_dim] (destroyed; n <= kGroup) of any side, raw ones included, with the documented policy for
// non-finite and too large values. Scales may be null where raw.
void encode_group(const Codec &codec, const Side &side, float *rows, int n, uint8_t *records, void *scales,
                  Encoded *encoded);
// The reverse.
void decode_group(const Codec &codec, const Side &side, const uint8_t *records, const void *scales, int n, float *rows);

// Counts a fault; safe from several threads. `faults` may be null.
void count_fault(tq_faults *faults, int kind, int64_t index);
void count_encoded(tq_faults *faults, Encoded encoded, int64_t index);

}  // namespace tqkv
