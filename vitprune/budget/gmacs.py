"""From a budget in multiply-accumulates to the setting that spends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from vitprune.backbones import input_size
from vitprune.errors import UsageError
from vitprune.measure.macs import count_macs
from vitprune.model import attach, attach_as
from vitprune.schedule import Sparsity

KEEP_STEPS = 1000
"""Keep ratios are tried in steps of a thousandth."""


def last_within(budget: float, cost: Callable[[int], float], low: int, high: int) -> int:
    """The largest number in [low, high] whose cost is at most `budget`, for a cost that never falls; at least `low`."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


def keep_within(budget: float, build: Callable[[float], nn.Module], size: tuple[int, int, int]) -> float:
    """The largest keep ratio, to a thousandth, whose model costs at most `budget` multiply-accumulates.

    Args:
        budget: multiply-accumulates of one image.
        build: makes the model of a keep ratio.
        size: of an image, (C, H, W).
    """
    return last_within(budget, lambda step: count_macs(build(step / KEEP_STEPS), size), 1, KEEP_STEPS - 1) / KEEP_STEPS


def keep_for_gmacs(model: nn.Module, sparsity: Sparsity, target: float) -> Sparsity:
    """The plan with the largest keep ratio, to a thousandth, whose sparse model costs at most `target` GMACs.

    Args:
        model: a timm model of a supported family.
        sparsity: the rest of the plan.
        target: multiply-accumulates of one image in billions, predictors and merging included.

    Raises:
        UsageError: more than the dense model needs, or less than the smallest keep ratio reaches.
    """
    size = input_size(model)

    def build(keep: float) -> nn.Module:
        return attach_as(model, replace(sparsity, keep=keep))

    dense = count_macs(attach(model, keep=1.0), size) / 1e9
    if not target < dense:
        raise UsageError(
            f"--target-gmacs is {target:g}, but the dense model needs {dense:.3f} only",
            "ask for less, or use the model as it is",
        )
    least = count_macs(build(1 / KEEP_STEPS), size) / 1e9
    if target < least:
        raise UsageError(
            f"--target-gmacs is {target:g}, but dropping nearly every token still leaves {least:.3f} of {dense:.3f}",
            "drop tokens earlier with --prune-at, or take a smaller model",
        )
    return replace(sparsity, keep=keep_within(target * 1e9, build, size))
