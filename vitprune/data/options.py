"""What a user may say about DATA beside its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataOptions:
    """How a DATA argument is read.

    Attributes:
        data_dir: folder for `imagenet`, before $VITPRUNE_IMAGENET and the Hub.
        splits: names of the training and the validation split of a Hub data set, or what the names of such shards begin
            with; None to find them.
        columns: names of the columns of images and of labels in a table; None to find them.
        streaming: read a Hub data set or parquet shards as they come, storing nothing.
        limit: at most so many images of each part, chosen at random, always the same; of a stream the first ones.
        fraction: this share of the training images, chosen likewise, in (0, 1].
    """

    data_dir: Path | None = None
    splits: tuple[str | None, str | None] = (None, None)
    columns: tuple[str | None, str | None] = (None, None)
    streaming: bool = False
    limit: int | None = None
    fraction: float | None = None
