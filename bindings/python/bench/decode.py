# SPDX-License-Identifier: Apache-2.0
"""Decode steps of a model of Llama-3.1-8B's shape with random weights, over compressed pages and over a dense cache.

    python decode.py [--batch 16] [--context 32768] [--presets k4v4,k3v3,k2v2] [--json OUT.json]

Attention alone: store and paged attention of all layers, against bf16 SDPA of all layers over a dense cache, each as
one replayed CUDA graph, over memory far larger than L2. SDPA's layers take turns on as many dense caches as fit. Then
whole steps of the model on a TqCache, as a captured graph and eager, and the bytes of both caches. TQKV_COMMIT names
the version measured in the JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

from tqkv.eval import provenance
from tqkv.hf import TqCache


def timed(run, repeats: int = 20) -> float:
    """Median milliseconds."""
    times = []
    for i in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def graph_of(run):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@torch.no_grad()
def fill(cache: TqCache, batch: int, context: int, kv_heads: int, head_dim: int) -> None:
    """Random tokens in every layer."""
    k = torch.randn(batch, context, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    v = torch.randn(batch, context, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    for layer in cache._kv:
        layer.store(*cache.update(k, v, layer.index))
        cache._pending = None


@torch.no_grad()
def sdpa_times(layers: int, q: torch.Tensor, new: torch.Tensor, context: int) -> dict[str, float | None]:
    """Milliseconds of a step's SDPA in all layers, by backend; None: refused."""
    batch, kv_heads, _, dim = new.shape
    layer_bytes = 2 * batch * kv_heads * context * dim * 2
    held = max(2, min(layers, 8, int((torch.cuda.mem_get_info()[0] - (8 << 30)) // layer_bytes)))
    dense = [torch.randn(2, batch, kv_heads, context, dim, dtype=torch.bfloat16, device="cuda") for _ in range(held)]
    times: dict[str, float | None] = {}
    for name, backend in (
        ("default", None),
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):

        def run(backend=backend):
            for i in range(layers):
                k, v = dense[i % held]
                k[:, :, -1:].copy_(new)  # a step writes its token, too
                v[:, :, -1:].copy_(new)
                with nullcontext() if backend is None else sdpa_kernel([backend]):
                    F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        try:
            times[name] = timed(graph_of(run).replay)
        except RuntimeError as error:
            times[name] = None
            print(name, str(error).splitlines()[0])
    return times


@torch.no_grad()
def measure(model, cache: TqCache, q: torch.Tensor, new: torch.Tensor) -> dict[str, float]:
    batch = q.shape[0]
    keys = [new.clone() for _ in cache._kv]  # a key says which layer it went into

    def attention():
        for layer, key in zip(cache._kv, keys, strict=True):
            cache.update(key, new, layer.index)
            cache._pending = None
            layer.attend(q, (None, None, None, None))

    result = {"attention_ms": timed(cache.capture(attention).replay)}
    host = []
    for _ in range(10):  # one step at a time: the queue of launches must not fill
        torch.cuda.synchronize()
        start = time.perf_counter()
        attention()
        host.append(time.perf_counter() - start)
    result["attention_host_us_per_layer"] = statistics.median(host) / len(keys) * 1e6
    token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")

    def step():
        return model(token, past_key_values=cache, position_ids=cache.position[None].expand(batch, 1)).logits

    result["step_graph_ms"] = timed(cache.capture(step).replay)
    result["step_eager_ms"] = timed(step, 10)
    if cache.faults().first:
        raise SystemExit(f"the library counted faults: {cache.faults().first}")
    return result


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--presets", default="k4v4,k3v3,k2v2")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json")
    a = parser.parse_args()
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=a.layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rope_theta=500000.0,
    )  # fmt: skip
    heads, kv_heads, dim = 32, 8, 128
    result = provenance("cuda") | {
        "batch": a.batch,
        "context": a.context,
        "layers": a.layers,
        "q_heads": heads,
        "kv_heads": kv_heads,
        "head_dim": dim,
    }
    q = torch.randn(a.batch, heads, 1, dim, dtype=torch.bfloat16, device="cuda")
    new = torch.randn(a.batch, kv_heads, 1, dim, dtype=torch.bfloat16, device="cuda")

    result["sdpa_ms"] = kernels = sdpa_times(a.layers, q, new, a.context)
    torch.cuda.empty_cache()

    # ---- the model on compressed pages
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    result["weights_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    result["dense_cache_bytes"] = a.layers * 4 * a.batch * kv_heads * a.context * dim
    plain = {"exact_first_tokens": 0, "exact_recent_tokens": 0, "key_offset": None}
    best = min(t for t in kernels.values() if t)
    result["rows"] = []
    for preset in a.presets.split(","):
        for kind, options in (("plain", plain), ("offset and exact ranges", {})):
            cache = TqCache.for_model(model, preset, max_tokens=a.context + 256, **options)
            fill(cache, a.batch, a.context, kv_heads, dim)
            row = {"preset": preset, "kind": kind, "cache_bytes": cache.nbytes()} | measure(model, cache, q, new)
            row["attention_share_of_sdpa"] = row["attention_ms"] / best
            print(row, flush=True)
            result["rows"].append(row)
            del cache
            gc.collect()  # a cache and its layers know each other
            torch.cuda.empty_cache()
    print({key: value for key, value in result.items() if key != "rows"})
    if a.json:
        with open(a.json, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
