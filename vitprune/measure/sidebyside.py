"""Dense, sparse and floor in one run: what fewer MACs promise, what the clock says, and what was possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from vitprune.measure.bound import FloorViT
from vitprune.measure.macs import count_macs
from vitprune.measure.modes import Mode
from vitprune.measure.throughput import benchmark
from vitprune.measure.timing import Timing
from vitprune.model import SparseViT

DENSE = "dense"

Kind = Literal["dense", "sparse", "floor"]


@dataclass(frozen=True)
class Contestant:
    """A model in the comparison.

    Attributes:
        kind: "floor" is no model one can use, see `vitprune.measure.bound`.
        keep: its keep ratio; None where ratios were chosen freely.
        model: what runs.
        floor_of: of a floor, the label of its sparse model.
    """

    kind: Kind
    keep: float | None
    model: nn.Module
    floor_of: str | None = None


def with_floors(contestants: Mapping[str, Contestant]) -> dict[str, Contestant]:
    """The same, and after every sparse model of ours that drops something its floor."""
    result: dict[str, Contestant] = {}
    for label, each in contestants.items():
        result[label] = each
        if each.kind == "sparse" and isinstance(each.model, SparseViT) and each.model.schedule.stages:
            floor = Contestant("floor", each.keep, FloorViT(each.model), label)
            result[f"floor of {label}"] = floor
    return result


def side_by_side(
    name: str,
    contestants: Mapping[str, Contestant],
    size: tuple[int, int, int],
    batch_sizes: Sequence[int],
    modes: Sequence[Mode],
    *,
    baseline: str = DENSE,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Time all contestants in turns, mode by mode, and compare each with the baseline of its mode and batch size.

    Args:
        name: of the model, for the rows.
        contestants: by label.
        size: (C, H, W).
        batch_sizes: images per pass.
        modes: how to run.
        baseline: label of the one to compare with, the dense one where there is one.
        **settings: the other arguments of `benchmark`.

    Returns:
        A row per mode, batch size and contestant, in JSON's types, with units in the keys. Of `Timing` all entries;
        `speedup` is images per second over the baseline, `efficiency` that over `macs_ratio` (1 is as fast as the MACs
        promise), `overhead_over_floor_pct` how much longer a sparse model takes than its floor.
    """
    macs = {label: count_macs(each.model, size) for label, each in contestants.items()}
    models = {label: each.model for label, each in contestants.items()}
    rows = []
    for mode in modes:
        timings = benchmark(models, size, batch_sizes, mode=mode, **settings)
        by_label = {(timing.batch_size, timing.model): timing for timing in timings}
        floors = {each.floor_of: label for label, each in contestants.items() if each.floor_of is not None}
        for timing in timings:
            base = by_label[timing.batch_size, baseline]
            floor = by_label.get((timing.batch_size, floors.get(timing.model, "")))
            macs_ratio = macs[baseline] / macs[timing.model]
            rows.append(_row(name, contestants[timing.model], timing, base, floor, macs_ratio, macs[timing.model]))
    return rows


def _row(
    name: str,
    each: Contestant,
    timing: Timing,
    base: Timing,
    floor: Timing | None,
    macs_ratio: float,
    macs: int,
) -> dict[str, Any]:
    speedup = timing.images_per_s / base.images_per_s
    return asdict(timing) | {
        "model": name,
        "label": timing.model,
        "kind": each.kind,
        "keep": each.keep,
        "gmacs": macs / 1e9,
        "macs_ratio": macs_ratio,
        "speedup": speedup,
        "efficiency": speedup / macs_ratio,
        "overhead_over_floor_pct": None if floor is None else 100 * (timing.latency_ms_p50 / floor.latency_ms_p50 - 1),
        "slower": speedup < 1,
    }
