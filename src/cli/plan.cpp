// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.hpp"
#include "common.hpp"
#include "terminal.hpp"

namespace tqkv_cli {
namespace {

using nlohmann::ordered_json;

struct Options {
  std::string path;
  std::vector<std::string> presets;
  int64_t context_tokens = 0, batch = 1, exact_first = 0, exact_recent = 0;
  uint64_t memory_bytes = 0;
  int32_t block_size = 16;
  bool json = false;
};

// Real configs take a few KB.
constexpr size_t kMaxConfigBytes = 16 << 20;

std::string read_config(const std::string &path) {
  std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw Error(path + ": " + std::strerror(errno));
  std::string text;
  char piece[1 << 16];
  while (const size_t got = std::fread(piece, 1, sizeof piece, file.get())) {
    text.append(piece, got);
    if (text.size() > kMaxConfigBytes) throw Error(path + ": is too large for a model's config.json");
  }
  if (std::ferror(file.get())) throw Error(path + ": " + std::strerror(errno));
  return text;
}

struct Row {
  std::string name, title;
  tq_plan_result result = sized<tq_plan_result>();
  ordered_json json;
};

Row plan_one(const Options &options, const std::string &config, const std::string &name, const std::string &title) {
  Row row;
  row.name = name;
  row.title = title;
  auto args = sized<tq_plan_args>();
  args.block_size_tokens = options.block_size;
  args.config_json = config.data();
  args.config_json_bytes = config.size();
  args.preset = name.c_str();
  args.context_tokens = options.context_tokens;
  args.batch = options.batch;
  args.memory_bytes = int64_t(std::min<uint64_t>(options.memory_bytes, INT64_MAX));
  const bool compressed = name != "bf16" && name != "fp8" && name != "raw";
  args.exact_first_tokens = compressed ? options.exact_first : 0;
  args.exact_recent_tokens = compressed ? options.exact_recent : 0;
  size_t json_bytes = 0;
  check(tq_plan(&args, &row.result, nullptr, 0, &json_bytes), options.path);
  std::string json(json_bytes, '\0');
  check(tq_plan(&args, &row.result, json.data(), json.size(), nullptr), options.path);
  row.json = ordered_json::parse(json.c_str());
  return row;
}

void print(const Options &options, const std::vector<Row> &rows) {
  const tq_plan_result &first = rows.front().result;
  const auto layers = [](int32_t count, const char *what) {
    return count == 0 ? std::string() : ", " + std::to_string(count) + " " + what;
  };
  print_paragraph(options.path + ": " + std::to_string(first.kv_layers) + " layers with a KV cache" +
                  layers(first.full_layers, "of full context") + layers(first.window_layers, "with a sliding window") +
                  layers(first.shared_layers, "more that reuse another layer's") +
                  layers(first.uncached_layers, "without one"));
  std::string question = "context " + grouped(first.context_tokens) + " tokens, batch " + grouped(first.batch) +
                         ", blocks of " + std::to_string(options.block_size) + " tokens";
  if (options.exact_first + options.exact_recent > 0) {
    question += ", first " + grouped(options.exact_first) + " and recent " + grouped(options.exact_recent) +
                " tokens also exact";
  }
  if (options.memory_bytes > 0) question += ", memory " + bytes_text(int64_t(options.memory_bytes));
  print_paragraph(question);
  std::printf("\n");

  const bool limit = options.memory_bytes > 0;
  std::vector<std::string> titles = {"\npreset",       "bytes/\ntoken", "per\nsequence", "of it\nexact",
                                     "of it\npadding", "work-\nspace",  "\ntotal"};
  if (limit) titles.insert(titles.end(), {"max\ncontext", "max\nbatch"});
  Table table(titles);
  for (const Row &row : rows) {
    const tq_plan_result &r = row.result;
    std::vector<std::string> cells = {row.title,
                                      grouped(r.bytes_per_token),
                                      bytes_text(r.bytes_per_sequence),
                                      bytes_text(r.exact_bytes_per_sequence),
                                      bytes_text(r.padding_bytes_per_sequence),
                                      bytes_text(r.workspace_bytes),
                                      bytes_text(r.total_bytes)};
    if (limit) {
      cells.push_back(grouped(r.max_context_tokens));
      cells.push_back(grouped(r.max_batch));
    }
    table.row(cells);
  }
  table.print();

  std::printf("\n");
  print_item("bytes/token", 14, "of all layers, while no sliding window is full");
  print_item("per sequence", 14,
             "at this context: pages, exact tokens and block tables; the next two columns are part of it");
  print_item("padding", 14, "tokens that round up to whole blocks");
  print_item("workspace", 14, "of one attention call at this batch and context");
  print_item("total", 14, "batch x per sequence + workspace");
  if (limit) {
    print_item("max", 14,
               "the largest context at this batch, and batch at this context, within the memory; the "
               "model's weights are not counted");
  }
}

void plan(const Options &options) {
  const std::string config = read_config(options.path);
  std::vector<Row> rows;
  const auto wanted = [&](const std::string &name) {
    return options.presets.empty() ||
           std::find(options.presets.begin(), options.presets.end(), name) != options.presets.end();
  };
  for (const char *name : {"bf16", "fp8"}) {
    if (wanted(name)) rows.push_back(plan_one(options, config, name, name));
  }
  std::vector<std::string> names;
  std::copy_if(options.presets.begin(), options.presets.end(), std::back_inserter(names),
               [](const std::string &name) { return name != "bf16" && name != "fp8"; });
  if (options.presets.empty() || !names.empty()) {
    for (const Preset &preset : presets(names)) {
      // Raw pages are what the bf16 row counts.
      if (names.empty() && preset.k_bits == 16) continue;
      rows.push_back(plan_one(options, config, preset.name, preset.title()));
    }
  }
  if (options.json) {
    ordered_json json = ordered_json::array();
    for (const Row &row : rows) json.push_back(row.json);
    std::printf("%s\n", json.dump(2).c_str());
  } else {
    print(options, rows);
  }
}

}  // namespace

void add_plan(CLI::App &app) {
  const auto options = std::make_shared<Options>();
  CLI::App *command = app.add_subcommand("plan", "Memory of a model's cache at every preset, and what fits");
  command->add_option("CONFIG", options->path, "The model's config.json")->required();
  command->add_option("--context", options->context_tokens, "Tokens of a sequence (default: the model's maximum)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  command->add_option("--batch", options->batch, "Sequences at once")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 31))
      ->capture_default_str();
  command->add_option("--memory", options->memory_bytes, "Memory for the cache in bytes, or as 80GB or 80GiB")
      ->transform(CLI::AsSizeValue(true));
  command->add_option("--preset", options->presets, "This preset only, or bf16, or fp8; may be repeated");
  command->add_option("--exact-first", options->exact_first, "First tokens of a sequence kept exact as well")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40))
      ->capture_default_str();
  command->add_option("--exact-recent", options->exact_recent, "Most recent tokens kept exact as well")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40))
      ->capture_default_str();
  command->add_option("--block-size", options->block_size, "Tokens of a block: 1, 8, or a multiple of 16 up to 256")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command->add_flag("--json", options->json, "Print JSON");
  command->callback([options] { plan(*options); });
}

}  // namespace tqkv_cli
