// SPDX-License-Identifier: Apache-2.0
#include "runtime/error.hpp"

#include <cstdarg>
#include <cstdio>

namespace tqkv {
namespace {
thread_local char error_text[512];
}

tq_status fail(tq_status status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(error_text, sizeof error_text, format, args);
  va_end(args);
  return status;
}

const char *last_error() {
  return error_text;
}

}  // namespace tqkv
