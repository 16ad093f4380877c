"""From a DATA argument to image sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitprune.common.formatting import close_match
from vitprune.data.classes import ModelClasses
from vitprune.data.folder import find_splits, read_folder
from vitprune.data.hub import DataOptions, find_shards, missing_shards, read_hub, read_shards
from vitprune.data.images import ImageSet
from vitprune.data.loading import Faults
from vitprune.data.tables import Images, ImageStream
from vitprune.errors import DataError

_HUB_NAMES: dict[str, tuple[str, str | None]] = {
    "imagenet": ("ILSVRC/imagenet-1k", None),
    "imagenette": ("frgfm/imagenette", "320px"),
}
HELD_OUT = 0.1


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

    def class_names(self, num_classes: int) -> tuple[str, ...] | None:
        """The model's classes in output order, as the data calls them; None unless it names every one."""
        known = self.val.class_names
        return tuple(known[i] for i in range(num_classes)) if known.keys() == set(range(num_classes)) else None


def count_images(images: Images | None) -> int | None:
    """How many there are; None of a stream, or of nothing."""
    return len(images) if isinstance(images, ImageSet) else None


def open_data(
    spec: str,
    classes: ModelClasses | None,
    options: DataOptions | None = None,
    *,
    training: bool = False,
    labels: bool = True,
) -> Data:
    """Open `demo`, `imagenet`, `imagenette`, `hf:owner/name`, a folder, or parquet or tar shards.

    Args:
        spec: the DATA argument.
        classes: the model's classes.
        options: what else is said about the data.
        training: whether training images are needed. If the data has no val split, a tenth is then held out.
        labels: False if labels are not needed: images that have none, or that do not fit, are taken without.

    Raises:
        DataError: no images, options that do not fit the kind of data, or classes that do not fit the model.
        HubError: the data set cannot be had from the Hub.
    """
    options = options or DataOptions()
    shards = find_shards(spec)
    of_tables = bool(shards) or spec in _HUB_NAMES or spec.startswith("hf:")
    if not of_tables and (options.streaming or options.splits != (None, None) or options.columns != (None, None)):
        raise DataError(
            f"--streaming, --splits and --columns say how tables are read, and '{spec}' is none",
            "leave them out, or use a data set of the Hub, parquet or tar files",
        )
    folder = None if spec == "demo" or shards else _local_folder(spec)
    if spec == "demo":
        data = _demo()
    elif folder is not None:
        data = _complete(spec, *_read_folders(folder, classes, training, labels), training)
    else:
        data = _complete(spec, *_read_tables(spec, shards, classes if labels else None, options), training)
    if missing := missing_shards(shards):
        note = f"{len(missing)} of {len(missing) + len(shards)} shards are missing, {missing[0]} first"
        data.note = note if data.note is None else f"{note}; {data.note}"
    if options.limit is not None:
        data.train = data.train and data.train.sample(options.limit)
        data.val = data.val.sample(options.limit)
    return data


def _read_tables(
    spec: str, shards: list[Path], classes: ModelClasses | None, options: DataOptions
) -> tuple[Images | None, Images | None]:
    if shards:
        return read_shards(shards, classes, options, spec)
    name, config = _hub_set(spec)
    return read_hub(name, classes, options, config)


def hub_name(spec: str) -> str | None:
    """The data set of the Hub whose images a DATA argument names, `owner/name`; None of any other argument."""
    return _hub_set(spec)[0] if spec in _HUB_NAMES or spec.startswith("hf:") else None


def _hub_set(spec: str) -> tuple[str, str | None]:
    """Name and configuration of a data set of the Hub."""
    if spec in _HUB_NAMES:
        return _HUB_NAMES[spec]
    name, _, config = spec.removeprefix("hf:").partition(":")
    return name, config or None


def _read_folders(
    folder: Path, classes: ModelClasses | None, training: bool, labels: bool
) -> tuple[ImageSet | None, ImageSet | None]:
    def read(root: Path | None) -> ImageSet | None:
        if root is None:
            return None
        try:
            return read_folder(root, classes)
        except DataError:
            if labels:
                raise
        return read_folder(root, None)

    train_root, val_root = find_splits(folder)
    if train_root is None and val_root is None:
        return None, read(folder)
    return read(train_root if training or val_root is None else None), read(val_root)


def _complete(spec: str, train: Images | None, val: Images | None, training: bool) -> Data:
    """Make sure that there is something to evaluate on and, for training, to train on, without overlap."""
    if train is not None and val is not None:
        return Data(spec, train, val)
    everything = train if val is None else val
    if everything is None:
        raise DataError(f"'{spec}' has neither a train nor a val part")
    if not training:
        return Data(spec, None, everything)
    if isinstance(everything, ImageStream):
        raise DataError(
            f"'{spec}' has no val part, and none can be held out of a stream",
            "add shards whose names begin with val, or name its splits: --splits TRAIN,VAL",
        )
    if len(everything) < 2:
        raise DataError(f"'{spec}' has {len(everything)} image(s); training needs at least 2")
    rest, held_out = everything.split(HELD_OUT)
    return Data(spec, rest, held_out, f"no train and val folders: {len(held_out)} of {len(everything)} held out")


def _local_folder(spec: str) -> Path | None:
    """The folder that `spec` names; None where it is for the Hub."""
    if spec == "imagenet" and (from_env := os.environ.get("VITPRUNE_IMAGENET")):
        if not Path(from_env).is_dir():
            raise DataError(f"there is no folder '{from_env}'", "check $VITPRUNE_IMAGENET")
        return Path(from_env)
    if hub_name(spec):
        return None
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder of images" if folder.exists() else "is not there"
        close = close_match(spec, ("demo", *_HUB_NAMES))
        words = "give a folder, parquet or tar files, 'imagenet', 'imagenette', 'hf:owner/name' or 'demo'"
        raise DataError(f"the data '{spec}' {what}", f"did you mean {close}?" if close else words)
    return folder


def _demo() -> Data:
    from vitprune.data.demo import CLASS_NAMES, DemoImages

    names = dict(enumerate(CLASS_NAMES))
    train, val = DemoImages("train"), DemoImages("val")
    return Data(
        "demo",
        ImageSet(range(len(train)), train.labels, train.image, class_names=names),
        ImageSet(range(len(val)), val.labels, val.image, class_names=names),
        object_mask=val.object_mask,
    )
