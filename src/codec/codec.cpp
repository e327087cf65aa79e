// SPDX-License-Identifier: Apache-2.0
#include "codec/codec.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "codec/cuda.hpp"
#include "codec/quantize.hpp"
#include "runtime/device.hpp"
#include "runtime/error.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace tqkv {
namespace {

// Raised whenever the byte order or the arithmetic of stored bytes changes.
constexpr uint32_t kFormatVersion = 3;

// Feeds values to a hash as little-endian bytes.
class Hasher {
 public:
  Hasher() : state_(XXH3_createState()) {
    if (state_ == nullptr) throw std::bad_alloc();
    XXH3_64bits_reset(state_);
  }
  ~Hasher() { XXH3_freeState(state_); }
  Hasher(const Hasher &) = delete;
  Hasher &operator=(const Hasher &) = delete;

  template <class T>
  void add(const T *values, size_t count) {
    static_assert(std::is_arithmetic_v<T>);
    XXH3_64bits_update(state_, values, count * sizeof(T));
  }
  template <class T>
  void add(T value) {
    add(&value, 1);
  }
  uint64_t digest() const { return XXH3_64bits_digest(state_); }

 private:
  XXH3_state_t *state_;
};

void add_side(Hasher &hash, const Side &side) {
  for (int value : {side.head_dim, side.bits}) hash.add(int32_t(value));
  if (side.raw()) return hash.add(int32_t(side.raw_type));
  for (int value : {side.rotation, side.hadamard_rounds, side.scale_rule, side.scale_type}) hash.add(int32_t(value));
  hash.add(side.signs.data(), side.signs.size());
  hash.add(side.matrix.data(), side.matrix.size());
  hash.add(side.levels, kMaxLevels);
  hash.add(side.steps);
  hash.add(side.cells);
  hash.add(side.level_unit);
}

uint64_t tile_hash(const Side &k, const Side &v) {
  Hasher hash;
  hash.add(kFormatVersion);
  add_side(hash, k);
  add_side(hash, v);
  return hash.digest();
}

uint64_t page_hash(uint64_t tile, int block_size, int kv_heads) {
  Hasher hash;
  hash.add(tile);
  hash.add(int32_t(block_size));
  hash.add(int32_t(kv_heads));
  return hash.digest();
}

Side raw_side(const Side &like, int raw_type) {
  Side side;
  side.side = like.side;
  side.head_dim = like.head_dim;
  side.bits = kRawBits;
  side.rotation = TQ_ROTATION_NONE;
  side.raw_type = raw_type;
  return side;
}

tq_status check_device(const tq_config &config) {
  if (config.device == TQ_DEVICE_CUDA) {
    const char *reason = nullptr;
    const int count = cuda_device_count(&reason);
    if (count == 0) return fail(TQ_ERROR_NO_DEVICE, "config.device is CUDA, but %s", reason);
#ifdef TQKV_HAVE_CUDA
    if (config.simd != 0 || config.threads != 0 || config.parallel_for != nullptr) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "config.device is CUDA: simd, threads and parallel_for are for the CPU");
    }
    TQKV_TRY(cuda_check_device(config.device_ordinal));
    return cuda_check_rotations(config);
#else
    return fail(TQ_ERROR_NOT_SUPPORTED, "config.device is CUDA, but this build has no CUDA kernels");
#endif
  }
  if (config.device != TQ_DEVICE_CPU) {
    return fail(TQ_ERROR_UNKNOWN_ENUM, "config.device is %d, not a TQ_DEVICE_ value", config.device);
  }
  if (config.device_ordinal != 0) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "config.device_ordinal is %d; the CPU has only 0", config.device_ordinal);
  }
  if (config.simd < TQ_SIMD_AUTO || config.simd > TQ_SIMD_NEON) {
    return fail(TQ_ERROR_UNKNOWN_ENUM, "config.simd is %d, not a TQ_SIMD_ value", config.simd);
  }
  if (config.simd != TQ_SIMD_AUTO && !simd_available(config.simd)) {
    return fail(TQ_ERROR_NOT_SUPPORTED, "config.simd: %s is not available here (compiled in: %s)",
                simd_name(config.simd), compiled_simd_names());
  }
  if (config.threads < 0 || config.threads > 1024) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "config.threads is %d; it must be 0 to 1024", config.threads);
  }
  if (config.parallel_for != nullptr && config.threads != 0) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "config.threads is %d; it must be 0 with parallel_for", config.threads);
  }
  return TQ_OK;
}

}  // namespace

tq_status check_block_size(int size, const char *name) {
  if (size == 0 || size == 1 || size == 8 || (size > 0 && size <= 256 && size % 16 == 0)) return TQ_OK;
  return fail(TQ_ERROR_INVALID_ARGUMENT, "%s is %d; it must be 1, 8, or a multiple of 16 up to 256", name, size);
}

const CodecKernels *codec_kernels(int simd) {
  if (!simd_available(simd)) return nullptr;
  switch (simd) {
#ifdef TQKV_HAVE_AVX2
    case TQ_SIMD_AVX2:
      return &kCodecAvx2;
#endif
#ifdef TQKV_HAVE_AVX512
    case TQ_SIMD_AVX512:
      return &kCodecAvx512;
#endif
#ifdef TQKV_HAVE_NEON
    case TQ_SIMD_NEON:
      return &kCodecNeon;
#endif
    default:
      return &kCodecScalar;
  }
}

tq_status make_codec(const tq_config &config, std::unique_ptr<Codec> *codec) {
  TQKV_TRY(check_device(config));
  if (config.reserved != 0) {
    return fail(TQ_ERROR_RESERVED_NOT_ZERO, "config.reserved is %d, must be zero", config.reserved);
  }
  if (config.kv_heads < 0 || config.kv_heads > 1024) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "config.kv_heads is %d; it must be 1 to 1024", config.kv_heads);
  }
  TQKV_TRY(check_block_size(config.block_size_tokens, "config.block_size_tokens"));
  TQKV_TRY(check_block_size(config.exact_block_size_tokens, "config.exact_block_size_tokens"));
  if (config.raw_type != 0 && config.raw_type != TQ_TYPE_BF16 && config.raw_type != TQ_TYPE_F16) {
    return fail(TQ_ERROR_UNKNOWN_ENUM, "config.raw_type is %d; it must be TQ_TYPE_BF16 or TQ_TYPE_F16",
                config.raw_type);
  }
  const int raw_type = config.raw_type != 0 ? config.raw_type : TQ_TYPE_BF16;
  tq_side_config v = config.v;
  if (v.head_dim == 0) v.head_dim = config.k.head_dim;

  std::unique_ptr<Codec> made = codec == nullptr ? nullptr : std::make_unique<Codec>();
  TQKV_TRY(make_side(config.k, TQ_SIDE_K, config.seed, raw_type, "config.k", made ? &made->k : nullptr));
  TQKV_TRY(make_side(v, TQ_SIDE_V, config.seed, raw_type, "config.v", made ? &made->v : nullptr));
  if (made == nullptr) return TQ_OK;

  made->kv_heads = std::max(1, config.kv_heads);
  made->block_size = config.block_size_tokens != 0 ? config.block_size_tokens : kTileTokens;
  made->exact_block_size = config.exact_block_size_tokens != 0 ? config.exact_block_size_tokens : kTileTokens;
  made->raw_type = raw_type;
  made->seed = config.seed;
  made->exact_k = raw_side(made->k, raw_type);
  made->exact_v = raw_side(made->v, raw_type);
  made->tile_fingerprint = tile_hash(made->k, made->v);
  made->page_fingerprint = page_hash(made->tile_fingerprint, made->block_size, made->kv_heads);
  made->exact_fingerprint = page_hash(tile_hash(made->exact_k, made->exact_v), made->exact_block_size, made->kv_heads);
  made->device = config.device;
  made->device_ordinal = config.device_ordinal;
#ifdef TQKV_HAVE_CUDA
  if (config.device == TQ_DEVICE_CUDA) {
    made->simd = TQ_SIMD_AUTO;
    TQKV_TRY(make_cuda_codec(*made, &made->cuda));
    *codec = std::move(made);
    return TQ_OK;
  }
#endif
  made->simd = config.simd != TQ_SIMD_AUTO ? config.simd : best_simd();
  made->kernels = codec_kernels(made->simd);
  made->parallel = config.parallel_for != nullptr
                       ? std::make_unique<Parallel>(config.parallel_for, config.parallel_context)
                       : std::make_unique<Parallel>(config.threads);
  *codec = std::move(made);
  return TQ_OK;
}

void encode_group(const Codec &codec, const Side &side, float *rows, int n, uint8_t *records, void *scales,
                  Encoded *encoded) {
  if (!side.raw()) return codec.kernels->encode(side, rows, n, records, scales, encoded);
  const float limit = side.raw_type == TQ_TYPE_F16 ? 65504.0f : 0x1.fep127f;
  for (int i = 0; i < n; ++i) {
    float *row = rows + i * side.head_dim;
    encoded[i] = Encoded::kFine;
    for (int c = 0; c < side.head_dim; ++c) {
      if (!std::isfinite(row[c]))
        encoded[i] = Encoded::kNonFinite;
      else if (std::fabs(row[c]) > limit && encoded[i] == Encoded::kFine)
        encoded[i] = Encoded::kClamped;
    }
    if (encoded[i] == Encoded::kNonFinite) std::fill_n(row, side.head_dim, 0.0f);
    if (encoded[i] == Encoded::kClamped) {
      for (int c = 0; c < side.head_dim; ++c) row[c] = std::clamp(row[c], -limit, limit);
    }
  }
  codec.kernels->from_f32(rows, side.raw_type, n * side.head_dim, records);
}

void decode_group(const Codec &codec, const Side &side, const uint8_t *records, const void *scales, int n,
                  float *rows) {
  if (side.raw()) return codec.kernels->to_f32(records, side.raw_type, n * side.head_dim, rows);
  codec.kernels->decode(side, records, scales, n, rows);
}

void count_fault(tq_faults *faults, int kind, int64_t index) {
  if (faults == nullptr) return;
  std::atomic_ref(faults->count[kind]).fetch_add(1, std::memory_order_relaxed);
  // The lowest index must win, and zero is "none": hence the complement, and the maximum.
  const uint64_t packed = (0x00ffffffffffffff - uint64_t(index)) << 8 | uint64_t(kind);
  std::atomic_ref first(faults->first);
  uint64_t seen = first.load(std::memory_order_relaxed);
  while (seen < packed && !first.compare_exchange_weak(seen, packed, std::memory_order_relaxed)) {
  }
}

void count_encoded(tq_faults *faults, Encoded encoded, int64_t index) {
  if (encoded == Encoded::kNonFinite) count_fault(faults, TQ_FAULT_NON_FINITE, index);
  if (encoded == Encoded::kClamped) count_fault(faults, TQ_FAULT_RANGE, index);
}

}  // namespace tqkv
