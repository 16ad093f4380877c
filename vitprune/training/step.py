"""A batch: where it comes from, its gradient, in microbatches where memory is short, and the update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor

from vitprune.backbones import input_size
from vitprune.common.devices import is_out_of_memory
from vitprune.common.distributed import gather, rank, world_size
from vitprune.common.seeding import seed_all
from vitprune.data import Faults, Images, ImageStream, batches, training_loader
from vitprune.errors import TrainingError
from vitprune.training.objective import Objective, StepLoss
from vitprune.training.optimizer import set_trainable
from vitprune.training.recipe import Phase, PlannedStep, Recipe

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and class indices (B,) or, of mixed images, probabilities (B, num_classes)."""


def training_batches(
    images: Images,
    recipe: Recipe,
    faults: Faults,
    num_classes: int,
    *,
    device: torch.device,
    seed: int | None = None,
    first_step: int = 0,
) -> Iterator[Batch]:
    """This process' share of shuffled batches without end, augmented and mixed as the recipe says.

    The transform of the images is set, and those that cannot be read are counted in `faults`. Labels of mixed images
    are probabilities of so many classes. `device` is where the batches go, `seed`, of order and transforms, the
    recipe's if it is None, and `first_step` the number of the first batch.

    Raises:
        DataError: no image can be read, or more cannot than the recipe allows; names one.
    """
    loader = training_loader(
        images,
        recipe.batch_size,
        seed=recipe.seed if seed is None else seed,
        first_step=first_step,
        num_workers=recipe.workers(),
        pin=device.type == "cuda",
    )
    augmentation = recipe.augmentation
    mixup = Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        label_smoothing=augmentation.smoothing,
        num_classes=num_classes,
    )
    while True:  # an ordinary set's loader never ends, a stream's does
        for batch in batches(loader, faults):
            yield _mixed(mixup, batch) if augmentation.mixes else batch
        if faults.seen == faults.count:
            raise faults.none_read("training images")


def _mixed(mixup: Mixup, batch: Batch) -> Batch:
    images, labels = batch
    num_images = len(images)
    if num_images % 2:  # timm mixes pairs: where an image could not be read, the last one is doubled
        images, labels = (torch.cat((tensor, tensor[-1:])) for tensor in batch)
    # Unlabelled images are marked -1, which has no one-hot; their mixed labels are not used.
    images, labels = mixup(images, labels.clamp(min=0))
    return images[:num_images], labels[:num_images]


def backward(
    accelerator: Accelerator,
    objective: Any,
    batch: Batch,
    phase: Phase,
    noise: float,
    seed: Sequence[int],
    num_microbatches: int,
) -> StepLoss:
    """Losses of one batch, this process' images, and their gradient in the student's weights.

    The gradient is the mean over the batch whatever the number of microbatches, but for rounding. Only what is a mean
    over tokens (the token loss, where images keep different numbers of them) becomes the mean of their means. The
    objective is wrapped where there are several processes, `noise` scales the Gumbel noise, and `seed` is that of the
    step's random numbers.
    """
    num_images = len(batch[0])
    first_image = rank() * num_images  # in the batch of all processes
    losses: list[StepLoss] = []
    weights: list[float] = []
    microbatches = split(batch, num_microbatches)
    for number, (images, labels) in enumerate(microbatches, start=1):
        seed_all(*seed)
        # The processes exchange gradients once, with the last microbatch.
        with nullcontext() if number == len(microbatches) else accelerator.no_sync(objective):
            loss = objective(
                images.to(accelerator.device, non_blocking=True),
                labels.to(accelerator.device, non_blocking=True),
                phase,
                noise,
                (first_image, world_size() * num_images),
            )
            first_image += len(images)
            losses.append(loss)
            weights.append(len(images) / num_images)
            accelerator.backward(weights[-1] * loss.total)
    return _weighted_sum(losses, weights)


def update(accelerator: Accelerator, optimizer: Any, student: torch.nn.Module, clip_grad: float | None) -> bool:
    """The optimiser's step; False, with nothing changed, if the gradient is not finite."""
    norm = accelerator.clip_grad_norm_(student.parameters(), math.inf if clip_grad is None else clip_grad)
    if accelerator.scaler is None and norm is not None and not torch.isfinite(norm):
        return False
    optimizer.step()
    # With fp16 the gradient scaler itself skips a step whose gradient overflows.
    return not accelerator.optimizer_step_was_skipped


def find_num_microbatches(
    accelerator: Accelerator, objective: Any, images: Images, steps: Sequence[PlannedStep]
) -> int:
    """How many microbatches fit a batch into memory: as the recipe says or, if that is "auto", 1, 2, 4 and so on.

    It is the same number in every process. Of the images only their number matters, `steps` are those planned.

    Raises:
        TrainingError: not even one image at a time fits.
    """
    inner: Objective = accelerator.unwrap_model(objective)  # the processes try by themselves
    recipe = inner.recipe
    if recipe.grad_accum != "auto":
        return recipe.grad_accum
    share = recipe.batch_size // world_size()
    if not isinstance(images, ImageStream):
        share = min(share, len(images) // world_size())
    labels = torch.zeros(share, dtype=torch.long)
    if recipe.augmentation.mixes:
        labels = torch.zeros(share, inner.student.num_classes)
    batch = torch.zeros(share, *input_size(inner.student.model)), labels
    phases = {step.phase for step in steps}
    number = 1
    while number <= share and not _fits(accelerator, inner, phases, split(batch, number)[0]):
        number *= 2
    number = max(gather(number))
    if number > share:
        raise TrainingError(
            f"out of memory with a single image of {tuple(batch[0].shape[1:])} on {accelerator.device}",
            "take a smaller model, or --img-size",
        )
    return number


def split(batch: Batch, number: int) -> list[Batch]:
    """A batch as microbatches of equal size, but for the last."""
    images, labels = batch
    return list(zip(images.chunk(number), labels.chunk(number), strict=True))


def _fits(accelerator: Accelerator, objective: Objective, phases: set[Phase], batch: Batch) -> bool:
    """Whether a microbatch fits into memory beside the optimiser."""
    images, labels = (tensor.to(accelerator.device) for tensor in batch)
    student = objective.student
    try:
        moments = [torch.empty_like(weight) for weight in student.parameters() for _ in range(2)]
        for phase in phases:
            set_trainable(student, objective.recipe, phase, phase != "pretraining")
            accelerator.backward(objective(images, labels, phase).total)
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


def _weighted_sum(losses: Sequence[StepLoss], weights: Sequence[float]) -> StepLoss:
    """Of the microbatches; the total without its graph."""

    def summed(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(dim=0)

    classes = [loss.classes for loss in losses if loss.classes is not None]
    return StepLoss(
        summed([loss.total.detach() for loss in losses]),
        {name: summed([loss.components[name] for loss in losses]) for name in losses[0].components},
        summed([loss.kept_ratios for loss in losses]),
        torch.cat(classes) if classes else None,
    )
