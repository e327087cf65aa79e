# SPDX-License-Identifier: Apache-2.0
"""Sequences over pools of blocks: who owns which block, and the tables that the library's calls read."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from . import _arrays
from ._codec import BoundAttention, Codec, Faults, Pages
from ._lib import InvalidArgument, OutOfBlocks, check, functions

_NONE = -1

# Options of remembered calls: they decide numbers and pointers that stay as they are.
_REMEMBERED = frozenset(
    (
        "causal",
        "scale",
        "soft_cap",
        "window_tokens",
        "split_tokens",
        "sinks",
        "alibi_slopes",
        "lse",
        "out_dtype",
        "faults",
    )
)
_PLAIN = (bool, int, float, str, type(None))


class _Pool:
    """Reference counts of one kind of blocks."""

    def __init__(self, count: int, what: str):
        self.count = count
        self.what = what
        self.references = [0] * count
        self.free = list(range(count - 1, -1, -1))

    def take(self) -> int:
        block = self.free.pop()
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        if block != _NONE:
            self.references[block] += 1

    def drop(self, block: int) -> None:
        if block == _NONE:
            return
        self.references[block] -= 1
        if self.references[block] == 0:
            self.free.append(block)

    def require(self, needed: int) -> None:
        if needed > len(self.free):
            raise OutOfBlocks(f"{needed} {self.what} blocks are needed, {len(self.free)} of {self.count} are free")


class _Sequence:
    __slots__ = ("blocks", "exact", "length", "start")

    def __init__(self, start: int):
        self.start = start
        self.length = 0
        self.blocks: list[int] = []
        self.exact: list[int] = []


class _Growth:
    """What one sequence needs for its new tokens: [first, last) blocks that must be its own."""

    __slots__ = ("copy", "exact_copy", "exact_new", "new")

    def __init__(self) -> None:
        self.new: list[int] = []  # indices of blocks to take
        self.copy: int | None = None  # index of a shared block to copy first
        self.exact_new: list[int] = []
        self.exact_copy: int | None = None


class PagedCache:
    """Compressed keys and values of many sequences and layers in pools of blocks.

    One pool a layer, one table a sequence for all of them: block b means block b of every layer's pool. Blocks are
    reference-counted; what two sequences share is copied when one of them writes to it. All bookkeeping is on the host;
    the tables that calls read are a Batch's arrays on the device.

    With `num_exact_blocks` the first `exact_first_tokens` and the last `exact_recent_tokens` of every sequence are kept
    raw as well, and read so. `window_tokens`: sliding-window attention; blocks that no later query can see are given back.
    `rollback_tokens`: how many tokens `truncate` may take back before a window or the exact ones would miss some.
    """

    def __init__(
        self,
        codec: Codec,
        num_blocks: int,
        *,
        num_layers: int = 1,
        num_exact_blocks: int = 0,
        exact_first_tokens: int = 0,
        exact_recent_tokens: int = 0,
        window_tokens: int = 0,
        rollback_tokens: int = 0,
        library: str | None = None,
    ):
        for name, value, low in (
            ("num_blocks", num_blocks, 0),
            ("num_layers", num_layers, 1),
            ("num_exact_blocks", num_exact_blocks, 0),
            ("exact_first_tokens", exact_first_tokens, 0),
            ("exact_recent_tokens", exact_recent_tokens, 0),
            ("window_tokens", window_tokens, 0),
            ("rollback_tokens", rollback_tokens, 0),
        ):
            if value < low:
                raise InvalidArgument(f"{name} is {value}; it must be at least {low}")
        if (exact_first_tokens or exact_recent_tokens) and not num_exact_blocks:
            raise InvalidArgument("num_exact_blocks is 0, but exact tokens are asked for")
        self.codec = codec
        self.num_layers = num_layers
        self.exact_first_tokens = exact_first_tokens
        self.exact_recent_tokens = exact_recent_tokens
        self.window_tokens = window_tokens
        self.rollback_tokens = rollback_tokens
        self.array_library = _arrays.array_library(library, codec.device_tuple)
        self.pages = [codec.new_pages(num_blocks, "coded", self.array_library.name) for _ in range(num_layers)]
        self.exact_pages: list[Pages] = []
        if exact_first_tokens or exact_recent_tokens:
            self.exact_pages = [
                codec.new_pages(num_exact_blocks, "exact", self.array_library.name) for _ in range(num_layers)
            ]
        self._key_offsets: list[Any] = [None] * num_layers
        self._key_offset_pointers = [0] * num_layers
        self._stored = [False] * num_layers
        self._pool = _Pool(num_blocks, "coded")
        self._exact_pool = _Pool(num_exact_blocks if self.exact_pages else 0, "exact")
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0

    # ---- sequences

    def _sequence(self, sequence: int) -> _Sequence:
        found = self._sequences.get(sequence)
        if found is None:
            raise InvalidArgument(f"sequence {sequence} does not exist, or was freed")
        return found

    def allocate(self, start: int = 0) -> int:
        """A new, empty sequence. `start`: its first visible position; earlier ones, left padding, take no memory."""
        if start < 0:
            raise InvalidArgument(f"start is {start}; it must be at least 0")
        self._sequences[self._next] = _Sequence(start)
        self._next += 1
        return self._next - 1

    def fork(self, sequence: int, length: int | None = None) -> int:
        """A new sequence that shares the first `length` tokens (None: all). Nothing is copied before it is written to."""
        parent = self._sequence(sequence)
        length = parent.length if length is None else length
        if not 0 <= length <= parent.length:
            raise InvalidArgument(f"length is {length}; sequence {sequence} has {parent.length} tokens")
        self._require_visible(parent, sequence, length)
        new = self.allocate(parent.start)
        child = self._sequences[new]
        child.length = length
        child.blocks = parent.blocks[: -(-length // self.codec.block_size)]
        child.exact = parent.exact[: -(-length // self.codec.exact_block_size)]
        for block in child.blocks:
            self._pool.share(block)
        for block in child.exact:
            self._exact_pool.share(block)
        return new

    def free(self, sequence: int) -> None:
        """Ends a sequence and drops its blocks."""
        found = self._sequence(sequence)
        for block in found.blocks:
            self._pool.drop(block)
        for block in found.exact:
            self._exact_pool.drop(block)
        del self._sequences[sequence]

    def truncate(self, sequence: int, length: int) -> None:
        """Takes back all tokens from `length` on."""
        found = self._sequence(sequence)
        if not 0 <= length <= found.length:
            raise InvalidArgument(f"length is {length}; sequence {sequence} has {found.length} tokens")
        self._require_visible(found, sequence, length)
        keep = -(-length // self.codec.block_size)
        for block in found.blocks[keep:]:
            self._pool.drop(block)
        del found.blocks[keep:]
        keep = -(-length // self.codec.exact_block_size)
        for block in found.exact[keep:]:
            self._exact_pool.drop(block)
        del found.exact[keep:]
        found.length = length

    def _require_visible(self, found: _Sequence, sequence: int, length: int) -> None:
        if not self.window_tokens or length == 0:
            return
        first = max(found.start, length - self.window_tokens + 1, 0)
        if first < length and found.blocks[first // self.codec.block_size] == _NONE:
            raise InvalidArgument(
                f"length is {length}; the window's tokens from {first} on were given back (rollback_tokens is"
                f" {self.rollback_tokens})"
            )

    def length(self, sequence: int) -> int:
        return self._sequence(sequence).length

    def blocks(self, sequence: int) -> list[int]:
        """The sequence's blocks by position; -1 where it has none (left padding, or behind the window)."""
        return list(self._sequence(sequence).blocks)

    def exact_blocks(self, sequence: int) -> list[int]:
        return list(self._sequence(sequence).exact)

    @property
    def sequences(self) -> list[int]:
        return list(self._sequences)

    @property
    def num_free_blocks(self) -> int:
        return len(self._pool.free)

    @property
    def num_free_exact_blocks(self) -> int:
        return len(self._exact_pool.free)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pages.nbytes for pages in self.pages + self.exact_pages)

    def bytes_in_use(self) -> int:
        """Bytes of the blocks that sequences hold, over all layers."""
        coded = self.codec.layout("coded")
        used = (self._pool.count - len(self._pool.free)) * coded.block_size * coded.bytes_per_token
        if self.exact_pages:
            exact = self.codec.layout("exact")
            used += (self._exact_pool.count - len(self._exact_pool.free)) * exact.block_size * exact.bytes_per_token
        return used * self.num_layers

    # ---- growing

    def _keep_from(self, old: int, new: int) -> int:
        """First position whose raw copy is kept when a sequence grows from `old` to `new` tokens. Queries of the call at
        hand reach back from `old`, unless it is a long chunk, whose own tokens are better given as k_new."""
        keep = new - self.exact_recent_tokens - self.rollback_tokens
        if new - old <= self.exact_recent_tokens:
            keep = min(keep, old - self.exact_recent_tokens + 1)
        return keep

    def _exact_wanted(self, found: _Sequence, new: int, index: int) -> bool:
        size = self.codec.exact_block_size
        first, last = index * size, (index + 1) * size
        if last <= found.start:
            return False
        if first < found.start + self.exact_first_tokens:
            return True
        return self.exact_recent_tokens > 0 and last > self._keep_from(found.length, new)

    def _plan_growth(
        self, sequence: int, count: int, dropped: dict[int, int], exact_dropped: dict[int, int]
    ) -> _Growth:
        found, growth = self._sequence(sequence), _Growth()
        new, size = found.length + count, self.codec.block_size
        if count == 0:
            return growth

        def shared(pool: _Pool, dropped: dict[int, int], block: int) -> bool:
            if block == _NONE or pool.references[block] - dropped.get(block, 0) == 1:
                return False
            dropped[block] = dropped.get(block, 0) + 1
            return True

        if found.length % size and shared(self._pool, dropped, found.blocks[-1]):
            growth.copy = len(found.blocks) - 1
        growth.new = [i for i in range(len(found.blocks), -(-new // size)) if (i + 1) * size > found.start]
        if self.exact_pages:
            exact_size = self.codec.exact_block_size
            if found.length % exact_size and shared(self._exact_pool, exact_dropped, found.exact[-1]):
                growth.exact_copy = len(found.exact) - 1
            growth.exact_new = [
                i for i in range(len(found.exact), -(-new // exact_size)) if self._exact_wanted(found, new, i)
            ]
        return growth

    def append(
        self, sequences: Sequence[int], counts: Sequence[int]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Makes room for `counts[i]` new tokens of each sequence, and returns their slots and exact slots (int64, host,
        sequence after sequence; -1: not stored). Raises OutOfBlocks, and changes nothing, where blocks run out."""
        if len(set(sequences)) != len(sequences):
            raise InvalidArgument("sequences names one sequence twice")
        if len(counts) != len(sequences) or any(count < 0 for count in counts):
            raise InvalidArgument(f"counts is {list(counts)}; it must be one number, 0 or more, for each sequence")
        dropped: dict[int, int] = {}
        exact_dropped: dict[int, int] = {}
        plans = [self._plan_growth(s, n, dropped, exact_dropped) for s, n in zip(sequences, counts, strict=True)]
        self._pool.require(sum(len(p.new) + (p.copy is not None) for p in plans))
        self._exact_pool.require(sum(len(p.exact_new) + (p.exact_copy is not None) for p in plans))
        pairs: list[tuple[int, int]] = []
        exact_pairs: list[tuple[int, int]] = []
        slots: list[np.ndarray[Any, Any]] = []
        exact_slots: list[np.ndarray[Any, Any]] = []
        for s, count, plan in zip(sequences, counts, plans, strict=True):
            found = self._sequences[s]
            if count == 0:
                continue
            new = found.length + count
            self._grow(self._pool, found.blocks, plan.copy, plan.new, -(-new // self.codec.block_size), pairs)
            slots.append(self._slots_of(found.blocks, found.length, new, self.codec.block_size))
            slots[-1][: max(0, found.start - found.length)] = _NONE
            if self.exact_pages:
                size = self.codec.exact_block_size
                self._grow(self._exact_pool, found.exact, plan.exact_copy, plan.exact_new, -(-new // size), exact_pairs)
                exact_slots.append(self._slots_of(found.exact, found.length, new, size))
                exact_slots[-1][: max(0, found.start - found.length)] = _NONE
        self._copy(pairs, exact_pairs)
        for s, count in zip(sequences, counts, strict=True):
            if count:
                self._release(self._sequences[s], self._sequences[s].length + count)
                self._sequences[s].length += count
        empty = np.empty(0, np.int64)
        return np.concatenate(slots or [empty]), np.concatenate(exact_slots or [empty])

    @staticmethod
    def _grow(
        pool: _Pool, blocks: list[int], copy: int | None, new: list[int], count: int, pairs: list[tuple[int, int]]
    ) -> None:
        if copy is not None:
            block = pool.take()
            pairs.append((blocks[copy], block))
            pool.drop(blocks[copy])
            blocks[copy] = block
        blocks.extend([_NONE] * (count - len(blocks)))
        for index in new:
            blocks[index] = pool.take()

    @staticmethod
    def _slots_of(blocks: list[int], first: int, last: int, size: int) -> np.ndarray[Any, Any]:
        positions = np.arange(first, last)
        base = first // size
        table = np.array(blocks[base : -(-last // size)], np.int64)
        block = table[positions // size - base] if last > first else np.empty(0, np.int64)
        return np.where(block < 0, np.int64(_NONE), block * size + positions % size)

    def _copy(self, pairs: list[tuple[int, int]], exact_pairs: list[tuple[int, int]]) -> None:
        if not pairs and not exact_pairs:
            return
        coded = np.array(pairs, np.int64).reshape(-1, 2)
        exact = np.array(exact_pairs, np.int64).reshape(-1, 2)
        for layer in range(self.num_layers):
            options: dict[str, Any] = {}
            if exact_pairs:
                options = {"exact_src": self.exact_pages[layer], "exact_pairs": exact}
            self.codec.copy(self.pages[layer], coded, stream=self.array_library.stream(), **options)

    def _release(self, found: _Sequence, new: int) -> None:
        """Gives back what no later query of a sequence of `new` tokens sees. The call at hand may still read it: it is on
        the same stream as whoever writes to it next."""
        if self.window_tokens:
            size = self.codec.block_size
            # The call's first query, at the old length, sees what is above length - window.
            first = min(found.length, new - self.rollback_tokens) - self.window_tokens + 1
            self._drop_below(self._pool, found.blocks, max(0, first) // size, 0)
        if self.exact_pages and self.exact_recent_tokens:
            size = self.codec.exact_block_size
            first = max(0, self._keep_from(found.length, new)) // size
            self._drop_below(self._exact_pool, found.exact, first, -(-(found.start + self.exact_first_tokens) // size))

    @staticmethod
    def _drop_below(pool: _Pool, blocks: list[int], end: int, begin: int) -> None:
        index = min(end, len(blocks)) - 1
        while index >= begin and blocks[index] != _NONE:  # below the first gap all is given back already
            pool.drop(blocks[index])
            blocks[index] = _NONE
            index -= 1

    # ---- layers

    def _layer(self, layer: int) -> int:
        if not 0 <= layer < self.num_layers:
            raise InvalidArgument(f"layer is {layer}; there are {self.num_layers}")
        return layer

    def set_key_offset(self, offset: Any, layer: int = 0) -> None:
        """Sets a layer's key offset, f32 [kv_heads, head_dim_k] on the device, before its first store; it is kept and
        used by all calls of the layer."""
        if self._stored[self._layer(layer)]:
            raise InvalidArgument(f"layer {layer} has stored keys already; its key offset must stay as it is")
        shape = (self.codec.kv_heads, self.codec.head_dim_k)
        on = _arrays.current_stream(self.codec.device_tuple, None, offset)
        self._key_offset_pointers[layer] = self.codec._vector(offset, "offset", shape, "f32", on, [])
        self._key_offsets[layer] = offset

    def key_offset(self, layer: int = 0) -> Any:
        return self._key_offsets[self._layer(layer)]

    def batch(
        self, sequences: Iterable[int], *, max_length: int | None = None, max_new_tokens: int | None = None
    ) -> Batch:
        """Sequences that are stored and attended together; see Batch."""
        return Batch(self, sequences, max_length=max_length, max_new_tokens=max_new_tokens)

    # Between two changes of a batch its layers make the same calls on other memory. The first one is checked in full and
    # remembered by what decides the checks; later ones only set pointers.

    def _recall(self, batch: Batch, arrays: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        """The key of a call (None: not to be remembered), and what is remembered of it."""
        signatures = []
        for x in arrays:
            found = _arrays.signature(x)
            if found is None and x is not None:
                return None, None
            signatures.append(found)
        if not _REMEMBERED.issuperset(options):
            return None, None
        # Arrays among the options are the ones that were checked: what is remembered keeps them alive.
        key = (*signatures, *((name, x if isinstance(x, _PLAIN) else id(x)) for name, x in options.items()))
        return key, batch._calls.get(key)

    def _set_layer(self, args: Any, layer: int, library: _arrays.Library) -> Any:
        """Points a remembered call to a layer; returns what must live until the call is made."""
        args.stream = on = library.stream()
        args.pages = self.pages[layer].pointer
        if self.exact_pages:
            args.exact_pages = self.exact_pages[layer].pointer
        args.key_offset = self._key_offset_pointers[layer]
        if args.workspace_bytes == 0:
            return None
        workspace = library.empty((args.workspace_bytes,), "u8", on)
        args.workspace = _arrays.pointer(workspace, "workspace")
        return workspace

    def store(
        self,
        k: Any,
        v: Any,
        batch: Batch,
        layer: int = 0,
        *,
        dtype: Any = None,
        faults: Faults | None = None,
        workspace: Any = None,
        stream: Any = None,
    ) -> None:
        """Stores the tokens of the batch's last append: k [tokens, kv_heads, head_dim_k], v likewise, sequence after
        sequence."""
        self._layer(layer)
        key = call = None
        if dtype is None and workspace is None and stream is None:
            key, call = self._recall(batch, (k, v), {"faults": faults})
        if call is not None:
            args, library, _ = call
            args.k, args.v = _arrays.pointer(k, "k"), _arrays.pointer(v, "v")
            memory = self._set_layer(args, layer, library)
            check(functions.cache_store(self.codec.handle, ctypes.byref(args)))
            del memory
        else:
            args, keep = self.codec._store_args(
                k,
                v,
                self.pages[layer],
                batch.slots,
                self.exact_pages[layer] if self.exact_pages else None,
                batch.exact_slots if self.exact_pages else None,
                self._key_offsets[layer],
                dtype,
                faults,
                workspace,
                stream,
            )
            check(functions.cache_store(self.codec.handle, ctypes.byref(args)))
            if key is not None:
                batch._calls[key] = (args, _arrays.array_library_of(keep[0], self.codec.device_tuple), faults)
        self._stored[layer] = True

    def load(
        self, sequence: int, layer: int = 0, first: int = 0, last: int | None = None, **options: Any
    ) -> tuple[Any, Any]:
        """Keys and values [tokens, kv_heads, head_dim] of a sequence's positions [first, last), raw where they are kept
        raw. Rows before its start and behind its window are zero. Options: dtype, k, v, faults, stream."""
        found = self._sequence(sequence)
        last = found.length if last is None else last
        if not 0 <= first <= last <= found.length:
            raise InvalidArgument(
                f"[{first}, {last}) is no range of sequence {sequence}, which has {found.length} tokens"
            )
        slots = self._slots_of(found.blocks, first, last, self.codec.block_size)
        slots[: max(0, found.start - first)] = _NONE
        if "k" not in options or "v" not in options:
            kind = _arrays.type_name(options.get("dtype") or "f32")
            shape = (last - first, self.codec.kv_heads)
            for name, dim in (("k", self.codec.head_dim_k), ("v", self.codec.head_dim_v)):
                options.setdefault(name, self.array_library.zeros((*shape, dim), kind))
            options["dtype"] = kind
        if self.exact_pages:
            exact = self._slots_of(found.exact, first, last, self.codec.exact_block_size)
            exact[: max(0, found.start - first)] = _NONE
            options.update(exact_pages=self.exact_pages[self._layer(layer)], exact_slots=self._upload(exact))
        return self.codec.load(
            self.pages[self._layer(layer)], self._upload(slots), key_offset=self._key_offsets[layer], **options
        )

    def _upload(self, values: np.ndarray[Any, Any]) -> Any:
        memory = self.array_library.empty((values.nbytes,), "u8")
        self.array_library.upload(memory, np.ascontiguousarray(values).view(np.uint8).reshape(-1))
        return self.array_library.reinterpret(memory, 0, values.shape, _arrays.type_name(values.dtype))

    def _attention_options(self, q: Any, batch: Batch, layer: int, options: dict[str, Any]) -> dict[str, Any]:
        tokens = getattr(q, "shape", (batch.num_tokens,))[0]
        if tokens != batch.num_tokens:
            raise InvalidArgument(f"q has {tokens} tokens; the batch's last append had {batch.num_tokens}")
        options.setdefault("causal", True)
        options.setdefault("key_offset", self._key_offsets[self._layer(layer)])
        options.setdefault("window_tokens", self.window_tokens)
        options.setdefault("max_length_tokens", batch.max_length)
        if batch.has_starts:
            options.setdefault("starts", batch.starts)
        if not batch.one_token_each:
            options.setdefault("cu_seqlens_q", batch.cu_seqlens_q)
            options.setdefault("max_q_len", batch.max_q_len)
        if self.exact_pages:
            options.setdefault("exact_pages", self.exact_pages[layer])
            options.setdefault("exact_table", batch.exact_table)
            options.setdefault("exact_first_tokens", self.exact_first_tokens)
            options.setdefault("exact_recent_tokens", self.exact_recent_tokens)
        return options

    def attention(self, q: Any, batch: Batch, layer: int = 0, **options: Any) -> Any:
        """Attention of the tokens of the batch's last append, q [tokens, q_heads, head_dim_k], over their sequences. All
        options of Codec.attention; causal by default; table, lengths, starts, window, exact pages and key offset are the
        cache's."""
        self._layer(layer)
        out = options.get("out")
        arrays = (q, options.get("k_new"), options.get("v_new"), out)
        rest = {name: x for name, x in options.items() if name not in ("k_new", "v_new", "out")}
        key = call = None
        if isinstance(rest.get("lse"), (bool, type(None))):
            key, call = self._recall(batch, arrays, rest)
        if call is None:
            bound = self.bind_attention(q, batch, layer, **options)
            check(functions.paged_attention(self.codec.handle, bound.args_pointer))
            if key is not None:
                kind = _arrays.view(bound.out, "out").dtype
                sums = None if bound.lse is None else bound.lse.shape
                batch._calls[key] = (bound.args, bound.array_library, bound.out.shape, kind, sums, rest)
            return bound.out if bound.lse is None else (bound.out, bound.lse)
        args, library, shape, kind, sums, _ = call
        for name, x in zip(("q", "k_new", "v_new"), arrays, strict=False):
            if x is not None:
                setattr(args, name, _arrays.pointer(x, name))
        workspace = self._set_layer(args, layer, library)
        if out is None:
            out = library.empty(shape, kind, args.stream)
        args.out = _arrays.pointer(out, "out")
        lse = None
        if sums is not None:
            lse = library.empty(sums, "f32", args.stream)
            args.lse = _arrays.pointer(lse, "lse")
        check(functions.paged_attention(self.codec.handle, ctypes.byref(args)))
        del workspace
        return out if lse is None else (out, lse)

    def bind_attention(self, q: Any, batch: Batch, layer: int = 0, **options: Any) -> BoundAttention:
        """The same call with its pointers set once; see Codec.bind_attention. It holds as long as the batch's arrays stay
        where they are (`batch.generation`): give the batch a max_length and max_new_tokens."""
        options = self._attention_options(q, batch, layer, options)
        return self.codec.bind_attention(q, self.pages[layer], batch.block_table, batch.lengths, **options)

    def new_faults(self) -> Faults:
        return self.codec.new_faults(self.array_library.name)


class Batch:
    """Sequences of a PagedCache that are stored and attended together, and their tables as arrays on the device:

        slots, exact_slots   int64 [num_tokens]: where the tokens of the last append are stored
        lengths, starts      int32 [sequences]
        cu_seqlens_q         int32 [sequences + 1]
        block_table          int32 [sequences, columns]
        exact_table          int32 [sequences, exact columns]

    They are rewritten in place, by one asynchronous copy on the current stream, when the batch changes. They move, and
    `generation` grows, only where they become too small: never with `max_length` (tokens of a sequence) and
    `max_new_tokens` (of all sequences in one append), as a captured graph needs. Sequences that are changed through the
    cache need an `update`.
    """

    def __init__(
        self, cache: PagedCache, sequences: Iterable[int], *, max_length: int | None, max_new_tokens: int | None
    ):
        self.cache = cache
        self.sequences = list(sequences)
        if len(set(self.sequences)) != len(self.sequences):
            raise InvalidArgument("sequences names one sequence twice")
        self._fixed_length, self._fixed_tokens = max_length, max_new_tokens
        self._columns = self._exact_columns = self._max_tokens = 0
        self.generation = 0
        self.num_tokens = 0
        self.max_q_len = self.max_length = 0
        self.counts = [0] * len(self.sequences)
        self._host: dict[str, np.ndarray[Any, Any]] = {}
        self._device: dict[str, Any] = {}
        self._table_rows: list[list[int] | None] = []
        self._calls: dict[Any, Any] = {}
        self.has_starts = self.one_token_each = False
        empty = np.empty(0, np.int64)
        self._publish(empty, empty)

    # ---- changing

    def append(self, counts: int | Sequence[int] = 1) -> None:
        """Makes room for new tokens: `counts` for each sequence, or one count for all."""
        each = [counts] * len(self.sequences) if isinstance(counts, int) else [int(n) for n in counts]
        self._check_bounds(each)
        slots, exact_slots = self.cache.append(self.sequences, each)
        self.counts = each
        self._publish(slots, exact_slots)

    def _check_bounds(self, counts: list[int]) -> None:
        if self._fixed_tokens is not None and sum(counts) > self._fixed_tokens:
            raise InvalidArgument(f"counts is {counts}; max_new_tokens is {self._fixed_tokens}")
        if self._fixed_length is not None and len(counts) == len(self.sequences):
            for s, n in zip(self.sequences, counts, strict=True):
                if self.cache.length(s) + n > self._fixed_length:
                    raise InvalidArgument(
                        f"sequence {s} would have {self.cache.length(s) + n} tokens; max_length is {self._fixed_length}"
                    )

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Takes back tokens: the new length of each sequence, or one for all; a negative one takes back that many."""
        each = [lengths] * len(self.sequences) if isinstance(lengths, int) else list(lengths)
        if len(each) != len(self.sequences):
            raise InvalidArgument(f"lengths has {len(each)} numbers; the batch has {len(self.sequences)} sequences")
        for s, length in zip(self.sequences, each, strict=True):
            self.cache.truncate(s, length if length >= 0 else self.cache.length(s) + length)
        self.update()

    def reorder(self, indices: Sequence[int]) -> None:
        """Row i becomes a fork of the former row indices[i] (beam search); rows that nobody took are freed."""
        old = self.sequences
        indices = [int(i) for i in indices]
        if any(not 0 <= i < len(old) for i in indices):
            raise InvalidArgument(f"indices is {indices}; the batch has {len(old)} rows")
        taken: set[int] = set()
        rows = []
        for i in indices:
            rows.append(self.cache.fork(old[i]) if i in taken else old[i])
            taken.add(i)
        for i, s in enumerate(old):
            if i not in taken:
                self.cache.free(s)
        self.sequences = rows
        self.update()

    def free(self) -> None:
        """Frees all sequences."""
        for s in self.sequences:
            self.cache.free(s)
        self.sequences = []
        self.update()

    def update(self) -> None:
        """Rewrites the tables after sequences were changed through the cache. The batch then has no new tokens."""
        self.counts = [0] * len(self.sequences)
        empty = np.empty(0, np.int64)
        self._publish(empty, empty)

    # ---- the arrays

    def _reserve(self, tokens: int, length: int) -> None:
        codec = self.cache.codec
        seqs = len(self.sequences)
        length, tokens = self._fixed_length or length, self._fixed_tokens or tokens
        columns, exact_columns = -(-length // codec.block_size), -(-length // codec.exact_block_size)
        if not self.cache.exact_pages:
            exact_columns = 0
        fits = columns <= self._columns and exact_columns <= self._exact_columns and tokens <= self._max_tokens
        if self._host and fits and self._host["lengths"].shape[0] == seqs:
            return
        if self._fixed_length is None:  # room to grow into: half as much again
            columns, exact_columns = (
                columns + columns // 2 + 8,
                (exact_columns + exact_columns // 2 + 8) * bool(exact_columns),
            )
        if self._fixed_tokens is None:
            tokens = max(tokens, seqs, self._max_tokens)
        self._columns, self._exact_columns, self._max_tokens = columns, exact_columns, tokens
        shapes = {
            "slots": ("i64", (tokens,)),
            "exact_slots": ("i64", (tokens if self.cache.exact_pages else 0,)),
            "lengths": ("i32", (seqs,)),
            "starts": ("i32", (seqs,)),
            "cu_seqlens_q": ("i32", (seqs + 1,)),
            "block_table": ("i32", (seqs, columns)),
            "exact_table": ("i32", (seqs, exact_columns)),
        }
        offsets, total = {}, 0
        for name, (dtype, shape) in shapes.items():
            if name == "block_table":
                self._tables_at = total
            offsets[name] = total
            total += -(-int(np.prod(shape)) * _arrays.ITEM_BYTES[dtype] // 16) * 16
        self._host_memory = np.zeros(total, np.uint8)
        self._device_memory = self.cache.array_library.empty((total,), "u8")
        host = {"i64": np.int64, "i32": np.int32}
        for name, (dtype, shape) in shapes.items():
            first, count = offsets[name], int(np.prod(shape)) * _arrays.ITEM_BYTES[dtype]
            self._host[name] = self._host_memory[first : first + count].view(host[dtype]).reshape(shape)
            self._device[name] = self.cache.array_library.reinterpret(self._device_memory, first, shape, dtype)
        self._host["block_table"][...] = _NONE
        self._host["exact_table"][...] = _NONE
        self._table_rows = []
        self.generation += 1

    def _publish(self, slots: np.ndarray[Any, Any], exact_slots: np.ndarray[Any, Any]) -> None:
        cache = self.cache
        self._calls.clear()
        found = [cache._sequence(s) for s in self.sequences]
        self._reserve(len(slots), max([f.length for f in found], default=0))
        host = self._host
        self.num_tokens, self.max_q_len = len(slots), max(self.counts, default=0)
        # The host's bound on lengths: a fixed one where calls are to be captured and replayed.
        self.max_length = self._fixed_length or max([f.length for f in found], default=0)
        host["slots"][: len(slots)] = slots
        host["slots"][len(slots) :] = _NONE
        host["exact_slots"][: len(exact_slots)] = exact_slots
        host["exact_slots"][len(exact_slots) :] = _NONE
        host["lengths"][:] = [f.length for f in found]
        host["starts"][:] = [f.start for f in found]
        host["cu_seqlens_q"][1:] = np.cumsum(self.counts, dtype=np.int32)
        self.has_starts = any(f.start for f in found)
        self.one_token_each = all(count == 1 for count in self.counts)
        changed = False
        rows = [f.blocks + f.exact for f in found]
        for i, f in enumerate(found):
            if i < len(self._table_rows) and self._table_rows[i] == rows[i]:
                continue
            changed = True
            for name, blocks in (("block_table", f.blocks), ("exact_table", f.exact)):
                row = host[name][i]
                row[: len(blocks)] = blocks
                row[len(blocks) :] = _NONE
        self._table_rows = list(rows)
        end = len(self._host_memory) if changed else self._tables_at
        if end:
            cache.array_library.upload(self._device_memory[:end], self._host_memory[:end])

    @property
    def slots(self) -> Any:
        return self._device["slots"][: self.num_tokens]

    @property
    def exact_slots(self) -> Any:
        return self._device["exact_slots"][: self.num_tokens]

    @property
    def lengths(self) -> Any:
        return self._device["lengths"]

    @property
    def starts(self) -> Any:
        return self._device["starts"]

    @property
    def cu_seqlens_q(self) -> Any:
        return self._device["cu_seqlens_q"]

    @property
    def block_table(self) -> Any:
        return self._device["block_table"]

    @property
    def exact_table(self) -> Any:
        return self._device["exact_table"]
