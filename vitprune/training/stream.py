"""The batches that training takes, one after another without end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.data import Mixup

from vitprune.data import Faults, Images, batches, training_loader
from vitprune.errors import DataError
from vitprune.training.recipe import Recipe
from vitprune.training.step import Batch


def training_batches(
    images: Images,
    recipe: Recipe,
    faults: Faults,
    num_classes: int,
    *,
    seed: int,
    first_step: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """This process' part of shuffled batches, augmented and mixed as the recipe says.

    Args:
        images: with the training transform set.
        recipe: the settings.
        faults: where unreadable images are counted.
        num_classes: of the model; labels of mixed images are probabilities of so many.
        seed: of order and transforms.
        first_step: number of the first batch.
        pin: into memory that a GPU reads fast.

    Raises:
        DataError: no image can be read, or more cannot than the recipe allows; names one.
    """
    loader = training_loader(
        images, recipe.batch_size, seed=seed, first_step=first_step, num_workers=recipe.workers(), pin=pin
    )
    stream = _endless(loader, faults)
    augmentation = recipe.augmentation
    if not augmentation.mixes:
        return stream
    mixup = Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        label_smoothing=augmentation.smoothing,
        num_classes=num_classes,
    )
    # Unlabelled images are marked -1, which has no one-hot; their mixed labels are not used.
    return (mixup(images, labels.clamp(min=0)) for images, labels in stream)


def _endless(loader: Any, faults: Faults) -> Iterator[Batch]:
    """Batches of one pass after another."""
    while True:  # an ordinary set's loader never ends, a stream's does
        yield from batches(loader, faults)
        if faults.seen == faults.count:
            raise DataError("no training image could be read", f"the first is '{(*faults.names, '?')[0]}'")
