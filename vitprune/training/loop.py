"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor

from vitprune.data import Faults, Pictures, PictureStream, batches, training_loader
from vitprune.errors import DataError, Preempted, TrainingError
from vitprune.model import SparseViT
from vitprune.processes import is_main, world_size
from vitprune.randomness import mix, seed_all
from vitprune.training.checkpoints import Checkpoints, State
from vitprune.training.objective import Objective, StepLoss
from vitprune.training.optimizer import (
    freeze,
    make_optimizer,
    make_scheduler,
    optimizer_tensors,
    restore_optimizer,
    update,
)
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
    checkpoints: Checkpoints | None = None,
    resume: State | None = None,
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
        checkpoints: where to save on the way; None not to.
        resume: where to go on; None to begin.

    Raises:
        Preempted: `checkpoints.stop` was set; a checkpoint is written.
        TrainingError: the loss was not finite for `recipe.max_skipped` steps in a row.
        DataError: more pictures cannot be read than `recipe.max_unreadable` allows; names one.
        OutputError: a checkpoint cannot be written; those there are stay.
    """
    accelerator = _make_accelerator(device, precision)
    seed_all(recipe.seed)
    if resume is not None:
        vars(progress).update(resume.about["progress"])
    per_pass = None if isinstance(pictures, PictureStream) else max(1, len(pictures) // recipe.batch_size)
    parts = _plan(recipe, per_pass, has_stages=bool(student.schedule.stages))
    progress.num_steps = sum(part.num_steps for part in parts)
    trainer = _Trainer(accelerator, student, teacher, pictures, recipe, listener, progress, checkpoints)
    student.backbone.set_drop_path(recipe.drop_path)
    first = 0 if resume is None else resume.about["part"]
    for number, part in enumerate(parts[first:], start=first):
        trainer.run(number, part, resume if number == first else None)
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
    pictures: Pictures
    recipe: Recipe
    listener: Listener
    progress: Progress
    checkpoints: Checkpoints | None
    faults: Faults = field(default_factory=Faults)
    skipped_in_a_row: int = 0

    def run(self, number: int, part: _Part, resume: State | None) -> None:
        """A fresh optimiser and schedule, then the steps; at the end the averaged weights, where there are any.

        Args:
            number: of the part.
            part: what to do.
            resume: a state within this part to go on from.
        """
        student, recipe, progress = self.student, self.recipe, self.progress
        if resume is not None:
            student.load_state_dict(resume.part("student."))
        student.requires_grad_(True)  # several processes share the gradients of what has one now
        objective: Any = self.accelerator.prepare(Objective(student, self.teacher, recipe))
        if part.train_backbone and resume is None:
            progress.backbone_lr = self._backbone_rate(objective)
        predictor_lr = recipe.peak_lr * (1.0 if part.phases[0][0] == "warm" else recipe.tune_lr_scale)
        optimizer = make_optimizer(student, recipe, predictor_lr, progress.backbone_lr if part.train_backbone else None)
        scheduler = make_scheduler(optimizer, part.num_steps, recipe.warmup_share)
        average = ModelEmaV3(student, decay=recipe.ema_decay) if recipe.ema_decay and part.train_backbone else None
        first = 0
        if resume is not None:
            first = resume.about["step"]
            restore_optimizer(optimizer, resume.part("optimizer."))
            if average is not None:
                average.module.load_state_dict(resume.part("average."))
        optimizer = self.accelerator.prepare(optimizer)
        objective.train()
        seen = progress.num_images + progress.num_unreadable
        self.faults = Faults(recipe.max_unreadable, progress.num_unreadable, seen, progress.unreadable)
        stream = self._stream(recipe.seed, progress.steps_done, self.faults)
        for step, (phase, position) in islice(enumerate(part.steps()), first, None):
            scheduler.step_update(step)
            freeze(student, recipe, phase, part.train_backbone and step >= part.frozen_steps)
            noise = 1.0 + (recipe.noise_end - 1.0) * position
            seed_all(recipe.seed, progress.steps_done)
            self._step(objective, optimizer, phase, noise, stream)
            if average is not None:
                average.update(student, step=step)
            last = progress.steps_done == progress.num_steps
            if self.checkpoints is not None and (last or self.checkpoints.due(progress.steps_done)):
                self._save(self.checkpoints, number, step + 1, optimizer, average)
        if average is not None:
            student.load_state_dict(average.module.state_dict())

    def _save(self, checkpoints: Checkpoints, part: int, step: int, optimizer: Any, average: Any) -> None:
        """Save the state before step `step` of the part; the run ends if it was told to."""
        tensors = {f"student.{name}": tensor for name, tensor in self.student.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
        if average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in average.module.state_dict().items()}
        about = {"part": part, "step": step, "progress": asdict(self.progress)}
        if is_main():
            checkpoints.save(State(tensors, about), self.progress.steps_done)
        if checkpoints.stop:
            raise Preempted("the run was told to stop", "vitprune sparsify with the same options and --resume goes on")

    def _stream(self, seed: int, first_step: int, faults: Faults) -> Iterator[Batch]:
        """Training batches from the given one on, mixed where the recipe says so."""
        recipe = self.recipe
        loader = training_loader(
            self.pictures,
            recipe.batch_size,
            seed=seed,
            first_step=first_step,
            num_workers=recipe.workers(),
            pin=self.accelerator.device.type == "cuda",
        )
        return _mixed(_endless(loader, faults), recipe, self.student.num_classes)

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
        stream = self._stream(mix(recipe.seed, _RATE_BATCHES), 0, Faults(recipe.max_unreadable))
        with torch.no_grad():
            for images, labels in islice(stream, _RATE_BATCHES):
                losses.append(objective(images.to(device), labels.to(device), "deployed").components["kl"])
        loss = self._mean(torch.stack(losses).mean()).item()
        factor = loss / recipe.rate_reference_kl if math.isfinite(loss) else 1.0
        return rate * min(4.0, max(0.5, factor))

    def _step(self, objective: Any, optimizer: Any, phase: Phase, noise: float, stream: Iterator[Batch]) -> None:
        """One batch: losses, update, record; gives up after too many non-finite ones in a row."""
        start = time.perf_counter()
        images, labels = next(stream)
        device = self.accelerator.device
        loss: StepLoss = objective(
            images.to(device, non_blocking=True), labels.to(device, non_blocking=True), phase, noise
        )
        skipped = not update(self.accelerator, optimizer, self.student, loss.total, self.recipe.clip_grad)
        loss = self._agreed(loss)
        seconds = time.perf_counter() - start
        record = self._record(loss, len(labels) * world_size(), seconds, skipped, phase, optimizer)
        self.listener.step(record)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= self.recipe.max_skipped:
            raise TrainingError(
                f"the loss or its gradient was not finite for {self.skipped_in_a_row} steps in a row "
                f"(phase '{phase}', loss {record.total:g})",
                "lower --lr, or use --precision fp32",
            )

    def _agreed(self, loss: StepLoss) -> StepLoss:
        """The mean of all processes; they also hear whether one of them was told to stop."""
        if world_size() == 1:
            return loss
        stop = float(self.checkpoints is not None and self.checkpoints.stop)
        parts = [*loss.components.values(), loss.total.detach(), loss.total.new_tensor(stop)]
        values = self._mean(torch.stack([part.float() for part in parts]))
        if self.checkpoints is not None and values[-1] > 0:
            self.checkpoints.stop = True
        return StepLoss(values[-2], dict(zip(loss.components, values, strict=False)), loss.kept_ratios)

    def _mean(self, value: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(value, "mean")
        return mean

    def _record(
        self, loss: StepLoss, num_images: int, seconds: float, skipped: bool, phase: Phase, optimizer: Any
    ) -> StepRecord:
        """Count the step and describe it."""
        progress = self.progress
        progress.steps_done += 1
        progress.phases[phase] = progress.phases.get(phase, 0) + 1
        progress.num_skipped += skipped
        progress.num_images += num_images
        progress.num_unreadable = self.faults.count
        progress.seconds += seconds
        kept = tuple(loss.kept_ratios.tolist())
        if phase == "sampled":
            progress.sampled_ratios = kept
        return StepRecord(
            step=progress.steps_done,
            num_steps=progress.num_steps,
            phase=phase,
            losses={name: value.item() for name, value in loss.components.items()},
            total=loss.total.item(),
            kept_ratios=kept,
            target_ratios=self.student.schedule.ratios,
            lr=optimizer.param_groups[-1 if phase == "deployed" else 0]["lr"],
            images_per_s=num_images / seconds,
            skipped=skipped,
        )


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
    # Which parameters have a gradient differs from phase to phase.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if world_size() > 1 else []
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=handlers,
    )


def _endless(loader: Any, faults: Faults) -> Iterator[Batch]:
    """Batches of one pass after another."""
    while True:  # an ordinary set's loader never ends, a stream's does
        yield from batches(loader, faults)
        if faults.seen == faults.count:
            raise DataError("no training picture could be read", f"the first is '{(*faults.names, '?')[0]}'")
