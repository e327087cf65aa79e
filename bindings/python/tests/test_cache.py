# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference

import tqkv

HEADS, DIM = 2, 32


@pytest.fixture(scope="module")
def codec():
    return tqkv.Codec("k4v4", head_dim=DIM, kv_heads=HEADS)


def draw(random, *shape):
    return random.standard_normal(shape).astype(np.float32)


class Model:
    """What a PagedCache is meant to do: every sequence has a list of its own tokens."""

    def __init__(self, cache):
        self.cache = cache
        self.tokens: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        # How many of the last tokens must be held raw; not known of what was taken back beyond rollback_tokens.
        self.recent: dict[int, int] = {}

    def check(self):
        codec = self.cache.codec
        for s, tokens in self.tokens.items():
            assert self.cache.length(s) == len(tokens)
            if not tokens:
                continue
            k, v = (np.stack(x) for x in zip(*tokens, strict=True))
            for layer in range(self.cache.num_layers):
                got_k, got_v = self.cache.load(s, layer)
                # A token's bytes depend on nothing but the token.
                expected_k = codec.decode(*codec.encode(k + layer, "k"), "k")
                expected_v = codec.decode(*codec.encode(v + layer, "v"), "v")
                if self.cache.exact_pages:
                    held = np.array(self.cache.exact_blocks(s))[np.arange(len(tokens)) // codec.exact_block_size] >= 0
                    expected_k = np.where(held[:, None, None], bf16(k + np.float32(layer)), expected_k)
                    expected_v = np.where(held[:, None, None], bf16(v + np.float32(layer)), expected_v)
                    recent = np.arange(len(tokens)) >= len(tokens) - self.recent.get(s, 0)
                    assert np.all(held | ~recent)
                assert np.array_equal(got_k, expected_k) and np.array_equal(got_v, expected_v)
        used = {b for s in self.tokens for b in self.cache.exact_blocks(s) if b >= 0}
        assert self.cache.num_free_exact_blocks == self.cache._exact_pool.count - len(used)
        used = {b for s in self.tokens for b in self.cache.blocks(s) if b >= 0}
        assert self.cache.num_free_blocks == self.cache._pool.count - len(used)


@pytest.mark.parametrize("exact", [False, True])
def test_random_histories(random, exact):
    """Append, fork, truncate, free and reorder in any order: every sequence always holds its own tokens."""
    codec = tqkv.Codec("k4v4", head_dim=DIM, kv_heads=HEADS, block_size=[1, 8, 16, 32][int(random.integers(4))])
    options = {"num_exact_blocks": 400, "exact_first_tokens": 3, "exact_recent_tokens": 12} if exact else {}
    cache = tqkv.PagedCache(codec, 4096 // codec.block_size, num_layers=2, **options)
    model = Model(cache)
    for s in (cache.allocate(), cache.allocate()):
        model.tokens[s], model.recent[s] = [], 0
    for _ in range(60):
        sequences = list(model.tokens)
        action = random.integers(10)
        if action < 6:
            chosen = [s for s in sequences if random.random() < 0.7] or sequences[:1]
            counts = [int(random.integers(0, 40 if random.random() < 0.2 else 4)) for _ in chosen]
            batch = cache.batch(chosen)
            batch.append(counts)
            k, v = draw(random, sum(counts), HEADS, DIM), draw(random, sum(counts), HEADS, DIM)
            for layer in range(2):
                cache.store(k + np.float32(layer), v + np.float32(layer), batch, layer)
            each = iter(zip(k, v, strict=True))
            for s, count in zip(chosen, counts, strict=True):
                model.tokens[s] += list(itertools.islice(each, count))
                if s in model.recent:
                    model.recent[s] = min(12, model.recent[s] + count)
        elif action == 6 and len(sequences) < 12:
            s = sequences[int(random.integers(len(sequences)))]
            length = int(random.integers(len(model.tokens[s]) + 1))
            model.tokens[cache.fork(s, length)] = model.tokens[s][:length]
        elif action == 7 and len(sequences) > 1:
            s = sequences[int(random.integers(len(sequences)))]
            cache.free(s)
            del model.tokens[s]
        elif action == 8:
            s = sequences[int(random.integers(len(sequences)))]
            length = int(random.integers(len(model.tokens[s]) + 1))
            cache.truncate(s, length)
            model.recent.pop(s, None)
            del model.tokens[s][length:]
        else:
            batch = cache.batch(sequences)
            indices = [int(random.integers(len(sequences))) for _ in range(len(sequences))]
            old = [(model.tokens[s], model.recent.get(s)) for s in sequences]
            batch.reorder(indices)
            model.tokens = {s: list(old[i][0]) for s, i in zip(batch.sequences, indices, strict=True)}
            new = zip(batch.sequences, indices, strict=True)
            model.recent = {s: recent for s, i in new if (recent := old[i][1]) is not None}
        model.check()
    for s in list(model.tokens):
        cache.free(s)
    assert cache.num_free_blocks == cache._pool.count and cache.bytes_in_use() == 0


OPTIONS = {
    "plain": {},
    "soft cap": {"soft_cap": 2.0},
    "scale": {"scale": 0.3},
    "window": {"window_tokens": 9},
    "not causal": {"causal": False},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": True},
    "split": {"split_tokens": 16},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_attention(codec, random, name):
    options = dict(OPTIONS[name])
    cache = tqkv.PagedCache(codec, 64)
    starts, old, new, q_heads = [0, 3, 0], [40, 17, 0], [3, 1, 20], 6
    batch = cache.batch([cache.allocate(start) for start in starts])
    if name in ("sinks", "alibi"):
        options[next(iter(options))] = draw(random, q_heads)
    for counts in (old, new):
        batch.append(counts)
        cache.store(draw(random, sum(counts), HEADS, DIM), draw(random, sum(counts), HEADS, DIM), batch)
    q = draw(random, sum(new), q_heads, DIM)
    faults = cache.new_faults()
    out, lse = cache.attention(q, batch, lse=True, faults=faults, **options)
    faults.check()
    at = 0
    for s, start, before, count in zip(batch.sequences, starts, old, new, strict=True):
        k, v = cache.load(s)
        expected, expected_lse = reference.attention(
            q[at : at + count], k, v, first_position=before, start=start,
            causal=options.get("causal", True), window=options.get("window_tokens", 0), scale=options.get("scale", 0.0),
            soft_cap=options.get("soft_cap", 0.0), sinks=options.get("sinks"), slopes=options.get("alibi_slopes"),
        )  # fmt: skip
        # f32 sums of up to 43 terms, and the sums of 32 products in a logit of size 10 at most: 2^-24 of each.
        assert reference.relative_error(out[at : at + count], expected) < 2e-5
        assert np.allclose(lse[at : at + count], expected_lse, rtol=1e-5, atol=1e-5)
        at += count


def test_new_tokens_are_read_raw(codec, random):
    cache = tqkv.PagedCache(codec, 64)
    batch = cache.batch([cache.allocate()])
    batch.append(30)
    cache.store(draw(random, 30, HEADS, DIM), draw(random, 30, HEADS, DIM), batch)
    old_k, old_v = cache.load(batch.sequences[0])
    batch.append(8)
    k, v, q = draw(random, 8, HEADS, DIM), draw(random, 8, HEADS, DIM), draw(random, 8, 4, DIM)
    out = cache.attention(q, batch, k_new=k, v_new=v)
    expected, _ = reference.attention(q, np.concatenate([old_k, k]), np.concatenate([old_v, v]), first_position=30)
    assert reference.relative_error(out, expected) < 2e-5


def test_exact_tokens(codec, random):
    first, recent = 5, 20
    cache = tqkv.PagedCache(
        codec, 64, num_exact_blocks=32, exact_first_tokens=first, exact_recent_tokens=recent, rollback_tokens=4
    )
    batch = cache.batch([cache.allocate(start=2)])
    k, v = draw(random, 200, HEADS, DIM), draw(random, 200, HEADS, DIM)
    coded_k, coded_v = codec.decode(*codec.encode(k, "k"), "k"), codec.decode(*codec.encode(v, "v"), "v")
    at = 0
    for count in [90, *[1] * 15, 7, *[1] * 20]:
        batch.append(count)
        cache.store(k[at : at + count], v[at : at + count], batch)
        q = draw(random, count, 4, DIM)
        out = cache.attention(q, batch)
        j = np.arange(at + count)
        # Of a chunk longer than `recent` only the last tokens have raw copies, and the block of the first ones.
        kept = (at + count - recent - 4) // 16 * 16 if count > recent else 0
        exact = (j - 2 < first) | ((j > at - recent) & ((j >= kept) | (j < 16)))
        # Exact pages are bf16.
        mixed = [
            np.where(exact[:, None, None], bf16(x[: len(j)]), y[: len(j)]) for x, y in ((k, coded_k), (v, coded_v))
        ]
        expected, _ = reference.attention(q, *mixed, first_position=at, start=2)
        assert reference.relative_error(out, expected) < 2e-5
        at += count
    held = [i for i, b in enumerate(cache.exact_blocks(batch.sequences[0])) if b >= 0]
    assert held[0] == 0 and len(held) <= 1 + 3 and cache.num_free_exact_blocks == 32 - len(held)
    batch.truncate(-4)
    batch.append(1)
    cache.store(k[:1], v[:1], batch)
    cache.attention(draw(random, 1, 4, DIM), batch)
    batch.free()
    assert cache.num_free_exact_blocks == 32 and cache.num_free_blocks == 64


def bf16(x):
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def test_windows_give_blocks_back(codec, random):
    cache = tqkv.PagedCache(codec, 8, window_tokens=40, rollback_tokens=3)
    batch = cache.batch([cache.allocate()])
    k, v = draw(random, 400, HEADS, DIM), draw(random, 400, HEADS, DIM)
    coded_k, coded_v = codec.decode(*codec.encode(k, "k"), "k"), codec.decode(*codec.encode(v, "v"), "v")
    for at in range(400):
        batch.append(1)
        cache.store(k[at : at + 1], v[at : at + 1], batch)
        if at % 7 == 0:
            q = draw(random, 1, 2, DIM)
            expected, _ = reference.attention(q, coded_k[: at + 1], coded_v[: at + 1], first_position=at, window=40)
            assert reference.relative_error(cache.attention(q, batch), expected) < 2e-5
    assert 8 - cache.num_free_blocks <= 4  # 40 tokens and 3 to roll back, in blocks of 16
    batch.truncate(-3)
    with pytest.raises(tqkv.InvalidArgument, match="given back"):
        cache.truncate(batch.sequences[0], 300)


def test_key_offset(codec, random):
    cache = tqkv.PagedCache(codec, 16, num_layers=2)
    offset = 5 * draw(random, HEADS, DIM)
    cache.set_key_offset(offset, 1)
    batch = cache.batch([cache.allocate()])
    batch.append(33)
    k, v, q = draw(random, 33, HEADS, DIM) + offset, draw(random, 33, HEADS, DIM), draw(random, 33, 2, DIM)
    cache.store(k, v, batch, 1)
    got, _ = cache.load(batch.sequences[0], 1)
    expected_k = codec.decode(*codec.encode(k - offset, "k"), "k") + offset
    assert np.allclose(got, expected_k, rtol=1e-6, atol=1e-6)
    expected, _ = reference.attention(q, got, cache.load(batch.sequences[0], 1)[1], first_position=0)
    # The offset's logits are of size 5 * sqrt(32) * 1.4: f32 products of that size.
    assert reference.relative_error(cache.attention(q, batch, 1), expected) < 1e-4
    with pytest.raises(tqkv.InvalidArgument, match="layer 1 has stored keys"):
        cache.set_key_offset(offset, 1)
    cache.set_key_offset(offset, 0)


def test_running_out_changes_nothing(codec, random):
    cache = tqkv.PagedCache(codec, 3)
    batch = cache.batch([cache.allocate(), cache.allocate()])
    batch.append([20, 10])
    cache.store(draw(random, 30, HEADS, DIM), draw(random, 30, HEADS, DIM), batch)
    before = cache.load(batch.sequences[0])[0].copy()
    with pytest.raises(tqkv.OutOfBlocks, match="1 coded blocks are needed, 0 of 3 are free"):
        batch.append(7)
    fork = cache.fork(batch.sequences[0])
    with pytest.raises(MemoryError):
        cache.batch([fork]).append(1)
    cache.free(fork)
    assert [cache.length(s) for s in batch.sequences] == [20, 10]
    assert np.array_equal(cache.load(batch.sequences[0])[0], before)
    batch.append([12, 6])


def test_padding_takes_no_memory(codec, random):
    cache = tqkv.PagedCache(codec, 4)
    batch = cache.batch([cache.allocate(start=35)])
    batch.append(40)
    assert list(batch.slots[:35]) == [-1] * 35 and cache.num_free_blocks == 3
    k = draw(random, 40, HEADS, DIM)
    cache.store(k, k, batch)
    assert np.all(cache.load(batch.sequences[0])[0][:35] == 0)
    out = cache.attention(draw(random, 40, HEADS, DIM), batch)
    assert np.all(out[:35] == 0) and np.all(np.any(out[35:], axis=-1))


def test_bound_calls_follow_the_arrays(codec, random):
    cache = tqkv.PagedCache(codec, 32)
    batch = cache.batch([cache.allocate(), cache.allocate()], max_length=100, max_new_tokens=2)
    with pytest.raises(tqkv.InvalidArgument, match="max_new_tokens"):
        batch.append(2)
    q, out = draw(random, 2, 4, DIM), np.zeros((2, 4, DIM), np.float32)
    batch.append(1)
    k = draw(random, 2, HEADS, DIM)
    cache.store(k, k, batch)
    bound = cache.bind_attention(q, batch, out=out)
    generation = batch.generation
    assert bound() is out
    for _ in range(99):
        batch.append(1)
        k = draw(random, 2, HEADS, DIM)
        cache.store(k, k, batch)
        q[...] = draw(random, *q.shape)
        bound()
        assert np.array_equal(out, cache.attention(q, batch))
    assert batch.generation == generation
    with pytest.raises(tqkv.InvalidArgument, match="max_length is 100"):
        batch.append(1)
    cache.codec.new_faults()


def test_layers_of_one_step(codec, random):
    """Calls that are remembered from layer to layer do what the first one does: other arrays, offsets and options."""
    cache = tqkv.PagedCache(codec, 32, num_layers=3, num_exact_blocks=16, exact_first_tokens=2, exact_recent_tokens=8)
    cache.set_key_offset(draw(random, HEADS, DIM), 1)
    batch = cache.batch([cache.allocate(), cache.allocate()])
    sinks = draw(random, 4)
    for count in (20, 1, 1):
        batch.append(count)
        for layer in range(3):
            tokens = 2 * count
            k, v, q = draw(random, tokens, HEADS, DIM), draw(random, tokens, HEADS, DIM), draw(random, tokens, 4, DIM)
            cache.store(k, v, batch, layer)
            assert len(batch._calls) == (1 if layer == 0 else 3)
            given = np.zeros((tokens, 4, DIM), np.float32)
            out, lse = cache.attention(q, batch, layer, lse=True, sinks=sinks)
            assert cache.attention(q, batch, layer, out=given) is given
            # What is not remembered: lists of options that say more.
            full = {"causal": True, "lse": np.zeros((tokens, 4), np.float32)}
            assert np.array_equal(given, cache.attention(q, batch, layer, **full)[0])
            slow, slow_lse = cache.attention(q, batch, layer, sinks=sinks, **full)
            assert np.array_equal(out, slow) and np.array_equal(lse, slow_lse)
            with pytest.raises(tqkv.InvalidArgument, match="last append"):
                cache.attention(q[:1], batch, layer)


def test_user_owned_tables(codec, random):
    """The calls below PagedCache: own memory, own tables, several strides, pairs to copy."""
    memory = np.zeros(codec.bytes(6) + 16, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :][: codec.bytes(6)]
    pages = tqkv.Pages(codec, memory)
    assert pages.num_blocks == 6 and pages.nbytes == codec.bytes(6)
    k, v = draw(random, 20, HEADS, DIM), draw(random, 20, HEADS, DIM)
    slots = np.array([4 * 16 + i for i in range(16)] + [1 * 16 + i for i in range(4)])
    codec.store(k, v, pages, slots)
    codec.copy(pages, np.array([[4, 2], [1, 0]]))
    loaded, _ = codec.load(pages, slots, v=False)
    copied, _ = codec.load(pages, np.where(slots >= 64, slots - 32, slots - 16))
    assert np.array_equal(loaded, copied)
    q = draw(random, 1, 4, DIM)
    lengths, table = np.array([20], np.int32), np.array([[2, 0, -1]], np.int32)
    out = codec.attention(q, pages, table, lengths)
    csr = codec.attention(
        q, pages, lengths=lengths, block_indptr=np.array([0, 2], np.int32), block_indices=np.array([4, 1], np.int32)
    )
    assert np.array_equal(out, csr)
    faults = codec.new_faults()
    out = codec.attention(q, pages, np.array([[9, 0]], np.int32), lengths, faults=faults)
    assert np.all(out == 0) and faults.read().block == 1


def test_refused_calls(codec, random):
    cache = tqkv.PagedCache(codec, 8)
    batch = cache.batch([cache.allocate()])
    batch.append(4)
    k, q = draw(random, 4, HEADS, DIM), draw(random, 4, 4, DIM)
    other = tqkv.PagedCache(tqkv.Codec("k4v4", head_dim=DIM, kv_heads=HEADS, seed=9), 8)
    cases = [
        (lambda: cache.store(k[:3], k, batch), tqkv.InvalidArgument, "v has 4 tokens, k 3"),
        (lambda: cache.store(k[:3], k[:3], batch), tqkv.InvalidArgument, r"slots has shape \[4\]"),
        (lambda: cache.store(k[:, :1], k, batch), tqkv.InvalidArgument, "k has shape"),
        (lambda: cache.store(k, k.astype(np.float16), batch), tqkv.InvalidType, "v is f16, k f32"),
        (lambda: cache.store(k, k, batch, layer=1), tqkv.InvalidArgument, "layer is 1"),
        (lambda: cache.attention(q[:3], batch), tqkv.InvalidArgument, "q has 3 tokens; the batch's last append had 4"),
        (lambda: cache.attention(q[:, :3], batch), tqkv.InvalidArgument, "q_heads is 3"),
        (lambda: cache.attention(q, batch, soft_cap=-1.0), tqkv.InvalidArgument, "soft_cap"),
        (lambda: cache.attention(q, batch, k_new=k), tqkv.InvalidArgument, "v_new is None"),
        (lambda: cache.attention(q, batch, sinks=np.zeros(3, np.float32)), tqkv.InvalidArgument, "sinks has shape"),
        (lambda: cache.attention(q, batch, out=np.zeros((4, 4, DIM), np.int16)), tqkv.InvalidType, "out is i16"),
        (lambda: codec.attention(q, cache.pages[0], batch.block_table), tqkv.InvalidArgument, "lengths is None"),
        (
            lambda: codec.attention(q, cache.pages[0], batch.block_table, np.array([4])),
            tqkv.InvalidType,
            "lengths is i64; it must be i32",
        ),
        (
            lambda: codec.attention(q[:1], k, batch.block_table, batch.lengths),
            tqkv.InvalidType,
            "it must be tqkv.Pages",
        ),
        (
            lambda: codec.store(k, k, other.pages[0], batch.slots),
            tqkv.FingerprintMismatch,
            "fingerprint",
        ),
        (lambda: cache.batch([0, 0]), tqkv.InvalidArgument, "twice"),
        (lambda: cache.batch([77]), tqkv.InvalidArgument, "sequence 77 does not exist"),
        (lambda: cache.truncate(0, 5), tqkv.InvalidArgument, "has 4 tokens"),
        (lambda: cache.fork(0, -1), tqkv.InvalidArgument, "length is -1"),
        (lambda: cache.append([0], [-1]), tqkv.InvalidArgument, "0 or more"),
        (lambda: batch.reorder([1]), tqkv.InvalidArgument, "1 rows"),
        (lambda: tqkv.Pages(codec, np.zeros(100, np.uint8), 3), tqkv.InvalidArgument, "holds 100 bytes; 3 blocks take"),
        (lambda: tqkv.PagedCache(codec, 8, exact_first_tokens=4), tqkv.InvalidArgument, "num_exact_blocks is 0"),
        (lambda: tqkv.PagedCache(codec, -1), tqkv.InvalidArgument, "num_blocks is -1"),
        (lambda: tqkv.PagedCache(codec, 1, library="tf"), tqkv.InvalidArgument, "library is 'tf'"),
    ]
    for call, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            call()
