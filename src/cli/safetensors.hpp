// SPDX-License-Identifier: Apache-2.0
// A safetensors file read piece by piece: the header is checked whole before anything is believed or allocated.
#pragma once

#include <tqkv/tqkv.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace tqkv_cli {

struct Tensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  int64_t element_bytes = 0;
  int64_t offset_bytes = 0;  // from the start of the file
  int64_t size_bytes = 0;
};

class SafetensorsFile {
 public:
  // Throws Error, naming the file, the tensor and the field, for anything the format does not allow: also unknown
  // fields and types, overlapping tensors and bytes that no tensor owns.
  explicit SafetensorsFile(std::string path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile &&other) noexcept;
  SafetensorsFile &operator=(SafetensorsFile &&) = delete;

  const std::string &path() const { return path_; }
  const std::map<std::string, Tensor> &tensors() const { return tensors_; }
  const std::map<std::string, std::string> &metadata() const { return metadata_; }
  const Tensor *find(const std::string &name) const;  // NULL if absent

  // Bytes [first, first + count) of a tensor.
  void read(const Tensor &tensor, int64_t first_byte, int64_t count_bytes, void *destination) const;

  // "PATH: tensor 'NAME'", the beginning of every sentence about a tensor.
  std::string where(const Tensor &tensor) const;

 private:
  void parse_header(const std::string &text, int64_t data_offset, int64_t data_bytes);

  std::string path_;
  int file_ = -1;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

// TQ_TYPE_* of a tensor's dtype, or 0 for what caches do not hold.
int32_t element_type(const Tensor &tensor);

}  // namespace tqkv_cli
