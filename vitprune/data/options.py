"""What can be said about a DATA argument."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitprune.data.classes import ClassOrder

Columns = tuple[str | None, str | None]
"""Names of the columns of images and of targets, several of these with commas between; None to find them."""

MAX_PIXELS = 178_956_970
"""Above it Pillow takes an image for an attack on memory: 512 MiB in RGB."""


@dataclass(frozen=True)
class DataOptions:
    """How a DATA argument is read.

    Attributes:
        splits: names of the training and the validation split of a Hub data set, of two folders, or what the names of
            such shards begin with; None to find them.
        columns: names of the columns of images and of targets in a table or a file of labels; None to find them.
            Several columns of targets are named with commas between.
        streaming: read a Hub data set or parquet shards as they come, storing nothing.
        limit: at most so many images of each split, chosen at random, always the same; of a stream the first ones.
        class_order: how classes without names were sorted when the model was trained; None where not known.
        class_map: a file with the names of the model's classes in output order.
        labels: a file with the targets of images, for classes of those that are not in class folders; None to find it.
        max_pixels: larger images count as unreadable.
    """

    splits: tuple[str | None, str | None] = (None, None)
    columns: Columns = (None, None)
    streaming: bool = False
    limit: int | None = None
    class_order: ClassOrder | None = None
    class_map: Path | None = None
    labels: Path | None = None
    max_pixels: int = MAX_PIXELS


NO_OPTIONS = DataOptions()
