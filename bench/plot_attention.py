#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the results of `tqkv-bench attention --json RESULTS.json`, and prints README's table of them.

    bench/plot_attention.py bench/results/attention-h200.json bench/results/attention-h200.svg
    bench/plot_attention.py bench/results/attention-h200.json --table
"""
import argparse

from plot_codec import COLOURS, Results, bars, load_pyplot, save

CODES = ("K4V4", "K4V3", "K3V3", "K4V2", "K2V2")


class AttentionResults(Results):
    COMMAND = "attention"
    KEY = ("shape", "codes", "feature")

    def __init__(self, path):
        super().__init__(path)
        self.shapes = list(dict.fromkeys(shape for shape, _, _ in self.rows))
        self.varied = list(dict.fromkeys((shape, feature) for shape, _, feature in self.rows if feature))


def roofline(axes, results, shapes):
    """GB/s over the MB that are read, in the bars' colours, under the best read of as many."""
    rows = [results.row(shape, codes, "") for shape in shapes for codes in CODES]
    ceiling = sorted((row["bytes"] / 1e6, row["bytes"] / row["ceiling_microseconds"] / 1e3) for row in rows if row)
    axes.plot(*zip(*ceiling), color="#b03010", linewidth=1.2, label="best read")
    for codes, colour in zip(CODES, COLOURS):
        points = [results.row(shape, codes, "") for shape in shapes]
        axes.scatter([row["bytes"] / 1e6 for row in points if row], [row["gigabytes_per_second"] for row in points if row],
                     color=colour, s=22, zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0)
    axes.grid(color="#d8d8d8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("MB of pages a call reads")
    axes.set_ylabel("GB/s")
    axes.legend(loc="upper left", frameon=False, fontsize=8)


def plot(results, path):
    pyplot = load_pyplot()
    figure, (axes, below) = pyplot.subplots(2, 1, figsize=(8.6, 6.4))
    shapes = [shape for shape in results.shapes if " over " not in shape]  # those are bound by products
    groups = [[(shape, codes, "") for codes in CODES] for shape in shapes]
    bars(axes, results, groups, [shape.replace(", ", "\n") for shape in shapes], CODES)
    axes.get_legend().set_bbox_to_anchor((0.5, -0.17))
    axes.set_ylabel("% of the best read")
    axes.set_xlabel("sequences x length, query heads / kv heads", fontsize=8)
    axes.xaxis.set_label_position("top")
    roofline(below, results, shapes)
    held = any("figure" in row for row in results.rows.values())
    title = f"{results.device}: attention's share of the best read of its bytes" + (" (red: to be reached)" if held else "")
    figure.suptitle(", ".join(filter(None, (title, results.date))), fontsize=10)
    save(figure, path)


def cell(row):
    if row is None:
        return ""
    if "TFLOP/s" in row:
        return f"{row['microseconds'] / 1000:.1f} ms, {row['TFLOP/s']:.0f} TFLOP/s"
    speed = f", {row['speed']:.1f}x" if row.get("speed") else ""
    return f"{row['microseconds']:.{0 if row['microseconds'] >= 100 else 1}f} µs, {100 * row['share']:.0f}%{speed}"


def ratio(row):
    """What a feature costs."""
    return f", {row['relative']:.2f} of plain" if row and row.get("relative") else ""


def print_table(results):
    print("| | " + " | ".join(CODES) + " |\n|---" + "|---" * len(CODES) + "|")
    for shape in results.shapes:
        print(f"| {shape} | " + " | ".join(cell(results.row(shape, codes, "")) for codes in CODES) + " |")
    for shape, feature in results.varied:
        rows = [results.row(shape, codes, feature) for codes in CODES]
        print(f"| {shape}, {feature} | " + " | ".join(cell(row) + ratio(row) for row in rows) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="JSON of tqkv-bench attention")
    parser.add_argument("picture", nargs="?", help="file to draw, .svg or .png")
    parser.add_argument("--table", action="store_true", help="print README's table")
    arguments = parser.parse_args()
    if arguments.picture is None and not arguments.table:
        parser.error("neither a picture nor --table is asked for")
    results = AttentionResults(arguments.results)
    if arguments.table:
        print_table(results)
    if arguments.picture is not None:
        plot(results, arguments.picture)


if __name__ == "__main__":
    main()
