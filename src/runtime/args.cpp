// SPDX-License-Identifier: Apache-2.0
#include "runtime/args.hpp"

namespace tqkv {
namespace {

// (count - 1) * stride, in 63 bits.
bool span(int64_t count, int64_t stride, int64_t *result) {
  return !__builtin_mul_overflow(std::max<int64_t>(count - 1, 0), stride, result);
}

}  // namespace

tq_status check_tail(const void *given, uint32_t struct_size, size_t known, const char *name) {
  const auto *bytes = static_cast<const uint8_t *>(given);
  for (size_t i = known; i < struct_size; ++i) {
    if (bytes[i] != 0) {
      return fail(TQ_ERROR_RESERVED_NOT_ZERO,
                  "%s has a non-zero byte at offset %zu, in a field that this library (version %d.%d) does not know",
                  name, i, TQKV_VERSION_MAJOR, TQKV_VERSION_MINOR);
    }
  }
  return TQ_OK;
}

tq_status check_aligned(const void *pointer, size_t alignment, const char *prefix, const char *name) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return TQ_OK;
  return fail(TQ_ERROR_MISALIGNED, "%s%s is %p; it must be aligned to %zu bytes", prefix, name, pointer, alignment);
}

tq_status check_type(int32_t type, const char *name) {
  if (type == TQ_TYPE_F32 || type == TQ_TYPE_F16 || type == TQ_TYPE_BF16) return TQ_OK;
  return fail(TQ_ERROR_UNKNOWN_ENUM, "%s is %d; it must be TQ_TYPE_F32, TQ_TYPE_F16 or TQ_TYPE_BF16", name, type);
}

tq_status check_rows(const void *data, int type, int64_t tokens, int64_t heads, int64_t head_dim, int64_t token_stride,
                     int64_t head_stride, const char *name, bool skip_pointers, int64_t *token_stride_out,
                     int64_t *head_stride_out) {
  const int64_t element = type == TQ_TYPE_F32 ? 4 : 2;
  if (!skip_pointers && tokens > 0) {
    if (data == nullptr) return fail(TQ_ERROR_NULL_POINTER, "%s is NULL", name);
    TQKV_TRY(check_aligned(data, size_t(element), "", name));
  }
  if (head_stride == 0) head_stride = head_dim;
  if (token_stride == 0 && __builtin_mul_overflow(heads, head_dim, &token_stride)) token_stride = INT64_MAX;
  if (token_stride < 0 || head_stride < 0) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "%s has strides %lld (token) and %lld (head), below zero", name,
                (long long)token_stride, (long long)head_stride);
  }
  if ((heads > 1 && head_stride < head_dim) || (tokens > 1 && token_stride < head_dim)) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "%s has strides %lld (token) and %lld (head); rows of %lld would overlap",
                name, (long long)token_stride, (long long)head_stride, (long long)head_dim);
  }
  int64_t a = 0, b = 0, extent = 0;
  if (!span(tokens, token_stride, &a) || !span(heads, head_stride, &b) || __builtin_add_overflow(a, b, &extent) ||
      __builtin_add_overflow(extent, head_dim, &extent) || __builtin_mul_overflow(extent, element, &extent)) {
    return fail(TQ_ERROR_OVERFLOW, "%s: %lld tokens at stride %lld and %lld heads at stride %lld overflow 63 bits",
                name, (long long)tokens, (long long)token_stride, (long long)heads, (long long)head_stride);
  }
  *token_stride_out = token_stride;
  *head_stride_out = head_stride;
  return TQ_OK;
}

tq_status check_items(const void *data, int64_t count, int64_t item, int64_t stride_bytes, size_t alignment,
                      const char *name, int64_t *stride_out) {
  if (stride_bytes == 0) stride_bytes = item;
  if (count > 0) {
    if (data == nullptr) return fail(TQ_ERROR_NULL_POINTER, "%s is NULL", name);
    TQKV_TRY(check_aligned(data, alignment, "", name));
  }
  if (stride_bytes < item && (count > 1 || stride_bytes < 0)) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "%s has a stride of %lld bytes; items of %lld would overlap", name,
                (long long)stride_bytes, (long long)item);
  }
  if (stride_bytes % int64_t(alignment) != 0) {
    return fail(TQ_ERROR_MISALIGNED, "%s has a stride of %lld bytes; it must be a multiple of %zu", name,
                (long long)stride_bytes, alignment);
  }
  int64_t extent = 0;
  if (!span(count, stride_bytes, &extent) || __builtin_add_overflow(extent, item, &extent)) {
    return fail(TQ_ERROR_OVERFLOW, "%s: %lld items at a stride of %lld bytes overflow 63 bits", name, (long long)count,
                (long long)stride_bytes);
  }
  *stride_out = stride_bytes;
  return TQ_OK;
}

tq_status check_workspace(const void *workspace, size_t given, size_t needed) {
  if (needed == 0) return TQ_OK;
  if (given < needed) {
    return fail(TQ_ERROR_WORKSPACE_TOO_SMALL, "args.workspace_bytes is %zu; the call needs %zu", given, needed);
  }
  if (workspace == nullptr)
    return fail(TQ_ERROR_NULL_POINTER, "args.workspace is NULL; the call needs %zu bytes", needed);
  return check_aligned(workspace, 256, "args.", "workspace");
}

}  // namespace tqkv
