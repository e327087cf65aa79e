// SPDX-License-Identifier: Apache-2.0
// Attention on the CPU. The work is cut into pieces: a sequence, a kv head, up to kRowBlock query rows of it, and a
// split of the keys. A piece walks its keys in chunks (score, online softmax, weighted sum) and leaves a partial state;
// then every row merges its splits in order. Coded keys are scored against rotated queries and coded values summed in
// the rotated domain; raw ones (exact pages, the call's own tokens, raw sides) use the queries and a sum of their own.
#include "attention/cpu.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/call.hpp"
#include "codec/quantize.hpp"

namespace tqkv {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

const AttentionKernels &kernels_of(const Codec &codec) {
  switch (codec.simd) {
#ifdef TQKV_HAVE_AVX2
    case TQ_SIMD_AVX2:
      return kAttentionAvx2;
#endif
#ifdef TQKV_HAVE_AVX512
    case TQ_SIMD_AVX512:
      return kAttentionAvx512;
#endif
#ifdef TQKV_HAVE_NEON
    case TQ_SIMD_NEON:
      return kAttentionNeon;
#endif
    default:
      return kAttentionScalar;
  }
}

// What the workspace says of each sequence.
enum SequenceState : int32_t {
  kGood = 0,
  kBadRows,    // its rows of q are not known: nothing is written
  kBadLength,  // zeros and -inf
  kBadBlock    // likewise; found by a piece
};

struct Sequence {
  int64_t begin = 0, q_len = 0;  // rows of q
  int64_t length = 0, start = 0;
  int64_t coded_length = 0;  // keys before this are in pages, the others in k_new
  int64_t table_columns = 0;
  const int32_t *table = nullptr;
  const int32_t *exact_table = nullptr;
  int64_t first_position = 0;

  int64_t position(const AttentionCall &call, int64_t i) const {
    return call.q_positions != nullptr ? call.q_positions[begin + i] : length - q_len + i;
  }
};

// Reads what describes sequence s. `rows_end` is the end of the rows of the sequences before it.
SequenceState read_sequence(const AttentionCall &call, int64_t s, int64_t rows_end, Sequence *result) {
  Sequence sequence;
  sequence.begin = call.cu_seqlens_q != nullptr ? call.cu_seqlens_q[s] : s;
  const int64_t end = call.cu_seqlens_q != nullptr ? call.cu_seqlens_q[s + 1] : s + 1;
  if (sequence.begin < rows_end || end < sequence.begin || end > call.num_tokens) return kBadRows;
  sequence.q_len = end - sequence.begin;
  sequence.length = call.lengths[s];
  sequence.start = call.starts != nullptr ? std::max(call.starts[s], 0) : 0;
  sequence.coded_length = call.k_new.data == nullptr ? sequence.length : sequence.length - sequence.q_len;
  if (call.block_table != nullptr) {
    sequence.table = call.block_table + s * call.table_stride;
    sequence.table_columns = call.table_columns;
  } else {
    const int64_t first = call.block_indptr[s], last = call.block_indptr[s + 1];
    const bool valid = first >= 0 && last >= first && last <= call.num_block_indices;
    sequence.table = valid ? call.block_indices + first : nullptr;
    sequence.table_columns = valid ? last - first : -1;
  }
  if (call.has_exact) sequence.exact_table = call.exact_table + s * call.exact_stride;
  *result = sequence;
  if (sequence.length == 0) return sequence.q_len > call.max_q_len ? kBadLength : kGood;
  if (sequence.length < 0 || sequence.length > call.max_length || sequence.q_len > call.max_q_len ||
      sequence.coded_length < 0 || sequence.table_columns < 0 ||
      sequence.coded_length > sequence.table_columns * call.pool.block_size) {
    return kBadLength;
  }
  result->first_position = sequence.q_len > 0 ? sequence.position(call, 0) : 0;
  return kGood;
}

// Where a key and its value are read.
enum class Source : uint8_t { kNone, kPool, kExact, kNew };

struct Interval {
  int64_t low, high;
};

Interval visible_keys(const AttentionCall &call, const Sequence &sequence, int64_t position) {
  Interval keys{sequence.start, sequence.length};
  if (call.causal) keys.high = std::min(keys.high, position + 1);
  if (call.window > 0) keys.low = std::max(keys.low, position - call.window + 1);
  return keys;
}

// Copies the codes of `count` tokens from a row of one tile to a row of another.
void copy_rows(const Side &side, const uint8_t *from, int from_row, uint8_t *to, int to_row, int count) {
  for (int plane = 0; plane < 2; ++plane) {
    const int bytes = plane_bytes(side.head_dim, side.bits, plane);
    if (side.side == TQ_SIDE_K) {
      std::memcpy(to + to_row * bytes, from + from_row * bytes, size_t(count * bytes));
    } else {
      const bool groups = (from_row | to_row | count) % 4 == 0;  // of 4 tokens, which adjoin in a word
      for (int t = 0, step = groups ? count : 1; t < count; t += step) {
        for (int e = 0; e < bytes; e += 4) {
          const int word_bytes = std::min(4, bytes - e);
          const uint8_t *source = from + v_plane_offset(bytes, e, from_row + t);
          uint8_t *target = to + v_plane_offset(bytes, e, to_row + t);
          if (groups) {
            std::memcpy(target, source, size_t(count * word_bytes));
          } else {
            for (int i = 0; i < 4 * word_bytes; i += 4) target[i] = source[i];
          }
        }
      }
    }
    from += kTileTokens * bytes;
    to += kTileTokens * bytes;
  }
}

class Piece {
 public:
  Piece(const AttentionCall &call, const AttentionWorkspace &workspace, const Sequence &sequence, int kv_head)
      : call_(call), kernels_(kernels_of(*call.codec)), workspace_(workspace), sequence_(sequence), kv_head_(kv_head) {}

  // Rows: tokens [token_begin, token_end) of the sequence, heads [head_begin, head_end) of the group. False if a needed
  // block id is bad.
  bool run(int64_t token_begin, int64_t token_end, int head_begin, int head_end, int64_t split) {
    const int64_t split_begin = split * call_.split_tokens;
    Interval range{std::numeric_limits<int64_t>::max(), 0};
    rows_ = 0;
    for (int64_t token = token_begin; token < token_end; ++token) {
      const int64_t position = sequence_.position(call_, token);
      const Interval keys = visible_keys(call_, sequence_, position);
      const Interval mine{std::max(keys.low, split_begin), std::min(keys.high, split_begin + call_.split_tokens)};
      if (mine.low < mine.high) range = {std::min(range.low, mine.low), std::max(range.high, mine.high)};
      for (int head = head_begin; head < head_end; ++head) {
        add_row(sequence_.begin + token, kv_head_ * call_.group + head, position, mine);
      }
    }
    for (int64_t chunk = range.low / kTileTokens * kTileTokens; chunk < range.high; chunk += kChunkTokens) {
      if (!run_chunk(chunk, int(std::min<int64_t>(kChunkTokens, range.high - chunk)))) return false;
    }
    for (int r = 0; r < rows_; ++r) write_state(r, split);
    return true;
  }

 private:
  struct Row {
    int64_t token, head, position;
    Interval keys;
    float max = kMinusInfinity, sum = 0;
  };

  bool k_coded() const { return !call_.codec->k.raw(); }
  bool v_coded() const { return !call_.codec->v.raw(); }

  void add_row(int64_t token, int64_t head, int64_t position, Interval keys) {
    const Codec &codec = *call_.codec;
    const int dim = codec.k.head_dim, r = rows_++;
    row_[r] = Row{token, head, position, keys};
    float *query = queries_ + r * kMaxHeadDim;
    codec.kernels->to_f32(call_.q.row(token, head), call_.q.type, dim, query);
    for (int c = 0; c < dim; ++c) query[c] *= call_.scale;
    if (k_coded()) {
      const auto *rotated = reinterpret_cast<const float *>(call_.workspace + workspace_.queries);
      std::copy_n(rotated + (token * call_.q_heads + head) * dim, dim, rotated_ + r * kMaxHeadDim);
    }
    bias_[r] = 0;
    if (call_.key_offset != nullptr) {
      const float *offset = call_.key_offset + int64_t{kv_head_} * dim;
      double sum = 0;
      for (int c = 0; c < dim; ++c) sum += double(query[c]) * double(offset[c]);
      bias_[r] = float(sum);
    }
    std::fill_n(coded_ + r * kMaxHeadDim, codec.v.head_dim, 0.0f);
    std::fill_n(raw_ + r * kMaxHeadDim, codec.v.head_dim, 0.0f);
  }

  // The pool's tile whose rows are the keys j .. j + kTileTokens - 1, the ones before `high` needed; null if there is
  // none, or a block is bad.
  const uint8_t *whole_tile(int64_t j, int64_t high) const {
    const Pool &pool = call_.pool;
    const uint32_t size = uint32_t(pool.block_size), position = uint32_t(j);
    const int32_t *blocks = sequence_.table + position / size;
    if (!pool.has_block(blocks[0])) return nullptr;
    if (size >= kTileTokens) {
      return pool.base + blocks[0] * pool.block_stride + position % size / kTileTokens * pool.tile_stride +
             kv_head_ * pool.head_stride;
    }
    // Small blocks must follow each other, from the first row of a tile on.
    const int count = kTileTokens / int(size);
    if (j + kTileTokens > high || blocks[0] % count != 0 || !pool.has_block(int64_t{blocks[0]} + count - 1)) {
      return nullptr;
    }
    for (int i = 1; i < count; ++i) {
      if (blocks[i] != blocks[0] + i) return nullptr;
    }
    return pool.tile(int64_t{blocks[0]} * size, kv_head_);
  }

  // Whether all keys of [low, high) are read from the pool's codes.
  bool all_coded(int64_t low, int64_t high) const {
    if (!k_coded() || !v_coded() || high > sequence_.coded_length) return false;
    return !call_.has_exact ||
           (low - sequence_.start >= call_.exact_first && high - 1 <= sequence_.first_position - call_.exact_recent);
  }

  // Decides where each key of the chunk is read, and finds its tile or slot. Keys that no row sees have no source,
  // unless their tile is whole.
  bool find_sources(int64_t chunk, int n) {
    single_ = false;
    for (int begin = 0; begin < n; begin += kTileTokens) {
      Interval seen{kChunkTokens, 0};  // of the tile, by any row
      const int end = std::min(begin + kTileTokens, n);
      for (int r = 0; r < rows_; ++r) {
        const int64_t low = std::max<int64_t>(row_[r].keys.low - chunk, begin);
        const int64_t high = std::min<int64_t>(row_[r].keys.high - chunk, end);
        if (low < high) seen = {std::min(seen.low, low), std::max(seen.high, high)};
      }
      Tile &tile = tiles_[begin / kTileTokens];
      tile = Tile{};
      if (seen.low >= seen.high) continue;
      tile.seen = true;
      if (all_coded(chunk + seen.low, chunk + seen.high)) tile.whole = whole_tile(chunk + begin, chunk + seen.high);
      if (tile.whole != nullptr) {
        __builtin_prefetch(tile.whole + call_.pool.layout.k_scales);
        continue;
      }
      single_ = true;
      std::fill_n(source_ + begin, kTileTokens, Source::kNone);
      for (int r = 0; r < rows_; ++r) {
        const int64_t low = std::max<int64_t>(row_[r].keys.low - chunk, begin);
        const int64_t high = std::min<int64_t>(row_[r].keys.high - chunk, end);
        for (int64_t t = low; t < high; ++t) source_[t] = Source::kPool;
      }
      for (int t = begin; t < end; ++t) {
        if (source_[t] != Source::kNone && !find_source(chunk, t)) return false;
      }
    }
    return true;
  }

  bool find_source(int64_t chunk, int t) {
    const int exact_size = call_.codec->exact_block_size, size = call_.codec->block_size;
    const int64_t j = chunk + t;
    if (j >= sequence_.coded_length) {
      source_[t] = Source::kNew;
      return true;
    }
    if (call_.has_exact && j / exact_size < call_.exact_columns &&
        (j - sequence_.start < call_.exact_first || j > sequence_.first_position - call_.exact_recent)) {
      const int64_t block = sequence_.exact_table[j / exact_size];
      if (block >= 0) {
        source_[t] = Source::kExact;
        slot_[t] = block * exact_size + j % exact_size;
        return call_.exact.has_block(block);
      }
    }
    const int64_t block = sequence_.table[j / size];
    slot_[t] = block * size + j % size;
    return call_.pool.has_block(block);
  }

  // The coded keys or values of the tile that begins at chunk position `begin`, and their scales; null if none is
  // needed. A tile in the pool is used where it is; keys from several are gathered into `gathered`. Scales of keys that
  // have another source are zero.
  const uint8_t *find_tile(int which, int begin, uint8_t *gathered) {
    const Pool &pool = call_.pool;
    const Side &side = which == TQ_SIDE_K ? *pool.k : *pool.v;
    const int64_t codes = which == TQ_SIDE_K ? pool.layout.k_codes : pool.layout.v_codes;
    const int64_t scales_at = which == TQ_SIDE_K ? pool.layout.k_scales : pool.layout.v_scales;
    const Tile &tile = tiles_[begin / kTileTokens];
    float *scales = scales_ + begin;
    const auto read_scales = [&](const uint8_t *from, int row, int count, float *output) {
      call_.codec->kernels->to_f32(from + scales_at + row * side.scale_bytes(), side.scale_type, count, output);
    };
    if (!tile.seen) return nullptr;
    if (tile.whole != nullptr) {
      read_scales(tile.whole, 0, kTileTokens, scales);
      return tile.whole + codes;
    }
    std::fill_n(scales, kTileTokens, 0.0f);
    const uint8_t *found = nullptr;
    for (int t = 0, count; t < kTileTokens; t += count) {
      count = 1;
      if (source_[begin + t] != Source::kPool) continue;
      const int64_t slot = slot_[begin + t];
      const int row = int(slot % kTileTokens);
      const uint8_t *from = pool.tile(slot, kv_head_);
      while (std::max(t, row) + count < kTileTokens && source_[begin + t + count] == Source::kPool &&
             slot_[begin + t + count] == slot + count) {
        ++count;
      }
      read_scales(from, row, count, scales + t);
      if (pool.block_size >= kTileTokens) {
        found = from + codes;
        continue;
      }
      if (found == nullptr) std::memset(gathered, 0, size_t(kTileTokens * side.code_bytes()));
      copy_rows(side, from + codes, row, gathered, t, count);
      found = gathered;
    }
    return found;
  }

  // body(first position, tiles, their number) for runs of tiles that hold coded keys or values; their scales are in
  // scales_.
  template <class Body>
  void for_coded_tiles(int which, int n, const Body &body) {
    const int tile_bytes = kTileTokens * call_.codec->side(which).code_bytes();
    const uint8_t *tiles[kChunkTokens / kTileTokens];
    int first = 0, count = 0, gathered = 0;  // the last: bytes of gathered_ in use
    const auto flush = [&] {
      if (count > 0) body(first, tiles, count);
      count = gathered = 0;
    };
    for (int begin = 0; begin < n; begin += kTileTokens) {
      if (gathered + tile_bytes > int(sizeof gathered_)) flush();
      const uint8_t *codes = find_tile(which, begin, gathered_ + gathered);
      if (codes == nullptr) {
        flush();
        continue;
      }
      if (count == 0) first = begin;
      tiles[count++] = codes;
      if (codes == gathered_ + gathered) gathered += tile_bytes;
    }
    flush();
  }

  // The raw row of a key or value at chunk position t, as f32.
  const float *find_row(int which, int64_t chunk, int t) {
    const Codec &codec = *call_.codec;
    const bool keys = which == TQ_SIDE_K;
    const int dim = codec.side(which).head_dim;
    if (source_[t] == Source::kNew) {
      const int64_t token = sequence_.begin + chunk + t - sequence_.coded_length;
      const Rows &rows = keys ? call_.k_new : call_.v_new;
      codec.kernels->to_f32(rows.row(token, kv_head_), rows.type, dim, raw_row_);
    } else {
      const Pool &pool = source_[t] == Source::kExact ? call_.exact : call_.pool;
      const uint8_t *tile = pool.tile(slot_[t], kv_head_);
      const int64_t codes = keys ? pool.layout.k_codes : pool.layout.v_codes;
      codec.kernels->to_f32(tile + codes + slot_[t] % kTileTokens * dim * 2, codec.raw_type, dim, raw_row_);
    }
    return raw_row_;
  }

  // body(t) for the chunk's keys or values that are raw.
  template <class Body>
  void for_raw_keys(int which, int n, const Body &body) {
    if (!single_) return;
    const bool raw_side = call_.codec->side(which).raw();
    for (int t = 0; t < n; ++t) {
      const Tile &tile = tiles_[t / kTileTokens];
      if (!tile.seen || tile.whole != nullptr || source_[t] == Source::kNone) continue;
      if (source_[t] != Source::kPool || raw_side) body(t);
    }
  }

  bool run_chunk(int64_t chunk, int n) {
    if (!find_sources(chunk, n)) return false;
    const Codec &codec = *call_.codec;
    constexpr float kNoBias[kRowBlock] = {};
    if (k_coded()) {
      for_coded_tiles(TQ_SIDE_K, n, [&](int first, const uint8_t *const *tiles, int count) {
        kernels_.score_tiles(codec.k, tiles, count, scales_ + first, rotated_, rows_, bias_, scores_ + first);
      });
    }
    for_raw_keys(TQ_SIDE_K, n, [&](int t) {
      kernels_.score_key(find_row(TQ_SIDE_K, chunk, t), codec.k.head_dim, queries_, rows_,
                         source_[t] == Source::kPool ? bias_ : kNoBias, scores_ + t);
    });

    for (int r = 0; r < rows_; ++r) {
      Row &row = row_[r];
      float *scores = scores_ + r * kChunkTokens;
      const int low = int(std::clamp<int64_t>(row.keys.low - chunk, 0, n));
      const int high = int(std::clamp<int64_t>(row.keys.high - chunk, 0, n));
      if (low >= high) {
        std::fill_n(scores, kChunkTokens, 0.0f);
        continue;
      }
      const float slope = call_.alibi_slopes != nullptr ? call_.alibi_slopes[row.head] : 0.0f;
      const float correction = kernels_.softmax(scores, kChunkTokens, low, high, call_.soft_cap, slope,
                                                float(chunk - row.position), &row.max, &row.sum);
      if (correction == 1.0f) continue;
      for (float *outputs : {coded_ + r * kMaxHeadDim, raw_ + r * kMaxHeadDim}) {
        for (int c = 0; c < codec.v.head_dim; ++c) outputs[c] *= correction;
      }
    }

    // Raw values first: add_tiles turns weights into weights times scales.
    for_raw_keys(TQ_SIDE_V, n, [&](int t) {
      kernels_.add_value(find_row(TQ_SIDE_V, chunk, t), codec.v.head_dim, scores_ + t, rows_, raw_);
    });
    if (v_coded()) {
      for_coded_tiles(TQ_SIDE_V, n, [&](int first, const uint8_t *const *tiles, int count) {
        kernels_.add_tiles(codec.v, tiles, count, scales_ + first, scores_ + first, rows_, coded_);
      });
    }
    return true;
  }

  void write_state(int r, int64_t split) {
    const Row &row = row_[r];
    const int dim = call_.codec->v.head_dim;
    float *state = reinterpret_cast<float *>(call_.workspace + workspace_.states) +
                   ((row.token * call_.q_heads + row.head) * call_.splits + split) * workspace_.state;
    state[0] = row.max;
    state[1] = row.sum;
    std::copy_n(coded_ + r * kMaxHeadDim, dim, state + 2);
    std::copy_n(raw_ + r * kMaxHeadDim, dim, state + 2 + dim);
  }

  const AttentionCall &call_;
  const AttentionKernels &kernels_;
  const AttentionWorkspace &workspace_;
  const Sequence &sequence_;
  const int kv_head_;
  int rows_ = 0;
  Row row_[kRowBlock];
  float bias_[kRowBlock];
  // The chunk: a tile of it that no row sees, that is one of the pool's, or whose keys have sources of their own.
  struct Tile {
    bool seen = false;
    const uint8_t *whole = nullptr;
  };
  Tile tiles_[kChunkTokens / kTileTokens];
  bool single_ = false;  // there are tiles of the last kind
  Source source_[kChunkTokens];
  int64_t slot_[kChunkTokens];
  alignas(64) float scales_[kChunkTokens];
  alignas(64) float queries_[kRowBlock * kMaxHeadDim];  // times the softmax scale
  alignas(64) float rotated_[kRowBlock * kMaxHeadDim];
  alignas(64) float coded_[kRowBlock * kMaxHeadDim];
  alignas(64) float raw_[kRowBlock * kMaxHeadDim];
  alignas(64) float scores_[kRowBlock * kChunkTokens];
  alignas(64) float raw_row_[kMaxHeadDim];
  alignas(64) uint8_t gathered_[4 * kTileTokens * kMaxHeadDim];
};

void rotate_queries(const AttentionCall &call, const AttentionWorkspace &workspace) {
  const Codec &codec = *call.codec;
  const int dim = codec.k.head_dim;
  auto *rotated = reinterpret_cast<float *>(call.workspace + workspace.queries);
  const float gain = call.scale * codec.k.decode_gain;
  codec.parallel->run(call.num_tokens, [&](int64_t token) {
    for (int64_t head = 0; head < call.q_heads; ++head) {
      float *query = rotated + (token * call.q_heads + head) * dim;
      codec.kernels->to_f32(call.q.row(token, head), call.q.type, dim, query);
      rotate(codec.k, query);
      for (int c = 0; c < dim; ++c) query[c] *= gain;
    }
  });
}

// Merges a row's splits in order, leaves the rotated domain and writes the output.
void finish_row(const AttentionCall &call, const AttentionWorkspace &workspace, int64_t token, int64_t head,
                bool good) {
  const Codec &codec = *call.codec;
  const int dim = codec.v.head_dim;
  const auto *states = reinterpret_cast<const float *>(call.workspace + workspace.states) +
                       (token * call.q_heads + head) * call.splits * workspace.state;
  float max = kMinusInfinity, lse = kMinusInfinity;
  for (int64_t split = 0; split < call.splits && good; ++split) max = std::max(max, states[split * workspace.state]);
  float out[kMaxHeadDim] = {}, raw[kMaxHeadDim] = {};
  if (good && max != kMinusInfinity) {
    if (call.sinks != nullptr) max = std::max(max, call.sinks[head]);
    double sum = call.sinks != nullptr ? double(std::exp(call.sinks[head] - max)) : 0;
    for (int64_t split = 0; split < call.splits; ++split) {
      const float *state = states + split * workspace.state;
      if (state[0] == kMinusInfinity) continue;
      const float factor = std::exp(state[0] - max);
      sum += double(factor) * double(state[1]);
      for (int c = 0; c < dim; ++c) out[c] += factor * state[2 + c];
      for (int c = 0; c < dim; ++c) raw[c] += factor * state[2 + dim + c];
    }
    if (!codec.v.raw()) rotate_back(codec.v, out);
    const float gain = codec.v.raw() ? 0.0f : codec.v.decode_gain, inverse = float(1 / sum);
    for (int c = 0; c < dim; ++c) out[c] = (out[c] * gain + raw[c]) * inverse;
    lse = float(double(max) + std::log(sum));
  }
  codec.kernels->from_f32(out, call.out.type, dim, const_cast<uint8_t *>(call.out.row(token, head)));
  if (call.lse != nullptr) call.lse[token * call.q_heads + head] = lse;
}

}  // namespace

void run_attention_cpu(const AttentionCall &call, const AttentionWorkspace &workspace) {
  const Codec &codec = *call.codec;
  auto *sequence_states = reinterpret_cast<int32_t *>(call.workspace + workspace.sequences);
  int64_t rows_end = 0;
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    Sequence sequence;
    sequence_states[s] = read_sequence(call, s, rows_end, &sequence);
    if (sequence_states[s] != kGood) count_fault(call.faults, TQ_FAULT_LENGTH, s);
    if (sequence_states[s] != kBadRows) rows_end = sequence.begin + sequence.q_len;
  }
  if (!codec.k.raw()) rotate_queries(call, workspace);

  // Pieces, numbered (sequence, split, kv head, tokens, heads), the last fastest: pieces that follow each other read the
  // same memory pages.
  const int64_t head_block = std::min(call.group, kRowBlock), head_blocks = (call.group + head_block - 1) / head_block;
  const int64_t token_block = kRowBlock / head_block;
  const int64_t token_blocks = (std::min<int64_t>(call.max_q_len, call.num_tokens) + token_block - 1) / token_block;
  const int64_t per_head = token_blocks * head_blocks, per_split = codec.kv_heads * per_head;
  const int64_t per_sequence = call.splits * per_split;
  codec.parallel->run(call.num_seqs * per_sequence, [&](int64_t index) {
    const int64_t s = index / per_sequence, split = index % per_sequence / per_split;
    const int64_t head = index % per_split / per_head;
    const int64_t tokens = index / head_blocks % token_blocks * token_block, heads = index % head_blocks * head_block;
    std::atomic_ref state(sequence_states[s]);
    Sequence sequence;
    if (state.load(std::memory_order_relaxed) != kGood) return;
    if (read_sequence(call, s, 0, &sequence) != kGood || tokens >= sequence.q_len) return;
    Piece piece(call, workspace, sequence, int(head));
    if (!piece.run(tokens, std::min(tokens + token_block, sequence.q_len), int(heads),
                   int(std::min<int64_t>(heads + head_block, call.group)), split)) {
      state.store(kBadBlock, std::memory_order_relaxed);
    }
  });

  codec.parallel->run(call.num_seqs * token_blocks, [&](int64_t index) {
    const int64_t s = index / token_blocks, begin = index % token_blocks * token_block;
    if (sequence_states[s] == kBadRows) return;
    if (sequence_states[s] == kBadBlock && begin == 0) count_fault(call.faults, TQ_FAULT_BLOCK, s);
    Sequence sequence;
    (void)read_sequence(call, s, 0, &sequence);
    // A sequence that is bad for having more rows than it may gets its zeros too.
    const bool last = index % token_blocks == token_blocks - 1;
    const int64_t end = last ? sequence.q_len : std::min(begin + token_block, sequence.q_len);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t head = 0; head < call.q_heads; ++head) {
        finish_row(call, workspace, sequence.begin + i, head, sequence_states[s] == kGood);
      }
    }
  });
}

void merge_states_cpu(const Codec &codec, const tq_merge_args &args) {
  const int64_t n = args.head_dim, element = type_bytes(args.type);
  constexpr int kPart = kMaxHeadDim;  // channels at a time
  codec.parallel->run(args.num_rows, [&](int64_t row) {
    float max = kMinusInfinity;
    for (int64_t i = 0; i < args.num_states; ++i) max = std::max(max, args.lse[i * args.num_rows + row]);
    // Weights are computed again for every part: the output may lie over the states, the new lse over the old.
    double sum = 0;
    const auto weight = [&](int64_t i) {
      const float lse = args.lse[i * args.num_rows + row];
      return lse == kMinusInfinity ? 0.0f : std::exp(lse - max);
    };
    for (int64_t i = 0; i < args.num_states; ++i) sum += double(weight(i));
    const float inverse = sum > 0 ? float(1 / sum) : 0.0f;
    for (int64_t c = 0; c < n; c += kPart) {
      const int count = int(std::min<int64_t>(kPart, n - c));
      float out[kPart] = {}, state[kPart];
      for (int64_t i = 0; i < args.num_states; ++i) {
        const float w = weight(i) * inverse;
        if (w == 0) continue;
        codec.kernels->to_f32(static_cast<const uint8_t *>(args.states) + ((i * args.num_rows + row) * n + c) * element,
                              args.type, count, state);
        for (int k = 0; k < count; ++k) out[k] += w * state[k];
      }
      codec.kernels->from_f32(out, args.type, count, static_cast<uint8_t *>(args.out) + (row * n + c) * element);
    }
    if (args.out_lse != nullptr) args.out_lse[row] = sum > 0 ? float(double(max) + std::log(sum)) : kMinusInfinity;
  });
}

}  // namespace tqkv
