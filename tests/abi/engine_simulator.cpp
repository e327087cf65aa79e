// SPDX-License-Identifier: Apache-2.0
#include "engine_simulator.hpp"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <numeric>
#include <sstream>
#include <utility>

#include "sim_pool.hpp"
#include "sim_truth.hpp"

namespace simulator {

namespace {

constexpr int32_t kAbsent = -1;  // no block: not stored yet, before the start, or fallen out of the window
constexpr int32_t kUnset = -2;   // exact block to be allocated by the first token stored in it
constexpr int kMaxDrafts = 4;

constexpr const char *kMistakeNames[] = {"none",
                                         "window too wide",
                                         "not causal",
                                         "positions ignored",
                                         "starts ignored",
                                         "sinks ignored",
                                         "soft cap ignored",
                                         "slopes ignored",
                                         "key offset forgotten",
                                         "query heads swapped",
                                         "block tables swapped",
                                         "rollback forgotten",
                                         "exact window too wide",
                                         "first exact tokens ignored",
                                         "ring too short",
                                         "token not stored",
                                         "no copy on write",
                                         "block not swapped",
                                         "block freed too early"};
static_assert(std::size(kMistakeNames) == size_t(Mistake::kCount));

// A caller's array [tokens, heads, dim] with strides.
struct Strided {
  std::vector<uint8_t> bytes;
  int64_t token_stride = 0, head_stride = 0;  // as passed: zero where dense
};

// Rows of `values` laid out densely, padded or head-major; gaps hold NaNs.
Strided lay_out(Random &random, const std::vector<double> &values, int64_t heads, int64_t dim, int32_t type) {
  const int64_t tokens = int64_t(values.size()) / (heads * dim);
  Strided array;
  int64_t token_stride = heads * dim, head_stride = dim;
  switch (random.integer(0, 3)) {
    case 0:
      break;
    case 1:
      head_stride = dim + random.integer(0, 5);
      token_stride = heads * head_stride + random.integer(0, 5);
      break;
    case 2:
      token_stride = dim + random.integer(0, 5);
      head_stride = std::max<int64_t>(tokens, 1) * token_stride;
      break;
    case 3:  // K and V of a fused projection: the other one lies between
      token_stride = 3 * heads * dim;
      break;
  }
  if (head_stride != dim || token_stride != heads * dim || random.chance(0.5)) {
    array.token_stride = token_stride;
    array.head_stride = head_stride;
  }
  const int64_t element = oracle::type_bytes(type);
  const int64_t extent = tokens ? (tokens - 1) * token_stride + (heads - 1) * head_stride + dim : 0;
  array.bytes.assign(size_t(extent * element), 0xff);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t c = 0; c < dim; ++c) {
        oracle::write_element(array.bytes.data(), type, t * token_stride + h * head_stride + c,
                              values[size_t((t * heads + h) * dim + c)]);
      }
    }
  }
  return array;
}

double rounded(double value, int32_t type) {
  uint8_t bytes[4];
  oracle::write_element(bytes, type, 0, value);
  return oracle::read_element(bytes, type, 0);
}

void run_backwards(void *, int64_t count, void (*body)(void *, int64_t), void *context) {
  for (int64_t i = count; i > 0; --i) body(context, i - 1);
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Where sequences live: the engine's pools, or those they are swapped to.
struct Space {
  Allocator coded, exact;
  std::vector<std::unique_ptr<Pool>> coded_pools, exact_pools;  // by layer
};

struct Sequence {
  int32_t start = 0;             // left padding
  std::vector<TokenPtr> tokens;  // by position, NULL before the start; those past `stored` wait for prefill
  int32_t stored = 0;            // positions in pages, padding included
  std::vector<int32_t> blocks;   // coded, or kAbsent
  std::vector<int32_t> first;    // exact blocks of the first tokens; kAbsent: such keys are read coded
  std::vector<int32_t> ring;     // exact blocks of the recent tokens
  int64_t ring_from = 0;         // first column in the ring
  bool swapped = false;

  int32_t pending() const { return int32_t(tokens.size()) - stored; }
};

struct Row {
  Sequence *sequence;  // NULL: padding
  int32_t q_len;
  bool drafted;
};

// One token of a store, and how it is spoilt.
struct StoreItem {
  const Token *token = nullptr;  // NULL: padding
  int64_t slot = -1, exact_slot = -1;
  int64_t passed_slot = -1, passed_exact_slot = -1;
  int spoilt_side = -1, spoilt_head = 0;
  int32_t fault = -1;
};

// What a call must report: each fault once, `first` the lowest index.
struct ExpectedFaults {
  uint64_t count[TQ_FAULT_KINDS] = {};
  int64_t lowest = -1;
  int32_t lowest_kind = 0;

  void add(int64_t index, int32_t kind) {
    ++count[kind];
    if (lowest < 0 || index < lowest) {
      lowest = index;
      lowest_kind = kind;
    }
  }
  bool met_by(const tq_faults &faults) const {
    if (!std::equal(count, count + TQ_FAULT_KINDS, faults.count)) return false;
    if (lowest < 0) return faults.first == 0;
    return TQ_FAULT_FIRST_INDEX(faults.first) == lowest && TQ_FAULT_FIRST_KIND(faults.first) == lowest_kind;
  }
};
std::string text_of(const tq_faults &faults, const ExpectedFaults &expected) {
  std::ostringstream text;
  const auto list = [&](const uint64_t *counts) {
    for (int kind = 0; kind < TQ_FAULT_KINDS; ++kind) text << " " << counts[kind];
  };
  text << "counts";
  list(faults.count);
  if (faults.first) {
    text << ", first kind " << TQ_FAULT_FIRST_KIND(faults.first) << " at " << TQ_FAULT_FIRST_INDEX(faults.first);
  }
  text << " instead of";
  list(expected.count);
  if (expected.lowest >= 0) text << ", first kind " << expected.lowest_kind << " at " << expected.lowest;
  return text.str();
}

class Engine {
 public:
  Engine(const Options &options, Events *events);
  void step();
  const std::string &description() const { return description_; }

 private:
  [[noreturn]] void fail(const std::string &what) const { throw Failure(what); }
  void expect(bool condition, const std::string &what) const {
    if (!condition) fail(what);
  }
  void expect_ok(tq_status status, const char *call) const {
    if (status != TQ_OK) fail(std::string(call) + ": " + tq_status_string(status) + ": " + tq_last_error());
  }
  void count(const char *event, int64_t times = 1) { (*events_)[event] += times; }
  bool mistaken(Mistake mistake) const { return options_.mistake == mistake; }

  void draw_configuration();
  void draw_model();
  Space make_space(int64_t num_blocks, int64_t num_exact_blocks);
  std::vector<TokenPtr> make_tokens(int64_t count);

  int64_t block_size() const { return codec_view_->block_size; }
  int64_t exact_block_size() const { return codec_view_->exact_block_size; }
  int64_t ring_blocks() const;
  bool in_first_columns(const Sequence &sequence, int64_t column) const;
  int64_t first_columns(const Sequence &sequence) const;
  int32_t exact_entry(const Sequence &sequence, int64_t column) const;
  int64_t slot_of(const Sequence &sequence, int32_t position) const;
  int64_t exact_slot_of(const Sequence &sequence, int32_t position) const;

  // Block lists.
  using Pairs = std::vector<int64_t>;
  Space &space_of(const Sequence &sequence) { return sequence.swapped ? swap_ : main_; }
  void release_coded(Space &space, int32_t block);
  void release_exact(Space &space, int32_t block);
  void release_all(Sequence &sequence);
  void release_slack(Sequence &sequence);
  void leave_window(Sequence &sequence);
  void prepare_writes(Sequence &sequence, int32_t from, int32_t to, Pairs *pairs, Pairs *exact_pairs);
  bool make_room(int64_t blocks, int64_t exact_blocks, const std::vector<const Sequence *> &keep);
  Sequence *any(bool swapped);
  std::vector<Sequence *> active();
  void erase(const Sequence *sequence);

  // What the scheduler does. False: not possible now.
  bool admit();
  bool forward();
  bool fork();
  bool permute_beams();
  bool hit_prefix();
  bool preempt(Sequence *sequence);
  bool swap_out(Sequence *sequence);
  bool swap_in(Sequence *sequence);
  bool finish(Sequence *sequence);
  bool check_load(const Sequence &sequence);
  bool spoilt_copy();
  std::unique_ptr<Sequence> forked(Sequence &parent, Pairs *pairs, Pairs *exact_pairs);
  bool move(Sequence &sequence, Space &from, Space &to);

  // Calls of the library.
  template <class Args>
  tq_status call_library(tq_status (*function)(const tq_codec *, const Args *), Args *args) {
    return target_.device->call([&](void *stream) {
      args->stream = stream;
      return function(codec_.get(), args);
    });
  }
  Truth truth_of(const AttentionCall &call, const std::vector<QuerySequence> &sequences, const std::vector<double> &q,
                 size_t layer) const {
    const bool integer_queries = target_.device->kind() == TQ_DEVICE_CUDA;
    return simulator::attend(call, *codec_view_, sequences, q, int(layer), integer_queries);
  }
  void copy(Space &source, Space &destination, const Pairs &pairs, const Pairs &exact_pairs,
            ExpectedFaults expected = {});
  void store(std::vector<StoreItem> items);
  void store_layer(size_t layer, const std::vector<StoreItem> &items);
  void attend(const std::vector<Row> &rows, bool use_new, size_t layer);
  void compare(const AttentionCall &call, const AttentionRun &run, const Truth &truth, const char *what) const;
  void merge_parts(const AttentionCall &call, const std::vector<QuerySequence> &sequences, const std::vector<double> &q,
                   size_t layer, const Truth &whole);
  void repeat_alone(const AttentionCall &call, const std::vector<QuerySequence> &sequences, const AttentionRun &run);
  AttentionCall with_mistake(AttentionCall call, const std::vector<QuerySequence> &sequences) const;
  void verify_pools(Space &space, size_t layer, const char *after);

  const Options options_;
  Events *const events_;
  Random random_;
  const Target target_;
  ConfigStorage storage_;
  tq_config config_{};
  CodecPtr codec_;
  tq_codec_info info_{};
  std::unique_ptr<oracle::Codec> codec_view_;
  std::string description_;

  // The model.
  int layers_ = 1, q_heads_ = 1;
  int32_t type_ = TQ_TYPE_F32;  // of activations
  float scale_ = 0, soft_cap_ = 0;
  bool causal_ = true, left_padding_ = false;
  int32_t window_ = 0, exact_first_ = 0, exact_recent_ = 0, max_call_ = 0, max_length_ = 0;
  std::vector<float> sinks_, slopes_;
  std::vector<std::vector<float>> key_offset_;  // by layer, may be empty
  std::vector<uint8_t> zero_record_[2];         // of a vector of zeros, K and V

  Space main_{{0, false}, {0, false}, {}, {}}, swap_{{0, false}, {0, false}, {}, {}};
  std::vector<std::unique_ptr<Sequence>> sequences_;
};

// --------------------------------------------------------------------------------------------------- the model --

Engine::Engine(const Options &options, Events *events)
    : options_(options),
      events_(events),
      random_(("engine " + std::to_string(options.configuration)).c_str()),
      target_(options.target) {
  draw_configuration();
  draw_model();
}

void Engine::draw_configuration() {
  const bool cpu = target_.device->kind() == TQ_DEVICE_CPU;
  ConfigLimits limits;
  limits.max_head_dim = 128;
  // Elsewhere a matrix product's sums may be ordered by the number of vectors, and bytes are not predictable.
  limits.allow_matrices = cpu;
  limits.attends = true;
  config_ = random_config(random_, target_, &storage_, limits);
  if (!cpu && random_.chance(0.4)) {  // among them what kernels are specialised for
    config_ = make_config(target_, 128, 0, 0);
    for (tq_side_config *side : {&config_.k, &config_.v}) {
      side->bits = random_.pick({2, 3, 4, 4});
      side->codebook = side->bits == 2 ? TQ_CODEBOOK_UNIFORM : TQ_CODEBOOK_DEFAULT;
    }
  }
  config_.kv_heads = random_.pick({1, 2, 2, 3});
  if (!cpu && random_.chance(0.15)) config_.kv_heads = random_.pick({5, 9, 10});  // 9 and 10: in packs of 3 and 5
  config_.block_size_tokens = random_.pick({1, 8, 16, 64});
  config_.exact_block_size_tokens = random_.pick({1, 8, 16, 64});
  if (cpu && random_.chance(0.15)) {
    config_.threads = 0;
    config_.parallel_for = run_backwards;
  }
  codec_ = make_codec(config_);
  info_ = info_of(codec_.get());
  codec_view_ = std::make_unique<oracle::Codec>(config_, info_);
}

void Engine::draw_model() {
  Random &r = random_;
  const int64_t kv_heads = codec_view_->kv_heads, dk = codec_view_->k.head_dim;
  layers_ = r.chance(0.25) ? 2 : 1;
  q_heads_ = int(kv_heads) * (kv_heads == 1 && r.chance(0.2) ? int(r.integer(5, 40)) : r.pick({1, 1, 2, 3, 4}));
  type_ = r.pick({TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16});
  if (r.chance(0.3)) scale_ = float(r.uniform(0.5, 1.2) / std::sqrt(double(dk)));
  if (r.chance(0.25)) soft_cap_ = float(r.uniform(2, 20));
  causal_ = r.chance(0.85);
  left_padding_ = r.chance(0.25);
  if (r.chance(0.35)) window_ = int32_t(r.integer(1, 60));
  if (r.chance(0.4)) exact_first_ = int32_t(r.integer(1, 20));
  if (r.chance(0.4)) exact_recent_ = int32_t(r.integer(1, 40));
  max_call_ = int32_t(r.integer(kMaxDrafts + 1, 32));
  max_length_ = int32_t(r.integer(60, 160));
  if (r.chance(0.04)) {  // contexts that are split unasked
    max_call_ = int32_t(r.integer(100, 400));
    max_length_ = int32_t(r.integer(1100, 1600));
    q_heads_ = int(kv_heads);
  }
  if (r.chance(0.3)) {
    for (int h = 0; h < q_heads_; ++h) sinks_.push_back(float(2 * r.normal()));
  }
  if (r.chance(0.25)) {
    for (int h = 0; h < q_heads_; ++h) slopes_.push_back(std::ldexp(1.0f, -1 - h));
  }
  for (int layer = 0; layer < layers_; ++layer) {
    std::vector<float> offset;
    if (r.chance(0.5)) {
      for (int64_t i = 0; i < kv_heads * dk; ++i) offset.push_back(float(r.normal() * (r.chance(0.1) ? 3 : 0.3)));
    }
    key_offset_.push_back(offset);
  }
  const auto zero = [&](int32_t side, int head_dim) {
    const Encoded encoded =
        encode(target_, codec_.get(), side, std::vector<uint8_t>(size_t(head_dim) * 4, 0), TQ_TYPE_F32);
    zero_record_[side] = encoded.codes;
    zero_record_[side].insert(zero_record_[side].end(), encoded.scales.begin(), encoded.scales.end());
  };
  zero(TQ_SIDE_K, codec_view_->k.head_dim);
  zero(TQ_SIDE_V, codec_view_->v.head_dim);

  const int64_t tokens = 3 * max_length_;
  const int64_t exact_per_sequence =
      exact_first_ + exact_recent_ == 0 ? 0 : ring_blocks() + ceil_div(exact_first_, exact_block_size()) + 1;
  main_ = make_space(tokens / block_size() + 12, 8 * exact_per_sequence);
  swap_ = make_space(tokens / block_size() / 2 + 8, 3 * exact_per_sequence);

  std::ostringstream text;
  text << target_.name << "; " << describe(config_) << "; layers " << layers_ << " q_heads " << q_heads_ << " type "
       << type_ << " scale " << scale_ << " soft cap " << soft_cap_ << " causal " << causal_ << " left padding "
       << left_padding_ << " window " << window_ << " exact first " << exact_first_ << " recent " << exact_recent_
       << " sinks " << !sinks_.empty() << " slopes " << !slopes_.empty() << " tokens a call " << max_call_;
  for (const std::vector<float> &offset : key_offset_) text << " key offset " << !offset.empty();
  description_ = text.str();
}

Space Engine::make_space(int64_t num_blocks, int64_t num_exact_blocks) {
  const bool lowest_first = random_.chance(0.5);
  Space space{Allocator(num_blocks, lowest_first), Allocator(num_exact_blocks, lowest_first), {}, {}};
  for (int layer = 0; layer < layers_; ++layer) {
    space.coded_pools.push_back(
        std::make_unique<Pool>(random_, *target_.device, *codec_view_, info_.page_fingerprint, false, num_blocks));
    if (num_exact_blocks == 0) continue;
    space.exact_pools.push_back(std::make_unique<Pool>(random_, *target_.device, *codec_view_, info_.exact_fingerprint,
                                                       true, num_exact_blocks));
  }
  return space;
}

std::vector<TokenPtr> Engine::make_tokens(int64_t number) {
  std::vector<std::shared_ptr<Token>> tokens;
  for (int64_t t = 0; t < number; ++t) tokens.push_back(std::make_shared<Token>());
  const size_t heads = size_t(codec_view_->kv_heads);
  for (int layer = 0; number > 0 && layer < layers_; ++layer) {
    const std::vector<float> &offset = key_offset_[size_t(layer)];
    for (int32_t which : {TQ_SIDE_K, TQ_SIDE_V}) {
      const oracle::Side &side = codec_view_->side(false, which);
      const size_t dim = size_t(side.head_dim), elems = heads * dim;
      std::vector<double> given, to_code;
      for (int64_t t = 0; t < number; ++t) {
        const double magnitude = random_.uniform(0.5, 2);
        for (size_t i = 0; i < elems; ++i) {
          const float mean = which == TQ_SIDE_K && !offset.empty() ? offset[i] : 0;
          given.push_back(rounded(double(mean) + magnitude * random_.normal(), type_));
          to_code.push_back(double(float(given.back()) - mean));
        }
      }
      const int64_t vectors = number * int64_t(heads);
      const Encoded encoded = encode(target_, codec_.get(), which, encode_elements(to_code, TQ_TYPE_F32), TQ_TYPE_F32);
      expect(encoded.faults.first == 0, "tq_encode of sound vectors: " + text_of(encoded.faults, {}));
      const std::vector<double> decoded = decode(target_, codec_.get(), which, encoded, vectors);
      const size_t code_bytes = size_t(side.code_bytes()), scale_bytes = size_t(side.scale_bytes());
      for (int64_t t = 0; t < number; ++t) {
        tokens[size_t(t)]->layers.resize(size_t(layers_));
        LayerToken &token = tokens[size_t(t)]->layers[size_t(layer)];
        token.coded_record.resize(heads);
        token.raw_record.resize(heads);
        auto &given_here = which == TQ_SIDE_K ? token.given_k : token.given_v;
        auto &coded_here = which == TQ_SIDE_K ? token.coded_k : token.coded_v;
        auto &raw_here = which == TQ_SIDE_K ? token.raw_k : token.raw_v;
        for (size_t i = 0; i < elems; ++i) {
          const size_t at = size_t(t) * elems + i;
          given_here.push_back(given[at]);
          raw_here.push_back(rounded(given[at], info_.raw_type));
          if (which == TQ_SIDE_K && !offset.empty()) {
            coded_here.push_back(decoded[at] + double(offset[i]));
            token.loaded_k.push_back(double(float(decoded[at]) + offset[i]));
          } else {
            coded_here.push_back(decoded[at]);
            if (which == TQ_SIDE_K) token.loaded_k.push_back(decoded[at]);
          }
        }
        for (size_t h = 0; h < heads; ++h) {
          const size_t vector = size_t(t) * heads + h;
          if (which == TQ_SIDE_K) {
            const auto key = decoded.begin() + std::ptrdiff_t(vector * dim);
            token.coded_norm.push_back(oracle::norm({key, key + std::ptrdiff_t(dim)}));
          }
          const auto codes = encoded.codes.begin() + std::ptrdiff_t(vector * code_bytes);
          const auto scales = encoded.scales.begin() + std::ptrdiff_t(vector * scale_bytes);
          std::vector<uint8_t> &record = token.coded_record[h];
          record.insert(record.end(), codes, codes + std::ptrdiff_t(code_bytes));
          record.insert(record.end(), scales, scales + std::ptrdiff_t(scale_bytes));
          const std::vector<double> raw(raw_here.begin() + std::ptrdiff_t(h * dim),
                                        raw_here.begin() + std::ptrdiff_t((h + 1) * dim));
          const std::vector<uint8_t> raw_bytes = encode_elements(raw, info_.raw_type);
          token.raw_record[h].insert(token.raw_record[h].end(), raw_bytes.begin(), raw_bytes.end());
        }
      }
    }
  }
  return {tokens.begin(), tokens.end()};
}

// ------------------------------------------------------------------------------------------------- block lists --

int64_t Engine::ring_blocks() const {
  if (exact_recent_ == 0) return 0;
  const int64_t blocks = ceil_div(exact_recent_ + max_call_, exact_block_size());
  return mistaken(Mistake::kRingTooShort) ? std::max<int64_t>(ceil_div(max_call_, exact_block_size()), blocks - 2)
                                          : blocks;
}

int64_t Engine::first_columns(const Sequence &sequence) const {
  if (exact_first_ == 0) return 0;
  return (sequence.start + exact_first_ - 1) / exact_block_size() - sequence.start / exact_block_size() + 1;
}

bool Engine::in_first_columns(const Sequence &sequence, int64_t column) const {
  const int64_t index = column - sequence.start / exact_block_size();
  return index >= 0 && index < first_columns(sequence);
}

int32_t Engine::exact_entry(const Sequence &sequence, int64_t column) const {
  if (in_first_columns(sequence, column)) {
    return std::max(kAbsent, sequence.first[size_t(column - sequence.start / exact_block_size())]);
  }
  if (sequence.ring.empty() || column < sequence.ring_from) return kAbsent;
  return sequence.ring[size_t(column) % sequence.ring.size()];
}

int64_t Engine::slot_of(const Sequence &sequence, int32_t position) const {
  return sequence.blocks[size_t(position / block_size())] * block_size() + position % block_size();
}

int64_t Engine::exact_slot_of(const Sequence &sequence, int32_t position) const {
  const int32_t entry = exact_entry(sequence, position / exact_block_size());
  return entry < 0 ? -1 : entry * exact_block_size() + position % exact_block_size();
}

void Engine::release_coded(Space &space, int32_t block) {
  if (block < 0 || !space.coded.release(block)) return;
  for (const auto &pool : space.coded_pools) pool->poison(random_, block);
}

void Engine::release_exact(Space &space, int32_t block) {
  if (block < 0 || !space.exact.release(block)) return;
  for (const auto &pool : space.exact_pools) pool->poison(random_, block);
}

void Engine::release_all(Sequence &sequence) {
  Space &space = space_of(sequence);
  for (int32_t block : sequence.blocks) release_coded(space, block);
  for (int32_t block : sequence.first) release_exact(space, block);
  for (int32_t block : sequence.ring) release_exact(space, block);
  sequence.blocks.clear();
  sequence.ring.clear();
  sequence.first.assign(size_t(first_columns(sequence)), kUnset);
}

// Gives up the blocks past the stored tokens, which rejected drafts leave behind.
void Engine::release_slack(Sequence &sequence) {
  Space &space = space_of(sequence);
  for (size_t b = size_t(ceil_div(sequence.stored, block_size())); b < sequence.blocks.size(); ++b) {
    release_coded(space, sequence.blocks[b]);
  }
  sequence.blocks.resize(std::min(sequence.blocks.size(), size_t(ceil_div(sequence.stored, block_size()))));
  const int64_t used = ceil_div(sequence.stored, exact_block_size()) - sequence.start / exact_block_size();
  for (size_t i = size_t(std::max<int64_t>(used, 0)); i < sequence.first.size(); ++i) {
    if (sequence.first[i] < 0) continue;
    release_exact(space, sequence.first[i]);
    sequence.first[i] = kUnset;
  }
}

// Frees blocks that no query from position `stored` on can see.
void Engine::leave_window(Sequence &sequence) {
  if (window_ == 0) return;
  const int32_t last_invisible = sequence.stored - window_ + (mistaken(Mistake::kFreedTooEarly) ? 1 : 0);
  for (int64_t b = 0; b < int64_t(sequence.blocks.size()) && (b + 1) * block_size() - 1 <= last_invisible; ++b) {
    if (sequence.blocks[size_t(b)] < 0) continue;
    release_coded(main_, sequence.blocks[size_t(b)]);
    sequence.blocks[size_t(b)] = kAbsent;
    count("block left the window");
  }
}

// Makes the blocks of positions [from, to) writable: allocated, and not shared.
void Engine::prepare_writes(Sequence &sequence, int32_t from, int32_t to, Pairs *pairs, Pairs *exact_pairs) {
  if (from >= to) return;
  const bool may_share = mistaken(Mistake::kNoCopyOnWrite);
  for (int64_t b = from / block_size(); b <= (to - 1) / block_size(); ++b) {
    if (b >= int64_t(sequence.blocks.size())) sequence.blocks.resize(size_t(b + 1), kAbsent);
    int32_t &block = sequence.blocks[size_t(b)];
    if (block >= 0 && (!main_.coded.shared(block) || may_share)) continue;
    const int32_t fresh = main_.coded.allocate(random_);
    if (block >= 0) {
      pairs->insert(pairs->end(), {block, fresh});
      release_coded(main_, block);
      count("copy on write");
    }
    block = fresh;
  }
  if (main_.exact_pools.empty()) return;
  for (int64_t c = from / exact_block_size(); c <= (to - 1) / exact_block_size(); ++c) {
    if (in_first_columns(sequence, c)) {
      int32_t &block = sequence.first[size_t(c - sequence.start / exact_block_size())];
      if (block == kAbsent || (block >= 0 && (!main_.exact.shared(block) || may_share))) continue;
      const int32_t fresh = main_.exact.allocate(random_);
      if (block >= 0) {
        exact_pairs->insert(exact_pairs->end(), {block, fresh});
        release_exact(main_, block);
        count("exact copy on write");
      }
      block = fresh;
    } else if (exact_recent_ > 0 && c >= sequence.ring_from) {
      while (int64_t(sequence.ring.size()) < ring_blocks()) sequence.ring.push_back(main_.exact.allocate(random_));
    }
  }
}

// Preempts, swaps out or ends other sequences until this much is free.
bool Engine::make_room(int64_t blocks, int64_t exact_blocks, const std::vector<const Sequence *> &keep) {
  while (main_.coded.available() < blocks || main_.exact.available() < exact_blocks) {
    std::vector<Sequence *> victims;
    for (Sequence *sequence : active()) {
      if (std::find(keep.begin(), keep.end(), sequence) == keep.end() && sequence->stored > sequence->start) {
        victims.push_back(sequence);
      }
    }
    if (victims.empty()) return false;
    Sequence *victim = random_.pick(victims);
    if (!random_.chance(0.5) || !swap_out(victim)) preempt(victim);
  }
  return true;
}

std::vector<Sequence *> Engine::active() {
  std::vector<Sequence *> found;
  for (const auto &sequence : sequences_) {
    if (!sequence->swapped) found.push_back(sequence.get());
  }
  std::shuffle(found.begin(), found.end(), random_.engine());
  return found;
}

Sequence *Engine::any(bool swapped) {
  std::vector<Sequence *> found;
  for (const auto &sequence : sequences_) {
    if (sequence->swapped == swapped) found.push_back(sequence.get());
  }
  return found.empty() ? nullptr : random_.pick(found);
}

void Engine::erase(const Sequence *sequence) {
  std::erase_if(sequences_, [&](const auto &other) { return other.get() == sequence; });
}

// ------------------------------------------------------------------------------------------------ the scheduler --

void Engine::step() {
  const int64_t choice = random_.integer(0, 99);
  if (sequences_.size() < 2 || (choice < 10 && sequences_.size() < 8)) {
    admit();
  } else if (choice < 62) {
    forward();
  } else if (choice < 68) {
    fork();
  } else if (choice < 72) {
    permute_beams();
  } else if (choice < 78) {
    hit_prefix();
  } else if (choice < 80) {
    preempt(any(false));
  } else if (choice < 84) {
    swap_out(any(false));
  } else if (choice < 90) {
    swap_in(any(true));
  } else if (choice < 92) {
    finish(sequences_[size_t(random_.integer(0, int64_t(sequences_.size()) - 1))].get());
  } else if (choice < 97) {
    if (Sequence *sequence = any(false)) check_load(*sequence);
  } else {
    spoilt_copy();
  }
}

bool Engine::admit() {
  auto sequence = std::make_unique<Sequence>();
  if (left_padding_) sequence->start = int32_t(random_.integer(0, 20));
  sequence->stored = sequence->start;
  sequence->ring_from = sequence->start / exact_block_size();
  sequence->first.assign(size_t(first_columns(*sequence)), kUnset);
  sequence->tokens.resize(size_t(sequence->start));
  for (TokenPtr &token : make_tokens(random_.integer(1, max_length_ - kMaxDrafts))) sequence->tokens.push_back(token);
  sequences_.push_back(std::move(sequence));
  count("admit");
  return true;
}

bool Engine::forward() {
  std::vector<Row> rows;
  int64_t budget = random_.integer(5, std::max(48, max_call_)), fresh = 0;
  const size_t most = size_t(random_.integer(1, 5));
  for (Sequence *sequence : active()) {
    if (rows.size() == most || budget <= 0) break;
    Row row{sequence, 0, false};
    if (random_.chance(0.06)) {
      count("idle sequence in a batch");
    } else if (sequence->pending() > 0) {
      row.q_len = int32_t(random_.integer(1, std::min<int64_t>({sequence->pending(), max_call_, budget})));
      count("prefill");
    } else if (int64_t(sequence->tokens.size()) + kMaxDrafts + 1 > max_length_) {
      finish(sequence);
      continue;
    } else {
      row.drafted = random_.chance(0.35);
      row.q_len = row.drafted ? int32_t(random_.integer(2, kMaxDrafts + 1)) : 1;
      fresh += row.q_len;
      count(row.drafted ? "speculate" : "decode");
    }
    budget -= row.q_len;
    rows.push_back(row);
  }
  if (rows.empty()) return false;
  std::vector<TokenPtr> tokens = make_tokens(fresh);
  for (const Row &row : rows) {
    for (int32_t i = row.sequence->pending(); i < row.q_len; ++i) {
      row.sequence->tokens.push_back(tokens.back());
      tokens.pop_back();
    }
  }

  int64_t blocks = 0, exact_blocks = 0;
  std::vector<const Sequence *> keep;
  for (const Row &row : rows) {
    blocks += row.q_len / block_size() + 2;
    exact_blocks += main_.exact_pools.empty() ? 0 : row.q_len / exact_block_size() + 2 + ring_blocks();
    keep.push_back(row.sequence);
  }
  if (!make_room(blocks, exact_blocks, keep)) {  // what was to be decoded is prefilled later
    count("no room");
    if (rows.size() > 1) return false;
    return preempt(rows[0].sequence);
  }
  Pairs pairs, exact_pairs;
  for (const Row &row : rows) {
    prepare_writes(*row.sequence, row.sequence->stored, row.sequence->stored + row.q_len, &pairs, &exact_pairs);
  }
  if (!pairs.empty() || !exact_pairs.empty()) copy(main_, main_, pairs, exact_pairs);

  while (random_.chance(0.25)) {
    const Row padding{nullptr, int32_t(random_.integer(0, 2) == 0 ? 0 : 1), false};
    rows.insert(rows.begin() + random_.integer(0, int64_t(rows.size())), padding);
    count("padding row");
  }
  std::vector<StoreItem> items;
  for (const Row &row : rows) {
    for (int32_t i = 0; i < row.q_len; ++i) {
      StoreItem item;
      if (row.sequence) {
        const int32_t position = row.sequence->stored + i;
        item.token = row.sequence->tokens[size_t(position)].get();
        item.slot = slot_of(*row.sequence, position);
        item.exact_slot = exact_slot_of(*row.sequence, position);
      }
      items.push_back(item);
    }
  }
  const bool use_new = random_.chance(0.4);
  const bool store_first = !use_new || random_.chance(0.4);
  if (store_first) store(items);
  for (int layer = 0; layer < layers_; ++layer) attend(rows, use_new, size_t(layer));
  if (!store_first) store(items);

  for (const Row &row : rows) {
    if (!row.sequence) continue;
    Sequence &sequence = *row.sequence;
    sequence.stored += row.q_len;
    if (row.drafted) {
      const int32_t rejected = int32_t(random_.integer(0, row.q_len - 1));
      sequence.stored -= rejected;
      sequence.tokens.resize(size_t(sequence.stored));
      if (rejected > 0) count("rollback");
    }
    if (random_.chance(0.5)) release_slack(sequence);
    if (random_.chance(0.7)) leave_window(sequence);
  }
  count("forward");
  return true;
}

// A copy that shares every block but the ring, which the child must own.
std::unique_ptr<Sequence> Engine::forked(Sequence &parent, Pairs *pairs, Pairs *exact_pairs) {
  auto child = std::make_unique<Sequence>(parent);
  child->blocks.resize(std::min(child->blocks.size(), size_t(ceil_div(parent.stored, block_size()))));
  for (int32_t block : child->blocks) {
    if (block >= 0) main_.coded.share(block);
  }
  const int64_t used = ceil_div(parent.stored, exact_block_size()) - parent.start / exact_block_size();
  for (size_t i = 0; i < child->first.size(); ++i) {
    if (child->first[i] < 0) continue;
    if (int64_t(i) < used) {
      main_.exact.share(child->first[i]);
    } else {
      child->first[i] = kUnset;
    }
  }
  for (int32_t &block : child->ring) {
    const int32_t own = main_.exact.allocate(random_);
    exact_pairs->insert(exact_pairs->end(), {block, own});
    block = own;
  }
  // Copying the partial last block at once is as good as copying it when it is written.
  if (parent.stored > parent.start && parent.stored % block_size() != 0 && random_.chance(0.4) &&
      main_.coded.available() > 0 && !mistaken(Mistake::kNoCopyOnWrite)) {
    int32_t &last = child->blocks.back();
    const int32_t own = main_.coded.allocate(random_);
    pairs->insert(pairs->end(), {last, own});
    release_coded(main_, last);
    last = own;
  }
  return child;
}

bool Engine::fork() {
  Sequence *parent = any(false);
  if (!parent || sequences_.size() >= 8) return false;
  const int64_t children = random_.integer(1, 2);
  if (!make_room(children, children * ring_blocks(), {parent})) return false;
  Pairs pairs, exact_pairs;
  for (int64_t i = 0; i < children; ++i) sequences_.push_back(forked(*parent, &pairs, &exact_pairs));
  if (!pairs.empty() || !exact_pairs.empty()) copy(main_, main_, pairs, exact_pairs);
  count("fork", children);
  return true;
}

// Each beam continues a randomly chosen one; those nobody continues are dropped.
bool Engine::permute_beams() {
  std::vector<Sequence *> beams = active();
  if (beams.size() < 2) return false;
  beams.resize(size_t(random_.integer(2, std::min<int64_t>(int64_t(beams.size()), 4))));
  if (!make_room(int64_t(beams.size()), int64_t(beams.size()) * ring_blocks(), {beams.begin(), beams.end()}))
    return false;
  Pairs pairs, exact_pairs;
  std::vector<std::unique_ptr<Sequence>> next;
  for (size_t i = 0; i < beams.size(); ++i) next.push_back(forked(*random_.pick(beams), &pairs, &exact_pairs));
  if (!pairs.empty() || !exact_pairs.empty()) copy(main_, main_, pairs, exact_pairs);
  for (size_t i = 0; i < beams.size(); ++i) {
    release_all(*beams[i]);
    *beams[i] = *next[i];
  }
  count("beam permutation");
  return true;
}

// A new sequence begins with whole blocks of another one.
bool Engine::hit_prefix() {
  Sequence *donor = any(false);
  if (!donor || sequences_.size() >= 8) return false;
  const int64_t whole = donor->stored / block_size();
  if (whole == 0) return false;
  const int32_t shared = int32_t(random_.integer(1, whole) * block_size());
  if (shared <= donor->start) return false;
  for (int32_t j = std::max(donor->start, window_ ? shared - window_ + 1 : 0); j < shared; ++j) {
    if (donor->blocks[size_t(j / block_size())] == kAbsent) return false;  // fallen out of the window
  }
  const int64_t base = donor->start / exact_block_size();
  if (!make_room(0, first_columns(*donor) + ring_blocks(), {donor})) return false;

  auto sequence = std::make_unique<Sequence>();
  sequence->start = donor->start;
  sequence->stored = shared;
  sequence->tokens.assign(donor->tokens.begin(), donor->tokens.begin() + shared);
  for (TokenPtr &token : make_tokens(random_.integer(1, 12))) sequence->tokens.push_back(token);
  sequence->blocks.assign(donor->blocks.begin(), donor->blocks.begin() + shared / block_size());
  for (int32_t block : sequence->blocks) {
    if (block >= 0) main_.coded.share(block);
  }
  // Exact blocks are shared where whole. The others are written anew from the tokens, which leaves the codes alone, or
  // given up, so that their keys are read coded.
  const bool refill = random_.chance(0.5);
  std::vector<int32_t> refilled;
  sequence->first.assign(size_t(first_columns(*donor)), kUnset);
  for (size_t i = 0; i < sequence->first.size(); ++i) {
    const int64_t begin = std::max<int64_t>((base + int64_t(i)) * exact_block_size(), donor->start);
    const int64_t end = (base + int64_t(i) + 1) * exact_block_size();
    if (begin >= shared) break;
    if (end <= shared && donor->first[i] >= 0) {
      main_.exact.share(donor->first[i]);
      sequence->first[i] = donor->first[i];
    } else if (refill) {
      sequence->first[i] = main_.exact.allocate(random_);
      for (int64_t j = begin; j < std::min<int64_t>(end, shared); ++j) refilled.push_back(int32_t(j));
    } else {
      sequence->first[i] = kAbsent;
    }
  }
  sequence->ring_from = ceil_div(shared, exact_block_size());
  if (exact_recent_ > 0 && refill) {
    const int32_t oldest = shared - exact_recent_;
    sequence->ring_from = oldest <= donor->start ? base : ceil_div(oldest, exact_block_size());
    while (int64_t(sequence->ring.size()) < ring_blocks()) sequence->ring.push_back(main_.exact.allocate(random_));
    const int64_t from = std::max<int64_t>(sequence->ring_from * exact_block_size(), donor->start);
    for (int64_t j = from; j < shared; ++j) {
      if (!in_first_columns(*sequence, j / exact_block_size())) refilled.push_back(int32_t(j));
    }
  }
  std::vector<StoreItem> items;
  for (int32_t j : refilled) {
    StoreItem item;
    item.token = sequence->tokens[size_t(j)].get();
    item.exact_slot = exact_slot_of(*sequence, j);
    items.push_back(item);
  }
  if (!items.empty()) {
    store(items);
    count("exact refill");
  }
  sequences_.push_back(std::move(sequence));
  count("prefix hit");
  return true;
}

// Drops the blocks; the tokens are computed again later.
bool Engine::preempt(Sequence *sequence) {
  if (!sequence || sequence->stored == sequence->start) return false;
  release_all(*sequence);
  sequence->stored = sequence->start;
  sequence->ring_from = sequence->start / exact_block_size();
  count("preempt");
  return true;
}

bool Engine::finish(Sequence *sequence) {
  release_all(*sequence);
  erase(sequence);
  count("finish");
  return true;
}

// Copies a sequence's blocks to pools of other strides and gives its own up.
bool Engine::move(Sequence &sequence, Space &from, Space &to) {
  release_slack(sequence);
  const auto present = [](const std::vector<int32_t> &blocks) {
    return std::count_if(blocks.begin(), blocks.end(), [](int32_t block) { return block >= 0; });
  };
  if (present(sequence.blocks) > to.coded.available() ||
      present(sequence.first) + present(sequence.ring) > to.exact.available()) {
    return false;
  }
  Pairs pairs, exact_pairs;
  Sequence moved = sequence;
  const auto relocate = [&](std::vector<int32_t> *blocks, Allocator *allocator, Pairs *list) {
    for (int32_t &block : *blocks) {
      if (block < 0) continue;
      const int32_t copied = allocator->allocate(random_);
      list->insert(list->end(), {block, copied});
      block = copied;
    }
  };
  relocate(&moved.blocks, &to.coded, &pairs);
  relocate(&moved.first, &to.exact, &exact_pairs);
  relocate(&moved.ring, &to.exact, &exact_pairs);
  if (mistaken(Mistake::kBlockNotSwapped) && pairs.size() >= 2) pairs.resize(pairs.size() - 2);
  if (!pairs.empty() || !exact_pairs.empty()) copy(from, to, pairs, exact_pairs);
  release_all(sequence);
  sequence = std::move(moved);
  return true;
}

bool Engine::swap_out(Sequence *sequence) {
  if (!sequence || sequence->stored == sequence->start || !move(*sequence, main_, swap_)) return false;
  sequence->swapped = true;
  count("swap out");
  return true;
}

bool Engine::swap_in(Sequence *sequence) {
  if (!sequence) return false;
  const int64_t exact = int64_t(sequence->first.size() + sequence->ring.size());
  if (!make_room(int64_t(sequence->blocks.size()), main_.exact_pools.empty() ? 0 : exact, {})) return false;
  // Making room may have swapped others out, never this one in.
  if (!move(*sequence, swap_, main_)) return false;
  sequence->swapped = false;
  count("swap in");
  return true;
}

// ---------------------------------------------------------------------------------------------- the library's calls --

void Engine::verify_pools(Space &space, size_t layer, const char *after) {
  expect(space.coded_pools[layer]->as_predicted(),
         std::string("coded pages differ from the prediction after ") + after);
  if (space.exact_pools.empty()) return;
  expect(space.exact_pools[layer]->as_predicted(),
         std::string("exact pages differ from the prediction after ") + after);
}

void Engine::copy(Space &source, Space &destination, const Pairs &pairs, const Pairs &exact_pairs,
                  ExpectedFaults expected) {
  Device &device = *target_.device;
  const bool on_host = random_.chance(0.5);
  const auto padded = [&](Pairs list) {
    while (expected.lowest < 0 && random_.chance(0.3)) {
      list.insert(list.begin() + 2 * random_.integer(0, int64_t(list.size()) / 2), {-1, -1});
    }
    return list;
  };
  const Pairs all = padded(pairs), all_exact = padded(exact_pairs);
  for (size_t layer = 0; layer < size_t(layers_); ++layer) {
    const Bytes pairs_there(device, all), exact_there(device, all_exact), faults(device, std::vector<tq_faults>(1));
    const bool exact = !source.exact_pools.empty() && (!all_exact.empty() || random_.chance(0.5));
    const bool same = &source == &destination;
    const bool implied = same && random_.chance(0.5);
    const tq_pages from = source.coded_pools[layer]->pages(), to = destination.coded_pools[layer]->pages();
    const tq_pages exact_from = exact ? source.exact_pools[layer]->pages() : tq_pages{};
    const tq_pages exact_to = exact ? destination.exact_pools[layer]->pages() : tq_pages{};
    tq_copy_args args = {};
    args.struct_size = sizeof args;
    args.pairs_on_host = on_host;
    args.src = &from;
    args.dst = implied ? nullptr : &to;
    args.pairs = on_host ? all.data() : pairs_there.as<int64_t>();
    args.num_pairs = int64_t(all.size()) / 2;
    if (exact) {
      args.exact_src = &exact_from;
      args.exact_dst = implied ? nullptr : &exact_to;
      args.exact_pairs = on_host ? all_exact.data() : exact_there.as<int64_t>();
      args.num_exact_pairs = int64_t(all_exact.size()) / 2;
    }
    args.faults = expected.lowest < 0 && random_.chance(0.1) ? nullptr : faults.as<tq_faults>();
    expect_ok(call_library(tq_cache_copy, &args), "tq_cache_copy");
    for (size_t i = 0; i < pairs.size(); i += 2) {
      if (std::min(pairs[i], pairs[i + 1]) < 0 || pairs[i] >= source.coded_pools[layer]->num_blocks() ||
          pairs[i + 1] >= destination.coded_pools[layer]->num_blocks()) {
        continue;
      }
      destination.coded_pools[layer]->copy(*source.coded_pools[layer], pairs[i], pairs[i + 1]);
    }
    for (size_t i = 0; i < exact_pairs.size(); i += 2) {
      destination.exact_pools[layer]->copy(*source.exact_pools[layer], exact_pairs[i], exact_pairs[i + 1]);
    }
    const tq_faults found = faults.download<tq_faults>()[0];
    expect(expected.met_by(found), "faults of tq_cache_copy: " + text_of(found, expected));
    verify_pools(source, layer, "tq_cache_copy");
    verify_pools(destination, layer, "tq_cache_copy");
  }
}

// Pairs that name blocks outside the pool copy nothing.
bool Engine::spoilt_copy() {
  if (main_.coded.available() == 0) return false;
  const int64_t blocks = main_.coded_pools[0]->num_blocks(), free_block = main_.coded.any_free();
  Pairs pairs;
  ExpectedFaults expected;
  const int64_t entries = random_.integer(1, 5);
  for (int64_t i = 0; i < entries; ++i) {
    if (random_.chance(0.4)) {
      pairs.insert(pairs.end(), {-1, -1});
      continue;
    }
    const int64_t bad = random_.pick({int64_t(-1), int64_t(-2), blocks, blocks + 7, INT64_MAX, INT64_MIN});
    const int64_t other = (free_block + 1) % blocks;
    if (random_.chance(0.5)) {
      pairs.insert(pairs.end(), {bad, free_block});
    } else {
      pairs.insert(pairs.end(), {other, bad});
    }
    expected.add(i, TQ_FAULT_BLOCK);
  }
  if (expected.lowest < 0) return false;
  copy(main_, main_, pairs, {}, expected);
  count("bad pair of blocks");
  return true;
}

void Engine::store(std::vector<StoreItem> items) {
  if (random_.chance(0.3)) std::shuffle(items.begin(), items.end(), random_.engine());
  while (random_.chance(0.2)) {
    items.insert(items.begin() + random_.integer(0, int64_t(items.size())), StoreItem{});
  }
  if (!items.empty() && mistaken(Mistake::kTokenNotStored)) items.back().slot = -1;
  std::vector<StoreItem> again;
  const bool spoil = random_.chance(0.08);
  for (StoreItem &item : items) {
    item.passed_slot = item.slot;
    item.passed_exact_slot = item.exact_slot;
    if (!spoil || !item.token || !random_.chance(0.3)) continue;
    again.push_back(item);
    const int64_t kind = random_.integer(0, 3);
    const int64_t slots = main_.coded_pools[0]->num_slots();
    if (kind == 0 && item.slot >= 0) {
      item.passed_slot = random_.pick({int64_t(-2), slots, slots + 1, INT64_MAX, INT64_MIN});
      item.fault = TQ_FAULT_SLOT;
      count("bad slot");
    } else if (kind == 1 && item.exact_slot >= 0) {
      const int64_t exact_slots = main_.exact_pools[0]->num_slots();
      item.passed_exact_slot = random_.pick({int64_t(-2), exact_slots, INT64_MAX, INT64_MIN});
      item.fault = TQ_FAULT_SLOT;
      count("bad exact slot");
    } else if (item.slot >= 0 || item.exact_slot >= 0) {
      item.spoilt_side = int(random_.integer(TQ_SIDE_K, TQ_SIDE_V));
      item.spoilt_head = int(random_.integer(0, codec_view_->kv_heads - 1));
      item.fault = TQ_FAULT_NON_FINITE;
      count("non-finite vector");
    }
  }
  for (size_t layer = 0; layer < size_t(layers_); ++layer) {
    store_layer(layer, items);
    if (!again.empty()) store_layer(layer, again);
  }
  count("store");
}

void Engine::store_layer(size_t layer, const std::vector<StoreItem> &items) {
  Device &device = *target_.device;
  const oracle::Codec &view = *codec_view_;
  const std::vector<float> &key_offset = key_offset_[layer];
  Pool &pool = *main_.coded_pools[layer];
  Pool *exact_pool = main_.exact_pools.empty() ? nullptr : main_.exact_pools[layer].get();

  std::vector<double> k, v;
  std::vector<int64_t> slots, exact_slots;
  ExpectedFaults expected;
  bool any_exact = false;
  for (size_t i = 0; i < items.size(); ++i) {
    const StoreItem &item = items[i];
    for (int32_t side : {TQ_SIDE_K, TQ_SIDE_V}) {
      std::vector<double> &to = side == TQ_SIDE_K ? k : v;
      const size_t dim = size_t(view.side(false, side).head_dim), elems = size_t(view.kv_heads) * dim, at = to.size();
      if (!item.token) {  // rows that are padding hold whatever was there
        to.insert(to.end(), elems, std::numeric_limits<double>::quiet_NaN());
        continue;
      }
      const LayerToken &token = item.token->layers[layer];
      const std::vector<double> &given = side == TQ_SIDE_K ? token.given_k : token.given_v;
      to.insert(to.end(), given.begin(), given.end());
      if (item.spoilt_side == side) {
        const double infinity = std::numeric_limits<double>::infinity();
        to[at + size_t(item.spoilt_head) * dim + size_t(random_.integer(0, int64_t(dim) - 1))] =
            random_.pick({infinity, -infinity, std::numeric_limits<double>::quiet_NaN()});
      }
    }
    slots.push_back(item.passed_slot);
    exact_slots.push_back(item.passed_exact_slot);
    any_exact = any_exact || item.passed_exact_slot != -1;
    if (item.fault >= 0) expected.add(int64_t(i), item.fault);
  }
  const Strided k_array = lay_out(random_, k, view.kv_heads, view.k.head_dim, type_);
  const Strided v_array = lay_out(random_, v, view.kv_heads, view.v.head_dim, type_);
  const size_t misalign = size_t(random_.integer(0, 3) * oracle::type_bytes(type_));
  const Bytes k_there(device, k_array.bytes, misalign), v_there(device, v_array.bytes, misalign),
      slots_there(device, slots), exact_slots_there(device, exact_slots), offset_there(device, key_offset),
      faults(device, std::vector<tq_faults>(1));
  size_t workspace_bytes = 0;
  expect_ok(tq_cache_workspace(codec_.get(), int64_t(items.size()), &workspace_bytes), "tq_cache_workspace");
  const Bytes workspace(device, workspace_bytes);
  const bool exact = exact_pool && (any_exact || random_.chance(0.5));
  const tq_pages pages = pool.pages(), exact_pages = exact ? exact_pool->pages() : tq_pages{};
  tq_store_args args = {};
  args.struct_size = sizeof args;
  args.input_type = type_;
  args.num_tokens = int64_t(items.size());
  args.k = k_there.data();
  args.v = v_there.data();
  args.k_token_stride = k_array.token_stride;
  args.k_head_stride = k_array.head_stride;
  args.v_token_stride = v_array.token_stride;
  args.v_head_stride = v_array.head_stride;
  args.pages = &pages;
  args.slots = slots_there.as<int64_t>();
  args.exact_pages = exact ? &exact_pages : nullptr;
  args.exact_slots = exact ? exact_slots_there.as<int64_t>() : nullptr;
  args.key_offset = key_offset.empty() ? nullptr : offset_there.as<float>();
  args.faults = expected.lowest < 0 && random_.chance(0.1) ? nullptr : faults.as<tq_faults>();
  args.workspace = workspace.data();
  args.workspace_bytes = workspace_bytes;
  expect_ok(call_library(tq_cache_store, &args), "tq_cache_store");
  const tq_faults found = faults.download<tq_faults>()[0];
  expect(expected.met_by(found), "faults of tq_cache_store: " + text_of(found, expected));
  expect(k_there.download() == k_array.bytes && v_there.download() == v_array.bytes,
         "tq_cache_store changed its input");
  workspace.download();

  for (const StoreItem &item : items) {
    if (!item.token || item.fault == TQ_FAULT_SLOT) continue;
    const LayerToken &token = item.token->layers[layer];
    for (int h = 0; h < view.kv_heads; ++h) {
      std::vector<uint8_t> coded = token.coded_record[size_t(h)], raw = token.raw_record[size_t(h)];
      if (item.spoilt_side >= 0 && item.spoilt_head == h) {
        const bool is_v = item.spoilt_side == TQ_SIDE_V;
        const std::vector<uint8_t> &zero = zero_record_[item.spoilt_side];
        std::copy(zero.begin(), zero.end(), coded.begin() + std::ptrdiff_t(is_v ? zero_record_[TQ_SIDE_K].size() : 0));
        const auto begin = raw.begin() + (is_v ? 2 * view.k.head_dim : 0);
        std::fill(begin, begin + 2 * (is_v ? view.v.head_dim : view.k.head_dim), uint8_t(0));
      }
      if (item.slot >= 0) pool.write(item.slot, h, coded);
      if (item.exact_slot >= 0) exact_pool->write(item.exact_slot, h, raw);
    }
  }
  verify_pools(main_, layer, "tq_cache_store");
}

// Decompresses what is stored of a sequence and compares exactly.
bool Engine::check_load(const Sequence &sequence) {
  if (sequence.stored == sequence.start) return false;
  Device &device = *target_.device;
  const oracle::Codec &view = *codec_view_;
  std::vector<int32_t> positions;
  for (int32_t j = sequence.start; j < sequence.stored; ++j) {
    if (sequence.blocks[size_t(j / block_size())] >= 0) positions.push_back(j);
  }
  if (random_.chance(0.5)) std::shuffle(positions.begin(), positions.end(), random_.engine());
  for (size_t layer = 0; layer < size_t(layers_); ++layer) {
    enum class Source { kNone, kCoded, kExact, kFault };
    const bool exact = !main_.exact_pools.empty() && random_.chance(0.6), spoil = random_.chance(0.15);
    const bool want_k = random_.chance(0.9), want_v = !want_k || random_.chance(0.9);
    const int32_t type = random_.pick({TQ_TYPE_F32, TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16});
    const int64_t element = oracle::type_bytes(type);
    std::vector<int64_t> slots, exact_slots;
    std::vector<Source> sources;
    ExpectedFaults expected;
    for (size_t i = 0; i < positions.size(); ++i) {
      const int32_t j = positions[i];
      slots.push_back(slot_of(sequence, j));
      exact_slots.push_back(-1);
      sources.push_back(Source::kCoded);
      // The ring holds at least the positions that the next query may read exactly.
      const bool held = j > sequence.stored - exact_recent_ || in_first_columns(sequence, j / exact_block_size());
      if (exact && held && random_.chance(0.8)) {
        exact_slots.back() = exact_slot_of(sequence, j);
        if (exact_slots.back() >= 0) sources.back() = Source::kExact;
      }
      if (random_.chance(0.05)) {
        slots.back() = exact_slots.back() = -1;
        sources.back() = Source::kNone;
      } else if (spoil && random_.chance(0.1)) {
        slots.back() = random_.pick({int64_t(-2), main_.coded_pools[layer]->num_slots(), INT64_MAX});
        exact_slots.back() = -1;
        sources.back() = Source::kFault;
        expected.add(int64_t(i), TQ_FAULT_SLOT);
      }
    }
    struct Side {
      int64_t dim, head_stride, token_stride;
      bool pass_strides;
    } sides[2];
    for (int32_t which : {TQ_SIDE_K, TQ_SIDE_V}) {
      Side &side = sides[which];
      side.dim = view.side(false, which).head_dim;
      side.pass_strides = random_.chance(0.5);
      side.head_stride = side.dim + (side.pass_strides ? random_.integer(0, 5) : 0);
      side.token_stride = view.kv_heads * side.head_stride + (side.pass_strides ? random_.integer(0, 5) : 0);
    }
    const Bytes k(device, positions.size() * size_t(sides[0].token_stride * element)),
        v(device, positions.size() * size_t(sides[1].token_stride * element)), slots_there(device, slots),
        exact_slots_there(device, exact_slots), offset_there(device, key_offset_[layer]),
        faults(device, std::vector<tq_faults>(1));
    size_t workspace_bytes = 0;
    expect_ok(tq_cache_workspace(codec_.get(), int64_t(positions.size()), &workspace_bytes), "tq_cache_workspace");
    const Bytes workspace(device, workspace_bytes);
    const tq_pages pages = main_.coded_pools[layer]->pages();
    const tq_pages exact_pages = exact ? main_.exact_pools[layer]->pages() : tq_pages{};
    tq_load_args args = {};
    args.struct_size = sizeof args;
    args.output_type = type;
    args.num_tokens = int64_t(positions.size());
    args.k = want_k ? k.data() : nullptr;
    args.v = want_v ? v.data() : nullptr;
    if (sides[0].pass_strides) {
      args.k_token_stride = sides[0].token_stride;
      args.k_head_stride = sides[0].head_stride;
    }
    if (sides[1].pass_strides) {
      args.v_token_stride = sides[1].token_stride;
      args.v_head_stride = sides[1].head_stride;
    }
    args.pages = &pages;
    args.slots = slots_there.as<int64_t>();
    args.exact_pages = exact ? &exact_pages : nullptr;
    args.exact_slots = exact ? exact_slots_there.as<int64_t>() : nullptr;
    args.key_offset = key_offset_[layer].empty() ? nullptr : offset_there.as<float>();
    args.faults = expected.lowest < 0 && random_.chance(0.1) ? nullptr : faults.as<tq_faults>();
    args.workspace = workspace.data();
    args.workspace_bytes = workspace_bytes;
    expect_ok(call_library(tq_cache_load, &args), "tq_cache_load");
    const tq_faults found = faults.download<tq_faults>()[0];
    expect(expected.met_by(found), "faults of tq_cache_load: " + text_of(found, expected));
    workspace.download();

    for (int32_t which : {TQ_SIDE_K, TQ_SIDE_V}) {
      const Side &side = sides[which];
      std::vector<uint8_t> want((which == TQ_SIDE_K ? k : v).size(), 0xff);
      if (which == TQ_SIDE_K ? want_k : want_v) {
        for (size_t i = 0; i < positions.size(); ++i) {
          if (sources[i] == Source::kNone) continue;
          const LayerToken &token = sequence.tokens[size_t(positions[i])]->layers[layer];
          const bool raw = sources[i] == Source::kExact;
          const std::vector<double> &values =
              which == TQ_SIDE_K ? (raw ? token.raw_k : token.loaded_k) : (raw ? token.raw_v : token.coded_v);
          for (int64_t e = 0; e < view.kv_heads * side.dim; ++e) {
            oracle::write_element(want.data(), type,
                                  int64_t(i) * side.token_stride + e / side.dim * side.head_stride + e % side.dim,
                                  sources[i] == Source::kFault ? 0.0 : values[size_t(e)]);
          }
        }
      }
      const std::vector<uint8_t> got = (which == TQ_SIDE_K ? k : v).download();
      if (got == want) continue;
      const size_t byte = size_t(std::mismatch(got.begin(), got.end(), want.begin()).first - got.begin());
      const size_t token = byte / size_t(side.token_stride * element);
      std::ostringstream text;
      text << "tq_cache_load: " << (which == TQ_SIDE_K ? "k" : "v") << " of position " << positions[token]
           << " as type " << type << ", source " << int(sources[token]) << ", element " << byte / size_t(element)
           << ": " << oracle::read_element(got.data(), type, int64_t(byte) / element) << " instead of "
           << oracle::read_element(want.data(), type, int64_t(byte) / element);
      fail(text.str());
    }
  }
  count("load");
  return true;
}

// Builds one attention call in one of its many forms, runs it and compares with the truth. The rows' own tokens are the
// positions from `stored` on.
void Engine::attend(const std::vector<Row> &rows, bool use_new, size_t layer) {
  Random &r = random_;
  const oracle::Codec &view = *codec_view_;
  const size_t n = rows.size();
  const int64_t dk = view.k.head_dim, dv = view.v.head_dim, kv_heads = view.kv_heads;
  Pool &pool = *main_.coded_pools[layer];
  AttentionCall call;
  tq_attention_args &args = call.args;
  args.struct_size = sizeof args;

  // Rows and lengths.
  std::vector<QuerySequence> sequences;
  int num_tokens = 0;
  bool one_each = true;
  std::vector<int32_t> offsets = {0};
  for (const Row &row : rows) {
    const int32_t length = row.sequence ? row.sequence->stored + row.q_len : 0;
    const bool no_padding = !row.sequence || row.sequence->start == 0;
    const int32_t start = no_padding && r.chance(0.2) ? r.pick({-1, INT32_MIN})
                          : row.sequence              ? row.sequence->start
                                                      : 0;
    sequences.push_back({row.sequence ? &row.sequence->tokens : nullptr, num_tokens, row.q_len});
    call.lengths.push_back(length);
    call.starts.push_back(start);
    one_each = one_each && row.q_len == 1;
    num_tokens += row.q_len;
    offsets.push_back(num_tokens);
  }
  const bool with_offsets = !one_each || r.chance(0.5);
  if (!left_padding_ && r.chance(0.7)) call.starts.clear();
  if (with_offsets) call.cu_seqlens = offsets;
  args.num_tokens = num_tokens + (with_offsets && r.chance(0.3) ? int32_t(r.integer(1, 3)) : 0);
  if (args.num_tokens == 0) return;  // padding rows without queries only
  args.num_seqs = int32_t(n);
  args.q_heads = q_heads_;
  args.q_type = type_;
  const int32_t longest = *std::max_element(call.lengths.begin(), call.lengths.end());
  if (r.chance(0.5)) {
    int32_t most = 1;
    for (const Row &row : rows) most = std::max(most, row.q_len);
    args.max_q_len = with_offsets ? std::min(most + int32_t(r.integer(0, 3)), args.num_tokens) : 1;
  }

  // What is seen.
  args.flags = causal_ ? TQ_ATTENTION_CAUSAL : 0;
  args.scale = scale_;
  args.soft_cap = soft_cap_;
  args.window_tokens = window_;
  call.sinks = sinks_;
  call.alibi_slopes = slopes_;
  call.key_offset = key_offset_[layer];
  const bool exact = !main_.exact_pools.empty() && r.chance(0.85);
  if (exact) {
    args.exact_first_tokens = r.chance(0.7) ? exact_first_ : int32_t(r.integer(0, exact_first_));
    args.exact_recent_tokens = r.chance(0.7) ? exact_recent_ : int32_t(r.integer(0, exact_recent_));
  }
  if (r.chance(0.2)) {
    // Blocks before a window are gone and a ring is overwritten, so there positions only go forward.
    const int64_t lowest = window_ > 0 || exact_recent_ > 0 ? 0 : -6;
    for (size_t s = 0; s < n; ++s) {
      for (int32_t i = 0; i < rows[s].q_len; ++i) {
        call.q_positions.push_back(call.lengths[s] - rows[s].q_len + i + int32_t(r.integer(lowest, 4)));
      }
    }
    call.q_positions.resize(size_t(args.num_tokens), INT32_MIN);
  }

  // Which table entries are needed; the others may hold anything.
  std::vector<std::vector<char>> needed(n), coded_needed(n), exact_needed(n);
  for (size_t s = 0; s < n; ++s) {
    const int32_t length = call.lengths[s];
    needed[s].assign(size_t(length), 0);
    coded_needed[s].assign(size_t(ceil_div(length, block_size())), 0);
    exact_needed[s].assign(size_t(ceil_div(length, exact_block_size())), 0);
    for (int row = sequences[s].row0; row < sequences[s].row0 + sequences[s].q_len; ++row) {
      const int32_t p = position_of(call, sequences[s], s, row);
      for (int32_t j = 0; j < length; ++j) needed[s][size_t(j)] |= char(visible(call, s, j, p));
    }
    const int32_t paged = use_new ? length - sequences[s].q_len : length;
    for (int32_t j = 0; j < paged; ++j) {
      if (!needed[s][size_t(j)]) continue;
      coded_needed[s][size_t(j / block_size())] = 1;
      if (exact && in_exact_range(call, sequences[s], s, j)) exact_needed[s][size_t(j / exact_block_size())] = 1;
    }
  }
  const bool hostile = r.chance(0.7);
  const auto entry_of = [&](bool is_needed, int32_t real, int64_t blocks) {
    if (is_needed || !hostile) return real;
    return r.pick({real, -1, -7, INT32_MAX, INT32_MIN, int32_t(blocks), int32_t(r.integer(0, blocks - 1))});
  };
  const auto coded_entry = [&](size_t s, int64_t column) {
    const bool is_needed = column < int64_t(coded_needed[s].size()) && coded_needed[s][size_t(column)];
    const Sequence *sequence = rows[s].sequence;
    const bool known = sequence && column < int64_t(sequence->blocks.size());
    return entry_of(is_needed, known ? sequence->blocks[size_t(column)] : -1, pool.num_blocks());
  };
  const bool csr = r.chance(0.4);
  if (csr) {
    call.block_indptr.push_back(0);
    for (size_t s = 0; s < n; ++s) {
      const int64_t columns = int64_t(coded_needed[s].size()) + r.integer(0, 2);
      for (int64_t c = 0; c < columns; ++c) call.block_indices.push_back(coded_entry(s, c));
      call.block_indptr.push_back(int32_t(call.block_indices.size()));
    }
  } else {
    args.table_columns = std::max<int64_t>(1, ceil_div(longest, block_size()) + r.integer(0, 2));
    const int64_t gap = r.chance(0.5) ? 0 : r.integer(0, 3);
    if (gap > 0 || r.chance(0.5)) args.block_table_stride = args.table_columns + gap;
    for (size_t s = 0; s < n; ++s) {
      for (int64_t c = 0; c < args.table_columns; ++c) call.block_table.push_back(coded_entry(s, c));
      for (int64_t c = 0; c < gap; ++c) call.block_table.push_back(INT32_MAX);
    }
  }
  if (r.chance(0.5) || (csr && target_.device->kind() == TQ_DEVICE_CUDA)) {
    args.max_length_tokens = std::max(1, longest + int32_t(r.integer(0, 20)));
  }
  if (exact) {
    args.exact_columns = std::max<int64_t>(1, ceil_div(longest, exact_block_size()) + r.integer(0, 2));
    if (r.chance(0.1)) args.exact_columns = r.integer(1, args.exact_columns);  // the rest is read coded
    const int64_t gap = r.chance(0.5) ? 0 : r.integer(0, 3);
    if (gap > 0 || r.chance(0.5)) args.exact_table_stride = args.exact_columns + gap;
    for (size_t s = 0; s < n; ++s) {
      for (int64_t c = 0; c < args.exact_columns; ++c) {
        const bool is_needed = c < int64_t(exact_needed[s].size()) && exact_needed[s][size_t(c)];
        const int32_t real = rows[s].sequence ? exact_entry(*rows[s].sequence, c) : -1;
        call.exact_table.push_back(entry_of(is_needed, real, main_.exact_pools[layer]->num_blocks()));
      }
      for (int64_t c = 0; c < gap; ++c) call.exact_table.push_back(INT32_MAX);
    }
  }

  // Queries, the call's own keys and values, and how results are laid out.
  std::vector<double> q;
  for (int64_t row = 0; row < args.num_tokens; ++row) {
    const double magnitude = r.uniform(0.5, 2);
    for (int64_t i = 0; i < q_heads_ * dk; ++i) q.push_back(rounded(magnitude * r.normal(), type_));
  }
  const Strided q_array = lay_out(r, q, q_heads_, dk, type_);
  call.q = q_array.bytes;
  args.q_token_stride = q_array.token_stride;
  args.q_head_stride = q_array.head_stride;
  if (use_new) {
    std::vector<double> k, v;
    for (size_t s = 0; s < n; ++s) {
      for (int32_t i = 0; i < rows[s].q_len; ++i) {
        if (!rows[s].sequence) {
          k.insert(k.end(), size_t(kv_heads * dk), std::numeric_limits<double>::quiet_NaN());
          v.insert(v.end(), size_t(kv_heads * dv), std::numeric_limits<double>::quiet_NaN());
          continue;
        }
        const LayerToken &token = rows[s].sequence->tokens[size_t(rows[s].sequence->stored + i)]->layers[layer];
        k.insert(k.end(), token.given_k.begin(), token.given_k.end());
        v.insert(v.end(), token.given_v.begin(), token.given_v.end());
      }
    }
    k.resize(size_t(args.num_tokens * kv_heads * dk), std::numeric_limits<double>::quiet_NaN());
    v.resize(size_t(args.num_tokens * kv_heads * dv), std::numeric_limits<double>::quiet_NaN());
    const Strided k_array = lay_out(r, k, kv_heads, dk, type_), v_array = lay_out(r, v, kv_heads, dv, type_);
    call.k_new = k_array.bytes;
    call.v_new = v_array.bytes;
    args.k_new_token_stride = k_array.token_stride;
    args.k_new_head_stride = k_array.head_stride;
    args.v_new_token_stride = v_array.token_stride;
    args.v_new_head_stride = v_array.head_stride;
    count("attention with new tokens raw");
  }
  args.split_tokens = r.chance(0.4) ? 16 * int32_t(r.integer(1, 4)) : 0;
  args.out_type = r.chance(0.6) ? TQ_TYPE_F32 : r.pick({TQ_TYPE_F16, TQ_TYPE_BF16});
  if (r.chance(0.4)) {
    args.out_head_stride = dv + r.integer(0, 5);
    args.out_token_stride = q_heads_ * args.out_head_stride + r.integer(0, 5);
  }
  (void)pool.pages();  // what was poisoned since is poisoned on the device too
  call.pool = &pool.image();
  if (exact) call.exact_pool = &main_.exact_pools[layer]->image();

  // A share of the calls carries bad data; those sequences give zeros, the others are as ever.
  ExpectedFaults expected;
  if (r.chance(0.08)) {
    for (size_t s = 0; s < n; ++s) {
      std::vector<int64_t> columns, exact_columns;
      for (int32_t j = 0; j < call.lengths[s] - (use_new ? rows[s].q_len : 0); ++j) {
        if (!needed[s][size_t(j)]) continue;
        const int64_t column = j / exact_block_size();
        const int64_t stride = args.exact_table_stride ? args.exact_table_stride : args.exact_columns;
        if (exact && in_exact_range(call, sequences[s], s, j) && column < args.exact_columns &&
            call.exact_table[s * size_t(stride) + size_t(column)] >= 0) {
          exact_columns.push_back(int64_t(s) * stride + column);
        } else {
          columns.push_back(j / block_size());
        }
      }
      if (rows[s].q_len == 0 || !rows[s].sequence || r.chance(0.4)) continue;
      const int64_t kind = r.integer(0, 3);
      const int64_t table_stride = args.block_table_stride ? args.block_table_stride : args.table_columns;
      const int64_t held = csr ? call.block_indptr[s + 1] - call.block_indptr[s] : args.table_columns;
      if (kind == 0) {
        const int64_t over = held * block_size() + (use_new ? rows[s].q_len : 0) + r.integer(1, 5);
        call.lengths[s] = r.pick({-1, INT32_MIN, INT32_MAX, int32_t(over)});
        expected.add(int64_t(s), TQ_FAULT_LENGTH);
        count("bad length");
      } else if (kind == 1 && csr && s + 1 == n) {
        call.block_indptr[n] += r.pick({1, 1000, INT32_MAX - call.block_indptr[n]});
        expected.add(int64_t(s), TQ_FAULT_LENGTH);
        count("bad row offset");
      } else if (kind == 2 && !exact_columns.empty()) {
        const int32_t blocks = int32_t(main_.exact_pools[layer]->num_blocks());
        call.exact_table[size_t(r.pick(exact_columns))] = r.pick({blocks, blocks + 3, INT32_MAX});
        expected.add(int64_t(s), TQ_FAULT_BLOCK);
        count("bad exact block");
      } else if (!columns.empty()) {
        const int64_t column = r.pick(columns);
        const int32_t bad = r.pick({-1, -5, int32_t(pool.num_blocks()), INT32_MAX, INT32_MIN});
        if (csr) {
          call.block_indices[size_t(call.block_indptr[s] + column)] = bad;
        } else {
          call.block_table[s * size_t(table_stride) + size_t(column)] = bad;
        }
        expected.add(int64_t(s), TQ_FAULT_BLOCK);
        count("bad block");
      } else {
        continue;
      }
      sequences[s].fault = true;
    }
  }

  const Truth truth = truth_of(call, sequences, q, layer);
  const AttentionRun run = ::run(target_, codec_.get(), with_mistake(call, sequences), int(dv), r.chance(0.9));
  expect(expected.met_by(run.faults), "faults of tq_paged_attention: " + text_of(run.faults, expected));
  compare(call, run, truth, "tq_paged_attention");
  count("attention");
  if (expected.lowest >= 0) return;
  if (r.chance(0.05)) {
    const AttentionRun again = ::run(target_, codec_.get(), with_mistake(call, sequences), int(dv), run.has_lse);
    expect(again.raw_out == run.raw_out, "a repeated tq_paged_attention gave other bits");
    count("repeated attention");
  }
  if (args.split_tokens > 0 && r.chance(0.3)) repeat_alone(call, sequences, run);
  if (!use_new && args.num_tokens == num_tokens && r.chance(0.15)) merge_parts(call, sequences, q, layer, truth);
}

void Engine::compare(const AttentionCall &call, const AttentionRun &run, const Truth &truth, const char *what) const {
  const int32_t out_type = call.args.out_type;
  const size_t heads = size_t(q_heads_), dv = size_t(codec_view_->v.head_dim);
  const double tolerance = attention_tolerance(target_, out_type);
  // Half a unit in the last place of the result's type; half of f16's smallest subnormal, or what is lost where weights
  // are below f32's.
  const double rounding = out_type == TQ_TYPE_F16 ? 0x1p-11 : out_type == TQ_TYPE_BF16 ? 0x1p-8 : 0;
  const double smallest = (out_type == TQ_TYPE_F16 ? 0x1p-25 : 1e-33) * std::sqrt(double(dv));
  for (size_t row = 0; row < truth.written.size(); ++row) {
    for (size_t h = 0; h < heads; ++h) {
      const size_t index = row * heads + h;
      const double *got = run.out.data() + index * dv, *want = truth.out.data() + index * dv;
      const float got_lse = run.lse[index];
      double error = 0, square = 0;
      for (size_t c = 0; c < dv; ++c) {
        error += (got[c] - want[c]) * (got[c] - want[c]);
        square += want[c] * want[c];
      }
      const double want_lse = truth.lse[index];
      bool good;
      if (!truth.written[row]) {
        good = std::all_of(got, got + dv, [](double value) { return std::isnan(value); }) && std::isnan(got_lse);
      } else if (std::isinf(want_lse)) {
        good = std::all_of(got, got + dv, [](double value) { return value == 0; }) &&
               (!run.has_lse || double(got_lse) == want_lse);
      } else {
        // An error of a logit, whose f32 sums are relative to its magnitude, bias included, is a relative one of a weight.
        const double magnitude = 1 + truth.logit[index] + std::fabs(want_lse);
        // On CUDA queries for coded keys are rounded to integers, which adds an error of its own to logits.
        const double queries = truth.query_rounding[index];
        const double allowed = tolerance + 8 * 0x1p-24 * std::max(0.0, magnitude - 16) + queries;
        good = std::sqrt(error) <= (allowed + rounding) * std::sqrt(square) + smallest;
        good = good && (!run.has_lse || std::fabs(double(got_lse) - want_lse) <= tolerance * magnitude + queries);
      }
      if (good) continue;
      std::ostringstream text;
      text << what << ": row " << row << " head " << h << (truth.written[row] ? "" : " (of no sequence)")
           << ": relative error " << std::sqrt(error / square) << ", norm " << std::sqrt(square) << ", lse " << got_lse
           << " instead of " << want_lse << ", largest logit " << truth.logit[index] << ", rounding of the query "
           << truth.query_rounding[index] << ", out type " << out_type << ", rows " << truth.written.size()
           << ", new tokens raw " << !call.k_new.empty() << ", csr " << !call.block_indptr.empty()
           << ", positions given " << !call.q_positions.empty() << ", exact first " << call.args.exact_first_tokens
           << " recent " << call.args.exact_recent_tokens << ", split " << call.args.split_tokens << ", lengths";
      for (int32_t length : call.lengths) text << " " << length;
      text << ", row offsets";
      for (int32_t offset : call.cu_seqlens) text << " " << offset;
      fail(text.str());
    }
  }
}

// Each sequence is cut at a position of its own; attention over the two parts, merged, is attention over the whole.
void Engine::merge_parts(const AttentionCall &call, const std::vector<QuerySequence> &sequences,
                         const std::vector<double> &q, size_t layer, const Truth &whole) {
  Device &device = *target_.device;
  const size_t dv = size_t(codec_view_->v.head_dim), rows = size_t(call.args.num_tokens) * size_t(q_heads_);
  AttentionCall left = call;
  left.args.out_head_stride = left.args.out_token_stride = 0;
  left.q_positions.clear();
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (int row = sequences[s].row0; row < sequences[s].row0 + sequences[s].q_len; ++row) {
      left.q_positions.push_back(position_of(call, sequences[s], s, row));
    }
  }
  if (left.starts.empty()) left.starts.assign(sequences.size(), 0);
  AttentionCall right = left;
  for (size_t s = 0; s < sequences.size(); ++s) {
    // The first exact tokens, counted from the start, must all lie in the left part.
    const int32_t from = std::min(std::max(left.starts[s], 0) + left.args.exact_first_tokens, left.lengths[s]);
    const int32_t cut = int32_t(random_.integer(from, left.lengths[s]));
    left.lengths[s] = cut;
    right.starts[s] = std::max(cut, right.starts[s]);
  }
  right.args.exact_first_tokens = 0;
  const size_t with_sinks = size_t(random_.integer(0, 1));
  (with_sinks == 0 ? right : left).sinks.clear();
  const AttentionRun parts[2] = {::run(target_, codec_.get(), left, int(dv)),
                                 ::run(target_, codec_.get(), right, int(dv))};
  const Truth truths[2] = {truth_of(left, sequences, q, layer), truth_of(right, sequences, q, layer)};
  compare(left, parts[0], truths[0], "attention left of a cut");
  compare(right, parts[1], truths[1], "attention right of a cut");
  // A row that sees no key has no sink either, so the part that has the sinks must see some.
  bool comparable = true;
  for (size_t row = 0; row < rows && !sinks_.empty(); ++row) {
    comparable = comparable && (std::isinf(whole.lse[row]) || !std::isinf(truths[with_sinks].lse[row]));
  }

  const int32_t type = call.args.out_type;
  std::vector<double> states;
  std::vector<float> lse;
  for (const AttentionRun &part : parts) {
    for (size_t row = 0; row < rows; ++row) {
      lse.push_back(part.lse[row]);
      const bool nothing = std::isinf(part.lse[row]);  // then the state may hold anything
      for (size_t c = 0; c < dv; ++c) {
        states.push_back(nothing ? std::numeric_limits<double>::quiet_NaN() : part.out[row * dv + c]);
      }
    }
  }
  const bool in_place = random_.chance(0.3), want_lse = random_.chance(0.8);
  const Bytes states_there(device, encode_elements(states, type)), lse_there(device, lse),
      out(device, rows * dv * size_t(oracle::type_bytes(type))), out_lse(device, rows * 4);
  tq_merge_args args = {};
  args.struct_size = sizeof args;
  args.num_states = 2;
  args.num_rows = int64_t(rows);
  args.head_dim = int32_t(dv);
  args.type = type;
  args.states = states_there.data();
  args.lse = lse_there.as<float>();
  args.out = in_place ? states_there.data() : out.data();
  args.out_lse = !want_lse ? nullptr : in_place ? lse_there.as<float>() : out_lse.as<float>();
  expect_ok(call_library(tq_merge_states, &args), "tq_merge_states");
  AttentionRun merged;
  merged.out = decode_elements((in_place ? states_there : out).download().data(), type, int64_t(rows * dv));
  merged.lse = (in_place ? lse_there : out_lse).download<float>();
  merged.lse.resize(rows);
  merged.has_lse = want_lse;

  // First against the states as they are, f32 sums of two terms; then, where no rounding lies between, the whole.
  Truth exactly = whole;
  std::fill(exactly.out.begin(), exactly.out.end(), 0.0);
  std::fill(exactly.query_rounding.begin(), exactly.query_rounding.end(), 0.0);
  const double infinity = std::numeric_limits<double>::infinity();
  for (size_t row = 0; row < rows; ++row) {
    const double a = double(lse[row]), b = double(lse[rows + row]), m = std::max(a, b);
    exactly.lse[row] = m == -infinity ? -infinity : m + std::log(std::exp(a - m) + std::exp(b - m));
    if (m == -infinity) continue;
    for (size_t part = 0; part < 2; ++part) {
      const double weight = std::exp(double(lse[part * rows + row]) - exactly.lse[row]);
      for (size_t c = 0; c < dv && weight > 0; ++c) {
        exactly.out[row * dv + c] += weight * states[(part * rows + row) * dv + c];
      }
    }
  }
  compare(call, merged, exactly, "tq_merge_states");
  if (type == TQ_TYPE_F32 && comparable) compare(call, merged, whole, "merged parts against the whole");
  count("merge");
}

// With a fixed split size a sequence's bits do not depend on its neighbours.
void Engine::repeat_alone(const AttentionCall &call, const std::vector<QuerySequence> &sequences,
                          const AttentionRun &run) {
  const size_t s = size_t(random_.integer(0, int64_t(sequences.size()) - 1));
  const QuerySequence &sequence = sequences[s];
  if (sequence.q_len == 0) return;
  AttentionCall alone = call;
  // The other sequences become padding rows: the same rows of q and out, nothing to see.
  for (size_t other = 0; other < sequences.size(); ++other) {
    if (other != s) alone.lengths[other] = 0;
  }
  const int dv = codec_view_->v.head_dim;
  const AttentionRun second = ::run(target_, codec_.get(), with_mistake(alone, sequences), dv, run.has_lse);
  expect(second.faults.first == 0, "sequences of length 0 are no fault");
  const auto begin = int64_t(sequence.row0) * q_heads_ * dv, end = begin + int64_t(sequence.q_len) * q_heads_ * dv;
  expect(std::equal(run.out.begin() + begin, run.out.begin() + end, second.out.begin() + begin),
         "with a fixed split size, other sequences changed a sequence's bits");
  const auto first_lse = int64_t(sequence.row0) * q_heads_, end_lse = first_lse + int64_t(sequence.q_len) * q_heads_;
  expect(!run.has_lse ||
             std::equal(run.lse.begin() + first_lse, run.lse.begin() + end_lse, second.lse.begin() + first_lse),
         "with a fixed split size, other sequences changed the bits of a sequence's log-sum-exp");
  count("repeated alone");
}

AttentionCall Engine::with_mistake(AttentionCall call, const std::vector<QuerySequence> &sequences) const {
  tq_attention_args &args = call.args;
  switch (options_.mistake) {
    case Mistake::kWindowTooWide:
      args.window_tokens += args.window_tokens > 0;
      break;
    case Mistake::kNotCausal:
      args.flags = 0;
      break;
    case Mistake::kPositionsIgnored:
      call.q_positions.clear();
      break;
    case Mistake::kStartsIgnored:
      call.starts.clear();
      break;
    case Mistake::kSinksIgnored:
      call.sinks.clear();
      break;
    case Mistake::kSoftCapIgnored:
      args.soft_cap = 0;
      break;
    case Mistake::kSlopesIgnored:
      call.alibi_slopes.clear();
      break;
    case Mistake::kKeyOffsetForgotten:
      call.key_offset.clear();
      break;
    case Mistake::kExactFirstIgnored:
      args.exact_first_tokens = 0;
      break;
    case Mistake::kExactWindowTooWide:
      args.exact_recent_tokens += args.exact_recent_tokens > 0;
      break;
    case Mistake::kQueryHeadsSwapped:
      if (q_heads_ > 1 && args.q_head_stride == 0) {
        const size_t head_bytes = size_t(codec_view_->k.head_dim * oracle::type_bytes(type_));
        std::swap_ranges(call.q.begin(), call.q.begin() + std::ptrdiff_t(head_bytes),
                         call.q.begin() + std::ptrdiff_t(head_bytes));
      }
      break;
    case Mistake::kTablesSwapped:
      if (!call.block_table.empty() && call.lengths.size() > 1) {
        const int64_t stride = args.block_table_stride ? args.block_table_stride : args.table_columns;
        std::swap_ranges(call.block_table.begin(), call.block_table.begin() + stride,
                         call.block_table.begin() + stride);
      }
      break;
    case Mistake::kRollbackForgotten:
      for (size_t s = 0; s < call.lengths.size(); ++s) {
        const bool room = call.lengths[s] % block_size() != 0;
        if (sequences[s].tokens && room && call.k_new.empty()) ++call.lengths[s];
      }
      break;
    default:
      break;  // made elsewhere
  }
  return call;
}

}  // namespace

const char *name_of(Mistake mistake) {
  return kMistakeNames[size_t(mistake)];
}

void simulate(const Options &options, Events *events) {
  std::unique_ptr<Engine> engine;
  int step = -1;
  const auto context = [&] {
    std::ostringstream text;
    text << "TQKV_TEST_SEED=" << tqkv_test::seed() << " configuration " << options.configuration << " step " << step;
    if (engine) text << ": " << engine->description();
    return text.str();
  };
  try {
    engine = std::make_unique<Engine>(options, events);
    for (step = 0; step < options.steps; ++step) {
      INFO(context());
      engine->step();
    }
  } catch (const Failure &failure) {
    throw Failure(context() + "\n" + failure.what());
  }
}

}  // namespace simulator
