// SPDX-License-Identifier: Apache-2.0
// What comes before and after the kernel that reads coded keys: queries as operands, sequences, and the merge with keys
// that are read raw. In place of that kernel the test makes up scores and values and cuts them as it would.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "catch.hpp"
#include "codec/codec.hpp"
#include "codec/cuda_run.hpp"
#include "codec/half.hpp"
#include "kernels/attention.hpp"
#include "kernels/device/launch.cuh"
#include "kernels/device/sequence.cuh"

namespace tqkv_test {
uint64_t seed();  // seed.cpp
}

namespace {

using namespace tqkv::cuda;
using tqkv::Codec;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLog2E = 1.4426950408889634;
constexpr float kUntouched = 12345;

struct Random {
  std::mt19937_64 engine;
  int below(int n) { return int(engine() % uint64_t(n)); }
  bool once_in(int n) { return below(n) == 0; }
  float value() { return float(below(2001) - 1000) / 500; }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[below(int(values.size()))];
  }
};

// An array of one of the three types whose rows are apart.
struct Array {
  int type, heads, dim;
  std::vector<uint8_t> bytes;
  Rows rows{};

  Array(Random &random, int of_type, int tokens, int num_heads, int head_dim)
      : type(of_type), heads(num_heads), dim(head_dim) {
    const int64_t head_stride = dim + random.one_of({0, 1, 16}), token_stride = heads * head_stride;
    bytes.resize(size_t(tokens * token_stride * tqkv::type_bytes(type)));
    rows = {bytes.data(), token_stride, head_stride, type, 0};
    const int64_t element = tqkv::type_bytes(type);
    rows.aligned = reinterpret_cast<uintptr_t>(bytes.data()) % 16 == 0 && head_stride * element % 16 == 0 &&
                   token_stride * element % 16 == 0;
  }
  int64_t index(int64_t token, int head, int c) const {
    return token * rows.token_stride + head * rows.head_stride + c;
  }
  void set(int64_t token, int head, int c, float x) { store_element(bytes.data(), type, index(token, head, c), x); }
  float get(int64_t token, int head, int c) const { return load_element(bytes.data(), type, index(token, head, c)); }
};

std::unique_ptr<Codec> codec_of(Random &random, int kv_heads, int dim_k, int dim_v) {
  tq_config config{};
  REQUIRE(tq_config_init(&config, sizeof config, random.one_of({"k4v4", "k4v2", "k2v2", "k3v3"})) == TQ_OK);
  config.device = TQ_DEVICE_CUDA;
  config.kv_heads = kv_heads;
  config.k.head_dim = dim_k;
  config.v.head_dim = dim_v;
  config.k.hadamard_rounds = 1 + random.below(3);
  config.v.hadamard_rounds = 1 + random.below(3);
  config.seed = random.engine();
  std::unique_ptr<Codec> codec;
  REQUIRE(tqkv::make_codec(config, &codec) == TQ_OK);
  return codec;
}

// A sequence as tqkv.h describes it.
struct Truth {
  int state = kBadRows;
  int64_t begin = 0, q_len = 0, length = 0, start = 0, coded_length = 0, first_position = 0;
};

struct Case {
  Random &random;
  bool is_long;  // one sequence of many tiles
  int type = type_of(random);
  int num_seqs = is_long ? 1 : 1 + random.below(random.once_in(3) ? 100 : random.once_in(10) ? 700 : 6);
  int dim_k = random.one_of({16, 48, 64, 80, 128, 256}),
      dim_v = is_long ? random.one_of({48, 64, 128}) : random.one_of({16, 48, 64, 80, 128, 192, 256});
  int pack = random.one_of({1, 1, 2}), kv_heads = pack * (1 + random.below(2)),
      group = is_long ? random.one_of({1, 4}) : random.one_of({1, 1, 3, 4, 8, 12});
  bool fixed_split = random.once_in(3), has_exact = random.once_in(2), has_new = random.once_in(2);
  bool dense = random.once_in(4), poison = random.once_in(4), good_only = is_long || random.once_in(2);
  // A segment as it ought to be.
  struct Part {
    size_t s;
    int64_t token_block, head_part, head_pack;
    TileRange tiles;
  };
  std::vector<int32_t> cu_seqlens, positions, lengths, starts, indptr, exact_table, states;
  std::vector<int32_t> faulty;
  std::vector<int64_t> sequence_segments, segment_units;
  std::vector<int64_t> first_segments, first_units;  // the same as they ought to be
  std::vector<Part> parts;
  std::vector<AttentionItem> segments, items;
  std::vector<BlockItems> block_items;
  std::vector<float> key_offset, sinks, slopes, lse;
  std::vector<uint8_t> exact_pool, operands, partials;
  std::vector<QueryRow> query_rows;
  tq_faults faults{};
  std::unique_ptr<Codec> codec = codec_of(random, kv_heads, dim_k, dim_v);
  Array q, k_new, v_new, out;
  AttentionCall call{};
  std::vector<Truth> truths;

  static int type_of(Random &random) { return random.one_of({TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16}); }

  static int total(Random &random, int num_seqs, bool good_only, bool is_long, std::vector<int32_t> *cu) {
    cu->assign(1, good_only ? 0 : random.below(2));
    for (int s = 0; s < num_seqs; ++s) {
      cu->push_back(cu->back() + (is_long        ? 1 + random.below(2)
                                  : num_seqs > 6 ? random.below(2)
                                                 : random.below(random.once_in(3) ? 30 : 4)));
    }
    const int tokens = cu->back() + random.below(3);
    if (!good_only && random.once_in(2)) (*cu)[size_t(random.below(num_seqs + 1))] += random.below(9) - 4;
    return std::max(tokens, 1);
  }

  explicit Case(Random &r, bool of_many_tiles = false)
      : random(r),
        is_long(of_many_tiles),
        q(r, type, total(r, num_seqs, good_only, is_long, &cu_seqlens), kv_heads * group, dim_k),
        k_new(r, type, tokens(), kv_heads, dim_k),
        v_new(r, type, tokens(), kv_heads, dim_v),
        out(r, type_of(r), tokens(), kv_heads * group, dim_v) {
    const int count = tokens();
    call.num_seqs = num_seqs;
    call.num_tokens = count;
    call.q_heads = kv_heads * group;
    call.kv_heads = kv_heads;
    call.group = group;
    call.causal = random.once_in(2);
    call.max_q_len = good_only ? count : random.one_of({3, count});
    call.max_length = is_long ? 3200 : 300;
    fill(q, count);
    fill(k_new, count);
    fill(v_new, count);
    call.q = q.rows;
    call.out = out.rows;
    if (has_new) call.k_new = k_new.rows, call.v_new = v_new.rows;
    call.cu_seqlens_q = cu_seqlens.data();
    if (random.once_in(3)) {
      for (int i = 0; i < count; ++i) positions.push_back(random.below(call.max_length + 20) - 10);
      call.q_positions = positions.data();
    }
    for (int s = 0; s < num_seqs; ++s) {
      lengths.push_back(is_long     ? 2600 + random.below(601)
                        : good_only ? 30 + random.below(271)
                                    : random.one_of({0, 1, 17, 200, 290, 301, -5}));
      starts.push_back(random.one_of({-3, 0, 5, 20}));
      indptr.push_back(0);
    }
    call.lengths = lengths.data();
    if (random.once_in(2)) call.starts = starts.data();
    call.block_table = indptr.data();
    call.pool.block_size = 16;
    call.table_columns = is_long ? 200 : good_only ? 20 : 17;
    if (has_exact) make_exact();
    call.scale = 0.3f;
    call.soft_cap = random.once_in(3) ? 2.0f : 0.0f;
    call.window = random.once_in(3) ? 1 + random.below(100) : 0;
    for (int h = 0; h < call.q_heads; ++h) sinks.push_back(random.value()), slopes.push_back(random.value() / 50);
    if (random.once_in(2)) call.sinks = sinks.data();
    if (random.once_in(2)) call.alibi_slopes = slopes.data();
    for (int i = 0; i < kv_heads * dim_k; ++i) key_offset.push_back(random.value());
    if (random.once_in(2)) call.key_offset = key_offset.data();
    lse.assign(size_t(count * call.q_heads), kUntouched);
    call.lse = lse.data();
    call.faults = &faults;
    call.head_dim_k = dim_k;
    call.head_dim_v = dim_v;
    call.k_uniform = random.once_in(2);
    call.block_heads = std::min(group, random.one_of({1, 3, 8}));
    call.block_tokens = 1 + random.below(8 / call.block_heads);
    call.head_parts = (group + call.block_heads - 1) / call.block_heads;
    call.pack_heads = pack;
    call.head_packs = kv_heads / pack;
    call.splits = call.page_splits = 1;
    if (fixed_split) {
      call.split_tiles = 1 + random.below(3);
      call.splits = call.page_splits = (call.max_length / 16 + call.split_tiles) / call.split_tiles;
    }
    call.item_units = int32_t(random.below(40));
    call.blocks = is_long ? 100 + random.below(413) : 1 + random.below(40);
    read_truths();
    make_work();
  }

  int tokens() const { return int(q.bytes.size()) / tqkv::type_bytes(q.type) / int(q.rows.token_stride); }

  void fill(Array &array, int count) {
    for (int t = 0; t < count; ++t) {
      for (int h = 0; h < array.heads; ++h) {
        for (int c = 0; c < array.dim; ++c) array.set(t, h, c, random.value());
      }
    }
    if (poison) array.set(random.below(count), random.below(array.heads), random.below(array.dim), NAN);
  }

  void make_exact() {
    const int size = random.one_of({1, 8, 16, 48}), blocks = 1 + random.below(60);
    const int storage = std::max(size, 16), tile_bytes = 16 * 2 * (dim_k + dim_v);
    call.raw_type = random.one_of({TQ_TYPE_F16, TQ_TYPE_BF16});
    AttentionPool &pool = call.exact;
    pool.num_blocks = blocks;
    pool.block_size = size;
    pool.head_stride = tile_bytes;
    pool.tile_stride = kv_heads * tile_bytes + 16;
    pool.block_stride = storage / 16 * pool.tile_stride;
    pool.v_codes = 16 * 2 * dim_k;
    pool.tile_bytes = tile_bytes;
    exact_pool.resize(size_t((int64_t{blocks} * size + storage - 1) / storage * pool.block_stride));
    for (size_t i = 0; i < exact_pool.size() / 2; ++i)
      store_element(exact_pool.data(), call.raw_type, int64_t(i), random.value());
    if (poison) {
      for (int i = 0; i < 20; ++i) {
        store_element(exact_pool.data(), call.raw_type, random.below(int(exact_pool.size() / 2)), NAN);
      }
    }
    pool.base = exact_pool.data();
    call.exact_columns = call.exact_stride = random.below(40);
    const bool all_good = random.once_in(2);
    for (int i = 0; i < num_seqs * call.exact_columns; ++i) {
      exact_table.push_back(random.once_in(4) ? -1 : !all_good && random.once_in(10) ? blocks : random.below(blocks));
    }
    exact_table.push_back(0);
    call.exact_table = exact_table.data();
    call.exact_first = random.one_of({0, 4, 30, 400});
    call.exact_recent = random.one_of({0, 1, 30, 400});
  }

  void read_truths() {
    int64_t rows_end = 0;
    for (size_t s = 0; s < size_t(num_seqs); ++s) {
      Truth t;
      const int64_t begin = cu_seqlens[s], end = cu_seqlens[s + 1];
      if (begin >= rows_end && end >= begin && end <= call.num_tokens) {
        t.begin = begin;
        t.q_len = end - begin;
        rows_end = end;
        t.length = lengths[s];
        t.start = call.starts != nullptr ? std::max(starts[s], 0) : 0;
        t.coded_length = has_new ? t.length - t.q_len : t.length;
        const bool fits = t.length >= 0 && t.length <= call.max_length && t.coded_length >= 0 &&
                          t.coded_length <= call.table_columns * 16;
        t.state = t.q_len <= call.max_q_len && (t.length == 0 || fits) ? kGood : kBadLength;
        if (t.state == kGood && t.q_len > 0) t.first_position = position(t, 0);
        if (t.length == 0) t.coded_length = 0;
      }
      truths.push_back(t);
    }
  }

  int64_t position(const Truth &t, int64_t i) const {
    return positions.empty() ? t.length - t.q_len + i : positions[size_t(t.begin + i)];
  }
  bool visible(const Truth &t, int64_t i, int64_t j) const {
    const int64_t p = position(t, i);
    return t.start <= j && j < t.length && (!call.causal || j <= p) && (call.window == 0 || p - j < call.window);
  }
  int64_t exact_block_of(size_t s, int64_t j) const {
    const Truth &t = truths[s];
    if (!has_exact || j >= t.coded_length || j / call.exact.block_size >= call.exact_columns) return -1;
    if (j - t.start >= call.exact_first && j <= t.first_position - call.exact_recent) return -1;
    return exact_table[s * size_t(call.exact_stride) + size_t(j / call.exact.block_size)];
  }
  bool coded(size_t s, int64_t j) const { return j < truths[s].coded_length && exact_block_of(s, j) < 0; }
  bool needs_bad_block(size_t s) const {
    for (int64_t i = 0; i < truths[s].q_len; ++i) {
      for (int64_t j = 0; j < truths[s].length; ++j) {
        if (visible(truths[s], i, j) && exact_block_of(s, j) >= call.exact.num_blocks) return true;
      }
    }
    return false;
  }
  TileRange tiles(size_t s, int64_t token_block) const {
    const Truth &t = truths[s];
    TileRange range{1 << 20, 0};
    for (int64_t i = token_block * call.block_tokens; i < std::min(t.q_len, (token_block + 1) * call.block_tokens);
         ++i) {
      for (int64_t j = 0; j < t.coded_length && t.state == kGood; ++j) {
        if (!visible(t, i, j)) continue;
        range = {std::min(range.first, int32_t(j / 16)), std::max(range.end, int32_t(j / 16 + 1))};
      }
    }
    return range.first < range.end ? range : TileRange{0, 0};
  }

  // Made up: a coded key's score in units of log2, and its value in the rotated domain.
  static double hash(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    uint64_t x = ((a * 0x9e3779b97f4a7c15 + b) * 0xbf58476d1ce4e5b9 + c) * 0x94d049bb133111eb + d;
    x = (x ^ x >> 31) * 0x9e3779b97f4a7c15;
    return double((x ^ x >> 29) % 4001) / 1000 - 2;
  }
  static double score(int64_t token, int head, int64_t j) {
    return hash(uint64_t(token), uint64_t(head), uint64_t(j), 1);
  }
  static double level(size_t s, int kv_head, int64_t j, int c) {
    return hash(s, uint64_t(kv_head), uint64_t(j), uint64_t(c) + 2) * 20;
  }

  // The workspace, its partial results as attention would leave them.
  void make_work() {
    states.assign(size_t(num_seqs), -1);
    faulty.assign(size_t(num_seqs), -1);
    first_segments.assign(1, 0);
    for (size_t s = 0; s < size_t(num_seqs); ++s) {
      const Truth &t = truths[s];
      const int64_t blocks = t.state == kBadRows ? 0 : (t.q_len + call.block_tokens - 1) / call.block_tokens;
      for (int64_t block = 0; block < blocks; ++block) {
        const TileRange range = tiles(s, block);
        for (int64_t i = 0; i < call.head_parts * call.head_packs; ++i) {
          for (int split = 0; split < call.splits; ++split) {
            TileRange cut = range;
            if (call.split_tiles != 0) {
              cut = {std::max(cut.first, split * call.split_tiles), std::min(cut.end, (split + 1) * call.split_tiles)};
              if (cut.first >= cut.end) cut = {0, 0};
            }
            parts.push_back({s, block, i / call.head_packs, i % call.head_packs, cut});
          }
        }
      }
      first_segments.push_back(int64_t(parts.size()));
    }
    first_units.assign(1, 0);
    for (const Part &part : parts) {
      const int tiles = part.tiles.end - part.tiles.first;
      first_units.push_back(first_units.back() + (tiles > 0 ? tiles + call.item_units : 0));
    }
    call.max_segments = int64_t(parts.size()) + call.splits * random.below(3);
    const int rows = call.block_tokens * call.block_heads;
    const int64_t states_bytes = partial_outputs(call.pack_heads, rows);
    call.slot_bytes = (states_bytes + int64_t{call.pack_heads} * rows * dim_v * 4 + 15) / 16 * 16;
    partials.assign(size_t((call.blocks + call.max_segments) * call.slot_bytes), 0xff);
    const int64_t units = first_units.back();
    for (int64_t b = 0; b < call.blocks; ++b) {
      for (size_t i = 0; i < parts.size(); ++i) {
        const Part &part = parts[i];
        int64_t first = first_units[i], end = first_units[i + 1];
        const int64_t begin_b = b * units / call.blocks, end_b = (b + 1) * units / call.blocks;
        if (call.split_tiles != 0) {
          if (first < begin_b || first >= end_b) continue;
        } else {
          first = std::max(first, begin_b);
          end = std::min(end, end_b);
        }
        first = tiles_before(int64_t(i), first);
        end = tiles_before(int64_t(i), end);
        if (first >= end) continue;
        uint8_t *slot = partials.data() + (b + int64_t(i)) * call.slot_bytes;
        const int64_t low = (part.tiles.first + first) * 16, high = low + (end - first) * 16;
        for (int h = 0; h < call.pack_heads; ++h) {
          for (int r = 0; r < rows; ++r) {
            const Truth &t = truths[part.s];
            const int64_t token = part.token_block * call.block_tokens + r / call.block_heads;
            const int in_group = int(part.head_part) * call.block_heads + r % call.block_heads;
            if (token >= t.q_len || in_group >= group) continue;
            const int kv_head = int(part.head_pack) * call.pack_heads + h, head = kv_head * group + in_group;
            double max = -kInfinity, sum = 0;
            std::vector<double> output(size_t(dim_v), 0);
            const auto seen = [&](int64_t j) { return visible(t, token, j) && coded(part.s, j); };
            for (int64_t j = low; j < high; ++j) {
              if (seen(j)) max = std::max(max, score(t.begin + token, head, j));
            }
            for (int64_t j = low; j < high; ++j) {
              if (!seen(j)) continue;
              const double weight = std::exp2(score(t.begin + token, head, j) - max);
              sum += weight;
              for (int c = 0; c < dim_v; ++c) output[size_t(c)] += weight * level(part.s, kv_head, j, c);
            }
            const float state[2] = {float(max), float(sum)};
            const int index = h * rows + r;
            std::memcpy(slot + index * 8, state, 8);
            if (max == -kInfinity) continue;
            for (int c = 0; c < dim_v; ++c) {
              const float x = float(output[size_t(c)]);
              std::memcpy(slot + states_bytes + (int64_t{index} * dim_v + c) * 4, &x, 4);
            }
          }
        }
      }
    }
    const auto count = size_t(call.max_segments), slots = count + size_t(call.blocks);
    sequence_segments.assign(size_t(num_seqs) + 1, -1);
    segment_units.assign(count + 1, -1);
    segments.assign(count, {-1, -1, -1, -1, -1, -1, -1, -1});
    items.assign(slots, {-1, -1, -1, -1, -1, -1, -1, -1});
    block_items.assign(size_t(call.blocks), {-1, -1});
    call.segments = segments.data();
    call.items = items.data();
    call.block_items = block_items.data();
    call.sequence_states = states.data();
    call.sequence_faults = faulty.data();
    call.sequence_segments = sequence_segments.data();
    call.segment_units = segment_units.data();
    call.partials = partials.data();
    call.operand_bytes = (dim_k + 31) / 32 * 32;
    operands.assign(size_t(call.num_tokens * call.q_heads * 2 * call.operand_bytes), 0x55);
    query_rows.resize(size_t(call.num_tokens * call.q_heads));
    call.query_operands = operands.data();
    call.query_rows = query_rows.data();
  }

  // Tiles of a segment that are before a unit.
  int64_t tiles_before(int64_t segment, int64_t unit) const {
    const int64_t begin = first_units[size_t(segment)], end = first_units[size_t(segment) + 1];
    return std::clamp(unit - begin - call.item_units, int64_t{0}, std::max(end - begin - call.item_units, int64_t{0}));
  }

  void check_schedule() {
    for (size_t s = 0; s < size_t(num_seqs); ++s) {
      CHECK(states[s] == truths[s].state);
      if (!has_exact) CHECK(faulty[s] == 0);
    }
    REQUIRE(sequence_segments == first_segments);
    segment_units.resize(first_units.size());
    REQUIRE(segment_units == first_units);
    const int64_t units = first_units.back();
    const auto same = [&](const AttentionItem &item, const Part &part) {
      return size_t(item.sequence) == part.s && item.token_block == part.token_block &&
             item.head_part == part.head_part && item.head_pack == part.head_pack;
    };
    std::vector<int64_t> done(parts.size(), 0);  // tiles
    std::vector<int32_t> first_slots(parts.size(), 0), end_slots(parts.size(), 0);
    for (int64_t b = 0; b < call.blocks; ++b) {
      INFO("block " << b << " of " << call.blocks << ", " << units << " units");
      const int64_t begin_b = b * units / call.blocks, end_b = (b + 1) * units / call.blocks;
      const BlockItems own = block_items[size_t(b)];
      int64_t of_block = 0;
      for (int32_t slot = own.first; slot < own.first + own.count; ++slot) {
        const auto i = size_t(slot - b);
        REQUIRE(i < parts.size());
        const AttentionItem &item = items[size_t(slot)];
        REQUIRE(same(item, parts[i]));
        REQUIRE(item.first_tile <= item.end_tile);
        const bool at_end = slot == own.first || slot == own.first + own.count - 1;
        if (item.first_tile == item.end_tile) {
          CHECK(!at_end);
          CHECK(tiles_before(int64_t(i), begin_b) == tiles_before(int64_t(i), end_b));
          continue;
        }
        if (done[i] == 0) first_slots[i] = slot;
        end_slots[i] = slot + 1;
        CHECK(item.first_tile == parts[i].tiles.first + done[i]);
        if (call.split_tiles == 0) {
          CHECK(done[i] == tiles_before(int64_t(i), begin_b));
          CHECK(done[i] + item.end_tile - item.first_tile == tiles_before(int64_t(i), end_b));
        } else {
          CHECK((begin_b <= first_units[i] && first_units[i] < end_b));
        }
        done[i] += item.end_tile - item.first_tile;
        of_block += item.end_tile - item.first_tile;
      }
      if (of_block == 0) CHECK(own.count == 0);
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      REQUIRE(done[i] == parts[i].tiles.end - parts[i].tiles.first);
      REQUIRE(same(segments[i], parts[i]));
      CHECK((segments[i].first_slot == first_slots[i] && segments[i].end_slot == end_slots[i]));
      CHECK((done[i] == 0 || segments[i].first_tile == parts[i].tiles.first));
    }
  }

  void check_queries(const QueryOrder &order) {
    const tqkv::Side &k = codec->k;
    for (int64_t row = 0; row < call.num_tokens * call.q_heads; ++row) {
      std::vector<float> x(size_t(dim_k), 0);
      bool finite = true;
      double offset = 0, level_norm = 0, norm = 0, exact = 0;
      const int kv_head = int(row % call.q_heads) / group;
      for (int c = 0; c < dim_k; ++c) {
        x[size_t(c)] = q.get(row / call.q_heads, int(row % call.q_heads), c);
        finite = finite && std::isfinite(x[size_t(c)]);
        if (call.key_offset != nullptr)
          offset += double(x[size_t(c)]) * double(key_offset[size_t(kv_head * dim_k + c)]);
      }
      const QueryRow &result = query_rows[size_t(row)];
      std::vector<uint8_t> high, low;
      for (int i = 0; i < 2 * call.operand_bytes; ++i) {
        (i % 8 < 4 ? high : low).push_back(operands[size_t(row * 2 * call.operand_bytes + i)]);
      }
      if (!finite) {
        CHECK(std::isnan(result.gain));
        CHECK(std::count(high.begin(), high.end(), 0) + std::count(low.begin(), low.end(), 0) ==
              2 * call.operand_bytes);
        continue;
      }
      tqkv::rotate(k, x.data());
      int64_t sum = 256 * int64_t{result.bias_high} + result.bias_low;
      CHECK(std::abs(result.bias_low) <= 128);
      for (int i = 0; i < call.operand_bytes; ++i) {
        if (order.channel[i] < 0) {
          CHECK((high[size_t(i)] == 0 && low[size_t(i)] == 0));
          continue;
        }
        const int byte = call.k_uniform ? 64 * random.below(4) : random.below(256) - 128;
        const double of_key = call.k_uniform ? byte / 32.0 - 3 : 2 * byte + 1, y = double(x[size_t(order.channel[i])]);
        sum += byte * (256 * int(int8_t(high[size_t(i)])) + int(int8_t(low[size_t(i)])));
        exact += y * of_key;
        level_norm += of_key * of_key;
        norm += y * y;
      }
      const double gain = double(call.scale) * kLog2E, decode_gain = double(k.decode_gain);
      const double tolerance = gain * decode_gain * std::sqrt(norm * level_norm) * 1e-4 + 1e-5;
      CHECK(std::abs(double(result.gain) * double(sum) - gain * decode_gain * exact) < tolerance);
      CHECK(std::abs(double(result.offset) - gain * offset) < 1e-4);
    }
  }

  void check_rows(float identity_gain) {
    uint64_t bad_lengths = 0, bad_blocks = 0;
    std::vector<bool> written(size_t(call.num_tokens), false);
    for (size_t s = 0; s < size_t(num_seqs); ++s) {
      const Truth &t = truths[s];
      bad_lengths += t.state != kGood;
      if (t.state == kBadRows) continue;
      const bool bad_block = t.state == kGood && needs_bad_block(s);
      bad_blocks += bad_block;
      CHECK((faulty[s] != 0) == bad_block);
      for (int64_t i = 0; i < t.q_len; ++i) {
        written[size_t(t.begin + i)] = true;
        for (int head = 0; head < call.q_heads; ++head)
          check_row(s, i, head, t.state == kGood && !bad_block, identity_gain);
      }
    }
    CHECK(faults.count[TQ_FAULT_LENGTH] == bad_lengths);
    CHECK(faults.count[TQ_FAULT_BLOCK] == bad_blocks);
    for (int t = 0; t < call.num_tokens; ++t) {
      for (int h = 0; h < call.q_heads && !written[size_t(t)]; ++h) {
        CHECK(lse[size_t(t * call.q_heads + h)] == kUntouched);
        for (int c = 0; c < dim_v; ++c)
          REQUIRE(out.bytes[size_t(out.index(t, h, c) * tqkv::type_bytes(out.type))] == 0x77);
      }
    }
  }

  void check_row(size_t s, int64_t i, int head, bool good, float identity_gain) {
    const Truth &t = truths[s];
    const int kv_head = head / group;
    const int64_t token = t.begin + i;
    double z = 0;
    bool any = false;
    std::vector<float> sums(size_t(dim_v), 0);
    std::vector<double> raw(size_t(dim_v), 0), coded_sums(size_t(dim_v), 0);
    for (int64_t j = 0; j < t.length && good; ++j) {
      if (!visible(t, i, j)) continue;
      any = true;
      if (coded(s, j)) {
        const double weight = std::exp2(score(token, head, j));
        z += weight;
        for (int c = 0; c < dim_v; ++c) coded_sums[size_t(c)] += weight * level(s, kv_head, j, c);
        continue;
      }
      const auto element = [&](bool value, int c) {
        if (j >= t.coded_length) return (value ? v_new : k_new).get(t.begin + j - t.coded_length, kv_head, c);
        const int64_t slot = exact_block_of(s, j) * call.exact.block_size + j % call.exact.block_size;
        const int storage = std::max(call.exact.block_size, 16);
        const uint8_t *tile = exact_pool.data() + slot / storage * call.exact.block_stride +
                              slot % storage / 16 * call.exact.tile_stride + kv_head * call.exact.head_stride;
        return load_element(tile + (value ? call.exact.v_codes : 0), call.raw_type,
                            slot % 16 * (value ? dim_v : dim_k) + c);
      };
      double x = 0;
      for (int c = 0; c < dim_k; ++c) x += double(q.get(token, head, c)) * double(element(false, c));
      x *= double(call.scale);
      if (call.soft_cap > 0) x = double(call.soft_cap) * std::tanh(x / double(call.soft_cap));
      if (call.alibi_slopes != nullptr) x += double(slopes[size_t(head)]) * double(j - position(t, i));
      const double weight = std::exp(x);
      z += weight;
      for (int c = 0; c < dim_v; ++c) raw[size_t(c)] += weight * double(element(true, c));
    }
    if (call.sinks != nullptr) z += std::exp(double(sinks[size_t(head)]));
    const float got_lse = lse[size_t(token * call.q_heads + head)];
    INFO("sequence " << s << " token " << i << " head " << head);
    if (!any) {
      CHECK(double(got_lse) == -kInfinity);
      for (int c = 0; c < dim_v; ++c) REQUIRE(out.get(token, head, c) == 0);
      return;
    }
    CHECK((std::isnan(z) ? std::isnan(got_lse) : std::abs(double(got_lse) - std::log(z)) < 1e-4));
    for (int c = 0; c < dim_v; ++c) sums[size_t(c)] = float(coded_sums[size_t(c)] / z);
    if (!dense) tqkv::rotate_back(codec->v, sums.data());
    const double gain = double(dense ? identity_gain : codec->v.decode_gain),
                 rounding = out.type == TQ_TYPE_BF16 ? 8e-3 : 1e-3;
    for (int c = 0; c < dim_v; ++c) {
      const double expected = double(sums[size_t(c)]) * gain + raw[size_t(c)] / z,
                   got = double(out.get(token, head, c));
      INFO("channel " << c << ": " << got << ", expected " << expected);
      if (!std::isfinite(expected)) {
        REQUIRE(std::isnan(got));
      } else {
        REQUIRE(std::abs(got - expected) < rounding * (1 + std::abs(expected)));
      }
    }
  }
};

__global__ void describe_all(AttentionCall call, Sequence *sequences) {
  for (int64_t s = threadIdx.x; s < call.num_seqs; s += 32) sequences[s] = read_sequence(call, s, 0);
}

}  // namespace

TEST_CASE("attention's sequences, tiles, queries and merge are what tqkv.h says") {
  Random random{std::mt19937_64(tqkv_test::seed())};
  INFO("repeat with TQKV_TEST_SEED=" << tqkv_test::seed());
  for (int times = 0; times < 45; ++times) {
    Case c(random, times >= 40);
    INFO("case " << times << ": " << c.num_seqs << " sequences, head_dim " << c.dim_k << " and " << c.dim_v << ", "
                 << c.kv_heads << " kv heads of " << c.group << ", block of " << c.call.block_tokens << " tokens and "
                 << c.call.block_heads << " heads");
    char stream;
    std::vector<Sequence> sequences(size_t(c.num_seqs));
    REQUIRE(launch(describe_all, 1, 32, 0, &stream, c.call, sequences.data()) == 0);
    for (size_t s = 0; s < sequences.size(); ++s) {
      const Truth &truth = c.truths[s];
      if (truth.state == kBadRows) continue;
      CHECK(sequences[s].state == truth.state);
      const int64_t blocks = (truth.q_len + c.call.block_tokens - 1) / c.call.block_tokens;
      REQUIRE(token_blocks(c.call, sequences[s]) == blocks);
      for (int32_t block = 0; block < blocks; ++block) {
        const TileRange got = tile_range(c.call, sequences[s], block), expected = c.tiles(s, block);
        CHECK(got.first == expected.first);
        CHECK(got.end == expected.end);
      }
      for (int32_t j = 0; j < 320 && truth.state == kGood && j < truth.coded_length; ++j) {
        REQUIRE(is_exact(c.call, sequences[s], j) == !c.coded(s, j));
      }
    }

    QueryOrder order;
    for (int i = 0; i < kMaxDim; ++i) order.channel[i] = int16_t(i < c.dim_k ? c.dim_k - 1 - i : -1);
    const auto &params = c.codec->cuda->params;
    REQUIRE(launch_attention_prepare(c.call, params[0], order, nullptr, &stream) == 0);
    c.check_schedule();
    c.check_queries(order);

    std::fill(c.out.bytes.begin(), c.out.bytes.end(), uint8_t{0x77});
    const float gain = 0.125f;
    if (c.dense) {
      const size_t count = size_t(c.call.num_tokens * c.call.q_heads * c.dim_v);
      std::vector<float> merged(count, NAN), raw(count, NAN);
      REQUIRE(launch_attention_finish(c.call, params[1], merged.data(), raw.data(), &stream) == 0);
      REQUIRE(launch_attention_write(c.call, gain, merged.data(), raw.data(), &stream) == 0);
    } else {
      REQUIRE(launch_attention_finish(c.call, params[1], nullptr, nullptr, &stream) == 0);
    }
    c.check_rows(gain);

    // Its bits do not depend on how many rows a block takes.
    if (!c.fixed_split || c.dense) continue;
    c.call.faults = nullptr;
    std::vector<uint8_t> outputs[2];
    for (int i = 0; i < 2; ++i) {
      c.call.blocks = i == 0 ? 1 : kMaxAttentionBlocks;
      REQUIRE(launch_attention_finish(c.call, params[1], nullptr, nullptr, &stream) == 0);
      outputs[i] = c.out.bytes;
    }
    REQUIRE(outputs[0] == outputs[1]);
  }
}

TEST_CASE("queries that are rotated elsewhere are the same operands") {
  Random random{std::mt19937_64(tqkv_test::seed())};
  Case c(random);
  char stream;
  QueryOrder order;
  for (int i = 0; i < kMaxDim; ++i) order.channel[i] = int16_t(i < c.dim_k ? i : -1);
  const size_t rows = size_t(c.call.num_tokens * c.call.q_heads);
  std::vector<float> rotated(rows * size_t(c.dim_k));
  REQUIRE(launch_attention_widen(c.call, rotated.data(), &stream) == 0);
  for (size_t row = 0; row < rows; ++row) tqkv::rotate(c.codec->k, rotated.data() + row * size_t(c.dim_k));
  REQUIRE(launch_attention_prepare(c.call, c.codec->cuda->params[0], order, rotated.data(), &stream) == 0);
  c.check_queries(order);
}
