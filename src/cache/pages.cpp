// SPDX-License-Identifier: Apache-2.0
#include "cache/pages.hpp"

#include <algorithm>
#include <cstring>

#include "runtime/error.hpp"

namespace tqkv {
namespace {

// The byte offset of a plane in a record; its bytes in a tile begin at kTileTokens times that.
struct Plane {
  int offset, bytes;
};

// The planes of a side's record; the second has no bytes unless there are 3 bits.
struct Planes {
  Plane plane[2];
  explicit Planes(const Side &side)
      : plane{{0, plane_bytes(side.head_dim, side.bits, 0)},
              {plane_bytes(side.head_dim, side.bits, 0), plane_bytes(side.head_dim, side.bits, 1)}} {}
};

// Calls move(offset in the tile's codes, offset in the record, bytes) for each run of bytes of a token.
template <class Move>
void for_each_run(const Side &side, int which, int row, Move &&move) {
  for (const Plane &plane : Planes(side).plane) {
    const int start = kTileTokens * plane.offset;
    if (which == TQ_SIDE_K || side.raw()) {
      if (plane.bytes != 0) move(start + row * plane.bytes, plane.offset, plane.bytes);
    } else {
      for (int e = 0; e < plane.bytes; ++e) move(start + v_plane_offset(plane.bytes, e, row), plane.offset + e, 1);
    }
  }
}

struct Offsets {
  int64_t codes, scales;
};

Offsets side_offsets(const Pool &pool, int which) {
  const TileLayout &layout = pool.layout;
  return which == TQ_SIDE_K ? Offsets{layout.k_codes, layout.k_scales} : Offsets{layout.v_codes, layout.v_scales};
}

const Side &side_of(const Codec &codec, int pages, int which) {
  if (pages == TQ_PAGES_EXACT) return which == TQ_SIDE_K ? codec.exact_k : codec.exact_v;
  return codec.side(which);
}

bool multiply(int64_t a, int64_t b, int64_t *product) {
  return !__builtin_mul_overflow(a, b, product);
}

}  // namespace

void write_record(const Side &side, int which, uint8_t *tile_codes, int row, const uint8_t *record) {
  for_each_run(side, which, row, [&](int in_tile, int in_record, int bytes) {
    std::memcpy(tile_codes + in_tile, record + in_record, size_t(bytes));
  });
}

void read_record(const Side &side, int which, const uint8_t *tile_codes, int row, uint8_t *record) {
  for_each_run(side, which, row, [&](int in_tile, int in_record, int bytes) {
    std::memcpy(record + in_record, tile_codes + in_tile, size_t(bytes));
  });
}

void write_token(const Pool &pool, uint8_t *tile, int which, int row, const uint8_t *record, const void *scale) {
  const Side &side = which == TQ_SIDE_K ? *pool.k : *pool.v;
  const Offsets at = side_offsets(pool, which);
  write_record(side, which, tile + at.codes, row, record);
  const int bytes = side.scale_bytes();
  if (bytes != 0) std::memcpy(tile + at.scales + row * bytes, scale, size_t(bytes));
}

void read_token(const Pool &pool, const uint8_t *tile, int which, int row, uint8_t *record, void *scale) {
  const Side &side = which == TQ_SIDE_K ? *pool.k : *pool.v;
  const Offsets at = side_offsets(pool, which);
  read_record(side, which, tile + at.codes, row, record);
  const int bytes = side.scale_bytes();
  if (bytes != 0) std::memcpy(scale, tile + at.scales + row * bytes, size_t(bytes));
}

tq_layout page_layout(const Codec &codec, int which) {
  const TileLayout tile(side_of(codec, which, TQ_SIDE_K), side_of(codec, which, TQ_SIDE_V));
  tq_layout layout{};
  layout.block_size_tokens = which == TQ_PAGES_EXACT ? codec.exact_block_size : codec.block_size;
  layout.tile_bytes = tile.bytes;
  layout.k_codes_offset = tile.k_codes;
  layout.v_codes_offset = tile.v_codes;
  layout.k_scales_offset = tile.k_scales;
  layout.v_scales_offset = tile.v_scales;
  layout.head_stride_bytes = tile.bytes;
  layout.tile_stride_bytes = codec.kv_heads * tile.bytes;
  layout.block_stride_bytes = std::max(1, layout.block_size_tokens / kTileTokens) * layout.tile_stride_bytes;
  layout.bytes_per_token = layout.tile_stride_bytes / kTileTokens;
  layout.fingerprint = which == TQ_PAGES_EXACT ? codec.exact_fingerprint : codec.page_fingerprint;
  return layout;
}

namespace {

// Blocks of storage that hold num_blocks blocks.
int64_t storage_blocks(int64_t num_blocks, int block_size) {
  const int per_storage = block_size < kTileTokens ? kTileTokens / block_size : 1;
  return num_blocks / per_storage + (num_blocks % per_storage != 0);
}

}  // namespace

tq_status packed_bytes(const Codec &codec, int which, int64_t num_blocks, int64_t *bytes) {
  const tq_layout layout = page_layout(codec, which);
  if (num_blocks < 0) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "num_blocks is %lld, below zero", (long long)num_blocks);
  }
  int64_t result = 0;
  if (!multiply(storage_blocks(num_blocks, layout.block_size_tokens), layout.block_stride_bytes, &result)) {
    return fail(TQ_ERROR_OVERFLOW, "num_blocks %lld times %lld bytes a block overflows 63 bits", (long long)num_blocks,
                (long long)layout.block_stride_bytes);
  }
  *bytes = result;
  return TQ_OK;
}

tq_status check_pages(const Codec &codec, int which, const tq_pages *pages, const char *name, bool skip_pointers,
                      Pool *pool) {
  const tq_layout layout = page_layout(codec, which);
  if (pages->fingerprint != layout.fingerprint) {
    return fail(TQ_ERROR_FINGERPRINT_MISMATCH, "%s.fingerprint is %016llx; this codec's is %016llx", name,
                (unsigned long long)pages->fingerprint, (unsigned long long)layout.fingerprint);
  }
  if (pages->reserved != 0) {
    return fail(TQ_ERROR_RESERVED_NOT_ZERO, "%s.reserved is %u, must be zero", name, pages->reserved);
  }
  if (pages->num_blocks < 0) {
    return fail(TQ_ERROR_INVALID_ARGUMENT, "%s.num_blocks is %lld, below zero", name, (long long)pages->num_blocks);
  }
  if (!skip_pointers && pages->num_blocks > 0) {
    if (pages->base == nullptr) return fail(TQ_ERROR_NULL_POINTER, "%s.base is NULL", name);
    if (reinterpret_cast<uintptr_t>(pages->base) % 16 != 0) {
      return fail(TQ_ERROR_MISALIGNED, "%s.base is %p; it must be 16-byte aligned", name, pages->base);
    }
  }
  Pool result;
  result.k = &side_of(codec, which, TQ_SIDE_K);
  result.v = &side_of(codec, which, TQ_SIDE_V);
  result.layout = TileLayout(*result.k, *result.v);
  result.base = static_cast<uint8_t *>(pages->base);
  result.kv_heads = codec.kv_heads;
  result.block_size = layout.block_size_tokens;
  result.num_blocks = pages->num_blocks;

  // Tiles are told apart by block, tile in the block, and head. Taken by growing stride, each stride must pass over
  // everything below it.
  struct Dimension {
    const char *what;
    int64_t stride, standard, count;
  };
  Dimension dimensions[3] = {
      {"head_stride_bytes", pages->head_stride_bytes, layout.head_stride_bytes, codec.kv_heads},
      {"tile_stride_bytes", pages->tile_stride_bytes, layout.tile_stride_bytes,
       std::max(1, result.block_size / kTileTokens)},
      {"block_stride_bytes", pages->block_stride_bytes, layout.block_stride_bytes,
       storage_blocks(pages->num_blocks, result.block_size)},
  };
  for (Dimension &dimension : dimensions) {
    if (dimension.stride == 0) dimension.stride = dimension.standard;
    if (dimension.stride < 0) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "%s.%s is %lld, below zero", name, dimension.what,
                  (long long)dimension.stride);
    }
    if (dimension.stride % 16 != 0) {
      return fail(TQ_ERROR_MISALIGNED, "%s.%s is %lld; it must be a multiple of 16", name, dimension.what,
                  (long long)dimension.stride);
    }
  }
  result.head_stride = dimensions[0].stride;
  result.tile_stride = dimensions[1].stride;
  result.block_stride = dimensions[2].stride;
  std::ranges::stable_sort(dimensions, {}, &Dimension::stride);
  int64_t extent = result.layout.bytes;
  for (const Dimension &dimension : dimensions) {
    if (dimension.count <= 1) continue;
    if (dimension.stride < extent) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "%s.%s is %lld; tiles would overlap, at least %lld is needed", name,
                  dimension.what, (long long)dimension.stride, (long long)extent);
    }
    int64_t span = 0;
    if (!multiply(dimension.stride, dimension.count - 1, &span) || __builtin_add_overflow(span, extent, &extent)) {
      return fail(TQ_ERROR_OVERFLOW, "%s: %s %lld times %lld overflows 63 bits", name, dimension.what,
                  (long long)dimension.stride, (long long)dimension.count);
    }
  }
  int64_t slots = 0;
  if (!multiply(result.num_blocks, result.block_size, &slots)) {
    return fail(TQ_ERROR_OVERFLOW, "%s.num_blocks is %lld; its slots overflow 63 bits", name,
                (long long)result.num_blocks);
  }
  *pool = result;
  return TQ_OK;
}

}  // namespace tqkv
