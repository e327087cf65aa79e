// SPDX-License-Identifier: Apache-2.0
// The opaque handle, and how an entry point takes its arguments.
#pragma once

#include "codec/codec.hpp"
#include "runtime/args.hpp"
#include "runtime/error.hpp"

struct tq_codec {
  std::unique_ptr<tqkv::Codec> codec;
};

namespace tqkv {

[[nodiscard]] inline tq_status check_codec(const tq_codec *handle) {
  return handle != nullptr ? TQ_OK : fail(TQ_ERROR_NULL_POINTER, "codec is NULL");
}

[[nodiscard]] inline tq_status check_side(int32_t side, const char *name) {
  if (side == TQ_SIDE_K || side == TQ_SIDE_V) return TQ_OK;
  return fail(TQ_ERROR_UNKNOWN_ENUM, "%s is %d; it must be TQ_SIDE_K or TQ_SIDE_V", name, side);
}

[[nodiscard]] inline tq_status check_count(int64_t count, const char *name) {
  return count >= 0 ? TQ_OK : fail(TQ_ERROR_INVALID_ARGUMENT, "%s is %lld, below zero", name, (long long)count);
}

}  // namespace tqkv
