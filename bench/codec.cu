// SPDX-License-Identifier: Apache-2.0
// tqkv-bench codec: encode, decode, store and load on a CUDA device against the memory ceilings measured in the same
// run. Every operation is a CUDA graph of launches over rotating data far larger than L2; times are medians of replays.
#include <cuda_runtime.h>
#include <tqkv/tqkv.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "codec_bench.hpp"

namespace {

void expect(cudaError_t error, const char *what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

void expect(tq_status status) {
  if (status == TQ_OK) return;
  std::fprintf(stderr, "%s\n", tq_last_error());
  std::exit(1);
}

struct Buffer {
  uint8_t *data = nullptr;
  explicit Buffer(size_t bytes) { expect(cudaMalloc(&data, std::max<size_t>(bytes, 256)), "allocating"); }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
};

// bf16 normals by a hash of the index, so that no value repeats.
__global__ void fill_kernel(uint16_t *data, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t z = uint64_t(i) * 0x9e3779b97f4a7c15ull + 1;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    const float u = (uint32_t(z) + 0.5f) * 0x1p-32f, v = uint32_t(z >> 32) * 0x1p-32f;
    data[i] = uint16_t(__float_as_uint(sqrtf(-2 * logf(u)) * cosf(6.2831853f * v)) >> 16);
  }
}

// Reads read_chunks and writes write_chunks of 16 bytes for each group of vectors, and does nothing else.
__global__ void __launch_bounds__(256)
    stripped_kernel(const uint4 *from, uint4 *to, int64_t groups, int read_chunks, int write_chunks) {
  const int lane = threadIdx.x % 32;
  for (int64_t group = int64_t{blockIdx.x} * 8 + threadIdx.x / 32; group < groups; group += int64_t{gridDim.x} * 8) {
    uint4 sum = make_uint4(1, 2, 3, 4);
    const uint4 *source = from + group * read_chunks;
    for (int first = lane; first < read_chunks; first += 32 * 8) {
      uint4 v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = first + 32 * i < read_chunks ? __ldcs(source + first + 32 * i) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sum.x ^= v[i].x, sum.y ^= v[i].y, sum.z ^= v[i].z, sum.w ^= v[i].w;
    }
    uint4 *target = to + group * write_chunks;
    for (int i = lane; i < write_chunks; i += 32) target[i] = sum;
    if (write_chunks == 0 && sum.x == 0x12345678 && sum.y == 0x87654321) to[0] = sum;
  }
}

// Median seconds of one `launch(i, stream)`; i counts launches.
double seconds(const std::function<void(int, cudaStream_t)> &launch, int launches = 8, int replays = 15) {
  cudaStream_t stream;
  expect(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "a capture");
  for (int i = 0; i < launches; ++i) launch(i, stream);
  expect(cudaStreamEndCapture(stream, &graph), "a capture");
  expect(cudaGraphInstantiate(&executable, graph, 0), "a graph");
  cudaEvent_t begin, end;
  expect(cudaEventCreate(&begin), "an event");
  expect(cudaEventCreate(&end), "an event");
  std::vector<double> times;
  for (int i = 0; i < replays + 2; ++i) {
    expect(cudaEventRecord(begin, stream), "an event");
    expect(cudaGraphLaunch(executable, stream), "a graph");
    expect(cudaEventRecord(end, stream), "an event");
    expect(cudaStreamSynchronize(stream), "a graph");
    float milliseconds = 0;
    expect(cudaEventElapsedTime(&milliseconds, begin, end), "an event");
    if (i >= 2) times.push_back(double(milliseconds) * 1e-3 / launches);
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  std::nth_element(times.begin(), times.begin() + std::ptrdiff_t(times.size() / 2), times.end());
  return times[times.size() / 2];
}

std::vector<std::string> rows;

void report(const char *operation, int head_dim, int bits, int64_t vectors, double bytes, double time,
            double ceiling_time) {
  char line[512];
  std::snprintf(line, sizeof line,
                "{\"operation\": \"%s\", \"head_dim\": %d, \"bits\": %d, \"vectors\": %lld, \"bytes\": %.0f, "
                "\"microseconds\": %.3f, \"gigabytes_per_second\": %.1f, \"ceiling_microseconds\": %.3f, "
                "\"share\": %.4f}",
                operation, head_dim, bits, (long long)vectors, bytes, time * 1e6, bytes / time * 1e-9,
                ceiling_time * 1e6, ceiling_time / time);
  rows.push_back(line);
  std::printf("%-26s %4d %4d %9lld %10.2f us %8.1f GB/s  ceiling %10.2f us  share %5.1f%%\n", operation, head_dim, bits,
              (long long)vectors, time * 1e6, bytes / time * 1e-9, ceiling_time * 1e6, 100 * ceiling_time / time);
  std::fflush(stdout);
}

struct Bench {
  int multiprocessors = 0;
  int64_t elems = int64_t{1} << 29;  // bf16: 1 GiB
  Buffer input{size_t(elems) * 2}, output{size_t(elems) * 2}, scratch{size_t{640} << 20};

  // Best of several grids for reading and writing this many bytes a group.
  double ceiling(int64_t groups, int64_t read_bytes, int64_t write_bytes, bool reads_dense) {
    double best = 1e9;
    const uint8_t *from = reads_dense ? input.data : scratch.data;
    uint8_t *to = reads_dense ? scratch.data : output.data;
    for (int blocks : {2, 4, 6, 8}) {
      best = std::min(best, seconds(
                                [&](int, cudaStream_t stream) {
                                  stripped_kernel<<<multiprocessors * blocks, 256, 0, stream>>>(
                                      reinterpret_cast<const uint4 *>(from), reinterpret_cast<uint4 *>(to), groups,
                                      int(read_bytes / 16), int(write_bytes / 16));
                                },
                                4, 9));
    }
    return best;
  }

  void vectors_and_pages(int head_dim, int bits, int rotation, bool quick) {
    constexpr int kHeads = 8;
    const int64_t vectors = elems / 2 / head_dim;  // 512 MiB of bf16: two sets
    tq_config config{};
    expect(tq_config_init(&config, sizeof config, nullptr));
    config.device = TQ_DEVICE_CUDA;
    config.kv_heads = kHeads;
    config.k.head_dim = head_dim;
    config.k.bits = config.v.bits = bits;
    config.k.rotation = config.v.rotation = rotation;
    tq_codec *codec = nullptr;
    expect(tq_create(&config, &codec));
    tq_codec_info info{};
    info.struct_size = sizeof info;
    expect(tq_info(codec, &info));
    const int64_t code_bytes = info.k.code_bytes, record = code_bytes + 2;
    const int64_t stride = (code_bytes + 15) / 16 * 16;
    const double bytes = double(vectors) * double(2 * head_dim + record);
    const double up = ceiling(vectors / 16, 32 * head_dim, 16 * record, true);
    const double down = ceiling(vectors / 16, 16 * record, 32 * head_dim, false);
    size_t workspace_bytes = 0;
    expect(tq_vectors_workspace(codec, TQ_SIDE_K, vectors, &workspace_bytes));
    Buffer workspace(workspace_bytes);
    const int64_t set = vectors * stride + vectors * 2;
    const bool dense = rotation == TQ_ROTATION_DENSE;
    if (!quick || dense) {
      const double encode = seconds(
          [&](int i, cudaStream_t stream) {
            tq_encode_args args{};
            args.struct_size = sizeof args;
            args.side = TQ_SIDE_K;
            args.count = vectors;
            args.input = input.data + (i & 1) * (elems / 2) * 2;
            args.input_type = TQ_TYPE_BF16;
            args.codes = scratch.data + (i & 1) * set;
            args.codes_stride_bytes = stride;
            args.scales = scratch.data + (i & 1) * set + vectors * stride;
            args.workspace = workspace.data;
            args.workspace_bytes = workspace_bytes;
            args.stream = stream;
            expect(tq_encode(codec, &args));
          },
          dense ? 2 : 4, dense ? 5 : 15);
      report(dense ? "encode, dense" : "encode, Hadamard", head_dim, bits, vectors, bytes, encode, up);
      const double decode = seconds(
          [&](int i, cudaStream_t stream) {
            tq_decode_args args{};
            args.struct_size = sizeof args;
            args.side = TQ_SIDE_K;
            args.count = vectors;
            args.codes = scratch.data + (i & 1) * set;
            args.codes_stride_bytes = stride;
            args.scales = scratch.data + (i & 1) * set + vectors * stride;
            args.output = output.data + (i & 1) * (elems / 2) * 2;
            args.output_type = TQ_TYPE_BF16;
            args.workspace = workspace.data;
            args.workspace_bytes = workspace_bytes;
            args.stream = stream;
            expect(tq_decode(codec, &args));
          },
          dense ? 2 : 4, dense ? 5 : 15);
      report(dense ? "decode, dense" : "decode, Hadamard", head_dim, bits, vectors, bytes, decode, down);
    }
    if (!dense) {
      // K and V of half the vectors each.
      const int64_t tokens = vectors / 2 / kHeads;
      paged("", codec, info, head_dim, bits, tokens, tokens, up, down);
      if (head_dim == 128) {
        paged(", 64 tokens", codec, info, head_dim, bits, tokens, 64, 0, 0);
        paged(", 8192 tokens", codec, info, head_dim, bits, tokens, 8192, 0, 0);
      }
    }
    tq_destroy(codec);
  }

  // Store and load of calls of `call_tokens` tokens, out of `tokens`; ceilings of zero are measured at that size.
  void paged(const char *suffix, tq_codec *codec, const tq_codec_info &info, int head_dim, int bits, int64_t tokens,
             int64_t call_tokens, double up, double down) {
    constexpr int kHeads = 8;
    const int64_t vectors = 2 * call_tokens * kHeads, record = info.k.code_bytes + 2;
    if (up == 0) {
      up = ceiling(vectors / 16, 32 * head_dim, 16 * record, true);
      down = ceiling(vectors / 16, 16 * record, 32 * head_dim, false);
    }
    std::vector<int64_t> host(static_cast<size_t>(tokens));
    for (size_t i = 0; i < host.size(); ++i) host[i] = int64_t(i);
    if (call_tokens == 64) {  // a decode step: every token in a block of its own
      for (size_t i = 0; i < host.size(); ++i) host[i] = int64_t((i * 2654435761u) % host.size() / 16 * 16 + i % 16);
    }
    Buffer slots(host.size() * 8);
    expect(cudaMemcpy(slots.data, host.data(), host.size() * 8, cudaMemcpyHostToDevice), "slots");
    tq_layout layout{};
    layout.struct_size = sizeof layout;
    expect(tq_page_layout(codec, TQ_PAGES_CODED, &layout));
    const int64_t blocks = tokens / 16, calls = std::max<int64_t>(1, tokens / call_tokens);
    tq_pages pages{};
    pages.struct_size = sizeof pages;
    pages.num_blocks = blocks;
    pages.fingerprint = layout.fingerprint;
    pages.base = scratch.data;
    const int64_t row = int64_t{kHeads} * head_dim;
    const int launches = call_tokens == tokens ? 4 : int(std::min<int64_t>(calls, 100));
    const auto first = [&](int i) { return call_tokens == tokens ? 0 : int64_t(i) % calls * call_tokens; };
    const double store = seconds(
        [&](int i, cudaStream_t stream) {
          tq_store_args args{};
          args.struct_size = sizeof args;
          args.input_type = TQ_TYPE_BF16;
          args.num_tokens = call_tokens;
          const int64_t half = call_tokens == tokens ? (i & 1) * (elems / 2) * 2 : 0;
          args.k = input.data + half + first(i) * row * 2;
          args.v = input.data + half + elems / 2 + first(i) * row * 2;
          args.pages = &pages;
          args.slots = reinterpret_cast<int64_t *>(slots.data) + first(i);
          args.stream = stream;
          expect(tq_cache_store(codec, &args));
        },
        launches);
    const double bytes = double(vectors) * double(2 * head_dim + record);
    report((std::string("store") + suffix).c_str(), head_dim, bits, vectors, bytes, store, up);
    const double load = seconds(
        [&](int i, cudaStream_t stream) {
          tq_load_args args{};
          args.struct_size = sizeof args;
          args.output_type = TQ_TYPE_BF16;
          args.num_tokens = call_tokens;
          const int64_t half = call_tokens == tokens ? (i & 1) * (elems / 2) * 2 : 0;
          args.k = output.data + half + first(i) * row * 2;
          args.v = output.data + half + elems / 2 + first(i) * row * 2;
          args.pages = &pages;
          args.slots = reinterpret_cast<int64_t *>(slots.data) + first(i);
          args.stream = stream;
          expect(tq_cache_load(codec, &args));
        },
        launches);
    report((std::string("load") + suffix).c_str(), head_dim, bits, vectors, bytes, load, down);
  }
};

}  // namespace

int tqkv_bench::run_codec(const char *json_path, bool quick) {
  tq_device_info device{};
  device.struct_size = sizeof device;
  expect(tq_device_get_info(TQ_DEVICE_CUDA, 0, &device));
  Bench bench;
  bench.multiprocessors = device.processors;
  fill_kernel<<<4096, 256>>>(reinterpret_cast<uint16_t *>(bench.input.data), bench.elems);
  expect(cudaMemset(bench.scratch.data, 0x35, size_t{640} << 20), "filling");
  expect(cudaDeviceSynchronize(), "filling");
  const int64_t read_groups = bench.elems * 2 / 4096;
  const double read = bench.ceiling(read_groups, 4096, 0, true);
  std::printf("%s: plain reads %.1f GB/s\n", device.name, double(bench.elems) * 2 / read * 1e-9);
  for (int head_dim : {128, 64, 96, 256}) {
    for (int bits : {4, 3, 2}) bench.vectors_and_pages(head_dim, bits, TQ_ROTATION_HADAMARD, quick && head_dim != 128);
  }
  tq_config dense{};
  expect(tq_config_init(&dense, sizeof dense, nullptr));
  dense.device = TQ_DEVICE_CUDA;
  dense.k.head_dim = 128;
  dense.k.rotation = dense.v.rotation = TQ_ROTATION_DENSE;
  if (tq_supports(&dense) == TQ_OK) {
    bench.vectors_and_pages(128, 4, TQ_ROTATION_DENSE, quick);
  } else {
    std::printf("dense: %s\n", tq_last_error());
  }
  std::FILE *file = json_path != nullptr ? std::fopen(json_path, "w") : nullptr;
  if (json_path != nullptr && file == nullptr) {
    std::fprintf(stderr, "%s cannot be written\n", json_path);
    return 1;
  }
  if (file != nullptr) {
    std::fprintf(file,
                 "{\"device\": \"%s\", \"library\": %u, \"plain_read_gigabytes_per_second\": %.1f,\n \"results\": [\n",
                 device.name, tq_version(), double(bench.elems) * 2 / read * 1e-9);
    for (size_t i = 0; i < rows.size(); ++i)
      std::fprintf(file, "  %s%s\n", rows[i].c_str(), i + 1 < rows.size() ? "," : "");
    std::fprintf(file, "]}\n");
    std::fclose(file);
  }
  return 0;
}
