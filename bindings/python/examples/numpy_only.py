# SPDX-License-Identifier: Apache-2.0
"""A compressed cache with NumPy alone: vectors, a paged cache of two sequences that share a prefix, attention, and what
each preset costs and keeps."""

from __future__ import annotations

import numpy as np

import tqkv

HEADS, Q_HEADS, DIM, PROMPT, STEPS = 2, 8, 128, 300, 20
random = np.random.default_rng(0)


def attention(q, k, v):
    """The same attention over uncompressed keys and values: one query token."""
    out = np.empty((Q_HEADS, DIM))
    for h in range(Q_HEADS):
        logits = k[:, h * HEADS // Q_HEADS] @ q[h] / np.sqrt(DIM)
        weights = np.exp(logits - logits.max())
        out[h] = weights @ v[:, h * HEADS // Q_HEADS] / weights.sum()
    return out


print(tqkv.build_info())
print(f"\n{'preset':8} {'bytes/token':>11} {'output error':>12}")
keys = random.standard_normal((PROMPT + STEPS, HEADS, DIM)).astype(np.float32)
values = random.standard_normal((PROMPT + STEPS, HEADS, DIM)).astype(np.float32)
queries = 2 * random.standard_normal((STEPS, Q_HEADS, DIM)).astype(np.float32)
for preset in ("raw", "k4v4", "k3v3", "k2v2"):
    codec = tqkv.Codec(preset, head_dim=DIM, kv_heads=HEADS)
    cache = tqkv.PagedCache(codec, num_blocks=64)
    prompt = cache.batch([cache.allocate()])
    prompt.append(PROMPT)  # room for the prompt's tokens
    cache.store(keys[:PROMPT], values[:PROMPT], prompt)
    # Two answers to one prompt: the fork shares its blocks, and copies the last one when it writes to it.
    batch = cache.batch([*prompt.sequences, cache.fork(prompt.sequences[0])])
    errors = []
    for step in range(STEPS):
        at = PROMPT + step
        batch.append(1)
        k, v = np.stack([keys[at], -keys[at]]), np.stack([values[at], -values[at]])
        cache.store(k, v, batch)
        out = cache.attention(np.stack([queries[step]] * 2), batch)
        exact = attention(queries[step], keys[: at + 1], values[: at + 1])
        errors.append(np.linalg.norm(out[0] - exact) / np.linalg.norm(exact))
    print(f"{preset:8} {codec.bytes_per_token:11} {np.mean(errors):12.4f}")

recommendation = tqkv.recommend(keys, values, queries, max_output_error=0.15)
print(f"\nFor an output error of 0.15 at most: {recommendation.preset}")
for reason in recommendation.reasons:
    print(" ", reason)
