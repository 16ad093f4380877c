"""Which models are worth choosing: those that no other one beats at once in accuracy and in cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitprune.common.formatting import number, signed

WITHIN_POINTS = 1.0
"""The verdict names the fastest model that loses no more than this."""


@dataclass(frozen=True)
class Place:
    """A model by two figures.

    Attributes:
        accuracy: in percent, the more the better.
        merit: the more the better; of a cost, its negative.
    """

    accuracy: float
    merit: float

    def beats(self, other: Place) -> bool:
        """At least as good in both, and better in one."""
        if self.accuracy < other.accuracy or self.merit < other.merit:
            return False
        return self.accuracy > other.accuracy or self.merit > other.merit


def beaten_by(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """By name of each model those on the Pareto front that beat it, the most accurate first; none if it is on it."""
    front = [name for name, place in places.items() if not any(rival.beats(place) for rival in places.values())]
    front.sort(key=lambda name: -places[name].accuracy)
    return {name: [rival for rival in front if places[rival].beats(place)] for name, place in places.items()}


def verdict(rows: Sequence[Mapping[str, Any]], batch_size: int) -> list[str]:
    """Sentences on the rows of sweep.json.

    Args:
        rows: dense first.
        batch_size: the largest that was timed.
    """
    said = [_choice(rows, batch_size)]
    names = {row["label"]: f"{row['label']} (dense)" if row["kind"] == "other" else row["label"] for row in rows}
    losers: dict[str, list[str]] = {}
    for row in rows:
        for best in row["by_throughput"]["beaten_by"][:1]:
            losers.setdefault(best["label"], []).append(f"{names[row['label']]} ({_margin(best)})")
    for label, others in losers.items():
        said.append(f"{names[label]} is better at batch {batch_size} than {'; '.join(others)}.")
    slower = {
        row["label"]: [change["batch_size"] for change in row["delta"]["speedup"] if change["slower"]] for row in rows
    }
    by_size: dict[int, list[str]] = {}
    for label, sizes in slower.items():
        for size in sizes:
            by_size.setdefault(size, []).append(label)
    said += [f"Slower than dense at batch {size}: {', '.join(labels)}." for size, labels in sorted(by_size.items())]
    return said


def _choice(rows: Sequence[Mapping[str, Any]], batch_size: int) -> str:
    """The fastest model that loses little."""
    dense = rows[0]
    if dense["top1_pct"] is None:
        return (
            "The images have no labels: models are judged by how often they answer as the dense one does, which "
            "says little of a model that is not made from it."
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
    """By how much a row is beaten."""
    speed = f"{number(best['speed_ratio'])} x as fast"
    if best["top1_points"] is None:
        return f"{signed(best['agreement_points'])} points of answers as dense, {speed}"
    low, high = best["top1_points_ci95"]
    points = f"{signed(best['top1_points'])} points" if best["top1_points"] else "as accurate"
    return f"{points}{', within chance' if low <= 0 < best['top1_points'] <= high else ''}, {speed}"
