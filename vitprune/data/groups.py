"""Images that are alike: the same group has the same number in all parts of the data."""

from __future__ import annotations

from dataclasses import replace

from vitprune.data.tables import Images, ImageStream
from vitprune.data.targets import UNLABELLED, OneClass, Target, Targets


def number_together(train: Images | None, val: Images) -> tuple[Images | None, Images]:
    """The parts of a data set with their groups numbered over both, by name; numbers without names stay.

    A single group says nothing of likeness: such images are unlabelled.
    """
    names = sorted({name for part in (train, val) if part is not None for name in part.class_names.values()})
    return None if train is None else _renumbered(train, names), _renumbered(val, names)


def _renumbered(part: Images, names: list[str]) -> Images:
    if not part.class_names:
        return part
    index = {name: number for number, name in enumerate(names)}
    new: dict[int, int] = {UNLABELLED: UNLABELLED} | {old: index[name] for old, name in part.class_names.items()}
    alone, how = len(names) < 2, f"{len(names)} {part.how_classes}"
    if isinstance(part, ImageStream):
        reading = part.labels.reading
        if alone or not isinstance(reading, OneClass):
            return replace(part, labels=Targets(kind="group"))
        numbers = OneClass({value: new[old] for value, old in reading.index.items()})
        return replace(part, labels=replace(part.labels, reading=numbers, names=dict(enumerate(names)), how=how))
    if alone:
        return replace(part, labels=[UNLABELLED] * len(part), class_names={}, how_classes="")
    labels: list[Target] = [new[int(label)] for label in part.labels]
    return replace(part, labels=labels, class_names=dict(enumerate(names)), how_classes=how)
