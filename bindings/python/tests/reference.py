# SPDX-License-Identifier: Apache-2.0
"""Attention by its definition in tqkv.h, one row after the other, in double precision."""

from __future__ import annotations

import math

import numpy as np


def attention(
    q, k, v, *, first_position, start=0, causal=True, window=0, scale=0.0, soft_cap=0.0, sinks=None, slopes=None
):
    """q [queries, q_heads, dim] of consecutive positions over k, v [length, kv_heads, dim]; returns out and lse."""
    queries, q_heads, dim = q.shape
    group = q_heads // k.shape[1]
    out, lse = np.zeros((queries, q_heads, v.shape[2])), np.full((queries, q_heads), -np.inf)
    j = np.arange(len(k))
    for i in range(queries):
        p = first_position + i
        visible = j >= start
        if causal:
            visible &= j <= p
        if window:
            visible &= p - j < window
        for h in range(q_heads):
            x = (scale or 1 / math.sqrt(dim)) * (k[:, h // group].astype(np.float64) @ q[i, h].astype(np.float64))
            if soft_cap:
                x = soft_cap * np.tanh(x / soft_cap)
            if slopes is not None:
                x = x + slopes[h] * (j - p)
            x = x[visible]
            if len(x) == 0:
                continue
            m = max(x.max(), sinks[h] if sinks is not None else -np.inf)
            z = np.exp(x - m).sum() + (np.exp(sinks[h] - m) if sinks is not None else 0)
            out[i, h] = np.exp(x - m) @ v[visible, h // group].astype(np.float64) / z
            lse[i, h] = m + np.log(z)
    return out, lse


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-300))
