# SPDX-License-Identifier: Apache-2.0
"""A decode loop of a small transformer layer stack over a paged, compressed cache in PyTorch. On a CUDA device a whole
decode step, projections, store and attention of every layer, is captured once as a CUDA graph and replayed; on a CPU the
same step runs as it is."""

from __future__ import annotations

import argparse
import time

import torch

import tqkv


class Layer(torch.nn.Module):
    def __init__(self, hidden: int, q_heads: int, kv_heads: int, dim: int):
        super().__init__()
        self.q = torch.nn.Linear(hidden, q_heads * dim, bias=False)
        self.k = torch.nn.Linear(hidden, kv_heads * dim, bias=False)
        self.v = torch.nn.Linear(hidden, kv_heads * dim, bias=False)
        self.o = torch.nn.Linear(q_heads * dim, hidden, bias=False)


class Decoder:
    """Layers over a PagedCache; `step` is one token of every sequence."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.layers = [
            Layer(args.hidden, args.q_heads, args.kv_heads, args.head_dim).to(device, dtype) for _ in range(args.layers)
        ]
        self.codec = tqkv.Codec(args.preset, head_dim=args.head_dim, kv_heads=args.kv_heads, device=device)
        length = args.prompt + args.steps
        self.cache = tqkv.PagedCache(self.codec, args.batch * -(-length // 16), num_layers=args.layers, library="torch")
        # Tables of a fixed size stay where they are: what a graph needs.
        self.batch = self.cache.batch(
            [self.cache.allocate() for _ in range(args.batch)],
            max_length=length,
            max_new_tokens=args.batch * args.prompt,
        )
        self.x = torch.zeros(args.batch, args.hidden, device=device, dtype=dtype)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens of the batch's last append, [tokens, hidden]."""
        a = self.args
        for i, layer in enumerate(self.layers):
            q = layer.q(x).view(-1, a.q_heads, a.head_dim)
            k, v = (p(x).view(-1, a.kv_heads, a.head_dim) for p in (layer.k, layer.v))
            self.cache.store(k, v, self.batch, i)
            # The chunk's own tokens are read as they are; in a graph, where one was just stored, from the page.
            own = {"k_new": k, "v_new": v} if len(x) > a.batch else {}
            out = self.cache.attention(q, self.batch, i, **own)
            x = x + layer.o(out.reshape(len(x), -1))
            x = torch.nn.functional.rms_norm(x, x.shape[-1:])
        return x

    def step(self) -> None:
        self.x.copy_(self.run(self.x))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (
        ("batch", 4), ("prompt", 200), ("steps", 64), ("layers", 4), ("hidden", 512), ("q-heads", 8), ("kv-heads", 2),
        ("head-dim", 64),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--preset", default="k4v4")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and tqkv.device_count() > 0 else "cpu")
    torch.manual_seed(0)
    decoder = Decoder(args, device)
    prompt = torch.randn(args.batch * args.prompt, args.hidden, device=device, dtype=decoder.x.dtype)

    decoder.batch.append(args.prompt)
    out = decoder.run(prompt)
    decoder.x.copy_(out[args.prompt - 1 :: args.prompt])

    decoder.batch.append(1)
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name()}: the decode step is captured as a CUDA graph and replayed")
        start = decoder.x.clone()
        # A first run outside of the graph, on a stream of its own, lets every library allocate; the step is then
        # captured, which runs nothing, so the first replay stores this step's tokens.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            decoder.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decoder.step()
        decoder.x.copy_(start)
        step = graph.replay
    else:
        print("no CUDA device that the library can use: the decode step runs uncaptured on the CPU")
        step = decoder.step

    began = time.perf_counter()
    for i in range(args.steps):
        if i > 0:
            decoder.batch.append(1)  # blocks and tables on the host, one copy to the device; the graph reads them
        if i == args.steps - 1:
            before = decoder.x.clone()
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / args.steps
    raw = 2 * 2 * args.kv_heads * args.head_dim * args.layers
    tokens = sum(decoder.cache.length(s) for s in decoder.batch.sequences)
    print(f"{args.steps} steps of {args.batch} sequences, {seconds * 1e3:.3f} ms each")
    print(
        f"cache: {decoder.cache.bytes_in_use()} bytes for {tokens} tokens of {args.layers} layers;"
        f" bf16 would take {raw * tokens}"
    )
    if not torch.isfinite(decoder.x.float()).all():
        raise SystemExit("the loop diverged")

    # The last step taken back and done again outside of the graph.
    last = decoder.x.clone()
    decoder.batch.truncate(-1)
    decoder.batch.append(1)
    decoder.x.copy_(before)
    decoder.step()
    difference = ((decoder.x - last).float().norm() / last.float().norm()).item()
    print(f"the last step again, uncaptured: differs by {difference:.1e}")
    if difference > 0.05:  # captured products may be summed in another order, and hidden states are bf16
        raise SystemExit("the captured step is another one")


if __name__ == "__main__":
    main()
