// SPDX-License-Identifier: Apache-2.0
// Keys, values and queries of a model for tqkv-bench attention.
#include <algorithm>
#include <stdexcept>

#include "attention_bench.hpp"
#include "cli/safetensors.hpp"

namespace tqkv_bench {
namespace {

using tqkv_cli::SafetensorsFile;
using tqkv_cli::Tensor;

const Tensor &find(const SafetensorsFile &file, const std::string &name) {
  const Tensor *tensor = file.find(name);
  if (tensor == nullptr) throw std::runtime_error(file.path() + ": no tensor '" + name + "'");
  if (tensor->dtype != "BF16" || tensor->shape.size() != 3 || tensor->shape[2] != kModelHeadDim ||
      tensor->size_bytes == 0) {
    throw std::runtime_error(file.where(*tensor) + ": must be BF16 of shape [tokens, heads, " +
                             std::to_string(kModelHeadDim) + "]");
  }
  return *tensor;
}

// Rows of heads [first, first + the tensor's) of `all`, which has `heads`.
void read(const SafetensorsFile &file, const Tensor &tensor, int64_t first, int64_t heads, std::vector<uint16_t> *all) {
  std::vector<uint16_t> own(size_t(tensor.size_bytes) / 2);
  file.read(tensor, 0, tensor.size_bytes, own.data());
  const int64_t count = tensor.shape[1] * kModelHeadDim;
  all->resize(size_t(tensor.shape[0] * heads * kModelHeadDim));
  for (int64_t t = 0; t < tensor.shape[0]; ++t) {
    std::copy_n(own.begin() + t * count, count, all->begin() + (t * heads + first) * kModelHeadDim);
  }
}

}  // namespace

ModelTensors read_model_tensors(const std::string &path) {
  const SafetensorsFile file(path);
  struct Layer {
    const Tensor *k, *v, *q;
  };
  std::vector<Layer> layers;
  ModelTensors all;
  for (const auto &[name, tensor] : file.tensors()) {
    if (name.size() < 2 || name.compare(name.size() - 2, 2, ".k") != 0) continue;
    const std::string layer = name.substr(0, name.size() - 1);
    layers.push_back({&find(file, name), &find(file, layer + "v"), &find(file, layer + "q")});
    const auto &k = layers.back().k->shape, &q = layers.back().q->shape, &first = layers[0].q->shape;
    if (layers.back().v->shape != k || q[1] % k[1] != 0 || k[0] != layers[0].k->shape[0] || q[0] != first[0] ||
        q[1] / k[1] != first[1] / layers[0].k->shape[1]) {
      throw std::runtime_error(file.where(*layers.back().k) +
                               ": the shapes of k, v and q do not fit, or not those of '" + layers[0].k->name + "'");
    }
    all.tokens = k[0], all.positions = q[0], all.group = int(q[1] / k[1]);
    all.kv_heads += int(k[1]);
  }
  if (layers.empty()) throw std::runtime_error(path + ": no tensor whose name ends in '.k'");
  int64_t first = 0;
  for (const Layer &layer : layers) {
    read(file, *layer.k, first, all.kv_heads, &all.k);
    read(file, *layer.v, first, all.kv_heads, &all.v);
    read(file, *layer.q, first * all.group, int64_t{all.kv_heads} * all.group, &all.q);
    first += layer.k->shape[1];
  }
  return all;
}

}  // namespace tqkv_bench
