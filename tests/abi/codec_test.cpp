// SPDX-License-Identifier: Apache-2.0
// tq_encode and tq_decode: every code is the nearest level, every scale is its rule's formula, decode is the inverse.
#include <algorithm>
#include <cstring>

#include "encoding.hpp"
#include "support.hpp"

namespace {

void check_vectors(const Target &target, const tq_config &config, Random &random, int64_t count) {
  const CodecPtr codec = make_codec(config);
  const tq_codec_info info = info_of(codec.get());
  const oracle::Codec reader(config, info);
  for (int32_t which : {TQ_SIDE_K, TQ_SIDE_V}) {
    const oracle::Side &side = reader.side(false, which);
    const tq_side_info &resolved = which == TQ_SIDE_K ? info.k : info.v;
    const int32_t type = random.pick({TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16});
    std::vector<double> values;
    for (int64_t i = 0; i < count; ++i) {
      const double sigma = std::exp(random.uniform(-4, 4));
      for (int c = 0; c < side.head_dim; ++c) values.push_back(sigma * random.normal());
      if (random.chance(0.3)) values[values.size() - size_t(random.integer(1, side.head_dim))] = 20 * sigma;
    }
    const std::vector<uint8_t> input = encode_elements(values, type);
    values = decode_elements(input.data(), type, int64_t(values.size()));
    const Encoded encoded = encode(target, codec.get(), which, input, type);
    for (uint64_t faults : encoded.faults.count) CHECK(faults == 0);
    CHECK(encoded.faults.first == 0);
    const std::vector<double> decoded = decode(target, codec.get(), which, encoded, count);

    INFO("side " << which << " type " << type);
    const bool in_bf16 = rotates_in_bf16(target, resolved, type);
    double shared_low = 0, shared_high = std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < count; ++i) {
      INFO("vector " << i);
      const oracle::Vector x(values.begin() + i * side.head_dim, values.begin() + (i + 1) * side.head_dim);
      const Record record = record_at(side, encoded, i);
      const oracle::Vector own = oracle::decode(side, record.bytes.data(), record.scale);
      const double length = oracle::norm(x);
      // Decoding: two f32 roundings a stage, at most head_dim products a sum (dense), log2 stages (Hadamard).
      double error = 0;
      for (int c = 0; c < side.head_dim; ++c) {
        error = std::max(error, std::fabs(decoded[size_t(i * side.head_dim + c)] - own[size_t(c)]));
      }
      CHECK(error <= 0x1p-22 * std::sqrt(double(side.head_dim)) * oracle::norm(own) + 0x1p-149);
      if (side.raw()) {
        // Rounded to nearest once; f16 holds no bf16 beyond its range, which these inputs do not reach.
        for (int c = 0; c < side.head_dim; ++c) {
          const std::vector<uint8_t> nearest = encode_elements({x[size_t(c)]}, side.raw_type);
          REQUIRE(std::memcmp(nearest.data(), record.bytes.data() + 2 * c, 2) == 0);
        }
        continue;
      }
      const oracle::Vector y = side.rotated ? oracle::multiply(side.rotation, x) : x;
      const Interval interval = check_record(side, resolved.scale_rule, record, y, type, in_bf16);
      const double rms = length / std::sqrt(double(side.head_dim));
      shared_low = std::max(shared_low, interval.low * rms);
      shared_high = std::min(shared_high, interval.high * rms);
    }
    // The codebook is that of unit variance: one normalisation serves all vectors of up to 4 bits.
    if (!side.raw() && side.bits <= 4) CHECK(shared_low <= shared_high * (1 + 1e-5));
  }
}

}  // namespace

TEST_CASE("every code is the nearest level and every scale its rule's formula") {
  FRESH(random, "codec nearest");
  for (const Target &target : targets()) {
    INFO(target.name);
    for (int bits : {1, 2, 3, 4, 8, 16}) {
      tq_config config = make_config(target, 128, bits, bits);
      config.seed = random.bits();
      INFO(describe(config));
      check_vectors(target, config, random, 40);
    }
    for (int round = 0; round < 40; ++round) {
      ConfigStorage storage;
      const tq_config config = random_config(random, target, &storage);
      INFO(describe(config));
      check_vectors(target, config, random, 12);
    }
  }
}

TEST_CASE("every scale rule and scale type at every width") {
  FRESH(random, "codec rules");
  const Target &target = targets().front();
  for (int bits : {1, 2, 3, 4, 8}) {
    for (int rule : {TQ_SCALE_LEAST_MSE, TQ_SCALE_NORM, TQ_SCALE_UNBIASED}) {
      for (int type : {TQ_TYPE_F16, TQ_TYPE_F32}) {
        tq_config config = make_config(target, 96, bits, bits);
        config.k.scale_rule = config.v.scale_rule = rule;
        config.k.scale_type = config.v.scale_type = type;
        INFO(describe(config));
        check_vectors(target, config, random, 16);
        const CodecPtr codec = make_codec(config);
        CHECK(info_of(codec.get()).k.scale_rule == rule);
        CHECK(info_of(codec.get()).v.scale_type == type);
      }
    }
  }
}

TEST_CASE("packed sizes are what the bits say") {
  const Target &target = targets().front();
  const std::pair<int, int> sizes[] = {{4, 66}, {3, 50}, {2, 34}, {1, 18}, {8, 130}, {16, 256}};
  for (const auto &[bits, bytes] : sizes) {
    const CodecPtr codec = make_codec(make_config(target, 128, bits, bits));
    const tq_codec_info info = info_of(codec.get());
    CHECK(info.k.code_bytes + info.k.scale_bytes == bytes);
    CHECK(info.v.code_bytes + info.v.scale_bytes == bytes);
    const tq_layout layout = layout_of(codec.get(), TQ_PAGES_CODED);
    CHECK(layout.bytes_per_token == 2 * bytes);
    CHECK(layout.tile_bytes == 16 * 2 * bytes);
  }
}

TEST_CASE("every head_dim is accepted or refused as documented") {
  const Target &target = targets().front();
  for (int head_dim = 0; head_dim <= 640; head_dim += 8) {
    for (int bits : {1, 2, 3, 4, 8, 16}) {
      for (int rotation : {TQ_ROTATION_DEFAULT, TQ_ROTATION_NONE, TQ_ROTATION_HADAMARD, TQ_ROTATION_DENSE}) {
        tq_config config = make_config(target, 64, 4, 4);
        tq_side_config &side = head_dim % 16 ? config.v : config.k;
        side.head_dim = head_dim;
        side.bits = bits;
        side.rotation = rotation;
        if (&side == &config.k) config.v.head_dim = 64;
        const bool legal_dim = head_dim >= 16 && head_dim <= 576 && head_dim % 16 == 0;
        const bool raw = bits == 16;
        const bool hadamard = rotation == TQ_ROTATION_HADAMARD || (rotation == TQ_ROTATION_DEFAULT && !raw);
        const bool rotation_on_raw = raw && (rotation == TQ_ROTATION_HADAMARD || rotation == TQ_ROTATION_DENSE);
        const bool expected = legal_dim && !(hadamard && !oracle::hadamard_exists(head_dim)) && !rotation_on_raw;
        const tq_status status = tq_supports(&config);
        INFO("head_dim " << head_dim << " bits " << bits << " rotation " << rotation << ": " << tq_last_error());
        CHECK((status == TQ_OK) == expected);
        if (status != TQ_OK) {
          const std::string sentence = tq_last_error();
          if (!legal_dim) CHECK(sentence.find(std::to_string(head_dim)) != std::string::npos);
          if (legal_dim && !rotation_on_raw) CHECK(sentence.find("adamard") != std::string::npos);
        }
      }
    }
  }
}

TEST_CASE("every legal head_dim encodes and decodes at every width") {
  FRESH(random, "codec dims");
  const Target &target = targets().back();
  for (int head_dim = 16; head_dim <= 576; head_dim += 16) {
    for (int bits : {1, 2, 3, 4, 8, 16}) {
      tq_config config = make_config(target, head_dim, bits, bits);
      if (bits != 16 && !oracle::hadamard_exists(head_dim)) config.k.rotation = config.v.rotation = TQ_ROTATION_NONE;
      INFO(describe(config));
      check_vectors(target, config, random, 3);
    }
  }
}

TEST_CASE("zero vectors decode to zero, whatever the sign of zero") {
  for (const Target &target : targets()) {
    for (int bits : {1, 2, 3, 4, 8, 16}) {
      const CodecPtr codec = make_codec(make_config(target, 80, bits, bits));
      INFO(target.name << " bits " << bits);
      std::vector<double> values(80 * 4, 0.0);
      for (size_t i = 80; i < 160; ++i) values[i] = -0.0;
      for (size_t i = 160; i < 240; i += 3) values[i] = -0.0;
      for (int type : {TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16}) {
        for (int32_t side : {TQ_SIDE_K, TQ_SIDE_V}) {
          const Encoded encoded = encode(target, codec.get(), side, encode_elements(values, type), type);
          for (uint64_t faults : encoded.faults.count) CHECK(faults == 0);
          for (double value : decode(target, codec.get(), side, encoded, 4)) CHECK(value == 0);
        }
      }
    }
  }
}

TEST_CASE("a NaN or infinity is counted, stored as zero and leaves its neighbours alone") {
  FRESH(random, "codec non-finite");
  for (const Target &target : targets()) {
    for (int bits : {1, 2, 3, 4, 8, 16}) {
      const int head_dim = 96;
      const CodecPtr codec = make_codec(make_config(target, head_dim, bits, bits));
      const tq_codec_info info = info_of(codec.get());
      for (int type : {TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16}) {
        INFO(target.name << " bits " << bits << " type " << type);
        const int64_t count = 3 * head_dim + 2;
        const std::vector<uint8_t> clean = encode_elements(normals(random, count * head_dim), type);
        const Encoded want = encode(target, codec.get(), TQ_SIDE_K, clean, type);
        // Vector 1 + 3 c + i has its c-th channel replaced by the i-th special value.
        std::vector<uint8_t> dirty = clean;
        const double specials[] = {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                                   -std::numeric_limits<double>::infinity()};
        std::vector<char> bad(size_t(count), 0);
        for (int c = 0; c < head_dim; ++c) {
          const int i = c % 3;
          const int64_t vector = 1 + 3 * c + i;
          oracle::write_element(dirty.data(), type, vector * head_dim + c, specials[i]);
          bad[size_t(vector)] = 1;
        }
        const Encoded got = encode(target, codec.get(), TQ_SIDE_K, dirty, type);
        CHECK(got.faults.count[TQ_FAULT_NON_FINITE] == uint64_t(head_dim));
        CHECK(TQ_FAULT_FIRST_KIND(got.faults.first) == TQ_FAULT_NON_FINITE);
        CHECK(TQ_FAULT_FIRST_INDEX(got.faults.first) == 1);
        const std::vector<double> decoded = decode(target, codec.get(), TQ_SIDE_K, got, count);
        bool neighbours_same = true, zero = true;
        for (int64_t i = 0; i < count; ++i) {
          if (bad[size_t(i)]) {
            for (int c = 0; c < head_dim; ++c) zero = zero && decoded[size_t(i * head_dim + c)] == 0;
            continue;
          }
          neighbours_same = neighbours_same &&
                            std::memcmp(&got.codes[size_t(i * info.k.code_bytes)],
                                        &want.codes[size_t(i * info.k.code_bytes)], size_t(info.k.code_bytes)) == 0;
          if (info.k.scale_bytes) {
            neighbours_same = neighbours_same && std::memcmp(&got.scales[size_t(i * info.k.scale_bytes)],
                                                             &want.scales[size_t(i * info.k.scale_bytes)],
                                                             size_t(info.k.scale_bytes)) == 0;
          }
        }
        CHECK(neighbours_same);
        CHECK(zero);
      }
    }
  }
}

TEST_CASE("huge and tiny vectors come back right") {
  FRESH(random, "codec range");
  for (const Target &target : targets()) {
    INFO(target.name);
    const int head_dim = 128;
    const auto relative_error = [&](const tq_config &config, int32_t type, const std::vector<double> &values,
                                    uint64_t *clamped) {
      const CodecPtr codec = make_codec(config);
      const int64_t count = int64_t(values.size()) / head_dim;
      const std::vector<uint8_t> input = encode_elements(values, type);
      const Encoded encoded = encode(target, codec.get(), TQ_SIDE_K, input, type);
      *clamped = encoded.faults.count[TQ_FAULT_RANGE];
      CHECK(encoded.faults.count[TQ_FAULT_NON_FINITE] == 0);
      const std::vector<double> decoded = decode(target, codec.get(), TQ_SIDE_K, encoded, count);
      const std::vector<double> exact = decode_elements(input.data(), type, count * head_dim);
      std::vector<double> errors;
      for (int64_t i = 0; i < count; ++i) {
        oracle::Vector x(exact.begin() + i * head_dim, exact.begin() + (i + 1) * head_dim), e = x;
        for (int c = 0; c < head_dim; ++c) e[size_t(c)] -= decoded[size_t(i * head_dim + c)];
        errors.push_back(oracle::norm(e) / oracle::norm(x));
      }
      return errors;
    };
    uint64_t clamped = 0;
    for (int bits : {1, 2, 3, 4, 8}) {
      for (int rule : {TQ_SCALE_LEAST_MSE, TQ_SCALE_NORM, TQ_SCALE_UNBIASED}) {
        tq_config config = make_config(target, head_dim, bits, bits);
        config.k.scale_rule = rule;
        INFO("bits " << bits << " rule " << rule);
        // A random vector's relative error at unit norm, with room for one vector that has a coordinate of five sigma.
        const double typical = bits == 8 ? 0.02 : 3 * std::sqrt(bits == 1 ? 0.57 : 0.132 * std::pow(0.27, bits - 2));

        // The largest f16 in every channel, signs at random: norm 65504 * sqrt(head_dim). A tenth less where scales may be
        // larger than the root mean square, by 0.6% in one of 40,000 such vectors; in others they were at most 0.95 of it.
        std::vector<double> huge(size_t(head_dim) * 8);
        const double most = rule == TQ_SCALE_UNBIASED && bits == 2 ? 0.9 * 65504 : 65504;
        for (double &value : huge) value = random.chance(0.5) ? most : -most;
        for (double error : relative_error(config, TQ_TYPE_F16, huge, &clamped)) CHECK(error < typical);
        CHECK(clamped == 0);
        // A single channel at the f16 maximum.
        std::vector<double> spike(size_t(head_dim), 0.0);
        spike[size_t(random.integer(0, head_dim - 1))] = 65504;
        for (double error : relative_error(config, TQ_TYPE_F16, spike, &clamped)) CHECK(error < 1.5);
        CHECK(clamped == 0);

        // f16 subnormals, 2^-24 .. 2^-14. An fp16 scale resolves 2^-24, so only the largest keep relative accuracy;
        // the absolute error stays below what 2^-25 in the scale makes of it, 2^-25 * |levels|.
        std::vector<double> tiny = normals(random, int64_t(head_dim) * 8, 0x1p-15);
        config.k.scale_type = TQ_TYPE_F32;
        for (double error : relative_error(config, TQ_TYPE_F16, tiny, &clamped)) CHECK(error < typical);
        CHECK(clamped == 0);

        // With an f32 scale, anything f32 can hold: rotated coordinates may pass its range while the decoded do not.
        for (double size : {1e-40, 1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30, 1e37}) {
          // At 1e-40 the factor of decoding is about 1e-43 at 8 bits, a multiple of 4 * 2^-149: wrong by up to 6%.
          INFO("size " << size);
          for (double error :
               relative_error(config, TQ_TYPE_F32, normals(random, int64_t(head_dim) * 4, size), &clamped)) {
            CHECK(error < typical + (size < 1e-38 ? 0.08 : 0));
          }
          CHECK(clamped == 0);
        }
        // Norms past its range; at 1 bit a decoded channel was once 7.2 times what it should be.
        std::vector<double> top(huge.size());
        for (double &value : top) value = random.chance(0.5) ? 3.2e37 : -3.2e37;
        for (double error : relative_error(config, TQ_TYPE_F32, top, &clamped)) CHECK(error < typical);
        CHECK(clamped == 0);

        // With an fp16 scale, what is too large is clamped and counted, once a vector.
        config.k.scale_type = TQ_TYPE_F16;
        std::vector<double> over = normals(random, int64_t(head_dim) * 4, 1e9);
        for (int c = 0; c < head_dim; ++c) over[size_t(c)] = random.normal();  // this one is fine
        relative_error(config, TQ_TYPE_F32, over, &clamped);
        CHECK(clamped == 3);
      }
    }
  }
}

TEST_CASE("subnormal f16 vectors with an fp16 scale keep their size") {
  FRESH(random, "codec subnormal");
  const Target &target = targets().front();
  for (int bits : {1, 2, 3, 4, 8}) {
    const tq_config config = make_config(target, 128, bits, bits);
    const CodecPtr codec = make_codec(config);
    const oracle::Codec reader(config, info_of(codec.get()));
    const std::vector<uint8_t> input = encode_elements(normals(random, 128 * 16, 0x1p-16), TQ_TYPE_F16);
    const std::vector<double> exact = decode_elements(input.data(), TQ_TYPE_F16, 128 * 16);
    const Encoded encoded = encode(target, codec.get(), TQ_SIDE_K, input, TQ_TYPE_F16);
    const std::vector<double> decoded = decode(target, codec.get(), TQ_SIDE_K, encoded, 16);
    for (int64_t i = 0; i < 16; ++i) {
      const oracle::Vector x(exact.begin() + i * 128, exact.begin() + (i + 1) * 128);
      oracle::Vector e = x;
      for (int c = 0; c < 128; ++c) e[size_t(c)] -= decoded[size_t(i * 128 + c)];
      const Record record = record_at(reader.k, encoded, i);
      const double levels = oracle::norm(levels_of(reader.k, record));
      // The scale is a multiple of 2^-24; what that rounding adds to the error is at most 2^-25 * |levels|.
      const double quantisation = bits == 8 ? 0.02 : 3 * std::sqrt(bits == 1 ? 0.57 : 0.132 * std::pow(0.27, bits - 2));
      INFO("bits " << bits << " level_unit " << reader.k.level_unit);
      CHECK(oracle::norm(e) <= quantisation * oracle::norm(x) + 0x1p-25 * levels);
    }
  }
}

TEST_CASE("bf16 rows of dense rotations have the squared error of f32 rows", "[slow]") {
  FRESH(random, "codec dense bf16");
  for (const Target &target : targets()) {
    if (target.device->kind() == TQ_DEVICE_CPU && target.simd != targets().front().simd) continue;
    for (const int head_dim : {64, 96, 128, 256}) {
      const int64_t count = 20'000'000 / (head_dim * head_dim);  // so that chance has a sigma of 0.02% at 4 bits
      const std::vector<uint8_t> input = encode_elements(normals(random, count * head_dim), TQ_TYPE_BF16);
      const std::vector<double> x = decode_elements(input.data(), TQ_TYPE_BF16, count * head_dim);
      const std::vector<float> matrix = random_orthogonal(random, head_dim);
      for (const int bits : {2, 3, 4}) {
        tq_config config = make_config(target, head_dim, bits, bits);
        config.k.rotation = TQ_ROTATION_DENSE;
        config.v.rotation = TQ_ROTATION_CUSTOM;
        config.v.matrix = matrix.data();
        config.seed = random.bits();
        const CodecPtr codec = make_codec(config);
        for (const int32_t which : {TQ_SIDE_K, TQ_SIDE_V}) {
          const auto squared_error = [&](int32_t type) {
            const Encoded encoded = encode(target, codec.get(), which, encode_elements(x, type), type);
            const std::vector<double> decoded = decode(target, codec.get(), which, encoded, count);
            double error = 0;
            for (size_t i = 0; i < x.size(); ++i) error += (x[i] - decoded[i]) * (x[i] - decoded[i]);
            return error;
          };
          const double want = squared_error(TQ_TYPE_F32), got = squared_error(TQ_TYPE_BF16);
          INFO(target.name << ' ' << describe(config) << " side " << which << " want " << want << " got " << got);
          CHECK(std::fabs(got / want - 1) <= 2e-3);  // 0.1% (gpu_dense_test), and chance at so few vectors
        }
      }
    }
  }
}

TEST_CASE("bf16 rows of dense rotations that are zero, not finite, huge or tiny") {
  FRESH(random, "codec dense unusual");
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  // All of a row, but one channel where it is no number; 0x1p-133 is the least bf16.
  const double sizes[] = {1,     0,     -0.0,  std::nan(""), kInfinity, -kInfinity, 3e38,     -3e38,   1e30,
                          1e-12, 1e-13, 1e-30, 1e-38,        -1e-40,    0x1p-133,   0x1.8p40, 0x1p-46, 1e13};
  for (const Target &target : targets()) {
    for (const int head_dim : {64, 96, 128, 256}) {
      for (const int bits : {1, 2, 3, 4}) {
        tq_config config = make_config(target, head_dim, bits, bits);
        config.k.rotation = config.v.rotation = TQ_ROTATION_DENSE;
        config.k.scale_type = TQ_TYPE_F32;  // V's scales are clamped
        config.seed = random.bits();
        INFO(target.name << ' ' << describe(config));
        const CodecPtr codec = make_codec(config);
        std::vector<double> values;
        for (int i = 0; i < 60; ++i) {
          const double size = sizes[random.chance(0.2) ? 0 : random.integer(0, int64_t(std::size(sizes)) - 1)];
          for (int c = 0; c < head_dim; ++c) {
            values.push_back(!std::isfinite(size) ? random.normal() : random.chance(0.5) ? size : size / 2);
          }
          if (!std::isfinite(size)) values[values.size() - size_t(random.integer(1, head_dim))] = size;
        }
        const std::vector<uint8_t> input = encode_elements(values, TQ_TYPE_BF16);
        values = decode_elements(input.data(), TQ_TYPE_BF16, int64_t(values.size()));
        const tq_codec_info info = info_of(codec.get());
        const oracle::Codec reader(config, info);
        for (const int32_t which : {TQ_SIDE_K, TQ_SIDE_V}) {
          const oracle::Side &side = reader.side(false, which);
          const tq_side_info &resolved = which == TQ_SIDE_K ? info.k : info.v;
          const bool in_bf16 = rotates_in_bf16(target, resolved, TQ_TYPE_BF16);
          const Encoded want = encode(target, codec.get(), which, encode_elements(values, TQ_TYPE_F32), TQ_TYPE_F32);
          const Encoded got = encode(target, codec.get(), which, input, TQ_TYPE_BF16);
          CHECK(got.faults.first == want.faults.first);
          for (int kind = 0; kind < int(std::size(want.faults.count)); ++kind) {
            CHECK(got.faults.count[kind] == want.faults.count[kind]);
          }
          for (int64_t i = 0; i < 60; ++i) {
            const oracle::Vector x(values.begin() + i * head_dim, values.begin() + (i + 1) * head_dim);
            const Record a = record_at(side, want, i), b = record_at(side, got, i);
            INFO("side " << which << " row " << i << " of " << x[0]);
            const double length = oracle::norm(x);
            if (length == 0 || !std::isfinite(length)) {
              CHECK(b.bytes == a.bytes);
              CHECK(b.scale == a.scale);
              continue;
            }
            const oracle::Vector y = oracle::multiply(side.rotation, x);
            check_record(side, resolved.scale_rule, a, y, TQ_TYPE_F32, false);
            check_record(side, resolved.scale_rule, b, y, TQ_TYPE_BF16, in_bf16);
          }
        }
      }
    }
  }
}

TEST_CASE("strides of any kind, codes and scales interleaved, and every input type") {
  FRESH(random, "codec strides");
  for (const Target &target : targets()) {
    for (int round = 0; round < 30; ++round) {
      ConfigStorage storage;
      const tq_config config = random_config(random, target, &storage);
      INFO(target.name << ' ' << describe(config));
      const CodecPtr codec = make_codec(config);
      const tq_codec_info info = info_of(codec.get());
      const int32_t which = int32_t(random.integer(0, 1));
      const tq_side_info &side = which == TQ_SIDE_K ? info.k : info.v;
      const int32_t type = random.pick({TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16});
      const int64_t count = random.integer(1, 20), element = oracle::type_bytes(type);
      const std::vector<double> values = normals(random, count * side.head_dim);
      const Encoded dense = encode(target, codec.get(), which, encode_elements(values, type), type);
      Encoded precise = dense;  // what becomes of rows that would be rotated in bf16 and that cuBLAS cannot read
      if (rotates_in_bf16(target, side, type)) {
        const std::vector<uint8_t> rounded = encode_elements(values, type);
        const std::vector<double> same = decode_elements(rounded.data(), type, int64_t(values.size()));
        precise = encode(target, codec.get(), which, encode_elements(same, TQ_TYPE_F32), TQ_TYPE_F32);
      }

      // Records of scale and codes, one after the other, with gaps: scales and raw values have an alignment.
      const int64_t align = side.scale_bytes ? side.scale_bytes : 2;
      const int64_t record =
          (side.code_bytes + side.scale_bytes + align - 1) / align * align + align * random.integer(0, 3);
      const int64_t stride = side.head_dim + random.integer(0, 9);
      std::vector<double> spread(size_t((count - 1) * stride + side.head_dim), std::nan(""));
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(values.begin() + i * side.head_dim, side.head_dim, spread.begin() + i * stride);
      }
      const size_t misalign = size_t(element * random.integer(0, 3));
      const Bytes in(*target.device, encode_elements(spread, type), misalign);
      const Bytes records(*target.device, size_t((count - 1) * record + side.code_bytes + side.scale_bytes),
                          size_t(align * random.integer(0, 3)));
      const Bytes faults(*target.device, std::vector<tq_faults>(1));
      size_t workspace_bytes = 0;
      REQUIRE(tq_vectors_workspace(codec.get(), which, count, &workspace_bytes) == TQ_OK);
      const Bytes workspace(*target.device, workspace_bytes);
      tq_encode_args args = {};
      args.struct_size = sizeof args;
      args.side = which;
      args.count = count;
      args.input = in.data();
      args.input_type = type;
      args.input_stride = stride;
      args.codes = records.as<uint8_t>() + side.scale_bytes;
      args.codes_stride_bytes = record;
      if (side.scale_bytes) {
        args.scales = records.data();
        args.scales_stride_bytes = record;
      }
      args.faults = random.chance(0.5) ? faults.as<tq_faults>() : nullptr;
      args.workspace = workspace.data();
      args.workspace_bytes = workspace_bytes;
      const tq_status status = target.device->call([&](void *stream) {
        args.stream = stream;
        return tq_encode(codec.get(), &args);
      });
      INFO("status " << status << ' ' << tq_last_error());
      REQUIRE(status == TQ_OK);
      const std::vector<uint8_t> got = records.download();
      bool gaps = true;
      Encoded stored{std::vector<uint8_t>(dense.codes.size()), std::vector<uint8_t>(dense.scales.size()), {}};
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t *one = got.data() + i * record;
        std::copy_n(one + side.scale_bytes, side.code_bytes, stored.codes.begin() + i * side.code_bytes);
        std::copy_n(one, side.scale_bytes, stored.scales.begin() + i * side.scale_bytes);
        for (int64_t b = side.code_bytes + side.scale_bytes; b < record && i + 1 < count; ++b)
          gaps = gaps && one[b] == 0xff;
      }
      const bool as_dense = stored.codes == dense.codes && stored.scales == dense.scales;
      CHECK((as_dense || (stored.codes == precise.codes && stored.scales == precise.scales)));
      CHECK(gaps);

      const int32_t out_type = random.pick({TQ_TYPE_F32, TQ_TYPE_F16, TQ_TYPE_BF16});
      const int64_t out_element = oracle::type_bytes(out_type);
      const int64_t out_stride = side.head_dim + random.integer(0, 9);
      const Bytes out(*target.device, size_t(((count - 1) * out_stride + side.head_dim) * out_element),
                      size_t(out_element * random.integer(0, 3)));
      tq_decode_args back = {};
      back.struct_size = sizeof back;
      back.side = which;
      back.count = count;
      back.codes = args.codes;
      back.codes_stride_bytes = record;
      back.scales = args.scales;
      back.scales_stride_bytes = args.scales_stride_bytes;
      back.output = out.data();
      back.output_type = out_type;
      back.output_stride = out_stride;
      back.workspace = workspace.data();
      back.workspace_bytes = workspace_bytes;
      REQUIRE(target.device->call([&](void *stream) {
        back.stream = stream;
        return tq_decode(codec.get(), &back);
      }) == TQ_OK);
      const std::vector<uint8_t> image = out.download();
      const std::vector<double> f32 = decode(target, codec.get(), which, stored, count);
      bool rounded = true, untouched = true;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < side.head_dim; ++c) {
          // Other types are the f32 result rounded to nearest even.
          const std::vector<uint8_t> want = encode_elements({f32[size_t(i * side.head_dim + c)]}, out_type);
          rounded =
              rounded && std::memcmp(want.data(), &image[size_t((i * out_stride + c) * out_element)], want.size()) == 0;
        }
        for (int64_t b = (i * out_stride + side.head_dim) * out_element;
             b < (i + 1) * out_stride * out_element && i + 1 < count; ++b) {
          untouched = untouched && image[size_t(b)] == 0xff;
        }
      }
      CHECK(rounded);
      CHECK(untouched);
    }
  }
}

TEST_CASE("no vectors are no work") {
  for (const Target &target : targets()) {
    const CodecPtr codec = make_codec(make_config(target, 64, 4, 4));
    tq_encode_args encode_args = {};
    encode_args.struct_size = sizeof encode_args;
    encode_args.input_type = TQ_TYPE_F32;
    CHECK(target.device->call([&](void *stream) {
      encode_args.stream = stream;
      return tq_encode(codec.get(), &encode_args);
    }) == TQ_OK);
    tq_decode_args decode_args = {};
    decode_args.struct_size = sizeof decode_args;
    decode_args.output_type = TQ_TYPE_F32;
    CHECK(target.device->call([&](void *stream) {
      decode_args.stream = stream;
      return tq_decode(codec.get(), &decode_args);
    }) == TQ_OK);
  }
}

TEST_CASE("raw sides keep 16 bits exactly") {
  FRESH(random, "codec raw");
  for (const Target &target : targets()) {
    for (int raw_type : {TQ_TYPE_BF16, TQ_TYPE_F16}) {
      tq_config config = make_config(target, 112, 16, 16);
      config.raw_type = raw_type;
      const CodecPtr codec = make_codec(config);
      // Every finite 16-bit pattern of the raw type comes back as it was.
      std::vector<uint8_t> input;
      for (int bits = 0; bits < 0x10000; ++bits) {
        const uint16_t pattern = uint16_t(bits);
        const double value = raw_type == TQ_TYPE_F16 ? oracle::from_f16(pattern) : oracle::from_bf16(pattern);
        if (!std::isfinite(value)) continue;
        input.push_back(uint8_t(pattern));
        input.push_back(uint8_t(pattern >> 8));
      }
      input.resize(input.size() / 224 * 224);
      CHECK(encode(target, codec.get(), TQ_SIDE_V, input, raw_type).codes == input);
    }
  }
}

TEST_CASE("raw sides clamp what their type can not hold, and count it") {
  for (const Target &target : targets()) {
    for (int raw_type : {TQ_TYPE_BF16, TQ_TYPE_F16}) {
      tq_config config = make_config(target, 16, 16, 16);
      config.raw_type = raw_type;
      const CodecPtr codec = make_codec(config);
      std::vector<double> values(16 * 3, 1.0);
      // 3.4e38 is a float above bf16's largest value, 0x7f7f, which is 2^127 * (2 - 2^-7).
      const double over = raw_type == TQ_TYPE_F16 ? 7e4 : 3.4e38;
      const double largest = raw_type == TQ_TYPE_F16 ? 65504 : 0x1.fep127;
      values[16 + 5] = over, values[16 + 6] = -over;
      const Encoded encoded = encode(target, codec.get(), TQ_SIDE_K, encode_elements(values, TQ_TYPE_F32), TQ_TYPE_F32);
      CHECK(encoded.faults.count[TQ_FAULT_RANGE] == 1);
      CHECK(TQ_FAULT_FIRST_INDEX(encoded.faults.first) == 1);
      const std::vector<double> decoded = decode(target, codec.get(), TQ_SIDE_K, encoded, 3);
      for (size_t i = 0; i < decoded.size(); ++i) {
        CHECK(decoded[i] == (i == 21 ? largest : i == 22 ? -largest : 1.0));
      }
    }
  }
}
