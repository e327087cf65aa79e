// SPDX-License-Identifier: Apache-2.0
#include "codec/cuda.hpp"

#ifdef TQKV_HAVE_CUDA

#include <cmath>

#include "codec/cuda_run.hpp"
#include "codec/half.hpp"
#include "codec/quantize.hpp"
#include "runtime/device.hpp"

namespace tqkv {
namespace {

cuda::SideParams side_params(const Side &side) {
  cuda::SideParams p{};
  p.head_dim = side.head_dim;
  p.bits = side.bits;
  p.scale_type = side.scale_type;
  p.raw_type = side.raw_type;
  p.is_v = side.side == TQ_SIDE_V;
  p.rounds = side.hadamard_rounds;
  p.base = side.base;
  p.scale_rule = side.scale_rule;
  std::copy_n(side.thresholds, kMaxMagnitudes, p.thresholds);
  std::copy_n(side.levels, kMaxLevels, p.levels);
  p.cells = side.cells;
  // |Y_c| is at most sqrt(head_dim) |X|, and X differs from its vector by at most half a unit a coordinate.
  const double root = std::sqrt(double(side.head_dim)), most = root * (double(kUnits) + root) + 1;
  p.half_cells = (cell_of(int(most), side.cells) + 8) / 4 * 4;
  p.steps = side.steps;
  p.round_gain = side.round_gain;
  p.scale_gain = side.scale_gain;
  p.decode_gain = side.decode_gain;
  for (size_t i = 0; i < side.signs.size(); ++i) {
    const size_t round = i / size_t(side.head_dim), c = i % size_t(side.head_dim);
    p.signs[round][c / 32] |= (side.signs[i] >> 31) << (c % 32);
  }
  if (side.base > 1) {
    for (int i = 0; i < side.base; ++i) {
      for (int j = 0; j < side.base; ++j) {
        if (side.base_matrix[size_t(i * side.base + j)] < 0) p.base_rows[i] |= uint64_t{1} << j;
      }
    }
  }
  return p;
}

cuda::FlatCodes flat_codes(const void *codes, int64_t codes_stride, const void *scales, int64_t scales_stride,
                           const Side &side) {
  cuda::FlatCodes flat{};
  flat.codes = static_cast<uint8_t *>(const_cast<void *>(codes));
  flat.scales = static_cast<uint8_t *>(const_cast<void *>(scales));
  flat.codes_stride = codes_stride != 0 ? codes_stride : side.code_bytes();
  flat.scales_stride = scales_stride != 0 ? scales_stride : side.scale_bytes();
  const uint64_t both = reinterpret_cast<uintptr_t>(codes) | uint64_t(flat.codes_stride);
  flat.alignment = both % 16 == 0 ? 16 : both % 4 == 0 ? 4 : 1;
  return flat;
}

// Products of a few rows with the side's matrix, one of each kind: cuBLAS loads a kernel when it is first used, which a
// capture may not allow.
tq_status warm_up(CudaCodec &codec, const Side &side) {
  constexpr int kWarmRows = 16;
  const size_t row_bytes = size_t(kWarmRows * side.head_dim) * sizeof(float);
  const std::vector<uint8_t> zeros(Cublas::kWorkspaceBytes + 2 * row_bytes);
  void *memory = nullptr;
  TQKV_TRY(check_cuda(cuda::upload(zeros.data(), zeros.size(), &memory), "no device memory for cuBLAS"));
  void *x = static_cast<uint8_t *>(memory) + Cublas::kWorkspaceBytes, *y = static_cast<uint8_t *>(x) + row_bytes;
  const auto multiply_all = [&]() -> tq_status {
    for (const bool transpose : {true, false}) {
      TQKV_TRY(codec.cublas->multiply(static_cast<float *>(x), codec.matrices[side.side], transpose, kWarmRows,
                                      side.head_dim, static_cast<float *>(y), memory, nullptr));
    }
    if (codec.matrices_bf16[side.side] == nullptr) return TQ_OK;
    return codec.cublas->multiply_bf16(x, codec.matrices_bf16[side.side], kWarmRows, side.head_dim, y, memory, nullptr);
  };
  const tq_status status = multiply_all();
  const int error = cuda::synchronize(nullptr);
  cuda::release(memory);
  TQKV_TRY(status);
  return check_cuda(error, "cuBLAS does not run");
}

}  // namespace

tq_status cuda_check_device(int ordinal) {
  tq_device_info info{};
  TQKV_TRY(cuda_device_info(ordinal, info));
  if (info.compute_capability >= 80) return TQ_OK;
  return fail(TQ_ERROR_NOT_SUPPORTED, "config.device_ordinal %d has compute capability %d.%d; the kernels take 8.0",
              ordinal, info.compute_capability / 10, info.compute_capability % 10);
}

tq_status cuda_check_rotations(const tq_config &config) {
  for (const tq_side_config *side : {&config.k, &config.v}) {
    if (side->rotation == TQ_ROTATION_DENSE || side->rotation == TQ_ROTATION_CUSTOM) return check_cublas();
  }
  return TQ_OK;
}

tq_status make_cuda_codec(const Codec &codec, std::shared_ptr<CudaCodec> *made) {
  auto cuda_codec = std::make_shared<CudaCodec>();
  cuda_codec->ordinal = codec.device_ordinal;
  const cuda::DeviceScope scope(codec.device_ordinal);
  TQKV_TRY(check_cuda(scope.error(), "the device cannot be made current"));
  TQKV_TRY(check_cuda(cuda::device_limits(codec.device_ordinal, &cuda_codec->limits),
                      "the device does not describe itself"));
  TQKV_TRY(check_cuda(cuda::load_kernels(), "the kernels cannot be loaded"));
  for (int which : {TQ_SIDE_K, TQ_SIDE_V}) {
    const Side &side = codec.side(which);
    cuda_codec->params[which] = side_params(side);
    if (!is_dense(side)) continue;
    void *matrix = nullptr;
    const int error = cuda::upload(side.matrix.data(), side.matrix.size() * sizeof(float), &matrix);
    TQKV_TRY(check_cuda(error, "the rotation cannot be copied to the device"));
    cuda_codec->matrices[which] = static_cast<const float *>(matrix);
    if (is_coarse_dense(side)) {
      std::vector<uint16_t> rounded;
      for (const float entry : side.matrix) rounded.push_back(bf16_from_f32(entry));
      TQKV_TRY(
          check_cuda(cuda::upload(rounded.data(), rounded.size() * sizeof(uint16_t), &cuda_codec->matrices_bf16[which]),
                     "the rotation cannot be copied to the device"));
    }
    if (cuda_codec->cublas == nullptr) {
      cuda_codec->cublas = std::make_unique<Cublas>();
      TQKV_TRY(cuda_codec->cublas->open());
    }
    TQKV_TRY(warm_up(*cuda_codec, side));
  }
  *made = std::move(cuda_codec);
  return TQ_OK;
}

tq_status cuda_workspace(const Codec &codec, bool k, bool v, int64_t tokens, size_t *bytes) {
  const Side *sides[2];
  int count = 0;
  if (k) sides[count++] = &codec.k;
  if (v) sides[count++] = &codec.v;
  const int heads = k && v ? codec.kv_heads : 1;
  int64_t vectors = 0;
  if (__builtin_mul_overflow(tokens, int64_t{heads}, &vectors)) {
    return fail(TQ_ERROR_OVERFLOW, "%lld tokens of %d heads overflow 63 bits", (long long)tokens, heads);
  }
  *bytes = DenseWorkspace(sides, count, vectors, heads).bytes;
  return TQ_OK;
}

tq_status cuda_encode(const Codec &codec, const tq_encode_args &args) {
  const Side &side = codec.side(args.side);
  size_t bytes = 0;
  TQKV_TRY(cuda_workspace(codec, args.side == TQ_SIDE_K, args.side == TQ_SIDE_V, args.count, &bytes));
  TQKV_TRY(check_workspace(args.workspace, args.workspace_bytes, bytes));
  Run run(codec, args.count, 1, args.faults, args.workspace, args.stream);
  const int64_t stride = args.input_stride != 0 ? args.input_stride : side.head_dim;
  run.add_side(side, args.input, args.input_type, stride, 0).flat =
      flat_codes(args.codes, args.codes_stride_bytes, args.scales, args.scales_stride_bytes, side);
  return run.encode();
}

tq_status cuda_decode(const Codec &codec, const tq_decode_args &args) {
  const Side &side = codec.side(args.side);
  size_t bytes = 0;
  TQKV_TRY(cuda_workspace(codec, args.side == TQ_SIDE_K, args.side == TQ_SIDE_V, args.count, &bytes));
  TQKV_TRY(check_workspace(args.workspace, args.workspace_bytes, bytes));
  Run run(codec, args.count, 1, nullptr, args.workspace, args.stream);
  const int64_t stride = args.output_stride != 0 ? args.output_stride : side.head_dim;
  run.add_side(side, args.output, args.output_type, stride, 0).flat =
      flat_codes(args.codes, args.codes_stride_bytes, args.scales, args.scales_stride_bytes, side);
  return run.decode();
}

}  // namespace tqkv

#endif  // TQKV_HAVE_CUDA
