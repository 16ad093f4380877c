"""One training for a range of keep ratios: every step takes one of a grid over it, each equally often."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from vitprune.common.seeding import derive_seed
from vitprune.model import SparseViT

SPACING = 0.05
"""Of the grid, about: a stage's token counts differ little in between, and compiled code has few to be made for."""
_DRAWS = 1
"""Tells the draw's random numbers from others of a seed."""


def ratios_of(low: float, high: float) -> list[float]:
    """The grid over a range, rising, both ends in it."""
    number = max(1, round((high - low) / SPACING))
    return [round(low + (high - low) * index / number, 6) for index in range(number + 1)]


def keep_of_step(low: float, high: float, seed: int, step: int) -> float:
    """The keep ratio of a step: in every round of as many steps as the grid has ratios each comes once, in any order.

    Args:
        low: of the range.
        high: of the range.
        seed: of the run.
        step: counted from 0 over all phases; a resumed run draws the same.
    """
    ratios = ratios_of(low, high)
    turn, place = divmod(step, len(ratios))
    order = random.Random(derive_seed(seed, turn, _DRAWS)).sample(ratios, len(ratios))
    return order[place]


@contextmanager
def own_keep(student: SparseViT) -> Iterator[None]:
    """After the with statement the student has the keep ratio that it had before."""
    before = student.keep
    try:
        yield
    finally:
        if before is not None:
            student.keep = before


def set_keep(student: SparseViT, seed: int, step: int) -> None:
    """Let a student that is trained for a range take the ratio of a step."""
    if student.keep_range is not None:
        student.keep = keep_of_step(*student.keep_range, seed, step)
