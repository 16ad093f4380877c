"""A chart of what `vitprune compare --json` found: top-1, or what else the task measures, against GMACs.

    vitprune compare runs/a/model.safetensors path/to/images --json > 0.7.json
    vitprune compare runs/b/model.safetensors path/to/images --json > 0.5.json
    python examples/compare_chart.py 0.7.json 0.5.json -o chart.png

Files of one model and the same images, a line per method. With labels bars are 95 % intervals of the paired
difference to the dense model; without, the figure is how close a method is to it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vitprune.tasks import task_named, zero_shot_task

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
    about = {(each["model"], each["num_images"], dense(each)[judged(each)[0]]) for each in comparisons}
    if len(about) > 1:
        sys.exit(f"error: the files are of {len(about)} models or sets of images, which do not go into one chart")
    draw(comparisons).savefig(args.output, dpi=160)
    print(f"written to {args.output}")


def dense(comparison: dict[str, Any]) -> dict[str, Any]:
    """The row of the untouched model."""
    row: dict[str, Any] = next(row for row in comparison["rows"] if row["method"] == "dense")
    return row


def judged(comparison: dict[str, Any]) -> tuple[str, str, str | None]:
    """The figure that is drawn: its key, its name, and the key of its paired difference; None without labels."""
    row = dense(comparison)
    task = zero_shot_task() if "zero_shot_top1_pct" in row else task_named(comparison.get("task", "classification"))
    if task.change is not None and row[task.accuracy[0].key] is not None:
        return task.accuracy[0].key, task.accuracy[0].text, task.change.key
    return task.fidelity[0].key, task.fidelity[0].text, None


def draw(comparisons: list[dict[str, Any]]) -> Figure:
    """Told apart by marker as well as by colour."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    first = comparisons[0]
    start, title = dense(first), f"{first['model']}, {first['num_images']} images"
    key, text, change = judged(first)
    for (method, name), marker in zip(NAMES.items(), MARKERS, strict=True):
        rows = [row for each in comparisons for row in each["rows"] if row["method"] == method and row["available"]]
        rows.sort(key=lambda row: -row["gmacs"])
        if rows:
            points = [row[key] for row in (start, *rows)]
            bounds = [] if change is None else [row[f"{change}_ci95"] for row in rows]
            bars = [0.0, *((high - low) / 2 for low, high in bounds)] if bounds else None
            gmacs = [row["gmacs"] for row in (start, *rows)]
            axes.errorbar(gmacs, points, bars, label=name, marker=marker, capsize=3, linewidth=1.5)
    axes.annotate("dense", (start["gmacs"], start[key]), (-6, 8), textcoords="offset points", ha="right")
    axes.set(xlabel="GMACs", ylabel=text, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
