"""sweep.html: several models side by side on one page, which needs nothing from elsewhere and runs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitprune.common.formatting import number, plain, signed
from vitprune.measure import remark
from vitprune.report.charts import Chart, ChartPoint, models_chart
from vitprune.report.page import templates
from vitprune.report.publishable import publishable
from vitprune.report.tables import emphasised, flat

_KINDS = {"dense": 0, "sparse": 1, "other": 3}


def render_sweep_page(result: Mapping[str, Any]) -> str:
    """The page as HTML. Everything that comes from the sweep is escaped; paths of this machine are left out."""
    result = publishable(dict(result))
    rows = result["rows"]
    sizes = [speed["batch_size"] for speed in rows[0]["speed"]]
    labelled = result["accuracy"] == "top1_pct"
    content = {
        "title": f"{result['model']}, sweep of {sum(row['kind'] == 'sparse' for row in rows)} keep ratios",
        "result": result,
        "charts": [
            _chart(rows, "by_throughput", f"images/s at batch {sizes[-1]}", labelled),
            _chart(rows, "by_gmacs", "GMACs", labelled),
        ],
        "columns": [
            *(["", "top-1 %", "points", "95 %"] if labelled else ["", "same prediction %"]),
            "GMACs",
            *(f"images/s, batch {size}" for size in sizes),
            f"speed-up, batch {sizes[-1]}",
        ],
        "failures": [[plain(row["label"]), plain(row["error"])] for row in result["failed"]],
        "cells": [_cells(row, labelled) for row in rows],
        "front_columns": ["", f"by images/s at batch {sizes[-1]}", "by GMACs"],
        "fronts": [[plain(row["label"]), _standing(row, "by_throughput"), _standing(row, "by_gmacs")] for row in rows],
        "has_others": any(row["kind"] == "other" for row in rows),
        "runs": [(plain(row["label"]), row["run"]) for row in rows if row["run"]],
        "settings": flat(result["recipe"]),
        "environment": flat(result["environment"]),
        "batch_size": sizes[-1],
        "labelled": labelled,
    }
    return templates().get_template("sweep.html.j2").render(content).lstrip()


def accuracy(row: Mapping[str, Any], labelled: bool) -> float:
    """By which a row is judged, in percent: top-1, or without labels how often it predicts as dense does."""
    return float(row["top1_pct"] if labelled else row["delta"]["agreement_pct"])


def accuracy_cells(row: Mapping[str, Any], labelled: bool) -> list[str]:
    """That, and with labels the difference from dense and its interval."""
    cell = number(accuracy(row, labelled))
    if not labelled:
        return [cell]
    if row["kind"] == "dense":
        return [cell, "", ""]
    low, high = row["delta"]["top1_points_ci95"]
    return [cell, signed(row["delta"]["top1_points"]), f"{signed(low)} to {signed(high)}"]


def _chart(rows: Sequence[Mapping[str, Any]], key: str, x_label: str, labelled: bool) -> Chart:
    """Accuracy against what `key` says: "by_throughput" or "by_gmacs"."""
    points, sentences = [], []
    for row in rows:
        x, digits = (row["speed"][-1]["images_per_s"], 1) if key == "by_throughput" else (row["gmacs"], 3)
        y, name = accuracy(row, labelled), plain(row["label"])
        interval: Sequence[float | None] = (None, None)
        if row["kind"] != "dense" and labelled:
            interval = [rows[0]["top1_pct"] + bound for bound in row["delta"]["top1_points_ci95"]]
        points.append(ChartPoint(name, x, y, _KINDS[row["kind"]], row[key]["on_front"], *interval))
        sentences.append(f"{name}: {number(y)} % at {number(x, digits)} {x_label}, {_standing(row, key)}")
    title = f"{'Top-1 (%)' if labelled else 'Predictions as dense (%)'} against {x_label}"
    return models_chart(title, "; ".join(sentences), points, x_label)


def _standing(row: Mapping[str, Any], key: str) -> str:
    """Whether a row is on the front, in words."""
    rivals = [plain(rival["label"]) for rival in row[key]["dominated_by"]]
    return f"dominated by {', '.join(rivals)}" if rivals else "on the front"


def _remark(change: Mapping[str, Any]) -> str:
    return remark(change["slower"], change.get("speedup_ci95"))


def _cells(row: Mapping[str, Any], labelled: bool) -> list[Any]:
    speed = [
        number(each["images_per_s"], 1) + (" " + emphasised(said) if (said := _remark(change)) else "")
        for each, change in zip(row["speed"], row["delta"]["speedup"], strict=True)
    ]
    ratio = number(row["delta"]["speedup"][-1]["speedup"]) + " x"
    what = f"{row['label']} (dense)" if row["kind"] == "other" else row["label"]
    return [plain(what), *accuracy_cells(row, labelled), number(row["gmacs"], 3), *speed, ratio]
