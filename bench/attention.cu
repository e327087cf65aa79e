// SPDX-License-Identifier: Apache-2.0
// Paged attention on a CUDA device against the best read of as many bytes in the same run. A pool of 2^20 tokens holds
// several sets of every case's sequences, in pages in random order; the calls of a graph go round the sets.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_bench.hpp"
#include "gpu.cuh"

namespace tqkv_bench {
namespace {

constexpr int64_t kPoolTokens = int64_t{1} << 20, kChunkTokens = int64_t{1} << 15;
constexpr int64_t kDenseBytes = int64_t{1} << 30;
constexpr double kLogitSpread = 2.5;     // standard deviation of scale * <q, k>
constexpr uint64_t kOther = 1ull << 40;  // past the indices of every key: values, exact pages and queries
constexpr int kGroupBytes = 4096;        // of the ceiling's reads

int64_t divided_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <class Value>
Value *as(const Buffer &buffer) {
  return reinterpret_cast<Value *>(buffer.data);
}

tq_pages pages_of(const tq_layout &layout, const Buffer *memory, int64_t blocks) {
  auto pages = sized<tq_pages>();
  pages.base = memory != nullptr ? memory->data : nullptr;
  pages.num_blocks = blocks;
  pages.fingerprint = layout.fingerprint;
  return pages;
}

// A codec and, from the first call that is supported on, its pages.
struct Pool {
  const AttentionCase key;
  Codec codec;
  std::string refusal;  // why there is no codec
  tq_layout layout = sized<tq_layout>(), exact_layout = sized<tq_layout>();
  std::unique_ptr<Buffer> memory;
  std::vector<int32_t> order;  // of blocks, random
  std::map<int64_t, Ceiling> ceilings;

  explicit Pool(const AttentionCase &one) : key(one) {
    auto config = tq_config{};
    expect(tq_config_init(&config, sizeof config, one.preset.c_str()));
    config.device = TQ_DEVICE_CUDA;
    config.kv_heads = one.kv_heads;
    config.k.head_dim = one.head_dim;
    config.block_size_tokens = one.block_tokens;
    if (tq_supports(&config) != TQ_OK) {
      refusal = tq_last_error();
      return;
    }
    tq_codec *made = nullptr;
    expect(tq_create(&config, &made));
    codec.reset(made);
    expect(tq_page_layout(made, TQ_PAGES_CODED, &layout));
    expect(tq_page_layout(made, TQ_PAGES_EXACT, &exact_layout));
    order.resize(size_t(blocks()));
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(1);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  }

  bool serves(const AttentionCase &one) const {
    const auto parts = [](const AttentionCase &c) {
      return std::tie(c.preset, c.kv_heads, c.head_dim, c.block_tokens);
    };
    return parts(key) == parts(one);
  }
  int64_t blocks() const { return kPoolTokens / key.block_tokens; }

  // Slots 0 .. tokens - 1 of coded or exact pages, from normals. The keys' size sets the spread of the logits.
  void store(const tq_pages &pages, bool exact, int64_t tokens, const Buffer &dense) const {
    const int64_t row = int64_t{key.kv_heads} * key.head_dim;
    if (4 * row * kChunkTokens > kDenseBytes) throw std::runtime_error("the buffer of dense keys is too small");
    std::vector<int64_t> host(size_t(tokens), 0);
    std::iota(host.begin(), host.end(), 0);
    const Buffer slots(host), unused(std::vector<int64_t>(size_t(exact ? kChunkTokens : 0), -1));
    size_t workspace_bytes = 0;
    expect(tq_cache_workspace(codec.get(), kChunkTokens, &workspace_bytes));
    const Buffer workspace(workspace_bytes);
    const tq_pages coded = exact ? pages_of(layout, memory.get(), blocks()) : pages;
    for (int64_t first = 0; first < tokens; first += kChunkTokens) {
      const int64_t count = std::min(kChunkTokens, tokens - first);
      uint8_t *k = dense.data, *v = dense.data + kDenseBytes / 2;
      const uint64_t index = uint64_t(first * row) + (exact ? 2 * kOther : 0);
      fill_normals(k, count * row, index, float(kLogitSpread));
      fill_normals(v, count * row, index + kOther);
      auto args = sized<tq_store_args>();
      args.input_type = TQ_TYPE_BF16;
      args.num_tokens = count;
      args.k = k;
      args.v = v;
      args.pages = &coded;
      args.slots = exact ? as<int64_t>(unused) : as<int64_t>(slots) + first;
      if (exact) {
        args.exact_pages = &pages;
        args.exact_slots = as<int64_t>(slots) + first;
      }
      args.workspace = workspace.data;
      args.workspace_bytes = workspace_bytes;
      expect(tq_cache_store(codec.get(), &args));
    }
    expect(cudaDeviceSynchronize(), "filling the pages");
  }

  void fill(const Buffer &dense) {
    if (memory != nullptr) return;
    int64_t bytes = 0;
    expect(tq_pages_bytes(codec.get(), TQ_PAGES_CODED, blocks(), &bytes));
    memory = std::make_unique<Buffer>(size_t(bytes));
    store(pages_of(layout, memory.get(), blocks()), false, kPoolTokens, dense);
  }
};

// The sets of one case, in host memory.
struct Sets {
  int64_t count = 0, columns = 0;
  std::vector<int32_t> table;                  // [count, num_seqs, columns]
  int64_t exact_blocks = 0;                    // of all sets
  std::vector<int32_t> exact_table;            // likewise, where there are exact pages
  int64_t coded_tokens = 0, exact_tokens = 0;  // read by a call

  Sets(const AttentionCase &one, const std::vector<int32_t> &order, int exact_block_tokens) {
    const int64_t seqs = int64_t(one.lengths.size());
    const auto blocks_of = [&](int32_t length) { return divided_up(length, one.block_tokens); };
    int64_t blocks = 0;
    for (int32_t with_new : one.lengths) {
      const int32_t length = one.coded_length(with_new);
      blocks += blocks_of(length);
      columns = std::max(columns, blocks_of(length));
      // The window of several query tokens is wider by the others.
      const int64_t visible = one.window == 0 ? length : std::min(length, one.window + one.q_len - 1);
      const int64_t exact = std::min<int64_t>(visible, one.exact_first + one.exact_recent);
      coded_tokens += visible - exact;
      exact_tokens += exact;
    }
    count = int64_t(order.size()) / blocks;
    if (count == 0) throw std::runtime_error(one.name() + ": more tokens than the pool has");
    table.assign(size_t(count * seqs * columns), -1);
    size_t next = 0;
    for (int64_t s = 0; s < count * seqs; ++s) {
      const int64_t own = blocks_of(one.coded_length(one.lengths[size_t(s % seqs)]));
      for (int64_t b = 0; b < own; ++b) table[size_t(s * columns + b)] = order[next++];
    }
    if (exact_tokens == 0) return;
    if (exact_block_tokens != one.block_tokens) throw std::runtime_error("exact pages of another size than the coded");
    exact_table.assign(table.size(), -1);
    for (int64_t s = 0; s < count * seqs; ++s) {
      const int64_t length = one.lengths[size_t(s % seqs)], own = blocks_of(int32_t(length));
      for (int64_t b = 0; b < own; ++b) {
        const int64_t begin = b * one.block_tokens, end = begin + one.block_tokens;
        if (begin >= one.exact_first && end <= length - one.q_len + 1 - one.exact_recent) continue;
        exact_table[size_t(s * columns + b)] = int32_t(exact_blocks++);
      }
    }
  }
};

class Bench {
 public:
  Bench(bool quick, const AttentionSink &sink) : quick_(quick), sink_(sink), gpu_(quick) {
    fill_normals(dense_.data, kDenseBytes / 2);
    expect(cudaDeviceSynchronize(), "filling an array");
    gpu_.measure(dense_, kDenseBytes, unwritten_);
    sink.machine(gpu_.machine());
  }

  // Nothing if the library refuses, which the sink is told.
  std::optional<AttentionRow> measure(const AttentionCase &one) {
    if (pool_ == nullptr || !pool_->serves(one)) {
      pool_.reset();  // its memory first
      pool_ = std::make_unique<Pool>(one);
    }
    if (!pool_->refusal.empty()) return refused(one, pool_->refusal);
    const tq_codec *codec = pool_->codec.get();
    const Sets sets(one, pool_->order, pool_->exact_layout.block_size_tokens);
    const int num_seqs = int(one.lengths.size()), num_tokens = num_seqs * one.q_len;

    // What can be asked before there is memory.
    tq_pages pages = pages_of(pool_->layout, nullptr, pool_->blocks());
    tq_pages exact = pages_of(pool_->exact_layout, nullptr, sets.exact_blocks);
    std::vector<int32_t> starts(size_t(num_seqs) + 1);
    for (int s = 0; s <= num_seqs; ++s) starts[size_t(s)] = s * one.q_len;
    const Buffer cu_seqlens(starts), lengths(one.lengths), table(sets.table), exact_table(sets.exact_table);
    const Buffer sinks(std::vector<float>(size_t(one.q_heads), 1.0f)), faults(std::vector<tq_faults>(1));
    const int64_t q_elements = int64_t{num_tokens} * one.q_heads * one.head_dim;
    const Buffer q(size_t(q_elements) * 2), out(size_t(q_elements) * 2);
    const Buffer lse(size_t(num_tokens) * size_t(one.q_heads) * sizeof(float));
    fill_normals(q.data, q_elements, 7 * kOther);
    expect(cudaDeviceSynchronize(), "filling the queries");
    auto args = sized<tq_attention_args>();
    args.flags = TQ_ATTENTION_CAUSAL;
    args.num_seqs = num_seqs;
    args.num_tokens = num_tokens;
    args.q_heads = one.q_heads;
    args.q_type = TQ_TYPE_BF16;
    args.q = q.data;
    if (one.q_len > 1) {
      args.cu_seqlens_q = as<int32_t>(cu_seqlens);
      args.max_q_len = one.q_len;
    }
    args.max_length_tokens = *std::max_element(one.lengths.begin(), one.lengths.end());
    args.pages = &pages;
    args.block_table = as<int32_t>(table);
    args.table_columns = sets.columns;
    args.lengths = as<int32_t>(lengths);
    if (sets.exact_tokens > 0) {
      args.exact_pages = &exact;
      args.exact_table = as<int32_t>(exact_table);
      args.exact_columns = sets.columns;
      args.exact_first_tokens = one.exact_first;
      args.exact_recent_tokens = one.exact_recent;
    }
    const int64_t new_elements = one.chunk ? int64_t{num_tokens} * one.kv_heads * one.head_dim : 0;
    const Buffer k_new(size_t(new_elements) * 2), v_new(size_t(new_elements) * 2);
    if (one.chunk) {
      fill_normals(k_new.data, new_elements, 5 * kOther, float(kLogitSpread));
      fill_normals(v_new.data, new_elements, 6 * kOther);
      expect(cudaDeviceSynchronize(), "filling the new keys");
      args.k_new = k_new.data;
      args.v_new = v_new.data;
    }
    args.soft_cap = one.soft_cap;
    args.window_tokens = one.window;
    if (one.sinks) args.sinks = as<float>(sinks);
    if (one.lse) args.lse = as<float>(lse);
    args.out = out.data;
    args.out_type = TQ_TYPE_BF16;
    args.faults = as<tq_faults>(faults);
    size_t workspace_bytes = 0;
    const tq_status status = tq_attention_workspace(codec, &args, &workspace_bytes);
    if (status == TQ_ERROR_NOT_SUPPORTED) return refused(one, tq_last_error());
    expect(status);

    pool_->fill(dense_);
    pages = pages_of(pool_->layout, pool_->memory.get(), pool_->blocks());
    const Buffer exact_memory(size_t(sets.exact_blocks * pool_->exact_layout.block_stride_bytes));
    if (sets.exact_tokens > 0) {
      exact = pages_of(pool_->exact_layout, &exact_memory, sets.exact_blocks);
      pool_->store(exact, true, sets.exact_blocks * pool_->exact_layout.block_size_tokens, dense_);
    }
    args.lse = as<float>(lse);  // for the check
    size_t checked_bytes = 0;
    expect(tq_attention_workspace(codec, &args, &checked_bytes));
    workspace_bytes = std::max(workspace_bytes, checked_bytes);
    const Buffer workspace(workspace_bytes);
    args.workspace = workspace.data;
    args.workspace_bytes = workspace_bytes;
    check(one, codec, args, q, lse);
    if (!one.lse) args.lse = nullptr;

    AttentionRow row;
    row.what = one;
    row.bytes = sets.coded_tokens * pool_->layout.bytes_per_token +
                sets.exact_tokens * pool_->exact_layout.bytes_per_token + 4 * new_elements;
    for (int32_t length : one.lengths) {
      for (int i = 0; i < one.q_len; ++i) {
        const int64_t seen = length - one.q_len + 1 + i;
        const int64_t visible = one.window == 0 ? seen : std::min<int64_t>(seen, one.window);
        row.flops += 4.0 * one.head_dim * one.q_heads * double(visible);
      }
    }
    // Every call of a graph has another set, or the sets take turns; both are far larger than the L2 cache.
    const Rotation rotation{sets.count, int(std::max<int64_t>(8, std::min(sets.count, kColdBytes / row.bytes + 1)))};
    row.time = time_of(
        [&](int i, cudaStream_t stream) {
          tq_attention_args call = args;
          const int64_t first = i % rotation.sets * num_seqs * sets.columns;
          call.block_table = as<int32_t>(table) + first;
          if (call.exact_table != nullptr) call.exact_table = as<int32_t>(exact_table) + first;
          call.stream = stream;
          expect(tq_paged_attention(codec, &call));
        },
        rotation.calls, quick_ ? 5 : 31);
    expect_no_faults(one, faults);
    row.ceiling = ceiling(row.bytes);
    return row;
  }

 private:
  std::nullopt_t refused(const AttentionCase &one, const std::string &why) const {
    sink_.refused(one, why);
    return std::nullopt;
  }

  // The best read of so many bytes out of the pool, going round it as the calls do.
  Ceiling ceiling(int64_t bytes) {
    const auto known = pool_->ceilings.find(bytes);
    if (known != pool_->ceilings.end()) return known->second;
    const int64_t groups = divided_up(bytes, kGroupBytes);
    const int64_t sets = kPoolTokens * pool_->layout.bytes_per_token / (groups * kGroupBytes);
    if (sets == 0) throw std::runtime_error("a call reads more bytes than the pool has");
    const Rotation rotation{sets, int(std::max<int64_t>(8, std::min(sets, kColdBytes / bytes + 1)))};
    const Moves moves{pool_->memory->data, unwritten_.data, groups, kGroupBytes, 0};
    return pool_->ceilings[bytes] = gpu_.ceiling(moves, rotation, {16});
  }

  // One call, whose log-sum-exps must be about what normal logits give: a call that leaves keys out would be fast.
  static void check(const AttentionCase &one, const tq_codec *codec, const tq_attention_args &args, const Buffer &q,
                    const Buffer &lse) {
    expect(tq_paged_attention(codec, &args));
    const size_t rows = size_t(args.num_tokens) * size_t(one.q_heads);
    std::vector<float> sums(rows);
    std::vector<uint16_t> queries(rows * size_t(one.head_dim));
    expect(cudaMemcpy(sums.data(), lse.data, rows * sizeof(float), cudaMemcpyDeviceToHost), one.name().c_str());
    expect(cudaMemcpy(queries.data(), q.data, queries.size() * 2, cudaMemcpyDeviceToHost), one.name().c_str());
    double error = 0, counted = 0;
    for (size_t r = 0; r < rows; ++r) {
      if (!std::isfinite(sums[r])) throw std::runtime_error(one.name() + ": a log-sum-exp is not finite");
      const int32_t length = one.lengths[r / size_t(one.q_heads) / size_t(one.q_len)];
      const int32_t visible = one.window == 0 ? length : std::min(length, one.window);
      if (visible < 1024) continue;
      double norm = 0;
      for (size_t c = 0; c < size_t(one.head_dim); ++c) {
        const uint32_t bits = uint32_t{queries[r * size_t(one.head_dim) + c]} << 16;
        float value = 0;
        std::memcpy(&value, &bits, sizeof value);
        norm += double(value) * double(value);
      }
      error += double(sums[r]) - std::log(double(visible)) - kLogitSpread * kLogitSpread / 2 * norm / one.head_dim;
      ++counted;
    }
    // Of sound calls on the CPU at most .1, from short sequences, which rarely hold the rare large logits.
    if (counted > 0 && !(std::abs(error / counted) < 0.4)) {
      throw std::runtime_error(one.name() + ": the log-sum-exps are off by " + std::to_string(error / counted) +
                               " on average");
    }
  }

  static void expect_no_faults(const AttentionCase &one, const Buffer &faults) {
    tq_faults host{};
    expect(cudaMemcpy(&host, faults.data, sizeof host, cudaMemcpyDeviceToHost), "reading the faults");
    if (host.first != 0) throw std::runtime_error(one.name() + ": the calls reported faults");
  }

  const bool quick_;
  const AttentionSink &sink_;
  Gpu gpu_;
  Buffer dense_{size_t(kDenseBytes)}, unwritten_{256};
  std::unique_ptr<Pool> pool_;
};

}  // namespace

void measure_attention(const std::vector<AttentionCase> &cases, bool quick, const AttentionSink &sink) {
  Bench bench(quick, sink);
  for (const AttentionCase &one : cases) {
    const auto plain =
        std::find_if(cases.begin(), cases.end(), [&](const AttentionCase &c) { return c.name() == one.relative_to; });
    // Clocks depend on what ran before.
    const auto before = plain != cases.end() ? bench.measure(*plain) : std::nullopt;
    std::optional<AttentionRow> row = bench.measure(one);
    const auto after = plain != cases.end() ? bench.measure(*plain) : std::nullopt;
    if (before && after && row) row->plain_seconds = (before->time.median + after->time.median) / 2;
    if (row) sink.row(*row);
  }
}

}  // namespace tqkv_bench
