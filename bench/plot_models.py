#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the results of bindings/python/bench/collect.py, prints README's tables of them, and checks what they must reach.

    bench/plot_models.py bench/results/models-h200.json bench/results/models-h200.svg
    bench/plot_models.py bench/results/models-h200.json --table
    bench/plot_models.py bench/results/models-h200.json --check
"""
import argparse
import json
import sys

from plot_codec import COLOURS, load_pyplot, save

# Rows of the table of others' schemes, by the names that reference_eval.py prints.
PEERS = {
    "bf16": "bf16",
    "fp8 e4m3": "fp8 e4m3",
    "llama.cpp q8_0": "q8_0",
    "llama.cpp q4_0 + Hadamard": "q4_0 + Hadamard",
    "KIVI K4V4 g128, window 128": "KIVI K4V4, 128 recent exact",
    "KIVI K2V2 g128, window 128": "KIVI K2V2, 128 recent exact",
    "vLLM 4bit_nc (all layers)": "vLLM 4bit_nc",
    "vLLM k3v4_nc": "vLLM k3v4_nc",
    "vLLM 3bit_nc": "vLLM 3bit_nc",
}
SIMULATED = {
    "k4v4": "TQ K4V4 + mean + win 128 + sink 4",
    "k4v3": "TQ K4V3 + mean + win + sink",
    "k3v3": "TQ K3V3 + mean + win + sink",
    "k2v2": "TQ K2V2 + mean + win + sink",
}
VALUES = 512  # bytes a token for a bit a value: 8 layers, 2 kv heads, keys and values of 128 channels


class Models:
    def __init__(self, path):
        try:
            with open(path, encoding="utf-8") as file:
                self.document = json.load(file)
            self.eval = {row["scheme"]: row for row in self.document.get("eval", {}).get("rows", [])}
            self.reference = {row["scheme"]: row for row in self.document.get("reference", {}).get("rows", [])}
            self.decode = self.document.get("decode")
            self.context = self.document.get("eval", {}).get("context")
            self.title = f"{self.document['device']}, {self.document['date'][:10]}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"{path} holds no results of models: {error!r}")

    def ours(self, kind):
        """Rows of presets, "" or "plain"."""
        return {name: row for name, row in self.eval.items() if not name.endswith(" cache") and
                name.partition("/")[2] == kind}


def kl(value):
    return f"{value:.5f}".removeprefix("0") if value else "0"


def share(value):
    return f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.3f}"


def print_quality(models):
    print("| | bytes a token | mean KL | top choice changed | bits/byte | needles found |\n|---|---|---|---|---|---|")

    def line(name, size, row):
        print(f"| {name} | {size} | {kl(row['kl_mean'])} | {100 * row['flips']:.2f}% | {row['bits_per_byte']:.4f} | "
              f"{share(row['needle_recall'])} |")

    for scheme, name in PEERS.items():
        if scheme in models.reference:
            row = models.reference[scheme]
            line(name, f"{VALUES * row['bits_per_value']:.0f}", row)
    for preset, scheme in SIMULATED.items():
        if scheme in models.reference:
            line(f"{preset.upper()} simulated, offset and exact ranges", "", models.reference[scheme])
    for name, row in models.ours("").items():
        exact = row["exact_bytes_per_sequence"] / models.context
        line(f"**{name}**", f"{row['bytes_per_token_coded']:.0f}" + (f" + {exact:.0f}" if exact else ""), row)
    for name, row in models.ours("plain").items():
        line(f"{name.partition('/')[0]} alone", f"{row['bytes_per_token_coded']:.0f}", row)


def print_decode(models):
    decode = models.decode
    if decode is None:
        return
    best = min(t for t in decode["sdpa_ms"].values() if t)
    names = ", ".join(f"{name} {t:.1f} ms" for name, t in decode["sdpa_ms"].items() if t)
    print(f"\n{decode['batch']} x {decode['context']}, {decode['layers']} layers; SDPA: {names}\n")
    print("| | attention of all layers | of SDPA's time | a layer | whole step, graph | eager | cache |\n"
          "|---|---|---|---|---|---|---|")
    gib = 2.0**30
    print(f"| bf16, SDPA | {best:.1f} ms | 1 | {1000 * best / decode['layers']:.0f} µs | | | "
          f"{decode['dense_cache_bytes'] / gib:.1f} GiB |")
    for row in decode["rows"]:
        what = row["preset"] + (" alone" if row["kind"] == "plain" else ", offset and exact ranges")
        print(f"| {what} | {row['attention_ms']:.1f} ms | {share(row['attention_share_of_sdpa'])} | "
              f"{1000 * row['attention_ms'] / decode['layers']:.0f} µs | {row['step_graph_ms']:.1f} ms | "
              f"{row['step_eager_ms']:.1f} ms | {row['cache_bytes'] / gib:.1f} GiB |")


def figures(models):
    """What must be reached: sentence, value, limit. A part that was not measured has a value of None."""
    def reference(scheme):
        return models.reference.get(scheme, {}).get("kl_mean")

    def of(scheme, key):
        return models.eval.get(scheme, {}).get(key)

    base = next((row["needle_recall"] for name, row in models.eval.items() if name.endswith(" cache")), None)
    yield "k4v4: mean KL, below fp8's", of("k4v4", "kl_mean"), reference("fp8 e4m3")
    for preset in ("k4v4", "k3v3", "k2v2"):
        limit = reference(SIMULATED[preset])
        yield (f"{preset}: mean KL, at most 1.15 times the simulation's", of(preset, "kl_mean"),
               None if limit is None else 1.15 * limit)
    for preset in ("k4v4", "k3v3"):
        found = of(preset, "needle_recall")
        yield (f"{preset}: needles missed more than by bf16, at most .05",
               None if found is None or base is None else base - found, 0.05)
    rows = models.decode["rows"] if models.decode else []
    for kind in ("plain", "offset and exact ranges"):
        part = [row["attention_share_of_sdpa"] for row in rows if row["preset"] == "k4v4" and row["kind"] == kind]
        yield f"k4v4, {kind}: decode attention, at most .35 of SDPA's time", part[0] if part else None, 0.35
    bound = models.document.get("bound", {}).get("cuda", {})
    yield "Python around a bound attention call, at most 10 us", bound.get("Python around a bound call"), 10


def check(models):
    missed = 0
    for sentence, value, limit in figures(models):
        if value is None or limit is None:
            word = "not measured"
        else:
            word = "met" if value <= limit else "missed"
            sentence += f": {value:.5g}, limit {limit:.5g}"
        missed += word != "met"
        print(f"{word:12s} {sentence}")
    return missed


def plot(models, path):
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8.6, 4.2))
    for kind, label, marker, colour in (("", "offset, 4 first and 128 recent tokens exact", "o", COLOURS[0]),
                                        ("plain", "codes alone", "^", COLOURS[1])):
        rows = {name.partition("/")[0]: row for name, row in models.ours(kind).items() if row["kl_mean"] > 0}
        rows.pop("raw", None)
        points(axes, [(name, row["bytes_per_token"], row["kl_mean"]) for name, row in rows.items()], label, marker,
               colour)
    others = [(name, VALUES * models.reference[scheme]["bits_per_value"], models.reference[scheme]["kl_mean"])
              for scheme, name in PEERS.items() if models.reference.get(scheme, {}).get("kl_mean")]
    points(axes, others, "others' schemes, simulated", "s", COLOURS[4])
    axes.set(yscale="log", xlabel=f"bytes a token, contexts of {models.context}", ylabel="mean KL to the bf16 cache")
    axes.grid(color="#d8d8d8", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{models.title}: a small model's text on compressed keys and values", fontsize=10)
    save(figure, path)


def points(axes, found, label, marker, colour):
    if not found:
        return
    axes.scatter([x for _, x, _ in found], [y for _, _, y in found], marker=marker, color=colour, label=label, s=24)
    for name, x, y in found:
        axes.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="JSON of collect.py")
    parser.add_argument("picture", nargs="?", help="file to draw, .svg or .png")
    parser.add_argument("--table", action="store_true", help="print README's tables")
    parser.add_argument("--check", action="store_true", help="say which figures are met; exit code 1 where one is not")
    arguments = parser.parse_args()
    if arguments.picture is None and not arguments.table and not arguments.check:
        parser.error("neither a picture nor --table nor --check is asked for")
    models = Models(arguments.results)
    if arguments.table:
        print_quality(models)
        print_decode(models)
    if arguments.picture is not None:
        plot(models, arguments.picture)
    if arguments.check and check(models):
        sys.exit(1)


if __name__ == "__main__":
    main()
