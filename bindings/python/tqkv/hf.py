# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers on compressed pages.

    cache = TqCache.for_model(model, preset="k4v4")
    model.generate(**inputs, past_key_values=cache)

`for_model` switches the model to an attention function that reads a TqCache's pages; with any other cache, or none, the
model runs as before. A step's own prompt tokens are read as they are and stored compressed; a decode step stores its
token and attends to pages alone.

All layers share one block table (layers with a sliding window have one of their own, a ring). Tables, lengths and slots
are device memory that is updated in place by kernels that read no host value, so a decode step can be captured as a
CUDA graph (`TqCache.capture`).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
    chunked_overlay,
    sliding_window_overlay,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from . import _lib
from ._arrays import torch_stream
from ._codec import Codec
from ._lib import InvalidArgument, NotSupported, check, functions, new

__all__ = ["TqCache", "TqGraph"]

_BLOCK = 16  # tokens of a block, coded and exact
_GROW = 256  # tokens of room that an allocation leaves
_TYPES = {torch.float32: _lib.TYPES["f32"], torch.float16: _lib.TYPES["f16"], torch.bfloat16: _lib.TYPES["bf16"]}


def _blocks(tokens: int) -> int:
    return -(-tokens // _BLOCK)


@functools.cache
def _codec(**options: Any) -> Codec:
    """Codecs are immutable and live as long as the process: layers and caches share them.

    Codes get the unbiased scale, unlike the library's default, which single layers' errors chose. In a whole model the
    errors of all layers have one direction where scales are too small, and add up. A small model's KL, and what its text
    takes more than uncompressed, in bits a byte, with offset and exact ranges: k4v4 .00016 and .0008 by default, .00016
    and .0004 with the unbiased scale; k3v3 .00072 and .0029, .00064 and .0017; k2v2 .0057, .0030.
    """
    codec = Codec(**options)
    rules: dict[str, Any] = {
        side: {"scale_rule": "unbiased"} for side in ("k", "v") if getattr(codec.info, side).bits <= 4
    }
    if rules:
        codec = Codec(**options, **rules)
    return codec


# ------------------------------------------------------------------------------------------------------- tables --


class _Tables:
    """Block table of the layers that keep the same tokens: all of them, or those of a window.

    Each row (sequence) owns `ring` blocks of every layer's pool, numbered by `owned`. Column c of the table (tokens 16
    c to 16 c + 15) is written in the block owned[:, c % ring]; without a window ring counts all columns. Beams share: a
    reordering permutes the table's finished columns, and copies the unfinished one to the spare blocks, which then
    change roles with those that held it. Columns before `shared` may name blocks of other rows.
    """

    def __init__(self, window: int | None, rollback: int):
        self.window = window
        # The ring holds the window of the next query, its own token, and what a crop may take back. A block is used
        # again as a whole, so one more.
        self.limit = None if window is None else _blocks(window + rollback) + 1
        self.layers: list[TqLayer] = []
        self.rows = self.ring = self.columns = self.shared = 0
        self.table: Any = None
        self.owned: Any = None
        self.spare: Any = None
        self.step_slots: Any = None
        self.chunk_slots: Any = None
        self.moved = False  # whether a block may be elsewhere than a new table has it

    @property
    def pool_blocks(self) -> int:
        return self.rows * (self.ring + 1)

    def resize(self, cache: TqCache, rows: int, columns: int, select: torch.Tensor | None = None) -> None:
        """Makes new tables, moves what is cached. `select`: old row of each new one; None: the same."""
        device = cache.device
        ring = columns if self.limit is None else min(columns, self.limit)
        blocks = torch.arange(rows * ring, dtype=torch.int32, device=device).view(rows, ring)
        columns_all = torch.arange(columns, device=device)
        used = _blocks(cache.seen)
        old_table, old_rows, old_ring = (self.table, self.rows, self.ring) if self.rows else (None, 0, 0)
        live = columns_all[max(0, used - old_ring) : used]
        same = select is None and rows == old_rows
        simple = same and not self.moved
        sources: Any = None
        targets: Any = None
        if old_table is not None and live.numel() > 0 and not simple:
            picked = old_table if select is None else old_table.index_select(0, select)
            sources = picked.index_select(1, live).reshape(-1)
            targets = blocks.index_select(1, live % ring).reshape(-1)
        self.rows, self.ring, self.columns = rows, ring, columns
        if old_table is not None and same and ring == old_ring:  # more columns of a ring: the blocks stay
            self.table = self.owned.index_select(1, columns_all % ring)
            self.table[:, : old_table.shape[1]] = old_table
            return
        self.shared, self.moved = 0, False
        self.owned = blocks
        self.spare = torch.arange(rows * ring, rows * (ring + 1), dtype=torch.int32, device=device)
        self.table = blocks.index_select(1, columns_all % ring).contiguous()
        for layer in self.layers:
            if not layer.is_initialized:
                continue
            size, old_pool = layer.block_bytes, layer.pool
            layer.allocate_pool()
            if old_table is not None and used > 0:
                old, fresh = old_pool.view(-1, size), layer.pool.view(-1, size)
                if simple:
                    held = min(old_ring, ring)
                    fresh[: rows * ring].view(rows, ring, size)[:, :held].copy_(
                        old[: rows * old_ring].view(rows, old_ring, size)[:, :held]
                    )
                else:
                    fresh.index_copy_(0, targets.long(), old.index_select(0, sources))

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 [rows, positions]."""
        blocks = self.table.index_select(1, positions >> 4)
        return torch.add(positions & 15, blocks, alpha=_BLOCK)

    def reset(self) -> None:
        self.shared = 0
        self.table.copy_(self.owned.index_select(1, torch.arange(self.columns, device=self.table.device) % self.ring))

    def _renew(self, cache: TqCache, column: int, sources: torch.Tensor) -> None:
        """Gives every row a block of its own for a column: the spare ones, which become the column's own."""
        pairs = torch.stack([sources, self.spare], dim=1).long()
        for layer in self.layers:
            layer.copy(pairs)
        place = column % self.ring
        retired = self.owned[:, place].clone()
        self.owned[:, place] = self.spare
        self.spare.copy_(retired)
        self.table[:, column :: self.ring] = self.owned[:, place, None]
        self.moved = True

    def reorder(self, cache: TqCache, rows: torch.Tensor) -> None:
        column, rest = divmod(cache.seen, _BLOCK)
        if rest:
            self._renew(cache, column, self.table[:, column].index_select(0, rows))
        first = max(0, column - self.ring)
        self.table[:, first:column] = self.table[:, first:column].index_select(0, rows)
        self.shared, self.moved = column, True

    def crop(self, cache: TqCache, length: int) -> None:
        column, rest = divmod(length, _BLOCK)
        if column >= self.shared:
            return
        after = torch.arange(column + bool(rest), self.columns, device=self.table.device)
        self.table[:, column + bool(rest) :] = self.owned.index_select(1, after % self.ring)
        if rest:
            self._renew(cache, column, self.table[:, column].clone())
        self.shared = column


# ------------------------------------------------------------------------------------------------------- layers --


class TqLayer(CacheLayerMixin):  # type: ignore[misc]
    """One attention layer of a TqCache."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: TqCache, index: int, window: int | None, raw: bool):
        super().__init__()
        self.cache = cache
        self.index = index
        self.window = window
        self.is_sliding = window is not None
        self.raw = raw
        self.seen = 0
        self.codec: Any = None
        self.tables: Any = None
        self.pool: Any = None
        self.exact_pool: Any = None
        self.exact = False
        self.keys: Any = None
        self.values: Any = None
        self.offset: Any = None
        self._calls: list[tuple[Any, ...]] = []
        self._bound: Any = None
        self._sinks: Any = None
        self._sinks_of: Any = None

    # ---- what transformers asks of a layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.update(key_states, value_states, self.index)

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.cache.max_tokens is None else self.cache.max_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    # ---- memory

    def prepare(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """At the first tokens, when shapes are known."""
        cache = self.cache
        options = {"preset": "raw"} if self.raw else dict(cache.codec_options)
        self.kv_heads, self.head_dim_k, self.head_dim_v = key.shape[1], key.shape[3], value.shape[3]
        self.codec = _codec(
            head_dim=self.head_dim_k,
            head_dim_v=self.head_dim_v,
            kv_heads=self.kv_heads,
            block_size=_BLOCK,
            exact_block_size=_BLOCK,
            raw_type="f16" if key.dtype == torch.float16 else "bf16",
            device=str(key.device),
            **options,
        )
        self.handle = self.codec.handle
        self.coded = self.codec.info.k.bits != 16 or self.codec.info.v.bits != 16
        layout = self.codec.layout()
        self.block_bytes = layout.block_stride_bytes
        self.pages = new(_lib.PagesStruct, fingerprint=layout.fingerprint)
        self.exact = self.coded and cache.exact_blocks > 0
        self.exact_pages = new(_lib.PagesStruct, fingerprint=self.codec.layout("exact").fingerprint)
        self.exact_block_bytes = self.codec.layout("exact").block_stride_bytes
        self.is_initialized = True
        self.allocate_pool()
        self.allocate_exact(cache.rows)
        self.allocate_offset(cache.rows)

    def allocate_pool(self) -> None:
        count = self.tables.pool_blocks
        self.pool = self.cache._bytes(count * self.block_bytes)
        self.pages.base, self.pages.num_blocks = self.pool.data_ptr(), count

    def allocate_exact(self, rows: int, select: torch.Tensor | None = None) -> None:
        if not self.exact:
            return
        size = self.cache.exact_blocks * self.exact_block_bytes
        pool = self.cache._bytes(rows * size)
        if select is not None:
            pool.view(rows, size).copy_(self.exact_pool.view(-1, size).index_select(0, select))
        self.exact_pool = pool
        self.exact_pages.base, self.exact_pages.num_blocks = pool.data_ptr(), rows * self.cache.exact_blocks

    def allocate_offset(self, rows: int, select: torch.Tensor | None = None) -> None:
        """One offset, or one a row."""
        mode = self.cache.key_offset
        if not self.coded or mode is None or self.codec.info.k.bits == 16:
            return
        count = rows if mode == "sequence" else 1
        if self.offset is None or self.offset.shape[0] != count:
            fresh = torch.zeros(count, self.kv_heads, self.head_dim_k, dtype=torch.float32, device=self.cache.device)
            if self.offset is not None and select is not None:
                fresh.copy_(self.offset.index_select(0, select))
            self.offset = fresh
        elif select is not None and mode == "sequence":
            self.offset.copy_(self.offset.index_select(0, select))

    def learn_offset(self, key: torch.Tensor) -> None:
        """Mean of the first chunk's keys, without padding and without those that are kept exact."""
        cache = self.cache
        if self.offset is None:
            return
        self.offset.zero_()
        first = cache.exact_first_tokens if self.exact else 0
        if key.shape[2] < max(32, 2 * first):
            return  # so few keys say nothing of those to come; the offset stays zero
        if cache.padded:
            seen = torch.arange(key.shape[2], device=key.device) >= (cache.starts + first)[:, None]  # [rows, tokens]
            total = key.masked_fill(~seen[:, None, :, None], 0).sum(2, dtype=torch.float32)
            count = seen.sum(1, dtype=torch.float32)[:, None, None]
        else:
            total = key[:, :, first:].sum(2, dtype=torch.float32)
            count = torch.full_like(total[:, :1, :1], key.shape[2] - first)
        if cache.key_offset == "sequence":
            torch.div(total, count.clamp_min(1), out=self.offset)
        else:
            torch.div(total.sum(0, keepdim=True), count.sum(0, keepdim=True).clamp_min(1), out=self.offset)

    def copy(self, pairs: torch.Tensor) -> None:
        args = new(_lib.CopyArgs, pairs=pairs.data_ptr(), num_pairs=pairs.shape[0])
        args.src = ctypes.pointer(self.pages)
        args.faults, args.stream = self.cache.faults_pointer, self.cache._stream()
        check(functions.cache_copy(self.handle, ctypes.byref(args)))

    # ---- calls

    def _rows(self, x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """[rows, heads, tokens, channels] as rows * tokens tokens: the tensor, token and head stride."""
        rows, _, tokens, _ = x.shape
        if x.stride(3) != 1 or (rows > 1 and tokens > 1 and x.stride(0) != tokens * x.stride(2)):
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        return x, x.stride(0) if tokens == 1 else x.stride(2), x.stride(1)

    def _spans(self) -> list[tuple[int, int]]:
        """Rows that share a key offset."""
        rows = self.cache.rows
        if self.cache.key_offset == "sequence" and self.offset is not None:
            return [(row, 1) for row in range(rows)]
        return [(0, rows)]

    def _offset_pointer(self, row: int) -> int | None:
        if self.offset is None:
            return None
        return int(self.offset.data_ptr()) + (row * self.offset.stride(0) * 4 if self.offset.shape[0] > 1 else 0)

    def _store_args(
        self, row: int, count: int, tokens: int, slots: torch.Tensor, exact_slots: torch.Tensor | None
    ) -> Any:
        args = new(_lib.StoreArgs, num_tokens=count * tokens)
        args.pages = ctypes.pointer(self.pages)
        args.slots = slots.data_ptr() + row * tokens * 8
        if self.exact and exact_slots is not None:
            args.exact_pages = ctypes.pointer(self.exact_pages)
            args.exact_slots = exact_slots.data_ptr() + row * tokens * 8
        args.key_offset = self._offset_pointer(row)
        args.faults, args.stream = self.cache.faults_pointer, self.cache._stream()
        return args

    def _attention_args(self, row: int, count: int, tokens: int, q: torch.Tensor, settings: Any) -> Any:
        cache, tables = self.cache, self.tables
        scale, soft_cap, sinks, window = settings
        args = new(_lib.AttentionArgs, flags=_lib.ATTENTION_CAUSAL)
        args.num_seqs, args.num_tokens, args.q_heads = count, count * tokens, q.shape[1]
        args.q_type = args.out_type = _TYPES[q.dtype]
        args.pages = ctypes.pointer(self.pages)
        args.block_table = tables.table.data_ptr() + row * tables.columns * 4
        args.table_columns = tables.columns
        args.lengths = cache.lengths.data_ptr() + row * 4
        args.starts = cache.starts.data_ptr() + row * 4
        if self.exact:
            args.exact_pages = ctypes.pointer(self.exact_pages)
            args.exact_table = cache.exact_table.data_ptr() + row * cache.exact_table.shape[1] * 4
            args.exact_columns = cache.exact_table.shape[1]
            args.exact_first_tokens, args.exact_recent_tokens = cache.exact_first_tokens, cache.exact_recent_tokens
        args.scale, args.soft_cap, args.window_tokens = scale or 0.0, soft_cap or 0.0, window or 0
        args.sinks = sinks
        args.key_offset = self._offset_pointer(row)
        args.faults, args.stream = cache.faults_pointer, cache._stream()
        return args

    def _workspaces(self, attention: Any, store: Any) -> None:
        size = ctypes.c_size_t()
        for args, query, what in (
            (attention, functions.attention_workspace, attention and ctypes.byref(attention)),
            (store, functions.cache_workspace, store and store.num_tokens),
        ):
            if args is not None:
                check(query(self.handle, what, ctypes.byref(size)))
                args.workspace, args.workspace_bytes = self.cache._workspace(size.value), size.value

    def _bind(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Any) -> None:
        """Plans a decode step's calls; they are made again when a shape, a table or a pool changes."""
        cache = self.cache
        calls = []
        for row, count in self._spans():
            attention = self._attention_args(row, count, 1, q, settings)
            attention.q_token_stride, attention.q_head_stride = q.stride(0), q.stride(1)
            store = self._store_args(row, count, 1, self.tables.step_slots, cache.exact_step_slots)
            store.input_type = _TYPES[k.dtype]
            store.k_token_stride, store.k_head_stride = k.stride(0), k.stride(1)
            store.v_token_stride, store.v_head_stride = v.stride(0), v.stride(1)
            self._workspaces(attention, store)
            calls.append(
                (
                    store,
                    ctypes.byref(store),
                    attention,
                    ctypes.byref(attention),
                    row * k.stride(0) * k.element_size(),
                    row * v.stride(0) * v.element_size(),
                    row * q.stride(0) * q.element_size(),
                    row * q.shape[1] * self.head_dim_v * q.element_size(),
                )
            )
        # All have one workspace, which may have grown meanwhile.
        for store, _, attention, *_ in calls:
            store.workspace = attention.workspace = cache._workspace(1)
        self._calls = calls
        self._bound = (cache._epoch, settings, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype)

    def sinks(self, given: torch.Tensor) -> int:
        """Pointer to the sinks as f32; converted when they change."""
        version = (given.data_ptr(), given._version)
        if self._sinks_of != version:
            self._sinks, self._sinks_of = given.detach().float().contiguous(), version
        return int(self._sinks.data_ptr())

    def attend(self, q: torch.Tensor, settings: Any) -> torch.Tensor:
        """[rows, heads, tokens, channels] of queries -> [rows, tokens, heads, channels]."""
        k, v = self.keys, self.values
        self.keys = self.values = None
        if q.shape[2] != 1:
            return self._attend_chunk(q, k, v, settings)
        if self._bound != (self.cache._epoch, settings, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype):
            if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
                q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            self._bind(q, k, v, settings)
        out = torch.empty((q.shape[0], 1, q.shape[1], self.head_dim_v), dtype=q.dtype, device=q.device)
        qp, kp, vp, op = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        handle, stream = self.handle, self.cache.stream
        for store, store_ref, attention, attention_ref, dk, dv, dq, do in self._calls:
            store.k = kp + dk
            store.v = vp + dv
            store.stream = attention.stream = stream
            attention.q = qp + dq
            attention.out = op + do
            status = functions.cache_store(handle, store_ref) or functions.paged_attention(handle, attention_ref)
            if status:
                _lib.raise_error(status)
        return out

    def _attend_chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Any) -> torch.Tensor:
        cache = self.cache
        rows, heads, tokens, _ = q.shape
        scale, soft_cap, sinks, window = settings
        if k.dtype != q.dtype:
            k, v = k.to(q.dtype), v.to(q.dtype)
        q, q_token, q_head = self._rows(q)
        k, k_token, k_head = self._rows(k)
        v, v_token, v_head = self._rows(v)
        item = q.element_size()
        before = cache.seen - tokens
        plain = (
            before == 0
            and not cache.padded
            and soft_cap is None
            and sinks is None
            and (window is None or tokens <= window)
            and self.head_dim_k == self.head_dim_v
        )
        out = torch.empty((rows, tokens, heads, self.head_dim_v), dtype=q.dtype, device=q.device)
        for row, count in self._spans():
            args = self._attention_args(row, count, tokens, q, settings)
            args.cu_seqlens_q = cache.cumulative(tokens).data_ptr()
            args.max_q_len = tokens
            args.q_token_stride, args.q_head_stride = q_token, q_head
            args.k_new_token_stride, args.k_new_head_stride = k_token, k_head
            args.v_new_token_stride, args.v_new_head_stride = v_token, v_head
            args.q = q.data_ptr() + row * q.stride(0) * item
            args.k_new = k.data_ptr() + row * k.stride(0) * item
            args.v_new = v.data_ptr() + row * v.stride(0) * item
            args.out = out.data_ptr() + row * out.stride(0) * item
            if plain:  # nothing is cached yet; the library only says whether it would take the steps to come
                self._attention_support(row, count, q, settings)
                continue
            self._workspaces(args, None)
            check(functions.paged_attention(self.handle, ctypes.byref(args)))
        if plain:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
        self.store(k, v)
        return out

    def store(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores a chunk [rows, kv heads, tokens, channels], the step's."""
        cache = self.cache
        self.keys = self.values = None
        tokens, item = k.shape[2], k.element_size()
        k, k_token, k_head = self._rows(k)
        v, v_token, v_head = self._rows(v)
        if cache.seen == tokens:
            self.learn_offset(k)
        slots, exact_slots = self.tables.chunk_slots, cache.exact_chunk_slots
        for row, count in self._spans():
            store = self._store_args(row, count, tokens, slots, exact_slots)
            store.input_type = _TYPES[k.dtype]
            store.k, store.v = k.data_ptr() + row * k.stride(0) * item, v.data_ptr() + row * v.stride(0) * item
            store.k_token_stride, store.k_head_stride = k_token, k_head
            store.v_token_stride, store.v_head_stride = v_token, v_head
            self._workspaces(None, store)
            check(functions.cache_store(self.handle, ctypes.byref(store)))

    def _attention_support(self, row: int, count: int, q: torch.Tensor, settings: Any) -> None:
        size = ctypes.c_size_t()
        args = self._attention_args(row, count, 1, q, settings)
        check(functions.attention_workspace(self.handle, ctypes.byref(args), ctypes.byref(size)))

    def refill(self, first: int, end: int) -> None:
        """Writes the exact copies of tokens whose copies were overwritten by tokens now cropped: from their codes."""
        cache = self.cache
        if not self.exact:
            return
        if self.window is not None:
            first = max(first, cache.seen - self.window)
        if first >= end:
            return
        positions = torch.arange(first, end, device=cache.device)
        slots = self.tables.slots(positions).contiguous()
        exact = cache.exact_slots(positions)
        exact = torch.where(cache.in_first_blocks(positions), -1, exact).contiguous()
        tokens = end - first
        dtype = torch.float16 if self.codec.info.raw_type == "f16" else torch.bfloat16
        k = torch.empty(cache.rows * tokens, self.kv_heads, self.head_dim_k, dtype=dtype, device=cache.device)
        v = torch.empty(cache.rows * tokens, self.kv_heads, self.head_dim_v, dtype=dtype, device=cache.device)
        nowhere = torch.full_like(slots, -1)
        for row, count in self._spans():
            load = new(_lib.LoadArgs, output_type=_TYPES[dtype], num_tokens=count * tokens)
            load.k, load.v = k[row * tokens :].data_ptr(), v[row * tokens :].data_ptr()
            load.pages = ctypes.pointer(self.pages)
            load.slots = slots.data_ptr() + row * tokens * 8
            load.key_offset = self._offset_pointer(row)
            load.faults, load.stream = cache.faults_pointer, cache._stream()
            self._workspaces(None, load)
            check(functions.cache_load(self.handle, ctypes.byref(load)))
            store = self._store_args(row, count, tokens, nowhere, exact)
            store.input_type = _TYPES[dtype]
            store.k, store.v = load.k, load.v
            self._workspaces(None, store)
            check(functions.cache_store(self.handle, ctypes.byref(store)))


# -------------------------------------------------------------------------------------------------------- cache --


class _Length(int):
    """A cache's length that says whose it is: mask functions are told lengths only."""

    cache: TqCache


class _Mask:
    """What the attention function gets as attention_mask: causal, and perhaps a window. Padding is the cache's."""

    __slots__ = ("cache", "window")

    def __init__(self, cache: TqCache, window: int | None):
        self.cache = cache
        self.window = window


class TqGraph:
    """A captured decode step; see TqCache.capture."""

    def __init__(self, cache: TqCache, graph: Any, result: Any, tokens: int):
        self._cache, self._graph, self._tokens = cache, graph, tokens
        self.result = result
        """What the step returned; each replay writes it anew."""
        self._epoch = cache._epoch

    def replay(self) -> Any:
        if self._epoch != self._cache._epoch:
            raise InvalidArgument(
                "the cache was reallocated since the graph was captured; make it with max_tokens and capture again"
            )
        self._cache._advance(self._tokens)
        self._graph.replay()
        return self.result


class TqCache(Cache):  # type: ignore[misc]
    """A cache whose keys and values are compressed; pass it as `past_key_values`.

    preset: of the library, "k4v4" to "k2v2", or "raw". k_bits and v_bits override its bits.
    exact_first_tokens, exact_recent_tokens: tokens of each sequence that are read uncompressed, besides their codes.
    key_offset: what is subtracted from the keys before coding, per kv head: the mean of the first chunk's keys, over
        the whole batch ("batch"), or of each sequence ("sequence": slower, sequences are then attended to one by one),
        or nothing (None). It is frozen after the first chunk; a first chunk of less than 32 tokens leaves it at zero.
    raw_first_layers, raw_last_layers, raw_layers: layers kept uncompressed, counted among those that have keys and
        values; indices below zero count from the end.
    max_tokens: allocate for so many tokens at once, and refuse more; memory then never moves. None: grow.
    rollback_tokens: how far a crop may go back without loss: behind it recent exact tokens come back at coded
        precision, and a layer with a sliding window cannot go.
    seed: of the rotations.
    """

    layer_type = TqLayer

    def __init__(
        self,
        config: Any,
        preset: str | None = None,
        *,
        k_bits: int | None = None,
        v_bits: int | None = None,
        exact_first_tokens: int = 4,
        exact_recent_tokens: int = 128,
        key_offset: str | None = "batch",
        raw_first_layers: int = 0,
        raw_last_layers: int = 0,
        raw_layers: Iterable[int] = (),
        max_tokens: int | None = None,
        rollback_tokens: int = 32,
        seed: int = 0,
    ):
        for name, value in (
            ("exact_first_tokens", exact_first_tokens),
            ("exact_recent_tokens", exact_recent_tokens),
            ("raw_first_layers", raw_first_layers),
            ("raw_last_layers", raw_last_layers),
            ("rollback_tokens", rollback_tokens),
        ):
            if value < 0:
                raise InvalidArgument(f"{name} is {value}; it must not be below 0")
        if key_offset not in (None, "batch", "sequence"):
            raise InvalidArgument(f"key_offset is {key_offset!r}; it must be 'batch', 'sequence' or None")
        if max_tokens is not None and max_tokens < 1:
            raise InvalidArgument(f"max_tokens is {max_tokens}; it must be at least 1")
        self.codec_options = {"preset": preset, "k_bits": k_bits, "v_bits": v_bits, "seed": seed}
        self.exact_first_tokens, self.exact_recent_tokens = exact_first_tokens, exact_recent_tokens
        self.rollback_tokens = rollback_tokens
        self.key_offset = key_offset
        self.max_tokens = max_tokens
        config = config.get_text_config(decoder=True)
        kinds, each = _layer_kinds(config)
        self.kv_layers = [i for i, kind in enumerate(kinds) if kind == "attention"]
        raw = _chosen_layers(len(self.kv_layers), raw_first_layers, raw_last_layers, raw_layers)
        layers: list[Any] = []
        self.groups: dict[int | None, _Tables] = {}
        for i, (kind, made_of) in enumerate(zip(kinds, each, strict=True)):
            if kind != "attention":
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**made_of))
                continue
            window = made_of["window"]
            layer = self.layer_type(self, i, window, self.kv_layers.index(i) in raw)
            layer.tables = self.groups.setdefault(window, _Tables(window, rollback_tokens))
            layer.tables.layers.append(layer)
            layers.append(layer)
        super().__init__(layers=layers)
        self._kv: list[TqLayer] = [layers[i] for i in self.kv_layers]
        # Exact blocks of a row: those that hold its first tokens, wherever it starts in a block; then a ring.
        self.first_blocks = (exact_first_tokens + _BLOCK - 2) // _BLOCK + 1 if exact_first_tokens else 0
        self.ring_blocks = _blocks(exact_recent_tokens + rollback_tokens) if exact_recent_tokens else 0
        self.exact_blocks = self.first_blocks + self.ring_blocks
        self.device: Any = None
        self.rows = 0
        self.seen = 0
        """Tokens of each sequence, padding included."""
        self.padded = False
        self._exact_low = 0  # the exact ring holds the tokens from here on
        self._coded_high = 0  # the most tokens there were, before crops: rings hold what follows from it
        self._epoch = 0  # counts reallocations
        self.observer: Callable[..., None] | None = None
        """Called after each attention call with the layer, queries, keys, values, (scale, soft cap, sinks, window),
        output."""
        self._pending: TqLayer | None = None
        self._masked: tuple[int, int] | None = None
        self._starts_given: torch.Tensor | None = None
        self._had_starts = False
        self._capturing = False
        self.stream = 0
        self._work: Any = None
        self.starts: Any = None
        self._bad_mask: Any = None
        self._bad_mask_host: Any = None

    @classmethod
    def for_model(cls, model: Any, preset: str | None = None, **options: Any) -> TqCache:
        """A cache for a model, which is switched to attention over compressed pages; `options` are those of TqCache."""
        config = model.config.get_text_config(decoder=True)
        cache = cls(config, preset, **options)
        _switch(model, config)
        return cache

    # ---- memory

    def _bytes(self, count: int) -> torch.Tensor:
        if self.device.type == "cuda":
            return torch.empty(count, dtype=torch.uint8, device=self.device)
        memory = torch.empty(count + 256, dtype=torch.uint8)
        skip = -memory.data_ptr() % 256
        return memory[skip : skip + count]

    def _workspace(self, size: int) -> int:
        if self._work is None or self._work.numel() < size:
            self._work = self._bytes(size + size // 4)
            self._epoch += 1
        return int(self._work.data_ptr())

    def _stream(self) -> int:
        return torch_stream(self.device.index) if self.device.type == "cuda" else 0

    def _allocate(self, key: torch.Tensor) -> None:
        """At the first layer of the first step."""
        self.device = key.device
        if key.dtype not in _TYPES:
            raise NotSupported(f"keys are {key.dtype}; they must be float32, float16 or bfloat16")
        self._fault_bytes = self._bytes(64).zero_()
        self.faults_pointer = self._fault_bytes.data_ptr()
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)

    def _allocate_rows(self, rows: int, select: torch.Tensor | None = None) -> None:
        """Everything that has an entry a row. `select`: old row of each new one; None: nothing is cached."""
        device = self.device
        starts = torch.zeros(rows, dtype=torch.int32, device=device)
        if select is not None:
            starts.copy_(self.starts.index_select(0, select))
        self.rows = rows
        self.starts = starts
        self.lengths = torch.full((rows,), self.seen, dtype=torch.int32, device=device)
        self._cumulative: dict[int, torch.Tensor] = {}
        self.exact_step_slots = torch.full((rows, 1), -1, dtype=torch.int64, device=device)
        for tables in self.groups.values():
            tables.step_slots = torch.full((rows, 1), -1, dtype=torch.int64, device=device)
            if select is not None:
                tables.resize(self, rows, tables.columns, select)
            elif tables.rows:
                tables.resize(self, rows, tables.columns)
        for layer in self._kv:
            if layer.is_initialized:
                layer.allocate_exact(rows, select)
                layer.allocate_offset(rows, select)
        if any(tables.rows for tables in self.groups.values()):
            self._exact_table()
        self._epoch += 1

    def _take_starts(self) -> None:
        """The padding that the first step's mask told."""
        given, self._starts_given = self._starts_given, None
        if given is None and not self._had_starts:
            return
        self._had_starts = given is not None
        self.starts.zero_() if given is None else self.starts.copy_(given)
        if any(tables.rows for tables in self.groups.values()):
            self._exact_table()

    def _reserve(self, length: int) -> None:
        """Room for so many tokens."""
        have = min((g.columns for g in self.groups.values()), default=0) * _BLOCK
        if self.max_tokens is not None and length > self.max_tokens:
            raise InvalidArgument(f"the cache was made for max_tokens {self.max_tokens}; {length} are needed")
        if length <= have:
            return
        if self._capturing:
            raise InvalidArgument(f"the cache has room for {have} tokens; a captured step cannot grow it")
        wanted = self.max_tokens or max(length + _GROW, have + have // 4)
        for tables in self.groups.values():
            tables.resize(self, self.rows, _blocks(wanted))
        self._exact_table()
        self._epoch += 1

    def _exact_table(self) -> None:
        """Where the exact copies of each column are; rows may start anywhere."""
        if not self.exact_blocks:
            self.exact_table = torch.empty(0, 0, dtype=torch.int32, device=self.device)
            return
        columns = torch.arange(next(iter(self.groups.values())).columns, device=self.device)
        base = torch.arange(self.rows, device=self.device)[:, None] * self.exact_blocks
        place = columns - (self.starts.clamp_min(0) // _BLOCK)[:, None]
        ring = base + self.first_blocks + columns % self.ring_blocks if self.ring_blocks else torch.full_like(place, -1)
        table = torch.where((place >= 0) & (place < self.first_blocks), base + place, ring).to(torch.int32)
        if hasattr(self, "exact_table") and self.exact_table.shape == table.shape:
            self.exact_table.copy_(table)
        else:
            self.exact_table = table.contiguous()
            self._epoch += 1

    def cumulative(self, tokens: int) -> torch.Tensor:
        if tokens not in self._cumulative:
            self._cumulative[tokens] = torch.arange(
                0, (self.rows + 1) * tokens, tokens, dtype=torch.int32, device=self.device
            )
        return self._cumulative[tokens]

    def in_first_blocks(self, positions: torch.Tensor) -> torch.Tensor:
        place = (positions >> 4) - (self.starts // _BLOCK)[:, None]
        return (place >= 0) & (place < self.first_blocks)

    def exact_slots(self, positions: torch.Tensor) -> torch.Tensor:
        blocks = self.exact_table.index_select(1, positions >> 4)
        slots = torch.add(positions & 15, blocks, alpha=_BLOCK)
        return slots if self.ring_blocks else torch.where(blocks < 0, -1, slots)

    def nbytes(self) -> int:
        """Bytes of all pools and tables that the cache has allocated, room for growth included."""
        total = sum(g.table.numel() * 8 for g in self.groups.values() if g.rows)
        for layer in self._kv:
            if layer.is_initialized:
                total += layer.pool.numel() + (layer.exact_pool.numel() if layer.exact else 0)
        return int(total)

    def bytes_per_token(self) -> int:
        """Of one sequence's token in all layers, without exact copies."""
        return sum(layer.codec.bytes_per_token for layer in self._kv if layer.is_initialized)

    def exact_bytes_per_sequence(self) -> int:
        """Of the exact copies, in all layers."""
        return sum(
            self.exact_blocks * layer.exact_block_bytes for layer in self._kv if layer.is_initialized and layer.exact
        )

    def faults(self) -> _lib.Faults:
        """Faults that the library counted; waits for the device."""
        if self.device is None:
            return _lib.Faults()
        return _lib.Faults.from_buffer_copy(self._fault_bytes.cpu().numpy().tobytes())

    # ---- a step

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx]
        if not isinstance(layer, TqLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]
        if self._pending is not None:
            raise NotSupported(
                f"layer {self._pending.index} did not attend through the registered attention function; "
                "make the cache with TqCache.for_model, and pass it to that model"
            )
        tokens = key_states.shape[2]
        if layer.seen == self.seen:
            self._begin(key_states)
        if layer.seen + tokens != self.seen:
            raise InvalidArgument(
                f"layer {layer_idx} gets {tokens} tokens after {layer.seen}; the cache is at {self.seen}"
            )
        if key_states.device != self.device:
            raise NotSupported(
                f"layer {layer_idx} is on {key_states.device}, the cache on {self.device}: one cache has one device"
            )
        if not layer.is_initialized:
            layer.prepare(key_states, value_states)
        layer.seen += tokens
        layer.keys, layer.values = key_states, value_states
        key_states._tq_layer = layer
        self._pending = layer
        return key_states, value_states

    def _begin(self, key: torch.Tensor) -> None:
        """Before the first layer of a step: room, slots, lengths."""
        rows, _, tokens, _ = key.shape
        if tokens == 0:
            raise InvalidArgument("a step without tokens")
        if self.device is None:
            self._allocate(key)
        if self.seen == 0 and rows != self.rows:
            self._allocate_rows(rows)
        if rows != self.rows:
            raise InvalidArgument(f"the batch has {rows} sequences; the cache has {self.rows}")
        if self.padded and self._masked != (self.seen, tokens) and not self._capturing:
            raise InvalidArgument("sequences of the cache are padded: pass attention_mask")
        if self.seen == 0:
            self._take_starts()
        self._reserve(self.seen + tokens)
        self.stream = self._stream()
        positions = self.position if tokens == 1 else self.position + torch.arange(tokens, device=self.device)
        end = self.seen + tokens
        for tables in self.groups.values():
            slots = tables.slots(positions)
            if tokens == 1:
                tables.step_slots.copy_(slots)
            else:
                held = tables.ring * _BLOCK
                if tokens > held:
                    slots[:, : tokens - held] = -1  # older than the ring is long
                tables.chunk_slots = slots
        if self.exact_blocks:
            slots = self.exact_slots(positions)
            if tokens == 1:
                self.exact_step_slots.copy_(slots)
            else:
                held = self.ring_blocks * _BLOCK
                if tokens > held:
                    recent = torch.arange(tokens, device=self.device) >= tokens - held
                    slots = torch.where(recent | self.in_first_blocks(positions), slots, -1)
                self.exact_chunk_slots = slots.contiguous()
        else:
            self.exact_chunk_slots = None
        self.lengths.add_(tokens)
        self.position.add_(tokens)
        self._count(end)

    def _count(self, end: int) -> None:
        self.seen = end
        self._exact_low = max(self._exact_low, end - self.ring_blocks * _BLOCK)
        self._coded_high = max(self._coded_high, end)

    def _see_mask(self, mask: torch.Tensor | None, tokens: int) -> None:
        """A step's padding mask [rows, tokens so far], True where a token counts. Only left padding is possible, and it
        is the first step's. Later masks are compared on the device; on CUDA the answer is read when the next one
        comes."""
        if mask is None or self._masked == (self.seen, tokens):
            return
        total = self.seen + tokens
        if mask.ndim != 2 or mask.shape[1] < total:
            raise InvalidArgument(
                f"attention_mask has shape {list(mask.shape)}; it must cover all {total} tokens so far"
            )
        mask = mask[:, :total].to(torch.bool)
        positions = torch.arange(total, device=mask.device)
        if self.seen == 0:
            starts = total - mask.sum(1)
            told = torch.stack([(mask == (positions >= starts[:, None])).all(), (starts > 0).any()]).tolist()
            if not told[0]:
                raise NotSupported(_NOT_PADDING)
            self.padded = told[1]
            self._starts_given = starts
        else:
            if self._bad_mask_host is not None and self._bad_mask_host.item():
                raise NotSupported(_NOT_PADDING)
            bad = (mask != (positions >= self.starts[:, None])).any()
            if mask.device.type != "cuda":
                if bad:
                    raise NotSupported(_NOT_PADDING)
            else:
                if self._bad_mask is None:
                    self._bad_mask = torch.zeros((), dtype=torch.bool, device=mask.device)
                    self._bad_mask_host = torch.zeros((), dtype=torch.bool, pin_memory=True)
                self._bad_mask.logical_or_(bad)
                self._bad_mask_host.copy_(self._bad_mask, non_blocking=True)
        self._masked = (self.seen, tokens)

    # ---- what generation does to a cache

    def get_query_offset(self, layer_idx: int = 0) -> int:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            raise NotSupported(
                f"layer {pending.index} did not attend through the registered attention function; "
                "make the cache with TqCache.for_model, and pass it to that model"
            )
        length = _Length(self.get_seq_length(layer_idx))
        length.cache = self
        return length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.max_tokens is None else self.max_tokens

    @property
    def batch_size(self) -> int:
        return self.rows or -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.rows > 0 and all(layer.is_initialized for layer in self._kv)

    def _others(self) -> list[Any]:
        """Layers that are transformers' own: recurrent and convolutional states."""
        return [layer for layer in self.layers if not isinstance(layer, TqLayer)]

    def reset(self) -> None:
        """Empties the cache; its memory stays."""
        for layer in self._others():
            layer.reset()
        self._pending = self._masked = self._starts_given = None
        self.padded = False
        if self._bad_mask is not None:
            self._bad_mask.zero_()
            self._bad_mask_host.zero_()
        self.seen = self._exact_low = self._coded_high = 0
        for layer in self._kv:
            layer.seen = 0
            if layer.offset is not None:
                layer.offset.zero_()
        if self.rows:
            self.lengths.zero_()
            self.position.zero_()
            for tables in self.groups.values():
                tables.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for layer in self._others():
            layer.reorder_cache(beam_idx)
        if self.seen == 0:
            return
        rows = beam_idx.to(self.device)
        for tables in self.groups.values():
            tables.reorder(self, rows)
        for layer in self._kv:
            if layer.exact:
                held = layer.exact_pool.view(self.rows, -1)
                held.copy_(held.index_select(0, rows))
            layer.allocate_offset(self.rows, rows)
        if self.padded:
            self.starts.copy_(self.starts.index_select(0, rows))
            self._exact_table()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -tokens_to_remove tokens. Above zero: takes back all but so many."""
        tokens_to_remove = int(tokens_to_remove)  # assisted generation gives a tensor
        length = tokens_to_remove if tokens_to_remove > 0 else self.seen + tokens_to_remove
        if length < 0:
            raise InvalidArgument(f"crop by {-tokens_to_remove} tokens; the cache has {self.seen}")
        for tables in self.groups.values():
            lost = (_blocks(self._coded_high) - tables.ring) * _BLOCK  # the ring has used again what is before
            if length < self.seen and tables.window is not None and max(0, length - tables.window + 1) < lost:
                raise NotSupported(
                    f"crop to {length} tokens needs keys that layers with a window of {tables.window} no longer have; "
                    f"make the cache with rollback_tokens {self.seen - length} or more"
                )
        for layer in self._others():
            layer.crop(tokens_to_remove)
        if length >= self.seen:
            return
        self._pending = self._masked = None
        for tables in self.groups.values():
            tables.crop(self, length)
        self.seen = length
        for layer in self._kv:
            layer.seen = length
        self.lengths.fill_(length)
        self.position.fill_(length)
        if self.ring_blocks:
            needed = max(0, length - self.exact_recent_tokens + 1)
            if needed < self._exact_low:
                end = min(self._exact_low, length)
                for layer in self._kv:
                    layer.refill(needed, end)
                self._exact_low = needed

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._all_or_none("batch_repeat_interleave", repeats)
        if self.seen:
            self._select(torch.arange(self.rows, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._all_or_none("batch_select_indices", indices)
        if self.seen:
            self._select(torch.arange(self.rows, device=self.device)[indices.to(self.device)])

    def _all_or_none(self, name: str, argument: Any) -> None:
        others = self._others()
        for layer in others:
            if not hasattr(layer, name):
                raise NotSupported(f"{name} of a {type(layer).__name__}")
        for layer in others:
            getattr(layer, name)(argument)

    def _select(self, rows: torch.Tensor) -> None:
        self._allocate_rows(rows.shape[0], rows)
        self._masked = None

    # ---- CUDA graphs

    def capture(self, step: Callable[[], Any], tokens: int = 1) -> TqGraph:
        """Captures step(), which runs the model once with this cache on `tokens` tokens a sequence, as a CUDA graph.

        The step reads its input from tensors that the caller refills, and its positions from a tensor too, perhaps
        `cache.position`, which holds the number of tokens so far when a step begins. It passes no attention_mask. The
        cache needs max_tokens and a prompt. The step runs once for warming up, and is taken back.
        """
        if self.max_tokens is None or self.seen == 0 or self.device.type != "cuda" or self._others():
            raise InvalidArgument(
                "a step is captured on CUDA, of a cache with max_tokens that holds a prompt, of attention layers alone"
            )
        self._capturing = True
        try:
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream(self.device).wait_stream(side)
            self.crop(-tokens)
            host = (self.seen, self._exact_low, self._coded_high)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = step()
            self.seen, self._exact_low, self._coded_high = host
            for layer in self._kv:
                layer.seen = self.seen
        finally:
            self._capturing = False
        return TqGraph(self, graph, result, tokens)

    def _advance(self, tokens: int) -> None:
        """What a replayed step does on the host."""
        self._reserve(self.seen + tokens)
        self._count(self.seen + tokens)
        for layer in self._kv:
            layer.seen = self.seen


_NOT_PADDING = (
    "attention_mask masks more than tokens left of a sequence, the same in every step; only left padding is supported"
)


def _layer_kinds(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Of each layer: "attention", or transformers' name for one without keys and values; and what its cache is made of."""
    if getattr(config, "is_encoder_decoder", False):
        raise NotSupported("encoder-decoder models have no TqCache")
    shared = getattr(config, "kv_sharing_modes", None) or []
    if getattr(config, "num_kv_shared_layers", None) or "reuse" in shared:
        raise NotSupported("layers that share another one's keys and values have no TqCache")
    types, options = get_layer_types_and_kwargs(config)
    each = [dict(options)] * len(types) if isinstance(options, dict) else options  # one for all until transformers 5.17
    kinds = []
    for name in types:
        attention = name in ("full_attention", "sliding_attention")
        known = DYNAMIC_LAYER_TYPE_MAPPING.get(name)
        # Layers of "moe" and "mlp" have nothing; newer versions name them so.
        if not attention and known is not LinearAttentionLayer and name != "dummy":
            raise NotSupported(f"layers of type {name!r} have no TqCache")
        kinds.append("attention" if attention else name)
    if "attention" not in kinds:
        raise NotSupported("the model has no attention layer")
    windows = [
        o.get("sliding_window") if name == "sliding_attention" else None for name, o in zip(types, each, strict=True)
    ]
    return kinds, [
        {"window": window} if kind == "attention" else {key: o[key] for key in o if key != "sliding_window"}
        for kind, window, o in zip(kinds, windows, each, strict=True)
    ]


def _chosen_layers(count: int, first: int, last: int, listed: Iterable[int]) -> set[int]:
    chosen = set(range(min(first, count))) | set(range(max(0, count - last), count))
    for index in listed:
        if not -count <= index < count:
            raise InvalidArgument(f"raw_layers has {index}; the model has {count} layers with keys and values")
        chosen.add(index % count)
    return chosen


# --------------------------------------------------------------------------------------- attention, and its mask --


def _free_variables(function: Any) -> dict[str, Any]:
    return dict(
        zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
    )


def _window_of(mask_function: Any) -> int | None:
    """The window of a causal mask function of transformers; anything else is refused."""
    if mask_function is causal_mask_function:
        return None
    code = getattr(mask_function, "__code__", None)
    if code is and_masks(causal_mask_function).__code__:
        parts = _free_variables(mask_function)["mask_functions"]
        if len(parts) == 2 and parts[1] is causal_mask_function:
            code = getattr(parts[0], "__code__", None)
            if code is sliding_window_overlay(1).__code__:
                return int(_free_variables(parts[0])["sliding_window"])
            if code is chunked_overlay(1, None).__code__:
                raise NotSupported("chunked attention masks; only causal ones, with or without a sliding window")
    name = getattr(mask_function, "__qualname__", repr(mask_function))
    raise NotSupported(f"the attention mask {name}; only causal ones, with or without a sliding window")


def _mask(
    base: str, batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, *args: Any, **kwargs: Any
) -> Any:
    cache = getattr(q_offset, "cache", None)
    if cache is None:
        fallback = ALL_MASK_ATTENTION_FUNCTIONS[base]
        return fallback(batch_size, q_length, kv_length, q_offset, *args, **kwargs)
    window = _window_of(kwargs.get("mask_function", causal_mask_function))
    cache._see_mask(kwargs.get("attention_mask"), q_length)
    return _Mask(cache, window)


def _attention(
    base: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    layer = getattr(key, "_tq_layer", None)
    if layer is None:
        if isinstance(attention_mask, _Mask):
            raise NotSupported(f"{type(module).__name__} attends to other keys than its cache returned")
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        fallback = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
        return fallback(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    cache = layer.cache
    cache._pending = None
    window = kwargs.get("sliding_window")
    if attention_mask is not None:
        if type(attention_mask) is not _Mask:
            raise NotSupported(
                "an attention mask of its own; only causal ones, with or without a sliding window, and left padding"
            )
        window = attention_mask.window
    if layer.window is not None and (window is None or window > layer.window):
        raise NotSupported(f"layer {layer.index} attends over {window or 'all'} tokens; its cache keeps {layer.window}")
    if dropout:
        raise NotSupported("dropout in attention")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotSupported(f"{type(module).__name__} is not causal")
    if kwargs.get("position_bias") is not None:
        raise NotSupported("a bias of attention scores by position")
    soft_cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    out = layer.attend(query, (scaling, soft_cap, None if sinks is None else layer.sinks(sinks), window))
    if cache.observer is not None:
        cache.observer(layer, query, key, value, (scaling, soft_cap, sinks, window), out)
    return out, None


_implementations: dict[str, str] = {}


def _implementation(base: str) -> str:
    """The name under which the pair of functions is registered that falls back to `base` without a TqCache."""
    if base in _implementations.values():
        return next(name for name, of in _implementations.items() if of == base)
    # transformers looks for "sdpa", "flash" and "flex" in names
    name = {"sdpa": "tqkv", "eager": "tqkv_eager"}.get(base, f"tqkv_{len(_implementations)}")
    _implementations[name] = base
    AttentionInterface.register(name, functools.partial(_attention, base))
    AttentionMaskInterface.register(name, functools.partial(_mask, base))
    return name


def _switch(model: Any, config: Any) -> None:
    base = config._attn_implementation
    if base in _implementations:
        return
    if not model._can_set_attn_implementation():
        raise NotSupported(f"{type(model).__name__} does not attend through transformers' AttentionInterface")
    name = _implementation(base)
    if config is model.config:
        model.set_attn_implementation(name)
    else:
        key = next(key for key in model.config.sub_configs if getattr(model.config, key) is config)
        model.set_attn_implementation({key: name})
    if config._attn_implementation != name:
        raise NotSupported(f"{type(model).__name__} does not let its attention implementation be set")
