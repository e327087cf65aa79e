// SPDX-License-Identifier: Apache-2.0
// tqkv-bench codec: its options, table, figures and JSON.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>

#include "codec_bench.hpp"
#include "report.hpp"

namespace tqkv_bench {
namespace {

constexpr int kReference = 128;  // the head_dim whose shares the others are held to

const Row *find(const std::vector<Row> &rows, std::string_view operation, int head_dim, int bits) {
  for (const Row &row : rows) {
    if (row.operation == operation && row.head_dim == head_dim && row.bits == bits) return &row;
  }
  return nullptr;
}

// What an operation has to reach: a share of its ceiling, or a time.
struct Figure {
  double least_share = 0, most_seconds = 0;

  bool met_by(const Row &row) const {
    return row.share() >= least_share && (most_seconds == 0 || row.time.median <= most_seconds);
  }
  std::string text() const {
    char line[64];
    if (most_seconds > 0) {
      std::snprintf(line, sizeof line, "<= %.1f us", most_seconds * 1e6);
    } else {
      std::snprintf(line, sizeof line, ">= %.1f%%", 100 * least_share);
    }
    return line;
  }
};

bool is_one_of(std::string_view text, std::initializer_list<std::string_view> list) {
  return std::find(list.begin(), list.end(), text) != list.end();
}

// The figure of a row, if there is one; other head_dims are held to four fifths of the shares measured at 128.
std::optional<Figure> figure_of(const std::vector<Row> &rows, std::string_view operation, int head_dim, int bits) {
  if (operation == "encode, dense") return Figure{.least_share = 0.25};
  if (operation == "store, 64 tokens") return Figure{.most_seconds = 4e-6};
  const bool up = is_one_of(operation, {"encode, Hadamard", "store", "store, 8192 tokens"});
  if (!up && !is_one_of(operation, {"decode, Hadamard", "load"})) return std::nullopt;
  if (head_dim == kReference) return Figure{.least_share = !up ? 0.85 : bits == 4 ? 0.75 : 0.70};
  const Row *reference = find(rows, operation, kReference, bits);
  if (reference == nullptr) return std::nullopt;
  return Figure{.least_share = 0.8 * reference->share()};
}

// Figures that this run missed, or did not measure though its head_dims include theirs.
std::vector<std::string> missed_figures(const std::vector<Row> &rows, const std::vector<int> &head_dims) {
  std::vector<std::string> missed;
  const auto judge = [&](const char *operation, int head_dim, int bits) {
    const std::string name =
        std::string(operation) + ", head_dim " + std::to_string(head_dim) + ", " + std::to_string(bits) + " bits: ";
    const Row *row = find(rows, operation, head_dim, bits);
    const std::optional<Figure> figure = figure_of(rows, operation, head_dim, bits);
    if (row == nullptr || !figure) {
      missed.push_back(name + (row == nullptr ? "not measured" : "no share at head_dim 128 to be held to"));
    } else if (!figure->met_by(*row)) {
      char measured[64];
      std::snprintf(measured, sizeof measured, "%.2f us, %.1f%%", row->time.median * 1e6, 100 * row->share());
      missed.push_back(name + measured + ", must be " + figure->text());
    }
  };
  for (int head_dim : head_dims) {
    for (int bits : {4, 3, 2}) {
      for (const char *operation : {"encode, Hadamard", "decode, Hadamard", "store", "load"}) {
        judge(operation, head_dim, bits);
      }
      if (head_dim != kReference) continue;
      judge("store, 64 tokens", head_dim, bits);
      judge("store, 8192 tokens", head_dim, bits);
    }
    if (head_dim == kReference) judge("encode, dense", head_dim, 4);
  }
  return missed;
}

void print_header() {
  std::printf("\n%-20s %8s %4s %8s %9s %10s %10s %10s %7s %10s %6s  %-18s %s\n", "operation", "head_dim", "bits",
              "vectors", "MB", "median us", "min", "p90", "GB/s", "ceiling us", "share", "figure", "ceiling's kernel");
}

void print_row(const Row &row, const std::optional<Figure> &figure) {
  const std::string mark = !figure ? "" : (figure->met_by(row) ? "ok " : "MISSED ") + figure->text();
  std::printf("%-20s %8d %4d %8lld %9.2f %10.2f %10.2f %10.2f %7.0f %10.2f %5.1f%%  %-18s %s\n", row.operation.c_str(),
              row.head_dim, row.bits, static_cast<long long>(row.vectors), double(row.bytes) * 1e-6,
              row.time.median * 1e6, row.time.least * 1e6, row.time.p90 * 1e6,
              double(row.bytes) / row.time.median * 1e-9, row.ceiling.seconds * 1e6, 100 * row.share(), mark.c_str(),
              row.ceiling.kernel.c_str());
  std::fflush(stdout);
}

nlohmann::ordered_json to_json(const Machine &machine, const std::vector<Row> &rows) {
  using Json = nlohmann::ordered_json;
  Json json = to_json(machine);
  Json &results = json["results"] = Json::array();
  for (const Row &row : rows) {
    const std::optional<Figure> figure = figure_of(rows, row.operation, row.head_dim, row.bits);
    Json entry = {
        {"operation", row.operation}, {"head_dim", row.head_dim}, {"bits", row.bits}, {"vectors", row.vectors}};
    append_times(row.bytes, row.time, row.ceiling, &entry);
    if (figure) {
      entry["figure"] = figure->text();
      entry["met"] = figure->met_by(row);
    }
    results.push_back(std::move(entry));
  }
  return json;
}

int run(const CodecOptions &options, const std::string &json_path, bool check) {
  std::optional<AtomicFile> file;
  if (!json_path.empty()) file.emplace(json_path);
  Machine machine;
  std::vector<Row> rows;
  measure_codec(options, {.machine =
                              [&](const Machine &measured) {
                                machine = measured;
                                print_machine(machine);
                                print_header();
                              },
                          .row =
                              [&](const Row &row) {
                                rows.push_back(row);
                                print_row(row, figure_of(rows, row.operation, row.head_dim, row.bits));
                              },
                          .refused = [](const std::string &why) { std::printf("not measured: %s\n", why.c_str()); }});
  if (file) file->keep(to_json(machine, rows).dump(1) + "\n");
  return conclude(missed_figures(rows, options.head_dims), check);
}

}  // namespace

int run_codec(int argc, char **argv) {
  CLI::App app(
      "Encode, decode, store and load on the first CUDA device: bytes, time, and share of the time that a kernel takes "
      "which moves the same bytes and does nothing else, measured in the same run.",
      "tqkv-bench codec");
  CodecOptions options;
  std::string json;
  bool check = false;
  app.add_option("--json", json, "also write the results to this file")->type_name("FILE");
  app.add_flag("--quick", options.quick, "few replays: medians of 5");
  app.add_option("--head-dim", options.head_dims, "64, 96, 128 and 256 if not given")
      ->check(CLI::Range(16, 576))
      ->type_name("N");
  app.add_flag("--check", check, "exit with status 3 if a figure of the chosen head_dims is missed or not measured");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError &e) {
    return app.exit(e) == 0 ? 0 : kUsage;
  }
  // 128 first: the others are held to it.
  if (options.head_dims.empty()) options.head_dims = {64, 96, 128, 256};
  std::sort(options.head_dims.begin(), options.head_dims.end());
  options.head_dims.erase(std::unique(options.head_dims.begin(), options.head_dims.end()), options.head_dims.end());
  std::stable_partition(options.head_dims.begin(), options.head_dims.end(), [](int d) { return d == kReference; });
  try {
    return run(options, json, check);
  } catch (const std::exception &e) {
    std::fprintf(stderr, "tqkv-bench codec: %s\n", e.what());
    return kFailed;
  }
}

}  // namespace tqkv_bench
