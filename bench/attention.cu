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
      return std::tie(c.preset, c.kv_heads, c.head_dim, c.block_tokens, c.tensors);
    };
    return parts(key) == parts(one);
  }
  int64_t blocks() const { return kPoolTokens / key.block_tokens; }

  // Where the pool's tokens are: one after the other in blocks in random order, which sequences have in this order; those
  // of exact pages from slot 0 on.
  std::vector<int64_t> slots_of(int64_t tokens, bool exact) const {
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t block = i / key.block_tokens;
      slots.push_back(exact ? i : order[size_t(block)] * int64_t{key.block_tokens} + i % key.block_tokens);
    }
    return slots;
  }

  // The model's token that is the pool's i-th.
  int64_t model_token(int64_t i) const { return i % kChunkTokens % key.tensors->tokens; }

  // All tokens of the pool, or those of slots 0 .. tokens - 1 of exact pages; normals, whose size sets the spread of the
  // logits, or a model's.
  void store(const tq_pages &pages, bool exact, int64_t tokens, const Buffer &dense) const {
    const int64_t row = int64_t{key.kv_heads} * key.head_dim;
    if (4 * row * kChunkTokens > kDenseBytes) throw std::runtime_error("the buffer of dense keys is too small");
    const Buffer slots(slots_of(tokens, exact)), unused(std::vector<int64_t>(size_t(exact ? kChunkTokens : 0), -1));
    size_t workspace_bytes = 0;
    expect(tq_cache_workspace(codec.get(), kChunkTokens, &workspace_bytes));
    const Buffer workspace(workspace_bytes);
    const tq_pages coded = exact ? pages_of(layout, memory.get(), blocks()) : pages;
    for (int64_t first = 0; first < tokens; first += kChunkTokens) {
      const int64_t count = std::min(kChunkTokens, tokens - first);
      uint8_t *k = dense.data, *v = dense.data + kDenseBytes / 2;
      if (key.tensors == nullptr) {
        const uint64_t index = uint64_t(first * row) + (exact ? 2 * kOther : 0);
        fill_normals(k, count * row, index, float(kLogitSpread));
        fill_normals(v, count * row, index + kOther);
      } else if (first == 0) {  // every chunk is the same
        upload(key.tensors->k, count, k);
        upload(key.tensors->v, count, v);
      }
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

  // Of the model's keys or values, repeated over tokens and heads, to [count, kv_heads, head_dim].
  void upload(const std::vector<uint16_t> &from, int64_t count, uint8_t *to) const {
    std::vector<uint16_t> rows(size_t(count * key.kv_heads * key.head_dim));
    for (int64_t r = 0; r < count * key.kv_heads; ++r) {
      const int64_t model_row =
          model_token(r / key.kv_heads) * key.tensors->kv_heads + r % key.kv_heads % key.tensors->kv_heads;
      std::copy_n(from.begin() + model_row * key.head_dim, key.head_dim, rows.begin() + r * key.head_dim);
    }
    expect(cudaMemcpy(to, rows.data(), rows.size() * 2, cudaMemcpyHostToDevice), "copying a model's tensors");
  }

  // [tokens, kv_heads, head_dim], the model's keys as they come out of the pages.
  std::vector<float> decoded_keys() const {
    const int64_t tokens = key.tensors->tokens;
    std::vector<float> keys(size_t(tokens * key.kv_heads * key.head_dim));
    const Buffer slots(slots_of(tokens, false)), out(keys.size() * sizeof(float));
    const tq_pages pages = pages_of(layout, memory.get(), blocks());
    auto args = sized<tq_load_args>();
    args.output_type = TQ_TYPE_F32;
    args.num_tokens = tokens;
    args.k = out.data;
    args.pages = &pages;
    args.slots = as<int64_t>(slots);
    size_t workspace_bytes = 0;
    expect(tq_cache_workspace(codec.get(), tokens, &workspace_bytes));
    const Buffer workspace(workspace_bytes);
    args.workspace = workspace.data;
    args.workspace_bytes = workspace_bytes;
    expect(tq_cache_load(codec.get(), &args));
    expect(cudaMemcpy(keys.data(), out.data, keys.size() * sizeof(float), cudaMemcpyDeviceToHost), "reading keys");
    return keys;
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
    if (one.tensors == nullptr) {
      fill_normals(q.data, q_elements, 7 * kOther);
    } else {
      const std::vector<uint16_t> queries = model_queries(one);
      expect(cudaMemcpy(q.data, queries.data(), queries.size() * 2, cudaMemcpyHostToDevice), "copying queries");
    }
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
    check(one, args, q, lse);
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

  // [sequences, q_heads, head_dim]: of a kv head those of its own query heads, at other positions where it has more.
  static std::vector<uint16_t> model_queries(const AttentionCase &one) {
    const ModelTensors &tensors = *one.tensors;
    const int group = one.q_heads / one.kv_heads;
    std::vector<uint16_t> queries;
    for (size_t r = 0; r < one.lengths.size() * size_t(one.q_heads); ++r) {
      const int64_t sequence = int64_t(r) / one.q_heads, head = int64_t(r) % one.q_heads, in_group = head % group;
      const int64_t position = (sequence + in_group / tensors.group) % tensors.positions;
      const int64_t kv_head = position * tensors.kv_heads + head / group % tensors.kv_heads;
      const auto from = tensors.q.begin() + (kv_head * tensors.group + in_group % tensors.group) * one.head_dim;
      queries.insert(queries.end(), from, from + one.head_dim);
    }
    return queries;
  }

  // One call, whose log-sum-exps must be about what normal logits give, or what decoded keys of a model do: a call that
  // leaves keys out would be fast.
  void check(const AttentionCase &one, const tq_attention_args &args, const Buffer &q, const Buffer &lse) const {
    expect(tq_paged_attention(pool_->codec.get(), &args));
    const size_t rows = size_t(args.num_tokens) * size_t(one.q_heads), n = size_t(one.head_dim);
    std::vector<float> sums(rows);
    std::vector<uint16_t> bits(rows * n);
    expect(cudaMemcpy(sums.data(), lse.data, rows * sizeof(float), cudaMemcpyDeviceToHost), one.name().c_str());
    expect(cudaMemcpy(bits.data(), q.data, bits.size() * 2, cudaMemcpyDeviceToHost), one.name().c_str());
    std::vector<double> queries;
    for (const uint16_t half : bits) {
      const uint32_t word = uint32_t{half} << 16;
      float value = 0;
      std::memcpy(&value, &word, sizeof value);
      queries.push_back(double(value));
    }
    for (const float sum : sums) {
      if (!std::isfinite(sum)) throw std::runtime_error(one.name() + ": a log-sum-exp is not finite");
    }
    if (one.tensors != nullptr) {
      check_model(one, queries, sums);
      return;
    }
    double error = 0, counted = 0;
    for (size_t r = 0; r < rows; ++r) {
      const int32_t length = one.lengths[r / size_t(one.q_heads) / size_t(one.q_len)];
      const int32_t visible = one.window == 0 ? length : std::min(length, one.window);
      if (visible < 1024) continue;
      const double *query = &queries[r * n];
      const double norm = std::inner_product(query, query + n, query, 0.0);
      error += double(sums[r]) - std::log(double(visible)) - kLogitSpread * kLogitSpread / 2 * norm / one.head_dim;
      ++counted;
    }
    // Of sound calls on the CPU at most .1, from short sequences, which rarely hold the rare large logits.
    if (counted > 0 && !(std::abs(error / counted) < 0.4)) {
      throw std::runtime_error(one.name() + ": the log-sum-exps are off by " + std::to_string(error / counted) +
                               " on average");
    }
  }

  // The first set's sequences have the pool's tokens one after the other, each from a block of its own on.
  void check_model(const AttentionCase &one, const std::vector<double> &queries, const std::vector<float> &sums) const {
    const std::vector<float> keys = pool_->decoded_keys();
    const size_t n = size_t(one.head_dim), q_heads = size_t(one.q_heads), kv_heads = size_t(one.kv_heads);
    const double scale = 1 / std::sqrt(double(one.head_dim));
    int64_t begin = 0;
    for (size_t s = 0; s < one.lengths.size(); ++s) {
      std::vector<double> times(size_t(one.tensors->tokens), 0);  // how often the sequence has a token of the model
      for (int64_t i = 0; i < one.lengths[s]; ++i) ++times[size_t(pool_->model_token(begin + i))];
      begin += divided_up(one.lengths[s], one.block_tokens) * one.block_tokens;
      for (size_t head = 0; head < q_heads; ++head) {
        const double *query = &queries[(s * q_heads + head) * n];
        std::vector<double> logits;
        for (size_t t = 0; t < times.size(); ++t) {
          const float *row = &keys[(t * kv_heads + head / (q_heads / kv_heads)) * n];
          logits.push_back(scale * std::inner_product(row, row + n, query, 0.0));
        }
        const double most = *std::max_element(logits.begin(), logits.end());
        double sum = 0;
        for (size_t t = 0; t < times.size(); ++t) sum += times[t] * std::exp(logits[t] - most);
        const double error = double(sums[s * q_heads + head]) - (most + std::log(sum));
        if (!(std::abs(error) < 0.01)) {
          throw std::runtime_error(one.name() + ": a log-sum-exp is off by " + std::to_string(error));
        }
      }
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
