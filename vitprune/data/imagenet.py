"""The classes of ImageNet's variants by any spelling: WordNet ids, names behind them, names alone, or numbers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import cache

from vitprune.errors import DataError

_WORDNET_ID = re.compile(r"n\d{8}")
_ID_AND_NAME = re.compile(r"(n\d{8})[-_ ].+")


def are_wordnet_ids(names: Collection[str]) -> bool:
    """Whether all names are WordNet ids, such as n01440764."""
    return all(_WORDNET_ID.fullmatch(name) for name in names)


def wordnet_ids(num_classes: int) -> list[str]:
    """WordNet ids in output order of the variant with that many classes; empty if there is none."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    return list(ImageNetInfo(subset).label_names()) if subset else []


def find_spelling(
    names: Sequence[str], num_classes: int, source: str, *, in_order: bool = False
) -> tuple[dict[str, int], str] | None:
    """The output index of each name, and how the names are spelled; None if they are not all of one spelling.

    Two classes are called crane; `in_order` says that the names have an order, in which each may stand for itself.

    Numbers and names are those of the 1,000 classes of ImageNet-1k; the other variants have WordNet ids alone.

    Raises:
        DataError: a name is that of two classes; `source` is what the data is called.
    """
    ids = {name: i for i, name in enumerate(wordnet_ids(num_classes))}
    if not ids or not names:
        return None
    of_words = {name: words[1] for name in names if (words := _ID_AND_NAME.fullmatch(name))}
    if set(names) <= ids.keys():
        return {name: ids[name] for name in names}, "by WordNet id"
    if len(of_words) == len(names) and set(of_words.values()) <= ids.keys():
        return {name: ids[of_words[name]] for name in names}, "by the WordNet id before their names"
    if num_classes != 1000:
        return None
    if all(name.isascii() and name.isdigit() and int(name) < num_classes for name in names):
        return {name: int(name) for name in names}, "by number, 0 to 999"
    index = {}
    for place, name in enumerate(names):
        candidates = _by_words().get(_plain(name), ())
        if in_order and place in candidates:
            candidates = (place,)
        if not candidates:
            return None
        if len(candidates) > 1:
            choices = " or ".join(wordnet_ids(num_classes)[i] for i in candidates)
            raise DataError(f"'{source}' has a class '{name}', as several of ImageNet are called", f"name it {choices}")
        index[name] = candidates[0]
    return index, "by name"


def spellings(num_classes: int) -> dict[str, int]:
    """Output indices by WordNet id and, of ImageNet-1k, by number, for data whose classes are not known beforehand."""
    ids = wordnet_ids(num_classes)
    known = {name: i for i, name in enumerate(ids)}
    if num_classes != 1000:
        return known
    return known | {str(i): i for i in range(num_classes)}


@cache
def _by_words() -> dict[str, tuple[int, ...]]:
    """Output indices of ImageNet-1k by all names of a class together, or by one of them."""
    from timm.data import ImageNetInfo

    about = ImageNetInfo("imagenet-1k")
    descriptions = [about.label_name_to_description(label) for label in about.label_names()]
    whole, single = defaultdict[str, tuple[int, ...]](tuple), defaultdict[str, tuple[int, ...]](tuple)
    for index, description in enumerate(descriptions):
        whole[_plain(description)] += (index,)
        for name in {_plain(each) for each in description.split(",")}:
            single[name] += (index,)
    return {**single, **whole}


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[-_,\s]+", " ", name).casefold().split())
