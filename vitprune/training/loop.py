"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from vitprune.common.devices import Precision, check_compiler, explained_out_of_memory, pick_precision
from vitprune.common.distributed import world_size
from vitprune.common.seeding import derive_seed, seed_all
from vitprune.data import Faults, Images, ImageStream, train_transform
from vitprune.errors import TrainingError
from vitprune.model import SparseViT
from vitprune.tasks import Spread, task_named
from vitprune.training.checkpoints import State
from vitprune.training.elastic import Range, keep_of_step
from vitprune.training.objective import Objective, StepLoss
from vitprune.training.optimizer import Optimization, set_trainable
from vitprune.training.progress import Progress, StepRecord
from vitprune.training.recipe import PlannedStep, Recipe
from vitprune.training.step import backward, find_num_microbatches, training_batches, update

_RATE_BATCHES = 8
"""On how many batches the loss is measured that sets the backbone's rate."""
_VERSIONS = 64
"""Of a block's code: with and without mask, gradient and stochastic depth, for each number of tokens."""


class TrainedStep(NamedTuple):
    """What `train` yields after each step: its record, and whether any process was terminated.

    `state` gives what a checkpoint after this step holds; to be called before the next step.
    """

    record: StepRecord
    state: Callable[[], State]
    stop_requested: bool


def train(
    student: SparseViT,
    teacher: SparseViT,
    images: Images,
    recipe: Recipe,
    device: torch.device,
    progress: Progress,
    resume: State | None = None,
    stops: Callable[[], bool] = lambda: False,
) -> Generator[TrainedStep, None, None]:
    """Train `student` in place, step by step. Whoever iterates logs, shows and saves, and may stop after any step.

    The teacher is the dense model as a SparseViT without stages; both are moved to the device. The transform of the
    images is set here, `progress` is kept up to date (of a resumed run it is what that had done), and `stops` tells
    whether this process was terminated.

    Raises:
        TrainingError: loss or gradient were not finite for `recipe.max_skipped` steps in a row, or out of memory.
        DataError: more images cannot be read than `recipe.max_unreadable` allows; names one.
    """
    accelerator = _make_accelerator(device, pick_precision(recipe.precision, device, training=True))
    seed_all(recipe.seed)
    images.transform = train_transform(teacher.model, recipe.augmentation)
    steps_per_epoch = None if isinstance(images, ImageStream) else max(1, len(images) // recipe.batch_size)
    plan = recipe.plan_steps(steps_per_epoch, has_stages=bool(student.schedule.stages))
    progress.num_steps = sum(map(len, plan))
    faults, unreadable_before = Faults(recipe.max_unreadable, names=progress.unreadable), progress.num_unreadable
    skipped_in_a_row = 0
    student.backbone.set_drop_path(recipe.drop_path)
    student.requires_grad_(True)  # DDP shares the gradients of what requires one when it is wrapped
    objective: Any = accelerator.prepare(Objective(student, teacher, recipe).to(device))
    if task_named(student.task).needs_spread:
        accelerator.unwrap_model(objective).spread = _spread(accelerator, teacher, images, recipe)
    ratios = Range(student, teacher, blends=not recipe.train_trunk)
    with ratios.training(), compiled_blocks(student, teacher) if recipe.compile else nullcontext():
        for number, steps in enumerate(plan):  # first the predictors alone, then predictors and backbone
            if resume is not None and number < resume.about["part"]:
                continue
            if resume is None:
                progress.backbone_lr = _backbone_lr(accelerator, objective, images, steps)
            optimization = Optimization(student, recipe, steps, progress.backbone_lr)
            first = 0
            if resume is not None:
                optimization.restore(resume)
                first, resume = resume.about["step"], None
            optimization.optimizer = accelerator.prepare(optimization.optimizer)
            objective.train()
            if student.keep_range is not None:
                student.keep = student.keep_range[1]  # which needs the most memory
            progress.num_microbatches = find_num_microbatches(accelerator, objective, images, steps)
            batches = training_batches(
                images, recipe, faults, student.num_classes, first_step=progress.steps_done, device=device
            )
            for index in range(first, len(steps)):
                started = time.perf_counter()
                phase, noise, trains_backbone = steps[index]
                optimization.scheduler.step_update(index)
                set_trainable(student, recipe, phase, trains_backbone)
                seed = recipe.seed, progress.steps_done
                if student.keep_range is not None:
                    student.keep = keep_of_step(*student.keep_range, *seed)
                seed_all(*seed)  # mixup draws when a batch is taken: a resumed run draws the same
                batch = next(batches)
                waited = time.perf_counter() - started

                optimization.optimizer.zero_grad()
                with _memory_advice(recipe, device, progress.num_microbatches):
                    with ratios.blended():
                        loss = backward(accelerator, objective, batch, phase, noise, seed, progress.num_microbatches)
                    taken = update(accelerator, optimization.optimizer, student, recipe.clip_grad)
                if optimization.average is not None:
                    optimization.average.update(student, step=index)

                losses, total, num_unreadable, stop = _over_processes(accelerator, loss, faults.count, stops())
                shown = _shown(accelerator, loss, student.num_classes)
                num_images, seconds = len(batch[0]) * world_size(), time.perf_counter() - started
                record = StepRecord(
                    step=progress.steps_done + 1,
                    num_steps=progress.num_steps,
                    phase=phase,
                    losses=losses,
                    total=total,
                    kept_ratios=tuple(loss.kept_ratios.tolist()),
                    target_ratios=student.schedule.ratios,
                    keep=student.keep if student.keep_range else None,
                    lr=optimization.optimizer.param_groups[-1 if phase == "deployed" else 0]["lr"],
                    images_per_s=num_images / seconds,
                    skipped=not taken,
                )
                progress.num_unreadable = unreadable_before + num_unreadable
                progress.add(record, num_images, seconds, waited, shown)
                yield TrainedStep(record, partial(_state, optimization, progress, number, index + 1), stop)

                skipped_in_a_row = 0 if taken else skipped_in_a_row + 1
                if skipped_in_a_row >= recipe.max_skipped:
                    raise TrainingError(
                        f"the loss or its gradient was not finite for {skipped_in_a_row} steps in a row "
                        f"(phase '{phase}', loss {total:g})",
                        "lower the rate, such as --set lr=3e-4, or use --precision fp32",
                    )
            optimization.finish()
    student.backbone.set_drop_path(0.0)
    student.requires_grad_(True).eval()
    accelerator.free_memory()


@contextmanager
def compiled_blocks(*models: SparseViT) -> Iterator[None]:
    """Inside the with statement the models' transformer blocks run compiled, in eager's numbers but for rounding.

    All blocks of a kind share their compiled code. What vitprune computes between them (predictors, selection, losses)
    is not compiled, nor are blocks that an adapter takes apart.

    Raises:
        DeviceError: this machine cannot compile.
    """
    blocks: list[Any] = [block for model in models for block in getattr(model.backbone, "blocks", ())]
    device = next(models[0].parameters()).device
    check_compiler(device)
    # Of a range of keep ratios every step may have other numbers of tokens.
    dynamic = True if any(model.keep_range for model in models) else None
    for block in blocks:
        block.compile(dynamic=dynamic)
    limits = {"recompile_limit": _VERSIONS, "accumulated_recompile_limit": _VERSIONS}
    try:
        with torch._dynamo.config.patch(limits), warnings.catch_warnings():
            # dynamo asks every tensor for its gradient, and torch warns of those that keep none
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # back to eager: nn.Module.compile has no opposite
        torch.compiler.reset()


def _spread(accelerator: Accelerator, teacher: SparseViT, images: Images, recipe: Recipe) -> Spread:
    """Where the teacher's outputs lie, over a few batches of all processes; the same ones when a run is resumed."""
    faults, seed = Faults(recipe.max_unreadable), derive_seed(recipe.seed, _RATE_BATCHES)
    device = accelerator.device
    batches = training_batches(images, recipe, faults, teacher.num_classes, seed=seed, device=device)
    with torch.no_grad(), accelerator.autocast():
        outputs = [teacher(batch.to(device)).float() for batch, _ in islice(batches, _RATE_BATCHES)]
    gathered: Tensor = accelerator.gather(torch.cat(outputs))
    return Spread.of(gathered)


def _backbone_lr(accelerator: Accelerator, objective: Any, images: Images, steps: list[PlannedStep]) -> float | None:
    """The backbone's peak rate: the further the student is from its teacher after pretraining, the higher.

    Adam's steps are as long as the rate says, however small the gradient: where hardly anything is lost, a rate
    that would mend a greater loss does harm. None where the backbone does not train in these steps.
    """
    inner: Objective = accelerator.unwrap_model(objective)
    recipe, device, task = inner.recipe, accelerator.device, task_named(inner.student.task)
    if steps[0].phase == "pretraining" or recipe.backbone_lr_scale == 0:
        return None
    rate = recipe.peak_lr * recipe.backbone_lr_scale
    if recipe.rate_reference_kl is None:
        return rate
    objective.eval()
    faults, seed = Faults(recipe.max_unreadable), derive_seed(recipe.seed, _RATE_BATCHES)
    batches = training_batches(images, recipe, faults, inner.student.num_classes, seed=seed, device=device)
    divergences = []
    if inner.student.keep_range is not None:
        inner.student.keep = inner.student.keep_range[0]  # whose weights are trained
    with torch.no_grad():
        for batch, labels in islice(batches, _RATE_BATCHES):
            divergences.append(objective(batch.to(device), labels.to(device), "deployed").components[task.loss])
    loss = accelerator.reduce(torch.stack(divergences).mean(), "mean").item()
    reference = task.rate_reference or recipe.rate_reference_kl
    factor = loss / reference if math.isfinite(loss) else 1.0
    return rate * min(1.5, max(0.3, factor))


def _over_processes(
    accelerator: Accelerator, loss: StepLoss, num_unreadable: int, stop: bool
) -> tuple[dict[str, float], float, int, bool]:
    """Losses by name and in all, the mean over the processes; what they could not read; whether one is to stop."""
    own = [*loss.components.values(), loss.total, loss.total.new_tensor(num_unreadable), loss.total.new_tensor(stop)]
    *sums, unreadable, stopping = accelerator.reduce(torch.stack(own), "sum").tolist()
    *losses, total = (value / world_size() for value in sums)
    return dict(zip(loss.components, losses, strict=True)), total, int(unreadable), stopping > 0


def _shown(accelerator: Accelerator, loss: StepLoss, num_classes: int) -> list[int]:
    """How many images of all processes the teacher gave each class; nothing where it names none."""
    if loss.classes is None:
        return []
    counts: Tensor = accelerator.reduce(loss.classes.bincount(minlength=num_classes), "sum")
    return [int(count) for count in counts.tolist()]


def _state(optimization: Optimization, progress: Progress, number: int, num_steps: int) -> State:
    """What a checkpoint holds after `num_steps` steps of entry `number` of the plan."""
    return State(optimization.tensors(), {"part": number, "step": num_steps, "progress": asdict(progress)})


def _memory_advice(recipe: Recipe, device: torch.device, num_microbatches: int) -> AbstractContextManager[None]:
    return explained_out_of_memory(
        f"training on {recipe.batch_size // world_size()} images a step in {num_microbatches} part(s) on {device}",
        f"--grad-accum-steps {2 * num_microbatches} takes them in smaller parts, --batch-size auto finds how small",
        TrainingError,
    )


def _make_accelerator(device: torch.device, precision: Precision) -> Accelerator:
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
