"""Image sets: what they are and how an image is opened."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from vitprune.common.formatting import writable
from vitprune.data.classes import TargetKind
from vitprune.data.options import MAX_PIXELS
from vitprune.data.targets import UNLABELLED, Target
from vitprune.errors import DataError

Transform = Callable[[Image.Image], Tensor]

_SCALED = "scaled"  # in a decoded image's info
_BRIGHTEST = (255, 4095, 65535, 2**31 - 1, 2**32 - 1)
"""White in images of 8, 12, 16 and 32 bits."""


class Sample(tuple[Any, Target]):
    """An image and its target: a pair, so that any loader can stack them.

    Attributes:
        note: what people should know of how it was read.
    """

    note: str = ""


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
    """Images that can be read in any order, and what they show.

    Attributes:
        items: what identifies each image: a path, or a row of a table.
        labels: class index of the model for each, group, or UNLABELLED; or float32 (images, outputs), also as a list of
            rows: 0 and 1 of labels, or values.
        read: turns an item into a PIL image; may raise any of PIL's or the system's errors.
        name: turns an item into what is shown to the user.
        class_names: what the data calls the model's outputs, or the groups, by index; empty where not known.
        transform: applied to the PIL image; set before reading batches.
        how_classes: how the targets of the data were understood, for people; empty where there are none.
        left_out: files that were passed over when looking for the images: how many, by kind.
        kind: what the targets are.
    """

    items: Sequence[Any]
    labels: Sequence[Target] | Tensor
    read: Callable[[Any], Image.Image]
    name: Callable[[Any], str] = writable
    class_names: dict[int, str] = field(default_factory=dict)
    transform: Transform | None = None
    how_classes: str = ""
    left_out: Counter[str] = field(default_factory=Counter)
    kind: TargetKind = "class"

    @property
    def labelled(self) -> bool:
        """Whether every image has a target."""
        if isinstance(self.labels, Tensor):
            return True
        return all(isinstance(label, Tensor) or label != UNLABELLED for label in self.labels)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample | Unreadable:
        item = self.items[index]
        return read_sample(lambda: self.read(item), lambda: self.name(item), self.transform, self.labels[index])

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The images at `indices`, in that order."""
        indices = list(indices)
        chosen = self.labels[indices] if isinstance(self.labels, Tensor) else [self.labels[i] for i in indices]
        return replace(self, items=[self.items[i] for i in indices], labels=chosen)

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
    read: Callable[[], Image.Image], name: Callable[[], str], transform: Transform | None, target: Target
) -> Sample | Unreadable:
    """One image, transformed, and its target."""
    try:
        image = read()
        sample = Sample((image if transform is None else transform(image), target))
        sample.note = _note(image, transform)
        return sample
    except Exception as error:  # decoders and Datasets of others raise anything, and a worker must not die of it
        return Unreadable(name(), _reason(error))


def open_image(source: Path | IO[bytes], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read and decode one image, see `to_rgb`. An EXIF orientation is left to the transform.

    Raises:
        ValueError: it has more than `max_pixels` pixels, or some that are no numbers.
        Exception: what its decoder raises.
    """
    try:
        with _no_bombs(max_pixels), Image.open(source) as image:
            return to_rgb(image)
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than {max_pixels:,} pixels") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, transparency dropped.

    Images of more than 8 bits, which Pillow would clip to white, are scaled by the range that their brightest pixel
    needs: 1 (of floats), 255, 4095, 65535 and so on; from their darkest pixel where that is below 0.

    Raises:
        ValueError: some of its pixels are no numbers.
    """
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    return _in_8_bits(image) if deep else image.convert("RGB")


@contextmanager
def _no_bombs(max_pixels: int) -> Iterator[None]:
    """In the block Pillow refuses larger images, and says nothing of those that are odd but can be read."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels // 2  # twice of it is an error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _in_8_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    darkest, brightest = float(pixels.min()), float(pixels.max())
    if not np.isfinite(darkest + brightest):
        raise ValueError("some of its pixels are no numbers")
    ranges = (1, *_BRIGHTEST) if image.mode == "F" else _BRIGHTEST
    white = next((white for white in ranges if brightest <= white), brightest)
    black = 0.0
    if darkest < 0:
        black, white = darkest, max(brightest, darkest + 1e-9)
    grey = Image.fromarray(((pixels - black) / (white - black) * 255).round().astype(np.uint8)).convert("RGB")
    grey.info = image.info | {_SCALED: white != 255 or black != 0}
    return grey


def _note(image: Any, transform: Transform | None) -> str:
    if not isinstance(image, Image.Image):
        return ""
    if image.info.get(_SCALED):
        return "of more than 8 bits, scaled to 8"
    if "exif" not in image.info or image.getexif().get(ExifTags.Base.Orientation, 1) in (0, 1):
        return ""
    turned = getattr(transform, "exif", False)
    return "turned by its EXIF orientation" if turned else "with an EXIF orientation, not turned (--exif turns it)"


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if not isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError)):
        return f"{type(error).__name__}: {error}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
