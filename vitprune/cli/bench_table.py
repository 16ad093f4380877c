"""Rows of a benchmark as tables and as a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from vitprune.cli.output import number, print_line, print_table
from vitprune.errors import OutputError

_SPEED = ["", "batch", "images/s", "ms a batch", "fewer MACs", "measured", "over floor"]
_MORE = ["", "batch", "p50 ms", "p90 ms", "p99 ms", "MiB", "GMACs", "of promise"]


def print_rows(rows: list[dict[str, Any]], where: str) -> None:
    """Two tables per model and mode, and what their columns mean."""
    tables = dict.fromkeys((row["model"], row["mode"], row["attention"]) for row in rows)
    with_loader = any(row["loader_images_per_s"] is not None for row in rows)
    for model, mode, attention in tables:
        chosen = [row for row in rows if (row["model"], row["mode"], row["attention"]) == (model, mode, attention)]
        kernel = "" if attention == "fused" else f", {attention} attention"
        print_table(f"{model}, {mode}{kernel}", _SPEED, [_speed(row) for row in chosen])
        columns = [*_MORE, "with loader"] if with_loader else _MORE
        print_table("single passes, memory, MACs", columns, [_more(row, with_loader) for row in chosen])
    print_line(where)
    print_line("timed in turns; ms a batch: median ± half the interquartile range of passes back to back")
    print_line("MACs with attention; of promise: measured / fewer MACs; MiB: weights, images and the pass at its peak")
    if with_loader:
        print_line("with loader: images/s with images read, decoded and moved")
    if any(row["kind"] == "floor" for row in rows):
        print_line("(floor): no model to use; the same token counts, taken for free: no choice of tokens is faster")


def _speed(row: dict[str, Any]) -> list[str]:
    half_spread = (row["latency_ms_p75"] - row["latency_ms_p25"]) / 2
    over = row["overhead_over_floor_pct"]
    return [
        *_name(row),
        number(row["images_per_s"], 1),
        f"{row['latency_ms_p50']:.2f} ±{half_spread:.2f}",
        f"{row['macs_ratio']:.2f} x",
        f"{row['speedup']:.2f} x" + (" SLOWER" if row["slower"] else ""),
        "" if over is None else f"{over:+.1f} %",
    ]


def _more(row: dict[str, Any], with_loader: bool) -> list[str]:
    alone = (row["single_pass_ms_p50"], row["single_pass_ms_p90"], row["single_pass_ms_p99"])
    cells = [
        *_name(row),
        *(number(value) for value in alone),
        number(row["peak_memory_mib"], 0),
        number(row["gmacs"], 3),
        f"{100 * row['efficiency']:.0f} %",
    ]
    return [*cells, number(row["loader_images_per_s"], 1)] if with_loader else cells


def _name(row: dict[str, Any]) -> list[str]:
    return ["(floor)" if row["kind"] == "floor" else row["label"], str(row["batch_size"])]


def check_csv(path: Path) -> None:
    """Make sure before anything is measured that `path` can become a file.

    Raises:
        OutputError: it is a folder, or lies in none.
    """
    if path.is_dir():
        raise OutputError(f"the output '{path}' is a folder, not a file", "name a file: --csv speed.csv")
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder '{path.parent}' for '{path.name}'", "make it, or choose another --csv")


def write_csv(path: Path, rows: list[dict[str, Any]], common: dict[str, Any]) -> None:
    """Write rows with their keys as the header, whole or not at all; `kind` tells floors from models.

    Raises:
        OutputError: the file cannot be written.
    """
    from vitprune.common.files import replacing

    lines = [row | common for row in rows]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
