// SPDX-License-Identifier: Apache-2.0
#include "cache/pages.hpp"
#include "api/handle.hpp"
#include "cache/cuda.hpp"
#include "codec/cuda.hpp"

using namespace tqkv;

namespace {

tq_status check_which(int32_t which) {
  if (which == TQ_PAGES_CODED || which == TQ_PAGES_EXACT) return TQ_OK;
  return fail(TQ_ERROR_UNKNOWN_ENUM, "which is %d; it must be TQ_PAGES_CODED or TQ_PAGES_EXACT", which);
}

tq_status read_pages(const Codec &codec, int which, const tq_pages *given, const char *name, Pool *pool) {
  tq_pages pages{};
  TQKV_TRY(read_struct(given, name, &pages));
  return check_pages(codec, which, &pages, name, false, pool);
}

// Both pools of a store or load, and their slots. `exact` is given or both of its fields are NULL.
template <class Args>
tq_status read_pools(const Codec &codec, const Args &args, Pool *pool, Pool *exact) {
  TQKV_TRY(read_pages(codec, TQ_PAGES_CODED, args.pages, "args.pages", pool));
  if ((args.exact_pages == nullptr) != (args.exact_slots == nullptr) &&
      (args.num_tokens > 0 || args.exact_pages == nullptr)) {
    return fail(TQ_ERROR_NULL_POINTER, "args.%s is NULL; exact_pages and exact_slots go together",
                args.exact_pages == nullptr ? "exact_pages" : "exact_slots");
  }
  if (args.exact_pages != nullptr) {
    TQKV_TRY(read_pages(codec, TQ_PAGES_EXACT, args.exact_pages, "args.exact_pages", exact));
  }
  if (args.num_tokens > 0 && args.slots == nullptr) return fail(TQ_ERROR_NULL_POINTER, "args.slots is NULL");
  TQKV_TRY(check_aligned(args.slots, 8, "args.", "slots"));
  TQKV_TRY(check_aligned(args.exact_slots, 8, "args.", "exact_slots"));
  TQKV_TRY(check_aligned(args.key_offset, 4, "args.", "key_offset"));
  return check_aligned(args.faults, 8, "args.", "faults");
}

// One dense side of a store or load.
template <class Args>
tq_status check_dense(const Codec &codec, const Args &args, const void *data, int type, int which, const char *name) {
  const bool keys = which == TQ_SIDE_K;
  int64_t token_stride = 0, head_stride = 0;
  return check_rows(data, type, args.num_tokens, codec.kv_heads, codec.side(which).head_dim,
                    keys ? args.k_token_stride : args.v_token_stride, keys ? args.k_head_stride : args.v_head_stride,
                    name, false, &token_stride, &head_stride);
}

}  // namespace

tq_status tq_page_layout(const tq_codec *codec, int32_t which, tq_layout *layout) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    TQKV_TRY(check_which(which));
    return write_struct(page_layout(*codec->codec, which), layout, "layout");
  });
}

tq_status tq_pages_bytes(const tq_codec *codec, int32_t which, int64_t num_blocks, int64_t *bytes) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    TQKV_TRY(check_which(which));
    if (bytes == nullptr) return fail(TQ_ERROR_NULL_POINTER, "bytes is NULL");
    return packed_bytes(*codec->codec, which, num_blocks, bytes);
  });
}

tq_status tq_cache_workspace(const tq_codec *codec, int64_t num_tokens, size_t *bytes) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    TQKV_TRY(check_count(num_tokens, "num_tokens"));
    if (bytes == nullptr) return fail(TQ_ERROR_NULL_POINTER, "bytes is NULL");
    *bytes = 0;
#ifdef TQKV_HAVE_CUDA
    if (codec->codec->cuda != nullptr) return cuda_workspace(*codec->codec, true, true, num_tokens, bytes);
#endif
    return TQ_OK;
  });
}

tq_status tq_cache_store(const tq_codec *codec, const tq_store_args *given) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    const Codec &c = *codec->codec;
    tq_store_args args{};
    TQKV_TRY(read_struct(given, "args", &args));
    TQKV_TRY(check_count(args.num_tokens, "args.num_tokens"));
    TQKV_TRY(check_type(args.input_type, "args.input_type"));
    TQKV_TRY(check_dense(c, args, args.k, args.input_type, TQ_SIDE_K, "args.k"));
    TQKV_TRY(check_dense(c, args, args.v, args.input_type, TQ_SIDE_V, "args.v"));
    Pool pool, exact;
    TQKV_TRY(read_pools(c, args, &pool, &exact));
#ifdef TQKV_HAVE_CUDA
    if (c.cuda != nullptr) return cuda_store(c, args, pool, args.exact_pages != nullptr ? &exact : nullptr);
#endif
    store_tokens(c, args, pool, args.exact_pages != nullptr ? &exact : nullptr);
    return TQ_OK;
  });
}

tq_status tq_cache_load(const tq_codec *codec, const tq_load_args *given) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    const Codec &c = *codec->codec;
    tq_load_args args{};
    TQKV_TRY(read_struct(given, "args", &args));
    TQKV_TRY(check_count(args.num_tokens, "args.num_tokens"));
    TQKV_TRY(check_type(args.output_type, "args.output_type"));
    if (args.num_tokens > 0 && args.k == nullptr && args.v == nullptr) {
      return fail(TQ_ERROR_NULL_POINTER, "args.k and args.v are both NULL");
    }
    if (args.k != nullptr) TQKV_TRY(check_dense(c, args, args.k, args.output_type, TQ_SIDE_K, "args.k"));
    if (args.v != nullptr) TQKV_TRY(check_dense(c, args, args.v, args.output_type, TQ_SIDE_V, "args.v"));
    Pool pool, exact;
    TQKV_TRY(read_pools(c, args, &pool, &exact));
#ifdef TQKV_HAVE_CUDA
    if (c.cuda != nullptr) return cuda_load(c, args, pool, args.exact_pages != nullptr ? &exact : nullptr);
#endif
    load_tokens(c, args, pool, args.exact_pages != nullptr ? &exact : nullptr);
    return TQ_OK;
  });
}

tq_status tq_cache_copy(const tq_codec *codec, const tq_copy_args *given) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    const Codec &c = *codec->codec;
    tq_copy_args args{};
    TQKV_TRY(read_struct(given, "args", &args));
    if (args.pairs_on_host != 0 && args.pairs_on_host != 1) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "args.pairs_on_host is %d; it must be 0 or 1", args.pairs_on_host);
    }
    TQKV_TRY(check_aligned(args.faults, 8, "args.", "faults"));
    struct Part {
      int which;
      const tq_pages *src, *dst;
      const int64_t *pairs;
      int64_t count;
      const char *src_name, *dst_name, *pairs_name, *count_name;
      Pool from{}, to{};
    };
    Part parts[] = {{TQ_PAGES_CODED, args.src, args.dst, args.pairs, args.num_pairs, "args.src", "args.dst",
                     "args.pairs", "args.num_pairs"},
                    {TQ_PAGES_EXACT, args.exact_src, args.exact_dst, args.exact_pairs, args.num_exact_pairs,
                     "args.exact_src", "args.exact_dst", "args.exact_pairs", "args.num_exact_pairs"}};
    for (Part &part : parts) {
      TQKV_TRY(check_count(part.count, part.count_name));
      if (part.src == nullptr && part.dst == nullptr && part.count == 0) continue;
      TQKV_TRY(read_pages(c, part.which, part.src, part.src_name, &part.from));
      part.to = part.from;
      if (part.dst != nullptr) TQKV_TRY(read_pages(c, part.which, part.dst, part.dst_name, &part.to));
      if (part.count > 0 && part.pairs == nullptr) return fail(TQ_ERROR_NULL_POINTER, "%s is NULL", part.pairs_name);
      TQKV_TRY(check_aligned(part.pairs, 8, "", part.pairs_name));
      int64_t bytes = 0;
      if (__builtin_mul_overflow(part.count, int64_t{16}, &bytes)) {
        return fail(TQ_ERROR_OVERFLOW, "%s is %lld; its pairs overflow 63 bits", part.count_name,
                    (long long)part.count);
      }
    }
#ifdef TQKV_HAVE_CUDA
    if (c.cuda != nullptr) {
      for (const Part &part : parts) TQKV_TRY(cuda_copy(c, args, part.from, part.to, part.pairs, part.count));
      return TQ_OK;
    }
#endif
    for (const Part &part : parts) copy_blocks(c, part.from, part.to, part.pairs, part.count, args.faults);
    return TQ_OK;
  });
}
