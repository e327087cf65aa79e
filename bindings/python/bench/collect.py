# SPDX-License-Identifier: Apache-2.0
"""Turns one run's outputs into what is committed.

    python collect.py FOLDER --results ../../bench/results/models-h200.json --report tests/report-h200.txt

FOLDER holds what it has of: eval*.json (tqkv.eval; rows are put together), reference.txt (what the model's
reference_eval.py printed), decode.json (bench/decode.py), validate*.json (tqkv.validate_model), bound-*.json
(bench_bound.py), *.xml (pytest --junitxml, -o junit_logging=system-out), gpu.txt (name and driver, as nvidia-smi gives
them), python.txt (Python's version).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

PROVENANCE = ("date", "device", "library", "commit", "torch", "transformers")
REFERENCE = re.compile(
    r"(?P<scheme>.+?) +bpv +(?P<bits_per_value>[\d.]+)  KL mean (?P<kl_mean>[\d.]+) p99 (?P<kl_p99>[\d.]+)"
    r"  flips (?P<flips>[\d.]+)%  bits/byte (?P<bits_per_byte>[\d.]+)  needle (?P<needle_recall>[\d.]+)"
)


def read(folder: Path, pattern: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern), key=lambda path: path.stem)]


def reference_rows(text: str) -> list[dict]:
    rows = []
    for line in text.splitlines():
        if found := REFERENCE.match(line):
            row = {key: value if key == "scheme" else float(value) for key, value in found.groupdict().items()}
            rows.append(row | {"flips": row["flips"] / 100})
    return rows


def merged(evals: list[dict]) -> dict:
    """One of several runs over the same windows with different presets."""
    first = evals[0]
    for other in evals[1:]:
        for key in first.keys() - {"rows", "date"}:
            if other[key] != first[key]:
                sys.exit(f"two eval files differ in {key}: {first[key]!r} and {other[key]!r}")
        seen = {row["scheme"] for row in first["rows"]}
        first["rows"] += [row for row in other["rows"] if row["scheme"] not in seen]
    return first


def results(folder: Path) -> dict:
    evals, decode = read(folder, "eval*.json"), read(folder, "decode.json")
    if not evals and not decode:
        sys.exit(f"{folder} holds no eval*.json and no decode.json")
    parts: dict[str, dict] = {}
    if evals:
        parts["eval"] = merged(evals)
    if decode:
        parts["decode"] = decode[0]
    head = {key: next(iter(parts.values()))[key] for key in PROVENANCE}
    for name, part in parts.items():
        for key in PROVENANCE:
            if part.pop(key) != head[key] and key != "date":
                sys.exit(f"{name} has another {key} than the rest")
    gpu = folder / "gpu.txt"
    if gpu.exists():
        head["driver"] = gpu.read_text().strip().split(",")[-1].strip()
    reference = folder / "reference.txt"
    if reference.exists():
        parts["reference"] = {"rows": reference_rows(reference.read_text())}
    for row in read(folder, "validate*.json"):
        parts.setdefault("validate", {"rows": []})["rows"].append(row)
    for row in read(folder, "bound-*.json"):
        parts.setdefault("bound", {})[row["device"]] = row["microseconds"]
    return head | parts


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    for tag, word in (("failure", "FAILED"), ("error", "ERROR"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            return word, (found.get("message") or "").strip().partition("\n")[0]
    return "passed", ""


def report(folder: Path, head: dict) -> str:
    """Every test with its outcome and what it printed of errors measured; no paths."""
    cases = [case for path in sorted(folder.glob("*.xml")) for case in ElementTree.parse(path).iter("testcase")]
    lines, counts = [], dict.fromkeys(("passed", "FAILED", "ERROR", "skipped"), 0)
    for case in sorted(cases, key=lambda c: (c.get("classname") or "", "gpu" not in (c.get("name") or ""))):
        word, why = outcome(case)
        counts[word] += 1
        printed = [
            line.strip()
            for line in (case.findtext("system-out") or "").splitlines()
            if re.match(r"\d+ calls, error up to|KL |tokens agree", line.strip())
        ]
        name = f"{(case.get('classname') or '').removeprefix('tests.')}::{case.get('name')}"
        lines.append(
            "  ".join([f"{word:8s}{float(case.get('time') or 0):6.2f} s  {name}", *filter(None, [why, *printed])])
        )
    python = folder / "python.txt"
    about = [
        f"pytest of bindings/python, {head['date'][:10]}: {head['device']}, driver {head.get('driver', 'unknown')}",
        f"libtqkv {head['library']} at {head['commit'] or 'an unnamed commit'}, torch {head['torch']}, "
        f"transformers {head['transformers']}" + (f", {python.read_text().strip()}" if python.exists() else ""),
        ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count),
        "",
    ]
    return "\n".join(about + lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, help="JSON for bench/plot_models.py")
    parser.add_argument("--report", type=Path, help="the tests' outcomes as text")
    a = parser.parse_args()
    found = results(a.folder)
    if a.results:
        a.results.write_text(json.dumps(found, indent=1) + "\n")
    if a.report:
        a.report.write_text(report(a.folder, found))


if __name__ == "__main__":
    main()
