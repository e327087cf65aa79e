// SPDX-License-Identifier: Apache-2.0
#include "kernels/generic.cuh"

#include "kernels/device/launch.cuh"
#include "kernels/inst.hpp"

namespace tqkv::cuda {
namespace {

dim3 grid_of(int64_t vectors, int sides, const DeviceLimits &limits) {
  const int64_t blocks = (vectors + kGenericWarps - 1) / kGenericWarps, most = int64_t{limits.multiprocessors} * 8;
  return dim3(unsigned(blocks < most ? blocks : most), unsigned(sides));
}

}  // namespace

int encode_generic(const VectorCall &call, const DeviceLimits &limits, void *stream) {
  const dim3 grid = grid_of(call.tokens * call.heads, call.num_sides, limits);
  return launch(encode_generic_kernel, grid, 32 * kGenericWarps, 0, stream, call);
}

int decode_generic(const VectorCall &call, const DeviceLimits &limits, void *stream) {
  const dim3 grid = grid_of(call.tokens * call.heads, call.num_sides, limits);
  return launch(decode_generic_kernel, grid, 32 * kGenericWarps, 0, stream, call, nullptr);
}

int launch_prepare(const VectorCall &call, int side, float *rows, int32_t *exponents, void *stream) {
  const int64_t blocks = (call.tokens * call.heads + kGenericWarps - 1) / kGenericWarps;
  return launch(prepare_kernel, unsigned(blocks), 32 * kGenericWarps, 0, stream, call, side, rows, exponents);
}

int launch_finish(const VectorCall &call, int side, const float *rows, void *stream) {
  VectorCall one = call;
  one.side[0] = call.side[side];
  const int64_t blocks = (call.tokens * call.heads + kGenericWarps - 1) / kGenericWarps;
  return launch(decode_generic_kernel, unsigned(blocks), 32 * kGenericWarps, 0, stream, one, rows);
}

int load_generic() {
  cudaFuncAttributes attributes;
  for (const void *kernel :
       {(const void *)encode_generic_kernel, (const void *)decode_generic_kernel, (const void *)prepare_kernel}) {
    if (const int error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  }
  return 0;
}

}  // namespace tqkv::cuda
