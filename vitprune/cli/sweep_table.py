"""A sweep on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitprune.cli.output import number, print_line, print_table, signed


def print_sweep(result: dict[str, Any], folder: Path) -> None:
    """Print what sweep.json says."""
    rows = result["rows"]
    size = rows[0]["speed"][-1]["batch_size"]
    labelled = result["accuracy"] == "top1_pct"
    accuracy = ["top-1", "change", "95 %"] if labelled else ["same"]
    columns = ["", *accuracy, "GMACs", "img/s", "speed", "front"]
    print_table(f"{result['model']}, images/s at batch {size}", columns, [_cells(row, labelled) for row in rows])
    for sentence in result["verdict"]:
        print_line(sentence)
    print_line(
        f"{rows[0]['num_images']} images, the same for all; {result['device']}, {result['precision']}; "
        "front: no other model is as accurate and as fast"
    )
    if not labelled:
        print_line("same: answers as dense, in percent; the images have no labels")
    if result["warm_start"]["mode"] == "shared":
        print_line(f"warm start shared by all runs: done as for {result['warm_start']['of']}")
    if all(row["kind"] != "other" for row in rows):
        print_line("--also NAME shows whether a smaller dense model is the better choice")
    print_line(f"in {result['wall_s']:.0f} s, written to {folder}; to read: {folder / 'sweep.html'}")


def _cells(row: Mapping[str, Any], labelled: bool) -> list[str]:
    delta = row["delta"]
    accuracy = [number(row["top1_pct"] if labelled else delta["agreement_pct"])]
    if labelled:
        dense = row["kind"] == "dense"
        low, high = delta["top1_points_ci95"]
        accuracy += ["", ""] if dense else [signed(delta["top1_points"]), f"{signed(low)} to {signed(high)}"]
    change = delta["speedup"][-1]
    return [
        row["label"],
        *accuracy,
        number(row["gmacs"], 3),
        number(row["speed"][-1]["images_per_s"], 1),
        f"{change['speedup']:.2f} x" + (" SLOWER" if change["slower"] else ""),
        "yes" if row["by_throughput"]["on_front"] else "no",
    ]
