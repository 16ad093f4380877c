"""Which columns of a table or a file say what its images show, and how their cells are meant."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any

from vitprune.data.classes import Matched, ModelClasses, match_classes, model_index, refuse_order
from vitprune.data.imagenet import find_spelling
from vitprune.data.targets import (
    FOR_CLASSES,
    FOR_LABELS,
    FOR_VALUES,
    Flags,
    LabelList,
    Numbers,
    OtherTask,
    Understood,
    as_flag,
    as_number,
    split_labels,
    unpacked,
)
from vitprune.errors import DataError

_OF_LABELS = ("label", "labels", "tag", "tags", "class", "classes", "category", "categories", "attributes", "targets")
_OF_VALUES = ("target", "targets", "value", "values")
_MARKS = ("|", ";", ",", " ")


def check_column(name: str, known: Collection[str], source: str) -> None:
    """Refuse the name of a column that is not there.

    Raises:
        DataError: names those that are.
    """
    if name not in known:
        raise DataError(f"'{source}' has no column '{name}'", f"its columns are {', '.join(known) or 'not named'}")


def named_columns(given: str, known: Collection[str], source: str) -> list[str]:
    """The columns that --target-key names, each once: the one of that name, or those between its commas.

    Raises:
        DataError: there is none of a name.
    """
    parts = [given] if given in known else [part.strip() for part in given.split(",")]
    for part in parts:
        check_column(part, known, source)
        if parts.count(part) > 1:
            raise DataError(f"--target-key names column '{part}' twice", "name each once")
    return parts


def class_column(given: str, known: Collection[str], source: str) -> str:
    """The column that --target-key names where an image has one class.

    Raises:
        DataError: there is none of that name.
        OtherTask: several are named.
    """
    columns = named_columns(given, known, source)
    if len(columns) > 1:
        raise OtherTask(
            f"the class is in one column of '{source}', and --target-key names {len(columns)}",
            f"name one, or {FOR_LABELS}; {FOR_VALUES}",
        )
    return columns[0]


def find_target(columns: Mapping[str, Sequence[Any]], classes: ModelClasses, source: str) -> str:
    """The column with the labels or the values.

    That is the only one, or the only one that may be: of labels one that is called so, or holds lists; of values the
    only one of numbers, or the one of numbers that is called target or value. `columns` are cells by name.

    Raises:
        DataError: several may be meant, or none.
    """
    if len(columns) == 1:
        return next(iter(columns))
    cells = {name: [unpacked(cell) for cell in column if cell is not None] for name, column in columns.items()}
    lists = [name for name in cells if cells[name] and all(isinstance(cell, (list, tuple)) for cell in cells[name])]
    if classes.kind == "labels":
        may_be = lists
        texts = [name for name in cells if any(isinstance(cell, str) for cell in cells[name])]
        found = [name for name in [*lists, *texts] if name.lower() in _OF_LABELS] or may_be
    else:
        numbers = [name for name in cells if any(as_number(cell) is not None for cell in cells[name])]
        may_be = lists if classes.num_classes > 1 else numbers
        found = may_be if len(may_be) == 1 else [name for name in may_be if name.lower() in _OF_VALUES]
    if len(found) == 1:
        return found[0]
    hint = "name it: --target-key COLUMN"
    if classes.num_classes > 1:
        in_order = "in the order of the outputs: --target-key COLUMN,COLUMN"
        each = "name them" if classes.kind == "values" else f"{hint}; or those with a 0 or 1 for each label"
        hint = f"{each} {in_order}"
    raise DataError(
        f"which column of '{source}' holds the {classes.kind}? {', '.join(found or may_be or columns)}", hint
    )


def understand(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], classes: ModelClasses, source: str, *, whole: bool = True
) -> Understood:
    """How the cells of columns, whose names may be empty, are meant as labels or values.

    If the rows are the `whole`, no other label can follow.

    Raises:
        DataError: they do not fit the model, or can be read in two ways.
    """
    several = len(columns) > 1
    called = f"column{'s' if several else ''} " + ", ".join(f"'{name}'" for name in columns)
    where = f"{called} of '{source}'" if columns[0] else f"'{source}'"
    if classes.kind == "values":
        if several and len(columns) != classes.num_classes:
            raise DataError(
                f"the model gives {classes.num_classes} value(s), and --target-key names {len(columns)} columns: "
                f"{', '.join(columns)}",
                "name one column for each output, in their order",
            )
        return Understood(Numbers(classes.num_classes, tuple(columns)), called if columns[0] else where)
    if several:
        found = _flag_columns(columns, classes, source)
    else:
        found = _one_column([row[0] for row in rows], classes, source, where, whole)
    if isinstance(found.reading, Flags):
        refuse_order(classes, f"{where} has a 0 or 1 for each of the labels")
    how = f"{classes.num_classes} {found.how} {called if columns[0] else where}"
    return Understood(found.reading, how, found.names)


def match_labels(values: Sequence[str], classes: ModelClasses, source: str) -> Matched:
    """The model's output index of each class or label that text gives; numbers are output indices.

    Raises:
        DataError: they do not fit the model.
    """
    if not all(value.isascii() and value.isdigit() for value in values) or {*values} & {*(classes.names or ())}:
        return match_classes(values, classes, source)
    refuse_order(classes, f"the classes in '{source}' are numbers")
    index = {value: int(value) for value in values}
    if (highest := max(index.values(), default=0)) >= classes.num_classes:
        raise DataError(
            f"the classes in '{source}' are numbers up to {highest}, and the model's outputs are 0 to "
            f"{classes.num_classes - 1}",
            "count from 0 in the model's order, or give names; the numbers of ImageNet's development kit have an order "
            "of their own: give WordNet ids",
        )
    return Matched(index, "by number")


def match_one_class(
    values: Sequence[str], classes: ModelClasses, source: str, match: Callable[..., Matched] = match_labels
) -> Matched:
    """As `match`, of images that have one class each.

    Raises:
        OtherTask: they are labels between marks, or numbers that are no indices.
        DataError: they do not fit the model.
    """
    try:
        return match(values, classes, source)
    except DataError as error:
        odd = [value for value in values if not value.isdigit()]
        if odd and all(as_number(value) is not None for value in values):
            what = f"'{source}' has numbers where classes are expected, such as {odd[0]}"
            raise OtherTask(what, FOR_VALUES) from error
        for mark in _MARKS:
            with suppress(DataError):
                pieces = {*chain(*(split_labels(value, mark) for value in values))}
                if not match(sorted(pieces), classes, source).by_order:
                    some = next((value for value in values if len(split_labels(value, mark)) > 1), values[0])
                    break
        else:
            raise
        raise OtherTask(f"'{source}' has several labels an image, such as '{some}'", FOR_LABELS) from error


def _flag_columns(columns: Sequence[str], classes: ModelClasses, source: str) -> Understood:
    """Columns of 0 and 1, by name where the model's labels have names."""
    if len(columns) != classes.num_classes:
        raise DataError(
            f"the model has {classes.num_classes} labels, and --target-key names {len(columns)} columns: "
            f"{', '.join(columns)}",
            "name one column of 0 and 1 for each label, or one column with all labels of an image",
        )
    if classes.names or find_spelling(columns, classes.num_classes, source):
        matched = match_classes(columns, classes, source)
        order, how = tuple(matched.index[name] for name in columns), "by name from"
    else:
        order, how = tuple(range(len(columns))), "in the order of"
    return Understood(Flags(order), how, dict(zip(order, columns, strict=True)))


def _one_column(cells: Sequence[Any], classes: ModelClasses, source: str, where: str, whole: bool) -> Understood:
    cells = [unpacked(cell) for cell in cells if cell is not None]
    lists = [cell for cell in cells if isinstance(cell, (list, tuple))]
    if lists and len(lists) == len(cells) - cells.count(""):  # a blank cell beside them has no labels
        return _lists(lists, classes, source, where, whole)
    if classes.num_classes == 1 and cells and all(as_flag(cell) is not None for cell in cells):
        return Understood(Flags((0,)), "as 0 or 1 in")
    if odd := [cell for cell in cells if not isinstance(cell, str)]:
        raise OtherTask(
            f"{where} has {odd[0]!r}, expected all labels of an image: a list, or text",
            f"name the column of the labels, or one of 0 and 1 for each, --target-key COLUMN,COLUMN; {FOR_CLASSES}; "
            f"{FOR_VALUES}",
        )
    return _texts(cells, classes, source, where, whole)


def _lists(cells: Sequence[Any], classes: ModelClasses, source: str, where: str, whole: bool) -> Understood:
    num = classes.num_classes
    if odd := [each for each in chain(*cells) if not isinstance(each, (str, int, float))]:
        raise DataError(f"{where} has {odd[0]!r} for a label, expected a name or a number", "give a list of those")
    labels = {*chain(*cells)}
    flags = _are_flags(cells, num)
    if labels and all(isinstance(label, str) for label in labels):
        matched = _match(sorted(labels), classes, source, whole)
        _refuse_flags_in_text(cells, matched, num, where)
        return Understood(LabelList(matched.index, num), f"{matched.how}, from", matched.names)
    indices = all(type(label) is int for label in labels)
    if flags and indices and all(len({*cell}) == len(cell) and max(cell) < num for cell in cells):
        raise DataError(
            f"{where} has lists such as {cells[0]}, which may be labels or a 0 or 1 for each label",
            "give names, truth values, or a column of 0 and 1 for each label",
        )
    if flags or not indices:
        return Understood(Flags(tuple(range(num))), "as 0 or 1 in")
    refuse_order(classes, f"the labels in {where} are numbers")
    if wrong := [label for label in labels if not 0 <= label < num]:
        raise DataError(
            f"{where} has label {max(wrong)}, and the model's outputs are 0 to {num - 1}",
            "count from 0 in the model's order, or give names",
        )
    return Understood(LabelList({i: i for i in range(num)}, num), "by number, from")


def _texts(cells: Sequence[str], classes: ModelClasses, source: str, where: str, whole: bool) -> Understood:
    """Split at the one mark, or none, with which every piece is a label of the model."""
    cells = list(dict.fromkeys(cells))
    ways: dict[tuple[frozenset[int], ...], tuple[str | None, Matched]] = {}
    errors: dict[str | None, DataError] = {}
    for mark in (None, *_MARKS):
        pieces = [split_labels(cell, mark) for cell in cells]
        try:
            matched = _match(sorted({*chain(*pieces)}), classes, source, whole)
        except DataError as error:
            errors[mark] = error
            continue
        ways.setdefault(tuple(frozenset(matched.index[each] for each in cell) for cell in pieces), (mark, matched))
    present = [mark for mark in _MARKS if any(mark in cell.strip() for cell in cells)]
    if not ways:
        raise errors[present[0] if present else None]
    if len(ways) > 1:
        marks = " or ".join({None: "nothing", " ": "blanks"}.get(mark, f"'{mark}'") for mark, _ in ways.values())
        raise DataError(
            f"the labels in {where} may be split at {marks}, and either gives labels of the model",
            "give lists, as JSON has them, or a column of 0 and 1 for each label",
        )
    ((mark, matched),) = ways.values()
    _refuse_flags_in_text([split_labels(cell, mark) for cell in cells], matched, classes.num_classes, where)
    return Understood(LabelList(matched.index, classes.num_classes, mark), f"{matched.how}, from", matched.names)


def _are_flags(cells: Sequence[Sequence[Any]], num_labels: int) -> bool:
    """Whether lists may be a 0 or 1 for each label."""
    return all(len(cell) == num_labels and all(as_flag(each) is not None for each in cell) for cell in cells)


def _refuse_flags_in_text(cells: Sequence[Sequence[str]], matched: Matched, num_labels: int, where: str) -> None:
    if cells and matched.how == "by number" and _are_flags(cells, num_labels):
        raise DataError(
            f"{where} has {' '.join(cells[0])}, which may be labels or a 0 or 1 for each label",
            "give a list of numbers, [0, 1, 1], or a column of 0 and 1 for each label",
        )


def _match(labels: Sequence[str], classes: ModelClasses, source: str, whole: bool) -> Matched:
    """As `match_labels`; where not all labels are known, of all that the model has."""
    matched = match_labels(labels, classes, source)
    if whole:
        return matched
    if matched.by_order:
        raise DataError(
            f"'{source}' names its labels, but those of the model have no names",
            "--class-map FILE with the names in output order, or numbered labels",
        )
    numbers = {str(i): i for i in range(classes.num_classes)} if matched.how == "by number" else None
    return replace(matched, index=numbers or model_index(classes) or {})
