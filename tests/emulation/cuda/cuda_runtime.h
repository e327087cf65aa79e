// SPDX-License-Identifier: Apache-2.0
// Stands in for CUDA's header of this name where kernels are compiled as C++ and run on the CPU (block.hpp): as much of
// CUDA as the kernels take, with its documented meaning. What CUDA leaves undefined stops the program.
#pragma once

#include <math.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#include "emulation/block.hpp"
#include "emulation/runtime.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__  // the standard library has an attribute of this name
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static
#define __shared__ static  // one block runs at a time; AddressSanitizer guards it on both sides

inline constexpr const uint3 &threadIdx = ::emulation::position.thread, &blockIdx = ::emulation::position.block;
inline constexpr const dim3 &blockDim = ::emulation::position.block_size, &gridDim = ::emulation::position.grid_size;

// ---- vectors

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline int2 make_int2(int x, int y) {
  return {x, y};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

// ---- arithmetic; one IEEE operation is one here, too (-ffp-contract=off)

using std::max;
using std::min;

inline uint32_t __float_as_uint(float x) {
  return std::bit_cast<uint32_t>(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline float __uint_as_float(uint32_t x) {
  return std::bit_cast<float>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline int __clz(int x) {
  return std::countl_zero(unsigned(x));
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __ffs(int x) {
  return x == 0 ? 0 : std::countr_zero(unsigned(x)) + 1;
}
// The lower and the upper word of what `high` and `low` are when shifted together.
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline float __int2float_rn(int x) {
  return float(x);
}
// What is no int becomes the nearest one, a NaN 0.
inline int __float2int_rn(float x) {
  return isnan(x) ? 0 : x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : int(nearbyintf(x));
}
inline int __float2int_ru(float x) {
  return __float2int_rn(ceilf(x));
}
inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
inline float round_to_zero(double x) {
  const float nearest = float(x);
  return fabs(double(nearest)) > fabs(x) ? nextafterf(nearest, 0.0f) : nearest;
}
// Stops at a sum that is no double.
inline float __fmaf_rz(float a, float b, float c) {
  const double product = double(a) * double(b), sum = product + double(c);
  if (sum - double(c) != product || sum - product != double(c)) ::emulation::stop("__fmaf_rz(%a, %a, %a)", a, b, c);
  return round_to_zero(sum);
}
// Of numbers of one sign.
inline float __fadd_rz(float a, float b) {
  return round_to_zero(double(a) + double(b));
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return uint32_t(uint64_t{a} * b >> 32);
}
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 0xff) * (b >> i & 0xff);
  return c;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c = int(unsigned(c) + unsigned(int8_t(a >> i) * int8_t(b >> i)));
  return c;
}
inline uint32_t __dp2a_lo(uint32_t a, uint32_t b, uint32_t c) {
  return c + (a & 0xffff) * (b & 0xff) + (a >> 16) * (b >> 8 & 0xff);
}
inline uint32_t __dp2a_hi(uint32_t a, uint32_t b, uint32_t c) {
  return __dp2a_lo(a, b >> 16, c);
}

// Byte i of the result is byte (selector >> 4 * i) of a and b; a selector above 7 has no meaning.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  if (selector & 0x8888) ::emulation::stop("__byte_perm(..., %#x)", selector);
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}

// ---- memory

template <class T>
T __ldg(const T *at) {
  return *at;
}
template <class T>
T __ldcs(const T *at) {
  return *at;
}
template <class T>
void __stcs(T *at, T value) {
  *at = value;
}

template <class T>
T atomicAdd(T *at, std::type_identity_t<T> value) {
  return std::atomic_ref(*at).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T atomicMax(T *at, std::type_identity_t<T> value) {
  std::atomic_ref now(*at);
  T old = now.load(std::memory_order_relaxed);
  while (old < value && !now.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}
template <class T>
T atomicMin(T *at, std::type_identity_t<T> value) {
  std::atomic_ref now(*at);
  T old = now.load(std::memory_order_relaxed);
  while (old > value && !now.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}

// Blocks run one after the other, and what a block's threads tell each other by barriers is ordered by these.
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __nanosleep(unsigned) {
  ::emulation::yield();
}

[[noreturn]] inline void __trap() {
  ::emulation::stop("__trap");
}

// ---- collectives

inline void __syncthreads() {
  ::emulation::block_barrier(false);
}

inline int __syncthreads_or(int vote) {
  return ::emulation::block_barrier(vote != 0);
}

inline void __syncwarp(unsigned mask = 0xffffffff) {
  char nothing = 0;
  ::emulation::collective<true>("__syncwarp", mask, nothing, [](const ::emulation::Exchanges<char> &) {});
}

namespace emulation {

template <class T>
struct Shuffled {
  T value;
  unsigned source;  // lane
  T result;
};

// Undefined: a source that takes no part.
template <class T>
T shuffle(const char *name, unsigned mask, T value, unsigned source) {
  Shuffled<T> mine{value, source, value};
  collective(name, mask, mine, [](const Exchanges<Shuffled<T>> &all) {
    all.for_each([&](unsigned lane, Shuffled<T> &to) {
      if (!all.has(to.source)) stop("lane %u shuffles from lane %u, which takes no part", lane, to.source);
      to.result = all[to.source].value;
    });
  });
  return mine.result;
}

// Lanes [first, first + width) that hold this one.
inline unsigned first_of(int width) {
  if (width < 1 || width > 32 || !std::has_single_bit(unsigned(width))) stop("a shuffle of width %d", width);
  return lane() & ~unsigned(width - 1);
}

template <bool kWant>
unsigned vote(const char *name, unsigned mask, bool predicate) {
  struct Vote {
    bool predicate;
    unsigned ballot;
  } mine{predicate, 0};
  collective(name, mask, mine, [](const Exchanges<Vote> &all) {
    unsigned ballot = 0;
    all.for_each([&](unsigned lane, Vote &vote) { ballot |= unsigned(vote.predicate == kWant) << lane; });
    all.for_each([&](unsigned, Vote &vote) { vote.ballot = ballot; });
  });
  return mine.ballot;
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned first = ::emulation::first_of(width);
  return ::emulation::shuffle("__shfl_sync", mask, value, first + (unsigned(source) & unsigned(width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned last = ::emulation::first_of(width) + unsigned(width) - 1,
                 source = ::emulation::lane() ^ unsigned(bits);
  return ::emulation::shuffle("__shfl_xor_sync", mask, value, source > last ? ::emulation::lane() : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = ::emulation::lane(), first = ::emulation::first_of(width);
  return ::emulation::shuffle("__shfl_up_sync", mask, value, lane - first < delta ? lane : lane - delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = ::emulation::lane(), last = ::emulation::first_of(width) + unsigned(width) - 1;
  return ::emulation::shuffle("__shfl_down_sync", mask, value, last - lane < delta ? lane : lane + delta);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  return ::emulation::vote<true>("__ballot_sync", mask, predicate);
}
inline int __any_sync(unsigned mask, bool predicate) {
  return ::emulation::vote<true>("__any_sync", mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, bool predicate) {
  return ::emulation::vote<false>("__all_sync", mask, predicate) == 0;
}

namespace emulation {

template <class T, class Combine>
T reduce(const char *name, unsigned mask, T value, Combine) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  collective(name, mask, value, [](const Exchanges<T> &all) {
    unsigned first = 0;
    while (!all.has(first)) ++first;
    T result = all[first];
    all.for_each([&](unsigned lane, T &brought) {
      if (lane != first) result = T(Combine{}(result, brought));
    });
    all.for_each([&](unsigned, T &to) { to = result; });
  });
  return value;
}

}  // namespace emulation

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return ::emulation::reduce("__reduce_add_sync", mask, value, [](T a, T b) { return unsigned(a) + unsigned(b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return ::emulation::reduce("__reduce_max_sync", mask, value, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return ::emulation::reduce("__reduce_min_sync", mask, value, [](T a, T b) { return std::min(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return ::emulation::reduce("__reduce_or_sync", mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return ::emulation::reduce("__reduce_and_sync", mask, value, [](unsigned a, unsigned b) { return a & b; });
}

// ---- the runtime

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaMemcpyKind : int { cudaMemcpyHostToDevice = 1 };
enum cudaDeviceAttr : int {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
using cudaStream_t = struct CUstream_st *;
struct cudaFuncAttributes {
  int maxThreadsPerBlock;
};
enum cudaLaunchAttributeID : int { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute *attrs;  // not looked at
  unsigned numAttrs;
};

const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int *ordinal);
cudaError_t cudaSetDevice(int ordinal);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int ordinal);
cudaError_t cudaMalloc(void **pointer, size_t bytes);
cudaError_t cudaFree(void *pointer);
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);

enum cudaFuncAttribute : int { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= int(::emulation::kMaxSharedBytes) ? cudaSuccess : cudaErrorInvalidValue;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, Kernel) {
  *attributes = {int(::emulation::kMaxThreads)};
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...), A &&...args) {
  return cudaError_t(::emulation::enqueue_kernel(
      config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream,
      [kernel, parameters = std::tuple<P...>(std::forward<A>(args)...)] { std::apply(kernel, parameters); }));
}
