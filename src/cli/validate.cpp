// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <numbers>
#include <random>

#include "commands.hpp"
#include "common.hpp"
#include "metrics/metrics.hpp"
#include "terminal.hpp"

namespace tqkv_cli {
namespace {

using nlohmann::ordered_json;
using tqkv_metrics::VectorError;

struct Options {
  std::vector<int32_t> head_dims = {64, 80, 96, 112, 128, 192, 256, 576};
  std::vector<int32_t> bits = {1, 2, 3, 4, 8};
  int32_t rotation = TQ_ROTATION_HADAMARD;
  int64_t vectors = 32768;
  uint64_t seed = 0;
  bool json = false;
};

constexpr int64_t kChunkVectors = 8192;
constexpr int64_t kPieceVectors = 256;  // drawn by one thread from its own generator

// Uniform on the unit sphere, whatever the number of threads.
void draw_unit_vectors(uint64_t seed, int64_t first, int64_t count, int32_t dim, float *vectors) {
  parallel_for((count + kPieceVectors - 1) / kPieceVectors, [&](int64_t piece) {
    const int64_t begin = piece * kPieceVectors, end = std::min(count, begin + kPieceVectors);
    const uint64_t stream = uint64_t(first + begin);
    std::seed_seq sequence{uint32_t(seed), uint32_t(seed >> 32), uint32_t(stream), uint32_t(stream >> 32),
                           uint32_t(dim)};
    std::mt19937_64 generator(sequence);
    std::normal_distribution<double> normal;
    std::vector<double> x(static_cast<size_t>(dim));
    for (int64_t i = begin; i < end; ++i) {
      double norm2 = 0;
      for (double &value : x) {
        value = normal(generator);
        norm2 += value * value;
      }
      for (int32_t c = 0; c < dim; ++c) vectors[i * dim + c] = float(x[size_t(c)] / std::sqrt(norm2));
    }
  });
}

// One codec measures both rules: keys have the least-MSE scale, values the unbiased one.
struct Subject {
  int32_t bits;
  Codec codec;
  tq_codec_info info = sized<tq_codec_info>();
  VectorError errors[2];
  double sum_product = 0;  // of <x, decoded>, unbiased rule

  Subject(int32_t head_dim, int32_t bits, int32_t rotation, uint64_t seed) : bits(bits) {
    auto config = sized<tq_config>();
    config.seed = seed;
    for (tq_side_config *side : {&config.k, &config.v}) {
      side->head_dim = head_dim;
      side->bits = bits;
      side->rotation = rotation;
    }
    config.k.scale_rule = TQ_SCALE_LEAST_MSE;
    config.v.scale_rule = TQ_SCALE_UNBIASED;
    const std::string what = "--head-dim " + std::to_string(head_dim) + " --bits " + std::to_string(bits);
    codec = make_codec(config, what);
    check(tq_info(codec.get(), &info), what);
  }

  const tq_side_info &side(int32_t index) const { return index == TQ_SIDE_K ? info.k : info.v; }
  int32_t bytes() const { return info.k.code_bytes + info.k.scale_bytes; }

  void measure(const float *vectors, int64_t count) {
    const int64_t dim = info.k.head_dim;
    std::vector<float> decoded(size_t(count * dim));
    for (const int32_t index : {TQ_SIDE_K, TQ_SIDE_V}) {
      Buffer codes(size_t(count * side(index).code_bytes)), scales(size_t(count * side(index).scale_bytes));
      size_t workspace_bytes = 0;
      check(tq_vectors_workspace(codec.get(), index, count, &workspace_bytes), "workspace");
      Buffer workspace(workspace_bytes);
      auto encode = sized<tq_encode_args>();
      encode.side = index;
      encode.count = count;
      encode.input = vectors;
      encode.input_type = TQ_TYPE_F32;
      encode.codes = codes.get();
      encode.scales = scales.get();
      encode.workspace = workspace.get();
      encode.workspace_bytes = workspace_bytes;
      check(tq_encode(codec.get(), &encode), "encode");
      auto decode = sized<tq_decode_args>();
      decode.side = index;
      decode.count = count;
      decode.codes = codes.get();
      decode.scales = scales.get();
      decode.output = decoded.data();
      decode.output_type = TQ_TYPE_F32;
      decode.workspace = workspace.get();
      decode.workspace_bytes = workspace_bytes;
      check(tq_decode(codec.get(), &decode), "decode");
      for (int64_t i = 0; i < count; ++i) {
        const float *x = vectors + i * dim, *y = decoded.data() + i * dim;
        errors[index].add(x, y, dim);
        for (int64_t c = 0; index == TQ_SIDE_V && c < dim; ++c) sum_product += double(x[c]) * double(y[c]);
      }
    }
  }
};

// arXiv:2504.19874, for unit vectors: Theorem 1 (what TurboQuant stays below) and Theorem 3 (what nothing gets below).
double upper_bound(int32_t bits) {
  return std::sqrt(3.0) * std::numbers::pi / 2 * std::pow(4.0, -bits);
}
double lower_bound(int32_t bits) {
  return std::pow(4.0, -bits);
}

ordered_json result_of(const Subject &subject) {
  const double mse = subject.errors[TQ_SIDE_K].mse(), unbiased = subject.errors[TQ_SIDE_V].mse();
  ordered_json json;
  json["head_dim"] = subject.info.k.head_dim;
  json["bits"] = subject.bits;
  json["bytes"] = subject.bytes();
  json["mse"] = mse;
  json["mse_unbiased"] = unbiased;
  json["lower_bound"] = lower_bound(subject.bits);
  json["upper_bound"] = upper_bound(subject.bits);
  json["slope_unbiased"] = subject.sum_product / double(subject.errors[TQ_SIDE_V].count);
  // The int8 grid of 8 bits spans the largest coordinate of each vector: it is no Lloyd-Max codebook, and the paper's
  // theorem does not speak of it.
  json["bound_applies"] = subject.bits <= 4;
  json["within_bounds"] = mse >= lower_bound(subject.bits) && std::max(mse, unbiased) <= upper_bound(subject.bits);
  return json;
}

void print(const ordered_json &json) {
  Table table({"head_dim", "bits", "bytes", "MSE", "unbiased\nMSE", "unbiased\nslope", "lower\nbound", "upper\nbound",
               "MSE/\nlower", "note\t"});
  int32_t last_dim = 0;
  for (const ordered_json &r : json["results"]) {
    const int32_t dim = r["head_dim"], bits = r["bits"];
    if (last_dim != 0 && dim != last_dim) table.section("");
    last_dim = dim;
    const int digits = bits == 8 ? 7 : 5;
    const auto number = [&](const char *key) { return fixed(r[key].get<double>(), digits); };
    std::string note;
    if (!r["within_bounds"].get<bool>()) {
      note = r["bound_applies"].get<bool>() ? "BOUND BROKEN" : "above (int8 grid)";
    }
    table.row({std::to_string(dim), std::to_string(bits), r["bytes"].dump(), number("mse"), number("mse_unbiased"),
               fixed(r["slope_unbiased"], 4), number("lower_bound"), number("upper_bound"),
               fixed(r["mse"].get<double>() / r["lower_bound"].get<double>(), 2), note});
  }
  table.print();
  std::printf("\n");
  print_item("bytes", 10, "of one stored vector, scale included");
  print_item("MSE", 10, "mean |x - decoded|^2 of unit vectors, least-MSE scale");
  print_item("unbiased", 10, "the same with the unbiased scale; slope: mean of <x, decoded> / <x, x>, ideally 1");
  print_item("lower", 10, "4^-bits, which no quantiser gets below (arXiv:2504.19874, Theorem 3)");
  print_item("upper", 10,
             "sqrt(3) pi/2 4^-bits, the paper's bound for its quantiser (Theorem 1), to be kept at 1 to 4 bits; 8 bits "
             "are an int8 grid over each vector's range, no Lloyd-Max codebook, which the theorem does not speak of");
}

void validate(const Options &options, int &exit_status) {
  Progress progress("measuring", options.vectors * int64_t(options.head_dims.size() * (options.bits.size() + 1)));
  ordered_json json;
  json["results"] = ordered_json::array();
  json["seed"] = options.seed;
  json["vectors"] = options.vectors;
  bool broken = false;
  if (!options.json) {
    std::printf("%lld random unit vectors for each head_dim, --seed %llu\n\n", static_cast<long long>(options.vectors),
                static_cast<unsigned long long>(options.seed));
    std::fflush(stdout);
  }
  for (const int32_t dim : options.head_dims) {
    std::vector<Subject> subjects;
    for (const int32_t bits : options.bits) subjects.emplace_back(dim, bits, options.rotation, options.seed);
    std::vector<float> vectors(size_t(std::min(kChunkVectors, options.vectors) * dim));
    for (int64_t first = 0; first < options.vectors; first += kChunkVectors) {
      const int64_t count = std::min(kChunkVectors, options.vectors - first);
      draw_unit_vectors(options.seed, first, count, dim, vectors.data());
      progress.advance(count);
      for (Subject &subject : subjects) {
        subject.measure(vectors.data(), count);
        progress.advance(count);
      }
    }
    for (const Subject &subject : subjects) {
      json["results"].push_back(result_of(subject));
      const ordered_json &result = json["results"].back();
      broken |= result["bound_applies"].get<bool>() && !result["within_bounds"].get<bool>();
    }
  }
  if (options.json) {
    std::printf("%s\n", json.dump(2).c_str());
  } else {
    print(json);
    if (!broken) std::printf("\nEvery bound that applies is kept.\n");
  }
  if (broken) {
    std::fprintf(stderr, "tqkv: a bound is broken\n");
    exit_status = 1;
  }
}

}  // namespace

void add_validate(CLI::App &app, int &exit_status) {
  const auto options = std::make_shared<Options>();
  CLI::App *command = app.add_subcommand("validate", "Measured error against the paper's bounds, on random vectors");
  std::random_device device;
  options->seed = device();
  command->add_option("--head-dim", options->head_dims, "Head sizes, 16 to 576 in steps of 16")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--bits", options->bits, "Bits per value: 1, 2, 3, 4, 8")
      ->delimiter(',')
      ->check(CLI::IsMember({1, 2, 3, 4, 8}))
      ->capture_default_str();
  command->add_option("--vectors", options->vectors, "Vectors for each head size")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 32))
      ->capture_default_str();
  command->add_option("--seed", options->seed, "Of the vectors and the rotation (default: drawn anew)");
  command->add_option("--rotation", options->rotation, "hadamard (default), dense or none")
      ->transform(CLI::CheckedTransformer(rotation_names()));
  command->add_flag("--json", options->json, "Print JSON");
  command->callback([options, &exit_status] { validate(*options, exit_status); });
}

}  // namespace tqkv_cli
