# SPDX-License-Identifier: Apache-2.0
"""What Python costs around the library's calls, in microseconds: a bound attention call against the same call made by
ctypes with nothing around it, on a problem of one token."""

from __future__ import annotations

import json
import statistics
import sys
import time
import timeit

import numpy as np

import tqkv
from tqkv import _lib


def microseconds(function, sync, number=100, rounds=30):
    # This thread's processor time: other programs do not count. The device has caught up before each round, so that
    # its queue never fills and makes a launch wait.
    return min(timeit.repeat(function, setup=sync, number=number, repeat=rounds, timer=time.thread_time)) / number * 1e6


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    library = "numpy"
    if device != "cpu":
        import torch

        library = "torch"
    codec = tqkv.Codec("k4v4", head_dim=64, kv_heads=1, device=device, threads=1 if device == "cpu" else 0)
    cache = tqkv.PagedCache(codec, 4, library=library)
    batch = cache.batch([cache.allocate()], max_length=16, max_new_tokens=1)
    batch.append(1)
    if device == "cpu":
        q = np.zeros((1, 1, 64), np.float32)
        k = np.zeros((1, 1, 64), np.float32)
    else:
        q = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)
        k = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)
    cache.store(k, k, batch)
    bound = cache.bind_attention(q, batch)
    out = bound()

    function, handle, args = _lib.functions.paged_attention, codec.handle, bound.args_pointer
    empty = _lib.functions.version
    sync = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    bare = lambda: function(handle, args)  # noqa: E731
    times = {"bound call": microseconds(bound, sync)}
    times["the same through bare ctypes"] = microseconds(bare, sync)
    times["ctypes call of tq_version"] = microseconds(empty, sync)
    times["cache.attention"] = microseconds(lambda: cache.attention(q, batch, out=out), sync)
    times["cache.store"] = microseconds(lambda: cache.store(k, k, batch), sync)
    cases = [microseconds(bound, sync, rounds=10) - microseconds(bare, sync, rounds=10) for _ in range(9)]
    # Python's part of a bound call: what it takes more than bare ctypes, and what ctypes itself takes.
    times["Python around a bound call"] = statistics.median(cases) + times["ctypes call of tq_version"]
    print(json.dumps({"device": device, "microseconds": {k: round(v, 3) for k, v in times.items()}}, indent=2))


if __name__ == "__main__":
    main()
