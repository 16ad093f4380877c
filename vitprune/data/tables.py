"""Rows of `datasets` as images: which columns hold what, and what a label means to the model."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import IterableDataset

from vitprune.data.classes import ModelClasses, match_classes, model_index, named
from vitprune.data.images import UNLABELLED, ImageSet, Transform, Unreadable, read_sample
from vitprune.errors import DataError

_LABEL_NAMES = ("label", "labels", "cls", "class", "target", "fine_label")


Columns = tuple[str | None, str | None]
"""Names of the columns of images and of classes; None to find them: the first of its kind."""


class _Labels(NamedTuple):
    """How a row's class becomes an index of the model.

    Attributes:
        column: its name; None where labels are not wanted.
        to_index: from the value in the column; raises DataError for one that the model does not know.
        names: what the data calls the classes, by index of the model.
    """

    column: str | None
    to_index: Callable[[Any], int]
    names: Mapping[int, str]


class ImageStream(IterableDataset[Any]):
    """Images that come one after another, from shards or over the network: no length, no choice of a single one.

    Workers and processes share the shards among themselves without overlap.

    Args:
        table: a `datasets.IterableDataset`, its image column not decoded.
        image: name of that column.
        labels: how labels are read.
        source: what to call the data.
        shuffle_seed: to shuffle shards and a buffer of rows; None for the order of the data.

    Attributes:
        passes: how often the data was gone through; a shuffled stream's order depends on it.
    """

    def __init__(self, table: Any, image: str, labels: _Labels, source: str, shuffle_seed: int | None = None) -> None:
        super().__init__()
        self.table = table
        self.image = image
        self.source = source
        self._labels = labels
        self.class_names = dict(labels.names)
        self.labelled = labels.column is not None
        self.transform: Transform | None = None
        self.passes = 0
        self._seed = shuffle_seed

    @property
    def num_shards(self) -> int:
        """How many parts can be read side by side."""
        return int(self.table.num_shards)

    def shuffled(self, seed: int) -> ImageStream:
        """The same images in random order, within a buffer."""
        stream = ImageStream(self.table, self.image, self._labels, self.source, seed)
        stream.transform = self.transform
        return stream

    def part(self, rank: int, world: int) -> ImageStream:
        """What one of several processes reads; all of them together read everything once."""
        if world == 1:
            return self
        from datasets.distributed import split_dataset_by_node

        table = split_dataset_by_node(self.table, rank, world)
        stream = ImageStream(table, self.image, self._labels, self.source, self._seed)
        stream.transform = self.transform
        return stream

    def sample(self, num_images: int) -> ImageStream:
        """The first `num_images` images."""
        stream = ImageStream(self.table.take(num_images), self.image, self._labels, self.source, self._seed)
        stream.transform = self.transform
        return stream

    def __iter__(self) -> Iterator[tuple[Any, int] | Unreadable]:
        table = self.table
        if self._seed is not None:
            table = table.shuffle(seed=self._seed, buffer_size=1000)
            table.set_epoch(self.passes)
        rows, number = iter(table), 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (OSError, ValueError, tarfile.TarError) as error:
                # Yielded, not raised: it would cross the border of a worker process as a pasted traceback.
                yield Unreadable(self.source, f"reading stopped after {number} rows: {error}", fatal=True)
                return
            yield self._sample(row, number)
            number += 1

    def _sample(self, row: Mapping[str, Any], number: int) -> tuple[Any, int] | Unreadable:
        name = f"{self.source} {row.get('__key__', f'row {number}')}"
        try:
            label = UNLABELLED if self._labels.column is None else self._labels.to_index(row[self._labels.column])
        except DataError as error:
            return Unreadable(name, error.message)
        return read_sample(lambda: decode(row[self.image]), lambda: name, self.transform, label)


def image_set(table: Any, classes: ModelClasses | None, source: str, columns: Columns = (None, None)) -> ImageSet:
    """Images of one split that can be reached in any order, a `datasets.Dataset`.

    Args:
        table: the split.
        classes: the model's classes, None for unlabelled use.
        source: what to call the data in an error.
        columns: which columns to use.

    Raises:
        DataError: a column is missing, or the classes do not fit the model.
    """
    image = _image_column(table.features, columns, source)
    found = _labels(table.features, classes, columns, source, lambda column: sorted(set(table[column])))
    column = found.column
    labels = [UNLABELLED] * len(table) if column is None else [found.to_index(value) for value in table[column]]
    reader = _TableReader(_undecoded(table, image), image)
    return ImageSet(range(len(table)), labels, reader, _RowName(source), found.names)


def image_stream(table: Any, classes: ModelClasses | None, source: str, columns: Columns = (None, None)) -> ImageStream:
    """As `image_set`, for a `datasets.IterableDataset`."""
    features = table.features or next(iter(table.take(1)), None)
    if features is None:
        raise DataError(f"'{source}' holds no rows")
    image = _image_column(features, columns, source)
    found = _labels(features, classes, columns, source, None)
    return ImageStream(_undecoded(table, image), image, found, source)


def decode(cell: Any) -> Image.Image:
    """The image in a cell of an image column that was not decoded: its bytes, never a path the data chose.

    Raises:
        ValueError: the cell holds no bytes.
        OSError, PIL.UnidentifiedImageError: they are no image.
    """
    content = cell if isinstance(cell, bytes) else (cell or {}).get("bytes")
    if not content:
        raise ValueError("the row holds no image")
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def _image_column(features: Mapping[str, Any], columns: Columns, source: str) -> str:
    from datasets import Image as ImageFeature

    if columns[0] is not None:
        if columns[0] not in features:
            raise DataError(f"'{source}' has no column '{columns[0]}'", f"its columns are {', '.join(features)}")
        return columns[0]
    found = next((name for name, kind in features.items() if isinstance(kind, ImageFeature)), None)
    if found is None:
        raise DataError(
            f"'{source}' has no column of images, only {', '.join(features)}", "name it: --columns IMAGE,LABEL"
        )
    return found


def _undecoded(table: Any, image: str) -> Any:
    """An image that cannot be decoded must not stop the reading of rows."""
    from datasets import Image as ImageFeature

    return table.cast_column(image, ImageFeature(decode=False))


def _labels(
    features: Mapping[str, Any],
    classes: ModelClasses | None,
    columns: Columns,
    source: str,
    values: Callable[[str], Sequence[Any]] | None,
) -> _Labels:
    """How to read labels. `values` lists those of a column, where that is possible."""
    from datasets import ClassLabel

    if classes is None:
        return _Labels(None, lambda _: UNLABELLED, {})
    column = columns[1]
    if column is None:
        kinds = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        column = next(iter([*kinds, *(name for name in _LABEL_NAMES if name in features)]), None)
    if column is None or column not in features:
        raise DataError(
            f"'{source}' has no column {'of class labels' if column is None else repr(column)}",
            f"its columns are {', '.join(features)}; name one (--columns IMAGE,LABEL) or train without: --no-labels",
        )
    kind = features[column]
    if isinstance(kind, ClassLabel):
        return _Labels(column, *_spelled(list(kind.names), classes, source))
    if getattr(kind, "dtype", "string" if isinstance(kind, str) else "int64") == "string":
        known = model_index(classes)
        if values is not None:
            known = match_classes(values(column), classes, source)
        elif known is None:
            raise DataError(
                f"'{source}' names its classes, but those of the model have no names", "use data with numbered classes"
            )
        return _Labels(column, _Lookup(known, source), {index: name for name, index in known.items()})
    return _Labels(column, _InRange(classes.num_classes, source), {})


def _spelled(names: list[str], classes: ModelClasses, source: str) -> tuple[Callable[[Any], int], dict[int, str]]:
    """Of a column of numbered classes with names."""
    # The Hub's ImageNet spells its classes out, in the usual order; only names known to the model reorder.
    index = match_classes(names, classes, source) if set(names) <= set(classes.names or ()) else None
    if index is None and (len(names) != classes.num_classes or named(classes)):
        match_classes(names, classes, source)  # says what does not fit
    places = [index[name] if index else number for number, name in enumerate(names)]
    return _Lookup(dict(enumerate(places)), source), dict(zip(places, names, strict=True))


class _Lookup:
    """A row's label as the model's index (classes and not closures, so that worker processes can receive them)."""

    def __init__(self, index: Mapping[Any, int], source: str) -> None:
        self.table = index
        self.source = source

    def __call__(self, value: Any) -> int:
        if value not in self.table:
            raise DataError(f"'{self.source}' has a row of class {value!r}, which the model does not have")
        return self.table[value]


class _InRange:
    def __init__(self, num_classes: int, source: str) -> None:
        self.num_classes = num_classes
        self.source = source

    def __call__(self, value: Any) -> int:
        if not isinstance(value, int) or not 0 <= value < self.num_classes:
            raise DataError(
                f"'{self.source}' has a row of class {value!r}, but the model's are 0 to {self.num_classes - 1}"
            )
        return value


class _TableReader:
    """Reads the image of a row."""

    def __init__(self, table: Any, column: str) -> None:
        self.table = table
        self.column = column

    def __call__(self, row: int) -> Image.Image:
        return decode(self.table[row][self.column])


class _RowName:
    def __init__(self, source: str) -> None:
        self.source = source

    def __call__(self, row: int) -> str:
        return f"{self.source} row {row}"
