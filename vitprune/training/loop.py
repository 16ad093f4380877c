"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor

from vitprune.data import Faults, Pictures, PictureStream, batches, make_loader
from vitprune.errors import DataError, TrainingError
from vitprune.model import SparseViT
from vitprune.training.objective import Objective, StepLoss
from vitprune.training.progress import Listener, Progress, StepRecord
from vitprune.training.recipe import Phase, Recipe

_RATE_BATCHES = 8
"""On how many batches the loss is measured that sets the backbone's rate."""

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and class indices (B,)."""


def train(
    student: SparseViT,
    teacher: SparseViT,
    pictures: Pictures,
    recipe: Recipe,
    *,
    device: torch.device,
    precision: str,
    listener: Listener,
    progress: Progress,
) -> None:
    """Train `student` in place: warm start, then end to end with sampled decisions, at last on the deployed path.

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
        DataError: more pictures cannot be read than `recipe.max_unreadable` allows; names one.
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
    per_epoch = None if isinstance(pictures, PictureStream) else len(loader)
    parts = _plan(recipe, per_epoch, has_stages=bool(student.schedule.stages))
    progress.num_steps = sum(part.num_steps for part in parts)
    faults = Faults(recipe.max_unreadable)
    progress.unreadable = faults.names
    stream = _mixed(_endless(loader, faults), recipe, student.num_classes)
    trainer = _Trainer(accelerator, student, teacher, stream, recipe, listener, progress, faults)
    student.backbone.set_drop_path(recipe.drop_path)
    for part in parts:
        trainer.run(part)
    student.backbone.set_drop_path(0.0)
    student.requires_grad_(True).eval()
    accelerator.free_memory()


@dataclass(frozen=True)
class _Part:
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


def _plan(recipe: Recipe, steps_per_epoch: int | None, has_stages: bool) -> list[_Part]:
    """What is run: the warm start, then everything together; without empty parts."""
    steps = recipe.num_steps(steps_per_epoch)
    deployed = round(steps * recipe.deployed_share)
    # Without stages there is nothing to rank; on the deployed path nothing but the backbone can train.
    tunes = recipe.backbone_lr_scale > 0
    parts = [
        _Part((("warm", recipe.warm_start_steps if has_stages else 0),)),
        _Part(
            (("sampled", steps - deployed if has_stages else 0), ("deployed", deployed if tunes else 0)),
            tunes,
            frozen_steps=round(recipe.freeze_epochs * (steps_per_epoch or 0)),
        ),
    ]
    return [part for part in parts if part.num_steps]


@dataclass
class _Trainer:
    """What stays the same from step to step."""

    accelerator: Accelerator
    student: SparseViT
    teacher: SparseViT
    stream: Iterator[Batch]
    recipe: Recipe
    listener: Listener
    progress: Progress
    faults: Faults
    skipped_in_a_row: int = 0

    def run(self, part: _Part) -> None:
        """A fresh optimiser and schedule, then the steps; at the end the averaged weights, where there are any."""
        student, recipe = self.student, self.recipe
        objective: Any = self.accelerator.prepare(Objective(student, self.teacher, recipe))
        if part.train_backbone:
            self.progress.backbone_lr = self._backbone_rate(objective)
        student.requires_grad_(True)  # timm leaves out of its groups what is frozen when they are made
        optimizer = create_optimizer_v2(
            _parameter_groups(
                student,
                recipe,
                recipe.peak_lr * (1.0 if part.phases[0][0] == "warm" else recipe.tune_lr_scale),
                self.progress.backbone_lr if part.train_backbone else None,
            ),
            opt="adamw",
            weight_decay=0.0,
        )
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=part.num_steps,
            warmup_t=round(part.num_steps * recipe.warmup_share),
            warmup_lr_init=0.0,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        average = ModelEmaV3(student, decay=recipe.ema_decay) if recipe.ema_decay and part.train_backbone else None
        optimizer = self.accelerator.prepare(optimizer)
        objective.train()
        for step, (phase, position) in enumerate(part.steps()):
            scheduler.step_update(step)
            _freeze(student, recipe, phase, part.train_backbone and step >= part.frozen_steps)
            noise = 1.0 + (recipe.noise_end - 1.0) * position
            self._step(objective, optimizer, phase, noise)
            if average is not None:
                average.update(student, step=step)
        if average is not None:
            student.load_state_dict(average.module.state_dict())

    def _backbone_rate(self, objective: Any) -> float:
        """The backbone's peak rate: the further the warm start has left the student from its teacher, the higher.

        Adam's steps are as long as the rate says, however small the gradient: where hardly anything is lost, a rate
        that would mend a greater loss does harm.
        """
        recipe = self.recipe
        rate = recipe.peak_lr * recipe.backbone_lr_scale
        if recipe.rate_reference_kl is None:
            return rate
        device, losses = self.accelerator.device, []
        objective.eval()
        with torch.no_grad():
            for images, labels in islice(self.stream, _RATE_BATCHES):
                losses.append(objective(images.to(device), labels.to(device), "deployed").components["kl"])
        loss = torch.stack(losses).mean().item()
        factor = loss / recipe.rate_reference_kl if math.isfinite(loss) else 1.0
        return rate * min(4.0, max(0.5, factor))

    def _step(self, objective: Any, optimizer: Any, phase: Phase, noise: float) -> None:
        """One batch: losses, update, record; gives up after too many non-finite ones in a row."""
        start = time.perf_counter()
        images, labels = next(self.stream)
        device = self.accelerator.device
        loss: StepLoss = objective(
            images.to(device, non_blocking=True), labels.to(device, non_blocking=True), phase, noise
        )
        skipped = not _update(self.accelerator, optimizer, self.student, loss.total, self.recipe.clip_grad)
        seconds = time.perf_counter() - start

        progress = self.progress
        progress.steps_done += 1
        progress.phases[phase] = progress.phases.get(phase, 0) + 1
        progress.num_skipped += skipped
        progress.num_images += len(labels)
        progress.num_unreadable = self.faults.count
        progress.seconds += seconds
        record = StepRecord(
            step=progress.steps_done,
            num_steps=progress.num_steps,
            phase=phase,
            losses={name: value.item() for name, value in loss.components.items()},
            total=loss.total.item(),
            kept_ratios=tuple(loss.kept_ratios.tolist()),
            target_ratios=self.student.schedule.ratios,
            lr=optimizer.param_groups[-1 if phase == "deployed" else 0]["lr"],
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


def _freeze(student: SparseViT, recipe: Recipe, phase: Phase, train_backbone: bool) -> None:
    """Say what a step trains: what has no gradient is left alone by the optimiser."""
    student.predictors.requires_grad_(phase != "deployed")  # top-k passes no gradient to them
    student.model.requires_grad_(train_backbone and recipe.train_trunk)
    if train_backbone and not recipe.train_trunk:
        first_block = student.schedule.blocks[0] if student.schedule.stages else 0
        for module in student.backbone.tail(first_block):
            module.requires_grad_(True)


def _update(
    accelerator: Accelerator, optimizer: Any, student: SparseViT, loss: Tensor, clip_grad: float | None
) -> bool:
    """Backward and optimiser step; False, with nothing changed, if the loss or the gradient is not finite."""
    optimizer.zero_grad()
    if not torch.isfinite(loss):
        return False
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(student.parameters(), math.inf if clip_grad is None else clip_grad)
    if accelerator.scaler is None and norm is not None and not torch.isfinite(norm):
        return False
    optimizer.step()
    # With fp16 the gradient scaler itself leaves out a step whose gradient overflows.
    return not accelerator.optimizer_step_was_skipped


def _parameter_groups(
    student: SparseViT, recipe: Recipe, predictor_lr: float, backbone_lr: float | None
) -> list[dict[str, Any]]:
    """AdamW groups with their rates; no weight decay on norms, biases and what timm exempts."""
    groups = [g | {"lr": predictor_lr} for g in param_groups_weight_decay(student.predictors, recipe.weight_decay)]
    if backbone_lr is not None:
        exempt = tuple(cast(Any, student.model).no_weight_decay())
        decayed = param_groups_weight_decay(student.model, recipe.weight_decay, exempt)
        groups += [g | {"lr": backbone_lr} for g in decayed]
    return [group for group in groups if group["params"]]


def _mixed(stream: Iterator[Batch], recipe: Recipe, num_classes: int) -> Iterator[Batch]:
    """The batches, mixed by timm where the recipe says so; labels then become class probabilities."""
    augmentation = recipe.augmentation
    if augmentation.mixup == 0 and augmentation.cutmix == 0:
        return stream
    mixup = Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        label_smoothing=augmentation.smoothing,
        num_classes=num_classes,
    )
    # Unlabelled pictures are marked -1, which has no one-hot; their mixed labels are not used.
    return (mixup(images, labels.clamp(min=0)) for images, labels in stream)


def _make_accelerator(device: torch.device, precision: str) -> Accelerator:
    # accelerate keeps one state per process and refuses a second precision; ours may follow another run's.
    AcceleratorState._reset_state(reset_partial_state=True)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no" if precision == "fp32" else precision)


def _endless(loader: Any, faults: Faults) -> Iterator[Batch]:
    """Batches of one pass after another."""
    while True:
        before = faults.seen - faults.count
        yield from batches(loader, faults)
        if faults.seen - faults.count == before:
            raise DataError("no training picture could be read", f"the first is '{(*faults.names, '?')[0]}'")
