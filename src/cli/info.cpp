// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.hpp"
#include "common.hpp"
#include "machine.hpp"
#include "terminal.hpp"

namespace tqkv_cli {
namespace {

using nlohmann::ordered_json;

constexpr int32_t kMinHeadDim = 16, kMaxHeadDim = 576, kHeadDimStep = 16;
constexpr int32_t kExampleHeadDim = 128;

tq_config config_of(const Preset &preset, int32_t head_dim) {
  tq_config config;
  check(tq_config_init(&config, sizeof config, preset.name.c_str()), "preset " + preset.name);
  config.k.head_dim = head_dim;
  return config;
}

ordered_json devices_json(int32_t device, std::string &reason) {
  int32_t count = 0;
  const char *why = nullptr;
  check(tq_device_count(device, &count, &why), "devices");
  if (why) reason = why;
  ordered_json devices = ordered_json::array();
  for (int32_t i = 0; i < count; ++i) {
    const tq_device_info info = device_info(device, i);
    devices.push_back({{"name", info.name},
                       {"processors", info.processors},
                       {"memory_bytes", info.memory_bytes},
                       {"compute_capability", info.compute_capability}});
  }
  return devices;
}

ordered_json collect() {
  const tq_build build = build_info();
  ordered_json json;
  json["version"] = build.version;
  json["abi_version"] = build.abi_version;
  json["compiler"] = build.compiler;
  json["simd_targets"] = build.simd_targets;
  json["simd_target"] = build.simd_target;
  json["cuda"] = build.cuda;
  std::string ignored, reason;
  json["cpu_devices"] = devices_json(TQ_DEVICE_CPU, ignored);
  json["cuda_devices"] = devices_json(TQ_DEVICE_CUDA, reason);
  json["cuda_devices_reason"] = json["cuda_devices"].empty() ? ordered_json(reason) : ordered_json();

  for (const Preset &preset : presets()) {
    const Codec codec = make_codec(config_of(preset, kExampleHeadDim), "preset " + preset.name);
    auto layout = sized<tq_layout>();
    check(tq_page_layout(codec.get(), TQ_PAGES_CODED, &layout), "preset " + preset.name);
    json["presets"].push_back({{"name", preset.name},
                               {"aliases", preset.aliases},
                               {"k_bits", preset.k_bits},
                               {"v_bits", preset.v_bits},
                               {"bytes_per_token_head_dim_128", layout.bytes_per_token}});
  }
  // Asked of the library, not written down here.
  json["hadamard_head_dims"] = json["other_head_dims"] = ordered_json::array();
  for (int32_t dim = kMinHeadDim; dim <= kMaxHeadDim; dim += kHeadDimStep) {
    tq_config config = config_of(presets().front(), dim);
    const bool hadamard = tq_supports(&config) == TQ_OK;
    config.k.rotation = config.v.rotation = TQ_ROTATION_DENSE;
    if (hadamard || tq_supports(&config) == TQ_OK) {
      json[hadamard ? "hadamard_head_dims" : "other_head_dims"].push_back(dim);
    }
  }
  return json;
}

std::string list(const ordered_json &values) {
  std::string text;
  for (const ordered_json &value : values) {
    text += (text.empty() ? "" : ", ") + (value.is_string() ? value.get<std::string>() : value.dump());
  }
  return text;
}

void print(const ordered_json &json) {
  const auto line = [](const char *name, const std::string &value) { print_item(name, 12, value); };
  const auto text = [&](const char *key) { return json[key].get<std::string>(); };
  line("tqkv", text("version") + ", ABI " + json["abi_version"].dump());
  line("compiler", text("compiler"));
  for (const ordered_json &cpu : json["cpu_devices"]) {
    line("CPU", cpu["name"].get<std::string>() + ", " + cpu["processors"].dump() + " cores, " +
                    bytes_text(cpu["memory_bytes"]));
  }
  std::string targets = text("simd_targets");
  for (size_t comma = 0; (comma = targets.find(',', comma)) != std::string::npos; ++comma)
    targets.insert(comma + 1, " ");
  line("SIMD", text("simd_target") + " is used; built for " + targets);
  line("CUDA", json["cuda"] == "not built" ? "not built" : "kernels for " + text("cuda"));
  if (json["cuda_devices"].empty()) line("GPU", "none: " + text("cuda_devices_reason"));
  for (const ordered_json &gpu : json["cuda_devices"]) {
    line("GPU", gpu["name"].get<std::string>() + ", " + gpu["processors"].dump() + " multiprocessors, " +
                    bytes_text(gpu["memory_bytes"]) + ", compute capability " + gpu["compute_capability"].dump());
  }

  std::printf("\n");
  Table table({"preset", "K bits", "V bits", "bytes/token", "vs bf16"});
  const int64_t raw_bytes = 2 * 2 * kExampleHeadDim;
  for (const ordered_json &preset : json["presets"]) {
    const int64_t bytes = preset["bytes_per_token_head_dim_128"];
    const std::string aliases = list(preset["aliases"]);
    table.row({preset["name"].get<std::string>() + (aliases.empty() ? "" : " (" + aliases + ")"),
               preset["k_bits"].dump(), preset["v_bits"].dump(), std::to_string(bytes),
               fixed(double(raw_bytes) / double(bytes), 2)});
  }
  table.print();
  print_paragraph("bytes/token: one kv head of head_dim 128, key and value, scales included");

  std::printf("\n");
  line("head_dim", list(json["hadamard_head_dims"]) + " with the default rotation (Hadamard)");
  if (!json["other_head_dims"].empty()) {
    line("", list(json["other_head_dims"]) + " with a dense, a given or no rotation (no Hadamard matrix is built in)");
  }
  line("bits", "1, 2, 3, 4, 8 or 16 (raw), K and V chosen apart");
  line("tensors", "f32, f16, bf16");
  line("block size", "1, 8, or a multiple of 16 up to 256 tokens");
}

}  // namespace

tq_build build_info() {
  auto build = sized<tq_build>();
  check(tq_build_info(&build), "build");
  return build;
}

tq_device_info device_info(int32_t device, int32_t ordinal) {
  auto info = sized<tq_device_info>();
  check(tq_device_get_info(device, ordinal, &info), "device");
  return info;
}

std::string machine_text() {
  const tq_build build = build_info();
  const tq_device_info cpu = device_info(TQ_DEVICE_CPU, 0);
  return std::string(cpu.name) + ", " + std::to_string(cpu.processors) + " cores, " + build.simd_target + "; tqkv " +
         build.version;
}

void add_info(CLI::App &app) {
  const auto json = std::make_shared<bool>(false);
  CLI::App *command = app.add_subcommand("info", "Version, devices, SIMD target, and what is supported");
  command->add_flag("--json", *json, "Print JSON");
  command->callback([json] {
    const ordered_json info = collect();
    if (*json) {
      std::printf("%s\n", info.dump(2).c_str());
    } else {
      print(info);
    }
  });
}

}  // namespace tqkv_cli
