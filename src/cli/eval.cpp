// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <memory>

#include "commands.hpp"
#include "common.hpp"
#include "evaluate.hpp"
#include "terminal.hpp"

namespace tqkv_cli {
namespace {

struct Options {
  EvaluationOptions evaluation;
  std::vector<std::string> paths;
  TensorNames names;
};

void eval(const Options &options) {
  std::vector<SafetensorsFile> files;
  for (const std::string &path : options.paths) files.emplace_back(path);
  std::vector<Layer> layers;
  for (const SafetensorsFile &file : files) {
    for (const Layer &layer : find_layers(file, options.names)) layers.push_back(layer);
  }
  if (!options.evaluation.json) {
    for (const SafetensorsFile &file : files) print_item("File", 9, file.path());
    print_item("Data", 9, describe(layers));
  }
  evaluate(layers, options.evaluation);
}

}  // namespace

void add_eval(CLI::App &app) {
  const auto options = std::make_shared<Options>();
  CLI::App *command = app.add_subcommand("eval", "The same for your own tensors, in safetensors files of any size");
  command->footer(
      "Tensors: <prefix>.k and <prefix>.v, [tokens, heads, head_dim] in F32, F16 or BF16, as the model caches them\n"
      "(keys after RoPE), and optionally <prefix>.q [positions, heads, head_dim], the queries of the last positions.");
  command->add_option("FILE", options->paths, "Safetensors files")->required();
  command->add_option("--k", options->names.k, "Name of the keys' tensor");
  command->add_option("--v", options->names.v, "Name of the values' tensor");
  command->add_option("--q", options->names.q, "Name of the queries' tensor");
  options->evaluation.add_to(*command);
  command->callback([options] { eval(*options); });
}

}  // namespace tqkv_cli
