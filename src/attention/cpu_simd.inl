// SPDX-License-Identifier: Apache-2.0
// The SIMD targets of attention. cpu_avx2.cpp, cpu_avx512.cpp and cpu_neon.cpp include this file, each compiled for its
// instruction set. Vector lanes are the tokens of a tile: codes are transposed to words of neighbouring tokens, and a
// channel's levels are looked up in registers and meet several rows there.
//
// Everything has internal linkage and nothing comes from std: of an inline function that several objects hold the
// linker keeps one copy for all of them, which must not be one of these.

#define HWY_IS_DEBUG_BUILD 0  // its assertions call libhwy, which is not linked
#include <hwy/highway.h>

#include "attention/cpu.hpp"
#include "codec/quantize.hpp"

HWY_BEFORE_NAMESPACE();
namespace tqkv {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, kTileTokens>;
using DI = hn::RebindToSigned<D>;
using DU = hn::RebindToUnsigned<D>;
using D4 = hn::Full128<float>;
using F = hn::Vec<D>;
using U = hn::Vec<DU>;
constexpr D d;
constexpr DI di;
constexpr DU du;

constexpr int kLanes = int(hn::MaxLanes(D()));
constexpr int kUnit = 16;  // channels whose words are taken together: head_dim is a multiple of it
constexpr int kMaxUnitWords = 4;

// Sums that are formed together, in registers: enough to hide the latency of an addition, few enough for 16 registers
// on AVX2 and 32 elsewhere.
constexpr int kRows = 4;
constexpr int kScoreTiles = kLanes == 16 ? 2 : 1;
constexpr int kScoreTokens = kScoreTiles * kTileTokens;
constexpr int kValueRows = kLanes == 8 ? 2 : kRows;
constexpr int kValueChannels = 4;

// Tiles are anywhere in memory, where the processor cannot foresee them: those of K are asked for one step ahead, those
// of V, which are read a word at a time, this many words ahead (measured).
constexpr int kWordsAhead = 4;
constexpr int kLineBytes = 64;

int min_of(int a, int b) {
  return a < b ? a : b;
}

// ---- words: word w of a plane for neighbouring tokens, at words[w * stride + token]

// Each block of 128 bits from the next group of 4 tokens.
template <class Tag>
HWY_INLINE hn::Vec<Tag> load_blocks(Tag tag, const uint8_t *bytes, int group_bytes) {
  if constexpr (hn::MaxLanes(Tag()) == 4) {
    return hn::BitCast(tag, hn::LoadU(hn::Full128<uint8_t>(), bytes));
  } else {
    constexpr hn::Half<Tag> half;
    constexpr int blocks = int(hn::MaxLanes(half) / 4);
    return hn::Combine(tag, load_blocks(half, bytes + blocks * group_bytes, group_bytes),
                       load_blocks(half, bytes, group_bytes));
  }
}

// All words of a K tile, the planes following each other.
void load_k_words(const Side &k, const uint8_t *codes, uint32_t *words, int stride) {
  for (int p = 0; p < 2; ++p) {
    const int bytes = plane_bytes(k.head_dim, k.bits, p);
    int e = 0;
    for (; e + 16 <= bytes; e += 16, words += 4 * stride) {
      for (int t = 0; t < kTileTokens; t += kLanes) {
        const uint8_t *block = codes + t * bytes + e;
        const U row0 = load_blocks(du, block, 4 * bytes), row1 = load_blocks(du, block + bytes, 4 * bytes);
        const U row2 = load_blocks(du, block + 2 * bytes, 4 * bytes),
                row3 = load_blocks(du, block + 3 * bytes, 4 * bytes);
        const hn::Repartition<uint64_t, DU> d64;
        const auto low01 = hn::BitCast(d64, hn::InterleaveLower(du, row0, row1));
        const auto low23 = hn::BitCast(d64, hn::InterleaveLower(du, row2, row3));
        const auto high01 = hn::BitCast(d64, hn::InterleaveUpper(du, row0, row1));
        const auto high23 = hn::BitCast(d64, hn::InterleaveUpper(du, row2, row3));
        hn::Store(hn::BitCast(du, hn::InterleaveLower(d64, low01, low23)), du, words + t);
        hn::Store(hn::BitCast(du, hn::InterleaveUpper(d64, low01, low23)), du, words + stride + t);
        hn::Store(hn::BitCast(du, hn::InterleaveLower(d64, high01, high23)), du, words + 2 * stride + t);
        hn::Store(hn::BitCast(du, hn::InterleaveUpper(d64, high01, high23)), du, words + 3 * stride + t);
      }
    }
    for (; e < bytes; e += 4, words += stride) {  // single words, and the half word that may end a plane
      for (int t = 0; t < kTileTokens; ++t) {
        words[t] = 0;
        __builtin_memcpy(words + t, codes + t * bytes + e, size_t(min_of(4, bytes - e)));
      }
    }
    codes += kTileTokens * bytes;
  }
}

// One word of a plane for all tokens of V tiles; the plane begins `start` bytes into a tile's codes.
void load_v_words(const uint8_t *const *codes, int num_tiles, int start, int bytes, int word, uint32_t *words) {
  alignas(16) static constexpr uint8_t kTranspose[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  const hn::Repartition<uint8_t, D> d8;
  const auto transpose = hn::LoadDup128(d8, kTranspose);
  for (int i = 0; i < num_tiles; ++i, words += kTileTokens) {
    const uint8_t *plane = codes[i] + start;
    if (bytes - 4 * word < 4) {  // a half word
      for (int t = 0; t < kTileTokens; ++t) {
        words[t] =
            uint32_t(plane[v_plane_offset(bytes, 4 * word, t)] | plane[v_plane_offset(bytes, 4 * word + 1, t)] << 8);
      }
      continue;
    }
    __builtin_prefetch(plane + 4 * kTileTokens * (word + kWordsAhead));
    for (int t = 0; t < kTileTokens; t += kLanes) {
      const auto bytes_of_4 = hn::LoadU(d8, plane + 4 * kTileTokens * word + 4 * t);
      hn::Store(hn::BitCast(du, hn::TableLookupBytes(bytes_of_4, transpose)), du, words + t);
    }
  }
}

// ---- levels

// Words that hold a unit's codes, the 1-bit plane of 3 bits apart.
constexpr int unit_words(int bits) {
  return bits == 1 ? 1 : bits / 2;
}

// How far a unit's words are shifted to bring a channel's bits in place.
struct Shifts {
  // Units of even and of odd number, and one whose 1-bit codes are in a half word.
  uint32_t first[3][kUnit], second[3][kUnit];
  int head_dim;

  explicit Shifts(const Side &side) : head_dim(side.head_dim) {
    for (int kind = 0; kind < 3; ++kind) {
      for (int i = 0; i < kUnit; ++i) {
        const int one = (kind == 2 ? plane1_bit(i, kUnit) : plane1_bit(kUnit * kind + i, 2 * kUnit)) & 31;
        const int down = side.bits == 4 ? 4 * (i % 8) : side.bits == 1 ? one : plane2_bit(i);
        first[kind][i] = uint32_t(side.bits == 8 ? 24 - 8 * (i % 4) : down);
        second[kind][i] = uint32_t(31 - (side.bits == 4 ? nibble_sign_bit(i) & 31 : one));
      }
    }
  }
  int kind(int unit) const { return unit % 2 == 0 && kUnit * (unit + 1) == head_dim ? 2 : unit % 2; }
};

// A codebook, looked up by the low bits of each lane.
class Table {
 public:
  explicit Table(const Side &side) {
    float entries[16];
    const int count = side.bits > 3 ? 8 : 1 << side.bits;  // at 4 bits: magnitudes
    for (int i = 0; i < 16; ++i) entries[i] = side.levels[i % count];
#if HWY_MAX_BYTES >= 32
    table_ = hn::LoadU(d, entries);
#else
    // Levels are odd integers below 256, which 16 bits hold: a table of 8 fits a vector of bytes.
    uint8_t bytes[16];
    for (int i = 0; i < 8; ++i) __builtin_memcpy(bytes + 2 * i, reinterpret_cast<uint8_t *>(entries + i) + 2, 2);
    table_ = hn::LoadU(hn::Full128<uint8_t>(), bytes);
#endif
  }

  HWY_INLINE F operator[](U index) const {
#if HWY_MAX_BYTES >= 32
    return hn::TableLookupLanes(table_, hn::IndicesFromVec(d, index));  // looks at the low 3 or 4 bits
#else
    const hn::Full128<uint8_t> d8;
    const U at = hn::Add(hn::Mul(hn::And(index, hn::Set(du, 7)), hn::Set(du, 0x02020000)), hn::Set(du, 0x01008080));
    return hn::BitCast(d, hn::TableLookupBytesOr0(table_, hn::BitCast(d8, at)));
#endif
  }

 private:
#if HWY_MAX_BYTES >= 32
  F table_;
#else
  hn::Vec<hn::Full128<uint8_t>> table_;
#endif
};

// The levels of one channel, from a word that holds it (at 3 bits also one of the 1-bit plane) and its shifts.
template <int kBits>
HWY_INLINE F decode(const Table &table, U word, U ones, U first, U second) {
  if constexpr (kBits == 8) {
    const auto grid = hn::ShiftRight<24>(hn::BitCast(di, hn::Shl(word, first)));
    return hn::MulAdd(hn::ConvertTo(d, grid), hn::Set(d, 2.0f), hn::Set(d, 1.0f));
  } else if constexpr (kBits == 4) {
    return hn::CopySignToAbs(table[hn::Shr(word, first)], hn::BitCast(d, hn::Shl(word, second)));
  } else if constexpr (kBits == 3) {
    const U high = hn::ShiftRight<29>(hn::Shl(ones, second));
    return table[hn::OrAnd(hn::And(hn::Shr(word, first), hn::Set(du, 3)), high, hn::Set(du, 4))];
  } else {
    return table[hn::Shr(word, first)];
  }
}

// Calls body.template run<kBits, kCount>(row) for the blocks of at most kMaxRows rows.
template <int kBits, int kMaxRows, class Body>
void for_row_blocks(int rows, const Body &body) {
  int r = 0;
  for (; r + kMaxRows <= rows; r += kMaxRows) body.template run<kBits, kMaxRows>(r);
  if constexpr (kMaxRows > 3) {
    if (rows - r == 3) body.template run<kBits, 3>(r);
  }
  if constexpr (kMaxRows > 2) {
    if (rows - r == 2) body.template run<kBits, 2>(r);
  }
  if (rows - r == 1) body.template run<kBits, 1>(r);
}

template <int kMaxRows, class Body>
void for_row_blocks(int bits, int rows, const Body &body) {
  switch (bits) {
    case 8:
      return for_row_blocks<8, kMaxRows>(rows, body);
    case 4:
      return for_row_blocks<4, kMaxRows>(rows, body);
    case 3:
      return for_row_blocks<3, kMaxRows>(rows, body);
    case 2:
      return for_row_blocks<2, kMaxRows>(rows, body);
    default:
      return for_row_blocks<1, kMaxRows>(rows, body);
  }
}

// ---- keys

// Scores of kScoreTokens tokens. The order of a sum depends on the channels only.
struct Scores {
  const Table &table;
  const Shifts &shifts;
  const uint32_t *words, *ones;
  const float *queries, *scales, *bias;
  int tokens;  // whose scores are wanted
  float *scores;

  template <int kBits, int kCount>
  void run(int row) const {
    constexpr int kVectors = kScoreTokens / kLanes, kWordChannels = kUnit / unit_words(kBits);
    const float *query = queries + row * kMaxHeadDim;
    const Table levels = table;
    F sum[kCount][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::Zero(d);
    }
    for (int c = 0; c < shifts.head_dim; c += kWordChannels, query += kWordChannels) {
      const int unit = c / kUnit, kind = shifts.kind(unit);
      // The two units of a word of the 1-bit plane find it one after the other.
      const uint32_t *word = words + (kBits == 1 ? unit / 2 : c / kWordChannels) * kScoreTokens;
      const uint32_t *one = kBits == 3 ? ones + unit / 2 * kScoreTokens : word;
      U codes[kVectors], high[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        codes[v] = hn::Load(du, word + v * kLanes);
        high[v] = hn::Load(du, one + v * kLanes);
      }
      const uint32_t *first = shifts.first[kind] + c % kUnit, *second = shifts.second[kind] + c % kUnit;
      for (int i = 0; i < kWordChannels; ++i) {
        F level[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          level[v] = decode<kBits>(levels, codes[v], high[v], hn::Set(du, first[i]), hn::Set(du, second[i]));
        }
#pragma GCC unroll 4
        for (int r = 0; r < kCount; ++r) {
          const F q = hn::Set(d, query[r * kMaxHeadDim + i]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(q, level[v], sum[r][v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (v * kLanes >= tokens) break;
      const F scale = hn::LoadU(d, scales + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        hn::StoreU(hn::MulAdd(scale, sum[r][v], hn::Set(d, bias[row + r])), d,
                   scores + (row + r) * kChunkTokens + v * kLanes);
      }
    }
  }
};

void score_tiles(const Side &k, const uint8_t *const *codes, int num_tiles, const float *scales, const float *queries,
                 int rows, const float *bias, float *scores) {
  const Table table(k);
  const Shifts shifts(k);
  alignas(64) uint32_t words[kMaxHeadDim / 4 * kScoreTokens];
  const uint32_t *ones = words + plane_bytes(k.head_dim, k.bits, 0) / 4 * kScoreTokens;
  for (int tile = 0; tile < num_tiles; tile += kScoreTiles) {
    const int tiles = min_of(kScoreTiles, num_tiles - tile), at = tile * kTileTokens;
    for (int i = 0; i < kScoreTiles; ++i) {  // an odd last tile stands in for its neighbour
      load_k_words(k, codes[tile + min_of(i, tiles - 1)], words + i * kTileTokens, kScoreTokens);
      const uint8_t *next = codes[min_of(tile + kScoreTiles + i, num_tiles - 1)];
      for (int e = 0; e < kTileTokens * record_bytes(k.head_dim, k.bits); e += kLineBytes) __builtin_prefetch(next + e);
    }
    for_row_blocks<kRows>(
        k.bits, rows, Scores{table, shifts, words, ones, queries, scales + at, bias, tiles * kTileTokens, scores + at});
  }
}

void score_key(const float *key, int head_dim, const float *queries, int rows, const float *bias, float *scores) {
  for (int r = 0; r < rows; ++r) {
    F sum = hn::Zero(d);
    for (int c = 0; c < head_dim; c += kLanes) {
      sum = hn::MulAdd(hn::LoadU(d, queries + r * kMaxHeadDim + c), hn::LoadU(d, key + c), sum);
    }
    scores[r * kChunkTokens] = hn::GetLane(hn::SumOfLanes(d, sum)) + bias[r];
  }
}

// ---- softmax

// e^x = power + power * fraction for x <= 0; NaN gives NaN. The Taylor series is exact to 2^-27 where |rest| <= ln(2)/2.
struct Exponential {
  F power, fraction;
};

HWY_INLINE Exponential exponential(F x) {
  const auto exponent = hn::NearestInt(hn::Mul(x, hn::Set(d, 1.44269504f)));
  const F n = hn::ConvertTo(d, exponent);
  // ln(2) in two parts, n times the first of which is exact.
  const F rest = hn::NegMulAdd(n, hn::Set(d, 1.42860677e-6f), hn::NegMulAdd(n, hn::Set(d, 0.693145752f), x));
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f};
  F sum = hn::Set(d, 1.0f / 5040);
#pragma GCC unroll 6
  for (const float coefficient : kTaylor) sum = hn::MulAdd(sum, rest, hn::Set(d, coefficient));
  const F power = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(exponent, hn::Set(di, 127))));
  const auto vanishes = hn::Lt(x, hn::Set(d, -87.0f));  // and the exponent would leave the range of normal numbers
  return {hn::IfThenElse(vanishes, hn::Zero(d), power), hn::IfThenElse(vanishes, hn::Zero(d), hn::Mul(sum, rest))};
}

HWY_INLINE F exp_of(F x) {
  const Exponential e = exponential(x);
  return hn::MulAdd(e.power, e.fraction, e.power);
}

HWY_INLINE F tanh_of(F x) {
  const Exponential e = exponential(hn::Mul(hn::Abs(x), hn::Set(d, -2.0f)));
  const F one = hn::Set(d, 1.0f);
  const F minus_one = hn::MulAdd(e.power, e.fraction, hn::Sub(e.power, one));  // e^(-2|x|) - 1
  return hn::CopySign(hn::Div(minus_one, hn::Add(minus_one, hn::Set(d, 2.0f))), x);
}

float softmax(float *scores, int n, int low, int high, float soft_cap, float slope, float first_distance, float *max,
              float *sum) {
  const F minus_infinity = hn::Set(d, -__builtin_inff());
  const int first = low / kLanes * kLanes, last = (high + kLanes - 1) / kLanes * kLanes;
  const auto visible = [&](int t) {
    const F position = hn::Iota(d, float(t));
    return hn::And(hn::Ge(position, hn::Set(d, float(low))), hn::Lt(position, hn::Set(d, float(high))));
  };
  // A loop of its own: a condition on a vector inside a loop is turned into a blend of one lane by GCC 12 at -O3.
  for (int t = first; t < last && soft_cap > 0; t += kLanes) {
    const F x = hn::LoadU(d, scores + t), cap = hn::Set(d, soft_cap);
    hn::StoreU(hn::Mul(tanh_of(hn::Div(x, cap)), cap), d, scores + t);
  }
  F largest = hn::Set(d, *max);
  for (int t = first; t < last; t += kLanes) {
    const F loaded = hn::LoadU(d, scores + t);
    const F distance = hn::Add(hn::Iota(d, float(t)), hn::Set(d, first_distance));
    const F x = hn::IfThenElse(visible(t), hn::MulAdd(hn::Set(d, slope), distance, loaded), minus_infinity);
    largest = hn::IfThenElse(hn::Gt(x, largest), x, largest);  // not Max: a NaN must not hide the others
    hn::StoreU(x, d, scores + t);
  }
  largest = hn::MaxOfLanes(d, largest);
  F added = hn::Zero(d);
  for (int t = first; t < last; t += kLanes) {
    const F x = hn::LoadU(d, scores + t);
    const F weight = hn::IfThenElseZero(visible(t), exp_of(hn::Sub(x, largest)));
    added = hn::Add(added, weight);
    hn::StoreU(weight, d, scores + t);
  }
  for (int t = 0; t < n; t += kLanes) {
    if (t < first || t >= last) hn::StoreU(hn::Zero(d), d, scores + t);
  }
  const float correction = hn::GetLane(exp_of(hn::Sub(hn::Set(d, *max), largest)));
  *max = hn::GetLane(largest);
  *sum = *sum * correction + hn::GetLane(hn::SumOfLanes(d, added));
  return correction;
}

// ---- values

HWY_INLINE hn::Vec<D4> add_blocks(hn::Vec<D4> v) {
  return v;
}
template <class V>
HWY_INLINE hn::Vec<D4> add_blocks(V v) {
  const hn::Half<hn::DFromV<V>> half;
  return add_blocks(hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
}

// The sums over the lanes of four vectors.
HWY_INLINE hn::Vec<D4> sums_of_lanes(F a, F b, F c, F e) {
  const hn::Repartition<double, D> d64;
  const auto ab = hn::BitCast(d64, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  const auto ce = hn::BitCast(d64, hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e)));
  return add_blocks(
      hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, ab, ce)), hn::BitCast(d, hn::InterleaveUpper(d64, ab, ce))));
}

// Sums over tokens for the channels of a unit. The order of a sum depends on the tokens only.
struct Outputs {
  const Table &table;
  const Shifts &shifts;
  const uint32_t *words, *ones;
  int unit, tokens;
  const float *weights;
  float *outputs;

  template <int kBits, int kCount>
  void run(int row) const {
    constexpr int kWordChannels = kUnit / unit_words(kBits);
    const int kind = shifts.kind(unit);
    const float *weight = weights + row * kChunkTokens;
    const Table levels = table;
    for (int c = 0; c < kUnit; c += kValueChannels) {
      const uint32_t *word = words + c / kWordChannels * kChunkTokens;
      F sum[kCount][kValueChannels];
      U first[kValueChannels], second[kValueChannels];
#pragma GCC unroll 4
      for (int i = 0; i < kValueChannels; ++i) {
        first[i] = hn::Set(du, shifts.first[kind][c + i]);
        second[i] = hn::Set(du, shifts.second[kind][c + i]);
#pragma GCC unroll 4
        for (int r = 0; r < kCount; ++r) sum[r][i] = hn::Zero(d);
      }
      for (int t = 0; t < tokens; t += kLanes) {
        const U codes = hn::Load(du, word + t), high = kBits == 3 ? hn::Load(du, ones + t) : codes;
        F level[kValueChannels];
#pragma GCC unroll 4
        for (int i = 0; i < kValueChannels; ++i) level[i] = decode<kBits>(levels, codes, high, first[i], second[i]);
#pragma GCC unroll 4
        for (int r = 0; r < kCount; ++r) {
          const F w = hn::LoadU(d, weight + r * kChunkTokens + t);
#pragma GCC unroll 4
          for (int i = 0; i < kValueChannels; ++i) sum[r][i] = hn::MulAdd(w, level[i], sum[r][i]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        const D4 d4;
        float *output = outputs + (row + r) * kMaxHeadDim + kUnit * unit + c;
        const auto sums = sums_of_lanes(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        hn::StoreU(hn::Add(hn::LoadU(d4, output), sums), d4, output);
      }
    }
  }
};

void add_tiles(const Side &v, const uint8_t *const *codes, int num_tiles, const float *scales, float *weights, int rows,
               float *outputs) {
  const Table table(v);
  const Shifts shifts(v);
  alignas(64) uint32_t words[(kMaxUnitWords + 1) * kChunkTokens];
  const int tokens = num_tiles * kTileTokens, count = unit_words(v.bits);
  const int bytes0 = plane_bytes(v.head_dim, v.bits, 0), bytes1 = plane_bytes(v.head_dim, v.bits, 1);
  uint32_t *ones = words + count * kChunkTokens;
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < tokens; t += kLanes) {
      float *weight = weights + r * kChunkTokens + t;
      const F w = hn::LoadU(d, weight);
      hn::StoreU(hn::IfThenZeroElse(hn::Eq(w, hn::Zero(d)), hn::Mul(w, hn::LoadU(d, scales + t))), d, weight);
    }
  }
  for (int unit = 0; unit < v.head_dim / kUnit; ++unit) {
    for (int w = 0; w < count; ++w) {
      const int word = v.bits == 1 ? unit / 2 : unit * count + w;
      load_v_words(codes, num_tiles, 0, bytes0, word, words + w * kChunkTokens);
    }
    if (bytes1 != 0) load_v_words(codes, num_tiles, kTileTokens * bytes0, bytes1, unit / 2, ones);
    for_row_blocks<kValueRows>(v.bits, rows, Outputs{table, shifts, words, ones, unit, tokens, weights, outputs});
  }
}

void add_value(const float *value, int head_dim, const float *weights, int rows, float *outputs) {
  for (int r = 0; r < rows; ++r) {
    const float weight = weights[r * kChunkTokens];
    if (weight == 0) continue;
    for (int c = 0; c < head_dim; c += kLanes) {
      float *output = outputs + r * kMaxHeadDim + c;
      hn::StoreU(hn::MulAdd(hn::Set(d, weight), hn::LoadU(d, value + c), hn::LoadU(d, output)), d, output);
    }
  }
}

constexpr AttentionKernels kKernels = {score_tiles, score_key, softmax, add_tiles, add_value};

}  // namespace
}  // namespace tqkv
HWY_AFTER_NAMESPACE();
