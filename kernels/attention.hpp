// SPDX-License-Identifier: Apache-2.0
// Paged attention on CUDA: three launches. "Prepare" turns queries into operands, "attention" reads the pages and leaves
// partial results, "finish" merges these, leaves the rotated domain and adds what is read raw. Plain structs, passed by
// value; see launch.hpp.
//
// KERNELS. Few rows over codes are attention.cuh's, on integer tensor cores. Many rows (prefill), raw pages and what else
// that has no kernel for are attention_wide.cuh's, on 16-bit ones; it reads k_new of 16 bits, too. The rest, exact pages
// and other k_new, is read by "finish".
//
// SEGMENTS. The query rows that share a kv head are cut into segments of at most 8 rows, in the wide kernels 16 to 128:
// `block_tokens` tokens by `block_heads` heads. A segment has `pack_heads` kv heads, next to each other in memory, and the
// keys of one sequence, or of one split of it. Where the wide kernels read k_new the last "split" is its keys; their tiles
// are counted from the first one on. Segments are numbered by (sequence, token block, head part, head pack, split), the
// last fastest; sequence s has segments sequence_segments[s] .. sequence_segments[s + 1] - 1, none if its rows are not
// known.
//
// DIRECT. With few sequences of few tokens, as in decode steps, blocks of the main kernel list their items themselves while
// "prepare" works, which leaves of the schedule only what "finish" asks for: first_slot and end_slot of segments, the
// number of all units at segment_units[0], and states of sequences. Then every sequence has token_blocks, and segments are
// numbered by (sequence, token block, head part, head pack), without gaps.
//
// UNITS. A unit is the time that a tile of 16 tokens takes; a segment has item_units for its beginning, if it has tiles,
// and then one a tile. All units together, in the order of segments, are cut into `blocks` equal ranges, one a CUDA block:
// block b has units [b N / blocks, (b + 1) N / blocks). With a fixed split a segment is not cut: it belongs to the block
// that has its first unit. "Prepare" lists what each block has.
//
// FAULTS. "Prepare" looks at the ids of exact blocks, and writes 0 or 1 to sequence_faults[s]; "attention" stores 1 where
// sequence s needs a bad id of its pages. "Finish" counts faults, and gives zeros to sequences that have one.
//
// COUNTS. In DIRECT calls of one token block a sequence "finish" does not wait for the end of "attention", but for the parts
// of its own segment: each adds 1 to part_counts, which "prepare" has cleared, and before that has noted its faults, which
// are those of the sequence, because all its segments need the same ids.
//
// PARTIALS. What block b has of segment i goes to slot b + i, which no other pair has: pack_heads * rows states (m, l)
// as float2, and at partial_outputs() as many outputs of head_dim_v floats, in the natural order of channels (rotated
// domain). With x the scores times log2(e): l = sum of 2^(x - m), output = sum of 2^(x - m) scale_v level, so that
// decode_gain of V and the rotation back are still to come. m is -infinity where no key is visible; l is NaN where a
// score is.
#pragma once

#include "codec/host_device.hpp"
#include "kernels/launch.hpp"

namespace tqkv::cuda {

// A pool of pages by tiles; offsets within one head's tile. K's codes come first.
struct AttentionPool {
  const uint8_t *base;
  int64_t num_blocks, block_stride, tile_stride, head_stride;
  int32_t v_codes, k_scales, v_scales, tile_bytes;
  int32_t block_size;
};

inline constexpr int kMaxAttentionBlocks = 512;
// Bytes of codes whose time, on an H200, is that of an item more in a block.
inline constexpr int kItemBytes = 32 << 10;
inline constexpr float kLog2E = 0x1.715476p+0f;

// A segment, or the part of one that a block has. Tiles [first_tile, end_tile); a segment without units has none.
struct alignas(16) AttentionItem {
  int32_t sequence, token_block, head_part, head_pack, first_tile, end_tile;
  int32_t first_slot, end_slot;  // of a segment: where its parts are; of an item 0
};

// The items of a block are in slots first .. first + count - 1. Some may have no tiles.
struct BlockItems {
  int32_t first, count;
};

// What describes the work; checked by the host as far as the host can.
struct AttentionCall {
  int32_t num_seqs, num_tokens, q_heads, kv_heads, group;  // group: q_heads / kv_heads
  int32_t causal, max_q_len, max_length;
  Rows q, k_new, v_new, out;  // k_new.data null: none
  const int32_t *cu_seqlens_q, *q_positions, *lengths, *starts;

  AttentionPool pool;
  const int32_t *block_table, *block_indptr, *block_indices;  // block_table null: CSR
  int64_t table_stride, table_columns, num_block_indices;

  AttentionPool exact;         // base null: none
  const int32_t *exact_table;  // [num_seqs, exact_columns]
  int64_t exact_stride, exact_columns, exact_first, exact_recent;
  int32_t raw_type;  // of exact pages

  float scale, soft_cap;       // soft_cap 0: none
  float cap_log2, cap_factor;  // soft_cap * log2(e), 2 / soft_cap
  int64_t window;              // 0: none
  const float *sinks, *alibi_slopes, *key_offset;
  float *lse;
  tq_faults *faults;

  // Codes.
  int32_t k_bits, v_bits, k_scale_type, v_scale_type, head_dim_k, head_dim_v;
  int32_t k_uniform, v_uniform;       // 2 bits with levels -3, -1, 1, 3
  uint32_t k_levels[2], v_levels[2];  // operands.cuh: LevelTable

  // The wide kernels.
  int32_t wide_rows;                  // that a segment may have; 0: attention.cuh
  int32_t query_type, query_parts;    // of operands: f16 or bf16, high parts alone or low ones, too
  int32_t weight_parts;               // likewise, of f16
  float new_gain;                     // of queries of k_new, which may have the opposite sign
  uint32_t k_halves[4], v_halves[4];  // attention_wide.cuh: HalfTable

  // Segments and units.
  int32_t block_tokens, block_heads, head_parts;  // head_parts: ceil(group / block_heads)
  int32_t pack_heads, head_packs;                 // kv_heads = pack_heads * head_packs
  int32_t splits, split_tiles;                    // of all kinds; 0: automatic
  int32_t page_splits;                            // of pages; the others are of k_new
  int32_t blocks;                                 // at most kMaxAttentionBlocks
  int64_t max_segments;                           // max_segments + blocks is at most INT32_MAX / 2
  int32_t item_units;                             // what an item more costs a block
  int32_t direct, token_blocks;                   // token_blocks: of every sequence of a DIRECT call
  int32_t counts_parts;                           // COUNTS

  // Workspace.
  int32_t *sequence_states;     // [num_seqs]: SequenceState
  int32_t *sequence_faults;     // [num_seqs]: not 0 where a needed block id is bad; "prepare" writes all of them
  int64_t *sequence_segments;   // [num_seqs + 1]
  int64_t *segment_units;       // [max_segments + 1]: first unit of each, then the number of all
  AttentionItem *segments;      // [max_segments]
  AttentionItem *items;         // [blocks + max_segments]: what block b has of segment i in slot b + i
  BlockItems *block_items;      // [blocks]
  uint32_t *part_counts;        // [max_segments, pack_heads]
  uint8_t *query_operands;      // [num_tokens, q_heads, operand_bytes / 4, 2]: words of high and of low bytes; in the
                                // wide kernels [num_tokens, q_heads, query_parts, head_dim_k] of query_type
  uint8_t *new_operands;        // [num_tokens, q_heads, head_dim_k] of q's type, where they read k_new
  int32_t operand_bytes;        // 32 * ceil(head_dim_k / 32)
  struct QueryRow *query_rows;  // [num_tokens, q_heads]
  uint8_t *partials;            // [blocks + max_segments] slots
  int64_t slot_bytes;
};

// Where the outputs of a slot begin.
TQKV_HOST_DEVICE int64_t partial_outputs(int pack_heads, int rows) {
  return (int64_t{pack_heads} * rows * 8 + 15) / 16 * 16;
}

// A query of 16-bit integers Q, y = query_unit * Q its rotation; low = int8(Q), high = (Q - low) / 256, both signed.
struct QueryRow {
  float gain;    // x = gain * key scale * (sum of Q * byte + 256 * bias_high + bias_low) + offset; in the wide kernels
                 // x = gain * key scale * <operand, levels> + offset, with gain >= 0
  float offset;  // <q, key_offset> * scale * log2(e), or 0
  int32_t bias_high, bias_low;
};

// Where a byte of an operand is read: channel[i] for byte i of both planes, or -1 for zero.
struct alignas(16) QueryOrder {
  int16_t channel[kMaxDim];
};

enum SequenceState : int32_t {
  kGood = 0,
  kBadRows,    // its rows of q are not known: nothing is written
  kBadLength,  // zeros and -infinity
};

// Warps of a block of the main kernel that have rows: as many as registers allow.
inline constexpr int attention_warps(int head_dim_k, int head_dim_v, int blocks_of_rows) {
  return head_dim_k > 128 || head_dim_v > 128 ? 8 : blocks_of_rows > 1 ? 12 : 16;
}
struct AttentionLimits {
  int32_t warps;
  int32_t rows;  // of a segment: 4 or 8
};
// The kernel for a call whose codes and rows are filled in: `rows` query rows of a kv head and sequence at most. False:
// there is none.
bool find_attention(const AttentionCall &call, int64_t rows, AttentionLimits *limits);
// The order in which it reads queries.
QueryOrder query_order(const AttentionCall &call);
int launch_attention(const AttentionCall &call, void *stream);

// Rows of a segment of the wide kernel for such a call, 0 if there is none; its launch.
int find_wide_attention(const AttentionCall &call, int64_t rows);
int launch_wide_attention(const AttentionCall &call, void *stream);

// Before: queries, or with a dense rotation `rotated` [num_tokens, q_heads, head_dim_k], as operands; and if the call is
// not DIRECT segments, items and what is known of sequences.
int launch_attention_prepare(const AttentionCall &call, const SideParams &k, const QueryOrder &order,
                             const float *rotated, void *stream);
// Queries as f32 rows [num_tokens, q_heads, head_dim_k], for a dense rotation.
int launch_attention_widen(const AttentionCall &call, float *rows, void *stream);

// After: outputs, lse and faults. With a dense rotation of V both `merged` (in the rotated domain, without decode_gain)
// and `raw`, [num_tokens, q_heads, head_dim_v] f32, get what is else added up in `out`.
int launch_attention_finish(const AttentionCall &call, const SideParams &v, float *merged, float *raw, void *stream);
// out = gain * rotated_back + raw, of the rows that launch_attention_finish() wrote.
int launch_attention_write(const AttentionCall &call, float gain, const float *rotated_back, const float *raw,
                           void *stream);

}  // namespace tqkv::cuda
