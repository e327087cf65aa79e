// SPDX-License-Identifier: Apache-2.0
// The command's own parts are in no library: this test brings them along.
#include "cli/safetensors.cpp"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <random>

#include "catch.hpp"
#include "cli/common.cpp"

namespace {

using tqkv_cli::Error;
using tqkv_cli::SafetensorsFile;

class TemporaryFile {
 public:
  TemporaryFile() {
    const int file = ::mkstemp(path_.data());
    REQUIRE(file >= 0);
    ::close(file);
  }
  ~TemporaryFile() { std::remove(path_.c_str()); }

  const std::string &write(const std::string &bytes) {
    std::ofstream(path_, std::ios::binary | std::ios::trunc).write(bytes.data(), std::streamsize(bytes.size()));
    return path_;
  }

 private:
  std::string path_ = "/tmp/tqkv_safetensors_XXXXXX";
};

std::string with_length(const std::string &header) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += char(uint64_t(header.size()) >> (8 * i));
  return bytes + header;
}

}  // namespace

TEST_CASE("safetensors: every tensor comes back from any offset", "[cli]") {
  std::mt19937_64 random(tqkv_test::seed());
  TemporaryFile temporary;
  for (int round = 0; round < 50; ++round) {
    // Tensors in the order of the data, entries in a random order, some of them empty.
    nlohmann::json header = {{"__metadata__", {{"made by", "a test"}}}};
    std::string data;
    const int count = int(random() % 6);
    for (int i = 0; i < count; ++i) {
      const int64_t rows = int64_t(random() % 5), columns = int64_t(random() % 7);
      const size_t begin = data.size();
      for (int64_t b = 0; b < rows * columns * 2; ++b) data += char(random());
      header["tensor" + std::to_string(random() % 1000) + "." + std::to_string(i)] = {
          {"dtype", "BF16"}, {"shape", {rows, columns}}, {"data_offsets", {begin, data.size()}}};
    }
    const std::string padding(random() % 8, ' ');
    const SafetensorsFile file(temporary.write(with_length(header.dump() + padding) + data));
    REQUIRE(file.tensors().size() == size_t(count));
    CHECK(file.metadata().at("made by") == "a test");
    for (const auto &[name, tensor] : file.tensors()) {
      const auto &entry = header.at(name);
      CHECK(tensor.shape == entry.at("shape").get<std::vector<int64_t>>());
      CHECK(tqkv_cli::element_type(tensor) == TQ_TYPE_BF16);
      const size_t begin = entry.at("data_offsets")[0], end = entry.at("data_offsets")[1];
      REQUIRE(tensor.size_bytes == int64_t(end - begin));
      const int64_t first = tensor.size_bytes ? int64_t(random() % uint64_t(tensor.size_bytes)) : 0;
      std::string read(size_t(tensor.size_bytes - first), '?');
      file.read(tensor, first, tensor.size_bytes - first, read.data());
      CHECK(read == data.substr(begin + size_t(first), end - begin - size_t(first)));
    }
    CHECK(file.find("absent") == nullptr);
  }
}

TEST_CASE("safetensors: a damaged file is refused by name or read within its bounds", "[cli]") {
  std::mt19937_64 random(tqkv_test::seed());
  const std::string good =
      with_length(R"({"__metadata__":{"a":"b"},"x.k":{"dtype":"F16","shape":[2,1,16],"data_offsets":[0,64]},)"
                  R"("x.v":{"dtype":"F16","shape":[2,1,16],"data_offsets":[64,128]}})") +
      std::string(128, 'd');
  TemporaryFile temporary;
  int refused = 0;
  constexpr int kRounds = 3000;
  const std::string alphabet = "{}[]\",:0123456789-.eE \\u\n";
  for (int round = 0; round < kRounds; ++round) {
    std::string bytes = good;
    for (uint64_t edits = 1 + random() % 3; edits > 0; --edits) {
      const size_t at = random() % bytes.size();
      switch (random() % 4) {
        case 0:
          bytes[at] = char(random());
          break;
        case 1:
          bytes[at] = alphabet[random() % alphabet.size()];
          break;
        case 2:
          bytes.erase(at, 1 + random() % 20);
          break;
        case 3:
          bytes.insert(at, 1, alphabet[random() % alphabet.size()]);
          break;
      }
      if (bytes.empty()) bytes = "x";
    }
    const std::string &path = temporary.write(bytes);
    try {
      const SafetensorsFile file(path);
      int64_t total = 0;
      for (const auto &[name, tensor] : file.tensors()) {
        REQUIRE(tensor.offset_bytes + tensor.size_bytes <= int64_t(bytes.size()));
        std::string data(size_t(tensor.size_bytes), '?');
        file.read(tensor, 0, tensor.size_bytes, data.data());
        CHECK(data == bytes.substr(size_t(tensor.offset_bytes), size_t(tensor.size_bytes)));
        total += tensor.size_bytes;
      }
      CHECK(total <= int64_t(bytes.size()) - 8);
    } catch (const Error &e) {
      ++refused;
      const std::string sentence = e.what();
      CHECK(sentence.find(path + ": ") == 0);
      CHECK(std::none_of(sentence.begin(), sentence.end(), [](char c) { return c >= 0 && c < 0x20; }));
    }
  }
  CHECK(refused > kRounds / 2);
}

TEST_CASE("safetensors: a file cut anywhere is refused", "[cli]") {
  const std::string good =
      with_length(R"({"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})") + std::string(16, 'd');
  TemporaryFile temporary;
  CHECK_NOTHROW(SafetensorsFile(temporary.write(good)));
  for (size_t size = 0; size < good.size(); ++size) {
    CAPTURE(size);
    CHECK_THROWS_AS(SafetensorsFile(temporary.write(good.substr(0, size))), Error);
  }
}
