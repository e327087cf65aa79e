// SPDX-License-Identifier: Apache-2.0
#include "attention/cuda.hpp"

#ifdef TQKV_HAVE_CUDA

#include <algorithm>
#include <cmath>

#include "codec/cuda_run.hpp"
#include "codec/half.hpp"
#include "kernels/attention.hpp"

namespace tqkv {
namespace {

constexpr double kLog2E = 1.4426950408889634;

cuda::Rows rows_of(const Rows &rows) {
  return device_rows(rows.data, rows.type, rows.token_stride, rows.head_stride);
}

cuda::AttentionPool device_pool(const Pool &pool) {
  return {pool.base,
          pool.num_blocks,
          pool.block_stride,
          pool.tile_stride,
          pool.head_stride,
          int32_t(pool.layout.v_codes),
          int32_t(pool.layout.k_scales),
          int32_t(pool.layout.v_scales),
          int32_t(pool.layout.bytes),
          pool.block_size};
}

// operands.cuh: the grid values of the 8 magnitudes, or of the ascending levels.
void set_levels(const Side &side, uint32_t (&table)[2]) {
  for (int i = 0; i < 8 && side.bits != 8; ++i) {
    table[i / 4] |= uint32_t(uint8_t((int(side.levels[i]) - 1) / 2)) << (8 * (i % 4));
  }
}

// attention_wide.cuh: HalfTable.
void set_halves(const Side &side, uint32_t (&table)[4]) {
  for (int i = 0; i < 8 && side.bits <= 4; ++i) {
    const uint16_t half = f16_from_f32(side.levels[i]);
    table[i / 4] |= uint32_t(half & 0xff) << (8 * (i % 4));
    table[2 + i / 4] |= uint32_t(half >> 8) << (8 * (i % 4));
  }
}

bool is_uniform(const Side &side) {
  return side.bits == 2 && side.levels[0] == -3 && side.levels[1] == -1;
}

// The parts of the workspace, in bytes from its start.
class Places {
 public:
  // Room for `count` items of `size` bytes; gives where.
  int64_t add(int64_t count, int64_t size) {
    const int64_t at = bytes_;
    int64_t product = 0;
    overflows_ = overflows_ || __builtin_mul_overflow(count, size, &product) ||
                 __builtin_add_overflow(bytes_, product, &bytes_) || bytes_ > INT64_MAX - 256;
    bytes_ = (bytes_ + 255) / 256 * 256;
    return at;
  }
  int64_t bytes() const { return bytes_; }
  bool overflows() const { return overflows_; }

 private:
  int64_t bytes_ = 0;
  bool overflows_ = false;
};

struct Plan {
  cuda::AttentionCall call{};
  // Dense rotations: cuBLAS's workspace, queries before and after, outputs of three kinds.
  int64_t cublas = 0, queries = 0, rotated = 0, merged = 0, back = 0, raw = 0;
  int64_t states = 0, faults = 0, first_segments = 0, units = 0, segments = 0, items = 0, block_items = 0,
          part_counts = 0;
  int64_t operands = 0, new_operands = 0, rows = 0, partials = 0;
  int64_t bytes = 0;
};

// Whether the bulk copies of the kernel can read a pool.
tq_status check_pool(const Pool &pool) {
  if ((pool.block_stride | pool.tile_stride | pool.head_stride) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(pool.base) % 16 != 0) {
    return fail(TQ_ERROR_NOT_SUPPORTED,
                "attention on CUDA reads pages whose base and strides are multiples of 16 bytes");
  }
  return TQ_OK;
}

// What attention.cuh takes of a codec, but for its head_dims.
bool takes_codes(const Codec &codec) {
  const auto takes = [](const Side &side) {
    return side.bits == 2 || side.bits == 3 || side.bits == 4 || side.bits == 8;
  };
  return takes(codec.k) && takes(codec.v);
}

// More query rows of a kv head go to the wide kernels, whatever the codec.
constexpr int64_t kMostNarrowRows = 32;

// Whether the main kernel reads k_new.
bool reads_new(const cuda::AttentionCall &call) {
  return call.wide_rows > 0 && call.k_new.data != nullptr && call.k_new.type != TQ_TYPE_F32;
}

void make_wide(const AttentionCall &from, cuda::AttentionCall *call) {
  const Side &k = from.codec->k, &v = from.codec->v;
  set_halves(k, call->k_halves);
  set_halves(v, call->v_halves);
  call->query_type = k.raw() ? from.codec->raw_type : int(TQ_TYPE_F16);
  // Raw keys of the queries' type are multiplied with the very queries. Else one part is enough beside the rounding of
  // outputs to bf16, but not for lse; and bf16 has 8 bits only.
  const bool exact = k.raw() && from.q.type == call->query_type;
  call->weight_parts = from.out.type == TQ_TYPE_BF16 ? 1 : 2;
  call->query_parts = exact ? 1 : call->query_type == TQ_TYPE_BF16 || from.lse != nullptr ? 2 : call->weight_parts;
  call->new_gain = float(std::fabs(double(from.scale)) * kLog2E);
}

// Fills in what the kernels are given, and refuses what they cannot do. Without a workspace only sizes are right.
tq_status make_plan(const AttentionCall &from, Plan *result) {
  const Codec &codec = *from.codec;
  if (codec.cuda->limits.compute_capability < 90) {
    return fail(TQ_ERROR_NOT_SUPPORTED, "attention on CUDA takes compute capability 9.0; the codec's device has %d.%d",
                codec.cuda->limits.compute_capability / 10, codec.cuda->limits.compute_capability % 10);
  }
  TQKV_TRY(check_pool(from.pool));
  Plan plan;
  cuda::AttentionCall &call = plan.call;
  call.num_seqs = from.num_seqs;
  call.num_tokens = from.num_tokens;
  call.q_heads = from.q_heads;
  call.kv_heads = codec.kv_heads;
  call.group = from.group;
  call.causal = from.causal;
  call.max_q_len = int32_t(std::min<int64_t>(from.max_q_len, INT32_MAX));
  call.max_length = int32_t(std::min<int64_t>(from.max_length, INT32_MAX));
  call.q = rows_of(from.q);
  call.k_new = rows_of(from.k_new);
  call.v_new = rows_of(from.v_new);
  call.out = rows_of(from.out);
  call.cu_seqlens_q = from.cu_seqlens_q;
  call.q_positions = from.q_positions;
  call.lengths = from.lengths;
  call.starts = from.starts;
  call.pool = device_pool(from.pool);
  call.block_table = from.block_table;
  call.block_indptr = from.block_indptr;
  call.block_indices = from.block_indices;
  call.table_stride = from.table_stride;
  call.table_columns = from.table_columns;
  call.num_block_indices = from.num_block_indices;
  if (from.has_exact) {
    call.exact = device_pool(from.exact);
    call.exact_table = from.exact_table;
    call.exact_stride = from.exact_stride;
    call.exact_columns = from.exact_columns;
    call.exact_first = from.exact_first;
    call.exact_recent = from.exact_recent;
  }
  call.raw_type = codec.raw_type;
  call.scale = from.scale;
  call.soft_cap = from.soft_cap;
  call.cap_log2 = float(double(from.soft_cap) * kLog2E);
  call.cap_factor = from.soft_cap > 0 ? float(2 / double(from.soft_cap)) : 0.0f;
  call.window = from.window;
  call.sinks = from.sinks;
  call.alibi_slopes = from.alibi_slopes;
  call.key_offset = from.key_offset;
  call.lse = from.lse;
  call.faults = from.faults;
  call.k_bits = codec.k.bits;
  call.v_bits = codec.v.bits;
  call.k_scale_type = codec.k.scale_type;
  call.v_scale_type = codec.v.scale_type;
  call.head_dim_k = codec.k.head_dim;
  call.head_dim_v = codec.v.head_dim;
  call.k_uniform = is_uniform(codec.k);
  call.v_uniform = is_uniform(codec.v);
  set_levels(codec.k, call.k_levels);
  set_levels(codec.v, call.v_levels);

  const int64_t rows_of_head = int64_t{call.max_q_len} * call.group;
  cuda::AttentionLimits limits{};
  if (takes_codes(codec) && rows_of_head <= kMostNarrowRows) (void)cuda::find_attention(call, rows_of_head, &limits);
  if (limits.rows == 0) {
    call.wide_rows = limits.rows = cuda::find_wide_attention(call, rows_of_head);
    limits.warps = 2;  // packs of one head
  }
  if (limits.rows == 0) {
    return fail(TQ_ERROR_NOT_SUPPORTED, "attention on CUDA takes head_dims up to 256; these are %d and %d",
                codec.k.head_dim, codec.v.head_dim);
  }
  if (call.wide_rows > 0) make_wide(from, &call);
  // Rows of a kv head, in parts of equal size that fit a segment.
  call.head_parts = (call.group + limits.rows - 1) / limits.rows;
  call.block_heads = (call.group + call.head_parts - 1) / call.head_parts;
  call.block_tokens = std::clamp(limits.rows / call.block_heads, 1, std::max(call.max_q_len, 1));
  call.pack_heads = std::min({8, limits.warps / 2, call.kv_heads});
  while (call.kv_heads % call.pack_heads != 0) --call.pack_heads;
  call.head_packs = call.kv_heads / call.pack_heads;
  call.page_splits = from.fixed_split ? int32_t(std::min<int64_t>(from.splits, INT32_MAX - 1)) : 1;
  call.splits = call.page_splits + (reads_new(call) ? 1 : 0);
  call.split_tiles = from.fixed_split ? int32_t(from.split_tokens / kTileTokens) : 0;
  call.blocks = std::min(codec.cuda->limits.multiprocessors, cuda::kMaxAttentionBlocks);
  call.item_units = int32_t(std::max<int64_t>(1, cuda::kItemBytes / call.pool.tile_bytes));
  const int64_t copies = int64_t{call.head_parts} * call.head_packs;
  call.token_blocks = std::max(1, (call.max_q_len + call.block_tokens - 1) / call.block_tokens);
  int64_t token_blocks = int64_t{from.num_seqs} * call.token_blocks;                  // of all sequences
  const int64_t segment_units = call.max_length / kTileTokens + 1 + call.item_units;  // at most
  call.direct = call.wide_rows == 0 && call.split_tiles == 0 && token_blocks <= 32 * call.pack_heads &&
                (call.cu_seqlens_q != nullptr || call.num_tokens == call.num_seqs) && copies * token_blocks < 1 << 20 &&
                copies * token_blocks * segment_units * call.blocks <= UINT32_MAX;
  call.counts_parts = call.direct != 0 && call.token_blocks == 1;
  if (call.direct == 0) {
    token_blocks =
        from.cu_seqlens_q == nullptr ? from.num_seqs : from.num_tokens / call.block_tokens + int64_t{from.num_seqs};
  }
  Places places;
  if (__builtin_mul_overflow(token_blocks * copies, int64_t{call.splits}, &call.max_segments) ||
      call.max_segments > INT32_MAX / 2 - call.blocks) {
    return fail(TQ_ERROR_OVERFLOW,
                "%lld splits of %d tokens are more than 2^30 parts, which attention on CUDA counts to",
                (long long)from.splits, call.num_tokens);
  }
  call.operand_bytes = (call.head_dim_k + 31) / 32 * 32;
  const int rows = call.block_tokens * call.block_heads;
  call.slot_bytes =
      cuda::partial_outputs(call.pack_heads, rows) + int64_t{call.pack_heads} * rows * call.head_dim_v * 4;
  call.slot_bytes = (call.slot_bytes + 15) / 16 * 16;

  const int64_t query_rows = int64_t{from.num_tokens} * from.q_heads;
  if (query_rows > INT32_MAX / 2) {
    return fail(TQ_ERROR_OVERFLOW,
                "%d tokens of %d heads are more than 2^30 queries, which attention on CUDA counts to", call.num_tokens,
                call.q_heads);
  }
  plan.states = places.add(from.num_seqs, 4);
  plan.faults = places.add(from.num_seqs, 4);
  plan.first_segments = places.add(int64_t{from.num_seqs} + 1, 8);
  plan.units = places.add(call.max_segments + 1, 8);
  plan.segments = places.add(call.max_segments, sizeof(cuda::AttentionItem));
  plan.items = places.add(call.max_segments + call.blocks, sizeof(cuda::AttentionItem));
  plan.block_items = places.add(call.blocks, sizeof(cuda::BlockItems));
  plan.part_counts = places.add(call.max_segments, 4 * int64_t{call.pack_heads});
  plan.operands =
      places.add(query_rows, call.wide_rows > 0 ? 4 * int64_t{call.head_dim_k}  // whether lse is given or not
                                                : 2 * int64_t{call.operand_bytes});
  if (reads_new(call)) plan.new_operands = places.add(query_rows, 2 * int64_t{call.head_dim_k});
  plan.rows = places.add(query_rows, sizeof(cuda::QueryRow));
  plan.partials = places.add(call.max_segments + call.blocks, call.slot_bytes);
  if (is_dense(codec.k) || is_dense(codec.v)) plan.cublas = places.add(1, int64_t(Cublas::kWorkspaceBytes));
  if (is_dense(codec.k)) {
    plan.queries = places.add(query_rows, 4 * int64_t{call.head_dim_k});
    plan.rotated = places.add(query_rows, 4 * int64_t{call.head_dim_k});
  }
  if (is_dense(codec.v)) {
    plan.merged = places.add(query_rows, 4 * int64_t{call.head_dim_v});
    plan.back = places.add(query_rows, 4 * int64_t{call.head_dim_v});
    plan.raw = places.add(query_rows, 4 * int64_t{call.head_dim_v});
  }
  if (places.overflows()) {
    return fail(TQ_ERROR_OVERFLOW, "%d tokens, %d heads and %d splits of the context overflow 63 bits of workspace",
                call.num_tokens, call.q_heads, call.splits);
  }
  plan.bytes = places.bytes();
  *result = plan;
  if (from.workspace == nullptr) return TQ_OK;  // only sizes are asked for
  uint8_t *base = from.workspace;
  call.sequence_states = reinterpret_cast<int32_t *>(base + plan.states);
  call.sequence_faults = reinterpret_cast<int32_t *>(base + plan.faults);
  call.sequence_segments = reinterpret_cast<int64_t *>(base + plan.first_segments);
  call.segment_units = reinterpret_cast<int64_t *>(base + plan.units);
  call.segments = reinterpret_cast<cuda::AttentionItem *>(base + plan.segments);
  call.items = reinterpret_cast<cuda::AttentionItem *>(base + plan.items);
  call.block_items = reinterpret_cast<cuda::BlockItems *>(base + plan.block_items);
  call.part_counts = reinterpret_cast<uint32_t *>(base + plan.part_counts);
  call.query_operands = base + plan.operands;
  if (reads_new(call)) call.new_operands = base + plan.new_operands;
  call.query_rows = reinterpret_cast<cuda::QueryRow *>(base + plan.rows);
  call.partials = base + plan.partials;
  *result = plan;
  return TQ_OK;
}

}  // namespace

tq_status cuda_attention_workspace(const AttentionCall &call, size_t *bytes) {
  Plan plan;
  TQKV_TRY(make_plan(call, &plan));
  *bytes = size_t(plan.bytes);
  return TQ_OK;
}

tq_status cuda_attention(const AttentionCall &from, size_t workspace_bytes, void *stream) {
  const Codec &codec = *from.codec;
  CudaCodec &device = *codec.cuda;
  Plan plan;
  TQKV_TRY(make_plan(from, &plan));
  TQKV_TRY(check_workspace(from.workspace, workspace_bytes, size_t(plan.bytes)));
  const cuda::AttentionCall &call = plan.call;
  if (call.num_seqs == 0) return TQ_OK;
  const cuda::DeviceScope scope(device.ordinal);
  TQKV_TRY(check_cuda(scope.error(), "the codec's device cannot be made current"));
  const auto floats = [&](int64_t at) { return reinterpret_cast<float *>(from.workspace + at); };
  const int64_t query_rows = int64_t{call.num_tokens} * call.q_heads;
  const float *rotated = nullptr;
  if (is_dense(codec.k) && query_rows > 0) {
    TQKV_TRY(check_cuda(cuda::launch_attention_widen(call, floats(plan.queries), stream),
                        "preparing a dense rotation failed"));
    TQKV_TRY(device.cublas->multiply(floats(plan.queries), device.matrices[TQ_SIDE_K], true, query_rows,
                                     codec.k.head_dim, floats(plan.rotated), from.workspace + plan.cublas, stream));
    rotated = floats(plan.rotated);
  }
  TQKV_TRY(check_cuda(
      cuda::launch_attention_prepare(call, device.params[TQ_SIDE_K], cuda::query_order(call), rotated, stream),
      "the kernel before attention did not start"));
  TQKV_TRY(
      check_cuda(call.wide_rows > 0 ? cuda::launch_wide_attention(call, stream) : cuda::launch_attention(call, stream),
                 "the attention kernel did not start"));
  float *merged = is_dense(codec.v) ? floats(plan.merged) : nullptr;
  float *raw = is_dense(codec.v) ? floats(plan.raw) : nullptr;
  TQKV_TRY(check_cuda(cuda::launch_attention_finish(call, device.params[TQ_SIDE_V], merged, raw, stream),
                      "the kernel after attention did not start"));
  if (merged == nullptr || query_rows == 0) return TQ_OK;
  TQKV_TRY(device.cublas->multiply(merged, device.matrices[TQ_SIDE_V], false, query_rows, codec.v.head_dim,
                                   floats(plan.back), from.workspace + plan.cublas, stream));
  return check_cuda(cuda::launch_attention_write(call, codec.v.decode_gain, floats(plan.back), raw, stream),
                    "the last kernel of attention did not start");
}

tq_status cuda_merge(const Codec &codec, const tq_merge_args &args) {
  if (args.num_rows == 0) return TQ_OK;
  const cuda::DeviceScope scope(codec.cuda->ordinal);
  TQKV_TRY(check_cuda(scope.error(), "the codec's device cannot be made current"));
  cuda::MergeCall call{};
  call.states = args.states;
  call.lse = args.lse;
  call.out = args.out;
  call.out_lse = args.out_lse;
  call.num_rows = args.num_rows;
  call.num_states = args.num_states;
  call.head_dim = args.head_dim;
  call.type = args.type;
  return check_cuda(cuda::launch_merge(call, args.stream), "the merging kernel did not start");
}

}  // namespace tqkv

#endif  // TQKV_HAVE_CUDA
