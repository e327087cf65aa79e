// SPDX-License-Identifier: Apache-2.0
#include "safetensors.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "common.hpp"

namespace tqkv_cli {
namespace {

// Real headers take about 100 bytes a tensor.
constexpr uint64_t kMaxHeaderBytes = 16 << 20;
constexpr size_t kMaxRank = 32;

constexpr struct {
  const char *name;
  int64_t bytes;
} kDtypes[] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
               {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"F32", 4},     {"I64", 8},     {"U64", 8}, {"F64", 8}};

int64_t dtype_bytes(const std::string &name) {
  for (const auto &dtype : kDtypes) {
    if (name == dtype.name) return dtype.bytes;
  }
  return 0;
}

struct Entry {
  std::string name;
  std::optional<std::string> dtype;
  std::optional<std::vector<uint64_t>> shape;
  std::optional<std::vector<uint64_t>> data_offsets;
};

// Accepts {"name": {"dtype": "F32", "shape": [..], "data_offsets": [a, b]}, "__metadata__": {"key": "text"}} and
// nothing else. As a SAX handler it stops at the first surprise, so that no hostile document is ever built in memory.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;
  std::string error;

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(number_integer_t) override { return unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t &) override {
    return unexpected("a number that is no 64-bit integer");
  }
  bool binary(binary_t &) override { return unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (!list_) return unexpected("a number");
    if (list_->size() == (key_ == "shape" ? kMaxRank : 2)) return refuse("has too many entries");
    list_->push_back(value);
    return true;
  }

  bool string(string_t &value) override {
    if (depth_ == 2 && in_metadata_) return add_metadata(value);
    if (depth_ != 2 || key_ != "dtype") return unexpected("a string");
    entries.back().dtype = value;
    return true;
  }

  bool start_object(size_t) override {
    if (list_ || depth_ == 2) return unexpected("an object");
    ++depth_;
    return true;
  }

  bool end_object() override {
    --depth_;
    return true;
  }

  bool start_array(size_t) override {
    if (list_ || depth_ != 2 || in_metadata_ || key_ == "dtype") return unexpected("an array");
    auto &list = key_ == "shape" ? entries.back().shape : entries.back().data_offsets;
    list_ = &list.emplace();
    return true;
  }

  bool end_array() override {
    list_ = nullptr;
    return true;
  }

  bool key(string_t &name) override {
    if (depth_ == 1) {
      in_metadata_ = name == "__metadata__";
      key_.clear();
      if (!in_metadata_) entries.push_back({name, {}, {}, {}});
      return true;
    }
    key_ = name;
    if (in_metadata_) return true;
    const Entry &entry = entries.back();
    if ((key_ == "dtype" && entry.dtype) || (key_ == "shape" && entry.shape) ||
        (key_ == "data_offsets" && entry.data_offsets)) {
      return refuse("is given twice");
    }
    if (key_ != "dtype" && key_ != "shape" && key_ != "data_offsets") return refuse("is not known");
    return true;
  }

  bool parse_error(size_t position, const std::string &, const nlohmann::json::exception &) override {
    error = "the header is not valid JSON at byte " + std::to_string(position);
    return false;
  }

 private:
  bool add_metadata(const string_t &value) {
    if (metadata.emplace(key_, value).second) return true;
    return refuse("is given twice");
  }

  bool refuse(const std::string &what) {
    error = in_metadata_ ? "__metadata__" : "tensor " + in_quotes(entries.back().name);
    error += key_.empty() ? " " + what : ": field " + in_quotes(key_) + " " + what;
    return false;
  }

  bool unexpected(const std::string &what) {
    if (depth_ == 0) {
      error = "the header is not a JSON object but " + what;
      return false;
    }
    if (list_) return refuse("holds " + what + ", not only integers from 0 to 2^64 - 1");
    if (depth_ == 1) return refuse("is " + what + ", not an object");
    return refuse("is " + what + (in_metadata_ || key_ == "dtype" ? ", not a string" : ", not an array"));
  }

  int depth_ = 0;  // of objects
  bool in_metadata_ = false;
  std::string key_;
  std::vector<uint64_t> *list_ = nullptr;
};

}  // namespace

SafetensorsFile::SafetensorsFile(std::string path) : path_(std::move(path)) {
  const auto refuse = [&](const std::string &what) { throw Error(path_ + ": " + what); };
  file_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file_ < 0) refuse(std::strerror(errno));
  try {
    struct stat status;
    if (::fstat(file_, &status) != 0) refuse(std::strerror(errno));
    if (!S_ISREG(status.st_mode)) refuse("is not a regular file");
    const uint64_t file_bytes = uint64_t(status.st_size);
    if (file_bytes < 8) refuse("is too short for a safetensors header (" + std::to_string(file_bytes) + " bytes)");

    unsigned char prefix[8];
    Tensor whole;
    whole.size_bytes = int64_t(file_bytes);
    read(whole, 0, 8, prefix);
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | prefix[i];
    if (header_bytes > file_bytes - 8) {
      refuse("the header's size is given as " + std::to_string(header_bytes) + " bytes, but the file has " +
             std::to_string(file_bytes));
    }
    if (header_bytes > kMaxHeaderBytes) {
      refuse("the header's size is given as " + std::to_string(header_bytes) + " bytes; at most " +
             std::to_string(kMaxHeaderBytes) + " are read");
    }
    std::string header(header_bytes, '\0');
    read(whole, 8, int64_t(header_bytes), header.data());
    parse_header(header, int64_t(8 + header_bytes), int64_t(file_bytes - 8 - header_bytes));
  } catch (...) {
    ::close(file_);
    throw;
  }
}

SafetensorsFile::~SafetensorsFile() {
  if (file_ >= 0) ::close(file_);
}

SafetensorsFile::SafetensorsFile(SafetensorsFile &&other) noexcept
    : path_(std::move(other.path_)),
      file_(std::exchange(other.file_, -1)),
      tensors_(std::move(other.tensors_)),
      metadata_(std::move(other.metadata_)) {}

void SafetensorsFile::parse_header(const std::string &text, int64_t data_offset, int64_t data_bytes) {
  HeaderReader reader;
  if (!nlohmann::json::sax_parse(text, &reader)) throw Error(path_ + ": " + reader.error);
  metadata_ = std::move(reader.metadata);

  for (Entry &entry : reader.entries) {
    const auto refuse = [&](const std::string &field, const std::string &what) {
      throw Error(path_ + ": tensor " + in_quotes(entry.name) + ": field '" + field + "' " + what);
    };
    if (!entry.dtype) refuse("dtype", "is missing");
    if (!entry.shape) refuse("shape", "is missing");
    if (!entry.data_offsets) refuse("data_offsets", "is missing");
    Tensor tensor;
    tensor.name = entry.name;
    tensor.dtype = *entry.dtype;
    tensor.element_bytes = dtype_bytes(tensor.dtype);
    if (tensor.element_bytes == 0) refuse("dtype", "is " + in_quotes(tensor.dtype) + ", which is not known");

    int64_t size = tensor.element_bytes;
    for (const uint64_t extent : *entry.shape) {
      if (extent > uint64_t(INT64_MAX) || __builtin_mul_overflow(size, int64_t(extent), &size)) {
        refuse("shape", "has a product that does not fit in 63 bits");
      }
      tensor.shape.push_back(int64_t(extent));
    }
    const auto &offsets = *entry.data_offsets;
    if (offsets.size() != 2) refuse("data_offsets", "must have 2 entries");
    if (offsets[0] > offsets[1]) refuse("data_offsets", "ends before it begins");
    if (offsets[1] > uint64_t(data_bytes)) {
      refuse("data_offsets", "ends at byte " + std::to_string(offsets[1]) + " of the data, but the file holds " +
                                 std::to_string(data_bytes) + " (is it truncated?)");
    }
    if (offsets[1] - offsets[0] != uint64_t(size)) {
      refuse("data_offsets", "spans " + std::to_string(offsets[1] - offsets[0]) + " bytes, but dtype and shape take " +
                                 std::to_string(size));
    }
    tensor.offset_bytes = data_offset + int64_t(offsets[0]);
    tensor.size_bytes = size;
    if (!tensors_.emplace(entry.name, std::move(tensor)).second) {
      throw Error(path_ + ": tensor " + in_quotes(entry.name) + " is given twice");
    }
  }

  std::vector<const Tensor *> in_order;
  for (const auto &[name, tensor] : tensors_) in_order.push_back(&tensor);
  std::sort(in_order.begin(), in_order.end(), [](const Tensor *a, const Tensor *b) {
    return std::pair(a->offset_bytes, a->size_bytes) < std::pair(b->offset_bytes, b->size_bytes);
  });
  int64_t end = data_offset;
  for (const Tensor *tensor : in_order) {
    if (tensor->offset_bytes != end) {
      throw Error(
          where(*tensor) + ": field 'data_offsets' " +
          (tensor->offset_bytes < end ? "overlaps the tensor before it" : "leaves a hole after the tensor before it"));
    }
    end += tensor->size_bytes;
  }
  if (end != data_offset + data_bytes) {
    throw Error(path_ + ": the last " + std::to_string(data_offset + data_bytes - end) + " bytes belong to no tensor");
  }
}

const Tensor *SafetensorsFile::find(const std::string &name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

void SafetensorsFile::read(const Tensor &tensor, int64_t first_byte, int64_t count_bytes, void *destination) const {
  char *out = static_cast<char *>(destination);
  while (count_bytes > 0) {
    const ssize_t got = ::pread(file_, out, size_t(count_bytes), tensor.offset_bytes + first_byte);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw Error(path_ + ": " + std::strerror(errno));
    if (got == 0) throw Error(path_ + ": ended while it was read");
    out += got;
    first_byte += got;
    count_bytes -= got;
  }
}

std::string SafetensorsFile::where(const Tensor &tensor) const {
  return path_ + ": tensor " + in_quotes(tensor.name);
}

int32_t element_type(const Tensor &tensor) {
  if (tensor.dtype == "F32") return TQ_TYPE_F32;
  if (tensor.dtype == "F16") return TQ_TYPE_F16;
  if (tensor.dtype == "BF16") return TQ_TYPE_BF16;
  return 0;
}

}  // namespace tqkv_cli
