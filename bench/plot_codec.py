#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the results of `tqkv-bench codec --json RESULTS.json`, and prints README's table of them.

    bench/plot_codec.py bench/results/codec-h200.json bench/results/codec-h200.svg
    bench/plot_codec.py bench/results/codec-h200.json --table
"""
import argparse
import json
import sys

OPERATIONS = {"encode": "encode, Hadamard", "store": "store", "decode": "decode, Hadamard", "load": "load"}
BITS = (4, 3, 2)
HEAD_DIMS = (64, 96, 128, 256)
REFERENCE = 128
# Told apart by lightness as well as by hue.
COLOURS = ("#14487a", "#3b8fc2", "#8fc9e8", "#c9d6df", "#e3b778")


class Results:
    """Rows of `tqkv-bench COMMAND` by what the fields named by KEY hold."""

    COMMAND = "codec"
    KEY = ("operation", "head_dim", "bits")

    def __init__(self, path):
        try:
            with open(path, encoding="utf-8") as file:
                document = json.load(file)
            self.device = document["device"]
            self.date = document.get("date", "")[:10]
            self.rows = {tuple(row[field] for field in self.KEY): row for row in document["results"]}
            for row in self.rows.values():
                row["share"], row["microseconds"]  # noqa: B018: both are needed
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"{path} holds no results of tqkv-bench {self.COMMAND}: {error!r}")

    def row(self, *key):
        return self.rows.get(key)

    def share(self, *key):
        row = self.row(*key)
        return None if row is None else 100 * row["share"]


def bars(axes, results, groups, labels, legend):
    """One bar for each (operation, head_dim, bits) of each group, and a line where it has a share to reach."""
    width = 0.8 / len(legend)
    for column, name in enumerate(legend):
        for place, group in enumerate(groups):
            key = group[column]
            share = results.share(*key)
            if share is None:
                continue
            x = place + (column - (len(legend) - 1) / 2) * width
            axes.bar(x, share, width * 0.92, color=COLOURS[column], label=name if place == 0 else None)
            axes.text(x, share + 1.5, f"{share:.0f}", ha="center", va="bottom", fontsize=7)
            figure = results.row(*key).get("figure", "")
            if figure.startswith(">= "):
                level = float(figure[3:].rstrip("%"))
                axes.plot([x - width / 2, x + width / 2], [level, level], color="#b03010", linewidth=1.2)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 25))
    axes.tick_params(length=0)
    axes.grid(axis="y", color="#d8d8d8", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=len(legend), frameon=False, handlelength=1)


def load_pyplot():
    try:
        import matplotlib
    except ImportError:
        sys.exit("matplotlib is missing: `apt-get install python3-matplotlib`, or `pip install matplotlib`")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same results give the same file; text is drawn by the viewer and stays text.
    pyplot.rcParams.update({"svg.hashsalt": "tqkv", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif",
                            "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"]})
    return pyplot


def save(figure, path):
    figure.tight_layout()
    # A white ground, so that it reads on a dark page too.
    figure.savefig(path, facecolor="white", metadata={"Date": None} if path.endswith(".svg") else None)


def plot(results, path):
    pyplot = load_pyplot()
    figure, (by_bits, by_head_dim) = pyplot.subplots(1, 2, figsize=(8.6, 3.3), sharey=True)
    bars(by_bits, results, [[(key, REFERENCE, bits) for bits in BITS] for key in OPERATIONS.values()],
         list(OPERATIONS), [f"{bits} bits" for bits in BITS])
    held = any("figure" in row for row in results.rows.values())
    by_bits.set_title(f"head_dim {REFERENCE}" + (" (red: to be reached)" if held else ""), fontsize=9)
    by_bits.set_ylabel("% of the ceiling")
    bars(by_head_dim, results, [[(key, dim, 4) for dim in HEAD_DIMS] for key in OPERATIONS.values()],
         list(OPERATIONS), [str(dim) for dim in HEAD_DIMS])
    by_head_dim.set_title("4 bits, by head_dim", fontsize=9)
    title = f"{results.device}: share of what a kernel reaches that only moves the bytes"
    figure.suptitle(", ".join(filter(None, (title, results.date))), fontsize=10)
    save(figure, path)


def print_table(results):
    def cell(operation, bits):
        share = results.share(operation, REFERENCE, bits)
        return "" if share is None else f"{share:.0f}%"

    print("| | 4 bits | 3 bits | 2 bits |\n|---|---|---|---|")
    for name, operation in {**OPERATIONS, "store, one layer's chunk of 8192 tokens": "store, 8192 tokens"}.items():
        print(f"| {name} | " + " | ".join(cell(operation, bits) for bits in BITS) + " |")
    step = [results.row("store, 64 tokens", REFERENCE, bits) for bits in BITS]
    print("| store, a decode step of 64 tokens | " +
          " | ".join("" if row is None else f"{row['microseconds']:.1f} µs" for row in step) + " |")
    dense = [results.share(f"{name}, dense", REFERENCE, 4) for name in ("encode", "decode")]
    if None not in dense:
        print(f"| encode / decode with a dense rotation (cuBLAS) | {dense[0]:.1f}% / {dense[1]:.1f}% | | |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="JSON of tqkv-bench codec")
    parser.add_argument("picture", nargs="?", help="file to draw, .svg or .png")
    parser.add_argument("--table", action="store_true", help="print README's table")
    arguments = parser.parse_args()
    if arguments.picture is None and not arguments.table:
        parser.error("neither a picture nor --table is asked for")
    results = Results(arguments.results)
    if arguments.table:
        print_table(results)
    if arguments.picture is not None:
        plot(results, arguments.picture)


if __name__ == "__main__":
    main()
