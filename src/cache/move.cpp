// SPDX-License-Identifier: Apache-2.0
// Store, load and copy on the CPU. Vectors are numbered head-major, head * num_tokens + token, so that a group of them
// is a run of tokens of one head in a prefill and all heads of a token in a decode step.
#include <algorithm>
#include <cstring>

#include "cache/pages.hpp"
#include "codec/quantize.hpp"

namespace tqkv {
namespace {

constexpr int kMaxRecordBytes = 2 * kMaxHeadDim;

// A group's working set, on the stack of the thread that handles it.
struct Group {
  float rows[kGroup * kMaxHeadDim];
  uint8_t records[kGroup * kMaxRecordBytes];
  alignas(4) uint8_t scales[kGroup * 4];
  Encoded encoded[kGroup];
};

struct Strides {
  int64_t token, head;
  Strides(int64_t token_stride, int64_t head_stride, int heads, int head_dim)
      : token(token_stride != 0 ? token_stride : int64_t{heads} * head_dim),
        head(head_stride != 0 ? head_stride : head_dim) {}
};

int64_t groups_of(int64_t vectors) {
  return (vectors + kGroup - 1) / kGroup;
}

void subtract(float *row, const float *offset, int n) {
  for (int c = 0; c < n; ++c) row[c] = row[c] - offset[c];
}

void add(float *row, const float *offset, int n) {
  for (int c = 0; c < n; ++c) row[c] = row[c] + offset[c];
}

enum class Slot { kSkip, kGood, kBad };

Slot check_slot(const Pool *pool, const int64_t *slots, int64_t token) {
  if (pool == nullptr || slots[token] == -1) return Slot::kSkip;
  return pool->has_slot(slots[token]) ? Slot::kGood : Slot::kBad;
}

}  // namespace

void store_tokens(const Codec &codec, const tq_store_args &args, const Pool &pool, const Pool *exact) {
  const int heads = codec.kv_heads;
  const int64_t vectors = args.num_tokens * heads;
  const int element = type_bytes(args.input_type);
  codec.parallel->run(groups_of(vectors), [&](int64_t index) {
    Group group;
    const int64_t begin = index * kGroup;
    const int n = int(std::min<int64_t>(kGroup, vectors - begin));
    for (int which : {TQ_SIDE_K, TQ_SIDE_V}) {
      const bool keys = which == TQ_SIDE_K;
      const Side &side = codec.side(which);
      const auto *input = static_cast<const uint8_t *>(keys ? args.k : args.v);
      const Strides strides = keys ? Strides(args.k_token_stride, args.k_head_stride, heads, side.head_dim)
                                   : Strides(args.v_token_stride, args.v_head_stride, heads, side.head_dim);
      // First the codes, then the raw copy; a vector that both take is counted once.
      Encoded counted[kGroup] = {};
      for (const Pool *to : {&pool, exact}) {
        if (to == nullptr) continue;
        const Side &target = keys ? *to->k : *to->v;
        for (int i = 0; i < n; ++i) {
          const int64_t head = (begin + i) / args.num_tokens, token = (begin + i) % args.num_tokens;
          float *row = group.rows + i * side.head_dim;
          codec.kernels->to_f32(input + (token * strides.token + head * strides.head) * element, args.input_type,
                                side.head_dim, row);
          if (keys && to == &pool && args.key_offset != nullptr) {
            subtract(row, args.key_offset + head * side.head_dim, side.head_dim);
          }
        }
        encode_group(codec, target, group.rows, n, group.records, group.scales, group.encoded);
        for (int i = 0; i < n; ++i) {
          const int head = int((begin + i) / args.num_tokens);
          const int64_t token = (begin + i) % args.num_tokens;
          const Slot coded_slot = check_slot(&pool, args.slots, token);
          const Slot exact_slot = check_slot(exact, args.exact_slots, token);
          if (coded_slot == Slot::kBad || exact_slot == Slot::kBad) {
            if (head == 0 && keys && to == &pool) count_fault(args.faults, TQ_FAULT_SLOT, token);
            continue;
          }
          if ((to == exact ? exact_slot : coded_slot) == Slot::kSkip) continue;
          if (counted[i] == Encoded::kFine) count_encoded(args.faults, group.encoded[i], token);
          counted[i] = std::max(counted[i], group.encoded[i]);
          const int64_t slot = (to == exact ? args.exact_slots : args.slots)[token];
          write_token(*to, to->tile(slot, head), which, int(slot % kTileTokens),
                      group.records + i * target.code_bytes(), group.scales + i * target.scale_bytes());
        }
      }
    }
  });
}

void load_tokens(const Codec &codec, const tq_load_args &args, const Pool &pool, const Pool *exact) {
  const int heads = codec.kv_heads;
  const int64_t vectors = args.num_tokens * heads;
  const int element = type_bytes(args.output_type);
  codec.parallel->run(groups_of(vectors), [&](int64_t index) {
    Group group;
    const int64_t begin = index * kGroup;
    const int n = int(std::min<int64_t>(kGroup, vectors - begin));
    for (int which : {TQ_SIDE_K, TQ_SIDE_V}) {
      const bool keys = which == TQ_SIDE_K;
      auto *output = static_cast<uint8_t *>(keys ? args.k : args.v);
      const Side &side = codec.side(which);
      const Strides strides = keys ? Strides(args.k_token_stride, args.k_head_stride, heads, side.head_dim)
                                   : Strides(args.v_token_stride, args.v_head_stride, heads, side.head_dim);
      const bool counts = args.k == nullptr || keys;  // the first side that is wanted counts the faults
      if (output == nullptr) continue;
      for (const Pool *from : {&pool, exact}) {
        if (from == nullptr) continue;
        const Side &source = keys ? *from->k : *from->v;
        // The vectors that this pool serves, packed.
        int taken = 0;
        int64_t taken_vectors[kGroup];
        for (int i = 0; i < n; ++i) {
          const int64_t vector = begin + i, token = vector % args.num_tokens;
          const int head = int(vector / args.num_tokens);
          const bool is_exact = exact != nullptr && args.exact_slots[token] >= 0;
          const Slot coded_slot = check_slot(&pool, args.slots, token);
          const Slot exact_slot = check_slot(exact, args.exact_slots, token);
          const Slot slot = exact_slot == Slot::kBad ? Slot::kBad : is_exact ? exact_slot : coded_slot;
          if (slot == Slot::kSkip || (slot == Slot::kGood && is_exact != (from == exact))) continue;
          if (slot == Slot::kBad) {
            if (from != &pool) continue;
            if (head == 0 && counts) count_fault(args.faults, TQ_FAULT_SLOT, token);
            std::memset(output + (token * strides.token + head * strides.head) * element, 0,
                        size_t(side.head_dim * element));
            continue;
          }
          const int64_t at = (is_exact ? args.exact_slots : args.slots)[token];
          read_token(*from, from->tile(at, head), which, int(at % kTileTokens),
                     group.records + taken * source.code_bytes(), group.scales + taken * source.scale_bytes());
          taken_vectors[taken++] = vector;
        }
        if (taken == 0) continue;
        decode_group(codec, source, group.records, group.scales, taken, group.rows);
        for (int i = 0; i < taken; ++i) {
          const int64_t token = taken_vectors[i] % args.num_tokens, head = taken_vectors[i] / args.num_tokens;
          float *row = group.rows + i * side.head_dim;
          if (keys && from == &pool && args.key_offset != nullptr) {
            add(row, args.key_offset + head * side.head_dim, side.head_dim);
          }
          codec.kernels->from_f32(row, args.output_type, side.head_dim,
                                  output + (token * strides.token + head * strides.head) * element);
        }
      }
    }
  });
}

void copy_blocks(const Codec &codec, const Pool &src, const Pool &dst, const int64_t *pairs, int64_t num_pairs,
                 tq_faults *faults) {
  codec.parallel->run(num_pairs, [&](int64_t index) {
    const int64_t from = pairs[2 * index], to = pairs[2 * index + 1];
    if (from == -1 && to == -1) return;
    if (!src.has_block(from) || !dst.has_block(to)) return count_fault(faults, TQ_FAULT_BLOCK, index);
    const int size = src.block_size;
    for (int head = 0; head < src.kv_heads; ++head) {
      for (int token = 0; token < size && size >= kTileTokens; token += kTileTokens) {
        std::memcpy(dst.tile(to * size + token, head), src.tile(from * size + token, head), size_t(src.layout.bytes));
      }
      for (int token = 0; token < size && size < kTileTokens; ++token) {
        const int64_t a = from * size + token, b = to * size + token;
        for (int which : {TQ_SIDE_K, TQ_SIDE_V}) {
          uint8_t record[kMaxRecordBytes], scale[4];
          read_token(src, src.tile(a, head), which, int(a % kTileTokens), record, scale);
          write_token(dst, dst.tile(b, head), which, int(b % kTileTokens), record, scale);
        }
      }
    }
  });
}

}  // namespace tqkv
