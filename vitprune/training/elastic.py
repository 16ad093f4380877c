"""One training for a range of keep ratios: every step takes one of a grid over it, each equally often.

What is trained are the weights for the lowest ratio; a step at a milder one runs with weights between those and the
dense model's, and its gradient counts by how far these are from the dense ones: see `vitprune.model.blend`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import Parameter

from vitprune.common.seeding import derive_seed
from vitprune.model import SparseViT
from vitprune.model.blend import Blend, share_of_tuned, tail_parameters

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

    Steps are counted from 0 over all phases; a resumed run of the same seed draws the same.
    """
    ratios = ratios_of(low, high)
    turn, place = divmod(step, len(ratios))
    order = random.Random(derive_seed(seed, turn, _DRAWS)).sample(ratios, len(ratios))
    return order[place]


class Range:
    """Of a student that is trained for a range: the ratio that a step takes, and the weights that go with it.

    Of one that is trained for a single ratio nothing here does anything. If it `blends`, mild ratios have weights
    nearer to the teacher's; not where the trunk trains too.
    """

    def __init__(self, student: SparseViT, teacher: SparseViT, *, blends: bool) -> None:
        self.student, self.teacher = student, teacher
        self.lowest = student.keep_range[0] if blends and student.keep_range else None

    @contextmanager
    def training(self) -> Iterator[None]:
        """After the with statement the student has the keep ratio that it had before, and its weights."""
        before = self.student.keep
        try:
            yield
        finally:
            if before is not None:
                self.student.keep = before
            if self.lowest is not None:
                dense, tuned = self._ends()
                if any(not torch.equal(dense[name], tuned[name]) for name in dense):
                    self.student.blend = Blend(dense, tuned, self.lowest)
                    self.student.blend.fill(self.student.model, self.student.keep or 1.0)

    @contextmanager
    def blended(self) -> Iterator[None]:
        """Inside the with statement, where gradients are made, the weights are those of the student's ratio."""
        if self.lowest is None:
            yield
            return
        share = share_of_tuned(self.student.keep or 1.0, self.lowest)
        dense, tuned = self._ends()
        before = {name: parameter.detach().clone() for name, parameter in tuned.items()}
        with torch.no_grad():
            for name, parameter in tuned.items():
                parameter.lerp_(dense[name], 1 - share)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in tuned.items():
                    parameter.copy_(before[name])
                    if parameter.grad is not None:
                        parameter.grad.mul_(share)

    def _ends(self) -> tuple[dict[str, Parameter], dict[str, Parameter]]:
        first_block = self.student.schedule.blocks[0]
        return tail_parameters(self.teacher.backbone, first_block), tail_parameters(self.student.backbone, first_block)
