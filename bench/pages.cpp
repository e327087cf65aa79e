// SPDX-License-Identifier: Apache-2.0
// store/BITS/TARGET and load/BITS/TARGET: keys and values of 8 heads of 128 in bf16, pages of 16 in random order.
#include "bench.hpp"

namespace tqkv_bench {
namespace {

constexpr int64_t kTokens = 1 << 15;
constexpr int64_t kVectors = kTokens * kKvHeads * 2;
constexpr int64_t kRawBytes = kVectors * kHeadDim * 2;

void run(benchmark::State &state, int32_t bits, int32_t simd, bool loading) {
  const Codec codec = make_codec(bits, bits, simd);
  auto layout = sized<tq_layout>();
  check(tq_page_layout(codec.get(), TQ_PAGES_CODED, &layout));
  constexpr int32_t kBlocks = kTokens / kBlockTokens;
  int64_t pool_bytes = 0;
  check(tq_pages_bytes(codec.get(), TQ_PAGES_CODED, kBlocks, &pool_bytes));
  const Memory pool = allocate(size_t(pool_bytes));
  auto pages = sized<tq_pages>();
  pages.base = pool.get();
  pages.num_blocks = kBlocks;
  pages.fingerprint = layout.fingerprint;
  std::vector<int64_t> slots;
  for (const int32_t block : random_blocks(kBlocks)) {
    for (int32_t row = 0; row < kBlockTokens; ++row) slots.push_back(int64_t{block} * kBlockTokens + row);
  }
  std::vector<uint16_t> values = random_bf16(size_t(kVectors * kHeadDim));
  uint16_t *k = values.data(), *v = values.data() + values.size() / 2;

  auto store = sized<tq_store_args>();
  store.input_type = TQ_TYPE_BF16;
  store.num_tokens = kTokens;
  store.k = k;
  store.v = v;
  store.pages = &pages;
  store.slots = slots.data();
  check(tq_cache_store(codec.get(), &store));
  if (!loading) {
    for (auto _ : state) check(tq_cache_store(codec.get(), &store));
  } else {
    auto load = sized<tq_load_args>();
    load.output_type = TQ_TYPE_BF16;
    load.num_tokens = kTokens;
    load.k = k;
    load.v = v;
    load.pages = &pages;
    load.slots = slots.data();
    for (auto _ : state) check(tq_cache_load(codec.get(), &load));
  }
  set_rates(state, kRawBytes + kTokens * layout.bytes_per_token, "tokens", kTokens);
  set_rates(state, kRawBytes + kTokens * layout.bytes_per_token, "vectors", kVectors);
}

}  // namespace

void register_pages() {
  for (const bool loading : {false, true}) {
    for (const int32_t bits : {2, 3, 4, 8}) {
      register_per_target((loading ? "load/" : "store/") + std::to_string(bits),
                          [=](benchmark::State &state, int32_t simd) { run(state, bits, simd, loading); });
    }
  }
}

}  // namespace tqkv_bench
