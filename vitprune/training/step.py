"""One training step: a batch, taken in parts where memory is short, its losses and the update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from vitprune.common.distributed import gather
from vitprune.common.oom import is_out_of_memory
from vitprune.common.seeding import seed_all
from vitprune.errors import TrainingError
from vitprune.model import SparseViT
from vitprune.training.objective import StepLoss
from vitprune.training.optimizer import freeze
from vitprune.training.recipe import Phase, Recipe

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and class indices (B,) or, of mixed images, probabilities (B, num_classes)."""


class StepPlan(NamedTuple):
    """What a step does.

    Attributes:
        phase: see `Recipe`.
        noise: scale of the Gumbel noise.
        seed: of the step's random numbers.
        num_parts: forward and backward passes that share the batch.
        clip_grad: largest norm of the gradient.
    """

    phase: Phase
    noise: float
    seed: tuple[int, ...]
    num_parts: int = 1
    clip_grad: float | None = None


def take_step(
    accelerator: Accelerator, objective: Any, optimizer: Any, batch: Batch, plan: StepPlan
) -> tuple[StepLoss, bool]:
    """Losses and update of one batch.

    The gradient is the mean over the batch whatever the number of parts, but for rounding. Only what is a mean over
    tokens (the token loss, where images keep different numbers of them) becomes the mean of the parts' means.

    Args:
        accelerator: for devices, precision and the other processes.
        objective: an Objective, wrapped where there are several processes.
        optimizer: of the student.
        batch: this process' images.
        plan: what to do.

    Returns:
        The losses, and whether the step was taken. If not, the loss or its gradient was not finite in some process,
        and no weight is changed.
    """
    optimizer.zero_grad()
    inner = accelerator.unwrap_model(objective)
    parts = _parts(batch, plan.num_parts)
    losses: list[StepLoss] = []
    for index, (images, labels) in enumerate(parts):
        seed_all(*plan.seed)  # each part draws the noise of the whole batch, and uses its own
        # The processes exchange gradients once, with the last part.
        with nullcontext() if index == len(parts) - 1 else accelerator.no_sync(objective):
            loss = objective(
                images.to(accelerator.device, non_blocking=True),
                labels.to(accelerator.device, non_blocking=True),
                plan.phase,
                plan.noise,
                (index, len(parts)),
            )
            loss = _scaled(loss, len(images) / len(batch[0]))
            losses.append(loss)
            if not _finite_everywhere(accelerator, loss.total):
                return _sum(losses), False
            with inner.clock.measure("backward"):
                accelerator.backward(loss.total)
    with inner.clock.measure("update"):
        taken = _update(accelerator, optimizer, inner.student.parameters(), plan.clip_grad)
    return _sum(losses), taken


def find_num_parts(
    accelerator: Accelerator, objective: Any, recipe: Recipe, phases: Sequence[Phase], batch: Batch
) -> int:
    """In how many parts a batch fits into memory beside the optimiser: 1, 2, 4 and so on, in every process the same.

    Args:
        accelerator: for devices, precision and the other processes.
        objective: an Objective, wrapped where there are several processes.
        recipe: the settings.
        phases: to try.
        batch: as large as this process' share of one; its content does not matter.

    Raises:
        TrainingError: not even one image at a time fits.
    """
    inner = accelerator.unwrap_model(objective)  # the processes try by themselves
    num_parts, share = 1, len(batch[0])
    while num_parts <= share and not _fits(accelerator, inner, recipe, phases, _parts(batch, num_parts)[0]):
        num_parts *= 2
    num_parts = max(gather(num_parts))
    if num_parts > share:
        raise TrainingError(
            f"out of memory with a single image of {tuple(batch[0].shape[1:])} on {accelerator.device}",
            "take a smaller model, or --img-size",
        )
    return num_parts


def _fits(accelerator: Accelerator, objective: Any, recipe: Recipe, phases: Sequence[Phase], batch: Batch) -> bool:
    images, labels = (tensor.to(accelerator.device) for tensor in batch)
    student: SparseViT = objective.student
    try:
        moments = [torch.empty_like(weight) for weight in student.parameters() for _ in range(2)]
        for phase in phases:
            freeze(student, recipe, phase, phase != "warm")
            accelerator.backward(objective(images, labels, phase, 1.0).total)
        del moments
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        student.zero_grad(set_to_none=True)
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _parts(batch: Batch, num_parts: int) -> list[Batch]:
    images, labels = batch
    return list(zip(images.chunk(num_parts), labels.chunk(num_parts), strict=True))


def _scaled(loss: StepLoss, share: float) -> StepLoss:
    if share == 1:
        return loss
    components = {name: share * value for name, value in loss.components.items()}
    return StepLoss(share * loss.total, components, share * loss.kept_ratios)


def _sum(losses: Sequence[StepLoss]) -> StepLoss:
    """Of the parts' shares; the total without its graph."""
    names = losses[0].components
    return StepLoss(
        torch.stack([loss.total.detach() for loss in losses]).sum(),
        {name: torch.stack([loss.components[name] for loss in losses]).sum() for name in names},
        torch.stack([loss.kept_ratios for loss in losses]).sum(dim=0),
    )


def _finite_everywhere(accelerator: Accelerator, loss: Tensor) -> bool:
    """All processes go on or none: the others would wait for its gradient."""
    finite = torch.isfinite(loss.detach()).float()
    if accelerator.num_processes > 1:
        finite = accelerator.reduce(finite, "mean")
    return bool(finite >= 1)


def _update(accelerator: Accelerator, optimizer: Any, weights: Iterable[Tensor], clip_grad: float | None) -> bool:
    """The optimiser's step; False, with nothing changed, if the gradient is not finite."""
    norm = accelerator.clip_grad_norm_(weights, math.inf if clip_grad is None else clip_grad)
    if accelerator.scaler is None and norm is not None and not torch.isfinite(norm):
        return False
    optimizer.step()
    # With fp16 the gradient scaler itself leaves out a step whose gradient overflows.
    return not accelerator.optimizer_step_was_skipped
