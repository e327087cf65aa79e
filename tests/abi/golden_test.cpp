// SPDX-License-Identifier: Apache-2.0
// Golden bytes: what is stored today is what was stored before, and it means what tqkv.h says. The files in
// tests/golden are written by this test when TQKV_WRITE_GOLDEN is set; every line is then, as always, checked against
// the oracle before it is compared.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include "encoding.hpp"

namespace {

std::string hex(const std::vector<uint8_t> &bytes) {
  static const char *digits = "0123456789abcdef";
  std::string text;
  for (uint8_t byte : bytes) {
    text += digits[byte >> 4];
    text += digits[byte & 15];
  }
  return text;
}

std::vector<uint8_t> unhex(const std::string &text) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i + 1 < text.size(); i += 2) {
    bytes.push_back(uint8_t(std::stoi(text.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

// Lines of "name: value", compared with tests/golden/<file>, or written there.
class Golden {
 public:
  explicit Golden(const char *file) {
    const char *directory = std::getenv("TQKV_GOLDEN_DIR");
    path_ = directory ? std::filesystem::path(directory)
                      : std::filesystem::path(__FILE__).parent_path().parent_path() / "golden";
    path_ /= file;
    std::ifstream in(path_);
    for (std::string line; std::getline(in, line);) {
      const size_t colon = line.find(": ");
      if (colon != std::string::npos && line[0] != '#') stored_[line.substr(0, colon)] = line.substr(colon + 2);
    }
  }
  void check(const std::string &name, const std::string &value) {
    lines_ += name + ": " + value + "\n";
    seen_.insert(name);
    if (writing()) return;
    INFO(path_.string() << ": " << name);
    REQUIRE(stored_.count(name) == 1);
    CHECK(stored_[name] == value);
  }
  // The stored value, or what is about to be stored.
  std::string value(const std::string &name, const std::string &otherwise) const {
    const auto found = stored_.find(name);
    return writing() || found == stored_.end() ? otherwise : found->second;
  }
  void finish(const char *comment) {
    if (writing()) {
      std::filesystem::create_directories(path_.parent_path());
      std::ofstream(path_) << "# " << comment << "\n# Written by golden_test with TQKV_WRITE_GOLDEN=1.\n" << lines_;
      return;
    }
    for (const auto &[name, value] : stored_) {
      INFO("no longer checked: " << name);
      CHECK(seen_.count(name) == 1);
    }
  }

 private:
  static bool writing() { return std::getenv("TQKV_WRITE_GOLDEN") != nullptr; }

  std::filesystem::path path_;
  std::map<std::string, std::string> stored_;
  std::set<std::string> seen_;
  std::string lines_;
};

// Values that every type holds exactly: multiples of 1/16 up to 50/16 in magnitude, without symmetry.
std::vector<double> fixed_values(int64_t count, int64_t from) {
  std::vector<double> values;
  for (int64_t i = from; i < from + count; ++i) values.push_back(double((i * i * 7 + i * 37 + 11) % 101 - 50) / 16);
  return values;
}

std::string codec_name(const tq_config &config, const char *side, const tq_side_config &s) {
  std::ostringstream name;
  name << side << " head_dim=" << s.head_dim << " bits=" << s.bits;
  if (s.rotation != TQ_ROTATION_NONE && s.bits != 16) {
    name << " rounds=" << std::max(1, s.hadamard_rounds) << " seed=" << config.seed;
  }
  return name.str();
}

}  // namespace

TEST_CASE("golden rotations", "[slow]") {
  Golden golden("rotations.txt");
  for (int base : {12, 20, 28, 36}) {
    const oracle::Matrix h = oracle::base_hadamard(base);
    std::string rows;
    for (int row = 0; row < base; ++row) {
      for (int c = 0; c < base; ++c) rows += h(row, c) > 0 ? '+' : '-';
      rows += ' ';
    }
    rows.pop_back();
    golden.check("base " + std::to_string(base), rows);
  }
  const Target &target = targets().front();
  for (const int head_dim : {128, 576, 112}) {
    for (const uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{0x0123456789abcdef}, ~uint64_t{0}}) {
      tq_config config = make_config(target, head_dim, 8, 8);
      config.k.scale_type = config.v.scale_type = TQ_TYPE_F32;
      config.k.rotation = config.v.rotation = TQ_ROTATION_HADAMARD;
      config.seed = seed;
      const CodecPtr codec = make_codec(config);
      for (int32_t side : {TQ_SIDE_K, TQ_SIDE_V}) {
        for (int round = 0; round < 3; ++round) {
          const std::vector<int> signs = oracle::rotation_signs(head_dim, side, round, seed);
          std::vector<uint8_t> bits(size_t(head_dim) / 8, 0);
          for (int c = 0; c < head_dim; ++c) bits[size_t(c) / 8] |= uint8_t((signs[size_t(c)] < 0) << (c % 8));
          golden.check("signs head_dim=" + std::to_string(head_dim) + " seed=" + std::to_string(seed) +
                           (side == TQ_SIDE_K ? " K" : " V") + " round=" + std::to_string(round),
                       hex(bits));
        }
        // The library's own: a vector along the first rotated axis decodes to the first row of the rotation, whose
        // entries have the signs of that row of the matrix times those of round 0.
        Encoded encoded;
        encoded.codes.assign(size_t(head_dim) * 2, 0);
        encoded.codes[size_t(head_dim)] = 0xff;
        encoded.scales.resize(8);
        const float ones[2] = {1, 1};
        std::memcpy(encoded.scales.data(), ones, 8);
        const std::vector<double> rows = decode(target, codec.get(), side, encoded, 2);
        const oracle::Matrix expected = oracle::hadamard_rotation(head_dim, side, 1, seed);
        bool signs_same = true;
        for (int c = 0; c < head_dim; ++c) {
          signs_same = signs_same && (rows[size_t(c)] - rows[size_t(head_dim + c)] > 0) == (expected(0, c) > 0);
        }
        CHECK(signs_same);
      }
    }
  }
  golden.finish(
      "Base Hadamard matrices by rows, and the sign bits of the rounds (channel c: bit c % 8 of byte c / 8).");
}

TEST_CASE("golden codebooks") {
  Golden golden("codebooks.txt");
  const Target &target = targets().front();
  const std::pair<int, const char *> codebooks[] = {
      {TQ_CODEBOOK_GAUSSIAN, "gaussian"}, {TQ_CODEBOOK_BETA, "beta"}, {TQ_CODEBOOK_UNIFORM, "uniform"}};
  for (const auto &[codebook, name] : codebooks) {
    for (int head_dim : {16, 32, 64, 80, 96, 112, 128, 192, 256, 512, 576}) {
      for (int bits = 1; bits <= 4; ++bits) {
        tq_config config = make_config(target, head_dim, bits, bits);
        config.k.codebook = codebook;
        const tq_side_info side = info_of(make_codec(config).get()).k;
        std::ostringstream text;
        for (int i = side.num_levels / 2; i < side.num_levels; ++i) text << int(side.grid[i]) << ' ';
        text << "unit " << side.level_unit;
        golden.check(std::string(name) + " head_dim=" + std::to_string(head_dim) + " bits=" + std::to_string(bits),
                     text.str());
      }
    }
  }
  golden.finish("Positive half of each fitted codebook as grid values m (levels m + 1/2), and level_unit.");
}

TEST_CASE("golden records") {
  Golden golden("records.txt");
  for (const Target &target : targets()) {
    for (int head_dim : {128, 48, 112}) {
      for (int bits : {1, 2, 3, 4, 8, 16}) {
        for (int rotation : {TQ_ROTATION_HADAMARD, TQ_ROTATION_NONE}) {
          if (bits == 16 && rotation != TQ_ROTATION_NONE) continue;
          for (int rule : {TQ_SCALE_LEAST_MSE, TQ_SCALE_NORM, TQ_SCALE_UNBIASED}) {
            if (bits == 16 && rule != TQ_SCALE_NORM) continue;
            tq_config config = make_config(target, head_dim, bits, bits);
            config.seed = 42;
            if (bits != 16) {
              config.k.rotation = rotation;
              config.k.hadamard_rounds = rotation == TQ_ROTATION_HADAMARD ? rule : 0;
              config.k.scale_rule = rule;
              config.k.scale_type = rule == TQ_SCALE_UNBIASED ? TQ_TYPE_F32 : TQ_TYPE_F16;
            }
            const CodecPtr codec = make_codec(config);
            const tq_codec_info info = info_of(codec.get());
            const oracle::Codec reader(config, info);
            const std::vector<double> x = fixed_values(head_dim, 0);
            const Encoded encoded =
                encode(target, codec.get(), TQ_SIDE_K, encode_elements(x, TQ_TYPE_F16), TQ_TYPE_F16);
            const std::string name =
                codec_name(config, "K", config.k) + (bits == 16 ? "" : " rule=" + std::to_string(rule));
            INFO(target.name << ' ' << name);

            // What is stored means what it should.
            Encoded stored = encoded;
            stored.codes = unhex(golden.value(name + " codes", hex(encoded.codes)));
            stored.scales = unhex(golden.value(name + " scale", hex(encoded.scales)));
            REQUIRE(stored.codes.size() == encoded.codes.size());
            REQUIRE(stored.scales.size() == encoded.scales.size());
            const Record record = record_at(reader.k, stored, 0);
            if (bits == 16) {
              CHECK(stored.codes == encode_elements(x, TQ_TYPE_BF16));
            } else {
              const oracle::Vector y = reader.k.rotated ? oracle::multiply(reader.k.rotation, x) : x;
              check_record(reader.k, rule, record, y, TQ_TYPE_F16, false);
            }
            golden.check(name + " codes", hex(encoded.codes));
            if (bits != 16) golden.check(name + " scale", hex(encoded.scales));
          }
        }
      }
    }
    if (std::getenv("TQKV_WRITE_GOLDEN")) break;  // lines are the same for every target
  }
  golden.finish("Token records of x[i] = ((7 i^2 + 37 i + 11) % 101 - 50) / 16, and their scales, seed 42.");
}

TEST_CASE("golden pages") {
  Golden golden("pages.txt");
  const std::tuple<int, int, int, int> kinds[] = {
      {64, 64, 4, 3}, {48, 80, 3, 1}, {48, 16, 2, 8}, {32, 48, 16, 4}, {112, 16, 1, 2}};
  for (const Target &target : targets()) {
    for (const auto &[dim_k, dim_v, bits_k, bits_v] : kinds) {
      tq_config config = make_config(target, dim_k, bits_k, bits_v);
      config.v.head_dim = dim_v;
      config.kv_heads = 2;
      config.seed = 42;
      const CodecPtr codec = make_codec(config);
      const tq_codec_info info = info_of(codec.get());
      const oracle::Codec reader(config, info);
      PoolImage pool, exact;
      pool.pages.struct_size = exact.pages.struct_size = sizeof(tq_pages);
      pool.pages.num_blocks = exact.pages.num_blocks = 1;
      pool.pages.fingerprint = info.page_fingerprint;
      exact.pages.fingerprint = info.exact_fingerprint;
      exact.exact = true;
      pool.bytes.assign(size_t(layout_of(codec.get(), TQ_PAGES_CODED).block_stride_bytes), 0xee);
      exact.bytes.assign(size_t(layout_of(codec.get(), TQ_PAGES_EXACT).block_stride_bytes), 0xee);
      StoreCall call;
      call.type = TQ_TYPE_F16;
      call.pool = &pool;
      call.exact_pool = &exact;
      for (int64_t i = 0; i < 16; ++i) {
        call.slots.push_back(i == 5 ? -1 : i);  // row 5 keeps what it held
        call.exact_slots.push_back(i == 9 ? -1 : 15 - i);
      }
      call.k = encode_elements(fixed_values(16 * 2 * dim_k, 0), call.type);
      call.v = encode_elements(fixed_values(16 * 2 * dim_v, 1000), call.type);
      REQUIRE(store(target, codec.get(), &call) == TQ_OK);
      std::ostringstream text;
      text << "K" << bits_k << " " << dim_k << " V" << bits_v << " " << dim_v;
      const std::string name = text.str();
      INFO(target.name << ' ' << name);

      // The stored page, read by the oracle, holds tq_encode's records.
      PoolImage stored = pool, stored_exact = exact;
      stored.bytes = unhex(golden.value(name + " page", hex(pool.bytes)));
      stored_exact.bytes = unhex(golden.value(name + " exact page", hex(exact.bytes)));
      REQUIRE(stored.bytes.size() == pool.bytes.size());
      REQUIRE(stored_exact.bytes.size() == exact.bytes.size());
      const Encoded keys = encode(target, codec.get(), TQ_SIDE_K, call.k, call.type),
                    values = encode(target, codec.get(), TQ_SIDE_V, call.v, call.type);
      for (int64_t slot = 0; slot < 16; ++slot) {
        for (int head = 0; head < 2; ++head) {
          for (int32_t which : {TQ_SIDE_K, TQ_SIDE_V}) {
            const oracle::Side &side = reader.side(false, which);
            double scale;
            const std::vector<uint8_t> record =
                oracle::read_record(reader, false, stored.view(reader), which, slot, head, &scale);
            if (slot == 5) {
              CHECK(std::count(record.begin(), record.end(), uint8_t(0xee)) == std::ptrdiff_t(record.size()));
              continue;
            }
            const Record want = record_at(side, which == TQ_SIDE_K ? keys : values, slot * 2 + head);
            CHECK(record == want.bytes);
            if (!side.raw()) CHECK(scale == want.scale);
            const std::vector<uint8_t> raw =
                oracle::read_record(reader, true, stored_exact.view(reader), which, 15 - slot, head, &scale);
            const std::vector<double> all =
                decode_elements((which == TQ_SIDE_K ? call.k : call.v).data(), call.type, 16 * 2 * side.head_dim);
            const std::vector<double> own(all.begin() + (slot * 2 + head) * side.head_dim,
                                          all.begin() + (slot * 2 + head + 1) * side.head_dim);
            if (slot != 9) CHECK(raw == encode_elements(own, TQ_TYPE_BF16));
          }
        }
      }
      golden.check(name + " page", hex(pool.bytes));
      if (dim_k + dim_v <= 80) golden.check(name + " exact page", hex(exact.bytes));
      std::ostringstream prints;
      prints << std::hex << info.tile_fingerprint << ' ' << info.page_fingerprint << ' ' << info.exact_fingerprint;
      golden.check(name + " fingerprints", prints.str());
    }
    if (std::getenv("TQKV_WRITE_GOLDEN")) break;
  }
  golden.finish("One block of 16 tokens and 2 heads, coded and exact; fingerprints of tile, page and exact page.");
}
