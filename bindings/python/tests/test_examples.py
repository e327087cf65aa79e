# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tqkv

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "TQKV_LIBRARY": tqkv.loaded_path(),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_numpy_only():
    out = run("numpy_only.py")
    errors = {line.split()[0]: float(line.split()[2]) for line in out.splitlines() if line.startswith(("raw", "k"))}
    assert list(errors) == ["raw", "k4v4", "k3v3", "k2v2"]
    assert errors["raw"] < 0.01 < errors["k4v4"] < errors["k3v3"] < errors["k2v2"] < 1


@pytest.mark.torch
def test_torch_paged():
    out = run("torch_paged.py", "--steps", "20", "--prompt", "40", "--layers", "2")
    assert "4 sequences" in out and "differs by" in out
