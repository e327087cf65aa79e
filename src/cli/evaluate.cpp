// SPDX-License-Identifier: Apache-2.0
#include "evaluate.hpp"

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "common.hpp"
#include "machine.hpp"
#include "metrics/metrics.hpp"
#include "terminal.hpp"

namespace tqkv_cli {
namespace {

using nlohmann::ordered_json;
using namespace tqkv_metrics;

constexpr int64_t kBlockTokens = 16;
// A file of any size is measured in less than 512 MB: these two bounds, and what grows with neither, stay well below.
constexpr int64_t kChunkBytes = 96 << 20;      // tensors of one chunk in all their forms
constexpr int64_t kAttentionBytes = 64 << 20;  // logits of one chunk; and states of all rows and presets
constexpr int64_t kMaxChunkTokens = 4096;
constexpr double kTimedSeconds = 0.01;  // short operations are repeated for this long, the fastest counts

struct Variant {
  Preset preset;
  bool extras;              // key offset and exact tokens
  size_t same_keys_as = 0;  // the first variant that decodes keys to the same values
};

// One variant over one layer, or over several.
struct Measurement {
  VectorError k, v;
  double encode_seconds = 0, decode_seconds = 0, attention_seconds = 0;
  int64_t vectors = 0, attended_tokens = 0;
  int64_t coded_bytes = 0, exact_bytes = 0, bf16_bytes = 0, token_heads = 0, heads = 0;
  double sum_divergence = 0, sum_output_error = 0;
  int64_t attention_layers = 0;
  uint64_t clamped = 0;

  void add(const Measurement &other) {
    k.add(other.k);
    v.add(other.v);
    encode_seconds += other.encode_seconds;
    decode_seconds += other.decode_seconds;
    attention_seconds += other.attention_seconds;
    vectors += other.vectors;
    attended_tokens += other.attended_tokens;
    coded_bytes += other.coded_bytes;
    exact_bytes += other.exact_bytes;
    bf16_bytes += other.bf16_bytes;
    token_heads += other.token_heads;
    heads += other.heads;
    sum_divergence += other.sum_divergence;
    sum_output_error += other.sum_output_error;
    attention_layers += other.attention_layers;
    clamped += other.clamped;
  }

  void write(ordered_json &json) const {
    const double bytes = double(coded_bytes + exact_bytes);
    json["bytes_per_token_head"] = bytes / double(token_heads);
    json["coded_bytes_per_token_head"] = double(coded_bytes) / double(token_heads);
    json["exact_bytes_per_sequence_head"] = double(exact_bytes) / double(heads);
    json["ratio_to_bf16"] = double(bf16_bytes) / bytes;
    json["mse_k"] = k.mse();
    json["mse_v"] = v.mse();
    json["cosine_k"] = k.cosine();
    json["cosine_v"] = v.cosine();
    if (attention_layers > 0) {
      json["attention_output_error"] = sum_output_error / double(attention_layers);
      json["attention_kl"] = sum_divergence / double(attention_layers);
    } else {
      json["attention_output_error"] = json["attention_kl"] = nullptr;
    }
    json["encode_vectors_per_second"] = double(vectors) / encode_seconds;
    json["decode_vectors_per_second"] = double(vectors) / decode_seconds;
    json["attention_tokens_per_second"] = attention_layers > 0 ? double(attended_tokens) / attention_seconds : NAN;
    json["clamped_vectors"] = clamped;
  }
};

// Runs a function once, or while it is short and has had less than kTimedSeconds; returns its fastest time.
template <class Function>
double timed(double &spent_seconds, Function &&function) {
  double fastest = INFINITY;
  do {
    const double start = now_seconds();
    function();
    const double seconds = now_seconds() - start;
    fastest = std::min(fastest, seconds);
    spent_seconds += seconds;
  } while (spent_seconds < kTimedSeconds);
  return fastest;
}

struct Shape {
  int64_t tokens, heads, dim_k, dim_v, q_heads, queries;
  int32_t type, q_type;

  explicit Shape(const Layer &layer)
      : tokens(layer.k->shape[0]),
        heads(layer.k->shape[1]),
        dim_k(layer.k->shape[2]),
        dim_v(layer.v->shape[2]),
        q_heads(layer.q ? layer.q->shape[1] : 0),
        queries(layer.q ? layer.q->shape[0] : 0),
        type(element_type(*layer.k)),
        q_type(layer.q ? element_type(*layer.q) : 0) {}
};

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Everything of one variant that lives as long as its layer.
struct VariantState {
  Buffer pages, exact_pages, workspace;
  tq_layout layout = sized<tq_layout>(), exact_layout = sized<tq_layout>();
  Buffer states, lse;  // two partial results: the sequence so far, the new chunk
  WeightState weights;
  double encode_spent = 0, decode_spent = 0, attention_spent = 0;
};

class LayerEvaluation {
 public:
  LayerEvaluation(const Layer &layer, const EvaluationOptions &options, const std::vector<Variant> &variants,
                  const std::vector<const tq_codec *> &codecs, Progress &progress)
      : layer_(layer),
        options_(options),
        variants_(variants),
        codecs_(codecs),
        progress_(progress),
        shape_(layer),
        states_(variants.size()),
        results_(variants.size()) {
    plan_memory();
    for (size_t i = 0; i < variants_.size(); ++i) prepare(i);
    if (queries_ > 0) read_queries();
  }

  std::vector<Measurement> run() {
    if (std::any_of(variants_.begin(), variants_.end(), [](const Variant &v) { return v.extras; })) find_key_mean();
    for (first_ = 0; first_ < shape_.tokens; first_ += count_) {
      count_ = std::min(chunk_tokens_, shape_.tokens - first_);
      read_chunk(*layer_.k, shape_.dim_k, raw_k_, k_);
      read_chunk(*layer_.v, shape_.dim_v, raw_v_, v_);
      if (attention_) attention_->add_chunk(first_, count_, k_.data(), v_.data());
      progress_.advance(count_);
      for (size_t i = 0; i < variants_.size(); ++i) {
        measure_chunk(i);
        progress_.advance(count_);
      }
    }
    for (size_t i = 0; i < variants_.size(); ++i) finish(i);
    return std::move(results_);
  }

 private:
  std::string where() const { return layer_.file->where(*layer_.k); }

  void plan_memory() {
    const int64_t elements = shape_.heads * (shape_.dim_k + shape_.dim_v);
    // As stored, as floats, decoded as floats twice (with and without exact tokens), and pages of both kinds.
    const int64_t token_bytes = elements * (layer_.k->element_bytes + 3 * 4 + 2 * 2);
    chunk_tokens_ = std::min(kMaxChunkTokens, kChunkBytes / token_bytes);
    if (layer_.q) {
      const int64_t row_bytes = (shape_.dim_k + shape_.dim_v) * 12 + int64_t(variants_.size()) * shape_.dim_v * 8;
      queries_ = std::min({int64_t(options_.queries), shape_.queries, kAttentionBytes / (shape_.q_heads * row_bytes)});
      if (queries_ == 0) {
        throw Error(layer_.file->where(*layer_.q) + ": field 'shape' has too many heads (" +
                    std::to_string(shape_.q_heads) + ")");
      }
      // The exact attention rounds the rows of a kv head up to 8.
      const int64_t rows = shape_.heads * ceil_div(queries_ * (shape_.q_heads / shape_.heads), 8) * 8;
      chunk_tokens_ = std::min(chunk_tokens_, kAttentionBytes / (rows * 8));
    }
    chunk_tokens_ = std::max<int64_t>(1, chunk_tokens_);
    if (chunk_tokens_ > kBlockTokens) chunk_tokens_ -= chunk_tokens_ % kBlockTokens;
    chunk_tokens_ = std::min(chunk_tokens_, shape_.tokens);
    const size_t keys = size_t(chunk_tokens_ * shape_.heads * shape_.dim_k);
    const size_t values = size_t(chunk_tokens_ * shape_.heads * shape_.dim_v);
    raw_k_.refill(keys * size_t(layer_.k->element_bytes));
    raw_v_.refill(values * size_t(layer_.k->element_bytes));
    for (std::vector<float> *array : {&k_, &decoded_k_, &mixed_k_}) array->resize(keys);
    for (std::vector<float> *array : {&v_, &decoded_v_}) array->resize(values);
    for (int64_t i = 0; i < chunk_tokens_; ++i) slots_.push_back(i);
  }

  void prepare(size_t i) {
    VariantState &state = states_[i];
    const tq_codec *codec = codecs_[i];
    check(tq_page_layout(codec, TQ_PAGES_CODED, &state.layout), where());
    check(tq_page_layout(codec, TQ_PAGES_EXACT, &state.exact_layout), where());
    int64_t bytes = 0;
    check(tq_pages_bytes(codec, TQ_PAGES_CODED, ceil_div(chunk_tokens_, kBlockTokens), &bytes), where());
    state.pages.refill(size_t(bytes));
    if (queries_ > 0) {
      const int64_t rows = queries_ * shape_.q_heads;
      state.states.refill(size_t(2 * rows * shape_.dim_v) * sizeof(float));
      state.lse.refill(size_t(2 * rows) * sizeof(float));
    }
    const int64_t exact = variants_[i].extras ? std::min(shape_.tokens, exact_tokens()) : 0;
    Measurement &result = results_[i];
    result.coded_bytes = shape_.tokens * state.layout.bytes_per_token;
    result.exact_bytes = exact * state.exact_layout.bytes_per_token;
    result.bf16_bytes = shape_.tokens * shape_.heads * (shape_.dim_k + shape_.dim_v) * 2;
    result.token_heads = shape_.tokens * shape_.heads;
    result.heads = shape_.heads;
  }

  int64_t exact_tokens() const { return int64_t(options_.exact_first) + options_.exact_recent; }

  void read_queries() {
    const int64_t elements = queries_ * shape_.q_heads * shape_.dim_k, bytes = elements * layer_.q->element_bytes;
    q_.refill(size_t(bytes));
    layer_.file->read(*layer_.q, layer_.q->size_bytes - bytes, bytes, q_.get());
    std::vector<float> q(static_cast<size_t>(elements));
    to_float(q_.get(), shape_.q_type, elements, q.data());
    require_finite(*layer_.q, q.data(), shape_.queries - queries_, queries_, shape_.q_heads, shape_.dim_k);
    for (int64_t i = 0; i < queries_; ++i) positions_.push_back(shape_.tokens - queries_ + i);
    scale_ = options_.scale > 0 ? options_.scale : 1 / std::sqrt(double(shape_.dim_k));
    attention_.emplace(
        AttentionShape{queries_, shape_.q_heads, shape_.heads, shape_.dim_k, shape_.dim_v, double(float(scale_))},
        q.data(), positions_, parallel_for);
  }

  void require_finite(const Tensor &tensor, const float *values, int64_t first, int64_t count, int64_t heads,
                      int64_t dim) const {
    const float *end = values + count * heads * dim;
    const float *bad = std::find_if(values, end, [](float x) { return !std::isfinite(x); });
    if (bad == end) return;
    const int64_t vector = (bad - values) / dim;
    throw Error(layer_.file->where(tensor) + ": holds a NaN or an infinity at token " +
                std::to_string(first + vector / heads) + ", head " + std::to_string(vector % heads));
  }

  // The current chunk of k or v, as stored and as floats.
  void read_chunk(const Tensor &tensor, int64_t dim, Buffer &raw, std::vector<float> &values) {
    const int64_t elements = shape_.heads * dim, token_bytes = elements * layer_.k->element_bytes;
    layer_.file->read(tensor, first_ * token_bytes, count_ * token_bytes, raw.get());
    to_float(raw.get(), shape_.type, count_ * elements, values.data());
    require_finite(tensor, values.data(), first_, count_, shape_.heads, dim);
  }

  void find_key_mean() {
    const size_t elements = size_t(shape_.heads * shape_.dim_k);
    std::vector<double> sums(elements, 0.0);
    for (first_ = 0; first_ < shape_.tokens; first_ += count_) {
      count_ = std::min(chunk_tokens_, shape_.tokens - first_);
      read_chunk(*layer_.k, shape_.dim_k, raw_k_, k_);
      for (size_t i = 0; i < size_t(count_) * elements; ++i) sums[i % elements] += double(k_[i]);
    }
    for (const double sum : sums) key_mean_.push_back(float(sum / double(shape_.tokens)));
  }

  // Exact slots and table of the current chunk: the tokens that some query reads exactly.
  void place_exact(size_t i) {
    const int64_t first_position = positions_.empty() ? shape_.tokens : positions_.front();
    exact_slots_.assign(size_t(count_), -1);
    exact_table_.assign(size_t(ceil_div(count_, kBlockTokens)), -1);
    exact_blocks_ = 0;
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t j = first_ + t;
      if (j >= options_.exact_first && j <= first_position - options_.exact_recent) continue;
      int32_t &block = exact_table_[size_t(t / kBlockTokens)];
      if (block < 0) block = int32_t(exact_blocks_++);
      exact_slots_[size_t(t)] = block * kBlockTokens + t % kBlockTokens;
    }
    int64_t bytes = 0;
    check(tq_pages_bytes(codecs_[i], TQ_PAGES_EXACT, exact_blocks_, &bytes), where());
    states_[i].exact_pages.refill(size_t(bytes));
  }

  void measure_chunk(size_t i) {
    const Variant &variant = variants_[i];
    const tq_codec *codec = codecs_[i];
    VariantState &state = states_[i];
    Measurement &result = results_[i];

    auto pages = sized<tq_pages>();
    pages.base = state.pages.get();
    pages.num_blocks = ceil_div(count_, kBlockTokens);
    pages.fingerprint = state.layout.fingerprint;
    auto exact_pages = sized<tq_pages>();
    exact_blocks_ = 0;
    if (variant.extras) place_exact(i);
    if (exact_blocks_ > 0) {
      exact_pages.base = state.exact_pages.get();
      exact_pages.num_blocks = exact_blocks_;
      exact_pages.fingerprint = state.exact_layout.fingerprint;
    }
    const tq_pages *exact = exact_blocks_ > 0 ? &exact_pages : nullptr;
    const float *key_offset = variant.extras ? key_mean_.data() : nullptr;
    const std::string what = where() + ", preset " + variant.preset.name;

    size_t workspace_bytes = 0;
    check(tq_cache_workspace(codec, count_, &workspace_bytes), what);
    state.workspace.refill(workspace_bytes);

    tq_faults faults = {};
    auto store = sized<tq_store_args>();
    store.input_type = shape_.type;
    store.num_tokens = count_;
    store.k = raw_k_.get();
    store.v = raw_v_.get();
    store.pages = &pages;
    store.slots = slots_.data();
    store.exact_pages = exact;
    store.exact_slots = exact ? exact_slots_.data() : nullptr;
    store.key_offset = key_offset;
    store.faults = &faults;
    store.workspace = state.workspace.get();
    store.workspace_bytes = workspace_bytes;
    result.encode_seconds += timed(state.encode_spent, [&] {
      faults = {};
      check(tq_cache_store(codec, &store), what);
    });
    result.vectors += 2 * count_ * shape_.heads;
    result.clamped += faults.count[TQ_FAULT_RANGE];

    auto load = sized<tq_load_args>();
    load.output_type = TQ_TYPE_F32;
    load.num_tokens = count_;
    load.k = decoded_k_.data();
    load.v = decoded_v_.data();
    load.pages = &pages;
    load.slots = slots_.data();
    load.key_offset = key_offset;
    load.workspace = state.workspace.get();
    load.workspace_bytes = workspace_bytes;
    result.decode_seconds += timed(state.decode_spent, [&] { check(tq_cache_load(codec, &load), what); });
    for (int64_t t = 0; t < count_ * shape_.heads; ++t) {
      result.k.add(&k_[size_t(t * shape_.dim_k)], &decoded_k_[size_t(t * shape_.dim_k)], shape_.dim_k);
      result.v.add(&v_[size_t(t * shape_.dim_v)], &decoded_v_[size_t(t * shape_.dim_v)], shape_.dim_v);
    }

    if (queries_ > 0) {
      if (variant.same_keys_as == i) {
        if (exact) {
          load.k = mixed_k_.data();
          load.v = nullptr;
          load.exact_pages = exact;
          load.exact_slots = exact_slots_.data();
          check(tq_cache_load(codec, &load), what);
        }
        attention_->compare_chunk(
            {decoded_k_.data(), exact ? mixed_k_.data() : nullptr, options_.exact_first, options_.exact_recent},
            state.weights);
      }
      attend(i, pages, exact, key_offset, what);
    }
  }

  // Every query is a sequence of its own, as in decoding: it sees the tokens up to its position.
  void attend(size_t i, const tq_pages &pages, const tq_pages *exact, const float *key_offset,
              const std::string &what) {
    const tq_codec *codec = codecs_[i];
    VariantState &state = states_[i];
    const int64_t columns = pages.num_blocks, rows = queries_ * shape_.q_heads;
    const bool first_chunk = first_ == 0;
    std::vector<int32_t> table, exact_table, lengths, positions;
    for (int64_t s = 0; s < queries_; ++s) {
      for (int64_t b = 0; b < columns; ++b) table.push_back(int32_t(b));
      exact_table.insert(exact_table.end(), exact_table_.begin(), exact_table_.end());
      const int64_t local = positions_[size_t(s)] - first_;
      lengths.push_back(int32_t(std::clamp<int64_t>(local + 1, 0, count_)));
      // A position past the chunk matters to the exact range only, which ends there all the same.
      positions.push_back(int32_t(std::clamp<int64_t>(local, 0, INT32_MAX)));
      results_[i].attended_tokens += lengths.back();
    }
    tq_faults faults = {};
    auto args = sized<tq_attention_args>();
    args.flags = TQ_ATTENTION_CAUSAL;
    args.num_seqs = args.num_tokens = int32_t(queries_);
    args.q_heads = int32_t(shape_.q_heads);
    args.q_type = shape_.q_type;
    args.q = q_.get();
    args.q_positions = positions.data();
    args.max_length_tokens = int32_t(count_);
    args.pages = &pages;
    args.block_table = table.data();
    args.table_columns = columns;
    args.lengths = lengths.data();
    if (exact) {
      args.exact_pages = exact;
      args.exact_table = exact_table.data();
      args.exact_columns = columns;
      args.exact_first_tokens = int32_t(std::clamp<int64_t>(options_.exact_first - first_, 0, count_));
      args.exact_recent_tokens = options_.exact_recent;
    }
    args.scale = float(scale_);
    args.key_offset = key_offset;
    args.out = state.states.as<float>() + (first_chunk ? 0 : rows * shape_.dim_v);
    args.out_type = TQ_TYPE_F32;
    args.lse = state.lse.as<float>() + (first_chunk ? 0 : rows);
    args.faults = &faults;
    size_t workspace_bytes = 0;
    check(tq_attention_workspace(codec, &args, &workspace_bytes), what);
    state.workspace.refill(workspace_bytes);
    args.workspace = state.workspace.get();
    args.workspace_bytes = workspace_bytes;
    results_[i].attention_seconds +=
        timed(state.attention_spent, [&] { check(tq_paged_attention(codec, &args), what); });
    if (faults.first != 0) throw Error(what + ": tq_paged_attention reported faults");
    if (first_chunk) return;

    auto merge = sized<tq_merge_args>();
    merge.num_states = 2;
    merge.num_rows = rows;
    merge.head_dim = int32_t(shape_.dim_v);
    merge.type = TQ_TYPE_F32;
    merge.states = merge.out = state.states.get();
    merge.lse = merge.out_lse = state.lse.as<float>();
    check(tq_merge_states(codec, &merge), what);
  }

  void finish(size_t i) {
    if (!attention_) return;
    results_[i].sum_divergence = attention_->divergence(states_[variants_[i].same_keys_as].weights);
    results_[i].sum_output_error = attention_->output_error(states_[i].states.as<float>());
    results_[i].attention_layers = 1;
  }

  const Layer &layer_;
  const EvaluationOptions &options_;
  const std::vector<Variant> &variants_;
  const std::vector<const tq_codec *> &codecs_;
  Progress &progress_;
  const Shape shape_;
  int64_t chunk_tokens_ = 0, queries_ = 0;
  double scale_ = 0;

  std::vector<VariantState> states_;
  std::vector<Measurement> results_;
  std::vector<float> key_mean_;
  Buffer q_;
  std::vector<int64_t> positions_;
  std::optional<ExactAttention> attention_;

  // the current chunk
  int64_t first_ = 0, count_ = 0;
  Buffer raw_k_, raw_v_;
  std::vector<float> k_, v_, decoded_k_, decoded_v_, mixed_k_;
  std::vector<int64_t> slots_, exact_slots_;
  std::vector<int32_t> exact_table_;
  int64_t exact_blocks_ = 0;
};

// Codecs of every preset for one layer shape; layers of a model mostly share one.
class CodecCache {
 public:
  explicit CodecCache(const EvaluationOptions &options) : options_(options) {}

  const tq_codec *get(const Preset &preset, const Layer &layer) {
    const Shape shape(layer);
    if (shape.heads > 1024) throw Error(layer.file->where(*layer.k) + ": field 'shape' has more than 1024 heads");
    const auto key = std::tuple(preset.name, shape.heads, shape.dim_k, shape.dim_v, shape.type);
    Codec &codec = codecs_[key];
    if (codec) return codec.get();
    tq_config config;
    const std::string what = layer.file->where(*layer.k) + " with preset " + preset.name;
    check(tq_config_init(&config, sizeof config, preset.name.c_str()), what);
    config.kv_heads = int32_t(shape.heads);
    config.seed = options_.seed;
    config.raw_type = shape.type == TQ_TYPE_F16 ? TQ_TYPE_F16 : TQ_TYPE_BF16;
    for (tq_side_config *side : {&config.k, &config.v}) {
      side->head_dim = int32_t(std::min<int64_t>(side == &config.k ? shape.dim_k : shape.dim_v, INT32_MAX));
      if (side->bits == 16) continue;
      side->rotation = options_.rotation;
      side->hadamard_rounds = options_.hadamard_rounds;
      side->codebook = options_.codebook;
      side->scale_rule = options_.scale_rule;
    }
    codec = make_codec(config, what);
    return codec.get();
  }

 private:
  const EvaluationOptions &options_;
  std::map<std::tuple<std::string, int64_t, int64_t, int64_t, int32_t>, Codec> codecs_;
};

ordered_json variant_json(const Variant &variant, const EvaluationOptions &options, const Measurement &measurement) {
  ordered_json json;
  json["preset"] = variant.preset.name;
  json["aliases"] = variant.preset.aliases;
  json["k_bits"] = variant.preset.k_bits;
  json["v_bits"] = variant.preset.v_bits;
  json["key_offset"] = variant.extras ? "mean" : "none";
  json["exact_first_tokens"] = variant.extras ? options.exact_first : 0;
  json["exact_recent_tokens"] = variant.extras ? options.exact_recent : 0;
  measurement.write(json);
  return json;
}

int64_t peak_memory_bytes() {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

std::string number(const ordered_json &value, int digits, double unit = 1) {
  return value.is_number() ? fixed(value.get<double>() / unit, digits) : "-";
}

void print_results(const ordered_json &results, const EvaluationOptions &options) {
  Table table({"\npreset", "bytes/\ntoken", "vs\nbf16", "K\nMSE", "V\nMSE", "K\ncosine", "V\ncosine", "output\nerror",
               "weights\nKL", "encode\nMvec/s", "decode\nMvec/s", "attend\nMtok/s"});
  bool extras = false;
  for (const ordered_json &r : results) {
    if (!extras && r["key_offset"] == "mean") {
      extras = true;
      table.section("with the keys' mean as key offset, first " + std::to_string(options.exact_first) + " and recent " +
                    std::to_string(options.exact_recent) + " tokens exact:");
    }
    std::string name = r["preset"];
    if (!extras && !r["aliases"].empty()) name += " (" + r["aliases"][0].get<std::string>() + ")";
    table.row({(extras ? "  " : "") + name, number(r["bytes_per_token_head"], 1), number(r["ratio_to_bf16"], 2),
               number(r["mse_k"], 5), number(r["mse_v"], 5), number(r["cosine_k"], 4), number(r["cosine_v"], 4),
               number(r["attention_output_error"], 4), number(r["attention_kl"], 5),
               number(r["encode_vectors_per_second"], 2, 1e6), number(r["decode_vectors_per_second"], 2, 1e6),
               number(r["attention_tokens_per_second"], 2, 1e6)});
  }
  table.print();
}

ordered_json measure(const std::vector<Layer> &layers, const EvaluationOptions &options) {
  const std::vector<Preset> chosen = presets(options.presets);
  std::vector<Variant> variants;
  for (const bool extras : {false, true}) {
    for (const Preset &preset : chosen) {
      if (extras && preset.k_bits == 16 && preset.v_bits == 16) continue;
      const auto same = std::find_if(variants.begin(), variants.end(), [&](const Variant &v) {
        return v.extras == extras && v.preset.k_bits == preset.k_bits;
      });
      variants.push_back({preset, extras, size_t(same - variants.begin())});
    }
  }

  // All shapes are known to be supported before the first byte is measured.
  CodecCache cache(options);
  int64_t work = 0;
  for (const Layer &layer : layers) {
    for (const Preset &preset : chosen) cache.get(preset, layer);
    work += Shape(layer).tokens * int64_t(1 + variants.size());
  }

  Progress progress("measuring", work);
  std::vector<Measurement> totals(variants.size());
  ordered_json result;
  result["results"] = ordered_json::array();
  result["layers"] = ordered_json::array();
  for (const Layer &layer : layers) {
    std::vector<const tq_codec *> codecs;
    for (const Variant &variant : variants) codecs.push_back(cache.get(variant.preset, layer));
    const std::vector<Measurement> measured = LayerEvaluation(layer, options, variants, codecs, progress).run();
    ordered_json json;
    json["file"] = layer.file->path();
    json["name"] = layer.name;
    json["dtype"] = layer.k->dtype;
    json["k_shape"] = layer.k->shape;
    json["v_shape"] = layer.v->shape;
    json["q_shape"] = layer.q ? ordered_json(layer.q->shape) : ordered_json();
    json["results"] = ordered_json::array();
    for (size_t i = 0; i < variants.size(); ++i) {
      json["results"].push_back(variant_json(variants[i], options, measured[i]));
      totals[i].add(measured[i]);
    }
    result["layers"].push_back(std::move(json));
  }
  for (size_t i = 0; i < variants.size(); ++i) {
    result["results"].push_back(variant_json(variants[i], options, totals[i]));
  }
  return result;
}

void print_evaluation(const ordered_json &evaluation, const EvaluationOptions &options) {
  if (options.per_layer) {
    for (const ordered_json &layer : evaluation["layers"]) {
      std::printf("Layer %s\n", in_quotes(layer["name"].get<std::string>()).c_str());
      print_results(layer["results"], options);
      std::printf("\n");
    }
    std::printf("All layers\n");
  }
  print_results(evaluation["results"], options);

  const auto &results = evaluation["results"], &layers = evaluation["layers"];
  const int64_t with_queries =
      std::count_if(layers.begin(), layers.end(), [](const ordered_json &l) { return !l["q_shape"].is_null(); });
  std::printf("\n");
  print_item("bytes/token", 14, "of one kv head, key and value together, exact copies of tokens included");
  print_item("vs bf16", 14, "how many times smaller than the same tokens in bf16");
  print_item("MSE", 14, "mean of |x - decoded|^2 / |x|^2 over all vectors (0.01: 1% of the energy is lost)");
  print_item("cosine", 14, "mean cosine between x and decoded");
  if (with_queries > 0) {
    print_item("output error", 14,
               "|out - exact| / |exact| of the attention output; exact is double precision over the original "
               "values");
    print_item("weights KL", 14, "mean divergence of the attention weights from the exact ones, in nats");
  }
  print_item("encode", 14, "million vectors stored a second, all cores, on this data (decode: read back as f32)");
  if (with_queries > 0) {
    print_item("attend", 14, "million cached tokens a second for one decoding query token, with all its heads");
  }
  const auto extras = std::find_if(results.begin(), results.end(),
                                   [](const ordered_json &r) { return r["exact_bytes_per_sequence_head"] != 0.0; });
  if (extras != results.end()) {
    constexpr double kLongTokens = 32768;
    const double bytes = (*extras)["coded_bytes_per_token_head"].get<double>() +
                         (*extras)["exact_bytes_per_sequence_head"].get<double>() / kLongTokens;
    std::printf("\n");
    print_paragraph("The exact copies are paid once a sequence: at " + grouped(int64_t(kLongTokens)) + " tokens " +
                    (*extras)["preset"].get<std::string>() + " with them takes " + fixed(bytes, 1) +
                    " bytes a token, not " + fixed((*extras)["bytes_per_token_head"], 1) + ".");
  }
  std::printf("\n");
  print_paragraph("Peak memory of this run: " + bytes_text(evaluation["peak_memory_bytes"]));
  if (with_queries < int64_t(layers.size())) {
    std::printf("\n");
    print_paragraph(with_queries == 0 ? "No queries (<prefix>.q) are given: attention was not measured."
                                      : "Attention was measured on " + std::to_string(with_queries) + " of " +
                                            std::to_string(layers.size()) + " layers: the others have no queries.");
  }
  for (const ordered_json &r : results) {
    if (r["clamped_vectors"].get<uint64_t>() == 0) continue;
    print_paragraph(r["preset"].get<std::string>() + ": " + std::to_string(r["clamped_vectors"].get<uint64_t>()) +
                    " vectors were too large for an fp16 scale and were clamped.");
  }
}

}  // namespace

void EvaluationOptions::add_to(CLI::App &app) {
  app.add_option("--preset", presets, "Measure this preset only; may be repeated");
  app.add_option("--queries", queries, "Attention is measured for the last N query positions")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  app.add_option("--exact-first", exact_first, "First tokens that the second group of rows keeps exact")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  app.add_option("--exact-recent", exact_recent, "Most recent tokens that it keeps exact")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  app.add_option("--scale", scale, "Factor of the attention logits (default: 1 / sqrt(head_dim))")
      ->check(CLI::PositiveNumber);
  app.add_option("--rotation", rotation, "hadamard, dense or none")
      ->transform(CLI::CheckedTransformer(rotation_names()));
  app.add_option("--hadamard-rounds", hadamard_rounds, "1 to 3")->check(CLI::Range(1, 3));
  app.add_option("--codebook", codebook, "gaussian, beta or uniform (default: the preset's)")
      ->transform(CLI::CheckedTransformer(std::map<std::string, int32_t>{
          {"gaussian", TQ_CODEBOOK_GAUSSIAN}, {"beta", TQ_CODEBOOK_BETA}, {"uniform", TQ_CODEBOOK_UNIFORM}}));
  app.add_option("--scale-rule", scale_rule, "least-mse, norm or unbiased (default: the preset's)")
      ->transform(CLI::CheckedTransformer(std::map<std::string, int32_t>{
          {"least-mse", TQ_SCALE_LEAST_MSE}, {"norm", TQ_SCALE_NORM}, {"unbiased", TQ_SCALE_UNBIASED}}));
  app.add_option("--seed", seed, "Of the random rotation")->capture_default_str();
  app.add_flag("--per-layer", per_layer, "Also print every layer");
  app.add_flag("--json", json, "Print JSON");
}

std::vector<Layer> find_layers(const SafetensorsFile &file, const TensorNames &names) {
  const auto need = [&](const std::string &name, const std::string &why) -> const Tensor * {
    if (const Tensor *tensor = file.find(name)) return tensor;
    throw Error(file.path() + ": there is no tensor " + in_quotes(name) + why);
  };
  std::vector<Layer> layers;
  if (!names.k.empty() || !names.v.empty() || !names.q.empty()) {
    if (names.k.empty() || names.v.empty()) throw Error("--k and --v are needed together");
    layers.push_back({names.k, &file, need(names.k, " (--k)"), need(names.v, " (--v)"),
                      names.q.empty() ? nullptr : need(names.q, " (--q)")});
  } else {
    for (const auto &[name, tensor] : file.tensors()) {
      if (!name.ends_with(".k")) continue;
      const std::string prefix = name.substr(0, name.size() - 2);
      layers.push_back({prefix, &file, &tensor, need(prefix + ".v", ", the values to the keys " + in_quotes(name)),
                        file.find(prefix + ".q")});
    }
    if (layers.empty()) {
      throw Error(file.path() + ": no tensor is named <prefix>.k; name the tensors with --k, --v and --q");
    }
    // layers.2 before layers.10
    std::sort(layers.begin(), layers.end(), [](const Layer &a, const Layer &b) {
      return std::pair(a.name.size(), a.name) < std::pair(b.name.size(), b.name);
    });
  }

  for (const Layer &layer : layers) {
    const auto refuse = [&](const Tensor &tensor, const std::string &field, const std::string &what) {
      throw Error(file.where(tensor) + ": field '" + field + "' " + what);
    };
    for (const Tensor *tensor : {layer.k, layer.v, layer.q}) {
      if (!tensor) continue;
      if (element_type(*tensor) == 0) refuse(*tensor, "dtype", "is " + tensor->dtype + ", not F32, F16 or BF16");
      if (tensor->shape.size() != 3) {
        refuse(*tensor, "shape",
               "has " + std::to_string(tensor->shape.size()) + " dimensions, not 3: [tokens, heads, head_dim]");
      }
      if (tensor->size_bytes == 0) refuse(*tensor, "shape", "holds nothing");
    }
    const auto &k = layer.k->shape, &v = layer.v->shape;
    if (layer.v->dtype != layer.k->dtype) {
      refuse(*layer.v, "dtype", "is " + layer.v->dtype + ", but the keys are " + layer.k->dtype);
    }
    if (v[0] != k[0]) {
      refuse(*layer.v, "shape", "has " + std::to_string(v[0]) + " tokens, the keys " + std::to_string(k[0]));
    }
    if (v[1] != k[1]) {
      refuse(*layer.v, "shape", "has " + std::to_string(v[1]) + " heads, the keys " + std::to_string(k[1]));
    }
    if (!layer.q) continue;
    const auto &q = layer.q->shape;
    if (q[0] > k[0]) {
      refuse(*layer.q, "shape", "has " + std::to_string(q[0]) + " positions, the keys only " + std::to_string(k[0]));
    }
    if (q[1] % k[1] != 0) {
      refuse(*layer.q, "shape",
             "has " + std::to_string(q[1]) + " heads, no multiple of the " + std::to_string(k[1]) + " of the keys");
    }
    if (q[2] != k[2]) {
      refuse(*layer.q, "shape", "has head_dim " + std::to_string(q[2]) + ", the keys " + std::to_string(k[2]));
    }
  }
  return layers;
}

void evaluate(const std::vector<Layer> &layers, const EvaluationOptions &options) {
  if (!options.json) {
    print_item("Machine", 9, machine_text());
    std::printf("\n");
    std::fflush(stdout);
  }
  ordered_json result = measure(layers, options);
  result["machine"] = machine_text();
  result["peak_memory_bytes"] = peak_memory_bytes();
  if (options.json) {
    // A path need not be UTF-8.
    std::printf("%s\n", result.dump(2, ' ', false, ordered_json::error_handler_t::replace).c_str());
  } else {
    print_evaluation(result, options);
  }
}

std::string describe(const std::vector<Layer> &layers) {
  std::set<std::string> shapes;
  for (const Layer &layer : layers) {
    const Shape s(layer);
    std::string text = std::to_string(s.tokens) + " tokens, " + std::to_string(s.heads) +
                       (s.heads == 1 ? " kv head of " : " kv heads of ") + std::to_string(s.dim_k);
    if (s.dim_v != s.dim_k) text += " (values " + std::to_string(s.dim_v) + ")";
    text += ", " + layer.k->dtype;
    if (layer.q) {
      text += "; queries of the last " + std::to_string(s.queries) + " positions, " + std::to_string(s.q_heads) +
              (s.q_heads == 1 ? " head" : " heads");
    }
    shapes.insert(text);
  }
  std::string text = std::to_string(layers.size()) + (layers.size() == 1 ? " layer" : " layers");
  if (shapes.size() == 1) return text + (layers.size() == 1 ? " of " : ", each of ") + *shapes.begin();
  return text + " of " + std::to_string(shapes.size()) + " shapes";
}

}  // namespace tqkv_cli
