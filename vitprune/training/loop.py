"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from vitprune.data import PictureSet, batches, make_loader
from vitprune.errors import TrainingError
from vitprune.model import SparseViT
from vitprune.training.objective import Objective, StepLoss
from vitprune.training.recipe import Phase, Recipe


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
    skipped: bool

    def as_json(self) -> dict[str, Any]:
        """The record for log.jsonl; a loss that is not finite becomes null."""
        record = asdict(self)
        record["losses"] = {name: _finite(value) for name, value in self.losses.items()}
        record["total"] = _finite(self.total)
        return record


class Listener(Protocol):
    """Who wants to know how training goes."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""


@dataclass
class Progress:
    """What a run has done so far; complete when it ends, true also when it is stopped."""

    steps_done: int = 0
    num_steps: int = 0
    num_skipped: int = 0
    num_images: int = 0
    seconds: float = 0.0
    phases: dict[str, int] = field(default_factory=dict)
    sampled_ratios: tuple[float, ...] | None = None


def train(
    student: SparseViT,
    teacher: SparseViT,
    pictures: PictureSet,
    recipe: Recipe,
    *,
    device: torch.device,
    precision: str,
    listener: Listener,
    progress: Progress,
) -> None:
    """Train `student` in place: warm start, sampled end-to-end steps, steps on the deployed path.

    Args:
        student: the sparse model.
        teacher: the dense model as a SparseViT without stages; not changed.
        pictures: with the training transform set.
        recipe: the settings.
        device: where to train.
        precision: "fp32", "bf16" or "fp16".
        listener: told of every step.
        progress: kept up to date, so that a stopped run knows how far it came.

    Raises:
        TrainingError: the loss was not finite for `recipe.max_skipped` steps in a row.
        DataError: a picture cannot be read; names it.
    """
    accelerator = _make_accelerator(device, precision)
    set_seed(recipe.seed)  # torch, numpy and, for timm's transforms, random
    loader = make_loader(
        pictures,
        recipe.batch_size,
        training=True,
        num_workers=recipe.workers(),
        seed=recipe.seed,
        pin=device.type == "cuda",
    )
    plan = _plan(recipe, len(loader), has_stages=bool(student.schedule.stages))
    progress.num_steps = sum(steps for *_, steps in plan)
    trainer = _Trainer(accelerator, student, teacher, _endless(loader), recipe, listener, progress)
    for phase, train_backbone, num_steps in plan:
        trainer.run_phase(phase, train_backbone, num_steps)
    student.requires_grad_(True).eval()
    accelerator.free_memory()


def _plan(recipe: Recipe, steps_per_epoch: int, has_stages: bool) -> list[tuple[Phase, bool, int]]:
    """What is run: (phase, whether the backbone trains, number of steps), without empty entries."""
    steps = recipe.num_steps(steps_per_epoch)
    deployed = round(steps * recipe.deployed_share)
    sampled = steps - deployed
    frozen = min(sampled, round(recipe.freeze_epochs * steps_per_epoch))
    backbone = recipe.backbone_lr_scale > 0
    plan: list[tuple[Phase, bool, int]] = [
        ("warm", False, recipe.warm_start_steps),
        ("sampled", False, frozen),
        ("sampled", backbone, sampled - frozen),
        ("deployed", backbone, deployed),
    ]
    # Without stages there is nothing to rank; on the deployed path nothing but the backbone can train.
    return [
        (phase, tunes, count)
        for phase, tunes, count in plan
        if count and (has_stages or phase == "deployed") and (tunes or phase != "deployed")
    ]


@dataclass
class _Trainer:
    """What stays the same from phase to phase."""

    accelerator: Accelerator
    student: SparseViT
    teacher: SparseViT
    stream: Iterator[tuple[Tensor, Tensor]]
    recipe: Recipe
    listener: Listener
    progress: Progress
    skipped_in_a_row: int = 0

    def run_phase(self, phase: Phase, train_backbone: bool, num_steps: int) -> None:
        """A fresh optimiser and schedule, then `num_steps` steps."""
        student, recipe = self.student, self.recipe
        student.model.requires_grad_(train_backbone)
        student.predictors.requires_grad_(phase != "deployed")  # top-k passes no gradient to them
        optimizer = create_optimizer_v2(
            _parameter_groups(student, recipe, phase, train_backbone), opt="adamw", weight_decay=0.0
        )
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=num_steps,
            warmup_t=round(num_steps * recipe.warmup_share),
            warmup_lr_init=0.0,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        objective: Any = Objective(student, self.teacher, recipe.weights, labels=recipe.labels, tau=recipe.tau)
        objective, optimizer = self.accelerator.prepare(objective, optimizer)
        objective.train()
        for step in range(num_steps):
            scheduler.step_update(step)
            self._step(objective, optimizer, phase)

    def _step(self, objective: Any, optimizer: Any, phase: Phase) -> None:
        """One batch: losses, update, record; gives up after too many non-finite ones in a row."""
        start = time.perf_counter()
        images, labels = next(self.stream)
        device = self.accelerator.device
        loss: StepLoss = objective(images.to(device, non_blocking=True), labels.to(device, non_blocking=True), phase)
        skipped = not _update(self.accelerator, optimizer, self.student, loss.total, self.recipe.clip_grad)
        seconds = time.perf_counter() - start

        progress = self.progress
        progress.steps_done += 1
        progress.phases[phase] = progress.phases.get(phase, 0) + 1
        progress.num_skipped += skipped
        progress.num_images += len(labels)
        progress.seconds += seconds
        record = StepRecord(
            step=progress.steps_done,
            num_steps=progress.num_steps,
            phase=phase,
            losses={name: value.item() for name, value in loss.components.items()},
            total=loss.total.item(),
            kept_ratios=tuple(loss.kept_ratios.tolist()),
            target_ratios=self.student.schedule.ratios,
            lr=optimizer.param_groups[0]["lr"],
            images_per_s=len(labels) / seconds,
            skipped=skipped,
        )
        if phase == "sampled":
            progress.sampled_ratios = record.kept_ratios
        self.listener.step(record)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= self.recipe.max_skipped:
            raise TrainingError(
                f"the loss or its gradient was not finite for {self.skipped_in_a_row} steps in a row "
                f"(phase '{phase}', loss {record.total:g})",
                "lower --lr, or use --precision fp32",
            )


def _update(accelerator: Accelerator, optimizer: Any, student: SparseViT, loss: Tensor, clip_grad: float) -> bool:
    """Backward and optimiser step; False, with nothing changed, if the loss or the gradient is not finite."""
    optimizer.zero_grad()
    if not torch.isfinite(loss):
        return False
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(student.parameters(), clip_grad)
    if accelerator.scaler is None and norm is not None and not torch.isfinite(norm):
        return False
    optimizer.step()
    # With fp16 the gradient scaler itself leaves out a step whose gradient overflows.
    return not accelerator.optimizer_step_was_skipped


def _parameter_groups(student: SparseViT, recipe: Recipe, phase: Phase, train_backbone: bool) -> list[dict[str, Any]]:
    """AdamW groups with their rates; no weight decay on norms, biases and what timm exempts."""
    groups: list[dict[str, Any]] = []
    if phase != "deployed":
        rate = recipe.lr * (1.0 if phase == "warm" else recipe.tune_lr_scale)
        groups += [g | {"lr": rate} for g in param_groups_weight_decay(student.predictors, recipe.weight_decay)]
    if train_backbone:
        exempt = tuple(cast(Any, student.model).no_weight_decay())
        rate = recipe.lr * recipe.backbone_lr_scale
        groups += [g | {"lr": rate} for g in param_groups_weight_decay(student.model, recipe.weight_decay, exempt)]
    return [group for group in groups if group["params"]]


def _make_accelerator(device: torch.device, precision: str) -> Accelerator:
    # accelerate keeps one state per process and refuses a second precision; ours may follow another run's.
    AcceleratorState._reset_state(reset_partial_state=True)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no" if precision == "fp32" else precision)


def _endless(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one pass after another."""
    while True:
        yield from batches(loader)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
