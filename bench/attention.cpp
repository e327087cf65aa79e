// SPDX-License-Identifier: Apache-2.0
// attention/PRESET/TARGET: one query token of 32 heads over 32768 tokens of 8 kv heads of 128, in pages of 16 in random
// order. Calls go round several sequences, so that none finds its pages in a cache.

#include "bench.hpp"

namespace tqkv_bench {
namespace {

constexpr int32_t kTokens = 32768;
constexpr int32_t kQueryHeads = 32;
constexpr int32_t kBlocks = kTokens / kBlockTokens;
constexpr int64_t kMinPoolBytes = int64_t{256} << 20;

void run(benchmark::State &state, int32_t bits, int32_t simd) {
  const Codec codec = make_codec(bits, bits, simd);
  auto layout = sized<tq_layout>();
  check(tq_page_layout(codec.get(), TQ_PAGES_CODED, &layout));
  const int32_t sequences = int32_t(kMinPoolBytes / (kBlocks * layout.block_stride_bytes)) + 1;
  int64_t pool_bytes = 0;
  check(tq_pages_bytes(codec.get(), TQ_PAGES_CODED, int64_t{sequences} * kBlocks, &pool_bytes));
  const Memory pool = allocate(size_t(pool_bytes));
  auto pages = sized<tq_pages>();
  pages.base = pool.get();
  pages.num_blocks = int64_t{sequences} * kBlocks;
  pages.fingerprint = layout.fingerprint;

  // The first sequence's worth of blocks is stored by the fastest target, which gives the same bytes; the others are
  // copies of it.
  {
    const Codec filler = make_codec(bits, bits, TQ_SIMD_AUTO);
    const std::vector<uint16_t> values = random_bf16(size_t{kTokens} * kKvHeads * kHeadDim * 2);
    std::vector<int64_t> slots(kTokens);
    for (int32_t i = 0; i < kTokens; ++i) slots[size_t(i)] = i;
    auto store = sized<tq_store_args>();
    store.input_type = TQ_TYPE_BF16;
    store.num_tokens = kTokens;
    store.k = values.data();
    store.v = values.data() + values.size() / 2;
    store.pages = &pages;
    store.slots = slots.data();
    check(tq_cache_store(filler.get(), &store));
    std::vector<int64_t> pairs;
    for (int32_t block = kBlocks; block < sequences * kBlocks; ++block) {
      pairs.insert(pairs.end(), {block % kBlocks, block});
    }
    auto copy = sized<tq_copy_args>();
    copy.src = &pages;
    copy.pairs = pairs.data();
    copy.num_pairs = int64_t(pairs.size() / 2);
    check(tq_cache_copy(filler.get(), &copy));
  }

  const std::vector<int32_t> table = random_blocks(sequences * kBlocks);
  const std::vector<uint16_t> q = random_bf16(kQueryHeads * kHeadDim);
  std::vector<uint16_t> out(kQueryHeads * kHeadDim);
  const int32_t length = kTokens;
  auto args = sized<tq_attention_args>();
  args.flags = TQ_ATTENTION_CAUSAL;
  args.num_seqs = args.num_tokens = 1;
  args.q_heads = kQueryHeads;
  args.q_type = TQ_TYPE_BF16;
  args.q = q.data();
  args.pages = &pages;
  args.block_table = table.data();
  args.table_columns = kBlocks;
  args.lengths = &length;
  args.out = out.data();
  args.out_type = TQ_TYPE_BF16;
  size_t workspace_bytes = 0;
  check(tq_attention_workspace(codec.get(), &args, &workspace_bytes));
  const Memory workspace = allocate(workspace_bytes);
  args.workspace = workspace.get();
  args.workspace_bytes = workspace_bytes;
  auto faults = tq_faults{};
  args.faults = &faults;
  int32_t sequence = 0;
  for (auto _ : state) {
    args.block_table = table.data() + int64_t{sequence} * kBlocks;
    check(tq_paged_attention(codec.get(), &args));
    sequence = (sequence + 1) % sequences;
  }
  if (faults.first != 0) state.SkipWithError("the call reported faults");
  set_rates(state, kTokens * layout.bytes_per_token, "tokens", kTokens);
}

}  // namespace

void register_attention() {
  constexpr struct {
    const char *name;
    int32_t bits;
  } kCases[] = {{"k4v4", 4}, {"k3v3", 3}, {"k2v2", 2}, {"raw", 16}};
  for (const auto &one : kCases) {
    register_per_target(std::string("attention/") + one.name,
                        [bits = one.bits](benchmark::State &state, int32_t simd) { run(state, bits, simd); });
  }
}

}  // namespace tqkv_bench
