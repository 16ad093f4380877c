"""Rows of `datasets` as images: which columns hold what, and what a label means to the model."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset

from vitprune.common.formatting import writable
from vitprune.data.classes import Matched, ModelClasses, match_classes, model_index, named, refuse_order, shown
from vitprune.data.imagenet import find_spelling
from vitprune.data.images import UNLABELLED, ImageSet, Sample, Transform, Unreadable, open_image, read_sample
from vitprune.data.options import MAX_PIXELS, NO_OPTIONS, DataOptions
from vitprune.errors import DataError

_LABEL_NAMES = ("label", "labels", "cls", "class", "target", "fine_label")
_BUFFER_SIZE = 1000  # rows among which a stream is shuffled


@dataclass(frozen=True)
class Labels:
    """How a row's class becomes an index of the model."""

    column: str | None = None
    """Its name; None where labels are not used."""
    index: Mapping[Any, int] = field(default_factory=dict)
    """Class index of the model by value of the column."""
    names: dict[int, str] = field(default_factory=dict)
    """What the data calls the classes, by class index of the model; empty where they are only numbered."""
    how: str = ""
    """How the classes were understood, for people."""
    key: str | None = None
    """Where the column holds an object, its entry that is the class."""

    def value_of(self, cell: Any) -> Any:
        """The class in a cell of the column, as the data has it."""
        return cell if self.key is None else (cell or {}).get(self.key)

    def index_of(self, value: Any, source: str) -> int:
        """The class index of a value of the column.

        Raises:
            DataError: the model does not have that class.
        """
        if value not in self.index:
            raise DataError(f"'{source}' has a row of class {value!r}, which is none of the model's{shown(self.index)}")
        return self.index[value]


@dataclass(eq=False)
class ImageStream(IterableDataset[Any]):
    """Images that come one after another, from shards or over the network: no length, no choice of a single one.

    Workers and processes share the shards among themselves without overlap.

    Attributes:
        table: a `datasets.IterableDataset`, its image column not decoded.
        image: name of that column.
        labels: how labels are read.
        source: what to call the data.
        max_pixels: larger images count as unreadable.
        seed: to shuffle shards and a buffer of rows; None for the order of the data.
        transform: applied to the PIL image; set before reading batches.
        passes: how often the data was gone through; a shuffled stream's order depends on it.
    """

    table: Any
    image: str
    labels: Labels
    source: str
    max_pixels: int = MAX_PIXELS
    seed: int | None = None
    transform: Transform | None = None
    passes: int = field(default=0, init=False)

    @property
    def class_names(self) -> dict[int, str]:
        """What the data calls the classes, by class index of the model."""
        return self.labels.names

    @property
    def how_classes(self) -> str:
        """How the classes of the data were understood, for people; empty where there are none."""
        return self.labels.how

    @property
    def labelled(self) -> bool:
        """Whether every image has a class."""
        return self.labels.column is not None

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
            column = self.labels.column
            label = (
                UNLABELLED if column is None else self.labels.index_of(self.labels.value_of(row[column]), self.source)
            )
        except DataError as error:
            return Unreadable(name, error.message)
        return read_sample(lambda: decode(row[self.image], self.max_pixels), lambda: name, self.transform, label)


Images = ImageSet | ImageStream


def read_table(table: Any, classes: ModelClasses | None, source: str, options: DataOptions = NO_OPTIONS) -> Images:
    """Images of one split: of a `datasets.Dataset`, or of a `datasets.IterableDataset`, which becomes a stream.

    Without classes, the model's, images are unlabelled. Errors call the data `source`. Of the options columns and
    `max_pixels` are used.

    Raises:
        DataError: no rows, a column is missing, or the classes do not fit the model.
    """
    from datasets import Image as ImageFeature
    from datasets import IterableDataset as StreamedTable

    streamed = isinstance(table, StreamedTable)
    features = table.features or next(iter(table.take(1)), None)
    if features is None:
        raise DataError(f"'{source}' holds no rows")
    image = _image_column(features, options.columns[0], source)
    found = _read_labels(features, classes, options.columns[1], source, None if streamed else table.unique)
    # Not decoded: an image that cannot be decoded must not stop the reading of rows.
    undecoded = table.cast_column(image, ImageFeature(decode=False))
    if streamed:
        return ImageStream(undecoded, image, found, source, options.max_pixels)
    if found.column is None:
        labels = [UNLABELLED] * len(table)
    else:
        labels = [found.index_of(found.value_of(cell), source) for cell in table[found.column]]
    read, name = partial(_read_row, undecoded, image, options.max_pixels), partial(_row_name, source)
    return ImageSet(range(len(table)), labels, read, name, found.names, how_classes=found.how)


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
            raise DataError(
                f"column '{column}' of '{source}' holds {_kind_of(features[column])}, no images",
                f"its columns are {', '.join(features)}",
            )
        return column
    from datasets import Image as ImageFeature

    found = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
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


def _kind_of(kind: Any) -> str:
    return str(getattr(kind, "dtype", type(kind).__name__))


def _read_labels(
    features: Mapping[str, Any],
    classes: ModelClasses | None,
    column: str | None,
    source: str,
    values: Callable[[str], Sequence[str]] | None,
) -> Labels:
    """How to read labels. `values` lists those of a column, where that is possible."""
    from datasets import ClassLabel

    if classes is None:
        return Labels()
    if column is None:
        kinds = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        column = next(iter([*kinds, *(name for name in _LABEL_NAMES if name in features)]), None)
    key = None
    if column is None and isinstance(features.get("json"), Mapping):  # a tar file's entries of that ending
        key = next((name for name in _LABEL_NAMES if name in features["json"]), None)
        column = key and "json"
    if column is None or column not in features:
        raise DataError(
            f"'{source}' has no column {'of class labels' if column is None else repr(column)}",
            f"its columns are {', '.join(features)}; name one with --target-key or train without: --no-labels",
        )
    kind = features[column] if key is None else features[column][key]
    if isinstance(kind, ClassLabel):
        found = _numbered(kind.names, classes, source)
        indices = [found.index[name] for name in kind.names]
        return Labels(column, dict(enumerate(indices)), dict(zip(indices, kind.names, strict=True)), found.how)
    if getattr(kind, "dtype", "string" if isinstance(kind, str) else "int64") == "string":
        known = model_index(classes)
        found = Matched(known or {}, "by name") if values is None else match_classes(values(column), classes, source)
        if not found.index:
            raise DataError(
                f"'{source}' names its classes, but those of the model have no names", "use data with numbered classes"
            )
        names = {index: name for name, index in found.index.items() if values is not None or named(classes)}
        return Labels(column, found.index, names, found.how, key)
    refuse_order(classes, f"column '{key or column}' of '{source}' numbers the classes")
    numbers = {index: index for index in range(classes.num_classes)}
    return Labels(column, numbers, how=f"by the numbers in column '{key or column}'", key=key)


def _numbered(names: Sequence[str], classes: ModelClasses, source: str) -> Matched:
    """The classes of a column of numbered classes with names, which have an order of their own."""
    if named(classes):
        return match_classes(names, classes, source)
    if found := find_spelling(names, classes.num_classes, source, in_order=True):
        return Matched(found[0], f"ImageNet's, {found[1]}")
    if len(names) == classes.num_classes and not set(names) <= set(classes.names or ()):
        return Matched(
            {name: i for i, name in enumerate(names)}, f"in the order that the data gives them{shown(names)}"
        )
    return match_classes(names, classes, source)
