"""A chart of what `vitprune compare --json` found: top-1 against GMACs, a line per method.

    vitprune compare runs/a/model.safetensors path/to/images --json > 0.7.json
    vitprune compare runs/b/model.safetensors path/to/images --json > 0.5.json
    python examples/compare_chart.py 0.7.json 0.5.json -o chart.png

Files of one model and the same images. Bars are 95 % intervals of the paired difference to the dense model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

NAMES = {
    "ours": "vitprune",
    "tome": "token merging (ToMe)",
    "attention-merge": "class attention, merged",
    "norm": "token norm",
    "random": "random tokens",
}
"""What is drawn, best known first; other methods are left out."""
MARKERS = "osD^v"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("-o", "--output", type=Path, default=Path("chart.png"))
    args = parser.parse_args()
    comparisons = [json.loads(path.read_text()) for path in args.files]
    about = {(each["model"], each["num_images"], dense(each)["top1_pct"]) for each in comparisons}
    if len(about) > 1:
        sys.exit(f"error: the files are of {len(about)} models or sets of images, which do not go into one chart")
    draw(comparisons).savefig(args.output, dpi=160)
    print(f"written to {args.output}")


def dense(comparison: dict[str, Any]) -> dict[str, Any]:
    """The row of the untouched model."""
    row: dict[str, Any] = next(row for row in comparison["rows"] if row["method"] == "dense")
    return row


def draw(comparisons: list[dict[str, Any]]) -> Figure:
    """Told apart by marker as well as by colour."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    first = comparisons[0]
    start, title = dense(first), f"{first['model']}, {first['num_images']} images"
    for (method, name), marker in zip(NAMES.items(), MARKERS, strict=True):
        rows = [row for each in comparisons for row in each["rows"] if row["method"] == method and row["available"]]
        rows.sort(key=lambda row: -row["gmacs"])
        if rows:
            points = [row["top1_pct"] for row in (start, *rows)]
            bars = [0.0, *((row["top1_points_ci95"][1] - row["top1_points_ci95"][0]) / 2 for row in rows)]
            gmacs = [row["gmacs"] for row in (start, *rows)]
            axes.errorbar(gmacs, points, bars, label=name, marker=marker, capsize=3, linewidth=1.5)
    axes.annotate("dense", (start["gmacs"], start["top1_pct"]), (-6, 8), textcoords="offset points", ha="right")
    axes.set(xlabel="GMACs", ylabel="top-1 (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
