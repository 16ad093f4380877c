"""How the columns of a table of `datasets` say what its images show."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from vitprune.data.classes import Matched, ModelClasses, match_classes, model_index, named, refuse_order, shown
from vitprune.data.imagenet import find_spelling
from vitprune.data.target_columns import class_column, find_target, match_one_class, named_columns, understand
from vitprune.data.targets import (
    FOR_CLASSES,
    FOR_LABELS,
    FOR_VALUES,
    UNLABELLED,
    Column,
    Flags,
    LabelList,
    NumberedGroup,
    OneClass,
    OtherTask,
    Targets,
)
from vitprune.errors import DataError

_LABEL_NAMES = ("label", "labels", "cls", "class", "target", "fine_label")
_NO_TARGETS = ("json", "__key__", "__url__")
_FIRST_ROWS = 100
"""By so many of a stream it is understood; each row is checked as it comes."""


def table_targets(
    table: Any, features: Mapping[str, Any], image: str, classes: ModelClasses | None, given: str | None, source: str
) -> Targets:
    """How to read the targets of a table, whose images are not decoded; without classes there are none.

    `features` are those of its columns; of a stream without any, its first row. `image` is the column of the images,
    `given` what --target-key names, and errors call the data `source`.

    Raises:
        DataError: there is no such column, several may be meant, or its targets do not fit the model.
    """
    if classes is None:
        return Targets()
    columns = {name: (Column(name), kind) for name, kind in features.items()}
    if isinstance(features.get("json"), Mapping):  # a tar file's entries of that ending
        columns |= {key: (Column("json", key), kind) for key, kind in features["json"].items() if key not in columns}
    if classes.kind in ("labels", "values"):
        return _outputs(table, columns, image, classes, given, source)
    name = _class_column(columns, given, source)
    if name is None and classes.kind == "class":
        raise DataError(
            f"'{source}' has no column of class labels",
            f"its columns are {', '.join(columns)}; name one with --target-key or train without: --no-labels",
        )
    several = name is not None and _items(columns[name][1]) is not None
    if name is None or (classes.kind == "group" and given is None and several):
        return Targets(kind="group")
    if several:
        raise OtherTask(
            f"column '{name}' of '{source}' has several labels an image",
            f"{FOR_LABELS}; or name the column of the classes: --target-key COLUMN",
        )
    read = _classes if classes.kind == "class" else _groups
    return read(table, name, *columns[name], classes, source)


def with_floats(table: Any, features: Mapping[str, Any]) -> Any:
    """A stream whose JSON has no whole numbers: of what begins with some, datasets would round all that follow."""
    if not isinstance(features.get("json"), Mapping):
        return table
    return table.cast_column("json", {key: _as_float(kind) for key, kind in features["json"].items()})


def _as_float(kind: Any) -> Any:
    from datasets import List, Value

    if _items(kind) is not None:
        return List(_as_float(_items(kind)))
    return Value("float64") if "int" in str(getattr(kind, "dtype", "")) else kind


def read_all(table: Any, targets: Targets, source: str) -> list[Any]:
    """The targets of all rows.

    Raises:
        DataError: one does not fit; names it.
    """
    reading = targets.reading
    if reading is None:
        return [UNLABELLED] * len(table)
    rows = _cells(table, targets.columns, source)
    return [reading(cells, f"row {number} of '{source}'") for number, cells in enumerate(rows)]


def _cells(table: Any, columns: Sequence[Column], source: str, most: int | None = None) -> list[list[Any]]:
    """Of all rows of a table; of the first ones of a stream, or at most so many."""
    if _is_stream(table):
        try:
            return [[column.cell(row) for column in columns] for row in table.take(most or _FIRST_ROWS)]
        except (OSError, EOFError, ValueError, TypeError, zlib.error, tarfile.TarError) as error:
            raise DataError(f"the first rows of '{source}' cannot be read: {error}", "correct them") from error
    cells = table.select_columns(list(dict.fromkeys(column.name for column in columns)))[:most]
    by_column = ([column.cell({column.name: cell}) for cell in cells[column.name]] for column in columns)
    return [list(row) for row in zip(*by_column, strict=True)]


def _is_stream(table: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(table, IterableDataset)


def _items(kind: Any) -> Any:
    """The kind of the items of a column of lists, None of another column; of a stream without a schema by a cell."""
    if isinstance(kind, (list, tuple)):
        return kind[0] if kind else 0
    return getattr(kind, "feature", None)


def _is_text(kind: Any) -> bool:
    return str(getattr(kind, "dtype", "string" if isinstance(kind, str) else "int64")) in ("string", "large_string")


def _class_column(columns: Mapping[str, tuple[Column, Any]], given: str | None, source: str) -> str | None:
    from datasets import ClassLabel

    if given is not None:
        return class_column(given, columns, source)
    for key in (False, True):  # entries of tar files' JSON last
        here = {name: kind for name, (column, kind) in columns.items() if (column.key is not None) == key}
        kinds = [name for name, kind in here.items() if isinstance(kind, ClassLabel)]
        if found := [*kinds, *(name for name in _LABEL_NAMES if name in here)]:
            return found[0]
    return None


def _classes(table: Any, name: str, column: Column, kind: Any, classes: ModelClasses, source: str) -> Targets:
    from datasets import ClassLabel

    if isinstance(kind, ClassLabel):
        found = numbered(kind.names, classes, source)
        indices = [found.index[each] for each in kind.names]
        names = dict(zip(indices, kind.names, strict=True))
        return Targets((column,), OneClass(dict(enumerate(indices))), names, found.how)
    if _is_text(kind):
        if _is_stream(table):
            found = Matched(model_index(classes) or {}, "by name")
        else:
            values = [value for value in table.unique(column.name) if value is not None]
            found = match_one_class(values, classes, source, match_classes)
        if not found.index:
            raise DataError(
                f"'{source}' names its classes, but those of the model have no names", "use data with numbered classes"
            )
        known = not _is_stream(table) or named(classes)
        names = {index: each for each, index in found.index.items() if known}
        return Targets((column,), OneClass(found.index), names, found.how)
    refuse_order(classes, f"column '{name}' of '{source}' numbers the classes")
    numbers = {index: index for index in range(classes.num_classes)}
    return Targets((column,), OneClass(numbers), how=f"by the numbers in column '{name}'")


def numbered(names: Sequence[str], classes: ModelClasses, source: str) -> Matched:
    """The classes of a column of numbered classes with names, which have an order of their own.

    Raises:
        DataError: they do not fit the model.
    """
    if named(classes):
        return match_classes(names, classes, source)
    if found := find_spelling(names, classes.num_classes, source, in_order=True):
        return Matched(found[0], f"ImageNet's, {found[1]}")
    if len(names) == classes.num_classes and not set(names) <= set(classes.names or ()):
        return Matched(
            {name: i for i, name in enumerate(names)}, f"in the order that the data gives them{shown(names)}"
        )
    return match_classes(names, classes, source)


def _groups(table: Any, name: str, column: Column, kind: Any, classes: ModelClasses, source: str) -> Targets:
    from datasets import ClassLabel

    how = f"from column '{name}'"
    if isinstance(kind, ClassLabel):
        # datasets marks what has no class by -1.
        index = {i: i for i in range(len(kind.names))} | {-1: UNLABELLED, None: UNLABELLED}
        return Targets((column,), OneClass(index), dict(enumerate(kind.names)), how, "group")
    if _is_stream(table):
        if _is_text(kind):
            raise DataError(
                f"column '{name}' of '{source}' names groups, whose number is not known before all was read",
                "leave out --streaming, number the groups, or train without labels: --no-labels",
            )
        return Targets((column,), NumberedGroup(), how=how, kind="group")
    values = sorted((value for value in table.unique(column.name) if value is not None), key=str)
    if odd := [value for value in values if isinstance(value, float) and not value.is_integer()]:
        raise OtherTask(f"column '{name}' of '{source}' has numbers such as {odd[0]:g}, not groups", FOR_VALUES)
    index = {value: i for i, value in enumerate(values)} | {None: UNLABELLED}
    return Targets((column,), OneClass(index), dict(enumerate(map(str, values))), how, "group")


def _outputs(
    table: Any,
    columns: Mapping[str, tuple[Column, Any]],
    image: str,
    classes: ModelClasses,
    given: str | None,
    source: str,
) -> Targets:
    """Labels or values."""
    from datasets import ClassLabel

    names = [_find(table, columns, image, classes, source)] if given is None else named_columns(given, columns, source)
    chosen = tuple(columns[name][0] for name in names)
    kind, num = columns[names[0]][1], classes.num_classes
    if isinstance(kind, ClassLabel) and (classes.kind == "values" or (len(names) == 1 and num > 1)):
        raise OtherTask(
            f"column '{names[0]}' of '{source}' has one class an image, and the model gives {num} {classes.kind}",
            f"name another column, --target-key COLUMN; {FOR_CLASSES}",
        )
    if classes.kind == "labels" and len(names) == 1:
        items = _items(kind)
        if isinstance(items, ClassLabel):
            matched = numbered(items.names, classes, source)
            index = {i: matched.index[each] for i, each in enumerate(items.names)}
            how = f"{num} {matched.how}, from column '{names[0]}'"
            return Targets(chosen, LabelList(index, num), {i: n for n, i in matched.index.items()}, how, "labels")
        if items is not None and getattr(kind, "length", -1) == num and not _is_text(items):
            refuse_order(classes, f"column '{names[0]}' of '{source}' has a 0 or 1 for each of the labels")
            how = f"{num} as 0 or 1 in column '{names[0]}'"
            return Targets(chosen, Flags(tuple(range(num))), how=how, kind="labels")
    found = understand(names, _cells(table, chosen, source), classes, source, whole=not _is_stream(table))
    return Targets(chosen, found.reading, found.names, found.how, classes.kind)


def _find(table: Any, columns: Mapping[str, tuple[Column, Any]], image: str, classes: ModelClasses, source: str) -> str:
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    others = {n: each for n, each in columns.items() if n != image and n not in _NO_TARGETS}
    others = {n: each for n, each in others.items() if not isinstance(each[1], (ImageFeature, bytes))}
    of_classes = [name for name, (_, kind) in others.items() if isinstance(kind, ClassLabel)]
    may_be = [name for name in others if name not in of_classes] or of_classes
    if not may_be:
        raise DataError(
            f"'{source}' has no column of {classes.kind}, only {', '.join(columns)}",
            "use data that has one, or train without: --no-labels",
        )
    rows = _cells(table, [others[name][0] for name in may_be], source, _FIRST_ROWS)
    return find_target({name: [row[i] for row in rows] for i, name in enumerate(may_be)}, classes, source)
