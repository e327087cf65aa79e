// SPDX-License-Identifier: Apache-2.0
// Devices, device memory of tables, and the choice of kernels.
#include <cuda_runtime.h>

#include "codec/record.hpp"
#include "kernels/inst.hpp"

namespace tqkv::cuda {

// Instantiated in inst/, one head_dim a file.
template <int kHeadDim>
int load_encode();
template <int kHeadDim>
int load_decode();
template <int kHeadDim>
bool takes_encode(const VectorSide &v, bool tiles, const DeviceLimits &limits);
template <int kHeadDim>
bool takes_decode(const VectorSide &v, bool tiles, const DeviceLimits &limits);
template <int kHeadDim>
int launch_encode_fast(const VectorCall &call, const DeviceLimits &limits, void *stream);
template <int kHeadDim>
int launch_decode_fast(const VectorCall &call, const DeviceLimits &limits, void *stream);

namespace {

struct FastKernel {
  bool (*takes)(const VectorSide &, bool tiles, const DeviceLimits &);
  int (*launch)(const VectorCall &, const DeviceLimits &, void *stream);
};
struct FastKernels {
  int head_dim;
  int (*load_encode)();
  int (*load_decode)();
  FastKernel encode, decode;
};

template <int kHeadDim>
constexpr FastKernels fast_kernels() {
  return {kHeadDim,
          load_encode<kHeadDim>,
          load_decode<kHeadDim>,
          {takes_encode<kHeadDim>, launch_encode_fast<kHeadDim>},
          {takes_decode<kHeadDim>, launch_decode_fast<kHeadDim>}};
}

constexpr FastKernels kFast[] = {
#include "codec_head_dims.inc"
};

// The kernel for both sides of a call, or nullptr: then the generic one takes it.
const FastKernel *find_fast(const VectorCall &call, const DeviceLimits &limits, FastKernel FastKernels::*kind) {
  if (call.tokens > INT64_C(1) << 40 || (call.tokens + 3) / 4 * call.heads > INT32_MAX / 2) return nullptr;
  for (const FastKernels &fast : kFast) {
    if (fast.head_dim != call.side[0].side.head_dim) continue;
    for (int i = 0; i < call.num_sides; ++i) {
      const VectorSide &v = call.side[i];
      if (v.side.bits == kRawBits || v.side.head_dim != fast.head_dim) return nullptr;
      if (!(fast.*kind).takes(v, call.slots != nullptr, limits)) return nullptr;
    }
    return &(fast.*kind);
  }
  return nullptr;
}

}  // namespace

DeviceScope::DeviceScope(int ordinal) {
  int current = -1;
  error_ = cudaGetDevice(&current);
  if (error_ != 0 || current == ordinal) return;
  error_ = cudaSetDevice(ordinal);
  if (error_ == 0) previous_ = current;
}

DeviceScope::~DeviceScope() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

const char *error_text(int error) {
  return cudaGetErrorString(cudaError_t(error));
}

int device_limits(int ordinal, DeviceLimits *limits) {
  int major = 0, minor = 0;
  if (const int error = cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, ordinal)) {
    return error;
  }
  if (const int error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal)) return error;
  if (const int error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal)) return error;
  limits->compute_capability = 10 * major + minor;
  return cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
}

int load_kernels() {
  for (const auto load : {load_generic, load_copy, load_merge, load_attention_prepare, load_attention_kernels,
                          load_wide_attention, load_attention_finish}) {
    if (const int error = load()) return error;
  }
  for (const FastKernels &fast : kFast) {
    if (const int error = fast.load_encode()) return error;
    if (const int error = fast.load_decode()) return error;
  }
  return 0;
}

int upload(const void *host, size_t bytes, void **device) {
  void *made = nullptr;
  if (const int error = cudaMalloc(&made, bytes)) return error;
  if (const int error = cudaMemcpy(made, host, bytes, cudaMemcpyHostToDevice)) {
    cudaFree(made);
    return error;
  }
  *device = made;
  return 0;
}

void release(void *device) {
  cudaFree(device);
}

int clear(void *device, size_t bytes, void *stream) {
  return cudaMemsetAsync(device, 0, bytes, cudaStream_t(stream));
}

int synchronize(void *stream) {
  return cudaStreamSynchronize(cudaStream_t(stream));
}

bool encodes_fast(const VectorCall &call, const DeviceLimits &limits) {
  return find_fast(call, limits, &FastKernels::encode) != nullptr;
}

int launch_encode(const VectorCall &call, const DeviceLimits &limits, void *stream) {
  const FastKernel *fast = find_fast(call, limits, &FastKernels::encode);
  return fast != nullptr ? fast->launch(call, limits, stream) : encode_generic(call, limits, stream);
}

int launch_decode(const VectorCall &call, const DeviceLimits &limits, void *stream) {
  const FastKernel *fast = find_fast(call, limits, &FastKernels::decode);
  return fast != nullptr ? fast->launch(call, limits, stream) : decode_generic(call, limits, stream);
}

}  // namespace tqkv::cuda
