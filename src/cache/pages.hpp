// SPDX-License-Identifier: Apache-2.0
// Where the bytes of a token are in a pool of pages. tqkv.h ("BYTE ORDER") specifies it.
#pragma once

#include "codec/codec.hpp"

namespace tqkv {

// One head's tile of kTileTokens tokens.
struct TileLayout {
  int64_t k_codes = 0, v_codes = 0, k_scales = 0, v_scales = 0, bytes = 0;

  TileLayout() = default;
  TileLayout(const Side &k, const Side &v)
      : v_codes(int64_t{kTileTokens} * k.code_bytes()),
        k_scales(v_codes + int64_t{kTileTokens} * v.code_bytes()),
        v_scales(k_scales + int64_t{kTileTokens} * k.scale_bytes()),
        bytes(v_scales + int64_t{kTileTokens} * v.scale_bytes()) {}
};

// A checked pool.
struct Pool {
  const Side *k = nullptr, *v = nullptr;
  TileLayout layout;
  uint8_t *base = nullptr;
  int kv_heads = 0, block_size = 0;
  int64_t num_blocks = 0, block_stride = 0, tile_stride = 0, head_stride = 0;

  // Blocks of fewer tokens than a tile share one.
  int storage_tokens() const { return block_size < kTileTokens ? kTileTokens : block_size; }
  int64_t num_slots() const { return num_blocks * block_size; }
  bool has_slot(int64_t slot) const { return slot >= 0 && slot < num_slots(); }
  bool has_block(int64_t block) const { return block >= 0 && block < num_blocks; }
  uint8_t *tile(int64_t slot, int head) const {
    const int64_t tokens = storage_tokens();
    return base + slot / tokens * block_stride + slot % tokens / kTileTokens * tile_stride + head * head_stride;
  }
};

// The layout that tq_page_layout reports.
tq_layout page_layout(const Codec &codec, int which);

// Bytes of a packed pool.
[[nodiscard]] tq_status packed_bytes(const Codec &codec, int which, int64_t num_blocks, int64_t *bytes);

// Checks a descriptor against the codec; `name` names it in the error sentence. With `skip_pointers` the base is not
// looked at.
[[nodiscard]] tq_status check_pages(const Codec &codec, int which, const tq_pages *pages, const char *name,
                                    bool skip_pointers, Pool *pool);

// Moves one token's record between a row of a tile's codes and contiguous memory. `which`: TQ_SIDE_K or TQ_SIDE_V.
void write_record(const Side &side, int which, uint8_t *tile_codes, int row, const uint8_t *record);
void read_record(const Side &side, int which, const uint8_t *tile_codes, int row, uint8_t *record);

// Moves one token's record and scale between a row of a tile and contiguous memory.
void write_token(const Pool &pool, uint8_t *tile, int which, int row, const uint8_t *record, const void *scale);
void read_token(const Pool &pool, const uint8_t *tile, int which, int row, uint8_t *record, void *scale);

void store_tokens(const Codec &codec, const tq_store_args &args, const Pool &pool, const Pool *exact);
void load_tokens(const Codec &codec, const tq_load_args &args, const Pool &pool, const Pool *exact);
void copy_blocks(const Codec &codec, const Pool &src, const Pool &dst, const int64_t *pairs, int64_t num_pairs,
                 tq_faults *faults);

}  // namespace tqkv
