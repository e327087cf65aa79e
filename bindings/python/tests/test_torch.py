# SPDX-License-Identifier: Apache-2.0
"""PyTorch's tensors, on the CPU and on a CUDA device."""

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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("extras", [False, True])
def test_attention(torch, device, extras):
    """Ragged sequences, left padding, exact tokens and a key offset, against the definition over what is stored."""
    heads, dim, first, recent = 2, 64, 4, 32
    codec = tqkv.Codec("k4v4", head_dim=dim, kv_heads=heads, device=device)
    options = {"num_exact_blocks": 32, "exact_first_tokens": first, "exact_recent_tokens": recent} if extras else {}
    cache = tqkv.PagedCache(codec, 64, library="torch", **options)
    batch = cache.batch([cache.allocate(), cache.allocate(start=3)])
    offset = None
    if extras:
        offset = 3 * torch.randn(heads, dim, device=device)
        cache.set_key_offset(offset)
    faults = cache.new_faults()
    for counts in ([100, 37], [5, 1]):
        batch.append(counts)
        k, v = (torch.randn(heads, sum(counts), dim, device=device).bfloat16().transpose(0, 1) for _ in range(2))
        cache.store(k, v, batch, faults=faults)
    q = torch.randn(6, 8, dim, device=device).bfloat16()
    out, lse = cache.attention(q, batch, out_dtype="f32", lse=True, faults=faults)
    assert out.device == q.device and out.dtype == torch.float32
    faults.check()
    for s, rows, position, start in ((0, slice(0, 5), 100, 0), (1, slice(5, 6), 37, 3)):
        sequence = batch.sequences[s]
        raw = [x.cpu().numpy() for x in cache.load(sequence)]
        j = np.arange(cache.length(sequence))
        slots = np.array(cache.blocks(sequence))[j // 16] * 16 + j % 16
        slots = torch.from_numpy(slots).to(device)
        coded = [x.cpu().numpy() for x in codec.load(cache.pages[0], slots, key_offset=offset)]
        if extras:  # load gives raw what is kept raw, whole blocks; attention reads raw what is in range
            held = np.array(cache.exact_blocks(sequence))[j // 16] >= 0
            exact = held & ((j - start < first) | (j > position - recent))
            coded = [np.where(exact[:, None, None], x, y) for x, y in zip(raw, coded, strict=True)]
        queries = q[rows].float().cpu().numpy()
        expected, expected_lse = reference.attention(queries, *coded, first_position=position, start=start)
        # tqkv.h: within 3e-4 of the exact ones relative to the norm of all; rows may be smaller than others.
        assert reference.relative_error(out[rows].cpu().numpy(), expected) < 1e-3
        # Queries are rounded to 16-bit integers: 2^-15 of logits of up to 50 or so with the offset.
        assert np.allclose(lse[rows].cpu().numpy(), expected_lse, atol=3e-3)
