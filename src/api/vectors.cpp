// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "api/handle.hpp"
#include "codec/cuda.hpp"
#include "codec/quantize.hpp"

using namespace tqkv;

namespace {

// The two arrays of compressed vectors, strides resolved.
struct Compressed {
  int64_t codes_stride, scales_stride;
};

tq_status check_compressed(const Side &side, int64_t count, const void *codes, int64_t codes_stride, const void *scales,
                           int64_t scales_stride, Compressed *result) {
  const size_t code_alignment = side.raw() ? 2 : 1;
  TQKV_TRY(
      check_items(codes, count, side.code_bytes(), codes_stride, code_alignment, "args.codes", &result->codes_stride));
  if (!side.raw()) {
    return check_items(scales, count, side.scale_bytes(), scales_stride, size_t(side.scale_bytes()), "args.scales",
                       &result->scales_stride);
  }
  result->scales_stride = 0;
  if (scales == nullptr && scales_stride == 0) return TQ_OK;
  return fail(TQ_ERROR_INVALID_ARGUMENT, "args.scales is given, but this side is raw and has no scales");
}

int64_t groups_of(int64_t count) {
  return count / kGroup + (count % kGroup != 0);
}

}  // namespace

tq_status tq_vectors_workspace(const tq_codec *codec, int32_t side, int64_t count, size_t *bytes) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    TQKV_TRY(check_side(side, "side"));
    TQKV_TRY(check_count(count, "count"));
    if (bytes == nullptr) return fail(TQ_ERROR_NULL_POINTER, "bytes is NULL");
    *bytes = 0;
#ifdef TQKV_HAVE_CUDA
    if (codec->codec->cuda != nullptr) {
      return cuda_workspace(*codec->codec, side == TQ_SIDE_K, side == TQ_SIDE_V, count, bytes);
    }
#endif
    return TQ_OK;
  });
}

tq_status tq_encode(const tq_codec *codec, const tq_encode_args *given) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    tq_encode_args args{};
    TQKV_TRY(read_struct(given, "args", &args));
    TQKV_TRY(check_side(args.side, "args.side"));
    TQKV_TRY(check_count(args.count, "args.count"));
    TQKV_TRY(check_type(args.input_type, "args.input_type"));
    if (args.reserved != 0) return fail(TQ_ERROR_RESERVED_NOT_ZERO, "args.reserved is %d, must be zero", args.reserved);
    TQKV_TRY(check_aligned(args.faults, 8, "args.", "faults"));
    const Codec &c = *codec->codec;
    const Side &side = c.side(args.side);
    int64_t input_stride = 0, head_stride = 0;
    TQKV_TRY(check_rows(args.input, args.input_type, args.count, 1, side.head_dim, args.input_stride, 0, "args.input",
                        false, &input_stride, &head_stride));
    Compressed out{};
    TQKV_TRY(check_compressed(side, args.count, args.codes, args.codes_stride_bytes, args.scales,
                              args.scales_stride_bytes, &out));
#ifdef TQKV_HAVE_CUDA
    if (c.cuda != nullptr) return cuda_encode(c, args);
#endif
    const auto *input = static_cast<const uint8_t *>(args.input);
    auto *codes = static_cast<uint8_t *>(args.codes);
    auto *scales = static_cast<uint8_t *>(args.scales);
    const int element = type_bytes(args.input_type), code_bytes = side.code_bytes(), scale_bytes = side.scale_bytes();
    c.parallel->run(groups_of(args.count), [&](int64_t group) {
      float rows[kGroup * kMaxHeadDim];
      uint8_t records[kGroup * kMaxHeadDim * 2];
      alignas(4) uint8_t group_scales[kGroup * 4] = {};
      Encoded encoded[kGroup];
      const int64_t begin = group * kGroup;
      const int n = int(std::min<int64_t>(kGroup, args.count - begin));
      for (int i = 0; i < n; ++i) {
        c.kernels->to_f32(input + (begin + i) * input_stride * element, args.input_type, side.head_dim,
                          rows + i * side.head_dim);
      }
      encode_group(c, side, rows, n, records, group_scales, encoded);
      for (int i = 0; i < n; ++i) {
        const int64_t at = begin + i;
        std::memcpy(codes + at * out.codes_stride, records + i * code_bytes, size_t(code_bytes));
        if (scale_bytes != 0) {
          std::memcpy(scales + at * out.scales_stride, group_scales + i * scale_bytes, size_t(scale_bytes));
        }
        count_encoded(args.faults, encoded[i], at);
      }
    });
    return TQ_OK;
  });
}

tq_status tq_decode(const tq_codec *codec, const tq_decode_args *given) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    tq_decode_args args{};
    TQKV_TRY(read_struct(given, "args", &args));
    TQKV_TRY(check_side(args.side, "args.side"));
    TQKV_TRY(check_count(args.count, "args.count"));
    TQKV_TRY(check_type(args.output_type, "args.output_type"));
    if (args.reserved != 0) return fail(TQ_ERROR_RESERVED_NOT_ZERO, "args.reserved is %d, must be zero", args.reserved);
    const Codec &c = *codec->codec;
    const Side &side = c.side(args.side);
    int64_t output_stride = 0, head_stride = 0;
    TQKV_TRY(check_rows(args.output, args.output_type, args.count, 1, side.head_dim, args.output_stride, 0,
                        "args.output", false, &output_stride, &head_stride));
    Compressed in{};
    TQKV_TRY(check_compressed(side, args.count, args.codes, args.codes_stride_bytes, args.scales,
                              args.scales_stride_bytes, &in));
#ifdef TQKV_HAVE_CUDA
    if (c.cuda != nullptr) return cuda_decode(c, args);
#endif
    const auto *codes = static_cast<const uint8_t *>(args.codes);
    const auto *scales = static_cast<const uint8_t *>(args.scales);
    auto *output = static_cast<uint8_t *>(args.output);
    const int element = type_bytes(args.output_type), code_bytes = side.code_bytes(), scale_bytes = side.scale_bytes();
    c.parallel->run(groups_of(args.count), [&](int64_t group) {
      float rows[kGroup * kMaxHeadDim];
      uint8_t records[kGroup * kMaxHeadDim * 2];
      alignas(4) uint8_t group_scales[kGroup * 4] = {};
      const int64_t begin = group * kGroup;
      const int n = int(std::min<int64_t>(kGroup, args.count - begin));
      if (n < 1) return;  // never; tells the compiler that `records` is written
      for (int i = 0; i < n; ++i) {
        const int64_t at = begin + i;
        std::memcpy(records + i * code_bytes, codes + at * in.codes_stride, size_t(code_bytes));
        if (scale_bytes != 0) {
          std::memcpy(group_scales + i * scale_bytes, scales + at * in.scales_stride, size_t(scale_bytes));
        }
      }
      decode_group(c, side, records, group_scales, n, rows);
      for (int i = 0; i < n; ++i) {
        c.kernels->from_f32(rows + i * side.head_dim, args.output_type, side.head_dim,
                            output + (begin + i) * output_stride * element);
      }
    });
    return TQ_OK;
  });
}
