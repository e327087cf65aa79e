// SPDX-License-Identifier: Apache-2.0
// The thread-local error sentence and the barrier that keeps exceptions inside the library.
#pragma once

#include <tqkv/tqkv.h>

#include <exception>
#include <new>

namespace tqkv {

// Stores a printf-formatted sentence for tq_last_error and returns `status`.
[[nodiscard]] [[gnu::format(printf, 2, 3)]] tq_status fail(tq_status status, const char *format, ...);

const char *last_error();

// Runs a function that returns tq_status; exceptions become statuses.
template <class Function>
tq_status guard(Function &&function) noexcept {
  try {
    return function();
  } catch (const std::bad_alloc &) {
    return fail(TQ_ERROR_OUT_OF_MEMORY, "the host is out of memory");
  } catch (const std::exception &e) {
    return fail(TQ_ERROR_INTERNAL, "internal error: %s", e.what());
  } catch (...) {
    return fail(TQ_ERROR_INTERNAL, "internal error of unknown kind");
  }
}

}  // namespace tqkv

// Leaves the calling function with the status of `expression` unless it is TQ_OK.
#define TQKV_TRY(expression)                              \
  do {                                                    \
    const tq_status tqkv_try_status = (expression);       \
    if (tqkv_try_status != TQ_OK) return tqkv_try_status; \
  } while (false)
