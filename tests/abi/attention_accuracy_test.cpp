// SPDX-License-Identifier: Apache-2.0
// The relative L2 error of attention over long contexts, against the double-precision oracle over the same pages: at most
// 3e-4 with f32 outputs and 2e-3 with bf16. Tokens that a few blocks hold are repeated by the block table.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "bundled.hpp"
#include "support.hpp"

namespace {

constexpr int kHeadDim = kBundledHeadDim, kKvHeads = 2, kBlock = 16;
constexpr int32_t kLongest = 131072;

// bf16 [tokens, kKvHeads, kHeadDim], and [q_heads, kHeadDim].
struct Tensors {
  int64_t tokens;
  int q_heads;
  std::vector<uint8_t> k, v, q;
};

class Accuracy {
 public:
  // Pages with the tensors' tokens, by `target`; all targets write the same.
  Accuracy(Random &random, const Target &target, int bits_k, int bits_v, const Tensors &tensors)
      : bits_k_(bits_k), bits_v_(bits_v) {
    const tq_config config = config_for(target);
    const CodecPtr codec = make_codec(config);
    const tq_codec_info info = info_of(codec.get());
    reader_ = std::make_unique<oracle::Codec>(config, info);
    pool_ = make_pool(random, *reader_, info.page_fingerprint, false, tensors.tokens / kBlock, PoolShape::kPacked);
    StoreCall store_call;
    store_call.type = TQ_TYPE_BF16;
    store_call.k = tensors.k;
    store_call.v = tensors.v;
    store_call.pool = &pool_;
    for (int64_t i = 0; i < tensors.tokens; ++i) store_call.slots.push_back(i);
    REQUIRE(store(target, codec.get(), &store_call) == TQ_OK);
    call_.pool = &pool_;
    call_.args.q_heads = tensors.q_heads;
    call_.args.q_type = TQ_TYPE_BF16;
    query_ = tensors.q;
  }

  const oracle::Codec &reader() const { return *reader_; }
  const PoolImage &pool() const { return pool_; }
  void set_scale(double scale) { call_.args.scale = float(scale); }

  // A sequence of all blocks, as often as needed, and `q_len` equal queries that see all of it; with `sink`, the token that
  // is read from block 0, only once.
  void add_sequence(int32_t length, int32_t sink = -1, int q_len = 1) {
    const int32_t first = sink < 0 ? 0 : 1, others = int32_t(pool_.pages.num_blocks) - first;
    call_.args.table_columns = kLongest / kBlock;
    for (int32_t column = 0; column < kLongest / kBlock; ++column) {
      call_.block_table.push_back(sink >= 0 && column == sink / kBlock ? 0 : first + column % others);
    }
    call_.lengths.push_back(length);
    if (call_.cu_seqlens.empty()) call_.cu_seqlens.push_back(0);
    call_.cu_seqlens.push_back(call_.cu_seqlens.back() + q_len);
    call_.args.num_tokens += q_len;
    call_.args.max_q_len = std::max(call_.args.max_q_len, q_len);
    for (int i = 0; i < q_len; ++i) call_.q.insert(call_.q.end(), query_.begin(), query_.end());
  }

  oracle::Attention expect() {
    std::map<std::tuple<int32_t, int64_t, int>, oracle::Vector> known;
    return expected(*reader_, call_, [&](bool exact, int32_t side, int64_t slot, int head) {
      oracle::Vector &vector = known[{side, slot, head}];
      if (vector.empty()) vector = oracle::load(*reader_, exact, pool_.view(*reader_), side, slot, head);
      return vector;
    });
  }

  void check(const Target &target, const oracle::Attention &want) {
    const CodecPtr codec = make_codec(config_for(target));
    for (const auto &[type, most] : {std::pair{TQ_TYPE_F32, 3e-4}, {TQ_TYPE_BF16, 2e-3}}) {
      call_.args.out_type = type;
      const AttentionRun got = run(target, codec.get(), call_, kHeadDim);
      REQUIRE(got.status == TQ_OK);
      INFO(target.name << " K" << bits_k_ << "V" << bits_v_ << " length " << call_.lengths[0] << " type " << type);
      CHECK(relative_error(want.out, got.out.data()) <= most);
    }
  }

 private:
  tq_config config_for(const Target &target) const {
    tq_config config = make_config(target, kHeadDim, bits_k_, bits_v_);
    config.kv_heads = kKvHeads;
    return config;
  }

  const int bits_k_, bits_v_;
  std::unique_ptr<oracle::Codec> reader_;
  PoolImage pool_;
  AttentionCall call_;
  std::vector<uint8_t> query_;
};

// Two of the model's layers side by side, and their queries at one of its positions.
Tensors model_tensors(Random &random) {
  const auto bundled = bundled_tensors();
  std::vector<std::string> layers;
  for (const auto &[name, bytes] : bundled) {
    if (name.back() == 'k') layers.push_back(name.substr(0, name.size() - 1));
  }
  std::shuffle(layers.begin(), layers.end(), random.engine());
  constexpr size_t kRow = 2 * kHeadDim, kGroup = 4;
  const size_t position = size_t(random.integer(0, 31));
  Tensors tensors{};
  tensors.q_heads = kKvHeads * int(kGroup);
  tensors.tokens = int64_t(bundled.at(layers[0] + "k").size() / kRow) / kBlock * kBlock;
  const auto append = [&](const std::string &name, size_t first, size_t bytes, std::vector<uint8_t> *to) {
    const auto from = bundled.at(name).begin() + std::ptrdiff_t(first);
    to->insert(to->end(), from, from + std::ptrdiff_t(bytes));
  };
  for (size_t t = 0; t < size_t(tensors.tokens); ++t) {
    for (int head = 0; head < kKvHeads; ++head) {
      append(layers[size_t(head)] + "k", t * kRow, kRow, &tensors.k);
      append(layers[size_t(head)] + "v", t * kRow, kRow, &tensors.v);
    }
  }
  for (int head = 0; head < kKvHeads; ++head) {
    append(layers[size_t(head)] + "q", position * kGroup * kRow, kGroup * kRow, &tensors.q);
  }
  return tensors;
}

struct SinkShape {
  int bits_k, bits_v, q_heads;
  int32_t length;
  std::vector<int32_t> sinks;  // of one sequence each
  int q_len;
};

void check_sinks(Random &random, const std::vector<SinkShape> &shapes) {
  for (const SinkShape &shape : shapes) {
    // Queries along one direction, that of the first key; all others are almost zero. Values around one in common.
    Tensors tensors{1024, shape.q_heads, {}, {}, {}};
    const std::vector<double> direction = normals(random, kHeadDim), common = normals(random, kHeadDim);
    std::vector<double> k = normals(random, tensors.tokens * kKvHeads * kHeadDim, 0.01),
                        v = normals(random, tensors.tokens * kKvHeads * kHeadDim),
                        q = normals(random, tensors.q_heads * kHeadDim, 0.01);
    for (size_t i = 0; i < kKvHeads * kHeadDim; ++i) k[i] = direction[i % kHeadDim];
    for (size_t i = 0; i < v.size(); ++i) v[i] += common[i % kHeadDim];
    for (size_t i = 0; i < q.size(); ++i) q[i] += direction[i % kHeadDim];
    tensors.k = encode_elements(k, TQ_TYPE_BF16);
    tensors.v = encode_elements(v, TQ_TYPE_BF16);
    tensors.q = encode_elements(q, TQ_TYPE_BF16);
    Accuracy accuracy(random, targets()[0], shape.bits_k, shape.bits_v, tensors);
    const oracle::Codec &reader = accuracy.reader();
    double logit = 0;  // of the sink, with scale 1
    for (int head = 0; head < kKvHeads; ++head) {
      const auto view = accuracy.pool().view(reader);
      logit += oracle::dot(direction, oracle::load(reader, false, view, TQ_SIDE_K, 0, head)) / kKvHeads;
    }
    const double scale = std::log(0.7 / 0.3 * shape.length) / logit;
    accuracy.set_scale(scale);
    for (const int32_t sink : shape.sinks) accuracy.add_sequence(shape.length, sink, shape.q_len);
    const oracle::Attention want = accuracy.expect();
    INFO("first sink at " << shape.sinks[0] << " q_heads " << shape.q_heads << " q_len " << shape.q_len);
    for (const double lse : want.lse) {
      const double weight = std::exp(scale * logit - lse);
      CHECK(weight > 0.6);
      CHECK(weight < 0.8);
    }
    for (const Target &target : targets()) accuracy.check(target, want);
  }
}

}  // namespace

TEST_CASE("long contexts of a model's own tokens and of random ones", "[slow]") {
  FRESH(random, "accuracy long");
  for (const auto &[bits_k, bits_v] : {std::pair{4, 4}, {3, 3}, {2, 2}}) {
    for (const bool real : {true, false}) {
      Tensors tensors{2048, 8, {}, {}, {}};
      if (real) {
        tensors = model_tensors(random);
      } else {  // logits spread by 2.5
        tensors.k = encode_elements(normals(random, tensors.tokens * kKvHeads * kHeadDim, 2.5), TQ_TYPE_BF16);
        tensors.v = encode_elements(normals(random, tensors.tokens * kKvHeads * kHeadDim), TQ_TYPE_BF16);
        tensors.q = encode_elements(normals(random, tensors.q_heads * kHeadDim), TQ_TYPE_BF16);
      }
      for (const int32_t length : {kLongest, int32_t(random.integer(1, 8192))}) {
        Accuracy accuracy(random, targets()[0], bits_k, bits_v, tensors);
        accuracy.add_sequence(length);
        const oracle::Attention want = accuracy.expect();
        INFO((real ? "a model's" : "random"));
        for (const Target &target : targets()) accuracy.check(target, want);
      }
    }
  }
}

TEST_CASE("a sink with most of the weight over a flat tail") {
  FRESH(random, "accuracy sink");
  std::vector<int32_t> anywhere;
  for (int i = 0; i < 4; ++i) anywhere.push_back(int32_t(random.integer(0, 4096 / kBlock - 1)) * kBlock);
  check_sinks(random, {{4, 4, 16, 4096, anywhere, 1}, {2, 2, 8, 4096, anywhere, 1}, {2, 2, 8, 300, {0}, 1}});
}

TEST_CASE("a sink with most of the weight over a long flat tail, and many rows", "[slow]") {
  FRESH(random, "accuracy long sink");
  check_sinks(random, {{4, 4, 8, kLongest, {0}, 1},
                       {2, 2, 16, kLongest, {0}, 1},
                       {3, 3, 8, kLongest, {kLongest / 2}, 1},
                       {4, 4, 8, 8192, {0}, 33}});
}
