// SPDX-License-Identifier: Apache-2.0
// Dense rotations on a GPU: as precise as the CPU's, and one codec for several threads and streams.
#include <atomic>
#include <thread>

#include "gpu.hpp"

namespace {

double squared_error(const Target &target, const tq_config &config, const std::vector<uint8_t> &input, int32_t type,
                     int64_t count) {
  const CodecPtr codec = make_codec(config);
  const std::vector<double> x = decode_elements(input.data(), type, count * config.k.head_dim);
  const std::vector<double> decoded =
      decode(target, codec.get(), TQ_SIDE_K, encode(target, codec.get(), TQ_SIDE_K, input, type), count);
  double error = 0;
  for (size_t i = 0; i < x.size(); ++i) error += (x[i] - decoded[i]) * (x[i] - decoded[i]);
  return error;
}

}  // namespace

TEST_CASE("dense and custom rotations on a GPU have the CPU's squared error to 0.1%", "[gpu]") {
  FRESH(random, "gpu dense");
  Device *device = gpu_or_skip();
  if (device == nullptr) return;
  const Target target = gpu_target(device);
  CpuDevice cpu;
  const Target reference{&cpu, 0, "cpu"};
  for (const int head_dim : {64, 80, 128, 576}) {
    const std::vector<float> matrix = random_orthogonal(random, head_dim);
    const int64_t count = 1'000'000 / head_dim;
    for (const int32_t type : {TQ_TYPE_F32, TQ_TYPE_BF16}) {
      const std::vector<uint8_t> input = encode_elements(normals(random, count * head_dim), type);
      for (const int bits : {4, 3, 2}) {
        for (const int32_t rotation : {TQ_ROTATION_DENSE, TQ_ROTATION_CUSTOM}) {
          const auto config_of = [&](const Target &on) {
            tq_config config = make_config(on, head_dim, bits, bits);
            config.k.rotation = config.v.rotation = rotation;
            if (rotation == TQ_ROTATION_CUSTOM) config.k.matrix = config.v.matrix = matrix.data();
            config.seed = random.seed();
            return config;
          };
          const double want = squared_error(reference, config_of(reference), input, type, count);
          const double got = squared_error(target, config_of(target), input, type, count);
          INFO(describe(config_of(target)) << " type " << type << " want " << want << " got " << got);
          CHECK(std::fabs(got / want - 1) <= 1e-3);
          // And it is a quantisation error at all: of standard normals, by bits.
          const double each = got / double(count * head_dim);
          CHECK(each > (bits == 4 ? 0.004 : bits == 3 ? 0.016 : 0.06));
          CHECK(each < (bits == 4 ? 0.011 : bits == 3 ? 0.038 : 0.13));
        }
      }
    }
  }
}

TEST_CASE("the last vectors of many that a dense rotation takes in parts are encoded like the first", "[gpu]") {
  FRESH(random, "gpu dense parts");
  Device *device = gpu_or_skip();
  if (device == nullptr) return;
  const Target target = gpu_target(device);
  constexpr int kHeadDim = 64;
  constexpr int64_t kPart = 1000, kCount = 270 * kPart;  // more than the library multiplies at a time
  tq_config config = make_config(target, kHeadDim, 4, 4);
  config.k.rotation = TQ_ROTATION_DENSE;
  const CodecPtr codec = make_codec(config);
  const std::vector<uint8_t> part = encode_elements(normals(random, kPart * kHeadDim), TQ_TYPE_BF16);
  std::vector<uint8_t> input;
  for (int64_t i = 0; i < kCount; i += kPart) input.insert(input.end(), part.begin(), part.end());
  const std::vector<double> decoded =
      decode(target, codec.get(), TQ_SIDE_K, encode(target, codec.get(), TQ_SIDE_K, input, TQ_TYPE_BF16), kCount);
  const std::vector<double> x = decode_elements(part.data(), TQ_TYPE_BF16, kPart * kHeadDim);
  for (const int64_t at : {int64_t{0}, kCount - kPart}) {
    double error = 0, all = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double off = decoded[size_t(at) * kHeadDim + i] - x[i];
      error += off * off;
      all += x[i] * x[i];
    }
    INFO("vectors from " << at << ": " << error / all);
    CHECK(error / all > 0.008);
    CHECK(error / all < 0.0105);
  }
}

TEST_CASE("one codec's dense rotation serves several threads and streams at once", "[gpu]") {
  FRESH(random, "gpu dense threads");
  Device *device = gpu_or_skip();
  if (device == nullptr) return;
  constexpr int kThreads = 4, kRepeats = 8, kHeadDim = 128;
  constexpr int64_t kCount = 40'000;  // more than the library multiplies at a time
  tq_config config = make_config(gpu_target(device), kHeadDim, 4, 4);
  config.k.rotation = TQ_ROTATION_DENSE;
  config.seed = random.bits();
  const CodecPtr codec = make_codec(config);
  const tq_side_info side = info_of(codec.get()).k;
  const size_t code_bytes = size_t(kCount * side.code_bytes), scale_bytes = size_t(kCount * side.scale_bytes),
               output_bytes = size_t(kCount * kHeadDim * 2);
  size_t workspace_bytes = 0;
  REQUIRE(tq_vectors_workspace(codec.get(), TQ_SIDE_K, kCount, &workspace_bytes) == TQ_OK);

  // What a thread has for itself; its repeats do not share results either.
  struct Lane {
    void *stream;
    Memory input, workspace, codes, scales, outputs;
  };
  std::vector<std::unique_ptr<Lane>> lanes;
  for (int i = 0; i < kThreads; ++i) {
    lanes.push_back(std::unique_ptr<Lane>(new Lane{cuda_new_stream(),
                                                   {*device, size_t(kCount * kHeadDim * 4)},
                                                   {*device, workspace_bytes},
                                                   {*device, kRepeats * code_bytes},
                                                   {*device, kRepeats * scale_bytes},
                                                   {*device, kRepeats * output_bytes}}));
    const std::vector<uint8_t> input = encode_elements(normals(random, kCount * kHeadDim), TQ_TYPE_F32);
    lanes.back()->input.upload(input.data(), input.size());
  }
  // Uploads may be under way when they return, and these streams do not wait for them; downloads wait for everything.
  const auto settle = [&](const Lane &lane) {
    uint8_t byte = 0;
    lane.input.download(&byte, 1);
  };
  // Encodes and decodes, without waiting for the device.
  const auto enqueue = [&](const Lane &lane, int repeat) {
    tq_encode_args args = {};
    args.struct_size = sizeof args;
    args.side = TQ_SIDE_K;
    args.count = kCount;
    args.input = lane.input.data();
    args.input_type = TQ_TYPE_F32;
    args.codes = lane.codes.data() + size_t(repeat) * code_bytes;
    args.scales = lane.scales.data() + size_t(repeat) * scale_bytes;
    args.workspace = lane.workspace.data();
    args.workspace_bytes = workspace_bytes;
    args.stream = lane.stream;
    tq_decode_args back = {};
    back.struct_size = sizeof back;
    back.side = TQ_SIDE_K;
    back.count = kCount;
    back.codes = args.codes;
    back.scales = args.scales;
    back.output = lane.outputs.data() + size_t(repeat) * output_bytes;
    back.output_type = TQ_TYPE_BF16;
    back.workspace = args.workspace;
    back.workspace_bytes = workspace_bytes;
    back.stream = lane.stream;
    return tq_encode(codec.get(), &args) == TQ_OK && tq_decode(codec.get(), &back) == TQ_OK;
  };
  struct Results {
    std::vector<uint8_t> codes, scales, output;
    bool operator==(const Results &) const = default;
  };
  const auto results = [&](const Lane &lane, int repeat) {
    Results found{std::vector<uint8_t>(code_bytes), std::vector<uint8_t>(scale_bytes),
                  std::vector<uint8_t>(output_bytes)};
    lane.codes.download(found.codes.data(), code_bytes, size_t(repeat) * code_bytes);
    lane.scales.download(found.scales.data(), scale_bytes, size_t(repeat) * scale_bytes);
    lane.outputs.download(found.output.data(), output_bytes, size_t(repeat) * output_bytes);
    return found;
  };

  std::vector<Results> alone;
  for (const auto &lane : lanes) {
    settle(*lane);
    REQUIRE(enqueue(*lane, 0));
    alone.push_back(results(*lane, 0));
    const std::vector<uint8_t> poison(kRepeats * output_bytes, 0xff);
    lane->codes.upload(poison.data(), kRepeats * code_bytes);
    lane->scales.upload(poison.data(), kRepeats * scale_bytes);
    lane->outputs.upload(poison.data(), kRepeats * output_bytes);
    settle(*lane);
  }
  CHECK(!(alone[0] == alone[1]));
  std::atomic<int> refused{0}, waiting{kThreads};
  std::vector<std::thread> threads;
  for (const auto &lane : lanes) {
    threads.emplace_back([&] {
      for (--waiting; waiting > 0;) std::this_thread::yield();  // all at once
      for (int repeat = 0; repeat < kRepeats; ++repeat) refused += !enqueue(*lane, repeat);
    });
  }
  for (std::thread &thread : threads) thread.join();
  CHECK(refused == 0);
  for (int i = 0; i < kThreads; ++i) {
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      INFO("thread " << i << " repeat " << repeat);
      CHECK(results(*lanes[size_t(i)], repeat) == alone[size_t(i)]);
    }
  }
}
