// SPDX-License-Identifier: Apache-2.0
#include "api/handle.hpp"
#include "attention/call.hpp"
#include "attention/cuda.hpp"

using namespace tqkv;

tq_status tq_attention_workspace(const tq_codec *codec, const tq_attention_args *given, size_t *bytes) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    tq_attention_args args{};
    TQKV_TRY(read_struct(given, "args", &args));
    if (bytes == nullptr) return fail(TQ_ERROR_NULL_POINTER, "bytes is NULL");
    AttentionCall call;
    AttentionWorkspace workspace;
    TQKV_TRY(make_call(*codec->codec, args, true, &call));
#ifdef TQKV_HAVE_CUDA
    if (codec->codec->device == TQ_DEVICE_CUDA) return cuda_attention_workspace(call, bytes);
#endif
    TQKV_TRY(attention_workspace(call, &workspace));
    *bytes = size_t(workspace.bytes);
    return TQ_OK;
  });
}

tq_status tq_paged_attention(const tq_codec *codec, const tq_attention_args *given) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    tq_attention_args args{};
    TQKV_TRY(read_struct(given, "args", &args));
    AttentionCall call;
    AttentionWorkspace workspace;
    TQKV_TRY(make_call(*codec->codec, args, false, &call));
    call.workspace = static_cast<uint8_t *>(args.workspace);
#ifdef TQKV_HAVE_CUDA
    if (codec->codec->device == TQ_DEVICE_CUDA) return cuda_attention(call, args.workspace_bytes, args.stream);
#endif
    TQKV_TRY(attention_workspace(call, &workspace));
    TQKV_TRY(check_workspace(args.workspace, args.workspace_bytes, size_t(workspace.bytes)));
    run_attention_cpu(call, workspace);
    return TQ_OK;
  });
}

tq_status tq_merge_states(const tq_codec *codec, const tq_merge_args *given) {
  return guard([&]() -> tq_status {
    TQKV_TRY(check_codec(codec));
    tq_merge_args args{};
    TQKV_TRY(read_struct(given, "args", &args));
    if (args.num_states < 1) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "args.num_states is %d; it must be at least 1", args.num_states);
    }
    TQKV_TRY(check_count(args.num_rows, "args.num_rows"));
    if (args.head_dim < 1 || args.head_dim > 65536) {
      return fail(TQ_ERROR_INVALID_ARGUMENT, "args.head_dim is %d; it must be 1 to 65536", args.head_dim);
    }
    TQKV_TRY(check_type(args.type, "args.type"));
    int64_t token_stride = 0, head_stride = 0, states = 0;
    if (__builtin_mul_overflow(args.num_rows, int64_t{args.num_states}, &states)) {
      return fail(TQ_ERROR_OVERFLOW, "args.num_rows %lld times num_states %d overflows 63 bits",
                  (long long)args.num_rows, args.num_states);
    }
    TQKV_TRY(check_rows(args.states, args.type, states, 1, args.head_dim, 0, 0, "args.states", false, &token_stride,
                        &head_stride));
    TQKV_TRY(check_rows(args.lse, TQ_TYPE_F32, states, 1, 1, 0, 0, "args.lse", false, &token_stride, &head_stride));
    TQKV_TRY(check_rows(args.out, args.type, args.num_rows, 1, args.head_dim, 0, 0, "args.out", false, &token_stride,
                        &head_stride));
    TQKV_TRY(check_aligned(args.out_lse, 4, "args.", "out_lse"));
#ifdef TQKV_HAVE_CUDA
    if (codec->codec->cuda != nullptr) return cuda_merge(*codec->codec, args);
#endif
    merge_states_cpu(*codec->codec, args);
    return TQ_OK;
  });
}
