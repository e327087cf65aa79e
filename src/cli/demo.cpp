// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <memory>

#include "commands.hpp"
#include "common.hpp"
#include "evaluate.hpp"
#include "terminal.hpp"

namespace tqkv_cli {
namespace {

constexpr const char *kDataFile = "tinylm_kv.safetensors";

// The bundled file of this build: in the source tree above the binary, or below the prefix it was installed to.
std::string find_data() {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::path binary = fs::read_symlink("/proc/self/exe", error);
  constexpr int kLevels = 4;
  fs::path directory = binary.parent_path();
  for (int i = 0; i < kLevels && !error; ++i, directory = directory.parent_path()) {
    for (const char *place : {"share/tqkv", "bench/data"}) {
      const fs::path candidate = directory / place / kDataFile;
      if (fs::is_regular_file(candidate, error)) return candidate.string();
      error.clear();
    }
  }
  throw Error(std::string(kDataFile) + " is neither in share/tqkv nor in bench/data above " +
              binary.parent_path().string() + "; name it with --data FILE");
}

struct Options {
  EvaluationOptions evaluation;
  std::string data;
};

void demo(const Options &options) {
  const SafetensorsFile file(options.data.empty() ? find_data() : options.data);
  const std::vector<Layer> layers = find_layers(file, {});
  if (!options.evaluation.json) {
    print_paragraph(
        "Keys and values of a real language model, stored in compressed pages at every preset, read back, and "
        "attended to.");
    std::printf("\n");
    print_item("Data", 9, file.path() + ": " + describe(layers));
    if (const auto source = file.metadata().find("source"); source != file.metadata().end()) {
      print_item("Source", 9, printable(source->second));
    }
  }
  evaluate(layers, options.evaluation);
}

}  // namespace

void add_demo(CLI::App &app) {
  const auto options = std::make_shared<Options>();
  CLI::App *command = app.add_subcommand("demo", "Compress the bundled keys and values of a real model");
  command->add_option("--data", options->data, "Another file to use instead of the bundled one");
  options->evaluation.add_to(*command);
  command->callback([options] { demo(*options); });
}

}  // namespace tqkv_cli
