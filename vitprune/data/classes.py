"""Match the class names of a data set to the output indices of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vitprune.errors import DataError

_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ModelClasses:
    """The classes a model predicts, with their names in output order where known."""

    num_classes: int
    names: tuple[str, ...] | None = None


def match_classes(data_names: Sequence[str], model: ModelClasses, source: str) -> dict[str, int]:
    """The model's output index of each class of the data.

    By name where the model knows its names; by WordNet id on ImageNet models, so that a part of ImageNet evaluates
    rightly on 1000 classes; else, where the model has no names, in sorted order, if the counts agree. Errors call the
    data `source`.

    Raises:
        DataError: the classes do not fit; shows both sides.
    """
    names = sorted(data_names)
    for model_names in (model.names, _wordnet_ids(names, model.num_classes)):
        if model_names and set(names) <= set(model_names):
            index = {name: i for i, name in enumerate(model_names)}
            return {name: index[name] for name in names}
    if len(names) == model.num_classes and not named(model):
        return {name: i for i, name in enumerate(names)}
    raise DataError(
        f"the model has {model.num_classes} classes{shown(model.names)}, but '{source}' has {len(names)}{shown(names)}",
        "use data with the model's classes, or train without labels: vitprune sparsify ... --no-labels",
    )


def model_index(model: ModelClasses) -> dict[str, int] | None:
    """The model's output index of every class by name, by WordNet id on ImageNet models; None where it has no names."""
    names = model.names or _wordnet_ids((), model.num_classes)
    return {name: i for i, name in enumerate(names)} if names else None


def readable_names(names: Mapping[int, str], num_classes: int) -> dict[int, str]:
    """What people call the classes, by index: WordNet ids spelled out, ImageNet's names for classes that are not known.

    The number of classes is the model's; one that is not of ImageNet's brings no names.
    """
    if not all(_WORDNET_ID.fullmatch(name) for name in names.values()):
        return dict(names)
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    if not subset:
        return dict(names)
    about = ImageNetInfo(subset)
    ids = dict(enumerate(about.label_names()))
    if not set(names.values()) <= set(ids.values()):
        return dict(names)
    return {i: about.label_name_to_description(name) for i, name in (ids | dict(names)).items()}


def named(model: ModelClasses) -> bool:
    """Whether the model's classes have names that data must use too; WordNet ids may be spelled out."""
    return model.names is not None and not all(_WORDNET_ID.fullmatch(name) for name in model.names)


def _wordnet_ids(names: Sequence[str], num_classes: int) -> Sequence[str] | None:
    """WordNet ids in output order of the ImageNet variant with that many classes, if the data is named by them."""
    if not all(_WORDNET_ID.fullmatch(name) for name in names):
        return None
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    return list(ImageNetInfo(subset).label_names()) if subset else None


def shown(names: Collection[Any] | None) -> str:
    """The first three of them in brackets, for an error."""
    if not names:
        return ""
    return f" ({', '.join(map(str, islice(names, 3)))}{', ...' if len(names) > 3 else ''})"
