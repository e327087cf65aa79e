// SPDX-License-Identifier: Apache-2.0
// What every subcommand needs around the public header: errors, owners, a parallel loop.
#pragma once

#include <tqkv/tqkv.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace tqkv_cli {

// A refusal for people: one sentence that names the file and the field. main() prints it and exits with 1.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws Error with the library's sentence unless status is TQ_OK.
void check(tq_status status, const std::string &what);

// Text of unknown origin with its control bytes escaped; in quotes it is also cut where it is long.
std::string printable(std::string_view text);
std::string in_quotes(std::string_view text);

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
Codec make_codec(const tq_config &config, const std::string &what);

// Zeroed memory, aligned for pages and workspace; `refill` keeps what it has when that is enough.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) { refill(bytes); }
  void refill(size_t bytes);
  void *get() const { return memory_.get(); }
  template <class T>
  T *as() const {
    return static_cast<T *>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void *p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t bytes_ = 0;
};

// body(i) for i in [0, count) on all cores. The first exception of a body is thrown again here.
void parallel_for(int64_t count, const std::function<void(int64_t)> &body);

struct Preset {
  std::string name;
  std::vector<std::string> aliases;
  int32_t k_bits, v_bits;

  std::string title() const { return aliases.empty() ? name : name + " (" + aliases.front() + ")"; }
};

// The library's presets with their aliases folded in; of `names` only, if there are any.
std::vector<Preset> presets(const std::vector<std::string> &names = {});

// What --rotation accepts, and the TQ_ROTATION_* it means.
std::map<std::string, int32_t> rotation_names();

// Seconds since an arbitrary moment.
double now_seconds();

}  // namespace tqkv_cli
