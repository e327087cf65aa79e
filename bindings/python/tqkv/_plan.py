# SPDX-License-Identifier: Apache-2.0
"""What fits, how good it is, and what to take: tq_plan, measured errors, tq_recommend."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import _arrays, _lib
from ._codec import Codec
from ._lib import InvalidArgument, InvalidType, check, functions, new


def _with_json(function: Any, args: Any, result: Any, capacity: int) -> dict[str, Any]:
    """Calls a function that also writes JSON, again where the text takes more room."""
    size = ctypes.c_size_t()
    while True:
        text = ctypes.create_string_buffer(capacity)
        status = function(ctypes.byref(args), ctypes.byref(result), text, capacity, ctypes.byref(size))
        if status == _lib.ERROR_INVALID_ARGUMENT and size.value > capacity:
            capacity = size.value
            continue
        check(status)
        found: dict[str, Any] = json.loads(text.value)
        return found


@dataclass(frozen=True)
class Plan:
    """Memory of a model's cache; see tq_plan_result."""

    kv_layers: int
    full_layers: int
    window_layers: int
    shared_layers: int
    uncached_layers: int
    context_tokens: int
    batch: int
    bytes_per_token: int
    bytes_per_sequence: int
    exact_bytes_per_sequence: int
    padding_bytes_per_sequence: int
    workspace_bytes: int
    total_bytes: int
    max_context_tokens: int
    max_batch: int
    details: dict[str, Any] = field(repr=False)
    """The library's JSON, layer kinds included."""


def plan(
    config: Any,
    preset: str | None = None,
    *,
    context_tokens: int = 0,
    batch: int = 0,
    memory_bytes: int = 0,
    exact_first_tokens: int = 0,
    exact_recent_tokens: int = 0,
    block_size: int = 0,
) -> Plan:
    """Memory of a model's cache under a preset, "bf16" or "fp8"; see tq_plan. `config`: a Hugging Face config, as a path
    of config.json or its folder, a mapping, or an object with to_dict()."""
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        text = (path / "config.json" if path.is_dir() else path).read_bytes()
    else:
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        if not isinstance(config, Mapping):
            raise InvalidType(
                f"config is a {type(config).__name__}; it must be a path, a mapping or a Hugging Face config"
            )
        text = json.dumps(dict(config), default=str).encode()
    args = new(
        _lib.PlanArgs,
        block_size_tokens=block_size,
        config_json=text,
        config_json_bytes=len(text),
        preset=None if preset is None else preset.encode(),
        context_tokens=context_tokens,
        batch=batch,
        memory_bytes=memory_bytes,
        exact_first_tokens=exact_first_tokens,
        exact_recent_tokens=exact_recent_tokens,
    )
    result = new(_lib.PlanResult)
    details = _with_json(functions.plan, args, result, 1 << 16)
    return Plan(**{name: getattr(result, name) for name, *_ in _lib.PlanResult._fields_[1:]}, details=details)


@dataclass(frozen=True)
class Validation:
    """Measured error of one bit width and head_dim on random unit vectors."""

    head_dim: int
    bits: int
    bytes: int
    """Of one stored vector."""
    mse: float
    """Mean |x - decoded|^2 with the least-MSE scale."""
    mse_unbiased: float
    """The same with the unbiased scale."""
    slope_unbiased: float
    """Mean of <x, decoded>, ideally 1."""
    lower_bound: float
    """4^-bits, which no quantiser gets below (arXiv:2504.19874, Theorem 3)."""
    upper_bound: float
    """sqrt(3) pi/2 4^-bits, the paper's bound for its quantiser (Theorem 1)."""
    bound_applies: bool
    """8 bits are an int8 grid over each vector's range, which the theorem does not speak of."""

    @property
    def within_bounds(self) -> bool:
        return self.mse >= self.lower_bound and max(self.mse, self.mse_unbiased) <= self.upper_bound


def validate(
    head_dims: Sequence[int] = (64, 80, 96, 112, 128, 192, 256, 576),
    bits: Sequence[int] = (1, 2, 3, 4, 8),
    *,
    vectors: int = 8192,
    rotation: str = "hadamard",
    seed: int | None = None,
    device: Any = "cpu",
    library: str | None = None,
) -> list[Validation]:
    """Measures the library against the paper's bounds, as `tqkv validate` does: random unit vectors are encoded and decoded
    on `device`. Raises nothing where a bound is broken: see `within_bounds`."""
    if vectors < 1:
        raise InvalidArgument(f"vectors is {vectors}; it must be at least 1")
    random = np.random.default_rng(seed)
    results = []
    for head_dim in head_dims:
        x = random.standard_normal((vectors, head_dim))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        rows = x.astype(np.float32)
        for width in bits:
            options = {"bits": width, "rotation": rotation}
            with Codec(
                head_dim=head_dim,
                k={**options, "scale_rule": "least_mse"},
                v={**options, "scale_rule": "unbiased"},
                seed=int(random.integers(1 << 63)),
                device=device,
            ) as codec:
                memory = _arrays.array_library(library, codec.device_tuple)
                raw = memory.empty((rows.nbytes,), "u8")
                memory.upload(raw, rows.view(np.uint8).reshape(-1))
                on_device = memory.reinterpret(raw, 0, rows.shape, "f32")
                errors, slope = {}, 0.0
                for side in ("k", "v"):
                    decoded = memory.to_numpy(codec.decode(*codec.encode(on_device, side), side)).astype(np.float64)
                    norms = np.sum(rows.astype(np.float64) ** 2, axis=1)
                    errors[side] = float(np.mean(np.sum((decoded - rows) ** 2, axis=1) / norms))
                    slope = float(np.mean(np.sum(decoded * rows, axis=1)))
                info = codec.info.k
            results.append(
                Validation(
                    head_dim=head_dim,
                    bits=width,
                    bytes=info.code_bytes + info.scale_bytes,
                    mse=errors["k"],
                    mse_unbiased=errors["v"],
                    slope_unbiased=slope,
                    lower_bound=4.0**-width,
                    upper_bound=math.sqrt(3) * math.pi / 2 * 4.0**-width,
                    bound_applies=width <= 4,
                )
            )
    return results


@dataclass(frozen=True)
class Recommendation:
    """How to store a layer, and why; see tq_recommend."""

    preset: str
    use_key_offset: bool
    exact_first_tokens: int
    exact_recent_tokens: int
    meets_targets: bool
    output_error: float
    kl: float
    """NaN where no queries were given."""
    bytes_per_token: float
    key_mean_share: float
    outlier_channels: int
    reasons: tuple[str, ...]
    details: dict[str, Any] = field(repr=False)
    """The library's JSON: statistics, and every candidate with its figures."""


def recommend(
    k: Any,
    v: Any,
    q: Any = None,
    *,
    max_output_error: float = 0.0,
    max_kl: float = 0.0,
    max_bytes_per_token: float = 0.0,
    exact_tokens: tuple[int, int] | None = (4, 128),
    context_tokens: int = 0,
    scale: float = 0.0,
    threads: int = 0,
    seed: int = 0,
    dtype: Any = None,
) -> Recommendation:
    """Recommends a preset from a layer's keys and values [tokens, kv_heads, head_dim], after position encoding, and the
    queries [queries, q_heads, head_dim] of the last positions, all in host memory.

    Targets: error of attention outputs, KL of the attention weights (nats), bytes per token of all kv heads; with none,
    max_output_error is 0.05. `exact_tokens`: first and recent tokens whose exact copies are considered (None: none)."""
    kind = None if dtype is None else _arrays.type_name(dtype)
    host = ("cpu", 0)
    floats = tuple(_lib.TYPES)
    keys = _arrays.array(k, "k", host, floats, dtype=kind, shape=(None, None, None))
    tokens, heads, head_dim = keys.shape
    values = _arrays.array(v, "v", host, (keys.dtype,), dtype=kind, shape=(tokens, heads, None))
    args = new(
        _lib.RecommendArgs,
        type=_lib.TYPES[keys.dtype],
        num_tokens=tokens,
        k=keys.pointer,
        v=values.pointer,
        k_token_stride=keys.strides[0],
        k_head_stride=keys.strides[1],
        v_token_stride=values.strides[0],
        v_head_stride=values.strides[1],
        kv_heads=heads,
        head_dim_k=head_dim,
        head_dim_v=values.shape[2],
        scale=scale,
        threads=threads,
        max_output_error=max_output_error,
        max_kl=max_kl,
        max_bytes_per_token=max_bytes_per_token,
        context_tokens=context_tokens,
        seed=seed,
    )
    queries = None
    if q is not None:
        queries = _arrays.array(q, "q", host, (keys.dtype,), dtype=kind, shape=(None, None, head_dim))
        args.q, args.num_queries, args.q_heads = queries.pointer, queries.shape[0], queries.shape[1]
        args.q_token_stride, args.q_head_stride = queries.strides[:2]
    args.exact_first_tokens, args.exact_recent_tokens = (-1, 0) if exact_tokens is None else exact_tokens
    result = new(_lib.RecommendResult)
    details = _with_json(functions.recommend, args, result, 1 << 16)
    del keys, values, queries
    return Recommendation(
        preset=result.preset.decode(),
        use_key_offset=bool(result.use_key_offset),
        exact_first_tokens=result.exact_first_tokens,
        exact_recent_tokens=result.exact_recent_tokens,
        meets_targets=bool(result.meets_targets),
        output_error=result.output_error,
        kl=result.kl,
        bytes_per_token=result.bytes_per_token,
        key_mean_share=result.key_mean_share,
        outlier_channels=result.outlier_channels,
        reasons=tuple(details["reasons"]),
        details=details,
    )
