#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The rate of cuDNN's attention (through PyTorch) on the prefill rows of tqkv-bench attention: bf16, dense K and V."""

import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right


def main():
    chunk, past, q_heads, kv_heads, head_dim = 2048, 32768, 32, 8, 128
    length = past + chunk
    q = torch.randn(1, q_heads, chunk, head_dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, kv_heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(1, kv_heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
    dense = [x.repeat_interleave(q_heads // kv_heads, dim=1) for x in (k, v)]
    flops = 4 * head_dim * q_heads * sum(past + i + 1 for i in range(chunk))
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
    mask = causal_lower_right(chunk, length)
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FlashAttention", SDPBackend.FLASH_ATTENTION)):
        for kind, (keys, values) in (("heads shared", (k, v)), ("heads repeated", dense)):
            for causal, attn_mask in (("causal", mask), ("all keys", None)):
                try:
                    with sdpa_kernel(backend):
                        run = lambda: torch.nn.functional.scaled_dot_product_attention(
                            q, keys, values, attn_mask=attn_mask, enable_gqa=kind == "heads shared")
                        times = []
                        for i in range(13):
                            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                            begin.record()
                            run()
                            end.record()
                            torch.cuda.synchronize()
                            if i >= 3:
                                times.append(begin.elapsed_time(end) * 1e-3)
                except Exception as error:  # a backend that does not take the call
                    print(f"{name}, {kind}, {causal}: {str(error).splitlines()[0]}")
                    continue
                work = flops if attn_mask is not None else 4 * head_dim * q_heads * chunk * length
                seconds = statistics.median(times)
                print(f"{name}, {kind}, {causal}: {seconds * 1e3:.3f} ms, {work / seconds * 1e-12:.1f} TFLOP/s")


if __name__ == "__main__":
    main()
