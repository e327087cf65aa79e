# SPDX-License-Identifier: Apache-2.0
"""Random inputs are drawn anew; TQKV_TEST_SEED repeats a run."""

from __future__ import annotations

import importlib.util
import os
import secrets

import numpy as np
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take the device for itself

import tqkv

SEED = int(os.environ.get("TQKV_TEST_SEED") or secrets.randbits(63))


def _missing(mark: str) -> str | None:
    """Why tests of a mark cannot run here."""
    if mark in ("torch", "gpu", "transformers") and importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    if mark == "transformers" and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if mark == "gpu":
        import torch

        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
        if tqkv.device_count("cuda") == 0:
            return "the library sees no CUDA device"
    return None


def pytest_report_header(config: pytest.Config) -> list[str]:
    build = tqkv.build_info()
    return [f"TQKV_TEST_SEED={SEED}", f"libtqkv {build.version} from {build.path}, CUDA: {build.cuda}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {mark: _missing(mark) for mark in ("torch", "gpu", "transformers")}
    for item in items:
        for mark, reason in reasons.items():
            if reason is not None and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def random(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng([SEED, *request.node.nodeid.encode()])
