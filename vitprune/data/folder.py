"""Image folders: train/ and val/ with a folder per class, class folders alone, or loose images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

from torch import Tensor

from vitprune.common.formatting import writable
from vitprune.data.classes import Matched, ModelClasses, match_classes
from vitprune.data.files import SPLIT_WORDS, Scan, is_clutter, is_image, is_output, no_images, scan
from vitprune.data.images import ImageSet, open_image
from vitprune.data.label_file import FileCells, find_label_files, labels_in, read_label_file
from vitprune.data.options import NO_OPTIONS, DataOptions
from vitprune.data.target_columns import match_one_class, understand
from vitprune.data.targets import (
    FOR_CLASSES,
    FOR_VALUES,
    UNLABELLED,
    OneClass,
    OtherTask,
    Target,
    Understood,
    as_number,
    stacked,
)
from vitprune.errors import DataError

_NO_CLASSES = {"images", "labels", "annotations", "masks", *chain(*chain(*SPLIT_WORDS))}


class Unlabelled(DataError):
    """Images without labels, where labels are needed."""


@dataclass
class _Found:
    """Images and what they show, as an ImageSet has it."""

    paths: list[Path]
    labels: Sequence[Target] | Tensor
    left_out: Counter[str]
    names: dict[int, str] = field(default_factory=dict)
    how: str = ""


def class_folders(root: Path) -> list[Path]:
    """The folders of a split that stand for classes: not those of file systems and desktops, nor what vitprune wrote.

    Raises:
        DataError: they are called what classes are not.
    """
    folders = [
        each for each in sorted(root.iterdir()) if each.is_dir() and not is_clutter(each) and not is_output(each)
    ]
    parts = sorted(each.name for each in folders if each.name.lower() in _NO_CLASSES)
    if parts and len(parts) == len(folders):
        raise DataError(
            f"the folders of '{root}' are no classes: {', '.join(parts)}",
            f"give the one with a folder per class, such as {root / parts[0]}",
        )
    return folders


def is_flat(root: Path) -> bool:
    """Whether a folder has no class folders, so that a file must say what its images show."""
    return not _class_folders(root)


def _class_folders(root: Path) -> list[Path]:
    """As `class_folders`; none where they are called what classes are not, or all are empty."""
    try:
        folders = class_folders(root)
    except DataError:
        return []
    return folders if any(next(folder.iterdir(), None) for folder in folders) else []


def read_folder(root: Path, classes: ModelClasses | None, options: DataOptions = NO_OPTIONS) -> ImageSet:
    """All images below a folder, which has one folder per class, or images that a file labels.

    Without classes, the model's, images are unlabelled. Groups may be missing.

    Raises:
        DataError: there are no images, no labels though they are asked for, or they do not fit the model.
    """
    if not root.is_dir():
        raise DataError(f"folder '{root}' not found", "check the path given as DATA", exit_code=2)
    found = _without(scan(root)) if classes is None else _labelled(root, classes, options)
    if not found.paths:
        raise no_images(root, found.left_out, f"expected files such as {root / 'some_class' / 'image.jpg'}")
    return ImageSet(
        found.paths,
        found.labels,
        partial(open_image, max_pixels=options.max_pixels),
        class_names=found.names,
        how_classes=found.how,
        left_out=found.left_out,
        kind="class" if classes is None else classes.kind,
    )


def classes_of_train(train: Path, classes: ModelClasses) -> ModelClasses:
    """The model's classes, with the names of the training folders where only these say what its outputs are.

    A val folder may lack some of them, and may have no other.

    Raises:
        DataError: the order of the training folders is not known.
    """
    names = [writable(folder.name) for folder in _class_folders(train)]
    if classes.kind != "class" or classes.names or len(names) != classes.num_classes:
        return classes
    matched = match_classes(names, classes, str(train))
    if not matched.by_order:
        return classes
    return replace(classes, names=tuple(matched.index), source=f"the folder '{train.name}'")


def _labelled(root: Path, classes: ModelClasses, options: DataOptions) -> _Found:
    outputs = classes.kind in ("labels", "values")  # which no folder can say
    if not outputs and options.labels is None and (folders := _class_folders(root)):
        scans = {writable(folder.name): scan(folder) for folder in folders}
        if any(found.images for found in scans.values()):
            # Empty class folders count as classes, or an incomplete copy would shift every index after them.
            return _by_folder(root, scans, _classes(list(scans), classes, str(root), match_classes))
    files = scan(root)
    if not files.images:
        return _without(files)
    if options.labels is not None:
        given = read_label_file(options.labels, files.images, root, options.columns, classes)
        return _by_file(root, files, given, classes)
    try:
        if said := labels_in(find_label_files(root), files.images, root, options.columns, classes):
            return _by_file(root, files, said, classes)
    except OtherTask:
        if classes.kind != "group":
            raise
    if classes.kind == "group":
        return _without(files)
    raise _no_outputs(root, classes) if outputs else _unlabelled(root)


def _without(files: Scan) -> _Found:
    return _Found(files.images, [UNLABELLED] * len(files.images), files.left_out)


def _by_folder(root: Path, scans: dict[str, Scan], classes: Understood) -> _Found:
    left_out = sum((found.left_out for found in scans.values()), Counter[str]())
    if loose := sum(path.is_file() and is_image(path) for path in root.iterdir()):
        left_out["image beside the class folders"] = loose
    pairs = [(path, classes.reading((name,), name)) for name, found in scans.items() for path in found.images]
    how = classes.how or "by the names of their folders"
    return _Found([path for path, _ in pairs], [label for _, label in pairs], left_out, classes.names, how)


def _by_file(root: Path, files: Scan, said: FileCells, classes: ModelClasses) -> _Found:
    """Images labelled by a file that was given or found."""
    file, name = said.file, writable(said.file.name)
    rows = [(path, cells) for path, cells in zip(files.images, said.cells, strict=True) if cells is not None]
    if unnamed := len(files.images) - len(rows):
        files.left_out[f"image that '{name}' does not name"] = unnamed
    files.left_out[file.suffix.lower()] -= file.parent == root  # it was read
    if classes.kind in ("labels", "values"):
        found = understand(said.columns, [cells for _, cells in rows], classes, name)
        how = f"{found.how} of '{name}'" if said.columns[0] else found.how
    else:
        found = _classes(sorted({cells[0] for _, cells in rows}), classes, name, match_one_class)
        how = f"labels of {len(rows)} images from '{name}'{found.how and ', '}{found.how}"
    targets = [found.reading(cells, f"'{path.relative_to(root)}' in '{name}'") for path, cells in rows]
    return _Found([path for path, _ in rows], stacked(targets), +files.left_out, found.names, how)


def _classes(
    values: list[str], classes: ModelClasses, source: str, match: Callable[[list[str], ModelClasses, str], Matched]
) -> Understood:
    """Which class or group a value stands for."""
    if classes.kind == "group":
        if odd := [value for value in values if as_number(value) is not None and not value.isdigit()]:
            raise OtherTask(f"'{source}' has numbers such as {odd[0]}, not groups", FOR_VALUES)
        groups = {value: i for i, value in enumerate(sorted(values))}
        return Understood(OneClass(groups), "", dict(enumerate(groups)))
    matched = match(values, classes, source)
    return Understood(OneClass(matched.index), matched.how, matched.names)


def _no_outputs(root: Path, classes: ModelClasses) -> DataError:
    if _class_folders(root):
        return OtherTask(
            f"the images in '{root}' are in class folders, which do not say their {classes.kind}",
            f"{FOR_CLASSES}; or name a file with their {classes.kind}: --labels FILE",
        )
    return Unlabelled(
        f"no file says the {classes.kind} of the images in '{root}'",
        "put a metadata.csv with a column file_name beside them, name another file, --labels FILE, or train without "
        "labels: vitprune sparsify ... --no-labels",
    )


def _unlabelled(root: Path) -> DataError:
    if any(each.is_dir() and not is_clutter(each) for each in root.iterdir()):
        class_folders(root)  # says which folder to give instead
    return Unlabelled(
        f"the images in '{root}' are not in class folders, so their labels are not known",
        "put them into one folder per class, name a file that labels them, --labels FILE, or train without labels: "
        "vitprune sparsify ... --no-labels",
    )
