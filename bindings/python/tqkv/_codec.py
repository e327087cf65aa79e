# SPDX-License-Identifier: Apache-2.0
"""The codec, and the calls of tqkv.h over arrays."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _arrays, _lib
from ._arrays import View, array, flat_rows, packed, type_name
from ._lib import InvalidArgument, InvalidType, check, functions, new

_FLOATS = ("f32", "f16", "bf16")


def parse_device(device: Any) -> _arrays.Device:
    """ "cpu", "cuda", "cuda:1", or anything that prints like it (torch.device)."""
    kind, _, ordinal = str(device).partition(":")
    if kind not in _lib.DEVICES or (ordinal and not ordinal.isdecimal()):
        raise InvalidArgument(f"device is {str(device)!r}; it must be 'cpu', 'cuda' or 'cuda:ORDINAL'")
    return kind, int(ordinal or 0)


def _choice(value: Any, table: Mapping[str, int], name: str) -> int:
    if value is None:
        return 0
    if value not in table:
        raise InvalidArgument(f"{name} is {value!r}; it must be one of {', '.join(table)}")
    return table[value]


def _name_of(value: int, table: Mapping[str, int]) -> str:
    return next((name for name, number in table.items() if number == value), str(value))


@dataclass(frozen=True)
class SideInfo:
    """What one side of a codec resolved to."""

    head_dim: int
    bits: int
    rotation: str
    hadamard_rounds: int
    codebook: str
    scale_rule: str
    scale_type: str
    code_bytes: int
    scale_bytes: int
    levels: tuple[float, ...]
    """Decoded coordinates at scale 1, at most 4 bits."""
    codebook_mse: float
    codebook_loss: float


@dataclass(frozen=True)
class Info:
    """What a codec resolved to."""

    device: str
    kv_heads: int
    k: SideInfo
    v: SideInfo
    seed: int
    tile_fingerprint: int
    page_fingerprint: int
    exact_fingerprint: int
    block_size: int
    exact_block_size: int
    raw_type: str
    simd: str
    threads: int


@dataclass(frozen=True)
class Layout:
    """Sizes of a codec's pages; see tq_layout."""

    block_size: int
    tile_bytes: int
    k_codes_offset: int
    v_codes_offset: int
    k_scales_offset: int
    v_scales_offset: int
    head_stride_bytes: int
    tile_stride_bytes: int
    block_stride_bytes: int
    bytes_per_token: int
    fingerprint: int


@dataclass(frozen=True)
class FaultCounts:
    """Faults that calls counted: how many of each kind, and kind and index of the one with the lowest index."""

    first_kind: str | None
    first_index: int
    slot: int
    length: int
    block: int
    non_finite: int
    range: int


class Faults:
    """Counters of data-dependent faults in the device's memory; calls that are given them add to them."""

    def __init__(self, device: Any = "cpu", library: str | None = None):
        self._library = _arrays.array_library(library, parse_device(device))
        self.array = self._library.zeros((64,), "u8")

    def read(self) -> FaultCounts:
        """The counters so far. On a CUDA device this waits for the current stream."""
        faults = _lib.Faults.from_buffer_copy(self._library.to_numpy(self.array).tobytes())
        first = int(faults.first)
        kind = _lib.FAULT_KINDS[first & 0xFF] if first else None
        return FaultCounts(kind, 0x00FFFFFFFFFFFFFF - (first >> 8) if first else -1, *(int(n) for n in faults.count))

    def clear(self) -> None:
        self.array[:] = 0

    def check(self) -> None:
        """Raises if a fault was counted."""
        counts = self.read()
        if counts.first_kind is not None:
            raise InvalidArgument(
                f"a call counted faults, first a {counts.first_kind} fault at index {counts.first_index}: {counts}"
            )


class Pages:
    """A pool of blocks in memory that the caller owns: a densely packed array of bytes on the codec's device.

    `num_blocks` None: as many as fit. Strides of 0 are those of `codec.layout(which)`; the memory must be aligned to 16.
    """

    def __init__(
        self,
        codec: Codec,
        memory: Any,
        num_blocks: int | None = None,
        which: str = "coded",
        *,
        block_stride_bytes: int = 0,
        tile_stride_bytes: int = 0,
        head_stride_bytes: int = 0,
    ):
        layout = codec.layout(which)
        found = packed(array(memory, "memory", codec.device_tuple, tuple(_arrays.ITEM_BYTES), writable=True), "memory")
        size = found.size * _arrays.ITEM_BYTES[found.dtype]
        block_stride = block_stride_bytes or layout.block_stride_bytes
        tile_stride = tile_stride_bytes or layout.tile_stride_bytes
        head_stride = head_stride_bytes or layout.head_stride_bytes
        group = max(1, 16 // layout.block_size)  # blocks that share a tile
        tiles = max(1, layout.block_size // 16)
        extent = (tiles - 1) * tile_stride + (codec.kv_heads - 1) * head_stride + layout.tile_bytes
        if num_blocks is None:
            num_blocks = max(0, (size - extent) // block_stride + 1) * group if size >= extent else 0
        groups = -(-num_blocks // group)
        needed = (groups - 1) * block_stride + extent if groups > 0 else 0
        if num_blocks < 0 or needed > size:
            raise InvalidArgument(f"memory holds {size} bytes; {num_blocks} blocks take {needed}")
        self.memory = memory
        self.which = which
        self.num_blocks = num_blocks
        self.view = found
        self.struct = new(
            _lib.PagesStruct,
            base=found.pointer,
            num_blocks=num_blocks,
            block_stride_bytes=block_stride_bytes,
            tile_stride_bytes=tile_stride_bytes,
            head_stride_bytes=head_stride_bytes,
            fingerprint=layout.fingerprint,
        )
        self.pointer = ctypes.pointer(self.struct)

    @property
    def nbytes(self) -> int:
        return self.view.size * _arrays.ITEM_BYTES[self.view.dtype]


def _side_config(
    side: Any, name: str, options: Mapping[str, Any], keep: list[Any], shared: Mapping[str, Any], bits: int | None
) -> None:
    known = {
        "head_dim",
        "bits",
        "rotation",
        "hadamard_rounds",
        "codebook",
        "scale_rule",
        "scale_type",
        "levels",
        "matrix",
    }
    unknown = set(options) - known
    if unknown:
        raise InvalidArgument(f"{name} has an unknown option {min(unknown)!r}; known are {', '.join(sorted(known))}")
    chosen = {**{key: value for key, value in shared.items() if value is not None}, **options}
    if bits is None:
        bits = options.get("bits")
    if bits is not None:
        side.bits = bits
        # As in the presets: 2 bits have the levels that decode fastest.
        side.codebook = _lib.CODEBOOKS["uniform" if bits == 2 else "default"]
    raw = side.bits == 16
    if chosen.get("head_dim") is not None:
        side.head_dim = chosen["head_dim"]
    if not raw or "rotation" in options:
        side.rotation = _choice(chosen.get("rotation"), _lib.ROTATIONS, f"{name}['rotation']")
        side.hadamard_rounds = chosen.get("hadamard_rounds") or 0
    if chosen.get("codebook") is not None and (not raw or "codebook" in options):
        side.codebook = _choice(chosen["codebook"], _lib.CODEBOOKS, f"{name}['codebook']")
    if not raw or "scale_rule" in options:
        side.scale_rule = _choice(chosen.get("scale_rule"), _lib.SCALE_RULES, f"{name}['scale_rule']")
    if chosen.get("scale_type") is not None and (not raw or "scale_type" in options):
        side.scale_type = _lib.TYPES[type_name(chosen["scale_type"], f"{name}['scale_type']")]
    for key in ("levels", "matrix"):
        if chosen.get(key) is None:
            continue
        values = np.ascontiguousarray(np.asarray(chosen[key], dtype=np.float32))
        keep.append(values)
        if key == "levels":
            side.codebook, side.num_levels, side.levels = _lib.CODEBOOKS["custom"], values.size, values.ctypes.data
        else:
            side.rotation, side.matrix = _lib.ROTATIONS["custom"], values.ctypes.data


class Codec:
    """An immutable description of how keys and values are stored, with the tables it needs; see tq_create.

    `preset` gives the bits (None: "safe", which is "k4v4"); `k_bits` and `v_bits` override it. Other options hold for both
    sides; the mappings `k` and `v` override them for one: head_dim, bits, rotation, hadamard_rounds, codebook, scale_rule,
    scale_type, levels (custom codebook), matrix (custom rotation).
    """

    def __init__(
        self,
        preset: str | None = None,
        *,
        head_dim: int,
        head_dim_v: int | None = None,
        kv_heads: int = 1,
        k_bits: int | None = None,
        v_bits: int | None = None,
        rotation: str | None = None,
        hadamard_rounds: int | None = None,
        codebook: str | None = None,
        scale_rule: str | None = None,
        scale_type: Any = None,
        k: Mapping[str, Any] | None = None,
        v: Mapping[str, Any] | None = None,
        seed: int = 0,
        block_size: int = 16,
        exact_block_size: int = 16,
        raw_type: Any = "bf16",
        device: Any = "cpu",
        simd: str = "auto",
        threads: int = 0,
    ):
        self._handle: ctypes.c_void_p | None = None
        config = _lib.Config()
        name = None if preset is None else preset.encode()
        check(functions.config_init(ctypes.byref(config), ctypes.sizeof(config), name))
        self.device_tuple = parse_device(device)
        shared = {
            "rotation": rotation,
            "hadamard_rounds": hadamard_rounds,
            "codebook": codebook,
            "scale_rule": scale_rule,
            "scale_type": scale_type,
        }
        keep: list[Any] = []
        config.k.head_dim, config.v.head_dim = head_dim, head_dim_v or 0
        _side_config(config.k, "k", k or {}, keep, shared, k_bits)
        _side_config(config.v, "v", v or {}, keep, shared, v_bits)
        config.device, config.device_ordinal = _lib.DEVICES[self.device_tuple[0]], self.device_tuple[1]
        config.kv_heads = kv_heads
        config.seed = seed
        config.block_size_tokens, config.exact_block_size_tokens = block_size, exact_block_size
        config.raw_type = _lib.TYPES[type_name(raw_type, "raw_type")] if type_name(raw_type) in _lib.TYPES else -1
        config.simd, config.threads = _choice(simd, _lib.SIMD, "simd"), threads
        handle = ctypes.c_void_p()
        check(functions.create(ctypes.byref(config), ctypes.byref(handle)))
        self._handle = handle
        self._finalizer = weakref.finalize(self, functions.destroy, handle)
        self._finalizer.atexit = False  # the driver may be gone by then; the process frees all
        self.preset = preset
        self.info = self._read_info()
        self.kv_heads = self.info.kv_heads
        self.head_dim_k, self.head_dim_v = self.info.k.head_dim, self.info.v.head_dim
        self.block_size, self.exact_block_size = self.info.block_size, self.info.exact_block_size
        self._layouts = {which: self._read_layout(which) for which in _lib.PAGES}

    def __repr__(self) -> str:
        if self._handle is None:
            return "<tqkv.Codec, closed>"
        i = self.info
        return f"<tqkv.Codec k{i.k.bits}v{i.v.bits} head_dim {i.k.head_dim} kv_heads {i.kv_heads} on {i.device}>"

    # ---- life

    @property
    def handle(self) -> ctypes.c_void_p:
        """The tq_codec, for calls that this package does not make."""
        if self._handle is None:
            raise InvalidArgument("the codec was closed")
        return self._handle

    def close(self) -> None:
        """Ends the codec now. No queued work, captured graph or bound call may still use it."""
        if self._handle is not None:
            self._handle = None
            self._finalizer()

    def __enter__(self) -> Codec:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what it is

    def _read_info(self) -> Info:
        info = new(_lib.CodecInfo)
        check(functions.info(self.handle, ctypes.byref(info)))

        def side(s: Any) -> SideInfo:
            return SideInfo(
                head_dim=s.head_dim,
                bits=s.bits,
                rotation=_name_of(s.rotation, _lib.ROTATIONS),
                hadamard_rounds=s.hadamard_rounds,
                codebook=_name_of(s.codebook, _lib.CODEBOOKS),
                scale_rule=_name_of(s.scale_rule, _lib.SCALE_RULES),
                scale_type=_name_of(s.scale_type, _lib.TYPES),
                code_bytes=s.code_bytes,
                scale_bytes=s.scale_bytes,
                levels=tuple((s.grid[i] + 0.5) * s.level_unit for i in range(s.num_levels)) if s.bits <= 4 else (),
                codebook_mse=s.codebook_mse,
                codebook_loss=s.codebook_loss,
            )

        kind = _name_of(info.device, _lib.DEVICES)
        return Info(
            device=kind if kind == "cpu" else f"{kind}:{info.device_ordinal}",
            kv_heads=info.kv_heads,
            k=side(info.k),
            v=side(info.v),
            seed=info.seed,
            tile_fingerprint=info.tile_fingerprint,
            page_fingerprint=info.page_fingerprint,
            exact_fingerprint=info.exact_fingerprint,
            block_size=info.block_size_tokens,
            exact_block_size=info.exact_block_size_tokens,
            raw_type=_name_of(info.raw_type, _lib.TYPES),
            simd=_name_of(info.simd, _lib.SIMD),
            threads=info.threads,
        )

    def _read_layout(self, which: str) -> Layout:
        layout = new(_lib.Layout)
        check(functions.page_layout(self.handle, _lib.PAGES[which], ctypes.byref(layout)))
        return Layout(*(getattr(layout, name) for name, *_ in _lib.Layout._fields_[1:]))

    @property
    def device(self) -> str:
        return self.info.device

    @property
    def fingerprint(self) -> int:
        """Hash of everything that decides the bytes of coded pages."""
        return self.info.page_fingerprint

    def layout(self, which: str = "coded") -> Layout:
        if which not in self._layouts:
            raise InvalidArgument(f"which is {which!r}; it must be 'coded' or 'exact'")
        return self._layouts[which]

    @property
    def bytes_per_token(self) -> int:
        """Of all kv heads, keys and values, scales included."""
        return self._layouts["coded"].bytes_per_token

    def bytes(self, num_blocks: int, which: str = "coded") -> int:
        """Bytes of a packed pool of blocks."""
        result = ctypes.c_int64()
        self.layout(which)
        check(functions.pages_bytes(self.handle, _lib.PAGES[which], num_blocks, ctypes.byref(result)))
        return result.value

    def new_pages(self, num_blocks: int, which: str = "coded", library: str | None = None) -> Pages:
        """A pool in new memory of an array library (None: NumPy on the CPU, else PyTorch or CuPy)."""
        memory = _arrays.array_library(library, self.device_tuple).zeros((self.bytes(num_blocks, which),), "u8")
        return Pages(self, memory, num_blocks, which)

    def new_faults(self, library: str | None = None) -> Faults:
        return Faults(self.device, library)

    # ---- vectors

    def _side(self, side: str) -> SideInfo:
        if side not in _lib.SIDES:
            raise InvalidArgument(f"side is {side!r}; it must be 'k' or 'v'")
        return self.info.k if side == "k" else self.info.v

    def _vectors_workspace(self, side: str, count: int, given: Any, like: View, stream: int) -> tuple[int, int, Any]:
        size = ctypes.c_size_t()
        check(functions.vectors_workspace(self.handle, _lib.SIDES[side], count, ctypes.byref(size)))
        return self._workspace(size.value, given, like, stream)

    def _workspace(self, needed: int, given: Any, like: View, stream: int) -> tuple[int, int, Any]:
        if given is not None:
            found = packed(
                array(given, "workspace", self.device_tuple, tuple(_arrays.ITEM_BYTES), writable=True), "workspace"
            )
            return found.pointer, found.size * _arrays.ITEM_BYTES[found.dtype], found
        if needed == 0:
            return 0, 0, None
        memory = _arrays.array_library_of(like, self.device_tuple).empty((needed,), "u8", stream)
        return _arrays.view(memory, "workspace").pointer, needed, memory

    def _new_output(self, shape: tuple[int, ...], dtype: str, like: View, stream: int) -> Any:
        library = _arrays.array_library_of(like, self.device_tuple)
        if library.name == "numpy" and dtype == "bf16" and getattr(like.owner, "dtype", None) == np.uint16:
            dtype = "u16"  # who brings bf16 as uint16 gets it so
        return library.empty(shape, dtype, stream)

    def _faults(self, faults: Faults | None) -> int:
        if faults is None:
            return 0
        memory = faults.array if isinstance(faults, Faults) else faults
        return packed(array(memory, "faults", self.device_tuple, ("u8",), shape=(64,), writable=True), "faults").pointer

    def encode(
        self,
        x: Any,
        side: str = "k",
        *,
        codes: Any = None,
        scales: Any = None,
        dtype: Any = None,
        faults: Faults | None = None,
        workspace: Any = None,
        stream: Any = None,
    ) -> tuple[Any, Any]:
        """Compresses vectors [..., head_dim] into codes, bytes [..., code_bytes], and scales [...] (None where raw).
        Outputs that are not given are allocated by the input's library."""
        info = self._side(side)
        kind = None if dtype is None else type_name(dtype)
        on = _arrays.current_stream(self.device_tuple, stream, x, codes)
        source = array(x, "x", self.device_tuple, _FLOATS, dtype=kind, stream=on)
        if not source.shape or source.shape[-1] != info.head_dim:
            raise InvalidArgument(
                f"x has shape {list(source.shape)}; its last dimension must be head_dim, {info.head_dim}"
            )
        leading = source.shape[:-1]
        count, stride = flat_rows(source, "x", 1)
        if codes is None:
            codes = self._new_output((*leading, info.code_bytes), "u8", source, on)
        to = array(
            codes, "codes", self.device_tuple, ("u8",), shape=(*leading, info.code_bytes), writable=True, stream=on
        )
        args = new(_lib.EncodeArgs, side=_lib.SIDES[side], count=count, input=source.pointer, input_stride=stride)
        args.input_type = _lib.TYPES[source.dtype]
        args.codes, args.codes_stride_bytes = to.pointer, flat_rows(to, "codes", 1)[1]
        if info.scale_bytes:
            if scales is None:
                scales = self._new_output(leading, info.scale_type, source, on)
            s = array(scales, "scales", self.device_tuple, (info.scale_type,), shape=leading, writable=True, stream=on)
            args.scales, args.scales_stride_bytes = s.pointer, self._scale_stride(s, info)
        elif scales is not None:
            raise InvalidArgument(f"scales is given, but side {side!r} is raw and has none")
        args.faults = self._faults(faults)
        args.workspace, args.workspace_bytes, keep = self._vectors_workspace(side, count, workspace, source, on)
        args.stream = on
        check(functions.encode(self.handle, ctypes.byref(args)))
        del keep
        return codes, scales

    @staticmethod
    def _scale_stride(scales: View, info: SideInfo) -> int:
        return flat_rows(scales, "scales", 0)[1] * info.scale_bytes

    def decode(
        self,
        codes: Any,
        scales: Any = None,
        side: str = "k",
        *,
        out: Any = None,
        dtype: Any = None,
        workspace: Any = None,
        stream: Any = None,
    ) -> Any:
        """The vectors [..., head_dim] of codes and scales, as `dtype` (default: that of `out`, else f32)."""
        info = self._side(side)
        kind = None if dtype is None else type_name(dtype)
        on = _arrays.current_stream(self.device_tuple, stream, codes, out)
        source = array(codes, "codes", self.device_tuple, ("u8",), stream=on)
        if not source.shape or source.shape[-1] != info.code_bytes:
            raise InvalidArgument(
                f"codes has shape {list(source.shape)}; its last dimension must be code_bytes, {info.code_bytes}"
            )
        leading = source.shape[:-1]
        count, stride = flat_rows(source, "codes", 1)
        if out is None:
            out = self._new_output((*leading, info.head_dim), kind or "f32", source, on)
            kind = kind or "f32"
        to = array(
            out,
            "out",
            self.device_tuple,
            _FLOATS,
            dtype=kind,
            shape=(*leading, info.head_dim),
            writable=True,
            stream=on,
        )
        args = new(_lib.DecodeArgs, side=_lib.SIDES[side], count=count, codes=source.pointer, codes_stride_bytes=stride)
        args.output, args.output_type, args.output_stride = to.pointer, _lib.TYPES[to.dtype], flat_rows(to, "out", 1)[1]
        if info.scale_bytes:
            if scales is None:
                raise InvalidArgument("scales is None; decode needs the scales that encode gave")
            s = array(scales, "scales", self.device_tuple, (info.scale_type,), shape=leading, stream=on)
            args.scales, args.scales_stride_bytes = s.pointer, self._scale_stride(s, info)
        elif scales is not None:
            raise InvalidArgument(f"scales is given, but side {side!r} is raw and has none")
        args.workspace, args.workspace_bytes, keep = self._vectors_workspace(side, count, workspace, source, on)
        args.stream = on
        check(functions.decode(self.handle, ctypes.byref(args)))
        del keep
        return out

    # ---- pages

    def _pages(self, pages: Pages, which: str, name: str) -> Any:
        if not isinstance(pages, Pages):
            raise InvalidType(f"{name} is a {type(pages).__name__}; it must be tqkv.Pages")
        if pages.view.device != self.device_tuple:
            raise InvalidArgument(
                f"{name} is on {_arrays.device_name(pages.view.device)}, the codec on {_arrays.device_name(self.device_tuple)}"
            )
        if pages.which != which:
            raise InvalidArgument(f"{name} are {pages.which} pages; {which} ones are needed")
        return pages.pointer

    def _slots(self, slots: Any, name: str, count: int | None, stream: int) -> View:
        return packed(array(slots, name, self.device_tuple, ("i64",), shape=(count,), stream=stream), name)

    def _vector(self, x: Any, name: str, shape: tuple[int, ...], dtype: str, stream: int, keep: list[Any]) -> int:
        if x is None:
            return 0
        found = packed(array(x, name, self.device_tuple, (dtype,), shape=shape, stream=stream), name)
        keep.append(found)
        return found.pointer

    def _cache_workspace(self, tokens: int, given: Any, like: View, stream: int) -> tuple[int, int, Any]:
        size = ctypes.c_size_t()
        check(functions.cache_workspace(self.handle, tokens, ctypes.byref(size)))
        return self._workspace(size.value, given, like, stream)

    def _rows(self, x: Any, name: str, heads: int, dim: int, kind: str | None, stream: int, **more: Any) -> View:
        return array(x, name, self.device_tuple, _FLOATS, dtype=kind, shape=(None, heads, dim), stream=stream, **more)

    def store(
        self,
        k: Any,
        v: Any,
        pages: Pages,
        slots: Any,
        *,
        exact_pages: Pages | None = None,
        exact_slots: Any = None,
        key_offset: Any = None,
        dtype: Any = None,
        faults: Faults | None = None,
        workspace: Any = None,
        stream: Any = None,
    ) -> None:
        """Compresses k [tokens, kv_heads, head_dim_k] and v into `slots`, int64 [tokens], -1 skips; see tq_cache_store."""
        args, keep = self._store_args(
            k, v, pages, slots, exact_pages, exact_slots, key_offset, dtype, faults, workspace, stream
        )
        check(functions.cache_store(self.handle, ctypes.byref(args)))
        del keep

    def _store_args(
        self,
        k: Any,
        v: Any,
        pages: Pages,
        slots: Any,
        exact_pages: Pages | None,
        exact_slots: Any,
        key_offset: Any,
        dtype: Any,
        faults: Faults | None,
        workspace: Any,
        stream: Any,
    ) -> tuple[Any, list[Any]]:
        kind = None if dtype is None else type_name(dtype)
        on = _arrays.current_stream(self.device_tuple, stream, k, v)
        keys = self._rows(k, "k", self.kv_heads, self.head_dim_k, kind, on)
        values = self._rows(v, "v", self.kv_heads, self.head_dim_v, kind, on)
        if values.shape[0] != keys.shape[0]:
            raise InvalidArgument(f"v has {values.shape[0]} tokens, k {keys.shape[0]}")
        if values.dtype != keys.dtype:
            raise InvalidType(f"v is {values.dtype}, k {keys.dtype}")
        tokens = keys.shape[0]
        where = self._slots(slots, "slots", tokens, on)
        keep: list[Any] = [keys, values, where]
        args = new(
            _lib.StoreArgs, input_type=_lib.TYPES[keys.dtype], num_tokens=tokens, k=keys.pointer, v=values.pointer
        )
        args.k_token_stride, args.k_head_stride = keys.strides[:2]
        args.v_token_stride, args.v_head_stride = values.strides[:2]
        self._fill_move(
            args, pages, where, exact_pages, exact_slots, key_offset, faults, workspace, keys, on, tokens, keep
        )
        return args, keep

    def _fill_move(
        self,
        args: Any,
        pages: Pages,
        where: View,
        exact_pages: Pages | None,
        exact_slots: Any,
        key_offset: Any,
        faults: Faults | None,
        workspace: Any,
        like: View,
        on: int,
        tokens: int,
        keep: list[Any],
    ) -> None:
        """What the arguments of store and load have in common; `keep` gets what must outlive the call."""
        args.pages, args.slots = self._pages(pages, "coded", "pages"), where.pointer
        if exact_pages is not None:
            args.exact_pages = self._pages(exact_pages, "exact", "exact_pages")
            exact = self._slots(exact_slots, "exact_slots", tokens, on)
            keep.append(exact)
            args.exact_slots = exact.pointer
        args.key_offset = self._vector(key_offset, "key_offset", (self.kv_heads, self.head_dim_k), "f32", on, keep)
        args.faults = self._faults(faults)
        args.workspace, args.workspace_bytes, memory = self._cache_workspace(tokens, workspace, like, on)
        args.stream = on
        keep += [memory, faults]

    def load(
        self,
        pages: Pages,
        slots: Any,
        *,
        k: Any = None,
        v: Any = None,
        dtype: Any = None,
        exact_pages: Pages | None = None,
        exact_slots: Any = None,
        key_offset: Any = None,
        faults: Faults | None = None,
        workspace: Any = None,
        stream: Any = None,
    ) -> tuple[Any, Any]:
        """The keys and values of slots, [tokens, kv_heads, head_dim] each, by the library of `slots` where k and v are
        None; False for one that is not wanted. A slot of -1 leaves its row unwritten; see tq_cache_load."""
        kind = None if dtype is None else type_name(dtype)
        on = _arrays.current_stream(self.device_tuple, stream, slots, k, v)
        where = self._slots(slots, "slots", None, on)
        tokens = where.shape[0]
        given = next((x for x in (k, v) if x is not None and x is not False), None)
        if kind is None:
            kind = "f32" if given is None else _arrays.view(given, "k or v", None, on).dtype
        args = new(_lib.LoadArgs, num_tokens=tokens)
        if kind not in _lib.TYPES:
            raise InvalidType(f"dtype is {kind}; it must be f32, f16 or bf16")
        args.output_type = _lib.TYPES[kind]
        outputs: list[Any] = []
        keep: list[Any] = [where]
        for name, x, dim in (("k", k, self.head_dim_k), ("v", v, self.head_dim_v)):
            if x is False:
                outputs.append(None)
                continue
            if x is None:
                x = self._new_output((tokens, self.kv_heads, dim), kind, where, on)
            to = self._rows(x, name, self.kv_heads, dim, kind, on, writable=True)
            if to.shape[0] != tokens:
                raise InvalidArgument(f"{name} has {to.shape[0]} tokens, slots {tokens}")
            if to.dtype != kind:
                raise InvalidType(f"{name} is {to.dtype}, not {kind}")
            keep.append(to)
            setattr(args, name, to.pointer)
            setattr(args, f"{name}_token_stride", to.strides[0])
            setattr(args, f"{name}_head_stride", to.strides[1])
            outputs.append(x)
        self._fill_move(
            args, pages, where, exact_pages, exact_slots, key_offset, faults, workspace, where, on, tokens, keep
        )
        check(functions.cache_load(self.handle, ctypes.byref(args)))
        del keep
        return outputs[0], outputs[1]

    def copy(
        self,
        src: Pages,
        pairs: Any,
        dst: Pages | None = None,
        *,
        exact_src: Pages | None = None,
        exact_dst: Pages | None = None,
        exact_pairs: Any = None,
        faults: Faults | None = None,
        stream: Any = None,
    ) -> None:
        """Copies blocks: `pairs`, int64 [n, 2], source and destination, on the device or as a NumPy array; see
        tq_cache_copy."""
        on = _arrays.current_stream(self.device_tuple, stream, pairs, src.memory)
        on_host = self.device_tuple[0] == "cuda" and isinstance(pairs, np.ndarray)
        if exact_pairs is not None and on_host != (
            self.device_tuple[0] == "cuda" and isinstance(exact_pairs, np.ndarray)
        ):
            raise InvalidArgument("exact_pairs must be where pairs is, on the host or on the device")
        where = ("cpu", 0) if on_host else self.device_tuple
        args = new(_lib.CopyArgs, pairs_on_host=int(on_host))
        found = packed(array(pairs, "pairs", where, ("i64",), shape=(None, 2), stream=on), "pairs")
        args.src, args.pairs, args.num_pairs = self._pages(src, "coded", "src"), found.pointer, found.shape[0]
        if dst is not None:
            args.dst = self._pages(dst, "coded", "dst")
        exact = None
        if exact_src is not None:
            args.exact_src = self._pages(exact_src, "exact", "exact_src")
            if exact_dst is not None:
                args.exact_dst = self._pages(exact_dst, "exact", "exact_dst")
            exact = packed(
                array(exact_pairs, "exact_pairs", where, ("i64",), shape=(None, 2), stream=on), "exact_pairs"
            )
            args.exact_pairs, args.num_exact_pairs = exact.pointer, exact.shape[0]
        args.faults = self._faults(faults)
        args.stream = on
        check(functions.cache_copy(self.handle, ctypes.byref(args)))
        del found, exact

    # ---- attention

    def bind_attention(
        self,
        q: Any,
        pages: Pages,
        block_table: Any = None,
        lengths: Any = None,
        *,
        block_indptr: Any = None,
        block_indices: Any = None,
        starts: Any = None,
        cu_seqlens_q: Any = None,
        q_positions: Any = None,
        max_q_len: int = 0,
        max_length_tokens: int = 0,
        causal: bool = False,
        k_new: Any = None,
        v_new: Any = None,
        exact_pages: Pages | None = None,
        exact_table: Any = None,
        exact_first_tokens: int = 0,
        exact_recent_tokens: int = 0,
        scale: float = 0.0,
        soft_cap: float = 0.0,
        window_tokens: int = 0,
        split_tokens: int = 0,
        sinks: Any = None,
        alibi_slopes: Any = None,
        key_offset: Any = None,
        out: Any = None,
        lse: Any = None,
        dtype: Any = None,
        out_dtype: Any = None,
        faults: Faults | None = None,
        workspace: Any = None,
        stream: Any = None,
    ) -> BoundAttention:
        """An attention call with everything checked and every pointer set: what remains is to call the result, as often
        as wanted, after the arrays' contents changed in place. It keeps the arrays alive, owns its workspace, and may be
        captured by a CUDA graph. All arguments are those of `attention`."""
        device = self.device_tuple
        kind = None if dtype is None else type_name(dtype)
        on = _arrays.current_stream(device, stream, q, out, block_table)
        query = array(q, "q", device, _FLOATS, dtype=kind, shape=(None, None, self.head_dim_k), stream=on)
        tokens, heads = query.shape[:2]
        keep: list[Any] = [query, pages, exact_pages, faults]

        def ints(x: Any, name: str, shape: tuple[int | None, ...]) -> View:
            found = array(x, name, device, ("i32",), shape=shape, stream=on)
            if len(shape) == 1:
                packed(found, name)
            keep.append(found)
            return found

        args = new(_lib.AttentionArgs, flags=_lib.ATTENTION_CAUSAL if causal else 0, num_tokens=tokens, q_heads=heads)
        args.q_type, args.q = _lib.TYPES[query.dtype], query.pointer
        args.q_token_stride, args.q_head_stride = query.strides[:2]
        seqs = tokens
        if lengths is None:
            raise InvalidArgument("lengths is None; it must be an int32 array, one length for each sequence")
        length_view = ints(lengths, "lengths", (None,))
        if cu_seqlens_q is not None:
            offsets = ints(cu_seqlens_q, "cu_seqlens_q", (None,))
            seqs = offsets.shape[0] - 1
            args.cu_seqlens_q = offsets.pointer
        if length_view.shape[0] != seqs:
            raise InvalidArgument(
                f"lengths has {length_view.shape[0]} sequences, "
                + ("q" if cu_seqlens_q is None else "cu_seqlens_q")
                + f" {seqs}"
            )
        args.num_seqs, args.lengths = seqs, length_view.pointer
        if q_positions is not None:
            args.q_positions = ints(q_positions, "q_positions", (tokens,)).pointer
        args.max_q_len, args.max_length_tokens = max_q_len, max_length_tokens
        if (k_new is None) != (v_new is None):
            raise InvalidArgument(f"{'k_new' if k_new is None else 'v_new'} is None; k_new and v_new go together")
        if k_new is not None:
            for name, x, dim in (("k_new", k_new, self.head_dim_k), ("v_new", v_new, self.head_dim_v)):
                own = self._rows(x, name, self.kv_heads, dim, kind, on)
                if own.shape[0] != tokens or own.dtype != query.dtype:
                    raise InvalidArgument(
                        f"{name} is {own.dtype} of {own.shape[0]} tokens, q {query.dtype} of {tokens}; they must agree"
                    )
                keep.append(own)
                setattr(args, name, own.pointer)
                setattr(args, f"{name}_token_stride", own.strides[0])
                setattr(args, f"{name}_head_stride", own.strides[1])
        args.pages = self._pages(pages, "coded", "pages")
        if block_table is not None:
            table = ints(block_table, "block_table", (seqs, None))
            args.block_table, args.table_columns = table.pointer, table.shape[1]
            args.block_table_stride = table.strides[0] if table.shape[0] > 1 else 0
        if block_indptr is not None:
            args.block_indptr = ints(block_indptr, "block_indptr", (seqs + 1,)).pointer
        if block_indices is not None:
            indices = ints(block_indices, "block_indices", (None,))
            args.block_indices, args.num_block_indices = indices.pointer, indices.shape[0]
        if starts is not None:
            args.starts = ints(starts, "starts", (seqs,)).pointer
        if exact_pages is not None:
            args.exact_pages = self._pages(exact_pages, "exact", "exact_pages")
            exact = ints(exact_table, "exact_table", (seqs, None))
            args.exact_table, args.exact_columns = exact.pointer, exact.shape[1]
            args.exact_table_stride = exact.strides[0] if exact.shape[0] > 1 else 0
        args.exact_first_tokens, args.exact_recent_tokens = exact_first_tokens, exact_recent_tokens
        args.scale, args.soft_cap = scale, soft_cap
        args.window_tokens, args.split_tokens = window_tokens, split_tokens
        args.sinks = self._vector(sinks, "sinks", (heads,), "f32", on, keep)
        args.alibi_slopes = self._vector(alibi_slopes, "alibi_slopes", (heads,), "f32", on, keep)
        args.key_offset = self._vector(key_offset, "key_offset", (self.kv_heads, self.head_dim_k), "f32", on, keep)
        out_kind = type_name(out_dtype) if out_dtype is not None else None
        shape = (tokens, heads, self.head_dim_v)
        if out is None:
            out_kind = out_kind or query.dtype
            out = self._new_output(shape, out_kind, query, on)
        to = array(out, "out", device, _FLOATS, dtype=out_kind or kind, shape=shape, writable=True, stream=on)
        keep.append(to)
        args.out, args.out_type = to.pointer, _lib.TYPES[to.dtype]
        args.out_token_stride, args.out_head_stride = to.strides[:2]
        if lse is True:
            lse = self._new_output((tokens, heads), "f32", query, on)
        elif lse is False:
            lse = None
        if lse is not None:
            sums = packed(array(lse, "lse", device, ("f32",), shape=(tokens, heads), writable=True, stream=on), "lse")
            keep.append(sums)
            args.lse = sums.pointer
        args.faults = self._faults(faults)
        args.stream = on
        size = ctypes.c_size_t()
        check(functions.attention_workspace(self.handle, ctypes.byref(args), ctypes.byref(size)))
        args.workspace, args.workspace_bytes, memory = self._workspace(size.value, workspace, query, on)
        keep.append(memory)
        return BoundAttention(
            self, args, keep, q, out, lse, _arrays.array_library_of(query, device), stream is not None
        )

    def attention(self, q: Any, pages: Pages, block_table: Any = None, lengths: Any = None, **options: Any) -> Any:
        """Attention of q [tokens, q_heads, head_dim_k] over compressed pages; see tq_paged_attention for what each
        argument means. Returns the output [tokens, q_heads, head_dim_v], or with `lse` (True or an array f32
        [tokens, q_heads]) the output and the log-sum-exp.

        block_table: int32 [seqs, columns]; or block_indptr, block_indices. lengths, starts: int32 [seqs].
        cu_seqlens_q: int32 [seqs + 1] (None: one token a sequence). q_positions: int32 [tokens].
        causal, window_tokens, soft_cap, scale, sinks, alibi_slopes, key_offset: f32 arrays and numbers.
        k_new, v_new [tokens, kv_heads, head_dim]: the call's own tokens, read raw.
        exact_pages, exact_table, exact_first_tokens, exact_recent_tokens: tokens that are read raw.
        max_q_len, max_length_tokens: host bounds; split_tokens; out, out_dtype, dtype, faults, workspace, stream."""
        bound = self.bind_attention(q, pages, block_table, lengths, **options)
        check(functions.paged_attention(self.handle, bound.args_pointer))
        return bound.out if bound.lse is None else (bound.out, bound.lse)

    def merge(
        self, states: Any, lse: Any, *, out: Any = None, out_lse: Any = None, stream: Any = None
    ) -> tuple[Any, Any]:
        """Merges attention over disjoint sets of keys: states [n, ..., head_dim] and lse f32 [n, ...]; see
        tq_merge_states."""
        on = _arrays.current_stream(self.device_tuple, stream, states, lse)
        parts = packed(array(states, "states", self.device_tuple, _FLOATS, stream=on), "states")
        if len(parts.shape) < 2:
            raise InvalidArgument(f"states has shape {list(parts.shape)}; it must be [states, ..., head_dim]")
        rows = parts.shape[1:-1]
        sums = packed(array(lse, "lse", self.device_tuple, ("f32",), shape=parts.shape[:-1], stream=on), "lse")
        if out is None:
            out = self._new_output(parts.shape[1:], parts.dtype, parts, on)
        if out_lse is None:
            out_lse = self._new_output(rows, "f32", parts, on)
        to = packed(
            array(out, "out", self.device_tuple, (parts.dtype,), shape=parts.shape[1:], writable=True, stream=on), "out"
        )
        to_lse = packed(
            array(out_lse, "out_lse", self.device_tuple, ("f32",), shape=rows, writable=True, stream=on), "out_lse"
        )
        count = 1
        for extent in rows:
            count *= extent
        args = new(_lib.MergeArgs, num_states=parts.shape[0], num_rows=count, head_dim=parts.shape[-1])
        args.type, args.states, args.lse = _lib.TYPES[parts.dtype], parts.pointer, sums.pointer
        args.out, args.out_lse, args.stream = to.pointer, to_lse.pointer, on
        check(functions.merge_states(self.handle, ctypes.byref(args)))
        return out, out_lse


class BoundAttention:
    """An attention call whose pointers are set; calling it makes it. Made by Codec.bind_attention.

    One call at a time: it owns one workspace. On CUDA it runs on the stream it was bound with, or, when that was the
    current one, on what is current when it is called.
    """

    __slots__ = (
        "_codec",
        "_current",
        "_function",
        "_handle",
        "_keep",
        "_ordinal",
        "args",
        "args_pointer",
        "array_library",
        "lse",
        "out",
        "q",
    )

    def __init__(
        self,
        codec: Codec,
        args: Any,
        keep: list[Any],
        q: Any,
        out: Any,
        lse: Any,
        library: _arrays.Library,
        fixed: bool,
    ):
        self._codec = codec
        self._keep = keep
        self._handle = codec.handle
        self._function = functions.paged_attention
        self._ordinal = codec.device_tuple[1]
        self._current: Any = None
        if codec.device_tuple[0] == "cuda" and not fixed:
            self._current = library.stream
        self.args = args
        self.args_pointer = ctypes.pointer(args)
        self.array_library = library
        self.q = q
        self.out = out
        self.lse = lse

    def __call__(self) -> Any:
        """Makes the call and returns `out`."""
        if self._current is not None:
            self.args.stream = self._current()
        if self._codec._handle is None:
            raise InvalidArgument("the codec was closed")
        status = self._function(self._handle, self.args_pointer)
        if status:
            check(status)
        return self.out


def presets() -> dict[str, tuple[int, int]]:
    """The library's presets and aliases, with the bits of keys and values."""
    result = {}
    index = 0
    while (name := functions.preset_name(index)) is not None:
        config = _lib.Config()
        check(functions.config_init(ctypes.byref(config), ctypes.sizeof(config), name))
        result[name.decode()] = (config.k.bits, config.v.bits)
        index += 1
    return result


@dataclass(frozen=True)
class Build:
    version: str
    abi_version: int
    compiler: str
    simd_targets: str
    simd_target: str
    cuda: str
    path: str


def build_info() -> Build:
    """What the loaded library is."""
    build = new(_lib.Build)
    check(functions.build_info(ctypes.byref(build)))
    return Build(
        version=build.version.decode(),
        abi_version=build.abi_version,
        compiler=build.compiler.decode(),
        simd_targets=build.simd_targets.decode(),
        simd_target=build.simd_target.decode(),
        cuda=build.cuda.decode(),
        path=_lib.loaded_path(),
    )


def device_count(device: str = "cuda") -> int:
    """Number of usable devices of a kind; 0 CUDA devices is no error."""
    count = ctypes.c_int32()
    check(functions.device_count(_choice(device, _lib.DEVICES, "device"), ctypes.byref(count), None))
    return count.value
