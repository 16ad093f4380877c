"""Images that a caller has as a torch Dataset or DataLoader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from vitprune.data.classes import ModelClasses
from vitprune.data.images import ImageSet, Sample, Unreadable, read_sample, to_rgb
from vitprune.data.targets import FOR_LABELS, FOR_VALUES, UNLABELLED, Flags, Numbers, OtherTask, Reading
from vitprune.errors import DataError, UsageError

_HINT = "labels are the model's outputs"


@dataclass(eq=False)
class TorchImages(ImageSet):
    """The samples of a Dataset, each an image or (image, target, ...).

    An image is a PIL image, which gets the transform, or a tensor (C, H, W), which is taken as it is: resized and
    normalised as the model's weights want it. A target is a class index of the model or a group; of kind "labels" 0 and
    1 for each output, of kind "values" as many numbers.
    """

    reading: Reading = field(kw_only=True)

    def __getitem__(self, index: int) -> Sample | Unreadable:
        values: list[Any] = []

        def image() -> Any:
            image, value = _parts(self.read(self.items[index]))
            values.append(value)
            return image

        name = f"image {self.items[index]}"
        found = read_sample(image, lambda: name, self._prepared, UNLABELLED)
        if isinstance(found, Unreadable):
            return found
        try:
            target = UNLABELLED if self.labels[index] == UNLABELLED else self.reading(values, "it")
        except DataError as error:
            return Unreadable(name, error.message, fatal=True, hint=error.hint or _HINT)
        sample = Sample((found[0], target))
        sample.note = found.note
        return sample

    def _prepared(self, image: Any) -> Any:
        if not isinstance(image, Image.Image):
            return image
        return to_rgb(image) if self.transform is None else self.transform(to_rgb(image))


@dataclass(frozen=True)
class _Class:
    """The number of a class, or of a group; of any where `num_classes` is None."""

    num_classes: int | None

    def __call__(self, cells: Sequence[Any], row: str) -> int:
        (value,) = cells
        if isinstance(value, list) and len(value) == 1:
            (value,) = value
        if isinstance(value, list):
            raise OtherTask(f"{row} has a target of {len(value)} numbers, and an image has one class", FOR_LABELS)
        if isinstance(value, float) and not value.is_integer():
            raise OtherTask(f"{row} has the target {value:g} where a class is expected", FOR_VALUES)
        try:
            label = UNLABELLED if value is None else int(value)
        except (TypeError, ValueError):
            raise DataError(f"{row} has the target {value!r} where the number of a class is expected", _HINT) from None
        if self.num_classes is not None and label >= self.num_classes:
            raise DataError(f"its label is {label}, but the model has {self.num_classes} classes", _HINT)
        return label


def _reading(classes: ModelClasses | None) -> Reading:
    if classes is None or classes.kind == "group":
        return _Class(None)
    if classes.kind == "class":
        return _Class(classes.num_classes or None)
    return Flags(tuple(range(classes.num_classes))) if classes.kind == "labels" else Numbers(classes.num_classes)


def torch_images(
    source: Dataset[Any] | DataLoader[Any], classes: ModelClasses | None, *, labels: bool = True
) -> TorchImages:
    """The images of a Dataset, or of the one that a DataLoader reads; loading and order are vitprune's.

    The classes are the model's, by output index; None where targets do not matter. Without `labels` all targets are
    left out if that of the first sample does not fit.

    Raises:
        UsageError: a stream, or a loader with a sampler or a collate_fn of its own.
        DataError: there is no image in it, or the first sample's target does not fit the model.
    """
    if isinstance(source, DataLoader):
        plain = isinstance(source.sampler, (RandomSampler, SequentialSampler)) and source.batch_size is not None
        if not plain or source.collate_fn is not default_collate:
            raise UsageError(
                "the DataLoader has a sampler or a collate_fn of its own, which vitprune's loading would pass over",
                "give its Dataset, or a torch.utils.data.Subset of it",
            )
        source = source.dataset
    if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
        raise UsageError(
            f"the {type(source).__name__} has no length: a Dataset must give any of its images by index",
            "give a Dataset with __getitem__ and __len__, or a folder or shards by name",
        )
    if not len(source):
        raise DataError(f"the {type(source).__name__} holds no images")
    image, value = _parts(source[0])
    called = f"the {type(source).__name__}"
    if not isinstance(image, (Image.Image, Tensor)):
        raise DataError(f"{called} gives {type(image).__name__}, expected a PIL image or a tensor (C, H, W)")
    names = getattr(source, "classes", None) or ()
    fits = classes is not None and (classes.kind == "group" or len(names) == classes.num_classes)
    kind, reading = "class" if classes is None else classes.kind, _reading(classes)
    labelled = value is not None and (kind == "values" or value != UNLABELLED)
    try:
        if labelled:
            reading([value], f"the first sample of {called}")
    except DataError:
        if labels and classes is not None:
            raise
        labelled = False
    return TorchImages(
        list(range(len(source))),
        [0 if labelled else UNLABELLED] * len(source),  # which one is known once it is read
        source.__getitem__,
        name=lambda number: f"image {number}",
        class_names=dict(enumerate(map(str, names))) if fits and kind != "values" else {},
        kind=kind,
        reading=reading,
    )


def _parts(sample: Any) -> tuple[Any, Any]:
    """Image and target of a sample, a list if it is several numbers; None where there is none."""
    if not isinstance(sample, (tuple, list)):
        return sample, None
    target = sample[1] if len(sample) > 1 else None
    if isinstance(target, (Tensor, np.ndarray, np.generic)):
        target = target.tolist()
    return sample[0], list(target) if isinstance(target, tuple) else target
