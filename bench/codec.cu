// SPDX-License-Identifier: Apache-2.0
// Encode, decode, store and load on a CUDA device against the memory ceilings measured in the same run. Every operation
// is a CUDA graph of calls over rotating data far larger than the L2 cache.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "codec_bench.hpp"
#include "gpu.cuh"

namespace tqkv_bench {
namespace {

constexpr int kHeads = 8, kTile = 16;
constexpr int kDecodeStep = 64, kPrefillChunk = 8192;  // tokens
constexpr int64_t kElements = int64_t{1} << 29;        // bf16: 1 GiB in, 1 GiB out
constexpr size_t kScratchBytes = size_t{640} << 20;    // codes and pages

class Bench {
 public:
  Bench(const CodecOptions &options, const CodecSink &sink) : options_(options), sink_(sink), gpu_(options.quick) {
    fill_normals(input_.data, kElements);
    expect(cudaMemset(scratch_.data, 0x35, kScratchBytes), "filling the scratch memory");
    expect(cudaDeviceSynchronize(), "filling the input");
  }

  void run() {
    gpu_.measure(input_, kElements * 2, scratch_);
    sink_.machine(gpu_.machine());
    for (int head_dim : options_.head_dims) {
      for (int bits : {4, 3, 2}) measure(head_dim, bits, TQ_ROTATION_HADAMARD);
      if (head_dim == 128) measure(head_dim, 4, TQ_ROTATION_DENSE);
    }
  }

 private:
  int replays() const { return options_.quick ? 5 : 31; }

  Ceiling ceiling(const Moves &moves, const Rotation &rotation) const {
    return gpu_.ceiling(moves, rotation, {16, 8, 4});
  }

  // Ceilings of encoding and decoding that many vectors.
  struct Ceilings {
    Ceiling up, down;
  };
  Ceilings ceilings(int64_t vectors, int head_dim, int64_t record, const Rotation &rotation) {
    const int32_t dense = kTile * 2 * head_dim, coded = int32_t(kTile * record);
    return {ceiling({input_.data, scratch_.data, vectors / kTile, dense, coded}, rotation),
            ceiling({scratch_.data, output_.data, vectors / kTile, coded, dense}, rotation)};
  }

  void measure(int head_dim, int bits, int rotation) {
    auto config = tq_config{};
    expect(tq_config_init(&config, sizeof config, nullptr));
    config.device = TQ_DEVICE_CUDA;
    config.kv_heads = kHeads;
    config.k.head_dim = head_dim;
    config.k.bits = config.v.bits = bits;
    config.k.rotation = config.v.rotation = rotation;
    const bool dense = rotation == TQ_ROTATION_DENSE;
    if (tq_supports(&config) != TQ_OK) {
      return sink_.refused("head_dim " + std::to_string(head_dim) + (dense ? ", dense: " : ": ") + tq_last_error());
    }
    tq_codec *made = nullptr;
    expect(tq_create(&config, &made));
    const Codec codec(made);
    auto info = sized<tq_codec_info>();
    expect(tq_info(codec.get(), &info));

    // Half of the input, whole tiles of all heads of K and of V; two such sets take turns.
    const int64_t vectors = kElements / 2 / head_dim / (2 * kTile * kHeads) * (2 * kTile * kHeads);
    const int64_t record = info.k.code_bytes + info.k.scale_bytes;
    const Rotation whole{2, 4};
    const Ceilings full = ceilings(vectors, head_dim, record, whole);
    flat(codec.get(), info, dense, vectors, full);
    if (dense) return;
    const int64_t tokens = vectors / 2 / kHeads;
    paged(codec.get(), info, "", tokens, tokens, full);
    if (head_dim != 128) return;
    for (const auto &[call_tokens, suffix] :
         {std::pair<int, const char *>{kDecodeStep, ", 64 tokens"}, {kPrefillChunk, ", 8192 tokens"}}) {
      const int64_t call_vectors = int64_t{2} * kHeads * call_tokens;
      paged(codec.get(), info, suffix, tokens, call_tokens,
            ceilings(call_vectors, head_dim, record, rotation_of(info, tokens, call_tokens)));
    }
  }

  // Calls of part of the tokens work on one part after the other, over as much as is cold again when they come back.
  static Rotation rotation_of(const tq_codec_info &info, int64_t tokens, int64_t call_tokens) {
    if (call_tokens == tokens) return {2, 4};
    const int64_t sets = tokens / call_tokens;
    const int64_t bytes = 2 * kHeads * call_tokens * (2 * info.k.head_dim + info.k.code_bytes + info.k.scale_bytes);
    return {sets, int(std::min(sets, std::max<int64_t>(16, kColdBytes / bytes)))};
  }

  void report(const std::string &operation, const tq_codec_info &info, int64_t vectors, const Timing &time,
              const Ceiling &ceiling) {
    const int64_t bytes = vectors * (2 * info.k.head_dim + info.k.code_bytes + info.k.scale_bytes);
    sink_.row({operation, info.k.head_dim, info.k.bits, vectors, bytes, time, ceiling});
  }

  void flat(const tq_codec *codec, const tq_codec_info &info, bool dense, int64_t vectors, const Ceilings &ceilings) {
    const int64_t stride = (info.k.code_bytes + 15) / 16 * 16;  // the fast path's
    const int64_t set_bytes = vectors * (stride + info.k.scale_bytes), dense_bytes = vectors * info.k.head_dim * 2;
    size_t workspace_bytes = 0;
    expect(tq_vectors_workspace(codec, TQ_SIDE_K, vectors, &workspace_bytes));
    const Buffer workspace(workspace_bytes);
    const int calls = dense ? 2 : 4;
    const char *suffix = dense ? ", dense" : ", Hadamard";
    const Timing encode = time_of(
        [&](int i, cudaStream_t stream) {
          auto args = sized<tq_encode_args>();
          args.side = TQ_SIDE_K;
          args.count = vectors;
          args.input = input_.data + i % 2 * dense_bytes;
          args.input_type = TQ_TYPE_BF16;
          args.codes = scratch_.data + i % 2 * set_bytes;
          args.codes_stride_bytes = stride;
          args.scales = scratch_.data + i % 2 * set_bytes + vectors * stride;
          args.workspace = workspace.data;
          args.workspace_bytes = workspace_bytes;
          args.stream = stream;
          expect(tq_encode(codec, &args));
        },
        calls, replays());
    report(std::string("encode") + suffix, info, vectors, encode, ceilings.up);
    const Timing decode = time_of(
        [&](int i, cudaStream_t stream) {
          auto args = sized<tq_decode_args>();
          args.side = TQ_SIDE_K;
          args.count = vectors;
          args.codes = scratch_.data + i % 2 * set_bytes;
          args.codes_stride_bytes = stride;
          args.scales = scratch_.data + i % 2 * set_bytes + vectors * stride;
          args.output = output_.data + i % 2 * dense_bytes;
          args.output_type = TQ_TYPE_BF16;
          args.workspace = workspace.data;
          args.workspace_bytes = workspace_bytes;
          args.stream = stream;
          expect(tq_decode(codec, &args));
        },
        calls, replays());
    report(std::string("decode") + suffix, info, vectors, decode, ceilings.down);
  }

  // Store and load, by calls of call_tokens out of `tokens`.
  void paged(const tq_codec *codec, const tq_codec_info &info, const char *suffix, int64_t tokens, int64_t call_tokens,
             const Ceilings &ceilings) {
    std::vector<int64_t> host;
    for (int64_t i = 0; i < tokens; ++i) {
      // A decode step has its tokens in blocks of their own: an odd factor spreads a power of two of them.
      const bool spread = call_tokens == kDecodeStep;
      host.push_back(spread ? i * 2654435761 % tokens / kTile * kTile + i % kTile : i);
    }
    const Buffer slots(host);
    auto layout = sized<tq_layout>();
    expect(tq_page_layout(codec, TQ_PAGES_CODED, &layout));
    auto pages = sized<tq_pages>();
    pages.base = scratch_.data;
    pages.num_blocks = tokens / layout.block_size_tokens;
    pages.fingerprint = layout.fingerprint;

    const Rotation rotation = rotation_of(info, tokens, call_tokens);
    const int64_t set_bytes = call_tokens * kHeads * info.k.head_dim * 2;  // of one side
    // Sets of the whole follow each other in the arrays but share their slots.
    const auto first = [&](int i) { return call_tokens == tokens ? 0 : i % rotation.sets * call_tokens; };
    const auto k = [&](const Buffer &array, int i) { return array.data + i % rotation.sets * 2 * set_bytes; };
    const auto prepare = [&](auto &args, int i, cudaStream_t stream) {
      args.num_tokens = call_tokens;
      args.pages = &pages;
      args.slots = reinterpret_cast<const int64_t *>(slots.data) + first(i);
      args.stream = stream;
    };
    const Timing store = time_of(
        [&](int i, cudaStream_t stream) {
          auto args = sized<tq_store_args>();
          args.input_type = TQ_TYPE_BF16;
          args.k = k(input_, i);
          args.v = k(input_, i) + set_bytes;
          prepare(args, i, stream);
          expect(tq_cache_store(codec, &args));
        },
        rotation.calls, replays());
    report(std::string("store") + suffix, info, 2 * kHeads * call_tokens, store, ceilings.up);
    const Timing load = time_of(
        [&](int i, cudaStream_t stream) {
          auto args = sized<tq_load_args>();
          args.output_type = TQ_TYPE_BF16;
          args.k = k(output_, i);
          args.v = k(output_, i) + set_bytes;
          prepare(args, i, stream);
          expect(tq_cache_load(codec, &args));
        },
        rotation.calls, replays());
    report(std::string("load") + suffix, info, 2 * kHeads * call_tokens, load, ceilings.down);
  }

  const CodecOptions &options_;
  const CodecSink &sink_;
  Gpu gpu_;
  Buffer input_{size_t(kElements) * 2}, output_{size_t(kElements) * 2}, scratch_{kScratchBytes};
};

}  // namespace

void measure_codec(const CodecOptions &options, const CodecSink &sink) {
  Bench(options, sink).run();
}

}  // namespace tqkv_bench
