# SPDX-License-Identifier: Apache-2.0
"""tqkv.h in ctypes: its constants, its structs, its table of functions, and its errors as exceptions.

This module alone knows the C interface; tests/test_abi.py compares sizes and offsets with the header.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_char,
    c_char_p,
    c_double,
    c_float,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

ABI_VERSION = 1

OK = 0
ERROR_INVALID_ARGUMENT = 1
ERROR_NULL_POINTER = 2
ERROR_MISALIGNED = 3
ERROR_STRUCT_SIZE = 4
ERROR_UNKNOWN_ENUM = 5
ERROR_RESERVED_NOT_ZERO = 6
ERROR_OVERFLOW = 7
ERROR_WORKSPACE_TOO_SMALL = 8
ERROR_FINGERPRINT_MISMATCH = 9
ERROR_NOT_SUPPORTED = 20
ERROR_NO_DEVICE = 21
ERROR_OUT_OF_MEMORY = 40
ERROR_CUDA = 41
ERROR_CUBLAS = 42
ERROR_INTERNAL = 43
ERROR_PARSE = 60

DEVICES = {"cpu": 0, "cuda": 1}
TYPES = {"f32": 1, "f16": 2, "bf16": 3}
SIDES = {"k": 0, "v": 1}
ROTATIONS = {"default": 0, "none": 1, "hadamard": 2, "dense": 3, "custom": 4}
CODEBOOKS = {"default": 0, "gaussian": 1, "beta": 2, "uniform": 3, "custom": 4}
SCALE_RULES = {"default": 0, "least_mse": 1, "norm": 2, "unbiased": 3}
SIMD = {"auto": 0, "scalar": 1, "avx2": 2, "avx512": 3, "neon": 4}
PAGES = {"coded": 0, "exact": 1}
ATTENTION_CAUSAL = 1
FAULT_KINDS = ("slot", "length", "block", "non_finite", "range")


class Build(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("abi_version", c_uint32),
        ("version", c_char_p),
        ("compiler", c_char_p),
        ("simd_targets", c_char_p),
        ("simd_target", c_char_p),
        ("cuda", c_char_p),
    ]


class DeviceInfo(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("processors", c_int32),
        ("name", c_char * 128),
        ("memory_bytes", c_int64),
        ("compute_capability", c_int32),
        ("reserved", c_int32),
    ]


class SideConfig(ctypes.Structure):
    _fields_ = [
        ("head_dim", c_int32),
        ("bits", c_int32),
        ("rotation", c_int32),
        ("hadamard_rounds", c_int32),
        ("codebook", c_int32),
        ("scale_rule", c_int32),
        ("scale_type", c_int32),
        ("num_levels", c_int32),
        ("levels", c_void_p),
        ("matrix", c_void_p),
        ("reserved", c_int32 * 4),
    ]


class Config(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("device", c_int32),
        ("device_ordinal", c_int32),
        ("kv_heads", c_int32),
        ("k", SideConfig),
        ("v", SideConfig),
        ("seed", c_uint64),
        ("block_size_tokens", c_int32),
        ("exact_block_size_tokens", c_int32),
        ("raw_type", c_int32),
        ("simd", c_int32),
        ("threads", c_int32),
        ("reserved", c_int32),
        ("parallel_for", c_void_p),
        ("parallel_context", c_void_p),
    ]


class SideInfo(ctypes.Structure):
    _fields_ = [
        ("head_dim", c_int32),
        ("bits", c_int32),
        ("rotation", c_int32),
        ("hadamard_rounds", c_int32),
        ("codebook", c_int32),
        ("scale_rule", c_int32),
        ("scale_type", c_int32),
        ("num_levels", c_int32),
        ("code_bytes", c_int32),
        ("scale_bytes", c_int32),
        ("grid", c_int8 * 16),
        ("level_unit", c_float),
        ("reserved", c_float),
        ("codebook_mse", c_double),
        ("codebook_loss", c_double),
    ]


class CodecInfo(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("device", c_int32),
        ("device_ordinal", c_int32),
        ("kv_heads", c_int32),
        ("k", SideInfo),
        ("v", SideInfo),
        ("seed", c_uint64),
        ("tile_fingerprint", c_uint64),
        ("page_fingerprint", c_uint64),
        ("exact_fingerprint", c_uint64),
        ("block_size_tokens", c_int32),
        ("exact_block_size_tokens", c_int32),
        ("raw_type", c_int32),
        ("simd", c_int32),
        ("threads", c_int32),
        ("reserved", c_int32),
    ]


class Faults(ctypes.Structure):
    _fields_ = [("first", c_uint64), ("count", c_uint64 * 5), ("reserved", c_uint64 * 2)]


class EncodeArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("side", c_int32),
        ("count", c_int64),
        ("input", c_void_p),
        ("input_type", c_int32),
        ("reserved", c_int32),
        ("input_stride", c_int64),
        ("codes", c_void_p),
        ("codes_stride_bytes", c_int64),
        ("scales", c_void_p),
        ("scales_stride_bytes", c_int64),
        ("faults", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("stream", c_void_p),
    ]


class DecodeArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("side", c_int32),
        ("count", c_int64),
        ("codes", c_void_p),
        ("codes_stride_bytes", c_int64),
        ("scales", c_void_p),
        ("scales_stride_bytes", c_int64),
        ("output", c_void_p),
        ("output_type", c_int32),
        ("reserved", c_int32),
        ("output_stride", c_int64),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("stream", c_void_p),
    ]


class Layout(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("block_size_tokens", c_int32),
        ("tile_bytes", c_int64),
        ("k_codes_offset", c_int64),
        ("v_codes_offset", c_int64),
        ("k_scales_offset", c_int64),
        ("v_scales_offset", c_int64),
        ("head_stride_bytes", c_int64),
        ("tile_stride_bytes", c_int64),
        ("block_stride_bytes", c_int64),
        ("bytes_per_token", c_int64),
        ("fingerprint", c_uint64),
    ]


class PagesStruct(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("base", c_void_p),
        ("num_blocks", c_int64),
        ("block_stride_bytes", c_int64),
        ("tile_stride_bytes", c_int64),
        ("head_stride_bytes", c_int64),
        ("fingerprint", c_uint64),
    ]


class StoreArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("input_type", c_int32),
        ("num_tokens", c_int64),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_token_stride", c_int64),
        ("k_head_stride", c_int64),
        ("v_token_stride", c_int64),
        ("v_head_stride", c_int64),
        ("pages", POINTER(PagesStruct)),
        ("slots", c_void_p),
        ("exact_pages", POINTER(PagesStruct)),
        ("exact_slots", c_void_p),
        ("key_offset", c_void_p),
        ("faults", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("stream", c_void_p),
    ]


class LoadArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("output_type", c_int32),
        ("num_tokens", c_int64),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_token_stride", c_int64),
        ("k_head_stride", c_int64),
        ("v_token_stride", c_int64),
        ("v_head_stride", c_int64),
        ("pages", POINTER(PagesStruct)),
        ("slots", c_void_p),
        ("exact_pages", POINTER(PagesStruct)),
        ("exact_slots", c_void_p),
        ("key_offset", c_void_p),
        ("faults", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("stream", c_void_p),
    ]


class CopyArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("pairs_on_host", c_int32),
        ("src", POINTER(PagesStruct)),
        ("dst", POINTER(PagesStruct)),
        ("pairs", c_void_p),
        ("num_pairs", c_int64),
        ("exact_src", POINTER(PagesStruct)),
        ("exact_dst", POINTER(PagesStruct)),
        ("exact_pairs", c_void_p),
        ("num_exact_pairs", c_int64),
        ("faults", c_void_p),
        ("stream", c_void_p),
    ]


class AttentionArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_int32),
        ("num_seqs", c_int32),
        ("num_tokens", c_int32),
        ("q_heads", c_int32),
        ("q_type", c_int32),
        ("q", c_void_p),
        ("q_token_stride", c_int64),
        ("q_head_stride", c_int64),
        ("cu_seqlens_q", c_void_p),
        ("q_positions", c_void_p),
        ("max_q_len", c_int32),
        ("max_length_tokens", c_int32),
        ("k_new", c_void_p),
        ("v_new", c_void_p),
        ("k_new_token_stride", c_int64),
        ("k_new_head_stride", c_int64),
        ("v_new_token_stride", c_int64),
        ("v_new_head_stride", c_int64),
        ("pages", POINTER(PagesStruct)),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("table_columns", c_int64),
        ("block_indptr", c_void_p),
        ("block_indices", c_void_p),
        ("num_block_indices", c_int64),
        ("lengths", c_void_p),
        ("starts", c_void_p),
        ("exact_pages", POINTER(PagesStruct)),
        ("exact_table", c_void_p),
        ("exact_table_stride", c_int64),
        ("exact_columns", c_int64),
        ("exact_first_tokens", c_int32),
        ("exact_recent_tokens", c_int32),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("window_tokens", c_int32),
        ("split_tokens", c_int32),
        ("sinks", c_void_p),
        ("alibi_slopes", c_void_p),
        ("key_offset", c_void_p),
        ("out", c_void_p),
        ("out_type", c_int32),
        ("reserved", c_int32),
        ("out_token_stride", c_int64),
        ("out_head_stride", c_int64),
        ("lse", c_void_p),
        ("faults", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("stream", c_void_p),
    ]


class MergeArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("num_states", c_int32),
        ("num_rows", c_int64),
        ("head_dim", c_int32),
        ("type", c_int32),
        ("states", c_void_p),
        ("lse", c_void_p),
        ("out", c_void_p),
        ("out_lse", c_void_p),
        ("stream", c_void_p),
    ]


class PlanArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("block_size_tokens", c_int32),
        ("config_json", c_char_p),
        ("config_json_bytes", c_size_t),
        ("preset", c_char_p),
        ("context_tokens", c_int64),
        ("batch", c_int64),
        ("memory_bytes", c_int64),
        ("exact_first_tokens", c_int64),
        ("exact_recent_tokens", c_int64),
    ]


class PlanResult(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("kv_layers", c_int32),
        ("full_layers", c_int32),
        ("window_layers", c_int32),
        ("shared_layers", c_int32),
        ("uncached_layers", c_int32),
        ("context_tokens", c_int64),
        ("batch", c_int64),
        ("bytes_per_token", c_int64),
        ("bytes_per_sequence", c_int64),
        ("exact_bytes_per_sequence", c_int64),
        ("padding_bytes_per_sequence", c_int64),
        ("workspace_bytes", c_int64),
        ("total_bytes", c_int64),
        ("max_context_tokens", c_int64),
        ("max_batch", c_int64),
    ]


class RecommendArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("type", c_int32),
        ("num_tokens", c_int64),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_token_stride", c_int64),
        ("k_head_stride", c_int64),
        ("v_token_stride", c_int64),
        ("v_head_stride", c_int64),
        ("q", c_void_p),
        ("num_queries", c_int64),
        ("q_token_stride", c_int64),
        ("q_head_stride", c_int64),
        ("kv_heads", c_int32),
        ("q_heads", c_int32),
        ("head_dim_k", c_int32),
        ("head_dim_v", c_int32),
        ("scale", c_float),
        ("threads", c_int32),
        ("max_output_error", c_double),
        ("max_kl", c_double),
        ("max_bytes_per_token", c_double),
        ("context_tokens", c_int64),
        ("exact_first_tokens", c_int32),
        ("exact_recent_tokens", c_int32),
        ("seed", c_uint64),
    ]


class RecommendResult(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("meets_targets", c_int32),
        ("preset", c_char * 16),
        ("use_key_offset", c_int32),
        ("exact_first_tokens", c_int32),
        ("exact_recent_tokens", c_int32),
        ("outlier_channels", c_int32),
        ("output_error", c_double),
        ("kl", c_double),
        ("bytes_per_token", c_double),
        ("key_mean_share", c_double),
    ]


# Names of the structs above in the header.
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "tq_build": Build,
    "tq_device_info": DeviceInfo,
    "tq_side_config": SideConfig,
    "tq_config": Config,
    "tq_side_info": SideInfo,
    "tq_codec_info": CodecInfo,
    "tq_faults": Faults,
    "tq_encode_args": EncodeArgs,
    "tq_decode_args": DecodeArgs,
    "tq_layout": Layout,
    "tq_pages": PagesStruct,
    "tq_store_args": StoreArgs,
    "tq_load_args": LoadArgs,
    "tq_copy_args": CopyArgs,
    "tq_attention_args": AttentionArgs,
    "tq_merge_args": MergeArgs,
    "tq_plan_args": PlanArgs,
    "tq_plan_result": PlanResult,
    "tq_recommend_args": RecommendArgs,
    "tq_recommend_result": RecommendResult,
}

_status = c_int32
_codec = c_void_p
_size = POINTER(c_size_t)
_text = c_void_p  # char *, written to


class Api(ctypes.Structure):
    """tq_api. Its functions release the interpreter lock while they run."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("abi_version", c_uint32),
        ("status_string", CFUNCTYPE(c_char_p, c_int32)),
        ("last_error", CFUNCTYPE(c_char_p)),
        ("version", CFUNCTYPE(c_uint32)),
        ("build_info", CFUNCTYPE(_status, POINTER(Build))),
        ("device_count", CFUNCTYPE(_status, c_int32, POINTER(c_int32), POINTER(c_char_p))),
        ("device_get_info", CFUNCTYPE(_status, c_int32, c_int32, POINTER(DeviceInfo))),
        ("config_init", CFUNCTYPE(_status, POINTER(Config), c_uint32, c_char_p)),
        ("preset_name", CFUNCTYPE(c_char_p, c_int32)),
        ("supports", CFUNCTYPE(_status, POINTER(Config))),
        ("create", CFUNCTYPE(_status, POINTER(Config), POINTER(_codec))),
        ("destroy", CFUNCTYPE(None, _codec)),
        ("info", CFUNCTYPE(_status, _codec, POINTER(CodecInfo))),
        ("vectors_workspace", CFUNCTYPE(_status, _codec, c_int32, c_int64, _size)),
        ("encode", CFUNCTYPE(_status, _codec, POINTER(EncodeArgs))),
        ("decode", CFUNCTYPE(_status, _codec, POINTER(DecodeArgs))),
        ("page_layout", CFUNCTYPE(_status, _codec, c_int32, POINTER(Layout))),
        ("pages_bytes", CFUNCTYPE(_status, _codec, c_int32, c_int64, POINTER(c_int64))),
        ("cache_workspace", CFUNCTYPE(_status, _codec, c_int64, _size)),
        ("cache_store", CFUNCTYPE(_status, _codec, POINTER(StoreArgs))),
        ("cache_load", CFUNCTYPE(_status, _codec, POINTER(LoadArgs))),
        ("cache_copy", CFUNCTYPE(_status, _codec, POINTER(CopyArgs))),
        ("attention_workspace", CFUNCTYPE(_status, _codec, POINTER(AttentionArgs), _size)),
        ("paged_attention", CFUNCTYPE(_status, _codec, POINTER(AttentionArgs))),
        ("merge_states", CFUNCTYPE(_status, _codec, POINTER(MergeArgs))),
        ("plan", CFUNCTYPE(_status, POINTER(PlanArgs), POINTER(PlanResult), _text, c_size_t, _size)),
        ("recommend", CFUNCTYPE(_status, POINTER(RecommendArgs), POINTER(RecommendResult), _text, c_size_t, _size)),
    ]


class TqError(Exception):
    """A refused or failed call: str() is the library's sentence, `status` its number."""

    status = ERROR_INTERNAL

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        if status is not None:
            self.status = status


class InvalidArgument(TqError, ValueError):
    """An argument's value: out of range, misaligned, too small, of another codec or device."""

    status = ERROR_INVALID_ARGUMENT


class InvalidType(InvalidArgument, TypeError):
    """An argument's type, or an array's element type."""


class FingerprintMismatch(InvalidArgument):
    """Pages that another description of the bytes wrote."""

    status = ERROR_FINGERPRINT_MISMATCH


class ParseError(TqError, ValueError):
    """A malformed text."""

    status = ERROR_PARSE


class NotSupported(TqError, NotImplementedError):
    """A documented combination that this library, build or device refuses by name."""

    status = ERROR_NOT_SUPPORTED


class NoDevice(TqError, RuntimeError):
    """No driver, or no such device."""

    status = ERROR_NO_DEVICE


class OutOfMemory(TqError, MemoryError):
    status = ERROR_OUT_OF_MEMORY


class CudaError(TqError, RuntimeError):
    status = ERROR_CUDA


class InternalError(TqError, RuntimeError):
    status = ERROR_INTERNAL


class OutOfBlocks(TqError, MemoryError):
    """A pool has no free block for what was asked; nothing was changed."""

    status = ERROR_OUT_OF_MEMORY


class LibraryNotFound(TqError, ImportError):
    """No libtqkv that fits."""

    status = ERROR_NO_DEVICE


_EXCEPTIONS: dict[int, type[TqError]] = {
    ERROR_FINGERPRINT_MISMATCH: FingerprintMismatch,
    ERROR_NOT_SUPPORTED: NotSupported,
    ERROR_NO_DEVICE: NoDevice,
    ERROR_OUT_OF_MEMORY: OutOfMemory,
    ERROR_CUDA: CudaError,
    ERROR_CUBLAS: CudaError,
    ERROR_INTERNAL: InternalError,
    ERROR_PARSE: ParseError,
}


def raise_error(status: int, what: str = "") -> None:
    """Raises the exception of a status that a call of this thread just returned."""
    sentence = _api().last_error().decode("utf-8", "replace")
    if not sentence:
        sentence = _api().status_string(status).decode()
    kind = _EXCEPTIONS.get(status, InvalidArgument if 0 < status < 20 else InternalError)
    raise kind(f"{what}: {sentence}" if what else sentence, status)


def check(status: int, what: str = "") -> None:
    if status != OK:
        raise_error(status, what)


def _candidates() -> list[str]:
    override = os.environ.get("TQKV_LIBRARY")
    if override:
        return [override]
    names = ["libtqkv.dylib", "libtqkv.1.dylib"] if sys.platform == "darwin" else ["libtqkv.so", "libtqkv.so.1"]
    here = Path(__file__).resolve().parent
    found = [str(here / name) for name in names if (here / name).exists()]
    return [*found, names[1]]  # the wheel's, else the system's


class _Loaded:
    api: Any = None
    path = ""
    handle: Any = None


def _load() -> Any:
    failures = []
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
            get_api = library.tq_get_api
        except (OSError, AttributeError) as error:
            failures.append(f"{path}: {error}")
            continue
        get_api.argtypes = [c_uint32, POINTER(POINTER(Api))]
        get_api.restype = _status
        table = POINTER(Api)()
        if get_api(ABI_VERSION, ctypes.byref(table)) != OK:
            failures.append(f"{path}: serves no ABI version {ABI_VERSION}")
            continue
        # Functions are only ever appended: an older library has a shorter table, whose missing end stays NULL.
        api = Api()
        size = table.contents.struct_size
        ctypes.memmove(ctypes.byref(api), table, min(size, ctypes.sizeof(Api)))
        _Loaded.api, _Loaded.path, _Loaded.handle = api, path, library
        return api
    raise LibraryNotFound(
        "no usable libtqkv: set TQKV_LIBRARY to the path of libtqkv.so, or reinstall the package ("
        + "; ".join(failures)
        + ")"
    )


def _api() -> Any:
    api = _Loaded.api
    return api if api is not None else _load()


class _Functions:
    """The table's functions as attributes, each fetched once: reading a ctypes field makes a new object every time."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(_api(), name)
        if not function:
            raise NotSupported(f"the loaded library {_Loaded.path} is older than tq_{name}")
        setattr(self, name, function)
        return function


functions = _Functions()


def loaded_path() -> str:
    """Where the library in use was loaded from."""
    _api()
    return _Loaded.path


def new(struct: type[Any], **fields: Any) -> Any:
    """A zeroed struct of the interface with its struct_size set."""
    return struct(struct_size=ctypes.sizeof(struct), **fields)
