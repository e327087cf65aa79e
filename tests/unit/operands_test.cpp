// SPDX-License-Identifier: Apache-2.0
// The attention kernel's loaders, lane by lane: from pages written by the library to both matrix products, which must
// be plain sums over the levels that the CPU decodes. The matrix instruction is emulated by the fragment layout of the
// PTX ISA (mma.m16n8k32, 8-bit integers).
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cache/pages.hpp"
#include "catch.hpp"
#include "codec/codec.hpp"
#include "kernels/device/operands.cuh"
#include "runtime/error.hpp"

namespace {

using namespace tqkv;
using cuda::Chunk;

constexpr int kLanes = 32, kRows = 8;
constexpr int kUniformBits = 20;  // 2 bits with uniform levels

int bits_of(int kind) {
  return kind == kUniformBits ? 2 : kind;
}

using Registers2 = std::array<std::array<uint32_t, 2>, kLanes>;
using Registers4 = std::array<std::array<uint32_t, 4>, kLanes>;
using Sums = std::array<std::array<int32_t, 4>, kLanes>;

int byte_of(uint32_t reg, int i, bool is_signed) {
  const int byte = int(reg >> (8 * i) & 0xff);
  return is_signed && byte > 127 ? byte - 256 : byte;
}

void mma(const Registers4 &a, bool a_signed, const Registers2 &b, bool b_signed, Sums &c) {
  int left[16][32], right[32][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane >> 2, q = lane & 3;
    for (int reg = 0; reg < 4; ++reg) {
      for (int i = 0; i < 4; ++i) {
        left[g + 8 * (reg & 1)][4 * q + i + 16 * (reg >> 1)] = byte_of(a[size_t(lane)][size_t(reg)], i, a_signed);
        if (reg < 2) right[4 * q + i + 16 * reg][g] = byte_of(b[size_t(lane)][size_t(reg)], i, b_signed);
      }
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = (lane >> 2) + 8 * (i >> 1), column = 2 * (lane & 3) + (i & 1);
      for (int k = 0; k < 32; ++k) c[size_t(lane)][size_t(i)] += left[row][k] * right[k][column];
    }
  }
}

std::mt19937_64 generator() {
  static uint64_t calls = 0;
  return std::mt19937_64(tqkv_test::seed() + 0x9e3779b97f4a7c15 * ++calls);
}

// One side of a tile: its stored codes, and the levels (odd integers) that the CPU path decodes.
struct Tile {
  int head_dim = 0;
  std::vector<uint8_t> codes;
  std::vector<int> levels;  // [token, channel]
  cuda::LevelTable table{};
  int level(int token, int c) const { return levels[size_t(token * head_dim + c)]; }
};

Tile make_tile(int which, int kind, int head_dim) {
  std::mt19937_64 random = generator();
  tq_side_config config{};
  config.head_dim = head_dim;
  config.bits = bits_of(kind);
  config.rotation = TQ_ROTATION_NONE;
  if (kind == kUniformBits) config.codebook = TQ_CODEBOOK_UNIFORM;
  Side side;
  const tq_status status = make_side(config, which, random(), TQ_TYPE_BF16, "side", &side);
  INFO(last_error());
  REQUIRE(status == TQ_OK);

  Tile tile;
  tile.head_dim = head_dim;
  const size_t record_bytes = size_t(side.code_bytes());
  tile.codes.assign(kTileTokens * record_bytes, 0xaa);
  std::vector<uint8_t> records(kTileTokens * record_bytes);
  std::vector<float> rows(size_t(kTileTokens * head_dim));
  std::normal_distribution<float> normal;
  for (float &x : rows) x = normal(random);
  uint16_t scales[kTileTokens];
  Encoded encoded[kTileTokens];
  kCodecScalar.encode(side, rows.data(), kTileTokens, records.data(), scales, encoded);
  // Every other token is any codes at all: the rare ones too.
  for (size_t i = 0; i < records.size(); ++i) {
    if (i / record_bytes % 2 == 1) records[i] = uint8_t(random());
  }
  for (int t = 0; t < kTileTokens; ++t) {
    write_record(side, which, tile.codes.data(), t, &records[size_t(t) * record_bytes]);
  }
  std::vector<uint8_t> read(records.size());
  for (int t = 0; t < kTileTokens; ++t) {
    read_record(side, which, tile.codes.data(), t, &read[size_t(t) * record_bytes]);
  }
  std::fill_n(scales, kTileTokens, uint16_t{0x3c00});  // 1
  kCodecScalar.decode(side, read.data(), scales, kTileTokens, rows.data());
  for (const float x : rows) tile.levels.push_back(int(x / side.decode_gain));  // a power of two
  uint64_t table = 0;
  for (int i = 0; i < 8 && side.bits != 8; ++i) {
    table |= uint64_t(uint8_t((int(side.levels[i]) - 1) / 2)) << (8 * i);
  }
  tile.table = {uint32_t(table), uint32_t(table >> 32)};
  return tile;
}

struct Product {
  bool is_signed = true;
  int shift = 0;
};

// A weight of a row and token is a number that only the lane with that score has.
uint32_t weight_of(int64_t score) {
  return uint32_t(uint64_t(score) * 0x9e3779b97f4a7c15 >> 48);
}

using LaneScores = std::vector<std::array<std::array<int64_t, 2>, 2>>;

template <int kBits, int kHeadDim, bool kUniform>
struct KSide {
  using Codes = cuda::KCodes<kBits, kHeadDim, kUniform>;

  // Sums of query * level of row 4 b + q, token k_token(i, g) in [lane][b][i].
  template <bool kTogether>
  static LaneScores scores(const Tile &tile, const std::vector<int> &queries) {
    std::array<std::array<std::array<std::array<uint32_t, 2>, Codes::kSteps>, 2>, kLanes> k;
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 2; ++i) {
        Codes codes;
        uint32_t regs[Codes::kSteps][2];
        Codes::load(codes, tile.codes.data(), cuda::k_token<kTogether>(i, lane >> 2), lane & 3);
        Codes::expand(codes, tile.table, lane & 3, regs);
        for (size_t s = 0; s < Codes::kSteps; ++s) k[size_t(lane)][size_t(i)][s] = {regs[s][0], regs[s][1]};
      }
    }
    LaneScores result(kLanes);
    for (int block = 0; block < 2; ++block) {
      Sums sums[2] = {};  // of registers that are shifted differently
      for (int step = 0; step < Codes::kSteps; ++step) {
        for (int reg = 0; reg < 2; ++reg) {
          Registers4 left{};
          Registers2 right{};
          for (size_t lane = 0; lane < kLanes; ++lane) {
            const int row = 4 * block + int(lane >> 3);
            const bool high = (lane >> 2 & 1) == 0;
            for (size_t i = 0; i < 2; ++i) left[lane][i] = k[lane][i][size_t(step)][size_t(reg)];
            for (int i = 0; i < 4; ++i) {
              const int c = Codes::channel(step, reg, i, int(lane & 3));
              if (c < 0) continue;
              const int query = queries[size_t(row * kHeadDim + c)], low = int8_t(query);
              right[lane][0] |= uint32_t(uint8_t(high ? (query - low) / 256 : low)) << (8 * i);
            }
          }
          mma(left, Codes::kSigned, right, true, sums[reg]);
        }
      }
      for (size_t lane = 0; lane < kLanes; ++lane) {
        int64_t sum_of_queries = 0;
        for (int c = 0; c < kHeadDim; ++c) {
          sum_of_queries += queries[size_t((4 * block + int(lane & 3)) * kHeadDim + c)];
        }
        for (size_t i = 0; i < 2; ++i) {
          int64_t &score = result[lane][size_t(block)][i];
          score = (Codes::kSigned ? 1 : -3) * sum_of_queries;
          for (int reg = 0; reg < 2; ++reg) {
            const int64_t dot = 256 * int64_t{sums[reg][lane][2 * i]} + sums[reg][lane][2 * i + 1];
            REQUIRE(dot % (1 << Codes::shift(reg)) == 0);
            score += 2 * dot / (1 << Codes::shift(reg));
          }
        }
      }
    }
    return result;
  }

  // Every channel is once in the lanes of a token.
  static void check_channels() {
    std::vector<int> seen(kHeadDim);
    for (int step = 0; step < Codes::kSteps; ++step) {
      for (int q = 0; q < 4; ++q) {
        for (int i = 0; i < 8; ++i) {
          const int c = Codes::channel(step, i >> 2, i & 3, q);
          REQUIRE((c >= -1 && c < kHeadDim));
          if (c >= 0) ++seen[size_t(c)];
        }
      }
    }
    REQUIRE(seen == std::vector<int>(kHeadDim, 1));
  }
};

template <int kBits, int kHeadDim, bool kUniform>
struct VSide {
  using Codes = cuda::VCodes<kBits, kHeadDim, kUniform>;

  static std::array<std::array<uint32_t, 2>, kHeadDim / 16> operand(const Tile &tile, int lane) {
    Codes codes;
    uint32_t a[Codes::kTiles][2];
    Codes::load(codes, tile.codes.data(), lane >> 2, lane & 3);
    Codes::expand(codes, tile.table, lane >> 2, a);
    std::array<std::array<uint32_t, 2>, kHeadDim / 16> result;
    std::memcpy(&result, a, sizeof a);
    return result;
  }

  // Sums of weight * level over two tiles, [row, channel]. b: operands of each block of 4 rows, by lanes and tiles.
  static std::vector<int64_t> sums(const Tile (&tiles)[2], const Registers2 (&b)[2],
                                   const std::vector<int64_t> &sum_of_weights) {
    std::vector<int64_t> result(kRows * kHeadDim, INT64_MIN);
    for (int m = 0; m < Codes::kTiles; ++m) {
      Registers4 left;
      for (int lane = 0; lane < kLanes; ++lane) {
        const auto first = operand(tiles[0], lane)[size_t(m)], second = operand(tiles[1], lane)[size_t(m)];
        left[size_t(lane)] = {first[0], first[1], second[0], second[1]};
      }
      for (int block = 0; block < 2; ++block) {
        Sums both{};
        mma(left, Codes::kSigned, b[block], false, both);
        for (int lane = 0; lane < kLanes; ++lane) {
          for (int half = 0; half < 2; ++half) {
            const int row = 4 * block + (lane & 3), c = Codes::channel(m, half, lane >> 2);
            REQUIRE((c >= 0 && c < kHeadDim));
            int64_t &sum = result[size_t(row * kHeadDim + c)];
            REQUIRE(sum == INT64_MIN);  // every channel has one place
            const auto &low_high = both[size_t(lane)];
            const int64_t dot = 256 * int64_t{low_high[size_t(2 * half + 1)]} + low_high[size_t(2 * half)];
            const int64_t unit = 1 << Codes::shift(m, half);
            REQUIRE(dot % unit == 0);
            sum = 2 * dot / unit + (Codes::kSigned ? 1 : -3) * sum_of_weights[size_t(row)];
          }
        }
      }
    }
    return result;
  }
};

// Pairs of channels, for 4 rows of queries: b[byte][tile] are operands of one tile each.
template <int kBits, int kHeadDim>
std::vector<int64_t> sums_of_pairs(const Tile (&tiles)[2], const Registers2 (&b)[2][2],
                                   const std::vector<int64_t> &sum_of_weights) {
  using Codes = cuda::VCodes<kBits, kHeadDim, false>;
  std::vector<int64_t> result(kRows / 2 * kHeadDim, INT64_MIN);
  for (int n = 0; n < (Codes::kTiles + 1) / 2; ++n) {
    Sums sums[2] = {};
    for (size_t tile = 0; tile < 2; ++tile) {
      Registers4 left{};
      for (int lane = 0; lane < kLanes; ++lane) {
        Codes codes;
        uint32_t a[Codes::kTiles][2];
        Codes::load(codes, tiles[tile].codes.data(), lane >> 2, lane & 3);
        Codes::template expand<true>(codes, tiles[tile].table, lane >> 2, a);
        for (int r = 0; r < 2 && 2 * n + r < Codes::kTiles; ++r) {
          left[size_t(lane)][size_t(r)] = a[2 * n + r][0], left[size_t(lane)][size_t(2 + r)] = a[2 * n + r][1];
        }
      }
      for (size_t byte = 0; byte < 2; ++byte) mma(left, true, b[byte][tile], false, sums[byte]);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4 && 2 * n + (i >> 1) < Codes::kTiles; ++i) {
        const int row = lane & 3, c = Codes::channel(2 * n + (i >> 1), i & 1, lane >> 2);
        int64_t &sum = result[size_t(row * kHeadDim + c)];
        REQUIRE(sum == INT64_MIN);
        const int64_t dot = 256 * int64_t{sums[1][size_t(lane)][size_t(i)]} + sums[0][size_t(lane)][size_t(i)];
        sum = 2 * dot + sum_of_weights[size_t(row)];
      }
    }
  }
  return result;
}

// ---- every address of a warp

struct Access {
  int64_t offset;
  int bytes;
};

// Stands for a pointer to a tile's codes; keeps what is read.
struct Traced {
  int64_t offset;
  std::vector<Access> *accesses;
  friend Traced operator+(Traced at, int64_t bytes) { return {at.offset + bytes, at.accesses}; }
};

template <int kWords>
void fetch(Traced at, Chunk<kWords> &chunk) {
  at.accesses->push_back({at.offset, 4 * kWords});
  chunk = {};
}

uint32_t fetch_half(Traced at) {
  at.accesses->push_back({at.offset, 2});
  return 0;
}

// Wavefronts of shared memory that a warp's loads take, and the fewest that loads of their width can take: lanes are
// served in groups of 128 bytes; in one wavefront each of the 32 banks gives one word.
struct Wavefronts {
  int taken = 0, fewest = 0;
};

Wavefronts count_wavefronts(const std::array<std::vector<Access>, kLanes> &lanes, int64_t bytes) {
  Wavefronts result;
  for (size_t n = 0; n < lanes[0].size(); ++n) {
    const int width = lanes[0][n].bytes, group = width <= 4 ? 32 : 128 / width;
    for (int first = 0; first < kLanes; first += group) {
      std::map<int64_t, std::vector<int64_t>> words_of_bank;
      for (int lane = first; lane < first + group; ++lane) {
        REQUIRE(lanes[size_t(lane)].size() == lanes[0].size());
        const Access access = lanes[size_t(lane)][n];
        REQUIRE(access.bytes == width);
        REQUIRE(access.offset % width == 0);
        REQUIRE((access.offset >= 0 && access.offset + width <= bytes));
        for (int64_t word = access.offset / 4; 4 * word < access.offset + width; ++word) {
          std::vector<int64_t> &words = words_of_bank[word % 32];
          if (std::ranges::find(words, word) == words.end()) words.push_back(word);
        }
      }
      size_t most = 0;
      for (const auto &[bank, words] : words_of_bank) most = std::max(most, words.size());
      result.taken += int(most);
      ++result.fewest;
    }
  }
  return result;
}

template <int kBits, int kHeadDim, bool kUniform, bool kTogether>
Wavefronts k_wavefronts() {
  using Codes = cuda::KCodes<kBits, kHeadDim, kUniform>;
  Wavefronts sum;
  for (int j = 0; j < 2; ++j) {
    std::array<std::vector<Access>, kLanes> lanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      Codes codes;
      Codes::load(codes, Traced{0, &lanes[size_t(lane)]}, cuda::k_token<kTogether>(j, lane >> 2), lane & 3);
    }
    const Wavefronts one = count_wavefronts(lanes, kTileTokens * record_bytes(kHeadDim, kBits));
    sum.taken += one.taken, sum.fewest += one.fewest;
  }
  return sum;
}

template <int kBits, int kHeadDim, bool kUniform>
Wavefronts v_wavefronts() {
  using Codes = cuda::VCodes<kBits, kHeadDim, kUniform>;
  std::array<std::vector<Access>, kLanes> lanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    Codes codes;
    Codes::load(codes, Traced{0, &lanes[size_t(lane)]}, lane >> 2, lane & 3);
  }
  return count_wavefronts(lanes, kTileTokens * record_bytes(kHeadDim, kBits));
}

// ---- every kind of side

struct Kind {
  int kind, head_dim;
  decltype(&KSide<4, 128, false>::scores<false>) scores[2];  // of tokens apart, and together
  decltype(&KSide<4, 128, false>::check_channels) check_channels;
  decltype(&VSide<4, 128, false>::sums) sums;
  decltype(&sums_of_pairs<4, 128>) sums_of_pairs;  // or none
  decltype(&v_wavefronts<4, 128, false>) k_wavefronts[2], v_wavefronts;
};

template <int kBits, int kHeadDim, bool kUniform>
Kind make_kind() {
  using K = KSide<kBits, kHeadDim, kUniform>;
  decltype(&sums_of_pairs<4, 128>) pairs = nullptr;
  if constexpr (kBits != 8 && !kUniform) pairs = &sums_of_pairs<kBits, kHeadDim>;
  return {kUniform ? kUniformBits : kBits,
          kHeadDim,
          {&K::template scores<false>, &K::template scores<true>},
          &K::check_channels,
          &VSide<kBits, kHeadDim, kUniform>::sums,
          pairs,
          {&k_wavefronts<kBits, kHeadDim, kUniform, false>, &k_wavefronts<kBits, kHeadDim, kUniform, true>},
          &v_wavefronts<kBits, kHeadDim, kUniform>};
}

template <int... kHeadDims>
std::vector<Kind> make_kinds() {
  std::vector<Kind> kinds;
  (kinds.insert(kinds.end(),
                {make_kind<4, kHeadDims, false>(), make_kind<3, kHeadDims, false>(), make_kind<2, kHeadDims, false>(),
                 make_kind<2, kHeadDims, true>(), make_kind<8, kHeadDims, false>()}),
   ...);
  return kinds;
}

const std::vector<Kind> &kinds() {
  static const std::vector<Kind> all = make_kinds<64, 80, 96, 112, 128, 192, 256>();
  return all;
}

std::string text(const Kind &kind) {
  std::ostringstream out;
  out << "kind " << kind.kind << ", head_dim " << kind.head_dim;
  return out.str();
}

// movmatrix: lane (g, q) has elements 2 q and 2 q + 1 of row g, then of column g.
using Words = std::array<uint32_t, kLanes>;

Words transpose(const Words &rows) {
  Words columns{};
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t i = 0; i < 2; ++i) {
      const size_t row = 2 * (lane & 3) + i, column = lane >> 2;
      columns[lane] |= (rows[4 * row + column / 2] >> (16 * (column & 1)) & 0xffff) << (16 * i);
    }
  }
  return columns;
}

// Two tiles from queries to weighted sums; with `pairs` of 4 rows.
void check_products(const Kind &k, const Kind &v, bool pairs) {
  std::mt19937_64 random = generator();
  std::vector<int> queries(size_t(kRows * k.head_dim));
  for (int &x : queries) x = std::uniform_int_distribution<int>(-32640, 32639)(random);
  const Tile k_tiles[2] = {make_tile(TQ_SIDE_K, k.kind, k.head_dim), make_tile(TQ_SIDE_K, k.kind, k.head_dim)};
  const Tile v_tiles[2] = {make_tile(TQ_SIDE_V, v.kind, v.head_dim), make_tile(TQ_SIDE_V, v.kind, v.head_dim)};

  std::vector<int64_t> weights(kRows * 2 * kTileTokens), sum_of_weights(kRows);
  Registers2 b[2] = {}, b_pairs[2][2] = {};  // the lanes' own scores are all that operands are made of
  for (int tile = 0; tile < 2; ++tile) {
    const LaneScores scores = k.scores[pairs ? 0 : 1](k_tiles[tile], queries);
    for (int block = 0; block < 2; ++block) {
      Words bytes{}, pair_words[2] = {};
      for (int lane = 0; lane < kLanes; ++lane) {
        const int row = 4 * block + (lane & 3), g = lane >> 2;
        for (int i = 0; i < 2; ++i) {
          const int token = pairs ? cuda::k_token<false>(i, g) : cuda::k_token<true>(i, g);
          int64_t expected = 0;
          for (int c = 0; c < k.head_dim; ++c) {
            expected += int64_t{queries[size_t(row * k.head_dim + c)]} * k_tiles[tile].level(token, c);
          }
          const int64_t score = scores[size_t(lane)][size_t(block)][size_t(i)];
          REQUIRE(score == expected);
          const uint32_t weight = weight_of(score);
          bytes[size_t(lane)] |= (weight & 0xff) << (8 * i) | (weight >> 8) << (16 + 8 * i);
          pair_words[i][size_t(lane)] = weight * 0x10001;
          weights[size_t(row * 2 * kTileTokens + tile * kTileTokens + token)] = weight_of(expected);
        }
      }
      const Words columns = transpose(bytes);
      for (size_t lane = 0; lane < kLanes; ++lane) b[block][lane][size_t(tile)] = columns[lane];
      if (!pairs || block > 0) continue;
      for (size_t i = 0; i < 2; ++i) {
        const Words pair_columns = transpose(pair_words[i]);
        for (size_t lane = 0; lane < kLanes; ++lane) {
          const bool odd = (lane >> 2 & 1) != 0;
          b_pairs[0][tile][lane][i] = cuda::permute(pair_columns[lane], 0, odd ? 0x2404 : 0x4240);
          b_pairs[1][tile][lane][i] = cuda::permute(pair_columns[lane], 0, odd ? 0x3414 : 0x4341);
        }
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int t = 0; t < 2 * kTileTokens; ++t) {
      sum_of_weights[size_t(row)] += weights[size_t(row * 2 * kTileTokens + t)];
    }
  }
  const std::vector<int64_t> sums =
      pairs ? v.sums_of_pairs(v_tiles, b_pairs, sum_of_weights) : v.sums(v_tiles, b, sum_of_weights);
  for (int row = 0; row < (pairs ? kRows / 2 : kRows); ++row) {
    for (int c = 0; c < v.head_dim; ++c) {
      int64_t expected = 0;
      for (int t = 0; t < 2 * kTileTokens; ++t) {
        expected += weights[size_t(row * 2 * kTileTokens + t)] * v_tiles[t / kTileTokens].level(t % kTileTokens, c);
      }
      REQUIRE(sums[size_t(row * v.head_dim + c)] == expected);
    }
  }
}

}  // namespace

TEST_CASE("scores and weighted sums by lanes are the plain sums over decoded levels") {
  for (const Kind &k : kinds()) {
    k.check_channels();
    for (const Kind &v : kinds()) {
      // Head dims that differ between K and V: some pairs are enough.
      if (k.head_dim != v.head_dim && (k.kind != 4 || v.kind != 3)) continue;
      INFO("K: " << text(k) << "; V: " << text(v));
      check_products(k, v, false);
      if (v.sums_of_pairs != nullptr) check_products(k, v, true);
    }
  }
}

TEST_CASE("loads of a warp: aligned, inside the tile, and in the stated number of wavefronts") {
  struct Expected {
    int head_dim, bits, k, v;
  };
  const Expected expected[] = {{64, 4, 8, 4},    {64, 3, 6, 5},    {64, 2, 4, 2},    {64, 8, 8, 8},    {128, 4, 8, 8},
                               {128, 3, 12, 10}, {128, 2, 8, 4},   {128, 8, 32, 16}, {256, 4, 32, 16}, {256, 3, 16, 20},
                               {256, 2, 8, 8},   {256, 8, 64, 32}, {192, 8, 24, 24}};
  size_t found = 0;
  for (const Kind &kind : kinds()) {
    INFO(text(kind));
    const Wavefronts k = kind.k_wavefronts[0](), together = kind.k_wavefronts[1](), v = kind.v_wavefronts();
    CHECK(k.taken <= 2 * k.fewest);
    CHECK(together.taken <= 2 * together.fewest);
    CHECK(v.taken <= (bits_of(kind.kind) == 3 ? 2 : 1) * v.fewest);
    for (const Expected &e : expected) {
      if (e.head_dim != kind.head_dim || e.bits != bits_of(kind.kind)) continue;
      CHECK(k.taken == e.k);
      CHECK(v.taken == e.v);
      ++found;
    }
  }
  CHECK(found == 16);
}
