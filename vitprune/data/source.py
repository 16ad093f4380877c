"""From a DATA argument to image sets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from vitprune.common.formatting import JOIN_WITH_COMMAS, close_match, is_number, writable
from vitprune.data.classes import ModelClasses, TargetKind, with_class_map
from vitprune.data.files import find_splits, in_words
from vitprune.data.folder import classes_of_train, is_flat, read_folder
from vitprune.data.hub import HUB_SETS, find_shards, hub_name, missing_shards, read_hub, read_shards
from vitprune.data.images import ImageSet
from vitprune.data.loading import Faults
from vitprune.data.options import NO_OPTIONS, DataOptions
from vitprune.data.tables import Images, ImageStream
from vitprune.data.targets import FOR_CLASSES, UNLABELLED, OneClass, OtherTask, Target, Targets
from vitprune.data.torch_data import TorchImages, torch_images
from vitprune.errors import DataError

HELD_OUT = 0.1
_CALLED: dict[TargetKind, str] = {"class": "classes", "labels": "labels", "values": "values", "group": "groups"}


@dataclass
class Data:
    """The images of a DATA argument.

    Attributes:
        name: the argument.
        train: images to train on, None where there are none.
        val: images to evaluate on.
        note: what a reader of its figures should know: that `val` was held out, that shards are missing.
        faults: images of `val` that could not be read, once it was evaluated.
        object_mask: where the drawing knows it: item of `val` to the pixels (H, W) that show the object.
    """

    name: str
    train: Images | None
    val: Images
    note: str | None = None
    faults: Faults = field(default_factory=lambda: Faults(allowed_share=1.0))
    object_mask: Callable[[int], NDArray[np.bool_]] | None = None

    @property
    def understood(self) -> list[str]:
        """What to say of them before they are used."""
        how = self.how_classes and f"{_CALLED[self.val.kind]}: {self.how_classes}"
        lines = (how, self.left_out and f"left out: {self.left_out}")
        return [line for line in (*lines, self.note) if line]

    @property
    def left_out(self) -> str:
        """Files in the folders that are no images, or none that can be used, by kind, for people."""
        # By identity: both parts of one folder, of which some images are held out, have its one count.
        counts = {id(each.left_out): each.left_out for each in (self.train, self.val) if isinstance(each, ImageSet)}
        return in_words(sum(counts.values(), Counter[str]()))

    @property
    def how_classes(self) -> str:
        """How the targets of `val` were understood, for people; empty where there are none."""
        return self.val.how_classes

    def class_names(self, num_classes: int) -> tuple[str, ...] | None:
        """The model's classes or labels in output order, as the data calls them; None unless it names every one."""
        known = {} if self.val.kind == "group" else self.val.class_names
        return tuple(known[i] for i in range(num_classes)) if known.keys() == set(range(num_classes)) else None


def count_images(images: Images | None) -> int | None:
    """How many there are; None of a stream, or of nothing."""
    return len(images) if isinstance(images, ImageSet) else None


def count_classes(images: Images | None) -> Counter[int] | None:
    """How many images each class has; None where that is not known before they are read, or not at all."""
    if not isinstance(images, ImageSet) or isinstance(images, TorchImages):
        return None
    return Counter(map(int, images.labels)) if images.kind == "class" and images.labelled else None


def open_data(
    spec: str,
    classes: ModelClasses | None,
    options: DataOptions | None = None,
    *,
    training: bool = False,
    labels: bool = True,
    gallery: bool = False,
) -> Data:
    """Open `demo`, `imagenet`, `imagenette`, `hf:owner/name`, a folder, or parquet or tar shards.

    With `training`, images to train on are needed: if the data has no val split, a tenth is held out. Without `labels`,
    images that have none, or that do not fit, are taken without. With `gallery`, training images are wanted where there
    are some, to look for neighbours among them.

    Raises:
        DataError: no images, options that do not fit the kind of data, or targets that do not fit the model.
        HubError: the data set cannot be had from the Hub.
    """
    options = options or NO_OPTIONS
    if classes is not None:
        classes = with_class_map(classes, options.class_map, options.class_order)
    shards, repository = find_shards(spec), hub_name(spec)
    folder = os.environ.get("VITPRUNE_IMAGENET") if spec == "imagenet" else None
    kind = "class" if classes is None else classes.kind
    _check_options(spec, options, bool(shards or (repository and not folder)), kind)
    if spec == "demo":
        data = _demo(kind, labels)
    elif shards:
        data = _complete(spec, *read_shards(shards, classes if labels else None, options, spec), training)
    elif repository and not folder:
        data = _complete(spec, *read_hub(spec, classes if labels else None, options), training)
    else:
        folders = _read_folders(_existing(folder or spec), classes, options, training or gallery, labels)
        data = _complete(spec, *folders, training)
    if kind == "group":
        parts = [part for part in (data.train, data.val) if part is not None]
        names = sorted({name for part in parts for name in part.class_names.values()})
        data.train, data.val = data.train and _numbered(data.train, names), _numbered(data.val, names)
    if missing := missing_shards(shards):
        note = f"{len(missing)} of {len(missing) + len(shards)} shards are missing, {missing[0]} first"
        data.note = note if data.note is None else f"{note}; {data.note}"
    if options.limit is not None:
        if isinstance(data.val, ImageStream):
            first = f"the first {options.limit} images of the stream, in its order"
            data.note = first if data.note is None else f"{data.note}; {first}"
        data.train = data.train and data.train.sample(options.limit)
        data.val = data.val.sample(options.limit)
    return data


def open_torch(
    source: Dataset[Any] | DataLoader[Any],
    val: Dataset[Any] | DataLoader[Any] | None,
    classes: ModelClasses | None,
    *,
    training: bool = False,
    labels: bool = True,
) -> Data:
    """As `open_data`, of what the caller has: images to train on, or else to evaluate on; see `torch_images`.

    Without `val` a tenth is held out for training; without `labels` targets that do not fit are left out.
    """
    named = source.dataset if isinstance(source, DataLoader) else source
    held_out = None if val is None else torch_images(val, classes, labels=labels)
    return _complete(type(named).__name__, torch_images(source, classes, labels=labels), held_out, training)


def _check_options(spec: str, options: DataOptions, is_table: bool, kind: TargetKind) -> None:
    """Refuse what has no effect on the kind of data."""
    if options.streaming and not is_table:
        raise DataError(f"--streaming says how tables are read, and '{spec}' is none", "leave it out")
    # Labels and values of a folder are in a file in any case, which need not be named.
    by_file = options.labels is not None or (kind in ("labels", "values") and spec != "demo")
    if options.columns != (None, None) and not is_table and not by_file:
        raise DataError(
            f"--input-key and --target-key name columns, and '{spec}' is no table",
            "leave them out, or name the file that labels the images: --labels FILE",
        )
    if options.labels is not None and (is_table or spec == "demo"):
        raise DataError(f"--labels names the labels of loose images, and '{spec}' has its own", "leave it out")


def _read_folders(
    folder: Path, classes: ModelClasses | None, options: DataOptions, with_train: bool, labels: bool
) -> tuple[ImageSet | None, ImageSet | None]:
    train_root, val_root = find_splits(folder, options.splits)
    if train_root is None and val_root is None:
        val_root = folder
    roots = [root for root in (train_root, val_root) if root is not None]
    outputs = classes is not None and classes.kind in ("labels", "values")
    of_file = {root for root in roots if outputs or is_flat(root)} or {*roots}  # what a file of labels is for

    def read(root: Path | None, named: ModelClasses | None) -> ImageSet | None:
        if root is None:
            return None
        of_root = options if root in of_file else replace(options, labels=None)
        try:
            return read_folder(root, named, of_root)
        except DataError:
            if labels:
                raise
        return read_folder(root, None, of_root)

    if train_root is not None and val_root is not None and classes is not None and labels:
        classes = classes_of_train(train_root, classes)
    return read(train_root if with_train or val_root is None else None, classes), read(val_root, classes)


def _complete(spec: str, train: Images | None, val: Images | None, training: bool) -> Data:
    """Make sure that there is something to evaluate on and, for training, to train on, without overlap."""
    spec = writable(spec)
    if train is not None and val is not None:
        return Data(spec, train, val)
    everything = train if val is None else val
    if everything is None:
        raise DataError(f"'{spec}' has neither a train nor a val part")
    if not training:
        return Data(spec, None, everything, "these are training images: there is no val part" if train else None)
    if isinstance(everything, ImageStream):
        raise DataError(
            f"'{spec}' has no val part, and none can be held out of a stream",
            "add shards whose names begin with val, or name its splits: --train-split TRAIN --val-split VAL",
        )
    if len(everything) < 2:
        raise DataError(f"'{spec}' has {len(everything)} image(s); training needs at least 2")
    rest, held_out = everything.split(HELD_OUT)
    note = f"no separate train and val parts: {len(held_out)} of {len(everything)} images held out"
    return Data(spec, rest, held_out, note)


def _numbered(part: Images, names: list[str]) -> Images:
    """Images whose groups are numbered by their names in all parts of the data; numbers without names stay.

    A single group says nothing of likeness: such images are unlabelled.
    """
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


def _existing(name: str) -> Path:
    """The folder of that name."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder of images" if folder.exists() else "was not found"
        close = close_match(name, ("demo", *HUB_SETS))
        words = "give a folder, parquet or tar files, 'imagenet', 'imagenette', 'hf:owner/name' or 'demo'"
        if is_number(name):
            close, words = None, JOIN_WITH_COMMAS
        raise DataError(f"the data '{name}' {what}", f"did you mean {close}?" if close else words, exit_code=2)
    return folder


def _demo(kind: TargetKind, labels: bool) -> Data:
    from vitprune.data.demo import demo_images, object_mask

    parts = [demo_images("train"), demo_images("val")]
    if kind in ("labels", "values"):
        if labels:
            raise OtherTask(f"the images of the demo have a class each, no {kind}", FOR_CLASSES)
        parts = [replace(part, labels=[UNLABELLED] * len(part), class_names={}) for part in parts]
    train, val = (replace(part, kind=kind) for part in parts)
    return Data("demo", train, val, object_mask=partial(object_mask, "val"))
