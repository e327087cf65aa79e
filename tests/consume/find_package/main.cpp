// SPDX-License-Identifier: Apache-2.0
// A C++17 program that found an installed copy with find_package: a vector there and back, a move, a refusal.
#include <tqkv/tqkv.hpp>

#include <cmath>
#include <cstdio>
#include <utility>
#include <vector>

int main() {
  tq_config config = tqkv::preset("k4v4");
  config.k.head_dim = 64;
  tqkv::Codec first(config);
  const tqkv::Codec codec = std::move(first);
  const tq_side_info side = codec.info().k;

  std::vector<float> input(64), output(64);
  for (int i = 0; i < 64; ++i) input[i] = std::sin(1.7f * static_cast<float>(i));
  std::vector<unsigned char> codes(side.code_bytes), scale(side.scale_bytes);
  tq_encode_args encode = {};
  encode.struct_size = sizeof encode;
  encode.count = 1;
  encode.input = input.data();
  encode.input_type = TQ_TYPE_F32;
  encode.codes = codes.data();
  encode.scales = scale.data();
  codec.encode(encode);
  tq_decode_args decode = {};
  decode.struct_size = sizeof decode;
  decode.count = 1;
  decode.codes = codes.data();
  decode.scales = scale.data();
  decode.output = output.data();
  decode.output_type = TQ_TYPE_F32;
  codec.decode(decode);
  double error = 0, norm = 0;
  for (int i = 0; i < 64; ++i) {
    error += std::pow(output[i] - input[i], 2);
    norm += std::pow(input[i], 2);
  }
  std::printf("relative squared error %.5f\n", error / norm);
  if (first.get() != nullptr || codes.size() != 32 || !(error < 0.03 * norm)) return 1;

  config.k.bits = 5;
  try {
    tqkv::Codec refused(config);
  } catch (const tqkv::Error &refusal) {
    std::printf("refused: %s\n", refusal.what());
    return refusal.status() == TQ_ERROR_INVALID_ARGUMENT && *refusal.what() ? 0 : 1;
  }
  return 1;
}
