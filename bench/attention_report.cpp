// SPDX-License-Identifier: Apache-2.0
// tqkv-bench attention: its cases, options, table, figures and JSON.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <utility>

#include "attention_bench.hpp"
#include "report.hpp"

namespace tqkv_bench {
namespace {

constexpr struct {
  const char *preset;
  double least_speed;  // times FlashInfer's, on the large shapes
} kCombos[] = {{"k4v4", 3.4}, {"k4v3", 0}, {"k3v3", 4.1}, {"k4v2", 0}, {"k2v2", 5.6}};

struct Shape {
  const char *name;
  std::vector<int32_t> lengths;
  int q_heads, kv_heads;
  double least_shares[std::size(kCombos)];
  double peer_seconds;  // FlashInfer bf16, measured on an H200, see bench/NOTES.md
  bool fast;            // held to least_speed
};

// Lengths whose logarithms are uniform, the same on every machine.
std::vector<int32_t> log_uniform(int count, double least, double most) {
  std::mt19937_64 random(1);
  std::vector<int32_t> lengths;
  for (int i = 0; i < count; ++i) {
    lengths.push_back(int32_t(std::lround(least * std::pow(most / least, double(random() >> 11) * 0x1p-53))));
  }
  return lengths;
}

std::vector<Shape> shapes() {
  const auto equal = [](int sequences, int32_t length) { return std::vector<int32_t>(size_t(sequences), length); };
  return {
      {"16 x 32768, 32/8", equal(16, 32768), 32, 8, {.88, .84, .82, .80, .78}, 484e-6, true},
      {"64 x 8192, 32/8", equal(64, 8192), 32, 8, {.88, .84, .82, .80, .78}, 485e-6, true},
      {"32 x 16384, 64/8", equal(32, 16384), 64, 8, {.88, .84, .82, .80, .78}, 480e-6, true},
      {"1 x 131072, 32/8", equal(1, 131072), 32, 8, {.75, .70, .68, .66, .60}, 134e-6, false},
      {"64 x 64..32768, 32/8", log_uniform(64, 64, 32768), 32, 8, {.84, .80, .78, .76, .73}, 0, false},
      {"16 x 32768, 8/1", equal(16, 32768), 8, 1, {}, 0, false},  // an eighth of a model
      {"8 x 2048, 32/8", equal(8, 2048), 32, 8, {}, 0, false},
      {"1 x 4096, 32/8", equal(1, 4096), 32, 8, {}, 0, false},
  };
}

// With `tensors` those that have a share to reach are there with these, too.
std::vector<AttentionCase> all_cases(const ModelTensors *tensors) {
  std::vector<AttentionCase> cases;
  const std::vector<Shape> all = shapes();
  for (size_t combo = 0; combo < std::size(kCombos); ++combo) {
    for (const Shape &shape : all) {
      AttentionCase one;
      one.shape = shape.name;
      one.preset = kCombos[combo].preset;
      one.lengths = shape.lengths;
      one.q_heads = shape.q_heads;
      one.kv_heads = shape.kv_heads;
      one.least_share = shape.least_shares[combo];
      one.peer_seconds = shape.peer_seconds;
      one.least_speed = shape.fast ? kCombos[combo].least_speed : 0;
      cases.push_back(std::move(one));
    }
    if (combo > 0) continue;
    const auto vary = [&](std::string feature, double most_relative, auto change) {
      AttentionCase one = cases.front();  // 16 x 32768, K4V4
      one.relative_to = one.name();
      one.feature = std::move(feature);
      one.most_relative = most_relative;
      one.least_share = one.peer_seconds = one.least_speed = 0;
      change(one);
      cases.push_back(std::move(one));
    };
    for (const auto &[q_len, most] : {std::pair{2, 1.1}, {4, 1.3}, {8, 2.2}}) {
      vary("q_len " + std::to_string(q_len), most, [q = q_len](AttentionCase &one) { one.q_len = q; });
    }
    vary("soft cap 50", 1.03, [](AttentionCase &one) { one.soft_cap = 50; });
    vary("sinks", 1.03, [](AttentionCase &one) { one.sinks = true; });
    vary("lse", 1.03, [](AttentionCase &one) { one.lse = true; });
    vary("window 8192", 0, [](AttentionCase &one) { one.window = 8192; });
    vary("4 + 128 exact", 0, [](AttentionCase &one) { one.exact_first = 4, one.exact_recent = 128; });
  }
  for (const auto &[head_dim, block_tokens] : {std::pair{64, 16}, {256, 16}, {128, 64}}) {
    for (const char *preset : {"k4v4", "k3v3", "k2v2"}) {
      AttentionCase one;
      one.shape = all.front().name;
      one.lengths = all.front().lengths;
      one.preset = preset;
      one.feature = head_dim != 128 ? "head_dim " + std::to_string(head_dim) : "page " + std::to_string(block_tokens);
      one.head_dim = head_dim;
      one.block_tokens = block_tokens;
      cases.push_back(std::move(one));
    }
  }
  for (const char *shape : {"16 x 32768, 32/8", "1 x 131072, 32/8"}) {
    AttentionCase one =
        *std::find_if(cases.begin(), cases.end(), [&](const AttentionCase &c) { return c.shape == shape; });
    one.preset = "raw";
    one.least_share = one.peer_seconds = one.least_speed = 0;
    cases.push_back(std::move(one));
  }
  for (const char *preset : {"k4v4", "k3v3", "k2v2", "raw"}) {
    AttentionCase one;
    one.shape = "1 x 2048 over 32768, 32/8";
    one.lengths = {32768 + 2048};
    one.preset = preset;
    one.q_len = 2048;
    one.chunk = true;
    cases.push_back(std::move(one));
  }
  if (tensors == nullptr) return cases;
  for (const AttentionCase &one : std::vector<AttentionCase>(cases)) {
    if (one.least_share == 0) continue;
    cases.push_back(one);
    cases.back().feature = "real keys";
    cases.back().tensors = tensors;
  }
  return cases;
}

std::string combo_of(const AttentionCase &one) {
  std::string name = one.preset;
  std::replace(name.begin(), name.end(), 'k', 'K');
  std::replace(name.begin(), name.end(), 'v', 'V');
  return name;
}

const AttentionRow *find(const std::vector<AttentionRow> &rows, const std::string &name) {
  for (const AttentionRow &row : rows) {
    if (row.what.name() == name) return &row;
  }
  return nullptr;
}

// A number of a row and what it has to be, if anything.
struct Figure {
  std::string key;    // in JSON
  double value = 0;   // NaN: not known
  std::string shown;  // value
  double limit = 0;   // 0: none
  bool least = true;  // or at most
  std::string limit_shown;

  bool met() const { return least ? value >= limit : value <= limit; }
};

std::vector<Figure> figures_of(const AttentionRow &row) {
  const AttentionCase &what = row.what;
  const auto make = [](const char *key, double value, double limit, bool least, double unit, const char *format) {
    Figure figure{key, value, "", limit, least, ""};
    char text[32];
    std::snprintf(text, sizeof text, format, value * unit);
    figure.shown = text;
    if (limit != 0) {
      std::snprintf(text, sizeof text, format, limit * unit);
      figure.limit_shown = (least ? ">= " : "<= ") + std::string(text);
    }
    return figure;
  };
  std::vector<Figure> figures = {make("", row.share(), what.least_share, true, 100, "%.1f%%")};
  if (!what.relative_to.empty()) {
    figures.push_back(make("relative", row.time.median / row.plain_seconds, what.most_relative, false, 1, "%.2f"));
  }
  if (what.chunk) figures.push_back(make("TFLOP/s", row.flops / row.time.median, 0, true, 1e-12, "%.1f"));
  if (what.peer_seconds > 0) {
    figures.push_back(make("speed", what.peer_seconds / row.time.median, what.least_speed, true, 1, "%.2f"));
  }
  return figures;
}

std::vector<std::string> missed_figures(const std::vector<AttentionRow> &rows,
                                        const std::vector<AttentionCase> &cases) {
  std::vector<std::string> missed;
  for (const AttentionCase &one : cases) {
    const AttentionRow *row = find(rows, one.name());
    if (row == nullptr) {
      if (one.least_share != 0 || one.most_relative != 0 || one.least_speed != 0) {
        missed.push_back(one.name() + ": not measured");
      }
      continue;
    }
    for (const Figure &figure : figures_of(*row)) {
      if (figure.limit == 0 || figure.met()) continue;
      const std::string name = figure.key.empty() ? "share" : figure.key;
      missed.push_back(one.name() + ": " + name + " " + figure.shown + ", must be " + figure.limit_shown);
    }
  }
  return missed;
}

void print_header() {
  std::printf(
      "\nMB: of pages, to be read. Ceiling: the best read of as many. Relative: time over the plain call's at "
      "16 x 32768, K4V4, measured again before and after. Speed: times FlashInfer bf16, measured on an H200 "
      "(bench/NOTES.md)\n\n"
      "%-42s %9s %10s %10s %10s %7s %10s  %s\n",
      "sequences x length, heads, codes", "MB", "median us", "min", "p90", "GB/s", "ceiling us", "share, figures");
}

void print_row(const AttentionRow &row, const std::vector<Figure> &figures) {
  std::printf("%-42s %9.2f %10.2f %10.2f %10.2f %7.0f %10.2f ", row.what.name().c_str(), double(row.bytes) * 1e-6,
              row.time.median * 1e6, row.time.least * 1e6, row.time.p90 * 1e6,
              double(row.bytes) / row.time.median * 1e-9, row.ceiling.seconds * 1e6);
  for (const Figure &figure : figures) {
    std::printf(" %s%s%s", figure.key.c_str(), figure.key.empty() ? "" : " ", figure.shown.c_str());
    if (figure.limit != 0) std::printf(" (%s %s)", figure.met() ? "ok" : "MISSED", figure.limit_shown.c_str());
  }
  std::printf("\n");
  std::fflush(stdout);
}

nlohmann::ordered_json to_json(const Machine &machine, const std::string &data, const std::vector<AttentionRow> &rows) {
  using Json = nlohmann::ordered_json;
  Json json = to_json(machine);
  json["peer"] = "FlashInfer bf16, measured on an H200, see bench/NOTES.md";
  if (!data.empty()) json["data"] = data;
  Json &results = json["results"] = Json::array();
  for (const AttentionRow &row : rows) {
    const AttentionCase &what = row.what;
    Json entry = {{"name", what.name()},
                  {"shape", what.shape},
                  {"codes", combo_of(what)},
                  {"feature", what.feature},
                  {"sequences", what.lengths.size()},
                  {"tokens", std::accumulate(what.lengths.begin(), what.lengths.end(), int64_t{0})},
                  {"q_heads", what.q_heads},
                  {"kv_heads", what.kv_heads},
                  {"head_dim", what.head_dim},
                  {"block_tokens", what.block_tokens},
                  {"q_len", what.q_len}};
    append_times(row.bytes, row.time, row.ceiling, &entry);
    for (const Figure &figure : figures_of(row)) {
      const std::string prefix = figure.key.empty() ? "" : figure.key + "_";
      if (figure.key == "relative") {
        entry["relative_to"] = what.relative_to;
        entry["relative_to_microseconds"] = rounded(row.plain_seconds * 1e6, 1000);
      }
      if (figure.key == "speed") entry["peer_microseconds"] = rounded(what.peer_seconds * 1e6, 1000);
      if (!figure.key.empty()) {
        const double value = figure.key == "TFLOP/s" ? figure.value * 1e-12 : figure.value;
        entry[figure.key] = std::isfinite(value) ? Json(rounded(value, 10000)) : Json(nullptr);
      }
      if (figure.limit == 0) continue;
      entry[prefix + "figure"] = figure.limit_shown;
      entry[prefix + "met"] = figure.met();
    }
    results.push_back(std::move(entry));
  }
  return json;
}

// The cases whose names have the texts, and those that they are compared with.
std::vector<AttentionCase> chosen_cases(const ModelTensors *tensors, const std::string &shape,
                                        const std::string &bits) {
  const std::vector<AttentionCase> all = all_cases(tensors);
  std::set<std::string> names;
  for (const AttentionCase &one : all) {
    if (one.name().find(shape) == std::string::npos) continue;
    if (!bits.empty() && combo_of(one) != bits && one.preset != bits) continue;
    names.insert(one.name());
    if (!one.relative_to.empty()) names.insert(one.relative_to);
  }
  std::vector<AttentionCase> chosen;
  std::copy_if(all.begin(), all.end(), std::back_inserter(chosen),
               [&](const AttentionCase &one) { return names.count(one.name()) != 0; });
  return chosen;
}

int run(const std::vector<AttentionCase> &cases, const std::string &data, bool quick, const std::string &json_path,
        bool check) {
  std::optional<AtomicFile> file;
  if (!json_path.empty()) file.emplace(json_path);
  Machine machine;
  std::vector<AttentionRow> rows;
  measure_attention(cases, quick,
                    {.machine =
                         [&](const Machine &measured) {
                           machine = measured;
                           print_machine(machine);
                           print_header();
                         },
                     .row =
                         [&](const AttentionRow &row) {
                           rows.push_back(row);
                           print_row(row, figures_of(row));
                         },
                     .refused =
                         [](const AttentionCase &one, const std::string &why) {
                           std::printf("%-42s not measured: %s\n", one.name().c_str(), why.c_str());
                         }});
  if (file) file->keep(to_json(machine, data, rows).dump(1) + "\n");
  return conclude(missed_figures(rows, cases), check);
}

}  // namespace

std::string AttentionCase::name() const {
  return shape + ", " + combo_of(*this) + (feature.empty() ? "" : ", " + feature);
}

int run_attention(int argc, char **argv) {
  CLI::App app(
      "Attention over compressed pages on the first CUDA device: bytes of pages, time, and share of the time that the "
      "best read of as many bytes takes, measured in the same run.",
      "tqkv-bench attention");
  std::string json, data, shape, bits;
  bool quick = false, check = false;
  app.add_option("--json", json, "also write the results to this file")->type_name("FILE");
  app.add_option(
         "--data", data,
         "also measure with keys, values and queries of this safetensors file, NAME.k, NAME.v and NAME.q, repeated "
         "to the length")
      ->type_name("FILE");
  app.add_flag("--quick", quick, "few replays: medians of 5");
  app.add_option("--shape", shape, "only rows whose name has this text, as \"16 x 32768\" or \"q_len\"")
      ->type_name("TEXT");
  app.add_option("--bits", bits, "only rows of these codes, as K4V4")->type_name("CODES");
  app.add_flag("--check", check, "exit with status 3 if a figure of the chosen rows is missed or not measured");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError &e) {
    return app.exit(e) == 0 ? 0 : kUsage;
  }
  try {
    std::optional<ModelTensors> tensors;
    if (!data.empty()) tensors = read_model_tensors(data);
    const std::vector<AttentionCase> cases = chosen_cases(tensors ? &*tensors : nullptr, shape, bits);
    if (cases.empty()) {
      std::fprintf(stderr, "tqkv-bench attention: no row has that name and those codes\n");
      return kUsage;
    }
    return run(cases, data, quick, json, check);
  } catch (const std::exception &e) {
    std::fprintf(stderr, "tqkv-bench attention: %s\n", e.what());
    return kFailed;
  }
}

}  // namespace tqkv_bench
