// SPDX-License-Identifier: Apache-2.0
// From the codes of a 16-token tile in shared memory to operands of mma.m16n8k32 (8-bit integers) in registers. Pure
// functions of the stored bytes and the lane, for the host too: tests/unit/operands_test.cpp proves them without a GPU.
//
// Lane = 4 g + q. Scores: A = K (16 tokens, 32 channels a step), B = queries (4 of them, high and low bytes: query q's
// are columns 2 q and 2 q + 1). Tokens k_token(i, g) go into rows g + 8 i, so that the accumulators of lane (g, q) are
// query q's for these two tokens. Of weights, transposed (movmatrix), come operands B of the second product, whose A are 16
// channels by 32 tokens (two tiles) of V. Channels go to steps and rows in whatever order loads best; channel() tells
// which.
//
// Bytes are the levels' grid as int8, level = 2 * byte + 1. With kUniform (2 bits, levels -3, -1, 1, 3) they are
// unsigned and masked out of the codes: level = 2 * (byte >> shift) - 3.
//
// The pipe of permutations, logic and shifts is the one that fills up. Multiplications have another: there the compiler
// puts shifts to the left, and high_half() moves of halves. Instructions for 16 codes (sm_90a), of them on the first
// pipe:   K 4 bits 18, 14   3 bits 12.5, 9.5   2 bits 9, 7   uniform 5, 4   8 bits none
//         V        22, 18          16.5, 13.5        13, 11          4, 4
//   pairs V        18, 14          12.5, 9.5          9, 7
#pragma once

#include <cstdint>
#include <cstring>

#include "codec/host_device.hpp"
#include "codec/record.hpp"

namespace tqkv::cuda {

TQKV_HOST_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
#else
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i);
    const uint32_t byte = ((pick & 4) != 0 ? b : a) >> (8 * (pick & 3)) & 0xff;
    result |= ((pick & 8) == 0 ? byte : (byte & 0x80) != 0 ? 0xffu : 0u) << (8 * i);
  }
  return result;
#endif
}

// x >> 16 by a dot product.
TQKV_HOST_DEVICE uint32_t high_half(uint32_t x) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(0x100), "r"(0));
  return result;
#else
  return x >> 16;
#endif
}

TQKV_HOST_DEVICE uint32_t rotate_right(uint32_t x, int n) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(x, x, n);
#else
  return x >> (n & 31) | x << (-n & 31);
#endif
}

// 0xff where a byte's highest bit is set.
TQKV_HOST_DEVICE uint32_t sign_bytes(uint32_t x) {
  return permute(x, 0, 0xba98);
}

template <int kWords>
struct Chunk {
  uint32_t word[kWords];
};

// One load instruction. Loaders are templates of the pointer, so that a test sees every address.
TQKV_HOST_DEVICE void fetch(const uint8_t *at, Chunk<4> &chunk) {
#if defined(__CUDA_ARCH__)
  const uint4 v = *reinterpret_cast<const uint4 *>(at);
  chunk.word[0] = v.x, chunk.word[1] = v.y, chunk.word[2] = v.z, chunk.word[3] = v.w;
#else
  std::memcpy(&chunk, at, sizeof chunk);
#endif
}

TQKV_HOST_DEVICE void fetch(const uint8_t *at, Chunk<2> &chunk) {
#if defined(__CUDA_ARCH__)
  const uint2 v = *reinterpret_cast<const uint2 *>(at);
  chunk.word[0] = v.x, chunk.word[1] = v.y;
#else
  std::memcpy(&chunk, at, sizeof chunk);
#endif
}

TQKV_HOST_DEVICE void fetch(const uint8_t *at, Chunk<1> &chunk) {
#if defined(__CUDA_ARCH__)
  chunk.word[0] = *reinterpret_cast<const uint32_t *>(at);
#else
  std::memcpy(&chunk, at, sizeof chunk);
#endif
}

TQKV_HOST_DEVICE uint32_t fetch_half(const uint8_t *at) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const uint16_t *>(at);
#else
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  return half;
#endif
}

// Adjacent words whose address is a multiple of kAlign, in as few instructions as that allows.
template <int kWords, int kAlign, class Bytes>
TQKV_HOST_DEVICE void fetch_words(Bytes at, uint32_t *word) {
  constexpr int kVector = kWords % 4 == 0 && kAlign % 16 == 0 ? 4 : kWords % 2 == 0 && kAlign % 8 == 0 ? 2 : 1;
  for (int i = 0; i < kWords; i += kVector) {
    if constexpr (kAlign % 4 == 0) {
      Chunk<kVector> chunk;
      fetch(at + 4 * i, chunk);
      for (int k = 0; k < kVector; ++k) word[i + k] = chunk.word[k];
    } else {
      word[i] = fetch_half(at + 4 * i) | fetch_half(at + 4 * i + 2) << 16;
    }
  }
}

// int8 grid values: of the 8 magnitudes at 4 bits, of the ascending level indices at 2 and 3.
struct LevelTable {
  uint32_t low, high;
};

TQKV_HOST_DEVICE uint32_t look_up(LevelTable table, uint32_t nibbles) {
  return permute(table.low, table.high, nibbles);
}

// Bit of a nibble of the 1-bit plane that belongs to octet o (channels 8 o .. 8 o + 7), and those bits moved to bit 2.
TQKV_HOST_DEVICE constexpr int ones_bit(int o) {
  return 0x0312 >> (4 * (o & 3)) & 3;
}

template <int kBit>
TQKV_HOST_DEVICE uint32_t ones_to_top(uint32_t ones) {
  return kBit > 2 ? ones >> 1 : ones << (2 - kBit);
}

TQKV_HOST_DEVICE uint32_t ones_to_top(uint32_t ones, int bit) {
  return rotate_right(ones, bit - 2);
}

TQKV_HOST_DEVICE uint32_t index3(uint32_t two_bits, uint32_t ones_at_top) {
  return (two_bits & 0x33333333) | (ones_at_top & 0x44444444);
}

// Token i of the two of lanes g. A transposed matrix of lanes g by tokens has those of lanes 2 q and 2 q + 1 in a lane:
// where the tokens of one lane are together (kTogether), a pair that follows a pair; else first ones, then second ones.
template <bool kTogether>
TQKV_HOST_DEVICE constexpr int k_token(int i, int g) {
  return kTogether ? 2 * g + i : 4 * (g >> 1) + 2 * i + (g & 1);
}

// A lane's codes of one token of K. Channels are dealt to the four lanes of a token in parts, powers of two of at most
// 16 bytes a lane and plane. Of a part of 32 channels or more lane q has adjacent octets; of one of 16 lanes 0 and 1
// have an octet each, and the others repeat them against zeros in the query.
//
// Bank conflicts: of tokens apart a row of 64 bytes (or an odd multiple of 16 below 128) is read by LDS.128 or LDS.32 in
// the fewest wavefronts; others, and those of tokens together, take up to twice as many.
template <int kBits, int kHeadDim, bool kUniform = false>
struct KCodes {
  static_assert(kBits == 2 || !kUniform);
  static constexpr int kSteps = (kHeadDim + 31) / 32;
  static constexpr bool kSigned = !kUniform;
  static constexpr int kRow = kHeadDim * (kBits == 3 ? 2 : kBits) / 8, kOnesRow = kBits == 3 ? kHeadDim / 8 : 0;

  static constexpr int part_size(int first) {
    int size = kBits == 8 ? 64 : kBits == 4 ? 128 : 256;
    while (size > kHeadDim - first) size /= 2;
    return size;
  }
  static constexpr int octets(int first) { return (part_size(first) + 31) / 32; }
  static constexpr int first_octet(int first, int q) {
    return first / 8 + (part_size(first) >= 32 ? octets(first) * q : q & 1);
  }
  static constexpr int words(int first) {
    return kBits == 8 ? 2 * octets(first) : kBits == 4 ? octets(first) : (octets(first) + 1) / 2;
  }
  static constexpr int ones_words(int first) { return kBits == 3 ? (octets(first) + 3) / 4 : 0; }
  // Words of the parts before `first`.
  static constexpr int words_before(int first, bool ones) {
    int sum = 0;
    for (int f = 0; f < first; f += part_size(f)) sum += ones ? ones_words(f) : words(f);
    return sum;
  }
  static constexpr int kWords = words_before(kHeadDim, false), kOnesWords = words_before(kHeadDim, true);

  uint32_t word[kWords], ones[kOnesWords > 0 ? kOnesWords : 1];

  // `codes`: of K, of the tile.
  template <int kFirst = 0, class Bytes>
  TQKV_HOST_DEVICE void load(KCodes &c, Bytes codes, int token, int q) {
    constexpr int kCount = words(kFirst), kOnesCount = ones_words(kFirst), kSize = part_size(kFirst);
    const int o = first_octet(kFirst, q);
    const int in_row = 4 * (kBits == 8 ? 2 * o : kBits == 4 ? o : o >> 1);
    constexpr int kStart = kRow * kFirst / kHeadDim;
    fetch_words<kCount, alignment(kRow | kStart | 4 * kCount)>(codes + (token * kRow + in_row),
                                                               c.word + words_before(kFirst, false));
    if constexpr (kBits == 3) {
      const Bytes at = codes + (kTileTokens * kRow + token * kOnesRow + 4 * (o >> 2));
      uint32_t *ones = c.ones + words_before(kFirst, true);
      if constexpr (kSize == 16) {
        ones[0] = fetch_half(at);
      } else {
        fetch_words<kOnesCount, alignment(kOnesRow | kOnesRow * kFirst / kHeadDim | 4 * kOnesCount)>(at, ones);
      }
    }
    if constexpr (kFirst + kSize < kHeadDim) load<kFirst + kSize>(c, codes, token, q);
  }

  // Registers of all steps.
  template <int kFirst = 0>
  TQKV_HOST_DEVICE void expand(const KCodes &c, LevelTable table, int q, uint32_t (&b)[kSteps][2]) {
    expand_part<kFirst, 0>(c, table, q, b);
    if constexpr (kFirst + part_size(kFirst) < kHeadDim) expand<kFirst + part_size(kFirst)>(c, table, q, b);
  }

  // The channel at byte `byte` of register `reg` of lanes q: in B, and in A of registers 2 reg and 2 reg + 1. -1: none, zero
  // in queries. And how far the bytes are shifted to the left.
  static constexpr int channel(int step, int reg, int byte, int q) {
    int first = 0;
    while (step >= first / 32 + octets(first)) first += part_size(first);
    if (part_size(first) == 16 && q >= 2) return -1;
    return 8 * (first_octet(first, q) + step - first / 32) + (kUniform ? 2 * byte + reg : 4 * reg + byte);
  }
  static constexpr int shift(int reg) { return kUniform ? 2 + 4 * reg : 0; }

 private:
  static constexpr int alignment(int sizes) { return (sizes | 16) & -(sizes | 16); }

  template <int kFirst, int i>
  TQKV_HOST_DEVICE void expand_part(const KCodes &c, LevelTable table, int q, uint32_t (&b)[kSteps][2]) {
    if constexpr (i < octets(kFirst)) {
      expand_octet<kFirst, i>(c, table, q, b[kFirst / 32 + i]);
      expand_part<kFirst, i + 1>(c, table, q, b);
    }
  }

  template <int kFirst, int i>
  TQKV_HOST_DEVICE void expand_octet(const KCodes &c, LevelTable table, int q, uint32_t (&b)[2]) {
    const uint32_t *word = c.word + words_before(kFirst, false);
    if constexpr (kBits == 8) {
      b[0] = word[2 * i], b[1] = word[2 * i + 1];
    } else if constexpr (kBits == 4) {
      const uint32_t nibbles = word[i] & 0x77777777;
      b[0] = look_up(table, nibbles) ^ sign_bytes(word[i]);
      b[1] = look_up(table, high_half(nibbles)) ^ sign_bytes(word[i] << 4);
    } else if constexpr (kUniform) {  // every code to the top of its nibble
      const uint32_t field = word[i / 2] << (octets(kFirst) == 1 ? 2 - 2 * (q & 1) : 2 - 2 * (i % 2));
      b[0] = field & 0x0c0c0c0c, b[1] = field & 0xc0c0c0c0;
    } else {
      const uint32_t nibbles = indices<kFirst, i>(c, q);
      b[0] = look_up(table, nibbles), b[1] = look_up(table, high_half(nibbles));
    }
  }

  // Level indices of the lane's octet i of a part.
  template <int kFirst, int i>
  TQKV_HOST_DEVICE uint32_t indices(const KCodes &c, int q) {
    constexpr int kOctets = octets(kFirst);
    const uint32_t two = c.word[words_before(kFirst, false) + i / 2] >> (kOctets == 1 ? 2 * (q & 1) : 2 * (i % 2));
    if constexpr (kBits == 2) {
      return two & 0x33333333;
    } else {
      const uint32_t ones = c.ones[words_before(kFirst, true) + i / 4];
      if constexpr (part_size(kFirst) == 16) {  // the half word
        const uint32_t octet = ones >> (2 * (q & 1));
        return index3(two, (octet & 0x1111) << 2 | (octet & 0x2222) << 17);
      } else if constexpr (kOctets % 4 == 0) {
        return index3(two, ones_to_top<ones_bit(i)>(ones));
      } else {
        return index3(two, ones_to_top(ones, ones_bit(kOctets * q + i)));
      }
    }
  }
};

// Codes of V of one tile: those of 4 tokens (4 q .. 4 q + 3) and head_dim / 8 channels. A chunk of 16 bytes holds kUnit
// channels of a plane. Channels are dealt to the eight lanes g in parts of at most 8 units, halved as head_dim asks; of
// a part, sharers() lanes have one chunk between them, each some bytes of every token, or a field of them.
//
// Bank conflicts: lanes read adjacent pieces in the fewest wavefronts, but for the 2-bit plane at 3 bits, whose loads
// skip every other chunk and take twice as many.
template <int kBits, int kHeadDim, bool kUniform = false>
struct VCodes {
  static_assert(kBits == 2 || !kUniform);
  static constexpr int kTiles = kHeadDim / 16;  // of 16 rows
  static constexpr bool kSigned = !kUniform;
  static constexpr int kUnit = kBits == 3 ? 32 : 32 / kBits;
  static constexpr int kPlane = kTileTokens * kHeadDim * (kBits == 3 ? 2 : kBits) / 8;

  static constexpr int part_size(int first) {
    int size = 8 * kUnit;
    while (size > kHeadDim - first) size /= 2;
    return size;
  }
  // Lanes that share a chunk (of each of their planes), and the words that one of them reads there.
  static constexpr int sharers(int first) { return 8 * kUnit / part_size(first); }
  static constexpr int words(int first) { return sharers(first) >= 4 ? 1 : 4 / sharers(first); }
  // A lane's words of the first plane: of two chunks at 3 bits. Where some lanes share one at 4 bits, the words with
  // the signs of their channels follow.
  static constexpr int plane_words(int first) {
    const int sign_words = sharers(first) == 2 ? 4 : sharers(first) == 4 ? 2 : 0;
    return words(first) * (kBits == 3 && sharers(first) <= 4 ? 2 : 1) + (kBits == 4 ? sign_words : 0);
  }
  static constexpr int ones_words(int first) { return kBits == 3 ? words(first) : 0; }
  static constexpr int words_before(int first, bool ones) {
    int sum = 0;
    for (int f = 0; f < first; f += part_size(f)) sum += ones ? ones_words(f) : plane_words(f);
    return sum;
  }
  static constexpr int kWords = words_before(kHeadDim, false), kOnesWords = words_before(kHeadDim, true);

  uint32_t word[kWords], ones[kOnesWords > 0 ? kOnesWords : 1];

  // `codes`: of V, of the tile.
  template <int kFirst = 0, class Bytes>
  TQKV_HOST_DEVICE void load(VCodes &c, Bytes codes, int g, int q) {
    constexpr int kShare = sharers(kFirst), kCount = words(kFirst);
    uint32_t *word = c.word + words_before(kFirst, false), *ones = c.ones + words_before(kFirst, true);
    if constexpr (kBits == 3) {
      const Bytes plane1 = codes + kPlane;
      if constexpr (kShare <= 4) {
        const int k = kFirst / 32 + g / kShare, in_chunk = 4 * kCount * (g % kShare);
        fetch_words<kCount, 4 * kCount>(codes + (128 * k + 16 * q + in_chunk), word);
        fetch_words<kCount, 4 * kCount>(codes + (128 * k + 64 + 16 * q + in_chunk), word + kCount);
        fetch_words<kCount, 4 * kCount>(plane1 + (64 * k + 16 * q + in_chunk), ones);
      } else if constexpr (kShare == 8) {
        fetch_words<1, 4>(codes + (4 * kFirst + 64 * (g >> 2) + 16 * q + 4 * (g & 3)), word);
        fetch_words<1, 4>(plane1 + (2 * kFirst + 16 * q + 4 * (g & 3)), ones);
      } else {  // the half word
        fetch_words<1, 4>(codes + (4 * kFirst + 16 * q + 4 * (g >> 1)), word);
        fetch_words<1, 4>(plane1 + (2 * kFirst + 8 * q + 4 * (g >> 1 & 1)), ones);
      }
    } else {
      const Bytes chunk = codes + (64 * (kFirst / kUnit + g / kShare) + 16 * q);
      const int byte = kShare == 8 ? g >> 1 : kCount * (g % kShare);
      fetch_words<kCount, 4 * kCount>(chunk + 4 * byte, word);
      if constexpr (kBits == 4 && kShare == 2) fetch_words<4, 16>(chunk, word + kCount);
      if constexpr (kBits == 4 && kShare == 4) fetch_words<2, 8>(chunk + 8 * (g & 1), word + kCount);
    }
    if constexpr (kFirst + part_size(kFirst) < kHeadDim) load<kFirst + part_size(kFirst)>(c, codes, g, q);
  }

  // a[m][r]: register r of tile m's A operand for this tile's tokens in columns 0 .. 15, r + 2 in columns 16 .. 31.
  //
  // With kPairs (levels by table, at most 4 rows of queries): a[m][0] has by turns the channels (m, 0) and (m, 1) of
  // tokens 4 q and 4 q + 1, a[m][1] those of the other two. This is how the table gives them: two permutations for 8
  // codes are saved, and half of the accumulators. An instruction takes registers a[2 n][0], a[2 n + 1][0], a[2 n][1],
  // a[2 n + 1][1], 16 tokens and 32 channels. A query's weights go to the even bytes of its first column and to the odd ones
  // of its second, zeros between. So do the sums of (m, 0) and (m, 1).
  template <bool kPairs = false, int kFirst = 0>
  TQKV_HOST_DEVICE void expand(const VCodes &c, LevelTable table, int g, uint32_t (&a)[kTiles][2]) {
    static_assert(!kPairs || (kBits != 8 && !kUniform));
    expand_words<kPairs, kFirst, 0>(c, table, g, a);
    if constexpr (kFirst + part_size(kFirst) < kHeadDim) expand<kPairs, kFirst + part_size(kFirst)>(c, table, g, a);
  }

  // The channel of row g + 8 r of tile m, and how far its bytes are shifted to the left. The second form leaves a kernel
  // nothing to divide by.
  static constexpr int channel(int m, int r, int g) {
    const int first = part_of(m);
    return channel_in(first, sharers(first), words(first), m, r, g);
  }
  template <int m>
  TQKV_HOST_DEVICE int channel_of(int r, int g) {
    constexpr int kFirst = part_of(m), kShare = sharers(kFirst), kCount = words(kFirst);
    return channel_in(kFirst, kShare, kCount, m, r, g);
  }
  static constexpr int shift(int m, int r) { return !kUniform || sharers(part_of(m)) == 8 ? 0 : 4 * r + 2 * (m & 1); }

 private:
  static constexpr int part_of(int m) {
    int first = 0;
    while (16 * m >= first + part_size(first)) first += part_size(first);
    return first;
  }

  static constexpr int channel_in(int first, int share, int count, int m, int r, int g) {
    const int i = 2 * (m - first / 16) + r;  // of the lane's channels in this part
    const int chunk = first + kUnit * (g / share), byte = count * (g % share);
    if (kBits == 8) return chunk + byte + i;
    if (kBits == 4) return chunk + 2 * byte + i;
    if (share == 16 || (kBits == 2 && share == 8)) return first + 2 * (g >> 1) + 8 * (g & 1) + i;
    if (share == 8) return first + 16 * (g >> 2) + 2 * (g & 3) + 8 * (i >> 1) + (i & 1);
    const int fields = kUnit < 8 ? 1 : kUnit / 8;  // of 8 channels
    return chunk + 2 * (byte + i / (2 * fields)) + 8 * (i / 2 % fields) + (i & 1);
  }

  // Levels of the channels of a word's low and high nibbles; the table gives them by pairs of tokens.
  template <bool kPairs>
  TQKV_HOST_DEVICE void look_up_pair(LevelTable table, uint32_t nibbles, uint32_t (&a)[2]) {
    const uint32_t first = look_up(table, nibbles), second = look_up(table, high_half(nibbles));
    a[0] = kPairs ? first : permute(first, second, 0x6420);
    a[1] = kPairs ? second : permute(first, second, 0x7531);
  }

  // `low` and `high`: words whose bytes have these channels' signs on top.
  template <bool kPairs>
  TQKV_HOST_DEVICE void apply_signs(uint32_t low, uint32_t high, uint32_t (&a)[2]) {
    a[0] ^= kPairs ? permute(low, high, 0xd9c8) : sign_bytes(low);
    a[1] ^= kPairs ? permute(low, high, 0xfbea) : sign_bytes(high);
  }

  template <bool kPairs, int kFirst, int k>
  TQKV_HOST_DEVICE void expand_words(const VCodes &c, LevelTable table, int g, uint32_t (&a)[kTiles][2]) {
    if constexpr (k < words(kFirst)) {
      expand_word<kPairs, kFirst, k>(c, table, g, a);
      expand_words<kPairs, kFirst, k + 1>(c, table, g, a);
    }
  }

  // The channels of word k of a part.
  template <bool kPairs, int kFirst, int k>
  TQKV_HOST_DEVICE void expand_word(const VCodes &c, LevelTable table, int g, uint32_t (&a)[kTiles][2]) {
    constexpr int kTile = kFirst / 16, kShare = sharers(kFirst);
    const uint32_t *word = c.word + words_before(kFirst, false), *ones = c.ones + words_before(kFirst, true);
    if constexpr (kBits == 8) {
      a[kTile + k / 2][k % 2] = word[k];
    } else if constexpr (kBits == 4) {
      look_up_pair<kPairs>(table, word[k] & 0x77777777, a[kTile + k]);
      // The signs of channels 2 k and 2 k + 1 of the lane's.
      if constexpr (kShare == 1) {
        constexpr int kLeft = k < 2 ? 0 : 4;
        apply_signs<kPairs>(word[2 * k % 4] << kLeft, word[2 * k % 4 + 1] << kLeft, a[kTile + k]);
      } else {
        const int left = kShare == 2 ? 4 * (g & 1) : 2 * (g & 2);
        const uint32_t *signs = word + words(kFirst) + 2 * k;
        apply_signs<kPairs>(signs[0] << left, signs[1] << left, a[kTile + k]);
      }
    } else if constexpr (kBits == 2 && kShare == 8) {
      const uint32_t field = word[0] >> (2 * (g & 1)) & 0x33333333;
      if constexpr (kUniform) {
        a[kTile][0] = field & 0x03030303, a[kTile][1] = field >> 4 & 0x03030303;
      } else {
        look_up_pair<kPairs>(table, field, a[kTile]);
      }
    } else if constexpr (kUniform) {
      a[kTile + 2 * k][0] = word[k] & 0x03030303;
      a[kTile + 2 * k][1] = word[k] & 0x30303030;
      a[kTile + 2 * k + 1][0] = word[k] & 0x0c0c0c0c;
      a[kTile + 2 * k + 1][1] = word[k] & 0xc0c0c0c0;
    } else if constexpr (kBits == 2) {
      look_up_pair<kPairs>(table, word[k] & 0x33333333, a[kTile + 2 * k]);
      look_up_pair<kPairs>(table, word[k] >> 2 & 0x33333333, a[kTile + 2 * k + 1]);
    } else if constexpr (kShare <= 4) {
      const uint32_t second = word[words(kFirst) + k];
      look_up_pair<kPairs>(table, index3(word[k], ones_to_top<ones_bit(0)>(ones[k])), a[kTile + 4 * k]);
      look_up_pair<kPairs>(table, index3(word[k] >> 2, ones_to_top<ones_bit(1)>(ones[k])), a[kTile + 4 * k + 1]);
      look_up_pair<kPairs>(table, index3(second, ones_to_top<ones_bit(2)>(ones[k])), a[kTile + 4 * k + 2]);
      look_up_pair<kPairs>(table, index3(second >> 2, ones_to_top<ones_bit(3)>(ones[k])), a[kTile + 4 * k + 3]);
    } else if constexpr (kShare == 8) {
      const int o = 2 * (g >> 2);
      look_up_pair<kPairs>(table, index3(word[0], ones_to_top(ones[0], ones_bit(o))), a[kTile]);
      look_up_pair<kPairs>(table, index3(word[0] >> 2, ones_to_top(ones[0], ones_bit(o + 1))), a[kTile + 1]);
    } else {  // the half word: bit (channel >> 2) of a nibble
      const uint32_t top = ones_to_top(ones[0], (g >> 2) + 2 * (g & 1));
      look_up_pair<kPairs>(table, index3(word[0] >> (2 * (g & 1)), top), a[kTile]);
    }
  }
};

}  // namespace tqkv::cuda
