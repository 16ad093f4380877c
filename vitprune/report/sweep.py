"""sweep.json: several plans and other models side by side; and the files in which a sweep tells what it found."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vitprune.backbones import input_size
from vitprune.common.files import replacing, write_json
from vitprune.evaluation import Predictions, compared, paired_points
from vitprune.measure import Timing, count_macs, count_params, rates
from vitprune.report.front import Place, beaten_by, verdict
from vitprune.report.schema import Report
from vitprune.report.sweep_page import write_sweep_page

SWEEP_SCHEMA_VERSION = 1
SWEEP, TABLE, SWEEP_PAGE = "sweep.json", "sweep.csv", "sweep.html"

Kind = Literal["dense", "sparse", "other"]


@dataclass(frozen=True)
class Entry:
    """One model of a sweep.

    Attributes:
        kind: "dense" is what the sparse ones are made from, "other" another dense model.
        model: what runs.
        name: its timm name.
        keep: its keep ratio; 1 where nothing is dropped.
        run: the folder of its run; None where it was not trained here.
        report: that run's report.json; None where it was not trained here.
    """

    kind: Kind
    model: nn.Module
    name: str
    keep: float = 1.0
    run: str | None = None
    report: Report | None = None


def build_sweep(
    entries: Mapping[str, Entry],
    predictions: Mapping[str, Predictions],
    timings: Sequence[Timing],
    about: dict[str, Any],
) -> dict[str, Any]:
    """The content of sweep.json.

    Args:
        entries: by label, dense first; all of one input size.
        predictions: of all of them, on the same images.
        timings: of all of them, from one benchmark.
        about: what else is to be said of the sweep.
    """
    size = input_size(entries["dense"].model)
    rows = [_row(label, entry, predictions, timings, size) for label, entry in entries.items()]
    labelled = rows[0]["top1_pct"] is not None
    accuracy = {row["label"]: row["top1_pct"] if labelled else row["delta"]["agreement_pct"] for row in rows}
    for key, merit in (("by_throughput", _throughput), ("by_gmacs", lambda row: -row["gmacs"])):
        found = beaten_by({row["label"]: Place(accuracy[row["label"]], merit(row)) for row in rows})
        by_label = {row["label"]: row for row in rows}
        for row in rows:
            rivals = [_against(by_label[rival], row, predictions) for rival in found[row["label"]]]
            row[key] = {"on_front": not rivals, "beaten_by": rivals}
    return {
        "schema_version": SWEEP_SCHEMA_VERSION,
        "accuracy": "top1_pct" if labelled else "agreement_pct",
        "verdict": verdict(rows, rows[0]["speed"][-1]["batch_size"]),
        "rows": rows,
        **about,
    }


def _throughput(row: Mapping[str, Any]) -> float:
    return float(row["speed"][-1]["images_per_s"])


def _row(
    label: str,
    entry: Entry,
    predictions: Mapping[str, Predictions],
    timings: Sequence[Timing],
    size: tuple[int, int, int],
) -> dict[str, Any]:
    speed = [timing for timing in timings if timing.model == label]
    training = None if entry.report is None else entry.report.training.as_json()
    return {
        "label": label,
        "kind": entry.kind,
        "model": entry.name,
        "keep": entry.keep,
        "run": entry.run,
        **predictions[label].summary(),
        "gmacs": count_macs(entry.model, size) / 1e9,
        "params_m": count_params(entry.model) / 1e6,
        "speed": [{key: value for key, value in asdict(timing).items() if key != "model"} for timing in speed],
        "delta": compared(predictions[label], predictions["dense"], rates(timings, label), rates(timings, "dense")),
        "training": training
        and {key: training.get(key) for key in ("steps_done", "num_images", "seconds", "num_skipped", "warm_start_of")},
    }


def _against(
    rival: Mapping[str, Any], row: Mapping[str, Any], predictions: Mapping[str, Predictions]
) -> dict[str, Any]:
    """How much better `rival` is than `row`."""
    return {
        "label": rival["label"],
        **paired_points(predictions[rival["label"]], predictions[row["label"]]),
        "agreement_points": rival["delta"]["agreement_pct"] - row["delta"]["agreement_pct"],
        "speed_ratio": _throughput(rival) / _throughput(row),
        "gmacs_ratio": rival["gmacs"] / row["gmacs"],
    }


def write_sweep(folder: Path, result: dict[str, Any]) -> None:
    """Write sweep.json, sweep.csv and sweep.html.

    Raises:
        OutputError: a file cannot be written.
    """
    write_json(folder / SWEEP, result)
    _write_table(folder / TABLE, result["rows"])
    write_sweep_page(folder / SWEEP_PAGE, result)


def forget_sweep(folder: Path) -> None:
    """Remove what an earlier sweep left, which would be taken for the next one's."""
    for name in (SWEEP, TABLE, SWEEP_PAGE):
        (folder / name).unlink(missing_ok=True)


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        lines = [_cells(row) for row in rows]
        writer.writerow(lines[0])
        writer.writerows(line.values() for line in lines)


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    low, high = row["delta"]["top1_points_ci95"] or (None, None)
    cells = {key: row[key] for key in ("label", "kind", "model", "keep", "top1_pct", "top5_pct", "num_images")}
    cells |= {"top1_points": row["delta"]["top1_points"], "top1_points_low": low, "top1_points_high": high}
    cells |= {"agreement_pct": row["delta"]["agreement_pct"], "gmacs": row["gmacs"], "params_m": row["params_m"]}
    for speed, change in zip(row["speed"], row["delta"]["speedup"], strict=True):
        size = speed["batch_size"]
        cells |= {f"images_per_s_batch{size}": speed["images_per_s"], f"speedup_batch{size}": change["speedup"]}
    for key in ("by_throughput", "by_gmacs"):
        cells[f"beaten_{key}"] = ", ".join(rival["label"] for rival in row[key]["beaten_by"])
    return cells
