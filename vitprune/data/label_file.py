"""Labels of loose images from a file: ImageNet's solution, val.txt, a synset list, metadata.csv, Kaggle's CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.utils import natural_key

from vitprune.data.classes import Matched, ModelClasses, match_classes, refuse_order
from vitprune.data.splits import SPLIT_WORDS, words
from vitprune.errors import DataError

_ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl")
_FILE_WORDS = {"labels", "label", "metadata", "annotations", "solution", "groundtruth"}
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classname", "category", "target", "predictionstring")
_WORDNET_ID = re.compile(r"\bn\d{8}\b")


@dataclass(frozen=True)
class _Table:
    """Rows of equal length, and the names of their columns where the file has them."""

    rows: list[list[str]]
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
    files: Sequence[Path], images: Sequence[Path], root: Path, columns: tuple[str | None, str | None]
) -> tuple[Path, list[str | None]] | None:
    """The one of `files` that labels `images`, and the class of each as it has it; None if none of them does.

    Raises:
        DataError: several do, and differ.
    """
    fitting: dict[Path, list[str | None]] = {}
    for file in files:
        with suppress(DataError):
            fitting[file] = read_label_file(file, images, root, columns)
    if not fitting:
        return None
    first, labels = next(iter(fitting.items()))
    if other := next((file for file, found in fitting.items() if found != labels), None):
        raise DataError(
            f"'{first}' and '{other}' label the images in '{root}' differently", f"name one: --labels {first}"
        )
    return first, labels


def read_label_file(
    file: Path, images: Sequence[Path], root: Path, columns: tuple[str | None, str | None] = (None, None)
) -> list[str | None]:
    """The class of each image as the file has it; None of images that it does not name.

    Args:
        file: text with a line per image (name and class, or the class alone, in the order of the file names), CSV, TSV,
            JSON (an object, or a list of them) or JSON lines. Images are named by path, name, or name less ending.
        images: sorted.
        root: the folder they are in.
        columns: names of the columns with the images and the classes; None to find them.

    Raises:
        DataError: it cannot be read, does not name the images, or does not say which column is the class.
    """
    try:
        table = _read(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the labels '{file}' cannot be read: {reason}", "text, CSV, JSON or JSON lines") from error
    widths = {len(row) for row in table.rows}
    if widths == {1} and columns == (None, None):
        return _in_order(file, [row[0] for row in table.rows], images, root)
    table = _Table([row for row in table.rows if len(row) > 1], table.header)
    names = _ByName(images, root)
    image = _image_column(file, table, names, columns[0], root)
    label = _label_column(file, table, image, columns[1])
    found: list[str | None] = [None] * len(images)
    for row in table.rows:
        if len(row) <= max(image, label) or not row[label] or not (places := names.places(row[image])):
            continue
        value = _one_class(row[label], file, row[image])
        if len(places) > 1:
            raise DataError(f"'{file}' names '{row[image]}', and {len(places)} images in '{root}' are called so")
        if found[places[0]] not in (None, value):
            raise DataError(f"'{file}' gives '{row[image]}' two classes: {found[places[0]]} and {value}")
        found[places[0]] = value
    return found


def match_labels(values: Sequence[str], classes: ModelClasses, file: Path) -> Matched:
    """The model's output index of each class that a file gives; numbers are output indices.

    Raises:
        DataError: they do not fit the model.
    """
    if not all(value.isascii() and value.isdigit() for value in values) or {*values} & {*(classes.names or ())}:
        return match_classes(values, classes, file.name)
    refuse_order(classes, f"the classes in '{file.name}' are numbers")
    index = {value: int(value) for value in values}
    if (highest := max(index.values(), default=0)) >= classes.num_classes:
        raise DataError(
            f"the classes in '{file}' are numbers up to {highest}, and the model's outputs are 0 to "
            f"{classes.num_classes - 1}",
            "count from 0 in the model's order, or give names; the numbers of ImageNet's development kit have an order "
            "of their own: give WordNet ids",
        )
    return Matched(index, "by number")


class _ByName:
    """Images by what a file may call them."""

    def __init__(self, images: Sequence[Path], root: Path) -> None:
        self._places: list[dict[str, list[int]]] = [{}, {}, {}]
        for place, path in enumerate(images):
            keys = (path.relative_to(root).as_posix(), path.name, path.stem)
            for places, key in zip(self._places, keys, strict=True):
                places.setdefault(key, []).append(place)

    def places(self, name: str) -> list[int]:
        """Of the images of that name; it may have folders in front that are not below `root`."""
        path = name.replace("\\", "/").removeprefix("./")
        keys = (path, path.rpartition("/")[2], path.rpartition("/")[2])
        return next((hits for places, key in zip(self._places, keys, strict=True) if (hits := places.get(key))), [])


def _in_order(file: Path, labels: list[str], images: Sequence[Path], root: Path) -> list[str | None]:
    if len(labels) != len(images) or {*labels} & {image.name for image in images}:
        raise DataError(
            f"'{file}' has {len(labels)} lines of one class each, and '{root}' has {len(images)} images",
            "one line an image in the order of their names, or lines with name and class",
        )
    names = [image.relative_to(root).as_posix() for image in images]
    if (natural := sorted(names, key=natural_key)) != names:
        place = next(i for i, pair in enumerate(zip(natural, names, strict=True)) if pair[0] != pair[1])
        raise DataError(
            f"the lines of '{file}' name no images, whose order is not known: is '{natural[place]}' or "
            f"'{names[place]}' number {place + 1}?",
            "give lines with name and class",
        )
    return list(labels)


def _read(file: Path) -> _Table:
    text, ending = file.read_text(encoding="utf-8-sig"), file.suffix.lower()
    if ending in (".json", ".jsonl"):
        content = [json.loads(line) for line in text.splitlines() if line.strip()] if ending == ".jsonl" else None
        return _objects(json.loads(text) if content is None else content)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("it is empty")
    if ending == ".txt" and not any(mark in lines[0] for mark in "\t,;"):
        return _Table([line.rsplit(maxsplit=1) for line in lines], None)
    mark = max("\t,;", key=lines[0].count)
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=mark) if row]
    return _Table(rows, rows[0])


def _objects(content: Any) -> _Table:
    if isinstance(content, dict):
        return _Table([[str(name), _text(label)] for name, label in content.items()], None)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("it is no list of objects, nor one of names and classes")
    header = list(dict.fromkeys(str(key) for row in content for key in row))
    return _Table([header, *([_text(row.get(key)) for key in header] for row in content)], header)


def _text(value: Any) -> str:
    if isinstance(value, (list, dict)):
        raise ValueError("an image has one class, and here is a list")
    return "" if value is None else str(value)


def _image_column(file: Path, table: _Table, names: _ByName, given: str | None, root: Path) -> int:
    if given is not None:
        return _named_column(file, table, given)
    width = max((len(row) for row in table.rows), default=0)
    hits = [sum(bool(names.places(row[column])) for row in table.rows if len(row) > column) for column in range(width)]
    if not any(hits):
        some = f", such as '{table.rows[1][0]}'" if len(table.rows) > 1 else ""
        raise DataError(
            f"no column of '{file}' names the images in '{root}'{some}",
            "they are named by their path below it, their name, or their name less its ending",
        )
    return hits.index(max(hits))


def _label_column(file: Path, table: _Table, image: int, given: str | None) -> int:
    if given is not None:
        return _named_column(file, table, given)
    width = max(len(row) for row in table.rows)
    others = [column for column in range(width) if column != image]
    if len(others) == 1 or table.header is None or file.suffix.lower() == ".txt":
        return others[0]
    usual = [c for c in others if c < len(table.header) and table.header[c].lower() in _LABEL_COLUMNS]
    if len(usual) != 1:
        choices = ", ".join(table.header[c] for c in usual or others if c < len(table.header))
        raise DataError(f"which column of '{file}' is the class? {choices}", "name it: --target-key COLUMN")
    return usual[0]


def _named_column(file: Path, table: _Table, name: str) -> int:
    if name not in (table.header or ()):
        raise DataError(
            f"'{file}' has no column '{name}'", f"its columns are {', '.join(table.header or ['not named'])}"
        )
    return (table.header or []).index(name)


def _one_class(value: str, file: Path, image: str) -> str:
    """ImageNet's solutions give the class again with each box around an object."""
    ids = dict.fromkeys(_WORDNET_ID.findall(value))
    if len(ids) > 1:
        raise DataError(f"'{file}' gives '{image}' several classes: {', '.join(ids)}")
    return next(iter(ids)) if ids and " " in value else value
