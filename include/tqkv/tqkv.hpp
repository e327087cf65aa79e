// SPDX-License-Identifier: Apache-2.0
// C++17 over tqkv.h: a codec that ends itself, and refusals as exceptions. Everything else is the C interface.
#ifndef TQKV_TQKV_HPP_
#define TQKV_TQKV_HPP_

#include <tqkv/tqkv.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>

namespace tqkv {

// A refused call: what() is the library's sentence.
class Error : public std::runtime_error {
 public:
  Error(tq_status status, const char *sentence) : std::runtime_error(sentence), status_(status) {}
  tq_status status() const noexcept { return status_; }

 private:
  tq_status status_;
};

// Throws Error unless `status`, just returned by a call of this thread, is TQ_OK.
inline void check(tq_status status) {
  if (status != TQ_OK) throw Error(status, tq_last_error());
}

// The configuration of a preset; head_dim and kv_heads are still to be set.
inline tq_config preset(const char *name = nullptr) {
  tq_config config;
  check(tq_config_init(&config, sizeof config, name));
  return config;
}

// Owns a tq_codec. Move-only; a moved-from codec may only be assigned to or destroyed.
class Codec {
 public:
  explicit Codec(const tq_config &config) {
    tq_codec *codec = nullptr;
    check(tq_create(&config, &codec));
    codec_.reset(codec);
  }

  tq_codec *get() const noexcept { return codec_.get(); }

  tq_codec_info info() const {
    tq_codec_info info = {};
    info.struct_size = sizeof info;
    check(tq_info(get(), &info));
    return info;
  }

  tq_layout page_layout(int32_t which = TQ_PAGES_CODED) const {
    tq_layout layout = {};
    layout.struct_size = sizeof layout;
    check(tq_page_layout(get(), which, &layout));
    return layout;
  }

  int64_t pages_bytes(int64_t num_blocks, int32_t which = TQ_PAGES_CODED) const {
    int64_t bytes = 0;
    check(tq_pages_bytes(get(), which, num_blocks, &bytes));
    return bytes;
  }

  std::size_t vectors_workspace(int32_t side, int64_t count) const {
    std::size_t bytes = 0;
    check(tq_vectors_workspace(get(), side, count, &bytes));
    return bytes;
  }

  std::size_t cache_workspace(int64_t num_tokens) const {
    std::size_t bytes = 0;
    check(tq_cache_workspace(get(), num_tokens, &bytes));
    return bytes;
  }

  std::size_t attention_workspace(const tq_attention_args &args) const {
    std::size_t bytes = 0;
    check(tq_attention_workspace(get(), &args, &bytes));
    return bytes;
  }

  void encode(const tq_encode_args &args) const { check(tq_encode(get(), &args)); }
  void decode(const tq_decode_args &args) const { check(tq_decode(get(), &args)); }
  void cache_store(const tq_store_args &args) const { check(tq_cache_store(get(), &args)); }
  void cache_load(const tq_load_args &args) const { check(tq_cache_load(get(), &args)); }
  void cache_copy(const tq_copy_args &args) const { check(tq_cache_copy(get(), &args)); }
  void paged_attention(const tq_attention_args &args) const { check(tq_paged_attention(get(), &args)); }
  void merge_states(const tq_merge_args &args) const { check(tq_merge_states(get(), &args)); }

 private:
  struct Destroy {
    void operator()(tq_codec *codec) const noexcept { tq_destroy(codec); }
  };
  std::unique_ptr<tq_codec, Destroy> codec_;
};

}  // namespace tqkv

#endif  // TQKV_TQKV_HPP_
