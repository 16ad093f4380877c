"""Which of the tensors in a weight file are the model's: under which container and prefix, of which of several sets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitprune.checkpoint.weight_file import WeightFile, in_fp32
from vitprune.errors import CheckpointError, UsageError
from vitprune.loading.transformers_weights import ANCHORS

_FOREIGN = (
    *ANCHORS,
    "visual.class_embedding",
    "visual.trunk.blocks.0.norm1.weight",
    "vision_encoder.mask_token",
    "preprocessor.patchifier.proj.weight",
    "radio_model.model.patch_generator.embedder.weight",
)
"""A tensor of each other library's layout that is converted, by us or by timm."""
_AVERAGE = re.compile(r"(^|[._])ema([._]|$)")
"""What a training script calls the average of its weights, which is what it evaluates."""
_SHOWN = 4


@dataclass(frozen=True)
class WeightSet:
    """Tensors of a file under the model's names, in fp32.

    `key` is where they are, such as "state_dict_ema.module", "" for the file itself; `chosen` whether other sets would
    do too, and `said` what is to be said of that, a line each.
    """

    tensors: dict[str, Tensor]
    key: str
    chosen: bool = False
    said: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """A container of the file, and what names in it begin with."""

    group: str
    prefix: str

    @property
    def key(self) -> str:
        return f"{self.group}.{self.prefix}".strip(".")


def choose_weights(file: WeightFile, expected: Collection[str], key: str | None = None) -> WeightSet:
    """The tensors of a file that are a model's, whatever containers and prefixes they are in.

    Training scripts wrap weights (`model`, `state_dict`), and so do the modules around a model (`module.` of
    DataParallel, `_orig_mod.` of torch.compile, `model.` or `net.` of Lightning). Of several sets the average over
    training (EMA) is taken, unless `key` says where the wanted one is. Of the names that are expected a set has most.

    Raises:
        CheckpointError: no set is the model's, or several might be; says which there are.
        UsageError: there is no set of that key.
    """
    places = _fitting(file, expected)
    if key is not None:
        keyed = [place for place in places if f"{place.key}.".startswith(f"{key}.")]
        if not keyed:
            raise UsageError(f"'{file.path}' has no weights of the model under '{key}'", f"it has {_listed(places)}")
        chosen = _of_several(file, keyed)
    else:
        chosen = _of_several(file, places)
    tensors, said = in_fp32(_under(file, chosen, places), file.path)
    others = [place for place in places if place != chosen]
    if others and key is None and not _same(file, places):
        said.insert(0, f"'{file.path.name}' holds several sets of weights: {_listed(places)}; taken: '{chosen.key}'")
    if left_out := _left_out(file, chosen, places):
        names = ", ".join(left_out[:_SHOWN]) + (" ..." if len(left_out) > _SHOWN else "")
        said.append(f"'{chosen.key}' of '{file.path.name}' is the model; {len(left_out)} tensors beside it: {names}")
    return WeightSet(tensors, chosen.key, bool(others), said)


def _fitting(file: WeightFile, expected: Collection[str]) -> list[_Place]:
    """Where the model's names are, or those of a layout that is converted."""
    found = _places(file, expected)
    most = max(found.values(), default=0)
    if 2 * most >= len(expected):
        return [place for place, count in found.items() if 2 * count > most]
    for anchor in _FOREIGN:
        if places := list(_places(file, {anchor})):
            return places
    if len(file.groups) == 1 and not most:
        return [_Place(next(iter(file.groups)), "")]  # timm may know the layout, or else says what is wrong with it
    if most:
        return [max(found, key=lambda place: found[place])]
    raise CheckpointError(
        f"no tensors in '{file.path}' have the model's names: it has {_described(file)}",
        f"a model's are such as '{next(iter(expected), '?')}'; check that MODEL is what the file was saved from",
    )


def _places(file: WeightFile, expected: Collection[str]) -> Counter[_Place]:
    """How many of the expected names there are in each place."""
    found: Counter[_Place] = Counter()
    for group, tensors in file.groups.items():
        for name in tensors:
            starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
            found.update(_Place(group, name[:start]) for start in starts if name[start:] in expected)
    return found


def _of_several(file: WeightFile, places: list[_Place]) -> _Place:
    averages = [place for place in places if _AVERAGE.search(place.key)]
    for some in (places, averages):
        if some and _same(file, some):
            return some[0]
    raise CheckpointError(
        f"'{file.path}' holds several sets of weights that might be the model's: {_listed(places)}",
        f"choose one: --checkpoint-key {places[0].key or places[-1].key}",
    )


def _same(file: WeightFile, places: list[_Place]) -> bool:
    """Whether all places hold the same tensors."""
    first, *others = (_under(file, place, places) for place in places)
    return all(
        first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
        for other in others
    )


def _under(file: WeightFile, place: _Place, places: list[_Place]) -> dict[str, Tensor]:
    """The tensors of a place without its prefix, and without those of other places within."""
    within = tuple(
        other.prefix for other in places if other.group == place.group and len(other.prefix) > len(place.prefix)
    )
    return {
        name.removeprefix(place.prefix): tensor
        for name, tensor in file.groups[place.group].items()
        if name.startswith(place.prefix) and not (within and name.startswith(within))
    }


def _left_out(file: WeightFile, chosen: _Place, places: list[_Place]) -> list[str]:
    """Tensors in the same container that are of no set."""
    prefixes = tuple(place.prefix for place in places if place.group == chosen.group)
    return [name for name in file.groups[chosen.group] if not name.startswith(prefixes)]


def _listed(places: list[_Place]) -> str:
    return ", ".join(f"'{place.key}'" if place.key else "those of the file itself" for place in places) or "none"


def _described(file: WeightFile) -> str:
    """The containers of a file, and what is in them."""
    return "; ".join(
        (f"'{group}' with " if group else "") + ", ".join(list(tensors)[:2]) + (" ..." if len(tensors) > 2 else "")
        for group, tensors in list(file.groups.items())[:_SHOWN]
    )
