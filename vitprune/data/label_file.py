"""What a file says of loose images: ImageNet's solution, val.txt, a synset list, metadata.csv, Kaggle's CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.utils import natural_key

from vitprune.data.classes import ModelClasses, TargetKind
from vitprune.data.files import SPLIT_WORDS, words
from vitprune.data.options import Columns
from vitprune.data.target_columns import check_column, class_column, find_target, named_columns
from vitprune.data.targets import FOR_LABELS, OtherTask
from vitprune.errors import DataError

_ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl")
_FILE_WORDS = {"labels", "label", "metadata", "annotations", "solution", "groundtruth"}
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classname", "category", "target", "predictionstring")
_IMAGE_COLUMN = "file_name"
_MARKS = "\t,;"
"""Between columns."""
_WORDNET_ID = re.compile(r"\bn\d{8}\b")


@dataclass(frozen=True)
class FileCells:
    """What a file says of images: names of columns, empty ones where it has none, and their cells for each image.

    None of images that it does not name. A class is text.
    """

    file: Path
    columns: tuple[str, ...]
    cells: list[tuple[Any, ...] | None]


class _NotOfThese(DataError):
    """The file is not about these images."""


@dataclass(frozen=True)
class _Table:
    """Rows, and the names of their columns where the file may have them; of text they are the first row too."""

    rows: list[list[Any]]
    header: list[str] | None


def find_label_files(folder: Path) -> list[Path]:
    """Files in or beside a folder of loose images that may say what they show, by their names.

    In it those of the usual names; beside it those that are named as the folder is, or as its split.
    """
    own = words(folder)
    split = {word for group in SPLIT_WORDS for alike in group if own & {*alike} for word in alike}
    inside = [file for file in _candidates(folder) if words(file) & (_FILE_WORDS | split)]
    beside = [file for file in _candidates(folder.absolute().parent) if file.stem == folder.name or words(file) & split]
    return inside + beside


def _candidates(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix.lower() in _ENDINGS and file.is_file()]


def labels_in(
    files: Sequence[Path], images: Sequence[Path], root: Path, columns: Columns, classes: ModelClasses
) -> FileCells | None:
    """What the one of `files` that fits says of `images`; None if none of them does.

    Raises:
        DataError: several do, and differ; or one is for a model of another task.
    """
    fitting: list[FileCells] = []
    for file in files:
        try:
            fitting.append(read_label_file(file, images, root, columns, classes))
        except OtherTask:
            raise
        except DataError as error:  # other files than labels are called so too
            if classes.kind in ("labels", "values") and not isinstance(error, _NotOfThese):
                raise
    if not fitting:
        return None
    first = fitting[0]
    if other := next((found for found in fitting if found.cells != first.cells), None):
        raise DataError(
            f"'{first.file}' and '{other.file}' label the images in '{root}' differently",
            f"name one: --labels {first.file}",
        )
    return first


def read_label_file(
    file: Path, images: Sequence[Path], root: Path, columns: Columns, classes: ModelClasses
) -> FileCells:
    """What a file says of each image: its class as text, or the cells of its labels or values.

    It is text with a line per image (name and class, or the class alone, in the order of the file names), CSV, TSV,
    JSON (an object, or a list of them) or JSON lines. Images, in the folder `root` and sorted, are named by path, name,
    or name less ending; `columns` are those of images and targets.

    Raises:
        DataError: it cannot be read, does not name the images, or does not say which column is the target.
    """
    try:
        table = _read(file, classes.kind)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _NotOfThese(f"the labels '{file}' cannot be read: {reason}", "text, CSV, JSON or JSON lines") from error
    widths = {len(row) for row in table.rows}
    if widths == {1} and columns == (None, None):
        return FileCells(file, ("",), _in_order(file, [row[0] for row in table.rows], images, root))
    table = _Table([row for row in table.rows if len(row) > 1], table.header)
    names = _ByName(images, root)
    image = _image_column(file, table, names, columns[0], root)
    rows = [(row, places) for row in table.rows if len(row) > image and (places := names.places(row[image]))]
    if classes.kind in ("labels", "values"):
        # What names an image is no name of a column.
        header = [] if any(row is table.rows[0] for row, _ in rows) else table.header or []
        targets = _columns_of_outputs(file, header, [row for row, _ in rows], image, columns[1], classes)
    else:
        targets = [_label_column(file, table, image, columns[1])]
    found: list[tuple[Any, ...] | None] = [None] * len(images)
    for row, places in rows:
        cells = tuple(row[target] if target < len(row) else None for target in targets)
        if classes.kind in ("class", "group"):
            if cells[0] in (None, ""):
                continue
            cells = (_one_class(cells[0], file, row[image]),)
        if len(places) > 1:
            raise DataError(f"'{file}' names '{row[image]}', and {len(places)} images in '{root}' are called so")
        if found[places[0]] not in (None, cells):
            what = "classes" if classes.kind in ("class", "group") else classes.kind
            both = " and ".join(", ".join(map(str, each)) for each in (found[places[0]] or (), cells))
            raise DataError(f"'{file}' gives '{row[image]}' two {what}: {both}")
        found[places[0]] = cells
    return FileCells(file, tuple(table.header[c] if table.header else "" for c in targets), found)


class _ByName:
    """Images by what a file may call them."""

    def __init__(self, images: Sequence[Path], root: Path) -> None:
        self._root = root.absolute()
        self._places: list[dict[str, list[int]]] = [{}, {}, {}]
        for place, path in enumerate(images):
            keys = (path.relative_to(root).as_posix(), path.name, path.stem)
            for places, key in zip(self._places, keys, strict=True):
                places.setdefault(key, []).append(place)

    def places(self, name: Any) -> list[int]:
        """Of the images of that name; it may have folders in front that are not below `root`."""
        path = str(name).replace("\\", "/").removeprefix("./")
        if "/" in path and path not in self._places[0] and (file := self._root.parent / path).is_file():
            if not file.is_relative_to(self._root):
                return []  # of another part of the data
            path = file.relative_to(self._root).as_posix()
        keys = (path, path.rpartition("/")[2], path.rpartition("/")[2])
        return next((hits for places, key in zip(self._places, keys, strict=True) if (hits := places.get(key))), [])


def _in_order(file: Path, labels: list[Any], images: Sequence[Path], root: Path) -> list[tuple[Any, ...] | None]:
    names = {image.name for image in images}
    if len(labels) != len(images) or any(isinstance(label, str) and label in names for label in labels):
        raise _NotOfThese(
            f"'{file}' has {len(labels)} lines of one class each, and '{root}' has {len(images)} images",
            "one line an image in the order of their names, or lines with name and class",
        )
    paths = [image.relative_to(root).as_posix() for image in images]
    if (natural := sorted(paths, key=natural_key)) != paths:
        place = next(i for i, pair in enumerate(zip(natural, paths, strict=True)) if pair[0] != pair[1])
        raise DataError(
            f"the lines of '{file}' name no images, whose order is not known: is '{natural[place]}' or "
            f"'{paths[place]}' number {place + 1}?",
            "give lines with name and class",
        )
    return [(label,) for label in labels]


def _read(file: Path, kind: TargetKind) -> _Table:
    text, ending = file.read_text(encoding="utf-8-sig"), file.suffix.lower()
    if ending in (".json", ".jsonl"):
        content = [json.loads(line) for line in text.splitlines() if line.strip()] if ending == ".jsonl" else None
        return _objects(json.loads(text) if content is None else content)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("it is empty")
    if ending == ".txt" and not any(mark in lines[0] for mark in _MARKS):
        if kind == "values":
            return _Table([line.split() for line in lines], None)
        # A name may hold blanks if one class follows it; if several labels do, it cannot.
        parted = [line.split(maxsplit=1) if kind == "labels" else line.rsplit(maxsplit=1) for line in lines]
        if kind == "labels" and any(len(row) > 1 for row in parted):
            parted = [row if len(row) > 1 else [*row, ""] for row in parted]  # a name alone has no labels
        return _Table(parted, None)
    # Between several labels there may be more of another mark than between columns.
    first = min((mark for mark in _MARKS if mark in lines[0]), key=lines[0].index, default=",")
    mark = first if kind == "labels" else max(_MARKS, key=lines[0].count)
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=mark) if row]
    return _Table(rows, rows[0])


def _objects(content: Any) -> _Table:
    if isinstance(content, dict):
        return _Table([[str(name), target] for name, target in content.items()], None)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("it is no list of objects, nor one of names and classes")
    header = list(dict.fromkeys(str(key) for row in content for key in row))
    return _Table([header, *([row.get(key) for key in header] for row in content)], header)


def _one_class(value: Any, file: Path, image: str) -> str:
    """A class as text; ImageNet's solutions give it again with each box around an object."""
    if isinstance(value, dict):
        raise DataError(
            f"'{file}' gives '{image}' an object where its class is expected", "name it: --target-key COLUMN"
        )
    if isinstance(value, list):
        raise OtherTask(f"an image has one class, and here is a list: '{file}' gives '{image}' {value}", FOR_LABELS)
    text = str(value)
    ids = dict.fromkeys(_WORDNET_ID.findall(text))
    if len(ids) > 1:
        raise DataError(f"'{file}' gives '{image}' several classes: {', '.join(ids)}")
    return next(iter(ids)) if ids and " " in text else text


def _image_column(file: Path, table: _Table, names: _ByName, given: str | None, root: Path) -> int:
    if given is not None:
        header = table.header or []
        check_column(given, header, str(file))
        return header.index(given)
    width = max((len(row) for row in table.rows), default=0)
    hits = [sum(bool(names.places(row[column])) for row in table.rows if len(row) > column) for column in range(width)]
    if not any(hits):
        some = f", such as '{table.rows[1][0]}'" if len(table.rows) > 1 else ""
        raise _NotOfThese(
            f"no column of '{file}' names the images in '{root}'{some}",
            "they are named by their path below it, their name, or their name less its ending",
        )
    # As datasets calls it; numbers in another column may be names of images too.
    usual = table.header.index(_IMAGE_COLUMN) if table.header and _IMAGE_COLUMN in table.header else 0
    return usual if hits[usual] else hits.index(max(hits))


def _label_column(file: Path, table: _Table, image: int, given: str | None) -> int:
    if given is not None:
        header = table.header or []
        return header.index(class_column(given, header, str(file)))
    width = max(len(row) for row in table.rows)
    others = [column for column in range(width) if column != image]
    if len(others) == 1 or table.header is None or file.suffix.lower() == ".txt":
        return others[0]
    usual = [c for c in others if c < len(table.header) and table.header[c].lower() in _LABEL_COLUMNS]
    if len(usual) != 1:
        choices = ", ".join(table.header[c] for c in usual or others if c < len(table.header))
        raise DataError(f"which column of '{file}' is the class? {choices}", "name it: --target-key COLUMN")
    return usual[0]


def _columns_of_outputs(
    file: Path, header: list[str], rows: list[list[Any]], image: int, given: str | None, classes: ModelClasses
) -> list[int]:
    """The columns of labels or values; `rows` are those of the images."""
    if given is not None:
        return [header.index(name) for name in named_columns(given, header, str(file))]
    others = [column for column in range(max(map(len, rows))) if column != image]
    if len(others) == 1 or (classes.kind == "values" and not header and len(others) == classes.num_classes):
        return others
    if not header:
        raise DataError(
            f"'{file}' has {len(others)} columns without names beside the images', and the model gives "
            f"{classes.num_classes} {classes.kind}",
            "give it a first line with names, and name those that count: --target-key COLUMN,COLUMN",
        )
    cells = {header[c]: [row[c] if c < len(row) else None for row in rows] for c in others if c < len(header)}
    return [header.index(find_target(cells, classes, str(file)))]
