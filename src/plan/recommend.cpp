// SPDX-License-Identifier: Apache-2.0
#include "plan/recommend.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "codec/codec.hpp"
#include "codec/presets.hpp"
#include "codec/quantize.hpp"
#include "metrics/metrics.hpp"
#include "runtime/error.hpp"
#include "runtime/parallel.hpp"

namespace tqkv {
namespace {

using nlohmann::ordered_json;
using tqkv_metrics::ExactAttention;
using tqkv_metrics::VectorError;
using tqkv_metrics::WeightState;

constexpr double kDefaultOutputError = 0.05;
constexpr int64_t kDefaultContext = 32768;
constexpr int32_t kDefaultFirst = 4, kDefaultRecent = 128;
constexpr double kOffsetGain = 0.9;  // what an offset must leave of the error: stores with one are slower on GPUs
constexpr double kOutlier = 4;
constexpr int64_t kChunkTokens = 2048;
constexpr int64_t kMaxChunkBytes = 64 << 20;    // of its keys and values as floats, of which there are four
constexpr int64_t kMaxOutputBytes = 256 << 20;  // of all candidates' outputs
constexpr int64_t kMaxLogitBytes = 64 << 20;    // of one chunk

constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();

// Every preset of different bits, once.
struct Candidate {
  const Preset *preset;
  std::unique_ptr<Codec> codec;
  bool exact = false;
  bool offset = false;
  double output_error = kNothing, kl = kNothing, bytes = 0;
  VectorError k, v;
  WeightState weights;
};

struct Statistics {
  std::vector<float> key_mean;  // [kv_heads, head_dim_k]
  double key_mean_share = 0;
  int32_t outliers_k = 0, outliers_v = 0;
  double figure_without = kNothing, figure_with = kNothing;  // of keys at 4 bits: KL, or squared error without queries
};

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

class Recommender {
 public:
  explicit Recommender(const tq_recommend_args &args) : args_(args), pool_(args.threads) {
    loop_ = [this](int64_t count, const std::function<void(int64_t)> &body) {
      // Bodies allocate; the pool's must not throw.
      std::exception_ptr failure;
      std::mutex mutex;
      pool_.run(count, [&](int64_t i) {
        try {
          body(i);
        } catch (...) {
          const std::lock_guard lock(mutex);
          failure = std::current_exception();
        }
      });
      if (failure) std::rethrow_exception(failure);
    };
  }

  tq_status make(tq_recommend_result *result, std::string *json) {
    TQKV_TRY(set_up());
    TQKV_TRY(find_statistics());
    TQKV_TRY(choose_offset());
    std::vector<Candidate> candidates;
    for (const Preset &preset : kPresets) {
      const auto same = [&](const Candidate &c) {
        return c.preset->k_bits == preset.k_bits && c.preset->v_bits == preset.v_bits;
      };
      if (std::any_of(candidates.begin(), candidates.end(), same)) continue;
      const bool raw = preset.k_bits == kRawBits;
      for (const bool exact : {false, true}) {
        if (exact && (raw || !exact_considered_)) continue;
        candidates.emplace_back();
        TQKV_TRY(fill(preset, exact, use_offset_ && !raw, &candidates.back()));
      }
    }
    measure(candidates);
    const Candidate &chosen = choose(candidates);
    write(candidates, chosen, result, json);
    return TQ_OK;
  }

 private:
  bool has_queries() const { return args_.q != nullptr; }

  tq_status set_up() {
    if (args_.max_output_error == 0 && args_.max_kl == 0 && args_.max_bytes_per_token == 0) {
      args_.max_output_error = kDefaultOutputError;
    }
    if (args_.context_tokens == 0) args_.context_tokens = kDefaultContext;
    if (args_.scale == 0) args_.scale = float(1 / std::sqrt(double(args_.head_dim_k)));
    if (args_.exact_first_tokens == 0 && args_.exact_recent_tokens == 0) {
      args_.exact_first_tokens = kDefaultFirst;
      args_.exact_recent_tokens = kDefaultRecent;
    }
    exact_considered_ = has_queries() && args_.exact_first_tokens >= 0;
    const int64_t token_bytes = int64_t{args_.kv_heads} * (args_.head_dim_k + args_.head_dim_v) * 4;
    chunk_ = std::min({args_.num_tokens, kChunkTokens, std::max<int64_t>(16, kMaxChunkBytes / token_bytes)});
    if (!has_queries()) return TQ_OK;

    const int64_t most_rows = kMaxOutputBytes / (int64_t{args_.head_dim_v} * 8 * 2 * int64_t(std::size(kPresets)));
    queries_ = std::clamp<int64_t>(most_rows / args_.q_heads, 1, args_.num_queries);
    const int64_t skipped = args_.num_queries - queries_;
    q_.resize(size_t(queries_ * args_.q_heads * args_.head_dim_k));
    TQKV_TRY(read(args_.q, skipped, queries_, args_.q_heads, args_.head_dim_k, args_.q_token_stride,
                  args_.q_head_stride, "q", q_.data()));
    for (int64_t i = 0; i < queries_; ++i) positions_.push_back(args_.num_tokens - queries_ + i);
    chunk_ = std::min(chunk_, std::max<int64_t>(64, kMaxLogitBytes / (8 * queries_ * args_.q_heads)));
    return TQ_OK;
  }

  // Tokens [first, first + count) of an array as floats, packed.
  tq_status read(const void *data, int64_t first, int64_t count, int64_t heads, int64_t dim, int64_t token_stride,
                 int64_t head_stride, const char *name, float *values) const {
    const auto *bytes = static_cast<const uint8_t *>(data);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        float *row = values + (t * heads + h) * dim;
        tqkv_metrics::to_float(bytes + ((first + t) * token_stride + h * head_stride) * type_bytes(args_.type),
                               args_.type, dim, row);
        if (std::all_of(row, row + dim, [](float x) { return std::isfinite(x); })) continue;
        return fail(TQ_ERROR_INVALID_ARGUMENT, "args.%s holds a NaN or an infinity at token %lld, head %lld", name,
                    (long long)(first + t), (long long)h);
      }
    }
    return TQ_OK;
  }

  tq_status read_chunk(int64_t first) {
    first_ = first;
    count_ = std::min(chunk_, args_.num_tokens - first);
    k_.resize(size_t(chunk_ * args_.kv_heads * args_.head_dim_k));
    v_.resize(size_t(chunk_ * args_.kv_heads * args_.head_dim_v));
    TQKV_TRY(read(args_.k, first, count_, args_.kv_heads, args_.head_dim_k, args_.k_token_stride, args_.k_head_stride,
                  "k", k_.data()));
    return read(args_.v, first, count_, args_.kv_heads, args_.head_dim_v, args_.v_token_stride, args_.v_head_stride,
                "v", v_.data());
  }

  // Also finds whatever is not finite: later passes do not fail.
  tq_status find_statistics() {
    const size_t keys = size_t(args_.kv_heads * args_.head_dim_k), values = size_t(args_.kv_heads * args_.head_dim_v);
    std::vector<double> sum_k(keys, 0.0), squares_k(keys, 0.0), sum_v(values, 0.0), squares_v(values, 0.0);
    const auto add = [this](const std::vector<float> &x, std::vector<double> &sums, std::vector<double> &squares) {
      for (size_t i = 0; i < size_t(count_) * sums.size(); ++i) {
        sums[i % sums.size()] += double(x[i]);
        squares[i % sums.size()] += double(x[i]) * double(x[i]);
      }
    };
    for (int64_t first = 0; first < args_.num_tokens; first += count_) {
      TQKV_TRY(read_chunk(first));
      add(k_, sum_k, squares_k);
      add(v_, sum_v, squares_v);
    }
    const double n = double(args_.num_tokens);
    double means = 0, all = 0;
    for (size_t i = 0; i < keys; ++i) {
      statistics_.key_mean.push_back(float(sum_k[i] / n));
      means += sum_k[i] / n * (sum_k[i] / n);
      all += squares_k[i] / n;
    }
    statistics_.key_mean_share = all > 0 ? means / all : 0;
    statistics_.outliers_k = outliers(sum_k, squares_k, args_.head_dim_k);
    statistics_.outliers_v = outliers(sum_v, squares_v, args_.head_dim_v);
    return TQ_OK;
  }

  int32_t outliers(const std::vector<double> &sums, const std::vector<double> &squares, int32_t dim) const {
    const double n = double(args_.num_tokens);
    int32_t count = 0;
    for (size_t begin = 0; begin < sums.size(); begin += size_t(dim)) {
      std::vector<double> variances;
      for (size_t i = begin; i < begin + size_t(dim); ++i) {
        variances.push_back(std::max(0.0, squares[i] / n - sums[i] / n * (sums[i] / n)));
      }
      std::vector<double> sorted(variances);
      std::nth_element(sorted.begin(), sorted.begin() + dim / 2, sorted.end());
      const double limit = kOutlier * kOutlier * sorted[size_t(dim / 2)];
      count += int32_t(std::count_if(variances.begin(), variances.end(), [&](double x) { return x > limit; }));
    }
    return count;
  }

  tq_status fill(const Preset &preset, bool exact, bool offset, Candidate *candidate) const {
    tq_config config{};
    config.struct_size = sizeof config;
    config.kv_heads = args_.kv_heads;
    config.seed = args_.seed;
    config.raw_type = args_.type == TQ_TYPE_F16 ? TQ_TYPE_F16 : TQ_TYPE_BF16;
    config.threads = 1;  // the loops here are outside of it
    set_preset_bits(config.k, preset.k_bits);
    set_preset_bits(config.v, preset.v_bits);
    config.k.head_dim = args_.head_dim_k;
    config.v.head_dim = args_.head_dim_v;
    TQKV_TRY(make_codec(config, &candidate->codec));
    candidate->preset = &preset;
    candidate->exact = exact;
    candidate->offset = offset;
    const Codec &codec = *candidate->codec;
    const auto bytes = [](const Side &side) { return double(side.code_bytes() + side.scale_bytes()); };
    candidate->bytes = (bytes(codec.k) + bytes(codec.v)) * args_.kv_heads;
    if (exact) {
      const double copies =
          std::min<double>(double(args_.exact_first_tokens) + args_.exact_recent_tokens, double(args_.context_tokens));
      candidate->bytes +=
          (bytes(codec.exact_k) + bytes(codec.exact_v)) * args_.kv_heads * copies / double(args_.context_tokens);
    }
    return TQ_OK;
  }

  // What the current chunk's vectors come back as.
  void pass(const Codec &codec, const Side &side, const std::vector<float> &from, const float *offset,
            std::vector<float> &to) const {
    const int64_t dim = side.head_dim, heads = args_.kv_heads, vectors = count_ * heads;
    to.resize(from.size());
    pool_.run((vectors + kGroup - 1) / kGroup, [&](int64_t group) {
      float rows[kGroup * kMaxHeadDim];
      uint8_t records[kGroup * kMaxHeadDim * 2];
      alignas(4) uint8_t scales[kGroup * 4];
      Encoded encoded[kGroup];
      const int64_t begin = group * kGroup;
      const int n = int(std::min<int64_t>(kGroup, vectors - begin));
      std::copy_n(&from[size_t(begin * dim)], n * dim, rows);
      const auto shift = [&](float sign) {
        for (int64_t i = 0; offset != nullptr && i < n * dim; ++i) {
          rows[i] += sign * offset[(begin + i / dim) % heads * dim + i % dim];
        }
      };
      shift(-1);
      encode_group(codec, side, rows, n, records, scales, encoded);
      decode_group(codec, side, records, scales, n, rows);
      shift(1);
      std::copy_n(rows, n * dim, &to[size_t(begin * dim)]);
    });
  }

  std::optional<ExactAttention> make_attention() const {
    if (!has_queries()) return std::nullopt;
    return ExactAttention(
        {queries_, args_.q_heads, args_.kv_heads, args_.head_dim_k, args_.head_dim_v, double(args_.scale)}, q_.data(),
        positions_, loop_);
  }

  tq_status choose_offset() {
    const Preset &preset = kPresets[0];  // 4 bits
    Candidate candidates[2];
    for (const int i : {0, 1}) TQKV_TRY(fill(preset, false, i == 1, &candidates[i]));
    std::optional<ExactAttention> attention = make_attention();
    std::vector<float> decoded;
    for (int64_t first = 0; first < args_.num_tokens; first += count_) {
      TQKV_TRY(read_chunk(first));
      if (attention) attention->add_chunk(first, count_, k_.data(), v_.data());
      for (Candidate &c : candidates) {
        pass(*c.codec, c.codec->k, k_, c.offset ? statistics_.key_mean.data() : nullptr, decoded);
        add_errors(k_, decoded, args_.head_dim_k, c.k);
        if (attention) attention->compare_chunk({decoded.data(), nullptr, 0, 0}, c.weights);
      }
    }
    const auto figure = [&](const Candidate &c) {
      return attention ? attention->divergence(c.weights) : c.k.count > 0 ? c.k.mse() : 0;
    };
    statistics_.figure_without = figure(candidates[0]);
    statistics_.figure_with = figure(candidates[1]);
    use_offset_ = statistics_.figure_with < kOffsetGain * statistics_.figure_without;
    return TQ_OK;
  }

  void add_errors(const std::vector<float> &x, const std::vector<float> &y, int32_t dim, VectorError &error) const {
    for (int64_t i = 0; i < count_ * args_.kv_heads; ++i) error.add(&x[size_t(i * dim)], &y[size_t(i * dim)], dim);
  }

  void measure(std::vector<Candidate> &candidates) {
    std::optional<ExactAttention> attention = make_attention();
    std::vector<float> k, v, exact_k, exact_v;
    for (int64_t first = 0; first < args_.num_tokens; first += count_) {
      static_cast<void>(read_chunk(first));  // find_statistics has seen that all is finite
      if (attention) attention->add_chunk(first, count_, k_.data(), v_.data());
      const Codec &any = *candidates.front().codec;
      pass(any, any.exact_k, k_, nullptr, exact_k);
      pass(any, any.exact_v, v_, nullptr, exact_v);
      for (Candidate &c : candidates) {
        pass(*c.codec, c.codec->k, k_, c.offset ? statistics_.key_mean.data() : nullptr, k);
        pass(*c.codec, c.codec->v, v_, nullptr, v);
        add_errors(k_, k, args_.head_dim_k, c.k);
        add_errors(v_, v, args_.head_dim_v, c.v);
        if (!attention) continue;
        attention->compare_chunk(
            {k.data(), c.exact ? exact_k.data() : nullptr, c.exact ? args_.exact_first_tokens : 0,
             c.exact ? args_.exact_recent_tokens : 0, v.data(), c.exact ? exact_v.data() : nullptr},
            c.weights);
      }
    }
    for (Candidate &c : candidates) {
      if (attention) {
        c.kl = attention->divergence(c.weights);
        c.output_error = attention->output_error(c.weights);
      } else {  // vectors that are all zero count for nothing
        c.output_error = std::sqrt(std::max(c.k.count > 0 ? c.k.mse() : 0, c.v.count > 0 ? c.v.mse() : 0));
      }
    }
  }

  bool within_bytes(const Candidate &c) const {
    return args_.max_bytes_per_token == 0 || c.bytes <= args_.max_bytes_per_token;
  }
  bool good(const Candidate &c) const {
    return (args_.max_output_error == 0 || c.output_error <= args_.max_output_error) &&
           (args_.max_kl == 0 || c.kl <= args_.max_kl);
  }

  const Candidate &choose(const std::vector<Candidate> &candidates) const {
    const bool quality = args_.max_output_error != 0 || args_.max_kl != 0;
    const auto better_error = [](const Candidate &a, const Candidate &b) {
      return std::pair(a.output_error, a.bytes) < std::pair(b.output_error, b.bytes);
    };
    const auto fewer_bytes = [](const Candidate &a, const Candidate &b) {
      return std::pair(a.bytes, a.output_error) < std::pair(b.bytes, b.output_error);
    };
    const Candidate *best = nullptr;
    const auto consider = [&](bool among, const Candidate &c, const auto &better) {
      if (among && (best == nullptr || better(c, *best))) best = &c;
    };
    if (quality) {
      for (const Candidate &c : candidates) consider(within_bytes(c) && good(c), c, fewer_bytes);
    }
    if (best == nullptr) {
      for (const Candidate &c : candidates) consider(within_bytes(c), c, better_error);
    }
    if (best == nullptr) {
      for (const Candidate &c : candidates) consider(true, c, fewer_bytes);
    }
    return *best;
  }

  std::vector<std::string> reasons(const std::vector<Candidate> &candidates, const Candidate &chosen,
                                   bool meets) const {
    std::vector<std::string> sentences;
    const std::string error = has_queries() ? "output error " : "vector error ";
    std::string figures = error + number(chosen.output_error);
    if (has_queries()) figures += ", KL " + number(chosen.kl);
    figures += ", " + number(chosen.bytes) + " bytes a token";
    sentences.push_back(std::string(chosen.preset->name) + (chosen.exact ? " with exact copies" : "") + " measured " +
                        figures + (meets ? ", which meets every target." : ", and no candidate meets every target."));
    const Candidate *smaller = nullptr;
    for (const Candidate &c : candidates) {
      if (c.bytes < chosen.bytes && !good(c) && (smaller == nullptr || c.output_error < smaller->output_error)) {
        smaller = &c;
      }
    }
    if (meets && smaller != nullptr) {
      std::string text = std::string("Of what takes less, ") + smaller->preset->name +
                         (smaller->exact ? " with exact copies" : "") + " came closest: " + error +
                         number(smaller->output_error);
      if (has_queries()) text += ", KL " + number(smaller->kl);
      sentences.push_back(text + ".");
    }
    const std::string what = has_queries() ? "the KL at 4 bits" : "the squared error of keys at 4 bits";
    sentences.push_back("The keys' mean is " + number(100 * statistics_.key_mean_share) +
                        "% of their energy; a key offset takes " + what + " from " +
                        number(statistics_.figure_without) + " to " + number(statistics_.figure_with) +
                        (!use_offset_    ? ", a gain of less than a tenth, so it is not used."
                         : chosen.offset ? ", so it is used."
                                         : ", but raw keys need none."));
    if (!has_queries()) {
      sentences.push_back("No queries were given, so attention was not measured and exact copies not considered.");
    } else if (exact_considered_) {
      for (const Candidate &c : candidates) {
        if (c.preset != chosen.preset || c.exact == chosen.exact) continue;
        sentences.push_back(std::string(chosen.exact ? "Without" : "With") + " exact copies of " +
                            std::to_string(args_.exact_first_tokens) + " first and " +
                            std::to_string(args_.exact_recent_tokens) + " recent tokens " + c.preset->name +
                            " measured output error " + number(c.output_error) + ", KL " + number(c.kl) + ", " +
                            number(c.bytes) + " bytes a token.");
      }
    }
    if (statistics_.outliers_k > 0) {
      sentences.push_back(std::to_string(statistics_.outliers_k) +
                          " key channels stand out of their heads; the rotation spreads them.");
    }
    return sentences;
  }

  void write(const std::vector<Candidate> &candidates, const Candidate &chosen, tq_recommend_result *result,
             std::string *text) const {
    const bool meets = within_bytes(chosen) && good(chosen);
    const int32_t first = chosen.exact ? args_.exact_first_tokens : 0;
    const int32_t recent = chosen.exact ? args_.exact_recent_tokens : 0;
    result->meets_targets = meets;
    std::strncpy(result->preset, chosen.preset->name, sizeof result->preset - 1);
    result->use_key_offset = chosen.offset;
    result->exact_first_tokens = first;
    result->exact_recent_tokens = recent;
    result->outlier_channels = statistics_.outliers_k;
    result->output_error = chosen.output_error;
    result->kl = chosen.kl;
    result->bytes_per_token = chosen.bytes;
    result->key_mean_share = statistics_.key_mean_share;

    ordered_json json;
    json["preset"] = chosen.preset->name;
    json["use_key_offset"] = chosen.offset;
    json["exact_first_tokens"] = first;
    json["exact_recent_tokens"] = recent;
    json["meets_targets"] = meets;
    const auto figures = [](const Candidate &c, ordered_json &to) {
      to["bytes_per_token"] = c.bytes;
      to["output_error"] = c.output_error;
      to["kl"] = c.kl;  // NaN is written as null
    };
    figures(chosen, json);
    json["targets"] = {{"max_output_error", args_.max_output_error},
                       {"max_kl", args_.max_kl},
                       {"max_bytes_per_token", args_.max_bytes_per_token}};
    json["statistics"] = {{"tokens", args_.num_tokens},
                          {"queries", queries_},
                          {"key_mean_share", statistics_.key_mean_share},
                          {"outlier_channels_k", statistics_.outliers_k},
                          {"outlier_channels_v", statistics_.outliers_v},
                          {has_queries() ? "kl_without_offset" : "mse_k_without_offset", statistics_.figure_without},
                          {has_queries() ? "kl_with_offset" : "mse_k_with_offset", statistics_.figure_with}};
    json["candidates"] = ordered_json::array();
    for (const Candidate &c : candidates) {
      ordered_json entry;
      entry["preset"] = c.preset->name;
      entry["use_key_offset"] = c.offset;
      entry["exact"] = c.exact;
      figures(c, entry);
      entry["mse_k"] = c.k.count > 0 ? c.k.mse() : 0;
      entry["mse_v"] = c.v.count > 0 ? c.v.mse() : 0;
      json["candidates"].push_back(entry);
    }
    json["reasons"] = reasons(candidates, chosen, meets);
    *text = json.dump();
  }

  tq_recommend_args args_;
  Parallel pool_;
  tqkv_metrics::ParallelFor loop_;
  Statistics statistics_;
  bool use_offset_ = false, exact_considered_ = false;
  int64_t chunk_ = 0, queries_ = 0;
  std::vector<float> q_;
  std::vector<int64_t> positions_;

  // the current chunk
  int64_t first_ = 0, count_ = 0;
  std::vector<float> k_, v_;
};

}  // namespace

tq_status make_recommendation(const tq_recommend_args &args, tq_recommend_result *result, std::string *json) {
  return Recommender(args).make(result, json);
}

}  // namespace tqkv
