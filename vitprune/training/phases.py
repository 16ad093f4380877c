"""Which steps a run has: the warm start, then predictors and backbone together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vitprune.training.recipe import Phase, Recipe


@dataclass(frozen=True)
class Part:
    """A stretch of training with one optimiser and one schedule."""

    phases: tuple[tuple[Phase, int], ...]
    train_backbone: bool = False
    frozen_steps: int = 0

    @property
    def num_steps(self) -> int:
        return sum(steps for _, steps in self.phases)

    def steps(self) -> Iterator[tuple[Phase, float]]:
        """Phase of every step, and how far into the phase it is: 0 at its first, 1 at its last step."""
        for phase, steps in self.phases:
            yield from ((phase, step / max(1, steps - 1)) for step in range(steps))


def plan_parts(recipe: Recipe, steps_per_epoch: int | None, has_stages: bool) -> list[Part]:
    """What is run: the warm start, then everything together; without empty parts."""
    steps = recipe.num_steps(steps_per_epoch)
    deployed = round(steps * recipe.deployed_share)
    # Without stages there is nothing to rank; on the deployed path nothing but the backbone can train.
    tunes = recipe.backbone_lr_scale > 0
    parts = [
        Part((("warm", recipe.warm_start_steps if has_stages else 0),)),
        Part(
            (("sampled", steps - deployed if has_stages else 0), ("deployed", deployed if tunes else 0)),
            tunes,
            frozen_steps=round(recipe.freeze_epochs * (steps_per_epoch or 0)),
        ),
    ]
    return [part for part in parts if part.num_steps]
