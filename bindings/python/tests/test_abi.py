# SPDX-License-Identifier: Apache-2.0
"""_lib.py is the header: every size, offset and constant, as a C compiler sees them."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tqkv import _lib

HEADER = Path(__file__).resolve().parents[3] / "include" / "tqkv" / "tqkv.h"

CONSTANTS = {
    **{f"TQ_ERROR_{name[6:]}": value for name, value in vars(_lib).items() if name.startswith("ERROR_")},
    **{f"TQ_DEVICE_{name.upper()}": value for name, value in _lib.DEVICES.items()},
    **{f"TQ_TYPE_{name.upper()}": value for name, value in _lib.TYPES.items()},
    **{f"TQ_SIDE_{name.upper()}": value for name, value in _lib.SIDES.items()},
    **{f"TQ_ROTATION_{name.upper()}": value for name, value in _lib.ROTATIONS.items()},
    **{f"TQ_CODEBOOK_{name.upper()}": value for name, value in _lib.CODEBOOKS.items()},
    **{f"TQ_SCALE_{name.upper()}": value for name, value in _lib.SCALE_RULES.items()},
    **{f"TQ_SIMD_{name.upper()}": value for name, value in _lib.SIMD.items()},
    **{f"TQ_PAGES_{name.upper()}": value for name, value in _lib.PAGES.items()},
    **{f"TQ_FAULT_{name.upper()}": value for value, name in enumerate(_lib.FAULT_KINDS)},
    "TQ_FAULT_KINDS": len(_lib.FAULT_KINDS),
    "TQ_ATTENTION_CAUSAL": _lib.ATTENTION_CAUSAL,
    "TQKV_ABI_VERSION": _lib.ABI_VERSION,
}
STRUCTS = {**_lib.STRUCTS, "tq_api": _lib.Api}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    if not HEADER.exists():
        pytest.skip("the tests are not in the source tree: there is no tqkv.h")
    lines = ["#include <stddef.h>", "#include <stdio.h>", "#include <tqkv/tqkv.h>", "int main(void) {", 'puts("{");']
    for name, struct in STRUCTS.items():
        lines.append(f'printf("\\"{name}\\": {{\\"sizeof\\": %zu", sizeof({name}));')
        for field, *_ in struct._fields_:
            lines.append(
                f'printf(", \\"{field}\\": [%zu, %zu]", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));'
            )
        lines.append('puts("},");')
    lines.append('printf("\\"constants\\": {\\"sizeof\\": 0");')
    lines += [f'printf(", \\"{name}\\": %ld", (long){name});' for name in CONSTANTS]
    lines += ['puts("}}");', "return 0; }"]
    directory = tmp_path_factory.mktemp("abi")
    source, program = directory / "abi.c", directory / "abi"
    source.write_text("\n".join(lines))
    subprocess.run([compiler, "-std=c99", f"-I{HEADER.parents[1]}", str(source), "-o", str(program)], check=True)
    return json.loads(subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("name", STRUCTS)
def test_struct(name: str, compiled: dict[str, dict[str, int]]) -> None:
    struct, seen = STRUCTS[name], compiled[name]
    assert ctypes.sizeof(struct) == seen["sizeof"]  # and so no field of the header is missing at the end
    at = 0
    for field, *_ in struct._fields_:
        descriptor = getattr(struct, field)
        assert [descriptor.offset, descriptor.size] == seen[field], field
        assert descriptor.offset - at < 8, f"something before {field} is missing"
        at = descriptor.offset + descriptor.size
    assert seen["sizeof"] - at < 8


def test_constants(compiled: dict[str, dict[str, int]]) -> None:
    assert {name: value for name, value in compiled["constants"].items() if name != "sizeof"} == CONSTANTS


def test_every_struct_of_the_header_is_known() -> None:
    if not HEADER.exists():
        pytest.skip("the tests are not in the source tree: there is no tqkv.h")
    declared = {
        line.split()[2]
        for line in HEADER.read_text().splitlines()
        if line.startswith("typedef struct tq_") and line.endswith("{")
    }
    assert declared == set(STRUCTS)
