"""sweep.json: several plans and other models side by side, and which of them are Pareto-optimal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vitprune.backbones import input_size
from vitprune.common.files import write_json, write_text
from vitprune.common.formatting import number, signed
from vitprune.common.json_version import SCHEMA_VERSION
from vitprune.evaluation import compared
from vitprune.measure import Timing
from vitprune.report.build import model_figures
from vitprune.report.schema import Report
from vitprune.report.sweep_page import accuracy, render_sweep_page
from vitprune.tasks import Results, Task

SWEEP, SWEEP_PAGE = "sweep.json", "sweep.html"
WITHIN_POINTS = 1.0
"""The verdict names the fastest model that loses no more than this."""
_OF_TRAINING = {"steps_done", "num_images", "seconds", "num_skipped"}

Kind = Literal["dense", "sparse", "other"]


@dataclass(frozen=True)
class Entry:
    """One model of a sweep: "dense" is what the sparse ones are made from, "other" another dense model."""

    kind: Kind
    model: nn.Module
    name: str
    keep: float = 1.0
    run: str | None = None
    """The folder of its run, where it was trained here; `report` is that run's."""
    report: Report | None = None


def build_sweep(
    task: Task,
    entries: Mapping[str, Entry],
    results: Mapping[str, Results],
    timings: Sequence[Timing],
    about: dict[str, Any],
) -> dict[str, Any]:
    """The content of sweep.json: what is known of all entries by label, dense first, and other keys.

    The models are of one input size, results on the same images, timings from one benchmark.
    """
    size = input_size(entries["dense"].model)
    rows: dict[str, dict[str, Any]] = {
        label: {
            "label": label,
            "kind": entry.kind,
            "model": entry.name,
            "keep": entry.keep,
            "run": entry.run,
            **model_figures(label, entry.model, size, results, timings),
            "delta": compared(label, results, timings),
            "training": entry.report and entry.report.training.model_dump(include=_OF_TRAINING),
        }
        for label, entry in entries.items()
    }
    labelled = results["dense"].labelled
    for key, merit in (("by_throughput", _throughput), ("by_gmacs", lambda row: -row["gmacs"])):
        found = dominated_by({label: (accuracy(row, labelled), merit(row)) for label, row in rows.items()})
        for label, row in rows.items():
            rivals = [_against(rows[rival], row, results) for rival in found[label]]
            row[key] = {"on_front": not rivals, "dominated_by": rivals}
    return {
        "schema_version": SCHEMA_VERSION,
        "task": task.name,
        "accuracy": "top1_pct" if labelled else "agreement_pct",
        "verdict": verdict(list(rows.values()), rows["dense"]["speed"][-1]["batch_size"]),
        "rows": list(rows.values()),
        **about,
    }


def _throughput(row: Mapping[str, Any]) -> float:
    return float(row["speed"][-1]["images_per_s"])


def _against(rival: Mapping[str, Any], row: Mapping[str, Any], results: Mapping[str, Results]) -> dict[str, Any]:
    """How much better `rival` is than `row`."""
    return {
        "label": rival["label"],
        **results[rival["label"]].change(results[row["label"]]),
        "agreement_points": rival["delta"]["agreement_pct"] - row["delta"]["agreement_pct"],
        "speed_ratio": _throughput(rival) / _throughput(row),
        "gmacs_ratio": rival["gmacs"] / row["gmacs"],
    }


def dominated_by(points: Mapping[str, tuple[float, float]]) -> dict[str, list[str]]:
    """Which models of the Pareto front dominate each model, the most accurate first; none where it is on the front.

    Args:
        points: by label accuracy and merit (of a cost, its negative), both the more the better. One dominates another
            that is at least as good in both and better in one.
    """

    def dominates(rival: str, label: str) -> bool:
        better = all(a >= b for a, b in zip(points[rival], points[label], strict=True))
        return better and points[rival] != points[label]

    front = [label for label in points if not any(dominates(rival, label) for rival in points)]
    front.sort(key=lambda label: -points[label][0])
    return {label: [rival for rival in front if dominates(rival, label)] for label in points}


def verdict(rows: Sequence[Mapping[str, Any]], batch_size: int) -> list[str]:
    """Sentences on the rows of sweep.json, dense first; `batch_size` is the largest that was timed."""
    sentences = [_choice(rows, batch_size)]
    names = {row["label"]: f"{row['label']} (dense)" if row["kind"] == "other" else row["label"] for row in rows}
    dominated: dict[str, list[str]] = {}
    for row in rows:
        for best in row["by_throughput"]["dominated_by"][:1]:
            dominated.setdefault(best["label"], []).append(f"{names[row['label']]} ({_margin(best)})")
    for label, others in dominated.items():
        sentences.append(f"{names[label]} is better at batch {batch_size} than {'; '.join(others)}.")
    for changes in zip(*(row["delta"]["speedup"] for row in rows), strict=True):  # a batch size at a time
        slower = [row["label"] for row, change in zip(rows, changes, strict=True) if change["slower"]]
        if slower:
            sentences.append(f"Slower than dense at batch {changes[0]['batch_size']}: {', '.join(slower)}.")
    return sentences


def _choice(rows: Sequence[Mapping[str, Any]], batch_size: int) -> str:
    """The fastest model that loses little."""
    dense = rows[0]
    if dense["top1_pct"] is None:
        return (
            "The images have no labels: models are judged by how often they predict the dense model's class, "
            "which says little of a model that is not made from it."
        )
    near = [row for row in rows if row["delta"]["top1_points"] >= -WITHIN_POINTS]
    best = max(near, key=lambda row: row["speed"][-1]["images_per_s"])
    within = f"within {WITHIN_POINTS:g} point of dense"
    if best is dense:
        return f"No model {within} is faster than the dense one at batch {batch_size}."
    low, high = best["delta"]["top1_points_ci95"]
    return (
        f"The fastest {within} is {best['label']}: {signed(best['delta']['top1_points'])} points "
        f"(95 %: {signed(low)} to {signed(high)}), {number(best['delta']['speedup'][-1]['speedup'])} x as fast at "
        f"batch {batch_size}."
    )


def _margin(best: Mapping[str, Any]) -> str:
    """By how much a row is dominated."""
    speed = f"{number(best['speed_ratio'])} x as fast"
    if best["top1_points"] is None:
        return f"{signed(best['agreement_points'])} points of predictions as dense, {speed}"
    low, high = best["top1_points_ci95"]
    points = f"{signed(best['top1_points'])} points" if best["top1_points"] else "as accurate"
    return f"{points}{', within chance' if low <= 0 < best['top1_points'] <= high else ''}, {speed}"


def write_sweep(folder: Path, result: dict[str, Any]) -> None:
    """Write sweep.json and sweep.html.

    Raises:
        OutputError: a file cannot be written.
    """
    write_json(folder / SWEEP, result)
    write_text(folder / SWEEP_PAGE, render_sweep_page(result))


def forget_sweep(folder: Path) -> None:
    """Remove what an earlier sweep left, which would be taken for the next one's."""
    for name in (SWEEP, SWEEP_PAGE):
        (folder / name).unlink(missing_ok=True)
