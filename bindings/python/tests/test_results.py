# SPDX-License-Identifier: Apache-2.0
"""bench/collect.py and the tree's bench/plot_models.py on a run's outputs in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BINDINGS = Path(__file__).resolve().parents[1]
COLLECT, PLOT = BINDINGS / "bench" / "collect.py", BINDINGS.parents[1] / "bench" / "plot_models.py"
HEAD = dict(date="2026-01-02T03:04:05Z", device="GPU", library="0.1.0", commit="abc", torch="2", transformers="5")
REFERENCE = """fp8 e4m3                             bpv  8.000  KL mean 0.00080 p99 0.0076  flips 1.58%  bits/byte 1.7399  needle 0.844  (1s)
something else
TQ K4V4 + mean + win 128 + sink 4    bpv  4.125  KL mean 0.00040 p99 0.0039  flips 1.03%  bits/byte 1.7399  needle 0.859  (12s)
"""  # noqa: E501
TESTS = """<testsuites><testsuite name="pytest"><testcase classname="tests.test_a" name="test_b[cuda]" time="1.5">
<system-out>3 calls, error up to 1.0e-05
/a/path</system-out></testcase><testcase classname="tests.test_a" name="test_c" time="0">
<failure message="assert 1 &lt; 0&#10;/a/path">/a/path</failure></testcase></testsuite></testsuites>"""


def row(scheme: str, kl: float) -> dict:
    return dict(scheme=scheme, kl_mean=kl, kl_p99=kl, flips=0.01, bits_per_byte=1.75, needle_recall=0.9,
                bytes_per_token=2304.0, bytes_per_token_coded=2112, exact_bytes_per_sequence=192 * 8192)  # fmt: skip


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.skipif(not PLOT.exists(), reason="not in the source tree")
def test_results(tmp_path):
    write = lambda name, content: (tmp_path / name).write_text(json.dumps(content))  # noqa: E731
    write("eval.json", HEAD | dict(context=8192, rows=[row("bfloat16 cache", 0.0), row("k4v4", 0.00045)]))
    write("eval-plain.json", HEAD | dict(context=8192, rows=[row("bfloat16 cache", 0.0), row("k4v4/plain", 0.003)]))
    times = dict(
        attention_ms=5.0, attention_share_of_sdpa=0.4, step_graph_ms=9.0, step_eager_ms=10.0, cache_bytes=1 << 30
    )
    write("decode.json", HEAD | dict(batch=16, context=32768, layers=32, sdpa_ms=dict(default=12.5, cudnn=None),
                                     dense_cache_bytes=4 << 30, rows=[dict(preset="k4v4", kind="plain") | times]))  # fmt: skip
    (tmp_path / "reference.txt").write_text(REFERENCE)
    (tmp_path / "gpu.txt").write_text("GPU, 580.1\n")
    (tmp_path / "gpu.xml").write_text(TESTS)
    results, report = tmp_path / "results.json", tmp_path / "report.txt"
    assert run(COLLECT, tmp_path, "--results", results, "--report", report).returncode == 0
    document = json.loads(results.read_text())
    assert document["driver"] == "580.1" and [r["scheme"] for r in document["eval"]["rows"]][2] == "k4v4/plain"
    lines = report.read_text().splitlines()
    assert lines[2] == "1 passed, 1 failed" and "/a/path" not in report.read_text()
    assert lines[4:] == [
        "passed    1.50 s  test_a::test_b[cuda]  3 calls, error up to 1.0e-05",
        "FAILED    0.00 s  test_a::test_c  assert 1 < 0",
    ]
    shown = run(PLOT, results, "--table", "--check")
    assert "| fp8 e4m3 | 4096 | .00080 | 1.58% | 1.7399 | .844 |" in shown.stdout
    assert "| **k4v4** | 2112 + 192 | .00045 | 1.00% | 1.7500 | .900 |" in shown.stdout
    assert "| k4v4 alone | 5.0 ms | .400 | 156 µs | 9.0 ms | 10.0 ms | 1.0 GiB |" in shown.stdout
    assert "met          k4v4: mean KL, at most 1.15" in shown.stdout and "missed       k4v4, plain" in shown.stdout
    assert "not measured k2v2" in shown.stdout and shown.returncode == 1
    write("eval-plain.json", HEAD | dict(context=4096, rows=[]))
    assert "differ in context" in run(COLLECT, tmp_path).stderr
