// SPDX-License-Identifier: Apache-2.0
// tq_recommend on the bundled keys, values and queries of a real model, on drawn ones, and on wrong arguments.
#include <tqkv/tqkv.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "catch.hpp"

namespace {

using Json = nlohmann::json;

struct Sample {
  int32_t type = TQ_TYPE_F32, kv_heads = 1, q_heads = 0, dim_k = 0, dim_v = 0;
  int64_t tokens = 0, queries = 0;
  std::vector<char> k, v, q;

  tq_recommend_args args() const {
    tq_recommend_args args = {};
    args.struct_size = sizeof args;
    args.type = type;
    args.num_tokens = tokens;
    args.k = k.data();
    args.v = v.data();
    args.kv_heads = kv_heads;
    args.head_dim_k = dim_k;
    args.head_dim_v = dim_v;
    if (queries > 0) {
      args.q = q.data();
      args.num_queries = queries;
      args.q_heads = q_heads;
    }
    return args;
  }
};

// One layer of bench/data.
Sample real_layer(int layer) {
  const auto path =
      std::filesystem::path(__FILE__).parent_path().parent_path().parent_path() / "bench/data/tinylm_kv.safetensors";
  std::ifstream file(path, std::ios::binary);
  uint64_t bytes = 0;
  file.read(reinterpret_cast<char *>(&bytes), 8);
  std::string text(bytes, ' ');
  file.read(text.data(), std::streamsize(bytes));
  const Json header = Json::parse(text);
  const auto read = [&](const char *name, std::vector<char> &to) {
    const Json &entry = header.at("layers." + std::to_string(layer) + "." + name);
    const int64_t begin = entry["data_offsets"][0], end = entry["data_offsets"][1];
    to.resize(size_t(end - begin));
    file.seekg(std::streamoff(8 + bytes + uint64_t(begin)));
    file.read(to.data(), std::streamsize(to.size()));
    return entry["shape"].get<std::vector<int64_t>>();
  };
  Sample s;
  s.type = TQ_TYPE_BF16;
  const auto k = read("k", s.k), q = read("q", s.q);
  read("v", s.v);
  s.tokens = k[0];
  s.kv_heads = int32_t(k[1]);
  s.dim_k = s.dim_v = int32_t(k[2]);
  s.queries = q[0];
  s.q_heads = int32_t(q[1]);
  REQUIRE(file.good());
  return s;
}

Sample drawn(std::mt19937_64 &random, int64_t tokens, int32_t kv_heads, int32_t dim_k, int32_t dim_v, float mean) {
  std::normal_distribution<float> normal;
  Sample s;
  s.kv_heads = kv_heads;
  s.q_heads = 2 * kv_heads;
  s.dim_k = dim_k;
  s.dim_v = dim_v;
  s.tokens = tokens;
  s.queries = std::min<int64_t>(tokens, 5);
  std::vector<float> means(size_t(kv_heads * dim_k));
  for (float &x : means) x = mean * normal(random);
  const auto fill = [&](std::vector<char> &to, int64_t count, const std::vector<float> *add) {
    std::vector<float> values(static_cast<size_t>(count));
    for (size_t i = 0; i < values.size(); ++i) values[i] = normal(random) + (add ? (*add)[i % add->size()] : 0);
    to.resize(values.size() * sizeof(float));
    std::memcpy(to.data(), values.data(), to.size());
  };
  fill(s.k, tokens * kv_heads * dim_k, &means);
  fill(s.v, tokens * kv_heads * dim_v, nullptr);
  fill(s.q, s.queries * s.q_heads * dim_k, nullptr);
  return s;
}

struct Answer {
  tq_status status;
  tq_recommend_result result;
  Json json;
  std::string error;
};

// On poisoned outputs: a failed call leaves them alone and says why; the JSON holds the numbers of the struct.
Answer recommend(const tq_recommend_args &args) {
  Answer answer = {};
  std::string text(16384, '\x5a');
  std::memset(&answer.result, 0xa5, sizeof answer.result);
  answer.result.struct_size = sizeof answer.result;
  const tq_recommend_result poisoned = answer.result;
  size_t bytes = 0;
  answer.status = tq_recommend(&args, &answer.result, text.data(), text.size(), &bytes);
  if (answer.status != TQ_OK) {
    answer.error = tq_last_error();
    CHECK(!answer.error.empty());
    CHECK(std::memcmp(&answer.result, &poisoned, sizeof poisoned) == 0);
    CHECK(text == std::string(text.size(), '\x5a'));
    return answer;
  }
  REQUIRE(std::strlen(text.c_str()) + 1 == bytes);
  answer.json = Json::parse(text.c_str());
  const tq_recommend_result &r = answer.result;
  REQUIRE(r.struct_size == sizeof r);
  CHECK(answer.json["preset"] == r.preset);
  CHECK(answer.json["use_key_offset"] == (r.use_key_offset != 0));
  CHECK(answer.json["exact_first_tokens"] == r.exact_first_tokens);
  CHECK(answer.json["exact_recent_tokens"] == r.exact_recent_tokens);
  CHECK(answer.json["meets_targets"] == (r.meets_targets != 0));
  CHECK(answer.json["output_error"] == r.output_error);
  CHECK(answer.json["bytes_per_token"] == r.bytes_per_token);
  CHECK(answer.json["kl"].is_null() == std::isnan(r.kl));
  CHECK(!answer.json["reasons"].empty());
  tq_config config;
  CHECK(tq_config_init(&config, sizeof config, r.preset) == TQ_OK);
  return answer;
}

const Json &candidate(const Answer &answer, const char *preset, bool exact) {
  for (const Json &c : answer.json["candidates"]) {
    if (c["preset"] == preset && c["exact"] == exact) return c;
  }
  FAIL("no candidate " << preset);
  return answer.json;
}

// What `tqkv eval --per-layer` measures with the key offset and exact tokens, through pages and f32 attention, whose rounding
// is far below the tolerance.
void check_real_layer(int layer, double error, double kl) {
  const Answer answer = recommend(real_layer(layer).args());
  REQUIRE(answer.status == TQ_OK);
  CHECK(answer.result.meets_targets == 1);
  CHECK(answer.result.output_error <= 0.05);  // the default target
  CHECK(answer.result.use_key_offset == 1);
  CHECK(answer.json["candidates"].size() == 13);
  for (const Json &c : answer.json["candidates"]) {
    if (c["bytes_per_token"] < answer.result.bytes_per_token) CHECK(c["output_error"] > 0.05);
  }
  CHECK(candidate(answer, "k4v4", true)["output_error"].get<double>() == tqkv_test::Approx(error).epsilon(1e-5));
  CHECK(candidate(answer, "k4v4", true)["kl"].get<double>() == tqkv_test::Approx(kl).epsilon(1e-5));
}

}  // namespace

TEST_CASE("recommend: on a real layer the figures are those of the command's evaluation") {
  check_real_layer(2, 0.007829516375, 0.001334056807);
}

TEST_CASE("recommend: the other real layers", "[long]") {
  check_real_layer(0, 0.043822760434, 0.002061759596);
  check_real_layer(5, 0.047560977372, 0.004023221219);
  check_real_layer(7, 0.024059624399, 0.003477805198);
}

TEST_CASE("recommend: targets decide") {
  std::mt19937_64 random(tqkv_test::seed());
  const Sample sample = drawn(random, 300, 2, 64, 48, 0);
  tq_recommend_args args = sample.args();
  args.context_tokens = 1 << 20;
  const auto of = [&](double output_error, double kl, double bytes) {
    args.max_output_error = output_error;
    args.max_kl = kl;
    args.max_bytes_per_token = bytes;
    return recommend(args);
  };
  const Answer any = of(1e300, 0, 0);  // whatever takes least
  CHECK(std::string(any.result.preset) == "k2v2");
  CHECK(any.result.exact_first_tokens + any.result.exact_recent_tokens == 0);
  CHECK(any.result.bytes_per_token == 2 * (16 + 2 + 12 + 2));
  const Answer best = of(1e-9, 0, 0);
  CHECK(std::string(best.result.preset) == "raw");
  CHECK(best.result.meets_targets == 0);  // f32 in bf16 is off by more
  CHECK(of(1e-2, 0, 0).result.meets_targets == 1);
  const Answer budget = of(0, 0, 2 * (32 + 2 + 24 + 2) + 1);  // k4v4 and what the copies cost in a long context
  CHECK(std::string(budget.result.preset) == "k4v4");
  CHECK(budget.result.meets_targets == 1);
  CHECK(budget.result.exact_recent_tokens == 128);
  CHECK(of(0, 0, 1).result.meets_targets == 0);
  const Answer kl = of(0, candidate(any, "k3v2", false)["kl"], 0);
  CHECK(kl.result.kl <= candidate(any, "k3v2", false)["kl"].get<double>());
  CHECK(kl.result.bytes_per_token <= candidate(any, "k3v2", false)["bytes_per_token"].get<double>());
  args.exact_first_tokens = -1;
  const Answer plain = of(0, 0, 0);
  CHECK(plain.json["candidates"].size() == 7);
  CHECK(plain.result.exact_recent_tokens == 0);
  args.threads = 1;
  const Answer alone = of(0, 0, 0);
  CHECK(alone.json == plain.json);  // whatever the number of threads
}

TEST_CASE("recommend: a key offset is used where it pays") {
  std::mt19937_64 random(tqkv_test::seed());
  for (const bool queries : {true, false}) {
    for (const float mean : {0.0f, 5.0f}) {
      // One head's 10 queries tell by chance in one of 13 samples that an offset pays where there is no mean; of 16 heads'
      // mean the threshold is 5.7 standard deviations away.
      Sample sample = drawn(random, 200, 16, 64, 64, mean);
      if (!queries) sample.queries = 0;
      tq_recommend_args args = sample.args();
      args.max_output_error = 1;  // anything but raw, whose keys need no offset
      const Answer answer = recommend(args);
      REQUIRE(answer.status == TQ_OK);
      CHECK(answer.result.use_key_offset == (mean > 0));
      // 25 of 26 parts of the energy are the mean's; the mean of 200 normals leaves 1 / 200 where there is none.
      CHECK(answer.result.key_mean_share > (mean > 0 ? 0.9 : 0));
      CHECK(answer.result.key_mean_share < (mean > 0 ? 1 : 0.03));
      CHECK(std::isnan(answer.result.kl) == !queries);
    }
  }
}

TEST_CASE("recommend: strides, types, chunks and zeros") {
  std::mt19937_64 random(tqkv_test::seed());
  const Sample sample = drawn(random, 2300, 2, 32, 16, 1);  // more than a chunk
  const Answer packed = recommend(sample.args());
  REQUIRE(packed.status == TQ_OK);
  // The same values in wider rows, and padding that is not to be read.
  const auto spread = [](const std::vector<char> &from, int64_t tokens, int64_t heads, int64_t dim) {
    std::vector<float> to(size_t(tokens * (heads * (dim + 3) + 5)), std::numeric_limits<float>::quiet_NaN());
    const auto *values = reinterpret_cast<const float *>(from.data());
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        std::copy_n(values + (t * heads + h) * dim, dim, &to[size_t(t * (heads * (dim + 3) + 5) + h * (dim + 3))]);
      }
    }
    return to;
  };
  const auto k = spread(sample.k, 2300, 2, 32), v = spread(sample.v, 2300, 2, 16), q = spread(sample.q, 5, 4, 32);
  tq_recommend_args args = sample.args();
  args.k = k.data();
  args.v = v.data();
  args.q = q.data();
  args.k_head_stride = args.q_head_stride = 35;
  args.v_head_stride = 19;
  args.k_token_stride = 2 * 35 + 5;
  args.v_token_stride = 2 * 19 + 5;
  args.q_token_stride = 4 * 35 + 5;
  CHECK(recommend(args).json == packed.json);

  Sample zeros = sample;
  std::fill(zeros.k.begin(), zeros.k.end(), 0);
  std::fill(zeros.v.begin(), zeros.v.end(), 0);
  const Answer nothing = recommend(zeros.args());
  REQUIRE(nothing.status == TQ_OK);
  CHECK(nothing.result.output_error == 0);
  CHECK(nothing.result.key_mean_share == 0);
  CHECK(nothing.result.use_key_offset == 0);

  Sample one = drawn(random, 1, 1, 16, 16, 0);
  CHECK(recommend(one.args()).status == TQ_OK);
}

TEST_CASE("recommend: what is wrong is refused by name") {
  std::mt19937_64 random(tqkv_test::seed());
  const Sample good = drawn(random, 20, 2, 32, 32, 0);
  const auto refuses = [&](tq_status status, const char *words, const auto &change) {
    INFO(words);
    tq_recommend_args args = good.args();
    change(args);
    const Answer answer = recommend(args);
    INFO(answer.error);
    CHECK(answer.status == status);
    CHECK(answer.error.find(words) != std::string::npos);
  };
  using Args = tq_recommend_args;
  refuses(TQ_ERROR_STRUCT_SIZE, "struct_size", [](Args &a) { a.struct_size = 8; });
  refuses(TQ_ERROR_UNKNOWN_ENUM, "args.type is 9", [](Args &a) { a.type = 9; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "args.num_tokens is 0", [](Args &a) { a.num_tokens = 0; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "args.num_tokens", [](Args &a) { a.num_tokens = int64_t{1} << 31; });
  refuses(TQ_ERROR_NULL_POINTER, "args.k is NULL", [](Args &a) { a.k = nullptr; });
  refuses(TQ_ERROR_NULL_POINTER, "args.v is NULL", [](Args &a) { a.v = nullptr; });
  refuses(TQ_ERROR_NULL_POINTER, "args.q is NULL", [](Args &a) { a.q = nullptr; });
  refuses(TQ_ERROR_MISALIGNED, "args.k", [](Args &a) { a.k = static_cast<const char *>(a.k) + 1; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "overlap", [](Args &a) { a.v_token_stride = 31; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "below zero", [](Args &a) { a.k_token_stride = -64; });
  refuses(TQ_ERROR_OVERFLOW, "args.q", [](Args &a) { a.q_token_stride = INT64_MAX / 4; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "args.num_queries is 21", [](Args &a) { a.num_queries = 21; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "args.num_queries is -1", [](Args &a) { a.num_queries = -1; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "args.kv_heads is 1025", [](Args &a) { a.kv_heads = 1025; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "args.q_heads is 3", [](Args &a) { a.q_heads = 3; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "args.head_dim_k is 0", [](Args &a) { a.head_dim_k = 0; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "args.head_dim_v is 592", [](Args &a) { a.head_dim_v = 592; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "args.scale", [](Args &a) { a.scale = std::numeric_limits<float>::infinity(); });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "args.threads", [](Args &a) { a.threads = -1; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "max_output_error", [](Args &a) { a.max_output_error = -1; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "max_output_error", [](Args &a) { a.max_output_error = NAN; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "max_bytes_per_token", [](Args &a) { a.max_bytes_per_token = -0.5; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "context_tokens", [](Args &a) { a.context_tokens = -1; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "exact_first_tokens", [](Args &a) { a.exact_first_tokens = -2; });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "exact_recent_tokens", [](Args &a) {
    a.exact_first_tokens = -1;
    a.exact_recent_tokens = 4;
  });
  refuses(TQ_ERROR_INVALID_ARGUMENT, "args.max_kl", [](Args &a) {
    a.q = nullptr;
    a.num_queries = 0;
    a.q_heads = 0;
    a.max_kl = 1;
  });
  Sample bad = good;
  const float nan = NAN;
  std::memcpy(&bad.v[size_t(((7 * 2 + 1) * 32 + 3) * 4)], &nan, 4);
  const Answer answer = recommend(bad.args());
  CHECK(answer.status == TQ_ERROR_INVALID_ARGUMENT);
  CHECK(answer.error == "args.v holds a NaN or an infinity at token 7, head 1");

  // A head_dim that no Hadamard matrix has: the refusal of tq_create.
  const Sample odd = drawn(random, 20, 1, 176, 176, 0);
  CHECK(recommend(odd.args()).status == TQ_ERROR_NOT_SUPPORTED);

  tq_recommend_args args = good.args();
  tq_recommend_result result = {};
  result.struct_size = sizeof result;
  char text[8];
  size_t bytes = 0;
  CHECK(tq_recommend(&args, &result, text, sizeof text, &bytes) == TQ_ERROR_INVALID_ARGUMENT);
  CHECK(bytes > sizeof text);
  CHECK(result.preset[0] == 0);
  CHECK(tq_recommend(&args, &result, nullptr, 0, nullptr) == TQ_OK);
  CHECK(result.preset[0] != 0);
  CHECK(tq_recommend(nullptr, &result, nullptr, 0, nullptr) == TQ_ERROR_NULL_POINTER);
  CHECK(tq_recommend(&args, nullptr, nullptr, 0, nullptr) == TQ_ERROR_NULL_POINTER);
}
