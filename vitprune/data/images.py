"""Image sets: what they are and how an image is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from vitprune.errors import DataError

Transform = Callable[[Image.Image], Tensor]

UNLABELLED = -1


@dataclass(frozen=True)
class Unreadable:
    """Takes the place of an image that could not be read.

    Returned rather than raised: an exception crosses the border of a worker process only as a pasted traceback.
    """

    name: str
    reason: str
    fatal: bool = False
    """Whether that is an error in any case: nothing that follows can be read either, or the data does not fit."""
    hint: str = "copy the shards again"
    """What to do about a fatal one."""

    def error(self) -> DataError:
        """The error to raise in the main process."""
        return DataError(
            f"cannot read image '{self.name}': {self.reason}",
            "remove or replace the file; eval --skip-unreadable and sparsify --set max_unreadable=0.1 skip such images",
        )


@dataclass(eq=False)
class ImageSet(Dataset[Any]):
    """Images that can be read in any order, and their classes.

    Attributes:
        items: what identifies each image: a path, or a row of a table.
        labels: class index of the model for each, or UNLABELLED.
        read: turns an item into a PIL image; may raise any of PIL's or the system's errors.
        name: turns an item into what is shown to the user.
        class_names: what the data calls the classes, by class index of the model; empty where not known.
        transform: applied to the PIL image; set before reading batches.
        how_classes: how the classes of the data were understood, for people; empty where there are none.
    """

    items: Sequence[Any]
    labels: Sequence[int]
    read: Callable[[Any], Image.Image]
    name: Callable[[Any], str] = str
    class_names: dict[int, str] = field(default_factory=dict)
    transform: Transform | None = None
    how_classes: str = ""

    @property
    def labelled(self) -> bool:
        """Whether every image has a class."""
        return all(label != UNLABELLED for label in self.labels)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int] | Unreadable:
        item = self.items[index]
        return read_sample(lambda: self.read(item), lambda: self.name(item), self.transform, self.labels[index])

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The images at `indices`, in that order."""
        return replace(self, items=[self.items[i] for i in indices], labels=[self.labels[i] for i in indices])

    def shard(self, rank: int, world: int) -> ImageSet:
        """What one of several processes reads; all of them together read everything once."""
        return self if world == 1 else self.subset(range(rank, len(self), world))

    def sample(self, num_images: int, seed: int = 0) -> ImageSet:
        """At most `num_images` images, chosen at random and in order; the same ones for the same seed."""
        if num_images >= len(self):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(sorted(order[:num_images].tolist()))

    def split(self, share: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """Hold out `share` of the images (at least one): (rest, held out), chosen at random."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        num_held_out = max(1, round(len(self) * share))
        return self.subset(sorted(order[num_held_out:])), self.subset(sorted(order[:num_held_out]))


def read_sample(
    read: Callable[[], Image.Image], name: Callable[[], str], transform: Transform | None, label: int
) -> tuple[Any, int] | Unreadable:
    """One image, transformed, and its label."""
    try:
        image = read()
        return (image if transform is None else transform(image)), label
    except Exception as error:  # decoders and Datasets of others raise anything, and a worker must not die of it
        return Unreadable(name(), _reason(error))


def open_image(path: Path) -> Image.Image:
    """Read and decode one image file as RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if not isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError)):
        return f"{type(error).__name__}: {error}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
