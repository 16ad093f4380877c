"""sweep.html: several models side by side on one page, which needs nothing from elsewhere and runs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vitprune.common.formatting import number, plain, signed
from vitprune.measure import remark
from vitprune.report.charts import Chart, ChartPoint, models_chart
from vitprune.report.page import templates
from vitprune.report.promise_page import fidelity_charts
from vitprune.report.publishable import publishable
from vitprune.report.tables import emphasised, flat
from vitprune.tasks import Change, Figure, Task, task_named, zero_shot_task

_KINDS = {"dense": 0, "sparse": 1, "other": 3}


class Judged(NamedTuple):
    """By which the models of a sweep are judged: a figure against labels, and its change, or likeness to the dense one.

    `why` says why not by labels, `takes_others` whether it says something of models not made from the dense one.
    """

    figure: Figure
    change: Change | None
    why: str = ""
    takes_others: bool = True

    def value(self, row: Mapping[str, Any]) -> float:
        """Of a row of sweep.json."""
        return float((row["delta"] if self.change is None else row)[self.figure.key])

    def merit(self, row: Mapping[str, Any]) -> float:
        """The same, the more the better."""
        return self.value(row) if self.figure.higher_is_better else -self.value(row)


def by_likeness(task: Task) -> Judged:
    """Without labels."""
    return Judged(task.fidelity[0], None, task.no_accuracy, task.comparable)


def judged_by(result: Mapping[str, Any]) -> Judged:
    """What sweep.json's "accuracy" names."""
    tasks = (task_named(result.get("task", "classification")), zero_shot_task())
    for task in tasks:
        if task.change is not None and result["accuracy"] == task.accuracy[0].key:
            return Judged(task.accuracy[0], task.change)
    return by_likeness(tasks[0])


def render_sweep_page(result: Mapping[str, Any]) -> str:
    """The page as HTML. Everything that comes from the sweep is escaped; paths of this machine are left out."""
    result = publishable(dict(result))
    rows = result["rows"]
    sizes = [speed["batch_size"] for speed in rows[0]["speed"]]
    judged = judged_by(result)
    content = {
        "title": f"{result['model']}, sweep of {sum(row['kind'] == 'sparse' for row in rows)} keep ratios",
        "result": result,
        "charts": [
            _chart(rows, "by_throughput", f"images/s at batch {sizes[-1]}", judged),
            _chart(rows, "by_gmacs", "GMACs", judged),
        ],
        "fidelity_charts": _fidelity_charts(rows, result["adaptive"]),
        "columns": [
            *("", judged.figure.text),
            *([judged.change.unit or "change", "95 %"] if judged.change else []),
            "GMACs",
            *(f"images/s, batch {size}" for size in sizes),
            f"speed-up, batch {sizes[-1]}",
        ],
        "failures": [[plain(row["label"]), plain(row["error"])] for row in result["failed"]],
        "cells": [_cells(row, judged) for row in rows],
        "front_columns": ["", f"by images/s at batch {sizes[-1]}", "by GMACs"],
        "fronts": [[plain(row["label"]), _standing(row, "by_throughput"), _standing(row, "by_gmacs")] for row in rows],
        "others_missing": judged.takes_others and all(row["kind"] != "other" for row in rows),
        "runs": [(plain(row["label"]), row["run"]) for row in rows if row["run"]],
        "settings": flat(result["recipe"]),
        "environment": flat(result["environment"]),
        "batch_size": sizes[-1],
        "labelled": judged.change is not None,
        "judged": judged.figure.text,
    }
    return templates().get_template("sweep.html.j2").render(content).lstrip()


def accuracy_cells(row: Mapping[str, Any], judged: Judged) -> list[str]:
    """By which a row is judged and, with labels, the difference from dense and its interval."""
    figure, change = judged.figure, judged.change
    cell = number(judged.value(row), figure.digits)
    if change is None:
        return [cell]
    if row["kind"] == "dense":
        return [cell, "", ""]
    low, high = row["delta"][f"{change.key}_ci95"]
    between = f"{signed(low, change.digits)} to {signed(high, change.digits)}"
    return [cell, signed(row["delta"][change.key], change.digits), between]


def _chart(rows: Sequence[Mapping[str, Any]], key: str, x_label: str, judged: Judged) -> Chart:
    """Accuracy against what `key` says: "by_throughput" or "by_gmacs"."""
    points, sentences = [], []
    for row in rows:
        x, digits = (row["speed"][-1]["images_per_s"], 1) if key == "by_throughput" else (row["gmacs"], 3)
        y, name = judged.value(row), plain(row["label"])
        interval: Sequence[float | None] = (None, None)
        if row["kind"] != "dense" and judged.change is not None:
            interval = [judged.value(rows[0]) + bound for bound in row["delta"][f"{judged.change.key}_ci95"]]
        points.append(ChartPoint(name, x, y, _KINDS[row["kind"]], row[key]["on_front"], *interval))
        value = number(y, judged.figure.digits)
        sentences.append(f"{name}: {value} at {number(x, digits)} {x_label}, {_standing(row, key)}")
    text = judged.figure.text
    title = f"{text[0].upper()}{text[1:]} against {x_label}"
    return models_chart(title, "; ".join(sentences), points, x_label, percent=judged.figure.in_percent)


def _fidelity_charts(rows: Sequence[Mapping[str, Any]], adaptive: Mapping[str, Any]) -> list[Chart]:
    """Keep ratios alone beside what they give with the dense model behind; none where that is not known."""
    fixed, chosen, timed = adaptive["fixed"], adaptive["chosen"], adaptive["speed"]
    if not fixed:
        return []
    speed = {row["label"]: row["speed"] for row in rows}

    def place(name: str, point: Mapping[str, Any], speed: Sequence[Mapping[str, Any]], kind: int) -> Any:
        return plain(name), point["gmacs_mean"], speed[-1]["images_per_s"], 100 * (1 - point["loss"]), kind

    models = [place("dense", {"gmacs_mean": rows[0]["gmacs"], "loss": 0.0}, speed["dense"], 0)]
    models += [place(each["first"], each, speed[each["first"]], 1) for each in fixed]
    models += [place("adaptive", chosen, timed, 3)] if timed else []
    curve = [(each["gmacs_mean"], 100 * (1 - each["loss"])) for each in adaptive["curve"]]
    return fidelity_charts(models, speed["dense"][-1]["batch_size"], curve)


def _standing(row: Mapping[str, Any], key: str) -> str:
    """Whether a row is on the front, in words."""
    rivals = [plain(rival["label"]) for rival in row[key]["dominated_by"]]
    return f"dominated by {', '.join(rivals)}" if rivals else "on the front"


def _cells(row: Mapping[str, Any], judged: Judged) -> list[Any]:
    speed = []
    for each, change in zip(row["speed"], row["delta"]["speedup"], strict=True):
        said = remark(change["slower"], change.get("speedup_ci95"))
        speed.append(number(each["images_per_s"], 1) + (" " + emphasised(said) if said else ""))
    ratio = number(row["delta"]["speedup"][-1]["speedup"]) + " x"
    what = f"{row['label']} (dense)" if row["kind"] == "other" else row["label"]
    return [plain(what), *accuracy_cells(row, judged), number(row["gmacs"], 3), *speed, ratio]
