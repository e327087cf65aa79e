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
int launch_encode_fast(const VectorCall &call, const DeviceLimits &limits, void *stream);
template <int kHeadDim>
int launch_decode_fast(const VectorCall &call, const DeviceLimits &limits, void *stream);

namespace {

struct FastKernels {
  int head_dim;
  int (*load_encode)();
  int (*load_decode)();
  int (*encode)(const VectorCall &, const DeviceLimits &, void *stream);
  int (*decode)(const VectorCall &, const DeviceLimits &, void *stream);
};

template <int kHeadDim>
constexpr FastKernels fast_kernels() {
  return {kHeadDim, load_encode<kHeadDim>, load_decode<kHeadDim>, launch_encode_fast<kHeadDim>,
          launch_decode_fast<kHeadDim>};
}

constexpr FastKernels kFast[] = {fast_kernels<64>(), fast_kernels<96>(), fast_kernels<128>(), fast_kernels<256>()};

// Both sides of one head_dim, neither raw: what the fast kernels take.
const FastKernels *find_fast(const VectorCall &call) {
  for (int i = 0; i < call.num_sides; ++i) {
    const SideParams &side = call.side[i].side;
    if (side.bits == kRawBits || side.head_dim != call.side[0].side.head_dim) return nullptr;
  }
  if (call.tokens > INT64_C(1) << 40 || (call.tokens + 3) / 4 * call.heads > INT32_MAX / 2) return nullptr;
  for (const FastKernels &fast : kFast) {
    if (fast.head_dim == call.side[0].side.head_dim) return &fast;
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
  return 0;
}

int load_kernels() {
  for (const auto load : {load_generic, load_copy, load_merge}) {
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

int launch_encode(const VectorCall &call, const DeviceLimits &limits, void *stream) {
  const FastKernels *fast = find_fast(call);
  return fast != nullptr ? fast->encode(call, limits, stream) : encode_generic(call, limits, stream);
}

int launch_decode(const VectorCall &call, const DeviceLimits &limits, void *stream) {
  const FastKernels *fast = find_fast(call);
  return fast != nullptr ? fast->decode(call, limits, stream) : decode_generic(call, limits, stream);
}

}  // namespace tqkv::cuda
