// SPDX-License-Identifier: Apache-2.0
#include "bundled.hpp"

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "catch.hpp"

std::map<std::string, std::vector<uint8_t>> bundled_tensors() {
  const char *directory = std::getenv("TQKV_DATA_DIR");
  const std::filesystem::path path =
      (directory ? std::filesystem::path(directory)
                 : std::filesystem::path(__FILE__).parent_path().parent_path().parent_path() / "bench" / "data") /
      "tinylm_kv.safetensors";
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  INFO(path.string());
  REQUIRE(bytes.size() > 8);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), 8);
  REQUIRE(header_bytes < bytes.size() - 8);
  const char *data = bytes.data() + 8 + header_bytes;
  std::map<std::string, std::vector<uint8_t>> found;
  const nlohmann::json header = nlohmann::json::parse(bytes.data() + 8, data);
  for (const auto &[name, tensor] : header.items()) {
    if (name == "__metadata__") continue;
    REQUIRE(tensor.at("dtype") == "BF16");
    REQUIRE(tensor.at("shape").back() == kBundledHeadDim);
    const size_t begin = tensor.at("data_offsets").at(0), end = tensor.at("data_offsets").at(1);
    REQUIRE(8 + header_bytes + end <= bytes.size());
    found[name].assign(data + begin, data + end);
  }
  REQUIRE(found.size() >= 12);
  return found;
}
