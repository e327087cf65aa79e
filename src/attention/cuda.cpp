// SPDX-License-Identifier: Apache-2.0
#include "attention/cuda.hpp"

#ifdef TQKV_HAVE_CUDA

#include "codec/cuda_run.hpp"

namespace tqkv {

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
