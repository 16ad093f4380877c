"""Match the class names of a data set to the output indices of a model."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from vitprune.data.imagenet import are_wordnet_ids, find_spelling, spellings, wordnet_ids
from vitprune.errors import DataError

ClassOrder = Literal["timm", "torchvision"]
TargetKind = Literal["class", "labels", "values", "group"]
"""What labels are: one class an image, any number of labels, numbers, or a class that only other images share."""


@dataclass(frozen=True)
class ModelClasses:
    """The classes a model predicts, with their names in output order where known.

    Attributes:
        num_classes: how many.
        names: of the classes, in output order; None where not known.
        order: how classes without names were sorted when the model was trained; None where not known.
        source: where the names come from, for people.
        kind: what the data should say of an image: "class", one of them; "labels", any number of them; "values", a
            number for each output; "group", which images are alike, whatever the model's outputs are.
    """

    num_classes: int
    names: tuple[str, ...] | None = None
    order: ClassOrder | None = None
    source: str = "the model"
    kind: TargetKind = "class"


@dataclass(frozen=True)
class Matched:
    """The classes of a data set as the model's: the output index of each by name, and how they were matched.

    `by_order` if their order alone says which is which.
    """

    index: dict[str, int]
    how: str
    by_order: bool = False

    @property
    def names(self) -> dict[int, str]:
        """What the data calls the model's outputs, less those that it numbers."""
        return {i: name for name, i in self.index.items() if name != str(i)}


def match_classes(data_names: Sequence[str], model: ModelClasses, source: str) -> Matched:
    """The model's output index of each class of the data.

    By name where the model knows its names; by any spelling of ImageNet's classes on its models, so that a part of
    ImageNet evaluates rightly on 1000 classes; else by order, if the counts agree and there is one order only: timm
    sorts numbers by value and without regard to case, torchvision and datasets character by character. Errors call
    the data `source`.

    Raises:
        DataError: the classes do not fit, or their order is not known; shows both sides.
    """
    names = sorted(data_names)
    if model.names and named(model):
        index = {_normal(name): i for i, name in enumerate(model.names)}
        if unknown := [name for name in names if _normal(name) not in index]:
            raise _misfit(names, unknown, model, source)
        return Matched({name: index[_normal(name)] for name in names}, f"by name, as {model.source} has them")
    if model.names and set(names) <= set(model.names):
        index = {name: i for i, name in enumerate(model.names)}
        return Matched({name: index[name] for name in names}, f"by WordNet id, as {model.source} has them")
    # What the user says of the order, or ids in another one than ImageNet's, contradict its numbers and names.
    usual = model.order is None and list(model.names or ()) in ([], wordnet_ids(model.num_classes))
    if usual and (found := find_spelling(names, model.num_classes, source)):
        return Matched(found[0], f"ImageNet's, {found[1]}")
    if len(names) != model.num_classes or model.names:
        raise _misfit(names, [], model, source)
    ordered, how = _in_order(names, model.order, source)
    return Matched({name: i for i, name in enumerate(ordered)}, how, by_order=True)


def _in_order(names: list[str], order: ClassOrder | None, source: str) -> tuple[list[str], str]:
    from timm.utils import natural_key

    sortings = {"timm": sorted(names, key=natural_key), "torchvision": names}
    if order is not None:
        return sortings[order], f"in {order}'s order: {_first(sortings[order])}"
    natural, plain = sortings.values()
    if natural == plain:
        return plain, f"in the order of their names: {_first(plain)}"
    place = next(i for i, (one, other) in enumerate(zip(natural, plain, strict=True)) if one != other)
    begin = slice(max(0, place - 1), place + 2)
    raise DataError(
        f"the order of the {len(names)} classes of '{source}' is not known: timm sorts them "
        f"{', '.join(natural[begin])}, torchvision {', '.join(plain[begin])}, and the model does not name its classes",
        "--class-order timm or --class-order torchvision, as the weights were trained, or --class-map FILE with the "
        "names in output order",
        exit_code=2,
    )


def read_class_map(path: Path, num_classes: int) -> tuple[str, ...]:
    """Names of the classes in output order, from text (a line each), JSON (a list, or names and indices), or CSV.

    Raises:
        DataError: the file is missing, or does not name each of the classes once.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = _listed(path.suffix.lower(), text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"the class map '{path}' cannot be read: {reason}", "text, JSON or CSV with the names in output order"
        ) from error
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise DataError(
            f"the class map '{path}' names {len(set(names))} classes, but the model has {num_classes}",
            "one name for each output of the model, in their order",
        )
    return tuple(names)


def _listed(suffix: str, text: str) -> list[str]:
    if suffix == ".json":
        content = json.loads(text)
        if isinstance(content, list):
            return [str(name) for name in content]
        return _by_index([(str(key), str(value)) for key, value in dict(content).items()])
    if suffix == ".csv":
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
        pairs = [(row[0], row[1]) for row in rows if len(row) > 1]
        if len(pairs) != len(rows):
            return [row[0] for row in rows]
        return _by_index([pair for pair in pairs if any(cell.isdigit() for cell in pair)])  # less a header
    return [line.strip() for line in text.splitlines() if line.strip()]


def _by_index(pairs: list[tuple[str, str]]) -> list[str]:
    """Names in order, from (name, index) or (index, name)."""
    if not all(value.isdigit() for _, value in pairs):
        pairs = [(name, key) for key, name in pairs]
    found = {int(index): name for name, index in pairs}
    if found.keys() != set(range(len(pairs))):
        raise ValueError(f"its indices are not 0 to {len(pairs) - 1}")
    return [found[i] for i in range(len(found))]


def with_class_map(model: ModelClasses, path: Path | None, order: ClassOrder | None) -> ModelClasses:
    """What the model predicts, with what the user says of it.

    Raises:
        DataError: the file cannot be read, the user contradicts the model, or it has no classes.
    """
    if model.kind in ("values", "group") and (path is not None or order is not None):
        raise DataError(
            f"the model's outputs are {'numbers' if model.kind == 'values' else 'an embedding'}, not classes",
            "leave out --class-map and --class-order",
            exit_code=2,
        )
    if path is not None:
        names = read_class_map(path, model.num_classes)
        if model.names and named(model) and [*map(_normal, model.names)] != [*map(_normal, names)]:
            raise DataError(
                f"the class map '{path}' and the model name the classes differently: {_first(names)}, not "
                f"{_first(model.names)}",
                "leave out --class-map: the model knows its names",
            )
        return replace(model, names=names, source=path.name)
    if order is not None and model.names:
        raise DataError(
            f"the model names its classes, {_first(model.names)}: their order is no question",
            "leave out --class-order",
        )
    return replace(model, order=order)


def refuse_order(model: ModelClasses, why: str) -> None:
    """Refuse --class-order where it says nothing.

    Raises:
        DataError: the user gave it.
    """
    if model.order is not None:
        raise DataError(f"{why}, which need no order", "leave out --class-order", exit_code=2)


def model_index(model: ModelClasses) -> dict[str, int] | None:
    """The model's output index of every class by name, by id or number on ImageNet models; None without names."""
    return {name: i for i, name in enumerate(model.names or ())} or spellings(model.num_classes) or None


def readable_names(names: Mapping[int, str], num_classes: int) -> dict[int, str]:
    """What people call the classes, by index: WordNet ids spelled out, ImageNet's names for classes that are not known.

    The number of classes is the model's; one that is not of ImageNet's brings no names.
    """
    ids = dict(enumerate(wordnet_ids(num_classes)))
    if not ids or not are_wordnet_ids(names.values()) or not set(names.values()) <= set(ids.values()):
        return dict(names)
    from timm.data import ImageNetInfo, infer_imagenet_subset

    about = ImageNetInfo(str(infer_imagenet_subset({"num_classes": num_classes})))
    return {i: about.label_name_to_description(name) for i, name in (ids | dict(names)).items()}


def named(model: ModelClasses) -> bool:
    """Whether the model's classes have names that data must use too; WordNet ids may be spelled out."""
    return model.names is not None and not are_wordnet_ids(model.names)


def shown(names: Collection[Any] | None) -> str:
    """The first three of them in brackets, for an error."""
    return f" ({_first(names)})" if names else ""


def _first(names: Collection[Any]) -> str:
    return f"{', '.join(map(str, islice(names, 3)))}{', ...' if len(names) > 3 else ''}"


def _normal(name: str) -> str:
    """One way to write what looks the same: macOS stores an accent apart from its letter."""
    return unicodedata.normalize("NFC", name).strip()


def _misfit(names: list[str], unknown: list[str], model: ModelClasses, source: str) -> DataError:
    lacking = f", of which it lacks {_first(unknown)}" if unknown and len(unknown) < len(names) else ""
    spelled = "" if named(model) or not wordnet_ids(model.num_classes) else "name ImageNet's classes by WordNet id, or "
    return DataError(
        f"the model has {model.num_classes} classes{shown(model.names)}, but '{source}' has {len(names)}{shown(names)}"
        + lacking,
        f"{spelled}use data with the model's classes; `vitprune predict` and sparsify --no-labels need no labels",
    )
