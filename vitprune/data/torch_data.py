"""Images that a caller has as a torch Dataset or DataLoader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from vitprune.data.classes import ModelClasses
from vitprune.data.images import UNLABELLED, ImageSet, Sample, Unreadable, read_sample, to_rgb
from vitprune.errors import DataError, UsageError


@dataclass(eq=False)
class TorchImages(ImageSet):
    """The samples of a Dataset, each an image or (image, class index of the model, ...).

    An image is a PIL image, which gets the transform, or a tensor (C, H, W), which is taken as it is: resized and
    normalised as the model's weights want it.
    """

    num_classes: int = 0

    def __getitem__(self, index: int) -> Sample | Unreadable:
        label = UNLABELLED

        def image() -> Any:
            nonlocal label
            image, label = _parts(self.read(self.items[index]))
            return image

        found = read_sample(image, lambda: f"image {self.items[index]}", self._prepared, UNLABELLED)
        if isinstance(found, Unreadable):
            return found
        if self.num_classes and label >= self.num_classes:
            reason = f"its label is {label}, but the model has {self.num_classes} classes"
            return Unreadable(f"image {self.items[index]}", reason, fatal=True, hint="labels are the model's outputs")
        sample = Sample((found[0], label))
        sample.note = found.note
        return sample

    def _prepared(self, image: Any) -> Any:
        if not isinstance(image, Image.Image):
            return image
        return to_rgb(image) if self.transform is None else self.transform(to_rgb(image))


def torch_images(source: Dataset[Any] | DataLoader[Any], classes: ModelClasses | None) -> TorchImages:
    """The images of a Dataset, or of the one that a DataLoader reads; loading and order are vitprune's.

    Args:
        source: a Dataset with a length, or a DataLoader of one, which neither chooses nor stacks samples by itself.
        classes: the model's; its output indices are the labels. None where labels do not matter.

    Raises:
        UsageError: a stream, or a loader with a sampler or a collate_fn of its own.
        DataError: there is no image in it.
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
    image, label = _parts(source[0])
    if not isinstance(image, (Image.Image, Tensor)):
        raise DataError(
            f"the {type(source).__name__} gives {type(image).__name__}, expected a PIL image or a tensor (C, H, W)"
        )
    names = getattr(source, "classes", None) or ()
    known = dict(enumerate(map(str, names))) if classes is not None and len(names) == classes.num_classes else {}
    numbers = list(range(len(source)))
    labels = [UNLABELLED if label == UNLABELLED else 0] * len(source)  # which one is known once it is read
    return TorchImages(
        numbers,
        labels,
        source.__getitem__,
        name=lambda number: f"image {number}",
        class_names=known,
        num_classes=0 if classes is None else classes.num_classes,
    )


def _parts(sample: Any) -> tuple[Any, int]:
    """Image and label of a sample."""
    if isinstance(sample, (tuple, list)):
        return sample[0], int(sample[1]) if len(sample) > 1 else UNLABELLED
    return sample, UNLABELLED
