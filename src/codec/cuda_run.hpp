// SPDX-License-Identifier: Apache-2.0
// How a call reaches the kernels: what the codec and cache rooms share.
#pragma once

#include <algorithm>
#include <memory>

#include "codec/codec.hpp"
#include "kernels/launch.hpp"
#include "runtime/args.hpp"
#include "runtime/cublas.hpp"

namespace tqkv {

[[nodiscard]] inline tq_status check_cuda(int error, const char *what) {
  return error == 0 ? TQ_OK : fail(TQ_ERROR_CUDA, "%s: %s", what, cuda::error_text(error));
}

inline bool is_dense(const Side &side) {
  return !side.matrix.empty();
}

// Whether the codes are so coarse that bf16 rows are rotated in bf16: that adds 0.06% to the squared error at 4 bits.
inline bool is_coarse_dense(const Side &side) {
  return is_dense(side) && side.bits <= 4;
}

// Vectors that a dense rotation handles at a time: f32 rows stay in the L2 cache; of bf16 rows more, so that launches do
// not count.
inline constexpr int64_t kDenseChunk = 16384, kDenseChunkBf16 = 262144;

inline size_t round_up(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

// The workspace of dense rotations: cuBLAS's own, rows before or after the product of one side at a time, and per side
// the rotated rows and their exponents. Where rows are rotated in bf16, the result is one side's at a time in `rows`.
struct DenseWorkspace {
  size_t rows = 0, rotated[2] = {}, exponents[2] = {}, bytes = 0;

  // `heads` vectors of a token stay together.
  DenseWorkspace(const Side *const *sides, int num_sides, int64_t vectors, int heads) {
    size_t widest = 0;
    const size_t n = size_t(std::min(vectors, std::max<int64_t>(kDenseChunk, heads)));
    for (int i = 0; i < num_sides; ++i) {
      if (is_dense(*sides[i])) widest = std::max(widest, size_t(sides[i]->head_dim));
    }
    if (widest == 0 || vectors == 0) return;
    rows = Cublas::kWorkspaceBytes;
    bytes = rows + round_up(n * widest * 4);
    for (int i = 0; i < num_sides; ++i) {
      if (!is_dense(*sides[i])) continue;
      rotated[i] = bytes;
      bytes += round_up(n * size_t(sides[i]->head_dim) * 4);
      exponents[i] = bytes;
      bytes += round_up(n * 4);
    }
    const size_t n_bf16 = size_t(std::min(vectors, std::max<int64_t>(kDenseChunkBf16, heads)));
    bytes = std::max(bytes, rows + round_up(n_bf16 * widest * 2));
  }
};

// The caller's rows as kernels want them; strides in elements.
inline cuda::Rows device_rows(const void *data, int type, int64_t token_stride, int64_t head_stride) {
  const int64_t element = type_bytes(type);
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && token_stride * element % 16 == 0 &&
                       head_stride * element % 16 == 0;
  return {const_cast<void *>(data), token_stride, head_stride, type, aligned};
}

// What a CUDA codec owns on its device.
class CudaCodec {
 public:
  ~CudaCodec() {
    const cuda::DeviceScope scope(ordinal);
    for (const float *matrix : matrices) cuda::release(const_cast<float *>(matrix));
    for (void *matrix : matrices_bf16) cuda::release(matrix);
    cublas.reset();
  }

  int ordinal = 0;
  cuda::DeviceLimits limits{};
  cuda::SideParams params[2]{};
  const float *matrices[2] = {};
  void *matrices_bf16[2] = {};  // of sides that is_coarse_dense()
  std::unique_ptr<Cublas> cublas;
};

// One call on its way: the parameters of the kernels, cut to parts where a rotation is dense.
class Run {
 public:
  Run(const Codec &codec, int64_t tokens, int heads, tq_faults *faults, void *workspace, void *stream)
      : cuda_(*codec.cuda),
        scope_(codec.cuda->ordinal),
        workspace_(static_cast<uint8_t *>(workspace)),
        stream_(stream) {
    call_.tokens = tokens;
    call_.heads = heads;
    call_.faults = faults;
  }

  cuda::VectorCall &call() { return call_; }

  cuda::VectorSide &add_side(const Side &side, const void *rows, int type, int64_t token_stride, int64_t head_stride) {
    const int i = call_.num_sides++;
    sides_[i] = &side;
    cuda::VectorSide &v = call_.side[i];
    v.side = cuda_.params[side.side];
    v.counts_slots = i == 0;
    v.rows = device_rows(rows, type, token_stride, head_stride);
    return v;
  }

  [[nodiscard]] tq_status encode() {
    TQKV_TRY(check_cuda(scope_.error(), "the codec's device cannot be made current"));
    bool any_dense = false, in_bf16[2] = {}, all_in_bf16 = true;
    for (int i = 0; i < call_.num_sides; ++i) {
      if (!is_dense(*sides_[i])) continue;
      any_dense = true;
      in_bf16[i] = rotates_in_bf16(i);
      all_in_bf16 = all_in_bf16 && in_bf16[i];
    }
    const auto launch = [&](const cuda::VectorCall &call) {
      return check_cuda(cuda::launch_encode(call, cuda_.limits, stream_), "the encoding kernel did not start");
    };
    return for_each_part(all_in_bf16 ? kDenseChunkBf16 : kDenseChunk, [&](cuda::VectorCall &part) -> tq_status {
      if (!any_dense) return launch(part);
      for (int i = 0; i < part.num_sides; ++i) {
        cuda::VectorCall one = one_side(part, i);
        if (in_bf16[i]) {
          TQKV_TRY(rotate_in_bf16(one, i));
        } else if (is_dense(*sides_[i])) {
          const DenseWorkspace at = dense();
          auto *rows = reinterpret_cast<float *>(workspace_ + at.rows);
          auto *rotated = reinterpret_cast<float *>(workspace_ + at.rotated[i]);
          auto *exponents = reinterpret_cast<int32_t *>(workspace_ + at.exponents[i]);
          TQKV_TRY(
              check_cuda(cuda::launch_prepare(one, 0, rows, exponents, stream_), "preparing a dense rotation failed"));
          TQKV_TRY(multiply(i, rows, true, one.tokens * one.heads, rotated));
          one.side[0].rotated = rotated;
          one.side[0].exponents = exponents;
        }
        TQKV_TRY(launch(one));
      }
      return TQ_OK;
    });
  }

  [[nodiscard]] tq_status decode() {
    TQKV_TRY(check_cuda(scope_.error(), "the codec's device cannot be made current"));
    return for_each_part(kDenseChunk, [&](cuda::VectorCall &part) -> tq_status {
      bool any_dense = false;
      for (int i = 0; i < part.num_sides; ++i) any_dense = any_dense || is_dense(*sides_[i]);
      if (!any_dense)
        return check_cuda(cuda::launch_decode(part, cuda_.limits, stream_), "the decoding kernel did not start");
      for (int i = 0; i < part.num_sides; ++i) {
        cuda::VectorCall one = one_side(part, i);
        if (is_dense(*sides_[i])) {
          const DenseWorkspace at = dense();
          auto *rows = reinterpret_cast<float *>(workspace_ + at.rows);
          auto *rotated = reinterpret_cast<float *>(workspace_ + at.rotated[i]);
          const int64_t dim = sides_[i]->head_dim;
          one.side[0].rows = {rows, one.heads * dim, dim, TQ_TYPE_F32, 1};
          one.side[0].offset = nullptr;
          one.exact_slots = nullptr;
          one.faults = nullptr;
          if (one.slots != nullptr) {  // rows of skipped tokens are multiplied too
            TQKV_TRY(
                check_cuda(cuda::clear(rows, size_t(one.tokens * one.heads * dim) * 4, stream_), "clearing failed"));
          }
          TQKV_TRY(check_cuda(cuda::launch_decode(one, cuda_.limits, stream_), "the decoding kernel did not start"));
          TQKV_TRY(multiply(i, rows, false, one.tokens * one.heads, rotated));
          TQKV_TRY(
              check_cuda(cuda::launch_finish(part, i, rotated, stream_), "the last step of decoding did not start"));
        } else {
          TQKV_TRY(check_cuda(cuda::launch_decode(one, cuda_.limits, stream_), "the decoding kernel did not start"));
        }
      }
      return TQ_OK;
    });
  }

 private:
  DenseWorkspace dense() const { return {sides_, call_.num_sides, call_.tokens * call_.heads, call_.heads}; }

  static cuda::VectorCall one_side(const cuda::VectorCall &call, int i) {
    cuda::VectorCall one = call;
    one.num_sides = 1;
    one.side[0] = call.side[i];
    return one;
  }

  // Whether cuBLAS can read a dense side's rows as they are, and the result is good enough for its codes and is what a
  // kernel of its head_dim takes.
  bool rotates_in_bf16(int i) const {
    const cuda::VectorSide &v = call_.side[i];
    const int64_t dim = v.side.head_dim;
    const bool contiguous = v.rows.token_stride == call_.heads * dim && (call_.heads == 1 || v.rows.head_stride == dim);
    return is_coarse_dense(*sides_[i]) && v.rows.type == TQ_TYPE_BF16 && v.offset == nullptr && contiguous &&
           cuda::encodes_fast(one_side(call_, i), cuda_.limits);
  }

  // Of a call of side i alone.
  tq_status rotate_in_bf16(cuda::VectorCall &one, int i) {
    cuda::VectorSide &v = one.side[0];
    const int which = sides_[i]->side, dim = sides_[i]->head_dim;
    void *rotated = workspace_ + dense().rows;
    TQKV_TRY(cuda_.cublas->multiply_bf16(v.rows.data, cuda_.matrices_bf16[which], one.tokens * one.heads, dim, rotated,
                                         workspace_, stream_));
    v.matrix = cuda_.matrices[which];
    v.original = v.rows;
    v.rows = {rotated, int64_t{one.heads} * dim, dim, TQ_TYPE_BF16, 1};
    return TQ_OK;
  }

  tq_status multiply(int i, const float *rows, bool transpose, int64_t n, float *result) {
    return cuda_.cublas->multiply(rows, cuda_.matrices[sides_[i]->side], transpose, n, sides_[i]->head_dim, result,
                                  workspace_, stream_);
  }

  // `chunk`: vectors of a part where a rotation is dense.
  template <class Body>
  tq_status for_each_part(int64_t chunk, Body &&body) {
    bool any_dense = false;
    for (int i = 0; i < call_.num_sides; ++i) any_dense = any_dense || is_dense(*sides_[i]);
    const int64_t size = any_dense ? std::max<int64_t>(1, chunk / call_.heads) : call_.tokens;
    for (int64_t first = 0; first < call_.tokens; first += size) {
      cuda::VectorCall part = call_;
      part.first_token = first;
      part.tokens = std::min(size, call_.tokens - first);
      if (part.slots != nullptr) part.slots += first;
      if (part.exact_slots != nullptr) part.exact_slots += first;
      for (int i = 0; i < part.num_sides; ++i) {
        cuda::VectorSide &v = part.side[i];
        v.rows.data = static_cast<uint8_t *>(v.rows.data) + first * v.rows.token_stride * type_bytes(v.rows.type);
        if (v.flat.codes != nullptr) v.flat.codes += first * v.flat.codes_stride;
        if (v.flat.scales != nullptr) v.flat.scales += first * v.flat.scales_stride;
      }
      TQKV_TRY(body(part));
    }
    return TQ_OK;
  }

  CudaCodec &cuda_;
  cuda::DeviceScope scope_;
  uint8_t *workspace_;
  void *stream_;
  cuda::VectorCall call_{};
  const Side *sides_[2] = {};
};

}  // namespace tqkv
