# SPDX-License-Identifier: Apache-2.0
"""PyTorch's tensors on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import reference

import tqkv

pytestmark = pytest.mark.torch


@pytest.fixture
def torch():
    import torch

    return torch


@pytest.fixture(scope="module")
def codec():
    return tqkv.Codec("k4v4", head_dim=64, kv_heads=2)


def test_the_same_bytes_as_numpy(torch, codec, random):
    x = random.standard_normal((5, 3, 64)).astype(np.float32)
    expected = codec.encode(x)
    for tensor in (torch.from_numpy(x), torch.from_numpy(x).requires_grad_()):
        codes, scales = codec.encode(tensor)
        assert isinstance(codes, torch.Tensor) and isinstance(scales, torch.Tensor)
        assert codes.numpy().tobytes() == expected[0].tobytes() and scales.numpy().tobytes() == expected[1].tobytes()
    y = codec.decode(codes, scales, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16 and (y.float() - torch.from_numpy(x)).norm() < 0.12 * np.linalg.norm(x)
    half = torch.from_numpy(x).to(torch.bfloat16)
    assert torch.equal(codec.encode(half)[0], codec.encode(half.float())[0])


def test_paged_cache(torch, codec):
    cache = tqkv.PagedCache(codec, 32, library="torch")
    batch = cache.batch([cache.allocate(), cache.allocate()])
    batch.append([40, 21])
    # [kv_heads, tokens, dim] as models have it: strided, no copy.
    k, v = (torch.randn(2, 61, 64, dtype=torch.bfloat16).transpose(0, 1) for _ in range(2))
    cache.store(k, v, batch)
    q = torch.randn(61, 8, 64, dtype=torch.bfloat16)
    out = cache.attention(q, batch)
    assert out.dtype == torch.bfloat16 and isinstance(batch.block_table, torch.Tensor)
    loaded = [x.numpy() for x in cache.load(batch.sequences[1])]
    expected, _ = reference.attention(q[40:].float().numpy(), *loaded, first_position=0)
    assert reference.relative_error(out[40:].float().numpy(), expected) < 2**-8  # bf16 outputs
    batch.reorder([1, 1])
    batch.append(1)
    assert cache.length(batch.sequences[0]) == 22


def test_refused_tensors(torch, codec):
    x = torch.zeros(4, 64)
    gone = torch.zeros(4, 64)
    gone.untyped_storage().resize_(0)
    cases = [
        (gone, "memory was freed"),
        (torch.zeros(4, 64, device="meta"), "device meta"),
        (torch.zeros(4, 64, dtype=torch.complex64), "complex64"),
        (torch.zeros(64, 4).t(), "last stride"),
        (torch.zeros(1, 64).expand(4, 64), "above zero"),
        (x.to_sparse(), "layout"),
    ]
    for tensor, sentence in cases:
        with pytest.raises(tqkv.InvalidArgument, match=sentence):
            codec.encode(tensor)


def test_streams_of_the_cpu_are_ignored(torch, codec):
    codec.encode(torch.zeros(4, 64), stream=0)
