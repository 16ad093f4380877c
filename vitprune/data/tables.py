"""Rows of `datasets` as images."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset

from vitprune.common.formatting import writable
from vitprune.data.classes import ModelClasses, TargetKind
from vitprune.data.images import ImageSet, Sample, Transform, Unreadable, open_image, read_sample
from vitprune.data.options import MAX_PIXELS, NO_OPTIONS, DataOptions
from vitprune.data.table_targets import read_all, table_targets, with_floats
from vitprune.data.targets import Targets, stacked
from vitprune.errors import DataError

_BUFFER_SIZE = 1000  # rows among which a stream is shuffled


@dataclass(eq=False)
class ImageStream(IterableDataset[Any]):
    """Images that come one after another, from shards or over the network: no length, no choice of a single one.

    Workers and processes share the shards among themselves without overlap. The column `image` of the table, a
    `datasets.IterableDataset`, is not decoded.

    Attributes:
        seed: to shuffle shards and a buffer of rows; None for the order of the data.
        transform: applied to the PIL image; set before reading batches.
        passes: how often the data was gone through; a shuffled stream's order depends on it.
    """

    table: Any
    image: str
    labels: Targets
    source: str
    max_pixels: int = MAX_PIXELS
    seed: int | None = None
    transform: Transform | None = None
    passes: int = field(default=0, init=False)

    @property
    def kind(self) -> TargetKind:
        """What the targets are."""
        return self.labels.kind

    @property
    def class_names(self) -> dict[int, str]:
        """What the data calls the model's outputs, or the groups, by index."""
        return self.labels.names

    @property
    def how_classes(self) -> str:
        """How the targets of the data were understood, for people; empty where there are none."""
        return self.labels.how

    @property
    def labelled(self) -> bool:
        """Whether every image has a target."""
        return self.labels.reading is not None

    @property
    def num_shards(self) -> int:
        """How many shards can be read side by side."""
        return int(self.table.num_shards)

    def shuffled(self, seed: int) -> ImageStream:
        """The same images in random order, within a buffer."""
        return replace(self, seed=seed)

    def shard(self, rank: int, world: int) -> ImageStream:
        """What one of several processes reads; all of them together read everything once."""
        if world == 1:
            return self
        from datasets.distributed import split_dataset_by_node

        return replace(self, table=split_dataset_by_node(self.table, rank, world))

    def sample(self, num_images: int) -> ImageStream:
        """The first `num_images` images."""
        return replace(self, table=self.table.take(num_images))

    def __iter__(self) -> Iterator[Sample | Unreadable]:
        table = self.table
        if self.seed is not None:
            table = table.shuffle(seed=self.seed, buffer_size=_BUFFER_SIZE)
            table.set_epoch(self.passes)
        rows = iter(table)
        for number in count():
            try:
                row = next(rows, None)
            except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
                # Yielded, not raised: it would cross the border of a worker process as a pasted traceback.
                yield Unreadable(self.source, f"reading stopped after {number} rows: {error}", fatal=True)
                return
            if row is None:
                return
            yield self._sample(row, number)

    def _sample(self, row: Mapping[str, Any], number: int) -> Sample | Unreadable:
        name = writable(f"{self.source} {row.get('__key__', f'row {number}')}")
        try:
            target = self.labels.of(row, "it")
        except DataError as error:
            # A class that the model lacks is as an image that cannot be read; wrong labels or values are a mistake.
            fatal = self.kind in ("labels", "values")
            return Unreadable(name, error.message, fatal, error.hint or Unreadable.hint)
        return read_sample(lambda: decode(row[self.image], self.max_pixels), lambda: name, self.transform, target)


Images = ImageSet | ImageStream


def read_table(table: Any, classes: ModelClasses | None, source: str, options: DataOptions = NO_OPTIONS) -> Images:
    """Images of one split: of a `datasets.Dataset`, or of a `datasets.IterableDataset`, which becomes a stream.

    Without classes, the model's, images are unlabelled. Errors call the data `source`.

    Raises:
        DataError: no rows, a column is missing, or the targets do not fit the model.
    """
    from datasets import Image as ImageFeature
    from datasets import IterableDataset as StreamedTable

    streamed = isinstance(table, StreamedTable)
    features = table.features or next(iter(table.take(1)), None)
    if features is None:
        raise DataError(f"'{source}' holds no rows")
    image = _image_column(features, options.columns[0], source)
    # Not decoded: an image that cannot be decoded must not stop the reading of rows.
    undecoded = table.cast_column(image, ImageFeature(decode=False))
    if streamed and classes is not None and classes.kind == "values":
        undecoded = with_floats(undecoded, features)
    found = table_targets(undecoded, features, image, classes, options.columns[1], source)
    if streamed:
        return ImageStream(undecoded, image, found, source, options.max_pixels)
    labels = stacked(read_all(undecoded, found, source))
    read, name = partial(_read_row, undecoded, image, options.max_pixels), partial(_row_name, source)
    rows = range(len(table))
    return ImageSet(rows, labels, read, name, found.names, how_classes=found.how, kind=found.kind)


def decode(cell: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a cell of an image column that was not decoded: its bytes, never a path the data chose.

    Raises:
        ValueError: the cell holds no bytes.
        Exception: see `open_image`.
    """
    content = cell if isinstance(cell, bytes) else (cell or {}).get("bytes")
    if not content:
        raise ValueError("the row holds no image")
    return open_image(io.BytesIO(content), max_pixels)


def _read_row(table: Any, column: str, max_pixels: int, row: int) -> Image.Image:
    return decode(table[row][column], max_pixels)


def _row_name(source: str, row: int) -> str:
    return writable(f"{source} row {row}")


def _image_column(features: Mapping[str, Any], column: str | None, source: str) -> str:
    if column is not None:
        if column not in features:
            raise DataError(f"'{source}' has no column '{column}'", f"its columns are {', '.join(features)}")
        if not _may_hold_images(features[column]):
            held = getattr(features[column], "dtype", type(features[column]).__name__)
            raise DataError(
                f"column '{column}' of '{source}' holds {held}, no images", f"its columns are {', '.join(features)}"
            )
        return column
    from datasets import Image as ImageFeature

    found = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
    found = found or [name for name, kind in features.items() if _may_hold_images(kind)]
    if len(found) != 1:
        several, none = "several columns of images: ", "no column of images, only "
        raise DataError(
            f"'{source}' has {several if found else none}{', '.join(found or features)}", "name it: --input-key COLUMN"
        )
    return found[0]


def _may_hold_images(kind: Any) -> bool:
    """Images, their bytes, or bytes beside a path, as Parquet has them; of a stream without a schema the first cell."""
    from datasets import Image as ImageFeature

    if isinstance(kind, Mapping):
        return "bytes" in kind
    return isinstance(kind, (ImageFeature, bytes)) or getattr(kind, "dtype", "") in ("binary", "large_binary")
