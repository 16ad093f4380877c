"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from vitprune.backbones import input_size
from vitprune.common.distributed import is_main, world_size
from vitprune.common.oom import explained_out_of_memory
from vitprune.common.progress import Listener
from vitprune.common.seeding import derive_seed, seed_all
from vitprune.data import Faults, Images, ImageStream, explain_worker_crash
from vitprune.errors import Preempted, TrainingError
from vitprune.model import SparseViT
from vitprune.training.checkpoints import Checkpoints, State
from vitprune.training.clock import Clock
from vitprune.training.compiling import compiled_blocks
from vitprune.training.objective import Objective, StepLoss
from vitprune.training.optimizer import Optimization, freeze
from vitprune.training.phases import Part, plan_parts
from vitprune.training.progress import Progress, StepRecord
from vitprune.training.recipe import Phase, Recipe
from vitprune.training.step import Batch, StepPlan, find_num_parts, take_step
from vitprune.training.stream import training_batches
from vitprune.training.tracking import Tracking, finish, track

_RATE_BATCHES = 8
"""On how many batches the loss is measured that sets the backbone's rate."""

_GOOD_EVERY = 100
"""Steps after which a state is kept to go back to; by number, so that all processes keep the same."""
_LOWER_RATE = 0.1


def train(
    student: SparseViT,
    teacher: SparseViT,
    images: Images,
    recipe: Recipe,
    *,
    device: torch.device,
    precision: str,
    listener: Listener,
    progress: Progress,
    checkpoints: Checkpoints | None = None,
    resume: State | None = None,
    tracking: Tracking | None = None,
) -> None:
    """Train `student` in place: warm start, then end to end with sampled decisions, at last on the deployed path.

    Args:
        student: the sparse model.
        teacher: the dense model as a SparseViT without stages; not changed.
        images: with the training transform set.
        recipe: the settings.
        device: where to train.
        precision: "fp32", "bf16" or "fp16".
        listener: told of every step.
        progress: kept up to date, so that a stopped run knows how far it came.
        checkpoints: where to save on the way; None not to.
        resume: where to go on; None to begin.
        tracking: where else to log the steps.

    Raises:
        Preempted: `checkpoints.stop` was set; a checkpoint is written.
        TrainingError: the loss was not finite for `recipe.max_skipped` steps in a row, twice; or out of memory.
        DataError: more images cannot be read than `recipe.max_unreadable` allows; names one. Or a process that
            reads them died.
        OutputError: a checkpoint cannot be written; those there are stay.
    """
    accelerator = _make_accelerator(device, precision, tracking)
    seed_all(recipe.seed)
    if resume is not None:
        vars(progress).update(resume.about["progress"])
    per_pass = None if isinstance(images, ImageStream) else max(1, len(images) // recipe.batch_size)
    parts = plan_parts(recipe, per_pass, has_stages=bool(student.schedule.stages))
    progress.num_steps = sum(part.num_steps for part in parts)
    trainer = _Trainer(accelerator, student, teacher, images, recipe, listener, progress, checkpoints, Clock(device))
    student.backbone.set_drop_path(recipe.drop_path)
    first = 0 if resume is None else resume.about["part"]
    if tracking is not None:
        tracking.start(accelerator, recipe, progress.steps_done)
    try:
        compiling = compiled_blocks(student, teacher) if recipe.compile else nullcontext()
        with explain_worker_crash(), compiling:
            for number, part in enumerate(parts[first:], start=first):
                trainer.run(number, part, resume if number == first else None)
    finally:
        finish(accelerator)
    student.backbone.set_drop_path(0.0)
    student.requires_grad_(True).eval()
    accelerator.free_memory()


@dataclass
class _Trainer:
    """What stays the same from step to step.

    Attributes:
        good: a state to put back when too many steps in a row are not finite; the same step's in every process.
    """

    accelerator: Accelerator
    student: SparseViT
    teacher: SparseViT
    images: Images
    recipe: Recipe
    listener: Listener
    progress: Progress
    checkpoints: Checkpoints | None
    clock: Clock
    faults: Faults = field(default_factory=Faults)
    unreadable_before: int = 0
    skipped_in_a_row: int = 0
    good: State | None = None

    def run(self, number: int, part: Part, resume: State | None) -> None:
        """A fresh optimiser and schedule, then the steps; at the end the averaged weights, where there are any.

        Args:
            number: of the part.
            part: what to do.
            resume: a state within this part to go on from.
        """
        recipe, progress = self.recipe, self.progress
        if resume is not None:
            self.student.load_state_dict(resume.part("student."))
        self.student.requires_grad_(True)  # several processes share the gradients of what has one now
        objective: Any = self.accelerator.prepare(Objective(self.student, self.teacher, recipe, self.clock))
        if part.train_backbone and resume is None:
            progress.backbone_lr = self._backbone_rate(objective)
        tools = self._optimization(part)
        first = 0
        if resume is not None:
            first = resume.about["step"]
            tools.restore(resume)
        tools.optimizer = self.accelerator.prepare(tools.optimizer)
        objective.train()
        progress.num_parts = self._num_parts(objective, part)
        self.faults = Faults(recipe.max_unreadable, names=progress.unreadable)
        self.unreadable_before = progress.num_unreadable
        stream = self._stream(recipe.seed, progress.steps_done, self.faults)
        self.good = _copied(tools)
        self.clock.read()  # what was measured on the way here belongs to no step
        for step, (phase, position) in islice(enumerate(part.steps()), first, None):
            tools.set_rates(step, progress.rate_scale)
            freeze(self.student, recipe, phase, part.train_backbone and step >= part.frozen_steps)
            noise = 1.0 + (recipe.noise_end - 1.0) * position
            self._step(
                objective, tools, StepPlan(phase, noise, self._seed, progress.num_parts, recipe.clip_grad), stream
            )
            tools.after_step(step)
            if not self.skipped_in_a_row and (step + 1) % _GOOD_EVERY == 0:
                self.good = _copied(tools)
            last = progress.steps_done == progress.num_steps
            if self.checkpoints is not None and (last or self.checkpoints.due(progress.steps_done)):
                self._save(self.checkpoints, number, step + 1, tools)
        tools.finish()

    @property
    def _seed(self) -> tuple[int, int]:
        """Of the step at hand."""
        return self.recipe.seed, self.progress.steps_done

    def _optimization(self, part: Part) -> Optimization:
        recipe = self.recipe
        predictor_lr = recipe.peak_lr * (1.0 if part.phases[0][0] == "warm" else recipe.tune_lr_scale)
        backbone_lr = self.progress.backbone_lr if part.train_backbone else None
        return Optimization(self.student, recipe, part.num_steps, predictor_lr, backbone_lr)

    def _num_parts(self, objective: Any, part: Part) -> int:
        """In how many passes a batch is taken."""
        if self.recipe.grad_accum != "auto":
            return self.recipe.grad_accum
        share = self.recipe.batch_size // world_size()
        if not isinstance(self.images, ImageStream):
            share = min(share, len(self.images) // world_size())
        labels = torch.zeros(share, dtype=torch.long)
        if self.recipe.augmentation.mixes:
            labels = torch.zeros(share, self.student.num_classes)
        images = torch.zeros(share, *input_size(self.student.model))
        phases = [phase for phase, steps in part.phases if steps]
        return find_num_parts(self.accelerator, objective, self.recipe, phases, (images, labels))

    def _save(self, checkpoints: Checkpoints, part: int, step: int, tools: Optimization) -> None:
        """Save the state before step `step` of the part; the run ends if it was told to."""
        about = {"part": part, "step": step, "progress": asdict(self.progress)}
        if is_main():
            checkpoints.save(State(tools.tensors(), about), self.progress.steps_done)
        if checkpoints.stop:
            raise Preempted("the run was told to stop", "vitprune sparsify with the same options and --resume goes on")

    def _stream(self, seed: int, first_step: int, faults: Faults) -> Iterator[Batch]:
        """Training batches from the given one on."""
        pin = self.accelerator.device.type == "cuda"
        return training_batches(
            self.images, self.recipe, faults, self.student.num_classes, seed=seed, first_step=first_step, pin=pin
        )

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
        stream = self._stream(derive_seed(recipe.seed, _RATE_BATCHES), 0, Faults(recipe.max_unreadable))
        with torch.no_grad():
            for images, labels in islice(stream, _RATE_BATCHES):
                losses.append(objective(images.to(device), labels.to(device), "deployed").components["kl"])
        loss = self._mean(torch.stack(losses).mean()).item()
        factor = loss / recipe.rate_reference_kl if math.isfinite(loss) else 1.0
        return rate * min(4.0, max(0.5, factor))

    def _step(self, objective: Any, tools: Optimization, plan: StepPlan, stream: Iterator[Batch]) -> None:
        """One batch: losses, update, record; what to do after too many non-finite ones in a row."""
        start = time.perf_counter()
        seed_all(*plan.seed)  # images are mixed as they come
        with self.clock.measure("data", waiting=True):
            batch = next(stream)
        what, way_out = self._memory_advice(plan)
        with explained_out_of_memory(what, way_out, TrainingError):
            loss, taken = take_step(self.accelerator, objective, tools.optimizer, batch, plan)
        loss = self._agreed(loss)
        seconds = time.perf_counter() - start
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        too_many = self.skipped_in_a_row >= self.recipe.max_skipped
        record = replace(
            self._record(loss, len(batch[1]) * world_size(), seconds, plan.phase, tools.optimizer),
            skipped=not taken,
            restored=too_many and self.progress.num_restored == 0,
        )
        self.progress.num_skipped += not taken
        self.listener.step(record)
        track(self.accelerator, record)
        if record.restored and self.good is not None:
            tools.restore(self.good)
            self.progress.num_restored += 1
            self.progress.rate_scale *= _LOWER_RATE
            self.skipped_in_a_row = 0
        elif too_many:
            raise TrainingError(
                f"the loss or its gradient was not finite for {self.skipped_in_a_row} steps in a row "
                f"(phase '{plan.phase}', loss {record.total:g}), a second time: an earlier state was put back before",
                "lower the rate, such as --set lr=3e-4, or use --precision fp32",
            )

    def _memory_advice(self, plan: StepPlan) -> tuple[str, str]:
        share = self.recipe.batch_size // world_size()
        what = f"training on {share} images a step in {plan.num_parts} part(s) on {self.accelerator.device}"
        return what, f"--grad-accum {2 * plan.num_parts} takes them in smaller parts, --batch-size auto finds how small"

    def _agreed(self, loss: StepLoss) -> StepLoss:
        """The mean of all processes, which also hear what others could not read and whether one was told to stop."""
        count = float(self.faults.count)
        if world_size() > 1:
            stop = float(self.checkpoints is not None and self.checkpoints.stop)
            told = [loss.total.new_tensor(value) for value in (count, stop)]
            values = self._mean(torch.stack([part.float() for part in (*loss.components.values(), loss.total, *told)]))
            loss = StepLoss(values[-3], dict(zip(loss.components, values, strict=False)), loss.kept_ratios)
            count = world_size() * values[-2].item()
            if self.checkpoints is not None and values[-1] > 0:
                self.checkpoints.stop = True
        self.progress.num_unreadable = self.unreadable_before + round(count)
        return loss

    def _mean(self, value: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(value, "mean")
        return mean

    def _record(self, loss: StepLoss, num_images: int, seconds: float, phase: Phase, optimizer: Any) -> StepRecord:
        """Count the step and describe it."""
        progress = self.progress
        progress.steps_done += 1
        progress.phases[phase] = progress.phases.get(phase, 0) + 1
        progress.num_images += num_images
        progress.seconds += seconds
        for name, spent in self.clock.read().items():
            progress.seconds_by_part[name] = progress.seconds_by_part.get(name, 0.0) + spent
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
        )


def _copied(tools: Optimization) -> State:
    """A state that training does not change."""
    return State({name: tensor.detach().cpu().clone() for name, tensor in tools.tensors().items()}, {})


def _make_accelerator(device: torch.device, precision: str, tracking: Tracking | None) -> Accelerator:
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
        log_with=None if tracking is None else tracking.name,
        project_dir=None if tracking is None else tracking.folder,
    )
