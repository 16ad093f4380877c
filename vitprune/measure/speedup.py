"""How much faster one model is than another, of which a short measurement on a busy machine can say little."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

from vitprune.measure.throughput import Timing


def speedups(name: str, timings: Sequence[Timing], baseline: str = "dense") -> list[dict[str, Any]]:
    """A model beside another that was timed with it, at each batch size, for JSON.

    Returns:
        `batch_size`; `speedup`, its images per second over the baseline's; `speedup_ci95`, see `interval`;
        `slower`, whether it is slower beyond what the rounds differ by.
    """
    others = {timing.batch_size: timing for timing in timings if timing.model == baseline}
    return [
        {"batch_size": timing.batch_size, **speedup(timing, others[timing.batch_size])}
        for timing in timings
        if timing.model == name
    ]


def speedup(timing: Timing, baseline: Timing) -> dict[str, Any]:
    """As `speedups`, of one timing and its baseline, without the batch size."""
    ratio = timing.images_per_s / baseline.images_per_s
    pairs = [dense / sparse for dense, sparse in zip(baseline.rounds_ms, timing.rounds_ms, strict=True)]
    between = interval(pairs)
    if between is not None:
        between = [min(between[0], ratio), max(between[1], ratio)]
    return {"speedup": ratio, "speedup_ci95": between, "slower": (ratio if between is None else between[1]) < 1}


def interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % confidence interval of the median, from order statistics; None of fewer than six values."""
    count = len(values)
    # The median lies below the k-th smallest value with the probability of fewer than k heads in `count` tosses.
    tails = [sum(comb(count, heads) for heads in range(k)) / 2**count for k in range(1, count + 1)]
    inner = sum(tail <= 0.025 for tail in tails)
    return [sorted(values)[inner - 1], sorted(values)[-inner]] if inner else None


def unclear(between: Sequence[float] | None) -> bool:
    """Whether the interval of a speed-up holds both slower and faster."""
    return between is not None and between[0] < 1 <= between[1]


def remark(slower: bool, between: Sequence[float] | None) -> str:
    """What a speed-up must not be shown without: "SLOWER", "within noise", or nothing."""
    return "SLOWER" if slower else "within noise" if unclear(between) else ""
