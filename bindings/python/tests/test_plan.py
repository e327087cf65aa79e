# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest

import tqkv

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
}


def test_plan(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    class Config:
        def to_dict(self):
            return LLAMA

    plans = [tqkv.plan(c, "k4v4", context_tokens=32768, batch=2) for c in (LLAMA, tmp_path, Config())]
    assert plans[0] == plans[1] == plans[2]
    assert plans[0].bytes_per_token == 32 * 8 * 132 and plans[0].kv_layers == 32
    assert plans[0].details["bytes_per_token"] == plans[0].bytes_per_token
    assert tqkv.plan(LLAMA, memory_bytes=1 << 34, context_tokens=8192).max_batch > 10
    with pytest.raises(tqkv.ParseError, match="num_hidden_layers"):
        tqkv.plan({"model_type": "llama"})
    with pytest.raises(tqkv.InvalidArgument, match="k9"):
        tqkv.plan(LLAMA, "k9")
    with pytest.raises(tqkv.InvalidType, match="config is a int"):
        tqkv.plan(3)


def test_validate():
    results = tqkv.validate([64, 128], [2, 4, 8], vectors=2000)
    assert [(r.head_dim, r.bits) for r in results] == [(d, b) for d in (64, 128) for b in (2, 4, 8)]
    for r in results:
        assert r.bytes == r.head_dim * r.bits // 8 + 2
        assert r.within_bounds or not r.bound_applies
        assert abs(r.slope_unbiased - 1) < 0.02


def layer(random, offset=0.0):
    """Keys with a mean, queries that look for some of them."""
    tokens, heads, group, dim = 640, 2, 2, 64
    k = random.standard_normal((tokens, heads, dim)).astype(np.float32)
    v = random.standard_normal((tokens, heads, dim)).astype(np.float32)
    k += np.float32(offset) * random.standard_normal((heads, dim)).astype(np.float32)
    q = 2 * random.standard_normal((16, heads * group, dim)).astype(np.float32)
    return k, v, q


def test_recommend(random):
    k, v, q = layer(random, offset=6.0)
    r = tqkv.recommend(k, v, q, max_output_error=0.2)
    assert r.meets_targets and r.use_key_offset and r.output_error <= 0.2 and r.key_mean_share > 0.9
    assert r.preset in tqkv.presets() and r.reasons
    assert len(r.details["candidates"]) == 13
    cheaper = [c for c in r.details["candidates"] if c["bytes_per_token"] < r.bytes_per_token]
    assert all(c["output_error"] > 0.2 for c in cheaper)
    budget = tqkv.recommend(k, v, q, max_bytes_per_token=2 * 40)
    assert budget.meets_targets and budget.bytes_per_token <= 80
    assert not tqkv.recommend(k, v, q, max_bytes_per_token=1).meets_targets
    assert tqkv.recommend(k, v, q, max_output_error=1e-3).preset == "raw"
    assert not tqkv.recommend(*layer(random), max_output_error=0.2).use_key_offset


def test_recommend_without_queries(random):
    k, v, _ = layer(random)
    r = tqkv.recommend(k, v, max_output_error=0.12)
    assert (r.preset, r.exact_first_tokens, r.exact_recent_tokens) == ("k4v4", 0, 0) and np.isnan(r.kl)
    assert any("No queries" in reason for reason in r.reasons)
    half = tqkv.recommend(k.astype(np.float16), v.astype(np.float16), max_output_error=0.12)
    assert half.preset == r.preset and abs(half.output_error - r.output_error) < 1e-3
    with pytest.raises(tqkv.InvalidArgument, match="max_kl"):
        tqkv.recommend(k, v, max_kl=0.1)
    k[7, 1, 3] = np.inf
    with pytest.raises(tqkv.InvalidArgument, match=r"args\.k holds a NaN or an infinity at token 7, head 1"):
        tqkv.recommend(k, v)
    with pytest.raises(tqkv.InvalidArgument, match="v has shape"):
        tqkv.recommend(k, v[:5])
