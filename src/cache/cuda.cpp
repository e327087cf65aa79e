// SPDX-License-Identifier: Apache-2.0
#include "cache/cuda.hpp"

#ifdef TQKV_HAVE_CUDA

#include <bit>

#include "codec/cuda.hpp"
#include "codec/cuda_run.hpp"

namespace tqkv {
namespace {

cuda::Tiles tiles_of(const Pool &pool, int which) {
  cuda::Tiles tiles{};
  tiles.base = pool.base;
  tiles.num_slots = pool.num_slots();
  tiles.block_stride = pool.block_stride;
  tiles.tile_stride = pool.tile_stride;
  tiles.head_stride = pool.head_stride;
  tiles.codes_offset = which == TQ_SIDE_K ? pool.layout.k_codes : pool.layout.v_codes;
  tiles.scales_offset = which == TQ_SIDE_K ? pool.layout.k_scales : pool.layout.v_scales;
  tiles.storage_tokens = pool.storage_tokens();
  const bool power = std::has_single_bit(unsigned(tiles.storage_tokens));
  tiles.storage_shift = power ? std::countr_zero(unsigned(tiles.storage_tokens)) : -1;
  return tiles;
}

// Both sides of a store or load.
template <class Args>
void add_sides(Run &run, const Codec &codec, const Args &args, int type, const Pool &pool, const Pool *exact) {
  const int heads = codec.kv_heads;
  for (int which : {TQ_SIDE_K, TQ_SIDE_V}) {
    const bool keys = which == TQ_SIDE_K;
    const Side &side = codec.side(which);
    const void *rows = keys ? args.k : args.v;
    if (rows == nullptr) continue;
    int64_t token_stride = keys ? args.k_token_stride : args.v_token_stride;
    int64_t head_stride = keys ? args.k_head_stride : args.v_head_stride;
    if (token_stride == 0) token_stride = int64_t{heads} * side.head_dim;
    if (head_stride == 0) head_stride = side.head_dim;
    cuda::VectorSide &v = run.add_side(side, rows, type, token_stride, head_stride);
    v.offset = keys ? args.key_offset : nullptr;
    v.tiles = tiles_of(pool, which);
    if (exact != nullptr) v.exact = tiles_of(*exact, which);
  }
  run.call().slots = args.slots;
  run.call().exact_slots = exact != nullptr ? args.exact_slots : nullptr;
}

}  // namespace

tq_status cuda_store(const Codec &codec, const tq_store_args &args, const Pool &pool, const Pool *exact) {
  size_t bytes = 0;
  TQKV_TRY(cuda_workspace(codec, true, true, args.num_tokens, &bytes));
  TQKV_TRY(check_workspace(args.workspace, args.workspace_bytes, bytes));
  Run run(codec, args.num_tokens, codec.kv_heads, args.faults, args.workspace, args.stream);
  add_sides(run, codec, args, args.input_type, pool, exact);
  return run.encode();
}

tq_status cuda_load(const Codec &codec, const tq_load_args &args, const Pool &pool, const Pool *exact) {
  size_t bytes = 0;
  TQKV_TRY(cuda_workspace(codec, true, true, args.num_tokens, &bytes));
  TQKV_TRY(check_workspace(args.workspace, args.workspace_bytes, bytes));
  Run run(codec, args.num_tokens, codec.kv_heads, args.faults, args.workspace, args.stream);
  add_sides(run, codec, args, args.output_type, pool, exact);
  return run.decode();
}

tq_status cuda_copy(const Codec &codec, const tq_copy_args &args, const Pool &src, const Pool &dst,
                    const int64_t *pairs, int64_t num_pairs) {
  if (num_pairs == 0) return TQ_OK;
  const cuda::DeviceScope scope(codec.cuda->ordinal);
  TQKV_TRY(check_cuda(scope.error(), "the codec's device cannot be made current"));
  cuda::CopyCall call{};
  call.src = src.base;
  call.dst = dst.base;
  call.src_block_stride = src.block_stride;
  call.src_tile_stride = src.tile_stride;
  call.src_head_stride = src.head_stride;
  call.src_blocks = src.num_blocks;
  call.dst_block_stride = dst.block_stride;
  call.dst_tile_stride = dst.tile_stride;
  call.dst_head_stride = dst.head_stride;
  call.dst_blocks = dst.num_blocks;
  call.block_size = src.block_size;
  call.heads = src.kv_heads;
  call.tile_bytes = src.layout.bytes;
  const auto shape = [](const Side &side) {
    return cuda::SideShape{side.head_dim, side.bits, side.scale_type, side.raw_type, side.side == TQ_SIDE_V};
  };
  call.k = shape(*src.k);
  call.v = shape(*src.v);
  call.k_codes = src.layout.k_codes;
  call.v_codes = src.layout.v_codes;
  call.k_scales = src.layout.k_scales;
  call.v_scales = src.layout.v_scales;
  call.pairs = args.pairs_on_host != 0 ? nullptr : pairs;
  call.faults = args.faults;
  const int64_t size = args.pairs_on_host != 0 ? cuda::kHostPairs : INT32_MAX;
  for (int64_t first = 0; first < num_pairs; first += size) {
    const int64_t count = std::min(size, num_pairs - first);
    cuda::HostPairs host{};
    if (args.pairs_on_host != 0) std::copy_n(pairs + 2 * first, 2 * count, host.pair);
    const int error = cuda::launch_copy(call, args.pairs_on_host != 0 ? &host : nullptr, first, count, args.stream);
    TQKV_TRY(check_cuda(error, "the copying kernel did not start"));
  }
  return TQ_OK;
}

}  // namespace tqkv

#endif  // TQKV_HAVE_CUDA
