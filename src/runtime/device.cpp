// SPDX-License-Identifier: Apache-2.0
#include "runtime/device.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>

#include "runtime/error.hpp"

namespace tqkv {
namespace {

// The part of the CUDA driver's documented interface that counting and naming devices takes.
struct CudaDriver {
  int (*init)(unsigned) = nullptr;
  int (*get_count)(int *) = nullptr;
  int (*get)(int *, int) = nullptr;
  int (*get_name)(char *, int, int) = nullptr;
  int (*total_mem)(size_t *, int) = nullptr;
  int (*get_attribute)(int *, int, int) = nullptr;
  int count = 0;
  const char *reason = nullptr;

  CudaDriver() {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      reason = "no CUDA driver on this machine (libcuda.so.1 cannot be loaded)";
      return;
    }
    const auto load = [&](auto &function, const char *name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      return function != nullptr;
    };
    if (!load(init, "cuInit") || !load(get_count, "cuDeviceGetCount") || !load(get, "cuDeviceGet") ||
        !load(get_name, "cuDeviceGetName") || !load(total_mem, "cuDeviceTotalMem_v2") ||
        !load(get_attribute, "cuDeviceGetAttribute")) {
      reason = "libcuda.so.1 lacks a function of the CUDA driver interface";
    } else if (init(0) != 0) {
      reason = "the CUDA driver does not start (cuInit failed: no device, or driver and library differ)";
    } else if (get_count(&count) != 0 || count == 0) {
      count = 0;
      reason = "the CUDA driver finds no device";
    }
  }
};

const CudaDriver &cuda_driver() {
  static const CudaDriver driver;
  return driver;
}

}  // namespace

int cuda_device_count(const char **reason) {
  const CudaDriver &driver = cuda_driver();
  if (reason != nullptr) *reason = driver.reason;
  return driver.count;
}

tq_status cuda_device_info(int ordinal, tq_device_info &info) {
  const CudaDriver &driver = cuda_driver();
  if (driver.count == 0) return fail(TQ_ERROR_NO_DEVICE, "%s", driver.reason);
  if (ordinal < 0 || ordinal >= driver.count) {
    return fail(TQ_ERROR_NO_DEVICE, "CUDA device %d does not exist; the driver finds %d", ordinal, driver.count);
  }
  constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;  // CUdevice_attribute
  int device = 0, major = 0, minor = 0;
  size_t memory = 0;
  if (driver.get(&device, ordinal) != 0 || driver.get_name(info.name, sizeof info.name, device) != 0 ||
      driver.total_mem(&memory, device) != 0 || driver.get_attribute(&info.processors, kMultiprocessors, device) != 0 ||
      driver.get_attribute(&major, kMajor, device) != 0 || driver.get_attribute(&minor, kMinor, device) != 0) {
    return fail(TQ_ERROR_CUDA, "the CUDA driver does not describe device %d", ordinal);
  }
  info.memory_bytes = int64_t(memory);
  info.compute_capability = major * 10 + minor;
  return TQ_OK;
}

void cpu_device_info(tq_device_info &info) {
  info.processors = std::max(1, int(std::thread::hardware_concurrency()));
  info.memory_bytes = int64_t(sysconf(_SC_PHYS_PAGES)) * int64_t(sysconf(_SC_PAGESIZE));
  std::snprintf(info.name, sizeof info.name, "CPU");
  if (std::FILE *file = std::fopen("/proc/cpuinfo", "r")) {
    char line[256];
    while (std::fgets(line, sizeof line, file) != nullptr) {
      const char *colon = std::strchr(line, ':');
      if (std::strncmp(line, "model name", 10) != 0 || colon == nullptr || colon[1] == 0) continue;
      std::snprintf(info.name, sizeof info.name, "%.*s", int(std::strcspn(colon + 2, "\n")), colon + 2);
      break;
    }
    std::fclose(file);
  }
}

bool simd_available(int simd) {
  switch (simd) {
    case TQ_SIMD_SCALAR:
      return true;
#ifdef TQKV_HAVE_AVX2
    case TQ_SIMD_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
             __builtin_cpu_supports("f16c");
#endif
#ifdef TQKV_HAVE_AVX512
    case TQ_SIMD_AVX512:
      return simd_available(TQ_SIMD_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
#endif
#ifdef TQKV_HAVE_NEON
    case TQ_SIMD_NEON:
      return true;
#endif
    default:
      return false;
  }
}

int best_simd() {
  for (int simd : {TQ_SIMD_AVX512, TQ_SIMD_AVX2, TQ_SIMD_NEON}) {
    if (simd_available(simd)) return simd;
  }
  return TQ_SIMD_SCALAR;
}

const char *simd_name(int simd) {
  constexpr const char *kNames[] = {"auto", "scalar", "avx2", "avx512", "neon"};
  return simd >= TQ_SIMD_AUTO && simd <= TQ_SIMD_NEON ? kNames[simd] : "unknown";
}

const char *compiled_simd_names() {
  return "scalar"
#ifdef TQKV_HAVE_AVX2
         ",avx2"
#endif
#ifdef TQKV_HAVE_AVX512
         ",avx512"
#endif
#ifdef TQKV_HAVE_NEON
         ",neon"
#endif
      ;
}

}  // namespace tqkv
