// SPDX-License-Identifier: Apache-2.0
// The items that blocks of the main kernel list themselves: every tile once, in order, evenly, and where "finish" looks.
#include <algorithm>
#include <random>
#include <vector>

#include "catch.hpp"
#include "kernels/attention.cuh"

namespace tqkv_test {
uint64_t seed();  // seed.cpp
}

namespace {

using namespace tqkv::cuda;

constexpr int kCapacity = 4096;  // of items of a block

__global__ void list_all(AttentionCall call, ListedItem *listed, int32_t *counts) {
  AttentionShared &shared = *static_cast<AttentionShared *>(dynamic_shared());
  for (int before = 0;; before += kMaxItems) {
    list_items(call, shared, before);
    __syncthreads();
    if (threadIdx.x == 0) {
      const int count = std::max(shared.num_items, 0);
      std::copy_n(shared.items, count, listed + int64_t{blockIdx.x} * kCapacity + before);
      counts[blockIdx.x] = before + count;
    }
    const bool more = shared.more != 0;
    __syncthreads();
    if (!more) return;
  }
}

}  // namespace

TEST_CASE("blocks list every tile of a decode step once, in order and evenly") {
  std::mt19937_64 engine(tqkv_test::seed());
  INFO("repeat with TQKV_TEST_SEED=" << tqkv_test::seed());
  const auto below = [&](int n) { return int(engine() % uint64_t(n)); };
  for (int times = 0; times < 60; ++times) {
    AttentionCall call{};
    call.pack_heads = 1 + below(8);
    call.num_seqs = call.num_tokens = 1 + below(below(2) == 0 ? 5 : 32 * call.pack_heads);
    call.head_packs = 1 + below(4);
    call.head_parts = 1 + below(3);
    call.max_q_len = call.block_tokens = call.splits = call.page_splits = 1;
    call.causal = 1;
    call.window = below(3) == 0 ? 1 + below(400) : 0;
    call.max_length = below(2) == 0 ? 40 : 3000;
    call.blocks = 1 + below(below(2) == 0 ? 6 : kMaxAttentionBlocks);
    call.item_units = 1 + below(60);
    call.pool.block_size = 16;
    call.table_columns = (call.max_length + 15) / 16;
    std::vector<int32_t> lengths(size_t(call.num_seqs)), table(1);
    for (int32_t &length : lengths)
      length = below(6) == 0 ? below(3) * call.max_length - 1 : below(call.max_length + 1);
    call.lengths = lengths.data();
    call.block_table = table.data();
    const int copies = call.head_packs * call.head_parts, segments = call.num_seqs * copies;
    const AttentionItem unwritten{-9, -9, -9, -9, -9, -9, -9, -9};
    std::vector<AttentionItem> all_segments(size_t(segments), unwritten),
        items(size_t(segments + call.blocks), unwritten);
    call.segments = all_segments.data();
    call.items = items.data();
    std::vector<ListedItem> listed(size_t(call.blocks) * kCapacity);
    std::vector<int32_t> counts(size_t(call.blocks));
    char stream;
    REQUIRE(launch(list_all, unsigned(call.blocks), unsigned(32 * call.pack_heads), sizeof(AttentionShared), &stream,
                   call, listed.data(), counts.data()) == 0);

    std::vector<int> first(size_t(call.num_seqs)), end(first), reached(size_t(segments), -1);
    int64_t units = 0;
    for (int s = 0; s < call.num_seqs; ++s) {
      const int length = lengths[size_t(s)];
      if (length <= 0 || length > call.max_length) continue;
      first[size_t(s)] = call.window == 0 ? 0 : std::max(0, length - int(call.window)) / 16;
      end[size_t(s)] = (length + 15) / 16;
      units += copies * (end[size_t(s)] - first[size_t(s)] + call.item_units);
    }
    for (int b = 0; b < call.blocks; ++b) {
      int64_t tiles = 0;
      int last = -1;
      for (int i = 0; i < counts[size_t(b)]; ++i) {
        const ListedItem &one = listed[size_t(b) * kCapacity + size_t(i)];
        const int segment = one.slot - b, s = segment / copies, copy = segment % copies;
        REQUIRE(segment > last);
        last = segment;
        REQUIRE((segment < segments && one.item.sequence == s && one.item.token_block == 0));
        REQUIRE((one.item.head_part == copy / call.head_packs && one.item.head_pack == copy % call.head_packs));
        REQUIRE((one.fault == 0 && one.sequence.length == lengths[size_t(s)]));
        int &next = reached[size_t(segment)];
        if (next < 0) next = first[size_t(s)];
        REQUIRE((one.item.first_tile == next && one.item.end_tile >= next));
        next = one.item.end_tile;
        tiles += one.item.end_tile - one.item.first_tile;
      }
      REQUIRE(tiles <= units / call.blocks + 1);
    }
    for (int segment = 0; segment < segments; ++segment) {
      const int s = segment / copies;
      const AttentionItem &found = all_segments[size_t(segment)];
      if (first[size_t(s)] == end[size_t(s)]) {
        REQUIRE((reached[size_t(segment)] < 0 && found.first_slot == found.end_slot));
        continue;
      }
      REQUIRE(reached[size_t(segment)] == end[size_t(s)]);
      int next = first[size_t(s)];
      for (int slot = found.first_slot; slot < found.end_slot; ++slot) {
        const AttentionItem &item = items[size_t(slot)];
        REQUIRE((item.sequence == s && item.first_slot == 0));
        if (item.first_tile == item.end_tile) continue;
        REQUIRE(item.first_tile == next);
        next = item.end_tile;
      }
      REQUIRE(next == end[size_t(s)]);
    }
  }
}
