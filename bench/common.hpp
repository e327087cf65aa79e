// SPDX-License-Identifier: Apache-2.0
// What every benchmark of the interface needs.
#pragma once

#include <tqkv/tqkv.h>

#include <memory>

namespace tqkv_bench {

// A zeroed struct of the interface with its struct_size set.
template <class Struct>
Struct sized() {
  Struct result{};
  result.struct_size = sizeof(Struct);
  return result;
}

struct CodecDeleter {
  void operator()(tq_codec *codec) const { tq_destroy(codec); }
};
using Codec = std::unique_ptr<tq_codec, CodecDeleter>;

}  // namespace tqkv_bench
