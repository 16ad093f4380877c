"""What an image should make the model say, read from the cells of its row: a class, several labels, or numbers."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitprune.data.classes import TargetKind, shown
from vitprune.errors import DataError

Target = int | Tensor
"""A class, a group or UNLABELLED; or float32 (outputs,): 0 and 1 of labels, or values."""

UNLABELLED = -1

Reading = Callable[[Sequence[Any], str], Target]
"""The target in the cells of a row; errors call the row by the second argument. A DataError where there is none."""

FOR_CLASSES = "--task classification, if an image is of one class"
FOR_LABELS = "--task multilabel, if an image has several labels"
FOR_VALUES = "--task regression, if the model's outputs are numbers"


class OtherTask(DataError):
    """Targets as a model of another task has them."""


@dataclass(frozen=True)
class OneClass:
    """One cell with a class or a group; `index` is its output index, or the group's number, by value of the cell."""

    index: Mapping[Any, int]

    def __call__(self, cells: Sequence[Any], row: str) -> int:
        """The index of the class."""
        (value,) = cells
        if isinstance(value, (list, tuple)):
            raise OtherTask(f"{row} has several labels, {_brief(value)}, and an image has one class", FOR_LABELS)
        if isinstance(value, Hashable) and value in self.index:
            return self.index[value]
        if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
            raise OtherTask(f"{row} has the number {value:g} where a class is expected", FOR_VALUES)
        raise DataError(f"{row} has class {value!r}, which is none of the model's{shown(self.index)}")


@dataclass(frozen=True)
class NumberedGroup:
    """One cell with the number of a group, of data that cannot be gone through beforehand."""

    def __call__(self, cells: Sequence[Any], row: str) -> int:
        """The number; UNLABELLED where there is none."""
        (value,) = cells
        if value is None:
            return UNLABELLED
        if isinstance(value, int) and value >= 0:
            return int(value)
        raise DataError(f"{row} has group {value!r}, expected a number from 0", "train without labels: --no-labels")


@dataclass(frozen=True)
class LabelList:
    """One cell with the labels that an image has, with their output indices: a list, or text with marks between.

    A mark of a space is any blank; None if the text is one label.
    """

    index: Mapping[Any, int]
    num_labels: int
    mark: str | None = None

    def __call__(self, cells: Sequence[Any], row: str) -> Tensor:
        """1 for each label that the image has, of (num_labels,); a blank cell has none."""
        cell = unpacked(cells[0])
        labels = split_labels(cell, self.mark) if isinstance(cell, str) else cell
        if not isinstance(labels, (list, tuple)):
            raise DataError(f"{row} has {cell!r} where its labels are expected", "a list, or a blank cell for none")
        target = torch.zeros(self.num_labels)
        for label in labels:
            if not isinstance(label, Hashable) or label not in self.index:
                raise DataError(f"{row} has label {label!r}, which is none of the model's{shown(self.index)}")
            target[self.index[label]] = 1
        return target


@dataclass(frozen=True)
class Flags:
    """0 or 1 for each label of the model, whose output indices are `order`: a list of them, or a cell each."""

    order: tuple[int, ...]

    def __call__(self, cells: Sequence[Any], row: str) -> Tensor:
        """Them as (num_labels,)."""
        values = _one_list(cells)
        if len(values) != len(self.order):
            raise DataError(f"{row} has {len(values)} labels of 0 or 1, and the model has {len(self.order)}")
        target = torch.zeros(len(self.order))
        for place, value in zip(self.order, values, strict=True):
            if (flag := as_flag(value)) is None:
                raise DataError(f"{row} has {value!r} for a label, expected 0 or 1")
            target[place] = flag
        return target


@dataclass(frozen=True)
class Numbers:
    """A number for each of the model's outputs: a list of them, or a cell each, with the names of `columns` if any."""

    num_values: int
    columns: tuple[str, ...] = ()

    def __call__(self, cells: Sequence[Any], row: str) -> Tensor:
        """Them as (num_values,), all finite."""
        values = _one_list(cells)
        if len(values) != self.num_values:
            raise DataError(f"{row} has {len(values)} value(s), and the model gives {self.num_values}")
        numbers = [as_number(value) for value in values]
        for place, (value, number) in enumerate(zip(values, numbers, strict=True)):
            if number is None:
                column = self.columns[place if len(cells) > 1 else 0] if self.columns else ""
                where = f" in column '{column}'" if column else ""
                if value is None or value == "":
                    raise DataError(f"{row} has nothing{where}, expected a number", "complete it, or leave it out")
                raise DataError(
                    f"{row} has {value!r}{where}, expected a number",
                    f"correct it, name the column of the numbers, --target-key COLUMN, or {FOR_CLASSES}",
                )
        return torch.tensor(numbers, dtype=torch.float32)


@dataclass(frozen=True)
class Understood:
    """How the cells of a row are read, how that was understood, for people, and what the data calls the outputs.

    These names, of the model's outputs or of groups, are by index; empty where not known.
    """

    reading: Reading
    how: str
    names: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """One of a table, by name; where its cells are objects, `key` is the entry that is meant."""

    name: str
    key: str | None = None

    def cell(self, row: Mapping[str, Any]) -> Any:
        """Its cell of a row."""
        return row[self.name] if self.key is None else (row[self.name] or {}).get(self.key)


@dataclass(frozen=True)
class Targets:
    """How the target of a table's row is read from its columns, see `Understood`; without a reading there is none."""

    columns: tuple[Column, ...] = ()
    reading: Reading | None = None
    names: dict[int, str] = field(default_factory=dict)
    how: str = ""
    kind: TargetKind = "class"

    @property
    def index(self) -> Mapping[Any, int]:
        """The output index by value of a cell; empty where there are none."""
        return getattr(self.reading, "index", {})

    def of(self, row: Mapping[str, Any], name: str) -> Target:
        """The target of a row; errors call it `name`.

        Raises:
            DataError: it has none.
        """
        return UNLABELLED if self.reading is None else self.reading([each.cell(row) for each in self.columns], name)


def stacked(targets: Sequence[Target]) -> Sequence[int] | Tensor:
    """Labels or values of all images as one (images, outputs); classes as they are."""
    vectors = [target for target in targets if isinstance(target, Tensor)]
    return torch.stack(vectors) if vectors else [target for target in targets if isinstance(target, int)]


def split_labels(cell: str, mark: str | None) -> list[str]:
    """The labels in a text, with `mark` between them, a space for any blank; None if it is one label."""
    if mark == " ":
        return cell.split()
    return [label for part in ([cell] if mark is None else cell.split(mark)) if (label := part.strip())]


def unpacked(cell: Any) -> Any:
    """A list that is written as text, as JSON or Python writes one; anything else as it is."""
    if not isinstance(cell, str) or not (cell.startswith("[") and cell.endswith("]")):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        try:
            return ast.literal_eval(cell)
        except (ValueError, SyntaxError):
            return cell


def as_flag(value: Any) -> int | None:
    """0 or 1, as a number, truth value or text; None of anything else."""
    if isinstance(value, str):
        value = {"false": 0, "true": 1}.get(value.strip().lower(), as_number(value))
    return int(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def as_number(value: Any) -> float | None:
    """A number, or one that is written as text; None of what is none, or none that 32 bits can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or "_" in str(value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= torch.finfo(torch.float32).max else None


def _one_list(cells: Sequence[Any]) -> Sequence[Any]:
    """The values of a row: the list in its only cell, or the cells."""
    only = unpacked(cells[0]) if len(cells) == 1 else None
    return only if isinstance(only, (list, tuple)) else cells


def _brief(values: Sequence[Any]) -> str:
    text = str(list(values))
    return text if len(text) < 60 else f"{text[:56]} ...]"
