// SPDX-License-Identifier: Apache-2.0
// Version, errors, devices, and the table of all functions.
#include "api/handle.hpp"
#include "runtime/device.hpp"

#define TQKV_STRING_OF(x) #x
#define TQKV_STRING(x) TQKV_STRING_OF(x)

using namespace tqkv;

const char *tq_status_string(tq_status status) {
  switch (status) {
    case TQ_OK:
      return "ok";
    case TQ_ERROR_INVALID_ARGUMENT:
      return "invalid argument";
    case TQ_ERROR_NULL_POINTER:
      return "null pointer";
    case TQ_ERROR_MISALIGNED:
      return "misaligned pointer or stride";
    case TQ_ERROR_STRUCT_SIZE:
      return "wrong struct size";
    case TQ_ERROR_UNKNOWN_ENUM:
      return "unknown enumeration value";
    case TQ_ERROR_RESERVED_NOT_ZERO:
      return "reserved field is not zero";
    case TQ_ERROR_OVERFLOW:
      return "sizes overflow";
    case TQ_ERROR_WORKSPACE_TOO_SMALL:
      return "workspace too small";
    case TQ_ERROR_FINGERPRINT_MISMATCH:
      return "fingerprint mismatch";
    case TQ_ERROR_NOT_SUPPORTED:
      return "not supported";
    case TQ_ERROR_NO_DEVICE:
      return "no such device";
    case TQ_ERROR_OUT_OF_MEMORY:
      return "out of memory";
    case TQ_ERROR_CUDA:
      return "CUDA error";
    case TQ_ERROR_CUBLAS:
      return "cuBLAS error";
    case TQ_ERROR_INTERNAL:
      return "internal error";
    case TQ_ERROR_PARSE:
      return "malformed text";
    default:
      return "unknown status";
  }
}

const char *tq_last_error(void) {
  return last_error();
}

uint32_t tq_version(void) {
  return TQKV_VERSION_MAJOR * 10000 + TQKV_VERSION_MINOR * 100 + TQKV_VERSION_PATCH;
}

uint32_t tq_abi_version(void) {
  return TQKV_ABI_VERSION;
}

tq_status tq_build_info(tq_build *build) {
  return guard([&]() -> tq_status {
    tq_build known{};
    known.abi_version = TQKV_ABI_VERSION;
    known.version =
        TQKV_STRING(TQKV_VERSION_MAJOR) "." TQKV_STRING(TQKV_VERSION_MINOR) "." TQKV_STRING(TQKV_VERSION_PATCH);
#ifdef __clang__
    known.compiler = "clang " __clang_version__;
#else
    known.compiler = "gcc " __VERSION__;
#endif
    known.simd_targets = compiled_simd_names();
    known.simd_target = simd_name(best_simd());
#ifdef TQKV_HAVE_CUDA
    known.cuda = TQKV_HAVE_CUDA;
#else
    known.cuda = "not built";
#endif
    return write_struct(known, build, "build");
  });
}

tq_status tq_device_count(int32_t device, int32_t *count, const char **reason) {
  return guard([&]() -> tq_status {
    if (count == nullptr) return fail(TQ_ERROR_NULL_POINTER, "count is NULL");
    if (device != TQ_DEVICE_CPU && device != TQ_DEVICE_CUDA) {
      return fail(TQ_ERROR_UNKNOWN_ENUM, "device is %d, not a TQ_DEVICE_ value", device);
    }
    const char *why = nullptr;
    *count = device == TQ_DEVICE_CPU ? 1 : cuda_device_count(&why);
    if (reason != nullptr) *reason = why;
    return TQ_OK;
  });
}

tq_status tq_device_get_info(int32_t device, int32_t ordinal, tq_device_info *info) {
  return guard([&]() -> tq_status {
    tq_device_info known{};
    if (device == TQ_DEVICE_CUDA) {
      TQKV_TRY(cuda_device_info(ordinal, known));
    } else if (device != TQ_DEVICE_CPU) {
      return fail(TQ_ERROR_UNKNOWN_ENUM, "device is %d, not a TQ_DEVICE_ value", device);
    } else if (ordinal != 0) {
      return fail(TQ_ERROR_NO_DEVICE, "CPU device %d does not exist; there is only 0", ordinal);
    } else {
      cpu_device_info(known);
    }
    return write_struct(known, info, "info");
  });
}

tq_status tq_get_api(uint32_t abi_version, const tq_api **api) {
  static constexpr tq_api kApi = {
      sizeof(tq_api),
      TQKV_ABI_VERSION,
      tq_status_string,
      tq_last_error,
      tq_version,
      tq_build_info,
      tq_device_count,
      tq_device_get_info,
      tq_config_init,
      tq_preset_name,
      tq_supports,
      tq_create,
      tq_destroy,
      tq_info,
      tq_vectors_workspace,
      tq_encode,
      tq_decode,
      tq_page_layout,
      tq_pages_bytes,
      tq_cache_workspace,
      tq_cache_store,
      tq_cache_load,
      tq_cache_copy,
      tq_attention_workspace,
      tq_paged_attention,
      tq_merge_states,
      tq_plan,
      tq_recommend,
  };
  return guard([&]() -> tq_status {
    if (api == nullptr) return fail(TQ_ERROR_NULL_POINTER, "api is NULL");
    if (abi_version < 1 || abi_version > TQKV_ABI_VERSION) {
      return fail(TQ_ERROR_NOT_SUPPORTED, "ABI version %u is not served; this library serves 1 to %d", abi_version,
                  TQKV_ABI_VERSION);
    }
    *api = &kApi;
    return TQ_OK;
  });
}
