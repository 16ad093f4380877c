"""sweep.json: several plans and other models side by side, and which of them are Pareto-optimal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import nn

from vitprune.adaptive import AdaptiveViT, Reached, Watched, curve, worthwhile
from vitprune.backbones import input_size
from vitprune.common.files import write_json, write_text
from vitprune.common.formatting import number, signed
from vitprune.common.json_version import SCHEMA_VERSION
from vitprune.errors import UsageError
from vitprune.evaluation import compared
from vitprune.measure import Timing, count_macs, remark, speedups
from vitprune.report.build import model_figures
from vitprune.report.schema import Report
from vitprune.report.sweep_page import Judged, by_likeness, render_sweep_page
from vitprune.tasks import Change, Results, Task

SWEEP, SWEEP_PAGE = "sweep.json", "sweep.html"
WITHIN_POINTS = 1.0
"""The verdict names the fastest model that loses no more than this."""
FIDELITY_PCT = 99
"""And what it costs to have so much of the dense model's answers with the dense model behind."""
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
    behind: WithDense,
    about: dict[str, Any],
) -> dict[str, Any]:
    """The content of sweep.json: what is known of all entries by label, dense first, and other keys.

    The models are of one input size, results on the same images, timings from one benchmark, which may have one called
    "adaptive" too: what `behind.chosen` says.
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
    dense = results["dense"]
    known = task.change is not None and dense.change(dense)[task.change.key] is not None
    judged = Judged(task.accuracy[0], task.change) if known else by_likeness(task)
    for key, merit in (("by_throughput", _throughput), ("by_gmacs", lambda row: -row["gmacs"])):
        found = dominated_by({label: (judged.merit(row), merit(row)) for label, row in rows.items()})
        for label, row in rows.items():
            rivals = [_against(rows[rival], row, judged, results) for rival in found[label]]
            row[key] = {"on_front": not rivals, "dominated_by": rivals}
    sentences = verdict(list(rows.values()), judged, rows["dense"]["speed"][-1]["batch_size"])
    timed = speedups("adaptive", timings)
    return {
        "schema_version": SCHEMA_VERSION,
        "task": task.name,
        "accuracy": judged.figure.key,
        "verdict": [*sentences, *adaptive_said(behind, timed)],
        "rows": list(rows.values()),
        "adaptive": {
            "fixed": [each._asdict() for each in behind.fixed],
            "curve": [each._asdict() for each in behind.line],
            "chosen": behind.chosen and behind.chosen._asdict(),
            "speed": [
                {"batch_size": each.batch_size, "images_per_s": each.images_per_s}
                for each in timings
                if each.model == "adaptive"
            ],
        },
        **about,
    }


def _throughput(row: Mapping[str, Any]) -> float:
    return float(row["speed"][-1]["images_per_s"])


def _against(
    rival: Mapping[str, Any], row: Mapping[str, Any], judged: Judged, results: Mapping[str, Results]
) -> dict[str, Any]:
    """How much better `rival` is than `row`."""
    return {
        "label": rival["label"],
        **results[rival["label"]].change(results[row["label"]]),
        "better_by": judged.value(rival) - judged.value(row),
        "speed_ratio": _throughput(rival) / _throughput(row),
        "gmacs_ratio": rival["gmacs"] / row["gmacs"],
    }


class WithDense(NamedTuple):
    """Keep ratios with the dense model behind them.

    Attributes:
        fixed: what each gives alone.
        line: the best of what each gives with the dense model behind it, at every threshold.
        chosen: the cheapest of these with most of the dense model's answers; None where there is none.
        gmacs_dense: of the dense model alone.
    """

    fixed: list[Reached]
    line: list[Reached]
    chosen: Reached | None
    gmacs_dense: float

    @property
    def saves(self) -> bool:
        """Whether what is chosen costs less than the dense model."""
        return self.chosen is not None and self.chosen.gmacs_mean < self.gmacs_dense


def with_dense(entries: Mapping[str, Entry], results: Mapping[str, Results]) -> WithDense:
    """From what is known of these images.

    Nothing of a task that knows no certainty, nor of models whose trunk was trained.
    """
    dense, fixed, found = results["dense"], list[Reached](), list[Reached]()
    size = input_size(entries["dense"].model)
    for label, entry in entries.items():
        certainty, same = results[label].certainty, results[label].same(dense)
        if entry.kind != "sparse" or certainty is None or same is None:
            continue
        try:
            costs = AdaptiveViT([entry.model, entries["dense"].model], threshold=0.0).costs(size)
        except UsageError:  # they share no blocks
            continue
        nothing = np.zeros(len(same))
        passes = [Watched(certainty.numpy(), (~same).numpy(), costs[0]), Watched(nothing, nothing, costs[1])]
        points = curve(passes, label)
        fixed.append(points[0])
        found += points
    line = worthwhile(found)
    enough = (each for each in line if 100 * (1 - each.loss) >= FIDELITY_PCT)
    return WithDense(fixed, line, next(enough, None), count_macs(entries["dense"].model, size) / 1e9)


def adaptive_said(behind: WithDense, timed: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """A sentence on the cheapest way to most of the dense model's answers, where there is one."""
    enough = behind.chosen
    if enough is None:
        return []
    if not behind.saves:
        return [f"Sending images that a keep ratio is not sure of to dense saves nothing at {FIDELITY_PCT} % fidelity."]
    way = f"with dense behind it for the {number(enough.went_on_pct, 1)} % of which it is least sure"
    fast = "".join(map(_as_fast, timed[-1:]))
    return [
        f"{enough.first} {way if enough.went_on_pct else 'alone'} has dense's answer on "
        f"{number(100 * (1 - enough.loss), 1)} % of these images at {number(enough.gmacs_mean, 3)} GMACs on average, "
        f"dense {number(behind.gmacs_dense, 3)}{fast}; vitprune eval --fidelity {FIDELITY_PCT} promises it."
    ]


def _as_fast(change: Mapping[str, Any]) -> str:
    said = remark(change["slower"], change.get("speedup_ci95"))
    return f", {number(change['speedup'])} x as fast at batch {change['batch_size']}" + (f" ({said})" if said else "")


def dominated_by(points: Mapping[str, tuple[float, float]]) -> dict[str, list[str]]:
    """Which models of the Pareto front dominate each model, the most accurate first; none where it is on the front.

    Points are accuracy and merit (of a cost, its negative) by label. One dominates another that is at least as good in
    both and better in one.
    """

    def dominates(rival: str, label: str) -> bool:
        better = all(a >= b for a, b in zip(points[rival], points[label], strict=True))
        return better and points[rival] != points[label]

    front = [label for label in points if not any(dominates(rival, label) for rival in points)]
    front.sort(key=lambda label: -points[label][0])
    return {label: [rival for rival in front if dominates(rival, label)] for label in points}


def verdict(rows: Sequence[Mapping[str, Any]], judged: Judged, batch_size: int) -> list[str]:
    """Sentences on the rows of sweep.json, dense first; `batch_size` is the largest that was timed."""
    sentences = [_choice(rows, judged, batch_size)]
    names = {row["label"]: f"{row['label']} (dense)" if row["kind"] == "other" else row["label"] for row in rows}
    dominated: dict[str, list[str]] = {}
    for row in rows:
        for best in row["by_throughput"]["dominated_by"][:1]:
            dominated.setdefault(best["label"], []).append(f"{names[row['label']]} ({_margin(best, judged)})")
    for label, others in dominated.items():
        sentences.append(f"{names[label]} is better at batch {batch_size} than {'; '.join(others)}.")
    for changes in zip(*(row["delta"]["speedup"] for row in rows), strict=True):  # a batch size at a time
        slower = [row["label"] for row, change in zip(rows, changes, strict=True) if change["slower"]]
        if slower:
            sentences.append(f"Slower than dense at batch {changes[0]['batch_size']}: {', '.join(slower)}.")
    return sentences


def _choice(rows: Sequence[Mapping[str, Any]], judged: Judged, batch_size: int) -> str:
    """The fastest model that loses little."""
    dense, figure, change, why = rows[0], judged.figure, judged.change, judged.why
    if change is None:
        return (
            f"{why[:1].upper()}{why[1:]}: models are judged by their likeness to the dense one ({figure.text}), "
            "which says little of a model that is not made from it."
        )
    # Without points, in which a loss could be little or much, what chance explains is little.
    near = [row for row in rows if _loss(row, change) <= (WITHIN_POINTS if change.unit == "points" else 0)]
    best = max(near, key=lambda row: row["speed"][-1]["images_per_s"])
    within = f"within {WITHIN_POINTS:g} point of dense" if change.unit == "points" else "as good as dense within chance"
    if best is dense:
        return f"No model {within} is faster than the dense one at batch {batch_size}."
    low, high = best["delta"][f"{change.key}_ci95"]
    said = f"{signed(best['delta'][change.key], change.digits)} {change.unit or change.text}"
    return (
        f"The fastest {within} is {best['label']}: {said} "
        f"(95 %: {signed(low, change.digits)} to {signed(high, change.digits)}), "
        f"{number(best['delta']['speedup'][-1]['speedup'])} x as fast at batch {batch_size}."
    )


def _loss(row: Mapping[str, Any], change: Change) -> float:
    """How much worse a row is than dense; of figures without points by the better end of the interval, at least 0."""
    sign = -1 if change.higher_is_better else 1
    if change.unit == "points":
        return float(sign * row["delta"][change.key])
    return max(0.0, min(sign * float(bound) for bound in row["delta"][f"{change.key}_ci95"]))


def _margin(best: Mapping[str, Any], judged: Judged) -> str:
    """By how much a row is dominated."""
    speed, figure, change = f"{number(best['speed_ratio'])} x as fast", judged.figure, judged.change
    if change is None:
        return f"{figure.said(signed(best['better_by'], figure.digits))}, {speed}"
    (low, high), value = best[f"{change.key}_ci95"], best[change.key]
    said = f"{signed(value, change.digits)} {change.unit or change.text}" if value else "as accurate"
    chance = low <= 0 <= high and value
    return f"{said}{', within chance' if chance else ''}, {speed}"


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
