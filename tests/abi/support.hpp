// SPDX-License-Identifier: Apache-2.0
// What the tests of the interface share: fresh random inputs, codecs, pools of pages, attention calls.
#pragma once

#include <tqkv/tqkv.h>

#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "device.hpp"
#include "oracle.hpp"

// Random numbers of one test. TQKV_TEST_SEED repeats a run; FRESH prints the seed with every failure.
class Random {
 public:
  explicit Random(const char *salt);
  uint64_t seed() const { return seed_; }
  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine_); }
  double normal() { return normal_(engine_); }
  bool chance(double probability) { return uniform(0, 1) < probability; }
  uint64_t bits() { return engine_(); }
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[integer(0, int64_t(values.size()) - 1)];
  }
  template <class T>
  const T &pick(const std::vector<T> &values) {
    return values[size_t(integer(0, int64_t(values.size()) - 1))];
  }
  std::mt19937_64 &engine() { return engine_; }

 private:
  uint64_t seed_;
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};
#define FRESH(random, salt) \
  Random random(salt);      \
  INFO("repeat with TQKV_TEST_SEED=" << random.seed())

struct CodecDeleter {
  void operator()(tq_codec *codec) const { tq_destroy(codec); }
};
using CodecPtr = std::unique_ptr<tq_codec, CodecDeleter>;

// A CPU pool of two threads is enough for tests, unless the configuration says otherwise.
tq_config make_config(const Target &target, int head_dim, int bits_k, int bits_v);
CodecPtr make_codec(const tq_config &config);
tq_codec_info info_of(const tq_codec *codec);
tq_layout layout_of(const tq_codec *codec, int32_t which);
std::string describe(const tq_config &config);

// A configuration drawn from everything the library offers. Matrices and levels it points to live in `storage`.
struct ConfigStorage {
  std::vector<float> k_matrix, v_matrix, k_levels, v_levels;
};
struct ConfigLimits {
  int max_head_dim = 160;
  bool allow_matrices = true;  // dense and custom rotations
  bool attends = false;        // what attention takes on the target
  bool many_rows = false;  // what kernels of head_dim 128 and fixed bits take, and scenarios of 8 to 192 rows a kv head
};
// Whether attention on the target's device takes a codec.
bool attends(const Target &target, const tq_config &config);
tq_config random_config(Random &random, const Target &target, ConfigStorage *storage, const ConfigLimits &limits = {});
std::vector<float> random_orthogonal(Random &random, int n);

// Elements of a caller's type, with the doubles they hold exactly.
std::vector<uint8_t> encode_elements(const std::vector<double> &values, int32_t type);
std::vector<double> decode_elements(const void *data, int32_t type, int64_t count);
std::vector<double> normals(Random &random, int64_t count, double sigma = 1);
// |got - want| / |want|, of as many as `want` has.
double relative_error(const std::vector<double> &want, const double *got);

struct Encoded {
  std::vector<uint8_t> codes, scales;  // densely packed
  tq_faults faults;
};
// Encodes [count, head_dim] elements through tq_encode. Checks the status, guards and that nothing else was written.
Encoded encode(const Target &target, const tq_codec *codec, int32_t side, const std::vector<uint8_t> &input,
               int32_t type);
std::vector<double> decode(const Target &target, const tq_codec *codec, int32_t side, const Encoded &encoded,
                           int64_t count, int32_t type = TQ_TYPE_F32);

// A pool's image on the host: all bytes from base on, and its description with `base` unset.
struct PoolImage {
  bool exact = false;
  std::vector<uint8_t> bytes;
  tq_pages pages{};

  tq_pages at(void *base) const {
    tq_pages copy = pages;
    copy.base = base;
    return copy;
  }
  oracle::Pool view(const oracle::Codec &codec) const {
    return oracle::Pool(codec, exact, at(const_cast<uint8_t *>(bytes.data())));
  }
};
enum class PoolShape { kPacked, kPadded, kHeadMajor, kHeadsInBlock };
// Filled with random bytes.
PoolImage make_pool(Random &random, const oracle::Codec &codec, uint64_t fingerprint, bool exact, int64_t num_blocks,
                    PoolShape shape);
PoolShape random_shape(Random &random);

// Stores tokens and updates the images. k and v: [tokens, kv_heads, head_dim] of `type`.
struct StoreCall {
  int32_t type = TQ_TYPE_F32;
  std::vector<uint8_t> k, v;
  std::vector<int64_t> slots, exact_slots;
  std::vector<float> key_offset;
  PoolImage *pool = nullptr, *exact_pool = nullptr;
  tq_faults faults{};
};
tq_status store(const Target &target, const tq_codec *codec, StoreCall *call);

// One attention call with host copies of everything. `args` holds the scalars; pointers and sizes that follow from the
// vectors are filled in by `host_args` and `run`.
struct AttentionCall {
  tq_attention_args args{};
  std::vector<uint8_t> q, k_new, v_new;
  std::vector<int32_t> cu_seqlens, q_positions, block_table, block_indptr, block_indices, lengths, starts, exact_table;
  std::vector<float> sinks, alibi_slopes, key_offset;
  const PoolImage *pool = nullptr, *exact_pool = nullptr;

  tq_attention_args host_args(tq_pages *pages, tq_pages *exact_pages) const;
};
struct AttentionRun {
  tq_status status = TQ_OK;
  std::vector<uint8_t> raw_out;  // out as written, strides included
  std::vector<double> out;       // [tokens, q_heads, head_dim_v]
  bool has_lse = true;
  std::vector<float> lse;  // [tokens, q_heads]
  tq_faults faults{};
  bool integer_queries = false;  // queries for coded keys are rounded to 16 bits
};
// Whether output and log-sum-exp are the same, bit for bit.
bool same_bits(const AttentionRun &a, const AttentionRun &b);
// A call that can be made again, with other lengths and tables.
class AttentionCaller {
 public:
  AttentionCaller(const Target &target, const tq_codec *codec, const AttentionCall &call, int head_dim_v,
                  bool want_lse = true);
  AttentionCaller(const AttentionCaller &) = delete;
  AttentionCaller &operator=(const AttentionCaller &) = delete;

  // As many as the call had.
  void change(const std::vector<int32_t> &lengths, const std::vector<int32_t> &block_table);
  // Checks guards, inputs left alone, and that gaps between strided rows stay poisoned.
  AttentionRun run();

 private:
  int64_t out_index(int64_t token, int64_t head, int64_t channel) const;

  Device &device_;
  const AttentionCall &call_;
  tq_attention_args args_;
  const int head_dim_v_;
  int64_t extent_ = 0;  // elements from the first of out to the last
  Bytes q_, k_new_, v_new_, cu_, positions_, table_, indptr_, indices_, lengths_, starts_, exact_table_, sinks_, alibi_,
      offset_, pool_, exact_pool_;
  Bytes faults_{device_, std::vector<tq_faults>(1)};
  std::optional<Bytes> out_, lse_, workspace_;
  tq_pages pages_{}, exact_pages_{};
  tq_status status_ = TQ_OK;
  std::function<tq_status()> make_;
};
// One call on a target.
AttentionRun run(const Target &target, const tq_codec *codec, const AttentionCall &call, int head_dim_v,
                 bool want_lse = true);
oracle::Attention expected(const oracle::Codec &codec, const AttentionCall &call,
                           const oracle::Loader &loader = nullptr);
// Compares with the oracle; `tolerance` is the relative L2 error of f32 output.
void check_attention(const AttentionRun &run, const oracle::Attention &expected, int32_t out_type, double tolerance);
double attention_tolerance(const Target &target, int32_t out_type = TQ_TYPE_F32);
