"""What a training run tells: a record of each step, and how far it has come."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from vitprune.training.recipe import Phase


@dataclass(frozen=True)
class StepRecord:
    """One training step, as it goes to the log and the progress display.

    Attributes:
        step: 1-based, over all phases.
        num_steps: of the whole run.
        phase: see `Recipe`.
        losses: unweighted components by name.
        total: weighted sum that was minimised.
        kept_ratios: share of the original tokens kept after each stage.
        target_ratios: the shares to reach.
        lr: of the predictors, or of the backbone where predictors do not train.
        images_per_s: of this step, data included.
        skipped: True if the loss or gradient was not finite and the step was left out.
        restored: True if after it, the last of too many skipped ones, an earlier state was put back.
    """

    step: int
    num_steps: int
    phase: Phase
    losses: dict[str, float]
    total: float
    kept_ratios: tuple[float, ...]
    target_ratios: tuple[float, ...]
    lr: float
    images_per_s: float
    skipped: bool = False
    restored: bool = False

    def as_json(self) -> dict[str, Any]:
        """The record for log.jsonl; a loss that is not finite becomes null."""
        record = asdict(self)
        record["losses"] = {name: _finite(value) for name, value in self.losses.items()}
        record["total"] = _finite(self.total)
        return record


@dataclass
class Progress:
    """What a run has done so far; complete when it ends, true also when it is stopped.

    Attributes:
        steps_done: over all phases.
        num_steps: planned, over all phases.
        num_skipped: steps left out because loss or gradient was not finite.
        num_restored: how often an earlier state was put back after too many of them.
        rate_scale: factor on all rates since then.
        num_parts: passes that share a process' part of a batch.
        num_images: seen, repeats counted.
        num_unreadable: images left out because they could not be read, repeats counted.
        unreadable: names of the first of them.
        seconds: spent on steps, data included.
        seconds_by_part: where they went, see `vitprune.training.clock`; what is missing went to records and logs.
        phases: steps done by phase.
        sampled_ratios: share of the original tokens kept after each stage at the last sampled step.
        backbone_lr: peak rate of the backbone, see `Recipe.rate_reference_kl`.
        warm_start_of: the plan that the predictors learned to rank for, where it is another one than this run's, such
            as "keep 0.8"; its steps are counted here, its images and seconds there.
    """

    steps_done: int = 0
    num_steps: int = 0
    num_skipped: int = 0
    num_restored: int = 0
    rate_scale: float = 1.0
    num_parts: int = 1
    num_images: int = 0
    num_unreadable: int = 0
    unreadable: list[str] = field(default_factory=list)
    seconds: float = 0.0
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)
    sampled_ratios: tuple[float, ...] | None = None
    backbone_lr: float | None = None
    warm_start_of: str | None = None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
