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

constexpr int kHeadDim = kBundledHeadDim, kKvHeads = 2, kQueryHeads = 8, kBlock = 16;
constexpr int32_t kLongest = 131072;

// bf16 [tokens, kKvHeads, kHeadDim], and [kQueryHeads, kHeadDim].
struct Tensors {
  int64_t tokens;
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
    call_.args.q_heads = kQueryHeads;
    call_.args.q_type = TQ_TYPE_BF16;
    query_ = tensors.q;
  }

  const oracle::Codec &reader() const { return *reader_; }
  const PoolImage &pool() const { return pool_; }
  void set_scale(double scale) { call_.args.scale = float(scale); }

  // A sequence of blocks 0 .. `first` - 1 and then, as often as needed, the others.
  void add_sequence(int32_t length, int32_t first) {
    const int32_t blocks = int32_t(pool_.pages.num_blocks);
    call_.args.table_columns = kLongest / kBlock;
    for (int32_t column = 0; column < kLongest / kBlock; ++column) {
      call_.block_table.push_back(column < first ? column : first + (column - first) % (blocks - first));
    }
    call_.lengths.push_back(length);
    call_.args.num_tokens = int32_t(call_.lengths.size());
    call_.q.insert(call_.q.end(), query_.begin(), query_.end());
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
      const size_t row = size_t{kQueryHeads} * kHeadDim;
      for (size_t s = 0; s < call_.lengths.size(); ++s) {
        double error = 0, square = 0;
        for (size_t i = s * row; i < (s + 1) * row; ++i) {
          error += std::pow(got.out[i] - want.out[i], 2);
          square += std::pow(want.out[i], 2);
        }
        INFO(target.name << " K" << bits_k_ << "V" << bits_v_ << " length " << call_.lengths[s] << " type " << type);
        CHECK(std::sqrt(error / square) <= most);
      }
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
  constexpr size_t kRow = 2 * kHeadDim, kGroup = kQueryHeads / kKvHeads;
  const size_t position = size_t(random.integer(0, 31));
  Tensors tensors;
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

}  // namespace

TEST_CASE("long contexts of a model's own tokens and of random ones", "[slow]") {
  FRESH(random, "accuracy long");
  for (const auto &[bits_k, bits_v] : {std::pair{4, 4}, {3, 3}, {2, 2}}) {
    for (const bool real : {true, false}) {
      Tensors tensors;
      if (real) {
        tensors = model_tensors(random);
      } else {  // logits spread by 2.5
        tensors.tokens = 2048;
        tensors.k = encode_elements(normals(random, tensors.tokens * kKvHeads * kHeadDim, 2.5), TQ_TYPE_BF16);
        tensors.v = encode_elements(normals(random, tensors.tokens * kKvHeads * kHeadDim), TQ_TYPE_BF16);
        tensors.q = encode_elements(normals(random, kQueryHeads * kHeadDim), TQ_TYPE_BF16);
      }
      Accuracy accuracy(random, targets()[0], bits_k, bits_v, tensors);
      accuracy.add_sequence(kLongest, 0);
      accuracy.add_sequence(int32_t(random.integer(1, 8192)), 0);
      const oracle::Attention want = accuracy.expect();
      INFO((real ? "a model's" : "random"));
      for (const Target &target : targets()) accuracy.check(target, want);
    }
  }
}

TEST_CASE("a sink with most of the weight over a flat tail", "[slow]") {
  FRESH(random, "accuracy sink");
  for (const auto &[bits_k, bits_v] : {std::pair{4, 4}, {2, 2}}) {
    // Queries along one direction; the first key too, all others almost zero. Values around one that all have in common.
    Tensors tensors{1024, {}, {}, {}};
    const std::vector<double> direction = normals(random, kHeadDim), common = normals(random, kHeadDim);
    std::vector<double> k = normals(random, tensors.tokens * kKvHeads * kHeadDim, 0.01),
                        v = normals(random, tensors.tokens * kKvHeads * kHeadDim),
                        q = normals(random, kQueryHeads * kHeadDim, 0.01);
    for (size_t i = 0; i < kKvHeads * kHeadDim; ++i) k[i] = direction[i % kHeadDim];
    for (size_t i = 0; i < v.size(); ++i) v[i] += common[i % kHeadDim];
    for (size_t i = 0; i < q.size(); ++i) q[i] += direction[i % kHeadDim];
    tensors.k = encode_elements(k, TQ_TYPE_BF16);
    tensors.v = encode_elements(v, TQ_TYPE_BF16);
    tensors.q = encode_elements(q, TQ_TYPE_BF16);
    for (const int32_t length : {kLongest, int32_t{4096}}) {
      Accuracy accuracy(random, targets()[0], bits_k, bits_v, tensors);
      const oracle::Codec &reader = accuracy.reader();
      double logit = 0;  // of the sink, with scale 1
      for (int head = 0; head < kKvHeads; ++head) {
        const auto view = accuracy.pool().view(reader);
        logit += oracle::dot(direction, oracle::load(reader, false, view, TQ_SIDE_K, 0, head)) / kKvHeads;
      }
      const double scale = std::log(0.7 / 0.3 * length) / logit;
      accuracy.set_scale(scale);
      accuracy.add_sequence(length, 1);
      const oracle::Attention want = accuracy.expect();
      for (const double lse : want.lse) {
        const double weight = std::exp(scale * logit - lse);
        CHECK(weight > 0.6);
        CHECK(weight < 0.8);
      }
      for (const Target &target : targets()) accuracy.check(target, want);
    }
  }
}
