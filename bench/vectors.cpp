// SPDX-License-Identifier: Apache-2.0
// encode/BITS/TARGET and decode/BITS/TARGET: vectors of 128 in bf16.
#include "bench.hpp"

namespace tqkv_bench {
namespace {

constexpr int64_t kVectors = 1 << 19;
constexpr int64_t kRawBytes = kVectors * kHeadDim * 2;

void run(benchmark::State &state, int32_t bits, int32_t simd, bool decoding) {
  const Codec codec = make_codec(bits, bits, simd);
  auto info = sized<tq_codec_info>();
  check(tq_info(codec.get(), &info));
  const int64_t coded_bytes = kVectors * (info.k.code_bytes + info.k.scale_bytes);
  const std::vector<uint16_t> input = random_bf16(size_t(kVectors * kHeadDim));
  const Memory codes = allocate(size_t(kVectors * info.k.code_bytes));
  const Memory scales = allocate(size_t(kVectors * info.k.scale_bytes));

  auto encode = sized<tq_encode_args>();
  encode.side = TQ_SIDE_K;
  encode.count = kVectors;
  encode.input = input.data();
  encode.input_type = TQ_TYPE_BF16;
  encode.codes = codes.get();
  encode.scales = scales.get();
  check(tq_encode(codec.get(), &encode));
  if (!decoding) {
    for (auto _ : state) check(tq_encode(codec.get(), &encode));
  } else {
    const Memory output = allocate(size_t(kRawBytes));
    auto decode = sized<tq_decode_args>();
    decode.side = TQ_SIDE_K;
    decode.count = kVectors;
    decode.codes = codes.get();
    decode.scales = scales.get();
    decode.output = output.get();
    decode.output_type = TQ_TYPE_BF16;
    for (auto _ : state) check(tq_decode(codec.get(), &decode));
  }
  set_rates(state, kRawBytes + coded_bytes, "vectors", kVectors);
}

}  // namespace

void register_vectors() {
  for (const bool decoding : {false, true}) {
    for (const int32_t bits : {2, 3, 4, 8}) {
      register_per_target((decoding ? "decode/" : "encode/") + std::to_string(bits),
                          [=](benchmark::State &state, int32_t simd) { run(state, bits, simd, decoding); });
    }
  }
}

}  // namespace tqkv_bench
