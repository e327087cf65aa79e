// SPDX-License-Identifier: Apache-2.0
// Checks that every entry point makes of its arguments.
#pragma once

#include <tqkv/tqkv.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "runtime/error.hpp"

namespace tqkv {

// Bytes beyond what this library knows of a caller's struct must be zero.
[[nodiscard]] tq_status check_tail(const void *given, uint32_t struct_size, size_t known, const char *name);

// Copies a caller's input struct, of whatever version, into the one that this library knows.
template <class T>
[[nodiscard]] tq_status read_struct(const T *given, const char *name, T *known) {
  if (given == nullptr) return fail(TQ_ERROR_NULL_POINTER, "%s is NULL", name);
  if (reinterpret_cast<uintptr_t>(given) % alignof(T) != 0) {
    return fail(TQ_ERROR_MISALIGNED, "%s is %p; it must be aligned to %zu", name, static_cast<const void *>(given),
                alignof(T));
  }
  uint32_t size = 0;
  std::memcpy(&size, given, sizeof size);
  // All structs are at their first version.
  if (size < sizeof(T)) {
    return fail(TQ_ERROR_STRUCT_SIZE, "%s.struct_size is %u; this struct takes at least %zu", name, size, sizeof(T));
  }
  TQKV_TRY(check_tail(given, size, sizeof(T), name));
  std::memcpy(known, given, sizeof(T));
  return TQ_OK;
}

// Fills an output struct up to what the caller has room for, struct_size as the caller set it.
template <class T>
[[nodiscard]] tq_status write_struct(T value, T *given, const char *name) {
  if (given == nullptr) return fail(TQ_ERROR_NULL_POINTER, "%s is NULL", name);
  uint32_t size = 0;
  std::memcpy(&size, given, sizeof size);
  if (size < sizeof(T)) {
    return fail(TQ_ERROR_STRUCT_SIZE, "%s.struct_size is %u; this struct takes at least %zu", name, size, sizeof(T));
  }
  value.struct_size = size;
  std::memcpy(given, &value, sizeof(T));
  return TQ_OK;
}

// NULL passes.
[[nodiscard]] tq_status check_aligned(const void *pointer, size_t alignment, const char *prefix, const char *name);

[[nodiscard]] tq_status check_type(int32_t type, const char *name);

// An array [tokens, heads, head_dim] of a type: pointer, alignment, strides (0: packed), extent. Gives the strides.
[[nodiscard]] tq_status check_rows(const void *data, int type, int64_t tokens, int64_t heads, int64_t head_dim,
                                   int64_t token_stride, int64_t head_stride, const char *name, bool skip_pointers,
                                   int64_t *token_stride_out, int64_t *head_stride_out);

// An array of `count` items of `item` bytes at a byte stride (0: packed). Gives the stride.
[[nodiscard]] tq_status check_items(const void *data, int64_t count, int64_t item, int64_t stride_bytes,
                                    size_t alignment, const char *name, int64_t *stride_out);

[[nodiscard]] tq_status check_workspace(const void *workspace, size_t given, size_t needed);

}  // namespace tqkv
