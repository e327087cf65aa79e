// SPDX-License-Identifier: Apache-2.0
// The SIMD targets of the scalar codec, one translation unit each (cpu_avx2.cpp, ...), compiled for its processors.
// cpu_scalar.cpp is the definition: a lane holds a vector, so that every sum is added in the order given there and all
// targets give the same bits. Lanes past the last row repeat it.
//
// Everything here has internal linkage, and nothing may instantiate functions that other translation units could share:
// the linker keeps one copy for all, perhaps the one that this machine cannot run.
#define HWY_IS_DEBUG_BUILD 0  // Highway's assertions would need its library
#include <hwy/highway.h>

#include <cfloat>
#include <cstring>

#include "codec/cpu.hpp"
#include "codec/half.hpp"
#include "codec/quantize.hpp"

#if defined(__clang__)
#define TQKV_UNROLL _Pragma("clang loop unroll(full)")
#else
#define TQKV_UNROLL _Pragma("GCC unroll 64")
#endif

HWY_BEFORE_NAMESPACE();
namespace tqkv {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

constexpr hn::ScalableTag<float> kF;
constexpr hn::ScalableTag<int32_t> kI;
constexpr hn::ScalableTag<uint32_t> kU;
constexpr hn::Rebind<uint16_t, hn::ScalableTag<float>> kU16;
constexpr hn::Rebind<hwy::float16_t, hn::ScalableTag<float>> kF16;
using F = hn::Vec<decltype(kF)>;
using I = hn::Vec<decltype(kI)>;
using U = hn::Vec<decltype(kU)>;

constexpr int kLanes = int(hn::MaxLanes(kF));
constexpr int kChunk = 16;  // channels; every head_dim is a multiple
static_assert(kLanes <= kGroup && kLanes <= kChunk && kChunk % kLanes == 0);

// A value of each lane's vector for each channel, [head_dim, kLanes].
template <class T>
struct alignas(64) Channels {
  T of[kMaxHeadDim * kLanes];
};
constexpr int kMaxWords = kMaxHeadDim / 4;
struct alignas(64) Words {
  uint32_t of[(kMaxWords + kLanes - 1) / kLanes * kLanes * kLanes];
};

HWY_INLINE F load(const float *from) {
  return hn::Load(kF, from);
}
HWY_INLINE I load(const int32_t *from) {
  return hn::Load(kI, from);
}
HWY_INLINE void store(F v, float *to) {
  hn::Store(v, kF, to);
}
HWY_INLINE void store(I v, int32_t *to) {
  hn::Store(v, kI, to);
}
HWY_INLINE F bits_to_float(U v) {
  return hn::BitCast(kF, v);
}
HWY_INLINE U float_to_bits(F v) {
  return hn::BitCast(kU, v);
}

// Side's own functions are the kind that the linker shares.
HWY_INLINE int code_bytes(const Side &side) {
  return record_bytes(side.head_dim, side.bits);
}
HWY_INLINE int scale_bytes(const Side &side) {
  return side.scale_type == TQ_TYPE_F32 ? 4 : 2;
}

HWY_INLINE U shifted_left(U v, int count) {  // right where negative
  return count >= 0 ? hn::ShiftLeftSame(v, count) : hn::ShiftRightSame(v, -count);
}

// 8 values of 4 bytes to look up: `count` of them, a power of two, repeated.
class Table {
 public:
  template <class T>
  Table(const T *entries, int count) {
    alignas(64) T repeated[16];
    for (int i = 0; i < 16; ++i) repeated[i] = entries[i & (count - 1)];
    low_ = hn::BitCast(kF, load(repeated));
    high_ = hn::BitCast(kF, load(repeated + kHigh));
  }
  HWY_INLINE F operator[](U index) const {  // below 8
    if constexpr (kHigh == 0) return hn::TableLookupLanes(low_, hn::IndicesFromVec(kF, hn::BitCast(kI, index)));
    const auto lane = hn::IndicesFromVec(kF, hn::BitCast(kI, hn::And(index, hn::Set(kU, 3))));
    const auto is_high = hn::RebindMask(kF, hn::TestBit(index, hn::Set(kU, 4)));
    return hn::IfThenElse(is_high, hn::TableLookupLanes(high_, lane), hn::TableLookupLanes(low_, lane));
  }

 private:
  static constexpr int kHigh = kLanes < 8 ? 4 : 0;  // where a vector does not hold all 8, the rest
  F low_, high_;
};

// -------------------------------------------------------------------------------------------------- transposition --

// x[i] lane j <-> x[j] lane i.
HWY_INLINE void transpose(F *x) {
  constexpr hn::Repartition<double, decltype(kF)> kPairs;
  // Inside blocks of 4 by 4: afterwards block b of x[4 q + k] has rows 4 q .. 4 q + 3 of column 4 b + k.
  TQKV_UNROLL for (int q = 0; q < kLanes; q += 4) {
    const auto ab_low = hn::BitCast(kPairs, hn::InterleaveLower(kF, x[q], x[q + 1]));
    const auto ab_high = hn::BitCast(kPairs, hn::InterleaveUpper(kF, x[q], x[q + 1]));
    const auto cd_low = hn::BitCast(kPairs, hn::InterleaveLower(kF, x[q + 2], x[q + 3]));
    const auto cd_high = hn::BitCast(kPairs, hn::InterleaveUpper(kF, x[q + 2], x[q + 3]));
    x[q] = hn::BitCast(kF, hn::InterleaveLower(kPairs, ab_low, cd_low));
    x[q + 1] = hn::BitCast(kF, hn::InterleaveUpper(kPairs, ab_low, cd_low));
    x[q + 2] = hn::BitCast(kF, hn::InterleaveLower(kPairs, ab_high, cd_high));
    x[q + 3] = hn::BitCast(kF, hn::InterleaveUpper(kPairs, ab_high, cd_high));
  }
#if HWY_MAX_BYTES == 32
  TQKV_UNROLL for (int k = 0; k < 4; ++k) {
    const F a = x[k], b = x[4 + k];
    x[k] = hn::ConcatLowerLower(kF, b, a);
    x[4 + k] = hn::ConcatUpperUpper(kF, b, a);
  }
#elif HWY_MAX_BYTES == 64
  TQKV_UNROLL for (int k = 0; k < 4; ++k) {
    const F ac_low = hn::ConcatLowerLower(kF, x[8 + k], x[k]);
    const F ac_high = hn::ConcatUpperUpper(kF, x[8 + k], x[k]);
    const F bd_low = hn::ConcatLowerLower(kF, x[12 + k], x[4 + k]);
    const F bd_high = hn::ConcatUpperUpper(kF, x[12 + k], x[4 + k]);
    x[k] = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(bd_low), ac_low);
    x[4 + k] = hn::OddEvenBlocks(bd_low, hn::SwapAdjacentBlocks(ac_low));
    x[8 + k] = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(bd_high), ac_high);
    x[12 + k] = hn::OddEvenBlocks(bd_high, hn::SwapAdjacentBlocks(ac_high));
  }
#endif
}

// Words of the records of n vectors, [n, bytes], one vector a lane. A half word that ends a record is widened by zeros.
void load_words(const uint8_t *records, int n, int bytes, Words &words) {
  constexpr int kBlockBytes = 4 * kLanes;
  for (int begin = 0; begin < bytes; begin += kBlockBytes) {
    F x[kLanes];
    if (begin + kBlockBytes <= bytes) {
      TQKV_UNROLL for (int i = 0; i < kLanes; ++i) {
        const uint8_t *record = records + (i < n ? i : n - 1) * bytes + begin;
        x[i] = hn::LoadU(kF, reinterpret_cast<const float *>(record));
      }
    } else {
      alignas(64) uint8_t rest[kLanes][kBlockBytes] = {};
      for (int i = 0; i < kLanes; ++i) {
        std::memcpy(rest[i], records + (i < n ? i : n - 1) * bytes + begin, size_t(bytes - begin));
      }
      TQKV_UNROLL for (int i = 0; i < kLanes; ++i) x[i] = hn::Load(kF, reinterpret_cast<const float *>(rest[i]));
    }
    transpose(x);
    TQKV_UNROLL for (int i = 0; i < kLanes; ++i) {
      hn::Store(float_to_bits(x[i]), kU, words.of + (begin / 4 + i) * kLanes);
    }
  }
}

// The reverse.
void store_words(const Words &words, int n, int bytes, uint8_t *records) {
  constexpr int kBlockBytes = 4 * kLanes;
  for (int begin = 0; begin < bytes; begin += kBlockBytes) {
    F x[kLanes];
    TQKV_UNROLL for (int i = 0; i < kLanes; ++i) {
      x[i] = bits_to_float(hn::Load(kU, words.of + (begin / 4 + i) * kLanes));
    }
    transpose(x);
    alignas(64) uint8_t rows[kLanes][kBlockBytes];
    TQKV_UNROLL for (int i = 0; i < kLanes; ++i) hn::Store(x[i], kF, reinterpret_cast<float *>(rows[i]));
    const int rest = bytes - begin < kBlockBytes ? bytes - begin : kBlockBytes;
    for (int i = 0; i < n; ++i) std::memcpy(records + i * bytes + begin, rows[i], size_t(rest));
  }
}

// ------------------------------------------------------------------------------------------------------- rotation --

// Butterflies at strides 1, 2, 4, .. kRadix / 2.
template <int kRadix, class V>
HWY_INLINE void butterflies(V *x) {
  TQKV_UNROLL for (int stride = 1; stride < kRadix; stride *= 2) {
    TQKV_UNROLL for (int k = 0; k < kRadix / 2; ++k) {
      const int i = k / stride * 2 * stride + k % stride;
      const V a = x[i], b = x[i + stride];
      x[i] = hn::Add(a, b);
      x[i + stride] = hn::Sub(a, b);
    }
  }
}

// The stages at strides stride, 2 stride, .. kRadix / 2 stride, in one pass over memory.
template <int kRadix, class T>
void butterfly_pass(int head_dim, int stride, T *x) {
  const int step = stride * kLanes;
  for (int i = 0; i < head_dim * kLanes; i += kRadix * step) {
    for (int j = i; j < i + step; j += kLanes) {
      decltype(load(x)) v[kRadix];
      TQKV_UNROLL for (int k = 0; k < kRadix; ++k) v[k] = load(x + j + k * step);
      butterflies<kRadix>(v);
      TQKV_UNROLL for (int k = 0; k < kRadix; ++k) store(v[k], x + j + k * step);
    }
  }
}

// The stages at strides from `stride` to `end` / 2, in as few passes as the registers allow.
template <class T>
void butterfly_passes(int head_dim, int stride, int end, T *x) {
  constexpr int kMostStages = kLanes == 16 ? 4 : 3;
  int stages = 0;
  while (stride << stages < end) ++stages;
  while (stages > 0) {
    const int passes = (stages + kMostStages - 1) / kMostStages, now = (stages + passes - 1) / passes;
    if (now == 1) butterfly_pass<2>(head_dim, stride, x);
    if (now == 2) butterfly_pass<4>(head_dim, stride, x);
    if (now == 3) butterfly_pass<8>(head_dim, stride, x);
    if (now == 4) butterfly_pass<16>(head_dim, stride, x);
    stages -= now;
    stride <<= now;
  }
}

// H_base, or its transpose, for channels head_dim / base apart. Rows of H_base add one of four sums of each pair of
// neighbours, which are formed once: a + b, b - a, a - b and -a - b, exactly what adding negated terms gives, zeros'
// signs included.
template <class T>
void apply_base(const Side &side, bool transposed, T *x) {
  using V = decltype(load(x));
  constexpr int kMaxBase = 36;
  const int base = side.base, pairs = base / 2;
  const int8_t *h = &side.base_matrix[0];
  uint16_t choices[kMaxBase][kMaxBase / 2];  // offsets into `sums`
  for (int i = 0; i < base; ++i) {
    for (int p = 0; p < pairs; ++p) {
      const int8_t *first = h + (transposed ? 2 * p * base + i : i * base + 2 * p);
      const int8_t *second = first + (transposed ? base : 1);
      choices[i][p] = uint16_t((4 * p + (*first < 0) + 2 * (*second < 0)) * kLanes);
    }
  }
  alignas(64) T sums[kMaxBase / 2 * 4 * kLanes];
  const int stride = side.head_dim / base * kLanes;
  for (T *block = x; block < x + stride; block += kLanes) {
    for (int p = 0; p < pairs; ++p) {
      const V a = load(block + 2 * p * stride), b = load(block + (2 * p + 1) * stride);
      store(hn::Add(a, b), sums + 4 * p * kLanes);
      store(hn::Sub(b, a), sums + (4 * p + 1) * kLanes);
      store(hn::Sub(a, b), sums + (4 * p + 2) * kLanes);
      store(hn::Sub(hn::Neg(a), b), sums + (4 * p + 3) * kLanes);
    }
    for (int i = 0; i < base; ++i) {
      const uint16_t *choice = choices[i];
      V sum = hn::Add(load(sums + choice[0]), load(sums + choice[1]));
      for (int p = 2; p < pairs; p += 2) {
        sum = hn::Add(sum, hn::Add(load(sums + choice[p]), load(sums + choice[p + 1])));
      }
      store(sum, block + i * stride);
    }
  }
}

void flip_signs(const uint32_t *signs, int head_dim, float *x) {
  for (int c = 0; c < head_dim; ++c) {
    const U v = float_to_bits(hn::Load(kF, x + c * kLanes));
    hn::Store(bits_to_float(hn::Xor(v, hn::Set(kU, signs[c]))), kF, x + c * kLanes);
  }
}

void apply_matrix(const Side &side, bool transposed, float *x) {
  constexpr int kRows = 8;  // sums in flight
  const int n = side.head_dim;
  const float *matrix = &side.matrix[0];
  const ptrdiff_t row = transposed ? 1 : n, column = transposed ? n : 1;
  Channels<float> y;
  for (int i = 0; i < n; i += kRows) {
    F sums[kRows];
    TQKV_UNROLL for (int k = 0; k < kRows; ++k) sums[k] = hn::Zero(kF);
    for (int j = 0; j < n; ++j) {
      const float *entry = matrix + i * row + j * column;
      const F v = hn::Load(kF, x + j * kLanes);
      TQKV_UNROLL for (int k = 0; k < kRows; ++k) {
        sums[k] = hn::Add(sums[k], hn::Mul(hn::Set(kF, entry[k * row]), v));
      }
    }
    TQKV_UNROLL for (int k = 0; k < kRows; ++k) hn::Store(sums[k], kF, y.of + (i + k) * kLanes);
  }
  std::memcpy(x, y.of, size_t(n) * kLanes * sizeof(float));
}

// Whether the first butterflies of a rotation are done while a block of kLanes channels is in registers.
bool begins_in_registers(const Side &side) {
  return side.hadamard_rounds > 0 && side.head_dim / side.base % kLanes == 0;
}

// One Hadamard round without its signs; `begun`: less the butterflies that were done in registers.
template <class T>
void hadamard(const Side &side, bool transposed, bool begun, T *x) {
  if (side.base > 1) apply_base(side, transposed, x);
  butterfly_passes(side.head_dim, begun ? kLanes : 1, side.head_dim / side.base, x);
}

// Rows [n, head_dim], one a lane.
void load_rows(int head_dim, const float *rows, int n, float *x) {
  for (int c = 0; c < head_dim; c += kLanes) {
    F block[kLanes];
    TQKV_UNROLL for (int i = 0; i < kLanes; ++i) block[i] = hn::LoadU(kF, rows + (i < n ? i : n - 1) * head_dim + c);
    transpose(block);
    TQKV_UNROLL for (int i = 0; i < kLanes; ++i) hn::Store(block[i], kF, x + (c + i) * kLanes);
  }
}

// to_integer() of quantize.hpp.
HWY_INLINE I to_integer(F v, F gain) {
  const F bias = hn::Set(kF, kRoundingBias);
  return hn::Sub(hn::BitCast(kI, hn::Add(hn::Mul(v, gain), bias)), hn::BitCast(kI, bias));
}

HWY_INLINE I negate_where(I v, uint32_t sign_bit) {
  const I mask = hn::BroadcastSignBit(hn::Set(kI, int32_t(sign_bit)));
  return hn::Sub(hn::Xor(v, mask), mask);
}

// Y of quantize.hpp from X = x * gain.
void rotate_integers(const Side &side, const float *x, F gain, int32_t *y) {
  const int head_dim = side.head_dim;
  const uint32_t *signs = side.hadamard_rounds > 0 ? &side.signs[0] : nullptr;
  const bool begin = begins_in_registers(side);
  for (int c = 0; c < head_dim; c += kLanes) {
    I block[kLanes];
    TQKV_UNROLL for (int i = 0; i < kLanes; ++i) {
      block[i] = to_integer(load(x + (c + i) * kLanes), gain);
      if (signs != nullptr) block[i] = negate_where(block[i], signs[c + i]);
    }
    if (begin) butterflies<kLanes>(block);
    TQKV_UNROLL for (int i = 0; i < kLanes; ++i) store(block[i], y + (c + i) * kLanes);
  }
  for (int round = 0; round < side.hadamard_rounds; ++round) {
    for (int c = 0; round > 0 && c < head_dim; ++c) {
      store(negate_where(load(y + c * kLanes), signs[round * head_dim + c]), y + c * kLanes);
    }
    hadamard(side, false, begin && round == 0, y);
  }
  if (side.hadamard_rounds < 2) return;
  const F round_gain = hn::Set(kF, side.round_gain);
  for (int c = 0; c < head_dim; ++c) {
    store(to_integer(hn::ConvertTo(kF, load(y + c * kLanes)), round_gain), y + c * kLanes);
  }
}

// Rotates back what decode_levels() left, times gains[n], to rows [n, head_dim].
void store_rotated_back(const Side &side, float *x, const float *gains, int n, float *rows) {
  const int head_dim = side.head_dim;
  if (!side.matrix.empty()) apply_matrix(side, true, x);
  const uint32_t *signs = side.hadamard_rounds > 0 ? &side.signs[0] : nullptr;
  for (int round = side.hadamard_rounds - 1; round >= 0; --round) {
    hadamard(side, true, begins_in_registers(side) && round == side.hadamard_rounds - 1, x);
    if (round > 0) flip_signs(signs + round * head_dim, head_dim, x);
  }
  for (int c = 0; c < head_dim; c += kLanes) {
    F block[kLanes];
    TQKV_UNROLL for (int i = 0; i < kLanes; ++i) block[i] = hn::Load(kF, x + (c + i) * kLanes);
    transpose(block);
    const U flips = signs != nullptr ? hn::LoadU(kU, signs + c) : hn::Zero(kU);
    TQKV_UNROLL for (int i = 0; i < kLanes; ++i) {
      const int row = i < n ? i : n - 1;
      const F v = hn::MulAdd(block[i], hn::Set(kF, gains[row]), hn::Zero(kF));
      hn::StoreU(bits_to_float(hn::Xor(float_to_bits(v), flips)), kF, rows + row * head_dim + c);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- sums --

// squared_norm() of quantize.hpp.
F squared_norm(const float *x, int head_dim) {
  F cells[kCells];
  for (int i = 0; i < kCells; ++i) {
    F cell = hn::Zero(kF);
    for (int c = i; c < head_dim; c += kCells) {
      const F v = load(x + c * kLanes);
      cell = hn::MulAdd(v, v, cell);
    }
    cells[i] = cell;
  }
  for (int stride = 1; stride < kCells; stride *= 2) {
    for (int i = 0; i < kCells; i += 2 * stride) cells[i] = hn::Add(cells[i], cells[i + stride]);
  }
  return cells[0];
}

// ---------------------------------------------------------------------------------------------------- quantisation --

// The number of thresholds not above a folded Y, as choose_code() counts it.
template <int kBits>
class Magnitudes {
  static constexpr int kCount = 1 << (kBits - 1);

 public:
  explicit Magnitudes(const int *thresholds) : Magnitudes(Below(thresholds)) {}

  HWY_INLINE I operator()(I folded) const {
    I count = hn::Zero(kI);
    if constexpr (kBits == 1) return count;
    if constexpr (kLanes < 8) {  // where looking up is slower than comparing
      TQKV_UNROLL for (int i = 0; i + 1 < kCount; ++i) {
        count = hn::Sub(count, hn::VecFromMask(kI, hn::Gt(folded, hn::Set(kI, below_.of[i]))));
      }
      return count;
    }
    // By bisection.
    const auto high = hn::Gt(folded, middle_);
    count = hn::IfThenElseZero(high, hn::Set(kI, kCount / 2));
    if constexpr (kBits == 4) count = hn::Or(count, step(folded, hn::IfThenElse(high, upper_, lower_), 2));
    if constexpr (kBits >= 3) count = hn::Or(count, step(folded, last_(count), 1));
    return count;
  }

 private:
  struct Below {  // the largest integers below the thresholds
    alignas(64) int32_t of[kMaxMagnitudes];
    explicit Below(const int *thresholds) {
      for (int i = 0; i < kMaxMagnitudes; ++i) of[i] = thresholds[i] - 1;
    }
  };
  explicit Magnitudes(const Below &below)
      : below_(below),
        middle_(hn::Set(kI, below.of[kCount / 2 - (kBits > 1)])),
        lower_(hn::Set(kI, below.of[1])),
        upper_(hn::Set(kI, below.of[5])),
        table_(below.of, kMaxMagnitudes) {}
  HWY_INLINE I last_(I index) const { return hn::BitCast(kI, table_[hn::BitCast(kU, index)]); }
  // `size` where the value is above, else 0.
  static HWY_INLINE I step(I folded, I below, int size) {
    return hn::IfThenElseZero(hn::Gt(folded, below), hn::Set(kI, size));
  }
  Below below_;
  I middle_, lower_, upper_;
  Table table_;
};

// What a group of vectors adds up to.
struct Quantized {
  F dot;  // <Y, u>
  F uu;   // |u|^2
};

// Sums of a chunk after the other, of |Y| below 2^20 and |u| below 2^8; a group of 4 chunks fits 32 bits.
class Sums {
  static constexpr hn::RepartitionToWide<decltype(kI)> kWide{};

 public:
  explicit Sums(bool wants_dot)
      : wants_dot_(wants_dot), uu_(hn::Zero(kI)), part_(hn::Zero(kI)), low_(hn::Zero(kWide)), high_(hn::Zero(kWide)) {}
  // Absolute values, and the squares of u.
  HWY_INLINE void add(int chunk, const I *y, const I *u, const I *squares) {
    TQKV_UNROLL for (int i = 0; i < kChunk; ++i) uu_ = hn::Add(uu_, squares[i]);
    if (!wants_dot_) return;
    TQKV_UNROLL for (int i = 0; i < kChunk; ++i) part_ = hn::Add(part_, hn::Mul(y[i], u[i]));
    if (chunk % 4 == 3) flush();
  }
  Quantized total() {
    flush();
    alignas(64) int64_t wide[kLanes];
    alignas(64) float dot[kLanes];
    hn::Store(low_, kWide, wide);
    hn::Store(high_, kWide, wide + kLanes / 2);
    for (int i = 0; i < kLanes; ++i) dot[i] = float(wide[i]);
    return {load(dot), hn::ConvertTo(kF, uu_)};
  }

 private:
  HWY_INLINE void flush() {
    low_ = hn::Add(low_, hn::PromoteTo(kWide, hn::LowerHalf(part_)));
    high_ = hn::Add(high_, hn::PromoteTo(kWide, hn::UpperHalf(hn::Half<decltype(kI)>(), part_)));
    part_ = hn::Zero(kI);
  }
  bool wants_dot_;
  I uu_, part_;
  hn::Vec<hn::RepartitionToWide<decltype(kI)>> low_, high_;
};

// A chunk's place in the 1-bit plane: plane1_bit(kFirst + i, kDim) for its channel i.
template <int kBits, int kFirst, int kDim>
HWY_INLINE void quantize_chunk(const Magnitudes<kBits> &magnitudes, const Table &levels, const Table &level_squares,
                               const int32_t *y, int c, int head_dim, Sums &sums, uint32_t *words) {
  constexpr uint32_t kCount = 1 << (kBits - 1);
  constexpr bool kPlane2 = kBits == 2 || kBits == 3, kPlane1 = kBits == 1 || kBits == 3;
  I size[kChunk], u[kChunk], squares[kChunk];
  U word[2] = {hn::Zero(kU), hn::Zero(kU)}, plane1 = hn::Zero(kU);
  TQKV_UNROLL for (int i = 0; i < kChunk; ++i) {
    const I v = load(y + (c + i) * kLanes), sign_mask = hn::BroadcastSignBit(v);
    size[i] = hn::Abs(v);
    const U magnitude = hn::BitCast(kU, magnitudes(size[i]));
    u[i] = hn::BitCast(kI, levels[magnitude]);
    squares[i] = hn::BitCast(kI, level_squares[magnitude]);
    if constexpr (kBits == 4) {
      const int sign = nibble_sign_bit(i) & 31;
      U &w = word[i / 8];
      w = hn::Or(w, hn::ShiftLeftSame(magnitude, 4 * (i % 8)));
      w = hn::OrAnd(w, hn::BitCast(kU, sign_mask), hn::Set(kU, 1u << sign));
    } else {
      // Ascending indices: a negative value has all bits of its mirror image's flipped.
      const U code = hn::Xor(hn::Or(magnitude, hn::Set(kU, kCount)), hn::BitCast(kU, sign_mask));
      if constexpr (kPlane2) word[0] = hn::Or(word[0], hn::ShiftLeftSame(hn::And(code, hn::Set(kU, 3)), plane2_bit(i)));
      if constexpr (kPlane1) {
        const int bit = plane1_bit(kFirst + i, kDim);
        plane1 = hn::OrAnd(plane1, shifted_left(code, bit - (kBits - 1)), hn::Set(kU, 1u << bit));
      }
    }
  }
  sums.add(c / kChunk, size, u, squares);
  if constexpr (kBits == 4) {
    hn::Store(word[0], kU, words + c / 8 * kLanes);
    hn::Store(word[1], kU, words + (c / 8 + 1) * kLanes);
  }
  if constexpr (kPlane2) hn::Store(word[0], kU, words + c / 16 * kLanes);
  if constexpr (kPlane1) {
    uint32_t *plane = words + ((kBits == 3 ? head_dim / 16 : 0) + c / 32) * kLanes;
    hn::Store(kFirst == 0 ? plane1 : hn::Or(plane1, hn::Load(kU, plane)), kU, plane);
  }
}

template <int kBits>
Quantized quantize(const Side &side, const int32_t *y, uint32_t *words) {
  constexpr int kCount = 1 << (kBits - 1);
  const Magnitudes<kBits> magnitudes(side.thresholds);
  int32_t positive[kCount], positive_squares[kCount];
  for (int i = 0; i < kCount; ++i) {
    positive[i] = int32_t(side.levels[(kBits == 4 ? 0 : kCount) + i]);
    positive_squares[i] = positive[i] * positive[i];
  }
  const Table levels(positive, kCount), level_squares(positive_squares, kCount);
  Sums sums(side.scale_rule != TQ_SCALE_NORM);
  const int n = side.head_dim;
  for (int c = 0; c < n; c += kChunk) {
    if (kBits == 2 || kBits == 4 || (c % 32 == 0 && c + 32 <= n)) {
      quantize_chunk<kBits, 0, 32>(magnitudes, levels, level_squares, y, c, n, sums, words);
    } else if (c % 32 != 0) {
      quantize_chunk<kBits, 16, 32>(magnitudes, levels, level_squares, y, c, n, sums, words);
    } else {
      quantize_chunk<kBits, 0, 16>(magnitudes, levels, level_squares, y, c, n, sums, words);
    }
  }
  return sums.total();
}

Quantized quantize8(const Side &side, const int32_t *y, uint32_t *words) {
  I largest = hn::Zero(kI);
  for (int c = 0; c < side.head_dim; ++c) largest = hn::Max(largest, hn::Abs(load(y + c * kLanes)));
  const F gain = hn::Div(hn::Set(kF, 127.5f), hn::ConvertTo(kF, largest));
  Sums sums(side.scale_rule != TQ_SCALE_NORM);
  for (int c = 0; c < side.head_dim; c += kChunk) {
    I size[kChunk], u[kChunk], squares[kChunk];
    U word[kChunk / 4] = {hn::Zero(kU), hn::Zero(kU), hn::Zero(kU), hn::Zero(kU)};
    TQKV_UNROLL for (int i = 0; i < kChunk; ++i) {
      const I v = load(y + (c + i) * kLanes);
      size[i] = hn::Abs(v);
      const I magnitude = hn::ConvertTo(kI, hn::Min(hn::Mul(hn::ConvertTo(kF, size[i]), gain), hn::Set(kF, 127.0f)));
      u[i] = hn::Or(hn::Add(magnitude, magnitude), hn::Set(kI, 1));
      squares[i] = hn::Mul(u[i], u[i]);
      const I grid = hn::Xor(magnitude, hn::BroadcastSignBit(v));
      const U byte = hn::And(hn::BitCast(kU, grid), hn::Set(kU, 0xff));
      word[i / 4] = hn::Or(word[i / 4], hn::ShiftLeftSame(byte, 8 * (i % 4)));
    }
    sums.add(c / kChunk, size, u, squares);
    TQKV_UNROLL for (int w = 0; w < kChunk / 4; ++w) hn::Store(word[w], kU, words + (c / 4 + w) * kLanes);
  }
  return sums.total();
}

// choose_scale() of quantize.hpp.
F choose_scales(int rule, F norm, const Quantized &q, float scale_gain) {
  const F gain = hn::Set(kF, scale_gain);
  if (rule == TQ_SCALE_LEAST_MSE) return hn::Mul(hn::Mul(hn::Div(q.dot, q.uu), norm), gain);
  if (rule == TQ_SCALE_NORM) return hn::Mul(hn::Div(norm, hn::Sqrt(q.uu)), gain);
  return hn::Mul(hn::Div(norm, q.dot), gain);
}

// ------------------------------------------------------------------------------------------------------ conversion --

// NaNs are left to the scalar functions.
template <bool kIsF16>
void from_f32(const float *input, int count, uint16_t *output) {
  int i = 0;
  const auto one = [&] {
    output[i] = kIsF16 ? f16_from_f32(input[i]) : bf16_from_f32(input[i]);
    ++i;
  };
  while (i + kLanes <= count) {
    const F v = hn::LoadU(kF, input + i);
    if (HWY_UNLIKELY(!hn::AllFalse(kF, hn::IsNaN(v)))) {
      for (int k = 0; k < kLanes; ++k) one();
      continue;
    }
    if constexpr (kIsF16) {
      hn::StoreU(hn::BitCast(kU16, hn::DemoteTo(kF16, v)), kU16, output + i);
    } else {
      const U u = float_to_bits(v);
      const U odd = hn::And(hn::ShiftRight<16>(u), hn::Set(kU, 1));
      const U rounded = hn::Add(hn::Add(u, hn::Set(kU, 0x7fff)), odd);
      hn::StoreU(hn::TruncateTo(kU16, hn::ShiftRight<16>(rounded)), kU16, output + i);
    }
    i += kLanes;
  }
  while (i < count) one();
}

template <bool kIsF16>
void to_f32(const uint16_t *input, int count, float *output) {
  int i = 0;
  const auto one = [&] {
    output[i] = kIsF16 ? f32_from_f16(input[i]) : f32_from_bf16(input[i]);
    ++i;
  };
  while (i + kLanes <= count) {
    const auto h = hn::LoadU(kU16, input + i);
    if constexpr (kIsF16) {
      const F v = hn::PromoteTo(kF, hn::BitCast(kF16, h));
      if (HWY_UNLIKELY(!hn::AllFalse(kF, hn::IsNaN(v)))) {
        for (int k = 0; k < kLanes; ++k) one();
        continue;
      }
      hn::StoreU(v, kF, output + i);
    } else {
      hn::StoreU(bits_to_float(hn::ShiftLeft<16>(hn::PromoteTo(kU, h))), kF, output + i);
    }
    i += kLanes;
  }
  while (i < count) one();
}

void to_f32_of_type(const void *input, int type, int count, float *output) {
  if (type == TQ_TYPE_F32) {
    std::memcpy(output, input, size_t(count) * 4);
  } else if (type == TQ_TYPE_F16) {
    to_f32<true>(static_cast<const uint16_t *>(input), count, output);
  } else {
    to_f32<false>(static_cast<const uint16_t *>(input), count, output);
  }
}

void from_f32_of_type(const float *input, int type, int count, void *output) {
  if (type == TQ_TYPE_F32) {
    std::memcpy(output, input, size_t(count) * 4);
  } else if (type == TQ_TYPE_F16) {
    from_f32<true>(input, count, static_cast<uint16_t *>(output));
  } else {
    from_f32<false>(input, count, static_cast<uint16_t *>(output));
  }
}

// ---------------------------------------------------------------------------------------------- encode and decode --

void encode_lanes(const Side &side, const float *rows, int n, uint8_t *records, uint8_t *scales, Encoded *encoded) {
  Channels<float> x;
  load_rows(side.head_dim, rows, n, x.of);
  const F norm2 = squared_norm(x.of, side.head_dim), norm = hn::Sqrt(norm2);
  if (!side.matrix.empty()) apply_matrix(side, false, x.of);
  Channels<int32_t> y;
  rotate_integers(side, x.of, hn::Div(hn::Set(kF, side.steps), norm), y.of);
  Words words;
  const Quantized q = side.bits == 1   ? quantize<1>(side, y.of, words.of)
                      : side.bits == 2 ? quantize<2>(side, y.of, words.of)
                      : side.bits == 3 ? quantize<3>(side, y.of, words.of)
                      : side.bits == 4 ? quantize<4>(side, y.of, words.of)
                                       : quantize8(side, y.of, words.of);
  store_words(words, n, code_bytes(side), records);

  const F value = choose_scales(side.scale_rule, norm, q, side.scale_gain);
  const F most = hn::Set(kF, side.scale_type == TQ_TYPE_F32 ? FLT_MAX : 65504.0f);
  alignas(64) float kept[kLanes];
  alignas(64) uint8_t rounded[kLanes * 4];
  hn::Store(hn::Min(value, most), kF, kept);
  from_f32_of_type(kept, side.scale_type, kLanes, rounded);
  std::memcpy(scales, rounded, size_t(n * scale_bytes(side)));

  uint8_t clamped[8] = {}, usual[8] = {};  // one bit a lane
  hn::StoreMaskBits(kF, hn::Gt(value, most), clamped);
  hn::StoreMaskBits(
      kF, hn::And(hn::Ge(norm2, hn::Set(kF, kMinSquaredNorm)), hn::Le(norm2, hn::Set(kF, kMaxSquaredNorm))), usual);
  for (int i = 0; i < n; ++i) {
    if (HWY_LIKELY(usual[i / 8] >> (i % 8) & 1)) {
      encoded[i] = clamped[i / 8] >> (i % 8) & 1 ? Encoded::kClamped : Encoded::kFine;
    } else {
      float row[kMaxHeadDim];
      std::memcpy(row, rows + i * side.head_dim, size_t(side.head_dim) * sizeof(float));
      encoded[i] = encode_vector(side, row, records + i * code_bytes(side), scales + i * scale_bytes(side));
    }
  }
}

template <int kBits, int kFirst, int kDim>
HWY_INLINE void decode_chunk(const Table &levels, bool begin, const uint32_t *words, int c, int head_dim, float *x) {
  U word[4] = {}, plane1 = hn::Zero(kU);
  if constexpr (kBits == 8) {
    TQKV_UNROLL for (int w = 0; w < 4; ++w) word[w] = hn::Load(kU, words + (c / 4 + w) * kLanes);
  }
  if constexpr (kBits == 4) {
    TQKV_UNROLL for (int w = 0; w < 2; ++w) word[w] = hn::Load(kU, words + (c / 8 + w) * kLanes);
  }
  if constexpr (kBits == 2 || kBits == 3) word[0] = hn::Load(kU, words + c / 16 * kLanes);
  if constexpr (kBits == 1 || kBits == 3) {
    plane1 = hn::Load(kU, words + ((kBits == 3 ? head_dim / 16 : 0) + c / 32) * kLanes);
  }
  TQKV_UNROLL for (int part = 0; part < kChunk; part += kLanes) {
    F block[kLanes];
    TQKV_UNROLL for (int k = 0; k < kLanes; ++k) {
      const int i = part + k;
      if constexpr (kBits == 8) {
        const auto byte = hn::BitCast(kI, hn::ShiftLeftSame(word[i / 4], 24 - 8 * (i % 4)));
        block[k] = hn::ConvertTo(kF, hn::Or(hn::ShiftRight<23>(byte), hn::Set(kI, 1)));
      } else if constexpr (kBits == 4) {
        const U sign = hn::ShiftLeftSame(word[i / 8], 31 - (nibble_sign_bit(i) & 31));
        const F level = levels[hn::And(hn::ShiftRightSame(word[i / 8], 4 * (i % 8)), hn::Set(kU, 7))];
        block[k] = bits_to_float(hn::Xor(float_to_bits(level), hn::And(sign, hn::Set(kU, 0x80000000))));
      } else {
        U code = hn::ShiftRightSame(word[0], plane2_bit(i));
        if constexpr (kBits != 2) {
          const U top = shifted_left(plane1, kBits - 1 - plane1_bit(kFirst + i, kDim));
          code = kBits == 1 ? top : hn::OrAnd(hn::And(code, hn::Set(kU, 3)), top, hn::Set(kU, 4));
        }
        block[k] = levels[hn::And(code, hn::Set(kU, (1 << kBits) - 1))];
      }
    }
    if (begin) butterflies<kLanes>(block);
    TQKV_UNROLL for (int k = 0; k < kLanes; ++k) hn::Store(block[k], kF, x + (c + part + k) * kLanes);
  }
}

template <int kBits>
void decode_levels(const Side &side, const uint32_t *words, float *x) {
  const Table levels(side.levels, kBits < 3 ? 1 << kBits : 8);
  const bool begin = begins_in_registers(side);
  const int n = side.head_dim;
  for (int c = 0; c < n; c += kChunk) {
    if ((kBits != 1 && kBits != 3) || (c % 32 == 0 && c + 32 <= n)) {
      decode_chunk<kBits, 0, 32>(levels, begin, words, c, n, x);
    } else if (c % 32 != 0) {
      decode_chunk<kBits, 16, 32>(levels, begin, words, c, n, x);
    } else {
      decode_chunk<kBits, 0, 16>(levels, begin, words, c, n, x);
    }
  }
}

void decode_lanes(const Side &side, const uint8_t *records, const uint8_t *scales, int n, float *rows) {
  Words words;
  load_words(records, n, code_bytes(side), words);
  Channels<float> x;
  if (side.bits == 1) decode_levels<1>(side, words.of, x.of);
  if (side.bits == 2) decode_levels<2>(side, words.of, x.of);
  if (side.bits == 3) decode_levels<3>(side, words.of, x.of);
  if (side.bits == 4) decode_levels<4>(side, words.of, x.of);
  if (side.bits == 8) decode_levels<8>(side, words.of, x.of);
  alignas(64) uint8_t aligned_scales[kLanes * 4] = {};
  alignas(64) float gains[kLanes];
  std::memcpy(aligned_scales, scales, size_t(n * scale_bytes(side)));
  to_f32_of_type(aligned_scales, side.scale_type, kLanes, gains);
  const U products = float_to_bits(hn::Mul(hn::Load(kF, gains), hn::Set(kF, side.decode_gain)));
  hn::Store(bits_to_float(hn::And(products, hn::Set(kU, ~3u))), kF, gains);  // decode_gain() of quantize.hpp
  store_rotated_back(side, x.of, gains, n, rows);
}

void encode(const Side &side, float *rows, int n, uint8_t *records, void *scales, Encoded *encoded) {
  for (int i = 0; i < n; i += kLanes) {
    encode_lanes(side, rows + i * side.head_dim, n - i < kLanes ? n - i : kLanes, records + i * code_bytes(side),
                 static_cast<uint8_t *>(scales) + i * scale_bytes(side), encoded + i);
  }
}

void decode(const Side &side, const uint8_t *records, const void *scales, int n, float *rows) {
  for (int i = 0; i < n; i += kLanes) {
    decode_lanes(side, records + i * code_bytes(side), static_cast<const uint8_t *>(scales) + i * scale_bytes(side),
                 n - i < kLanes ? n - i : kLanes, rows + i * side.head_dim);
  }
}

constexpr CodecKernels kTarget = {to_f32_of_type, from_f32_of_type, encode, decode};

}  // namespace
}  // namespace tqkv
HWY_AFTER_NAMESPACE();
