// SPDX-License-Identifier: Apache-2.0
// One set of bytes, whatever the machine: codes, scales, faults and decoded values of many vectors, of values next to
// the thresholds and of a model's own keys and values, compared bit for bit with the CPU's.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "bundled.hpp"
#include "gpu.hpp"

namespace {

constexpr int kHeadDim = 128;
constexpr int64_t kPart = 1 << 16;  // vectors of a call

// Cheap numbers that depend on seed and place only, so that threads can share the drawing.
struct Draw {
  uint64_t state;
  uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  float uniform(float low, float high) { return low + (high - low) * float(bits() >> 40) * 0x1p-24f; }
  int integer(int low, int high) { return low + int(bits() % uint64_t(high - low + 1)); }
  float normal() {
    const float u = (float(bits() >> 40) + 0.5f) * 0x1p-24f;
    return std::sqrt(-2 * std::log(u)) * std::cos(uniform(0, 6.2831853f));
  }
};

uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The pattern of a value in a type, rounded towards zero: which of two neighbours is drawn does not matter.
uint32_t pattern_of(float value, int32_t type) {
  const uint32_t bits = float_bits(value);
  if (type == TQ_TYPE_F32) return bits;
  if (type == TQ_TYPE_BF16) return bits >> 16;
  const uint32_t sign = bits >> 16 & 0x8000, fraction = bits & 0x7fffff;
  const int exponent = int(bits >> 23 & 0xff) - 127 + 15;
  if (exponent >= 31) return sign | 0x7bff;
  if (exponent > 0) return sign | uint32_t(exponent) << 10 | fraction >> 13;
  return sign | (exponent > -10 ? (0x800000 | fraction) >> (14 - exponent) : 0);
}

struct TypeTraits {
  uint32_t sign, exponent_mask, fraction_mask, largest;
  int lowest_power, highest_power;  // of two, within which scales are drawn
};
TypeTraits traits_of(int32_t type) {
  if (type == TQ_TYPE_F16) return {0x8000, 0x7c00, 0x3ff, 0x7bff, -22, 13};
  if (type == TQ_TYPE_BF16) return {0x8000, 0x7f80, 0x7f, 0x7f7f, -130, 120};
  return {0x80000000, 0x7f800000, 0x7fffff, 0x7f7fffff, -145, 120};
}

// One vector of a mixture: what is common, what is extreme, what is on a threshold or a tie, what is no number.
void draw_vector(Draw draw, int32_t type, uint32_t *out) {
  const TypeTraits type_traits = traits_of(type);
  const auto put = [&](int c, float value) { out[c] = pattern_of(value, type); };
  const auto fill = [&](auto &&value) {
    for (int c = 0; c < kHeadDim; ++c) put(c, value());
  };
  const auto power = [&](int low, int high) { return std::ldexp(1.0f, draw.integer(low, high)); };
  const auto sign = [&] { return draw.bits() & 1 ? type_traits.sign : 0; };
  const int kind = draw.integer(0, 99);
  if (kind < 40) {
    const float sigma = draw.uniform(0.1f, 10);
    fill([&] { return sigma * draw.normal(); });
  } else if (kind < 55) {
    const float sigma = power(type_traits.lowest_power, type_traits.highest_power);
    fill([&] { return sigma * draw.normal(); });
  } else if (kind < 70) {  // tails like those of Cauchy's distribution
    fill([&] { return draw.normal() / (draw.uniform(0, 1) + 1e-6f); });
  } else if (kind < 77) {  // a few huge channels
    fill([&] { return draw.normal(); });
    for (int i = draw.integer(1, 4); i > 0; --i) put(draw.integer(0, kHeadDim - 1), draw.normal() * 1000);
  } else if (kind < 84) {  // sums that are equal, or zero of either sign
    const float unit = power(-10, 10);
    fill([&] { return unit * float(draw.integer(-3, 3)); });
  } else if (kind < 88) {  // one magnitude
    const float unit = power(type_traits.lowest_power, type_traits.highest_power);
    fill([&] { return draw.bits() & 1 ? unit : -unit; });
  } else if (kind < 90) {
    for (int c = 0; c < kHeadDim; ++c) out[c] = sign();
  } else if (kind < 92) {  // one or two channels
    for (int c = 0; c < kHeadDim; ++c) out[c] = sign();
    for (int i = draw.integer(1, 2); i > 0; --i) put(draw.integer(0, kHeadDim - 1), draw.normal() * power(-12, 12));
  } else if (kind < 94) {  // subnormal in its own type
    for (int c = 0; c < kHeadDim; ++c) out[c] = sign() | (uint32_t(draw.bits()) & type_traits.fraction_mask);
  } else if (kind < 96) {  // the largest of its type
    for (int c = 0; c < kHeadDim; ++c) out[c] = sign() | (type_traits.largest - uint32_t(draw.integer(0, 3)));
  } else if (kind < 99) {  // any finite pattern
    for (int c = 0; c < kHeadDim; ++c) {
      out[c] = uint32_t(draw.bits()) & (type_traits.sign | type_traits.exponent_mask | type_traits.fraction_mask);
      if ((out[c] & type_traits.exponent_mask) == type_traits.exponent_mask) out[c] ^= type_traits.exponent_mask;
    }
  } else {  // a NaN or an infinity
    fill([&] { return draw.normal(); });
    const uint32_t fraction = draw.bits() & 1 ? 0 : uint32_t(draw.bits()) & type_traits.fraction_mask;
    out[draw.integer(0, kHeadDim - 1)] = sign() | type_traits.exponent_mask | fraction;
  }
}

std::vector<uint8_t> draw_part(uint64_t seed, int64_t count, int32_t type) {
  const int64_t element = oracle::type_bytes(type);
  std::vector<uint8_t> bytes(size_t(count * kHeadDim * element));
  const int64_t workers = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (int64_t worker = 0; worker < workers; ++worker) {
    threads.emplace_back([&, worker] {
      uint32_t patterns[kHeadDim];
      for (int64_t i = worker; i < count; i += workers) {
        draw_vector({Draw{seed + uint64_t(i)}.bits()}, type, patterns);
        uint8_t *to = bytes.data() + i * kHeadDim * element;
        for (int c = 0; c < kHeadDim; ++c) std::memcpy(to + c * element, &patterns[c], size_t(element));
      }
    });
  }
  for (std::thread &thread : threads) thread.join();
  return bytes;
}

// What one call each of tq_encode and tq_decode left behind.
struct Result {
  std::vector<uint8_t> codes, scales, output;
  tq_faults faults{};
};

// A codec and arrays for up to kPart vectors.
class Runner {
 public:
  Runner(const Target &target, const tq_config &config, const tq_side_info &side)
      : target_(target),
        codec_(make_codec(config)),
        input_(*target.device, kPart * kHeadDim * 4),
        codes_(*target.device, kPart * size_t(side.code_bytes)),
        scales_(*target.device, kPart * 4),
        output_(*target.device, kPart * kHeadDim * 4),
        faults_(*target.device, sizeof(tq_faults)) {}

  // Enqueues both calls.
  void start(int32_t which, const std::vector<uint8_t> &input, int32_t type, int64_t count, int32_t output_type) {
    const tq_faults none = {};
    faults_.upload(&none, sizeof none);
    input_.upload(input.data(), input.size());
    tq_encode_args args = {};
    args.struct_size = sizeof args;
    args.side = which;
    args.count = count;
    args.input = input_.data();
    args.input_type = type;
    args.codes = codes_.data();
    args.scales = scales_.data();
    args.faults = faults_.as<tq_faults>();
    tq_decode_args back = {};
    back.struct_size = sizeof back;
    back.side = which;
    back.count = count;
    back.codes = codes_.data();
    back.scales = scales_.data();
    back.output = output_.data();
    back.output_type = output_type;
    const tq_status status = target_.device->call([&](void *stream) {
      args.stream = back.stream = stream;
      const tq_status encoded = tq_encode(codec_.get(), &args);
      return encoded == TQ_OK ? tq_decode(codec_.get(), &back) : encoded;
    });
    INFO(target_.name << ": " << (status == TQ_OK ? "" : tq_last_error()));
    REQUIRE(status == TQ_OK);
  }

  void finish(const tq_side_info &side, int64_t count, int32_t output_type, Result *result) const {
    result->codes.resize(size_t(count * side.code_bytes));
    result->scales.resize(size_t(count * side.scale_bytes));
    result->output.resize(size_t(count * kHeadDim * oracle::type_bytes(output_type)));
    codes_.download(result->codes.data(), result->codes.size());
    scales_.download(result->scales.data(), result->scales.size());
    output_.download(result->output.data(), result->output.size());
    faults_.download(&result->faults, sizeof result->faults);
  }

  // Codes alone, for the search of thresholds.
  std::vector<uint8_t> codes_of(const tq_side_info &side, int32_t which, const std::vector<float> &input) {
    const int64_t count = int64_t(input.size()) / kHeadDim;
    std::vector<uint8_t> bytes(input.size() * 4);
    std::memcpy(bytes.data(), input.data(), bytes.size());
    start(which, bytes, TQ_TYPE_F32, count, TQ_TYPE_BF16);
    Result result;
    finish(side, count, TQ_TYPE_BF16, &result);
    return result.codes;
  }

 private:
  Target target_;
  CodecPtr codec_;
  Memory input_, codes_, scales_, output_, faults_;
};

// The first record in which two arrays differ, or -1.
int64_t first_difference(const std::vector<uint8_t> &a, const std::vector<uint8_t> &b, size_t record) {
  if (a == b) return -1;
  const auto where = std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first;
  return record == 0 ? 0 : (where - a.begin()) / int64_t(record);
}

// Runs a target against the CPU's best instruction set.
class Comparison {
 public:
  Comparison(const Target &target, const tq_config &config) : text_(target.name + ' ' + describe(config)) {
    static CpuDevice cpu;
    tq_config reference = config;
    reference.device = TQ_DEVICE_CPU;
    reference.device_ordinal = reference.simd = reference.threads = 0;
    const tq_codec_info info = info_of(make_codec(reference).get());
    sides_[TQ_SIDE_K] = info.k;
    sides_[TQ_SIDE_V] = info.v;
    want_ = std::make_unique<Runner>(Target{&cpu, 0, "cpu"}, reference, info.k);
    got_ = std::make_unique<Runner>(target, config, info.k);
  }

  // How many vectors were compared.
  int64_t compare(int32_t which, const std::vector<uint8_t> &input, int32_t type) {
    const tq_side_info &side = sides_[which];
    const int64_t count = int64_t(input.size()) / (kHeadDim * oracle::type_bytes(type));
    const int32_t output_type = type == TQ_TYPE_BF16 ? TQ_TYPE_F32 : TQ_TYPE_BF16;
    got_->start(which, input, type, count, output_type);
    want_->start(which, input, type, count, output_type);  // while the device works
    want_->finish(side, count, output_type, &want_result_);
    got_->finish(side, count, output_type, &got_result_);
    INFO(text_ << " side " << which << " type " << type);
    CHECK(first_difference(want_result_.codes, got_result_.codes, size_t(side.code_bytes)) == -1);
    CHECK(first_difference(want_result_.scales, got_result_.scales, size_t(side.scale_bytes)) == -1);
    CHECK(first_difference(want_result_.output, got_result_.output,
                           size_t(kHeadDim * oracle::type_bytes(output_type))) == -1);
    CHECK(std::memcmp(&want_result_.faults, &got_result_.faults, sizeof(tq_faults)) == 0);
    return count;
  }

  const tq_faults &faults() const { return want_result_.faults; }

  // Vectors in pairs that differ in one input by one step, and whose codes differ: on both sides of a threshold.
  int64_t compare_thresholds(uint64_t seed, int32_t which) {
    constexpr int64_t kVectors = 2048;
    Draw draw{seed};
    std::vector<float> vectors(kVectors * kHeadDim);
    for (float &value : vectors) value = draw.normal();
    // Floats in order, as integers.
    const auto to_key = [](float value) {
      const auto bits = int32_t(float_bits(value));
      return int64_t(bits < 0 ? INT32_MIN - int64_t(bits) : bits);
    };
    const auto from_key = [](int64_t key) {
      const uint32_t bits = key < 0 ? uint32_t(INT32_MIN - key) : uint32_t(key);
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    };
    std::vector<size_t> at(kVectors);
    std::vector<int64_t> low(kVectors), high(kVectors);
    for (size_t i = 0; i < at.size(); ++i) {
      at[i] = i * kHeadDim + size_t(draw.integer(0, kHeadDim - 1));
      low[i] = to_key(vectors[at[i]]);
      high[i] = to_key(vectors[at[i]] > 0 ? -3.0f : 3.0f);
    }
    const tq_side_info &side = sides_[which];
    const std::vector<uint8_t> base = want_->codes_of(side, which, vectors);
    const auto differs = [&](const std::vector<uint8_t> &codes, size_t i) {
      const size_t first = i * size_t(side.code_bytes);
      return std::memcmp(&codes[first], &base[first], size_t(side.code_bytes)) != 0;
    };
    for (int step = 0; step < 32; ++step) {  // keys have 32 bits
      for (size_t i = 0; i < at.size(); ++i) vectors[at[i]] = from_key(low[i] + (high[i] - low[i]) / 2);
      const std::vector<uint8_t> codes = want_->codes_of(side, which, vectors);
      for (size_t i = 0; i < at.size(); ++i) {
        const int64_t middle = low[i] + (high[i] - low[i]) / 2;
        (differs(codes, i) ? high[i] : low[i]) = middle;
      }
    }
    int64_t compared = 0, adjacent = 0;
    std::vector<uint8_t> input(vectors.size() * 4);
    for (const std::vector<int64_t> *keys : {&low, &high}) {
      for (size_t i = 0; i < at.size(); ++i) vectors[at[i]] = from_key((*keys)[i]);
      std::memcpy(input.data(), vectors.data(), input.size());
      compared += compare(which, input, TQ_TYPE_F32);
      for (size_t i = 0; i < at.size() && keys == &high; ++i) {
        adjacent += differs(want_result_.codes, i) && std::abs(high[i] - low[i]) == 1;
      }
    }
    INFO(text_ << " side " << which << ": " << adjacent << " thresholds");
    CHECK(adjacent > kVectors * 9 / 10);
    return compared;
  }

 private:
  std::string text_;
  tq_side_info sides_[2];
  std::unique_ptr<Runner> want_, got_;
  Result want_result_, got_result_;
};

// `many` random vectors with one Hadamard round, `some` with every other fused rotation.
void compare_all(const Target &target, int64_t many, int64_t some) {
  FRESH(random, "gpu bits");
  const auto bundled = bundled_tensors();
  const auto start = std::chrono::steady_clock::now();
  int64_t compared = 0;
  tq_faults seen = {};
  for (int bits : {4, 3, 2, 1, 8}) {
    for (int rounds : {1, 2, 3, 0}) {
      tq_config config = make_config(target, kHeadDim, bits, bits);
      config.k.rotation = config.v.rotation = rounds == 0 ? TQ_ROTATION_NONE : TQ_ROTATION_HADAMARD;
      config.k.hadamard_rounds = config.v.hadamard_rounds = rounds;
      config.v.scale_type = TQ_TYPE_F32;
      config.v.scale_rule = rounds;  // the default and each of the three
      config.seed = random.bits();
      Comparison comparison(target, config);
      const int64_t total = rounds == 1 ? many : some;
      for (int64_t done = 0, part = 0; done < total; ++part) {
        const int64_t count = std::min(kPart, total - done);
        const int32_t type = std::initializer_list<int32_t>{TQ_TYPE_BF16, TQ_TYPE_F16, TQ_TYPE_F32}.begin()[part % 3];
        const int32_t which = part % 2 == 0 ? TQ_SIDE_K : TQ_SIDE_V;
        done += comparison.compare(which, draw_part(random.bits(), count, type), type);
        for (int kind = 0; kind < TQ_FAULT_KINDS; ++kind) seen.count[kind] += comparison.faults().count[kind];
      }
      compared += total;
      for (const auto &[name, vectors] : bundled) {
        if (name.back() == 'q') continue;
        INFO(name);
        compared += comparison.compare(name.back() == 'k' ? TQ_SIDE_K : TQ_SIDE_V, vectors, TQ_TYPE_BF16);
      }
      for (int32_t which : {TQ_SIDE_K, TQ_SIDE_V}) compared += comparison.compare_thresholds(random.bits(), which);
    }
  }
  CHECK(seen.count[TQ_FAULT_NON_FINITE] > 0);
  CHECK(seen.count[TQ_FAULT_RANGE] > 0);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%s: %lld vectors encoded, decoded and compared, %.2f million a second\n", target.name.c_str(),
              static_cast<long long>(compared), double(compared) / seconds * 1e-6);
}

}  // namespace

TEST_CASE("a GPU has the CPU's bits: ten million vectors, thresholds, a model's own", "[gpu][long]") {
  if (Device *device = gpu_or_skip()) compare_all(gpu_target(device), 10'000'000, 1'000'000);
}

TEST_CASE("every instruction set has the same bits: many vectors, thresholds, a model's own", "[long]") {
  for (const Target &target : targets()) {
    if (target.device->kind() == TQ_DEVICE_CPU) compare_all(target, 300'000, 30'000);
  }
}
