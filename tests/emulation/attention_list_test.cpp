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

TEST_CASE("blocks list every tile of a step once, in order and evenly") {
  std::mt19937_64 engine(tqkv_test::seed());
  INFO("repeat with TQKV_TEST_SEED=" << tqkv_test::seed());
  const auto below = [&](int n) { return int(engine() % uint64_t(n)); };
  for (int times = 0; times < 60; ++times) {
    AttentionCall call{};
    call.pack_heads = 1 + below(8);
    call.token_blocks = 1 + below(3);
    call.num_seqs = std::max(1, (1 + below(below(2) == 0 ? 5 : 32 * call.pack_heads)) / call.token_blocks);
    call.head_packs = 1 + below(4);
    call.head_parts = 1 + below(3);
    call.block_tokens = 1 + below(2);
    call.max_q_len = call.token_blocks * call.block_tokens;
    call.splits = call.page_splits = 1;
    call.causal = 1;
    call.window = below(3) == 0 ? 1 + below(400) : 0;
    call.max_length = below(2) == 0 ? 40 : 3000;
    call.blocks = 1 + below(below(2) == 0 ? 6 : kMaxAttentionBlocks);
    call.item_units = 1 + below(60);
    call.pool.block_size = 16;
    call.table_columns = (call.max_length + 15) / 16;
    std::vector<int32_t> lengths(size_t(call.num_seqs)), rows{0}, table(1);
    for (int32_t &length : lengths) {
      length = below(6) == 0 ? below(3) * call.max_length - 1 : below(call.max_length + 1);
      rows.push_back(rows.back() + below(call.max_q_len + 1));
    }
    call.num_tokens = rows.back();
    // Rows of these and the next are not known.
    const int bad = below(4) == 0 ? below(call.num_seqs) : -2;
    if (bad >= 0) rows[size_t(bad) + 1] = -1;
    call.cu_seqlens_q = rows.data();
    call.lengths = lengths.data();
    call.block_table = table.data();
    const int copies = call.head_packs * call.head_parts, parts = call.num_seqs * call.token_blocks;
    const int segments = parts * copies;
    std::vector<ListedItem> listed(size_t(call.blocks) * kCapacity);
    std::vector<int32_t> counts(size_t(call.blocks));
    char stream;
    REQUIRE(launch(list_all, unsigned(call.blocks), unsigned(32 * call.pack_heads), sizeof(AttentionShared), &stream,
                   call, listed.data(), counts.data()) == 0);

    std::vector<int> first(static_cast<size_t>(parts), 0), end(first), reached(size_t(segments), -1);
    std::vector<int64_t> begin(size_t(segments), 0);  // units before
    int64_t units = 0;
    for (int part = 0; part < parts; ++part) {
      const int s = part / call.token_blocks, length = lengths[size_t(s)];
      const int q_len = rows[size_t(s) + 1] - rows[size_t(s)], token = part % call.token_blocks * call.block_tokens;
      const bool rows_known = s != bad && s != bad + 1;
      if (rows_known && length > 0 && length <= call.max_length && token < q_len) {
        const int low = std::max(0, call.window == 0 ? 0 : length - q_len + token - int(call.window) + 1);
        const int high = length - q_len + std::min(token + call.block_tokens, q_len);
        if (low < high) first[size_t(part)] = low / 16, end[size_t(part)] = (high + 15) / 16;
      }
      for (int copy = 0; copy < copies; ++copy) {
        begin[size_t(part * copies + copy)] = units;
        if (first[size_t(part)] < end[size_t(part)]) units += end[size_t(part)] - first[size_t(part)] + call.item_units;
      }
    }
    std::vector<int> first_slot(size_t(segments), -1), last_slot(first_slot);
    for (int b = 0; b < call.blocks; ++b) {
      int64_t tiles = 0;
      int last = -1;
      for (int i = 0; i < counts[size_t(b)]; ++i) {
        const ListedItem &one = listed[size_t(b) * kCapacity + size_t(i)];
        const int segment = one.slot - b, part = segment / copies, copy = segment % copies;
        REQUIRE(segment > last);
        last = segment;
        REQUIRE((segment < segments && one.item.sequence == part / call.token_blocks));
        REQUIRE(one.item.token_block == part % call.token_blocks);
        REQUIRE((one.item.head_part == copy / call.head_packs && one.item.head_pack == copy % call.head_packs));
        REQUIRE(one.sequence.length == lengths[size_t(one.item.sequence)]);
        int &next = reached[size_t(segment)];
        if (next < 0) next = first[size_t(part)];
        REQUIRE((one.item.first_tile == next && one.item.end_tile >= next));
        next = one.item.end_tile;
        tiles += one.item.end_tile - one.item.first_tile;
        if (one.item.first_tile == one.item.end_tile) continue;
        if (first_slot[size_t(segment)] < 0) first_slot[size_t(segment)] = one.slot;
        last_slot[size_t(segment)] = one.slot;
      }
      REQUIRE(tiles <= units / call.blocks + 1);
    }
    for (int segment = 0; segment < segments; ++segment) {
      const int part = segment / copies;
      if (first[size_t(part)] == end[size_t(part)]) {
        REQUIRE(reached[size_t(segment)] < 0);
        continue;
      }
      REQUIRE(reached[size_t(segment)] == end[size_t(part)]);
      // Where "finish" looks.
      const int64_t own = begin[size_t(segment)], own_units = end[size_t(part)] - first[size_t(part)] + call.item_units;
      REQUIRE(first_slot[size_t(segment)] ==
              segment + block_of_unit(call, uint32_t(units), uint32_t(own + call.item_units)));
      REQUIRE(last_slot[size_t(segment)] ==
              segment + block_of_unit(call, uint32_t(units), uint32_t(own + own_units - 1)));
    }
  }
}
