# SPDX-License-Identifier: Apache-2.0
"""A CUDA device, through PyTorch's tensors and, where they are, CuPy's and JAX's arrays."""

from __future__ import annotations

import numpy as np
import pytest
import reference

import tqkv

pytestmark = pytest.mark.gpu

HEADS, DIM = 2, 64


@pytest.fixture
def torch():
    import torch

    return torch


@pytest.fixture(scope="module")
def codec():
    return tqkv.Codec("k4v4", head_dim=DIM, kv_heads=HEADS, device="cuda")


def test_the_cpu_s_bytes(torch, codec):
    cpu = tqkv.Codec("k4v4", head_dim=DIM, kv_heads=HEADS)
    assert cpu.fingerprint == codec.fingerprint and codec.device == "cuda:0"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(300, DIM, device="cuda").to(dtype)
        for side in ("k", "v"):
            codes, scales = codec.encode(x, side)
            expected = cpu.encode(x.cpu(), side)
            assert codes.is_cuda and torch.equal(codes.cpu(), expected[0]) and torch.equal(scales.cpu(), expected[1])
            y = codec.decode(codes, scales, side, dtype=dtype)
            assert torch.allclose(y.float().cpu(), cpu.decode(*expected, side), rtol=2**-7, atol=1e-3)


def test_no_hidden_synchronisation(torch, codec):
    """Everything of a decode step, tables included, while PyTorch forbids to wait."""
    cache = tqkv.PagedCache(codec, 64, library="torch", num_layers=2)
    batch = cache.batch([cache.allocate(), cache.allocate()])
    k = torch.randn(2, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(2, 4, DIM, device="cuda", dtype=torch.bfloat16)
    batch.append(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            batch.append(1)
            for layer in range(2):
                cache.store(k, k, batch, layer)
                cache.attention(q, batch, layer)
        batch.reorder([1, 1])
        batch.append(1)
        codec.decode(*codec.encode(k))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream(torch, codec):
    """Work is queued where the tensors' library says: behind a sleeping kernel of a side stream, nothing is done yet."""
    x, codes = torch.randn(64, DIM, device="cuda"), torch.zeros(64, DIM // 2, device="cuda", dtype=torch.uint8)
    scales = torch.zeros(64, device="cuda", dtype=torch.float16)
    expected = codec.encode(x)[0]
    assert expected.any().item()  # and loads what the test needs: a first use may wait for what the device does
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for explicit in (False, True):
        codes.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(1_000_000_000)  # about half a second
            if not explicit:
                codec.encode(x, codes=codes, scales=scales)
        if explicit:
            codec.encode(x, codes=codes, scales=scales, stream=side)
        assert not codes.any().item()  # read on another stream
        side.synchronize()
        assert torch.equal(codes, expected)


def test_graph(torch, codec):
    """A captured decode step, replayed while the sequences grow, against the same steps uncaptured."""

    def start():
        torch.manual_seed(3)
        cache = tqkv.PagedCache(codec, 64, library="torch")
        batch = cache.batch([cache.allocate(), cache.allocate()], max_length=200, max_new_tokens=64)
        batch.append([40, 20])
        k = torch.randn(60, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        cache.store(k, k, batch)
        batch.append(1)
        return cache, batch

    steps = [torch.randn(2, HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(30)]
    cache, batch = start()
    expected = []
    for i, x in enumerate(steps):
        if i:
            batch.append(1)
        cache.store(x, x, batch)
        expected.append(cache.attention(x.repeat_interleave(2, 1), batch).clone())

    cache, batch = start()
    x = torch.zeros_like(steps[0])
    q = torch.zeros(2, 2 * HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    bound = cache.bind_attention(q, batch)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        cache.store(x, x, batch)
        bound()
    generation = batch.generation
    for i, step in enumerate(steps):
        if i:
            batch.append(1)
        x.copy_(step)
        q.copy_(step.repeat_interleave(2, 1))
        graph.replay()
        assert torch.equal(bound.out, expected[i])
    assert batch.generation == generation


def test_refused(torch, codec):
    x = torch.zeros(4, DIM, device="cuda")
    with pytest.raises(tqkv.InvalidArgument, match="x is on the CPU, the codec on CUDA device 0"):
        codec.encode(x.cpu())
    with pytest.raises(tqkv.InvalidArgument, match="x is on the CPU"):
        codec.encode(np.zeros((4, DIM), np.float32))
    with pytest.raises(tqkv.InvalidArgument, match="x is on CUDA device 0, the codec on the CPU"):
        tqkv.Codec(head_dim=DIM).encode(x)
    with pytest.raises(tqkv.InvalidArgument, match="codes is on the CPU"):
        codec.encode(x, codes=torch.zeros(4, DIM // 2, dtype=torch.uint8))
    with pytest.raises(tqkv.NotSupported, match="NumPy"):
        tqkv.PagedCache(codec, 1, library="numpy")
    with pytest.raises(tqkv.TqError, match="device 63"):
        tqkv.Codec(head_dim=DIM, device="cuda:63")
    # head_dim 512 is stored, but attention on CUDA refuses it by name.
    odd = tqkv.Codec(head_dim=512, device="cuda")
    cache = tqkv.PagedCache(odd, 4, library="torch")
    batch = cache.batch([cache.allocate()])
    batch.append(1)
    with pytest.raises(tqkv.NotSupported, match="head_dim"):
        cache.attention(torch.zeros(1, 1, 512, device="cuda"), batch)


def test_cupy(torch, codec):
    cupy = pytest.importorskip("cupy")
    x = torch.randn(70, DIM, device="cuda")
    expected = codec.encode(x)
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        codes, scales = codec.encode(cupy.asarray(x))
        assert isinstance(codes, cupy.ndarray) and isinstance(scales, cupy.ndarray)
        y = codec.decode(codes, scales)
        stream.synchronize()
    assert np.array_equal(codes.get(), expected[0].cpu().numpy())
    assert np.array_equal(y.get(), codec.decode(*expected).cpu().numpy())
    cache = tqkv.PagedCache(codec, 8, library="cupy")
    batch = cache.batch([cache.allocate()])
    batch.append(20)
    k, q = (
        cupy.asarray(torch.randn(20, HEADS, DIM, device="cuda")),
        cupy.asarray(torch.randn(20, 4, DIM, device="cuda")),
    )
    cache.store(k, k, batch)
    out = cache.attention(q, batch)
    loaded = [a.get() for a in cache.load(batch.sequences[0])]
    expected_out, _ = reference.attention(q.get(), *loaded, first_position=0)
    assert reference.relative_error(out.get(), expected_out) < 1e-3


def test_jax(torch, codec):
    jax = pytest.importorskip("jax")
    x = jax.random.normal(jax.random.key(0), (70, DIM), dtype=jax.numpy.bfloat16)
    if x.devices().pop().platform != "gpu":
        pytest.skip("JAX sees no CUDA device")
    codes, _ = codec.encode(x)
    expected, _ = codec.encode(torch.from_dlpack(x))
    assert torch.equal(torch.as_tensor(codes, device="cuda"), expected)
    with pytest.raises(tqkv.InvalidArgument, match="read-only"):
        codec.decode(expected, torch.ones(70, device="cuda", dtype=torch.float16), out=x, dtype="bf16")
