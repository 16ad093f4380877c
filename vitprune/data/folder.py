"""Image folders: train/ and val/ with a folder per class, class folders alone, or loose images."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from vitprune.common.formatting import writable
from vitprune.data.classes import Matched, ModelClasses, match_classes
from vitprune.data.files import Scan, is_clutter, is_image, is_output, no_images, scan
from vitprune.data.images import UNLABELLED, ImageSet, open_image
from vitprune.data.label_file import find_label_files, labels_in, match_labels, read_label_file
from vitprune.data.options import NO_OPTIONS, DataOptions
from vitprune.data.splits import SPLIT_WORDS
from vitprune.errors import DataError

_NO_CLASSES = (
    "images",
    "labels",
    "annotations",
    "masks",
    *(word for groups in SPLIT_WORDS for group in groups for word in group),
)


class Unlabelled(DataError):
    """Images without labels, where labels are needed."""


@dataclass
class _Found:
    """Images with their classes, output indices of the model."""

    paths: list[Path]
    labels: list[int]
    left_out: Counter[str]
    matched: Matched = field(default_factory=lambda: Matched({}, ""))


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
    """All images below a folder.

    Args:
        root: a folder with one folder per class, or with loose images, which a file may label.
        classes: the model's classes, to label the images by; None to leave them unlabelled.
        options: a file of labels, and how large images may be.

    Raises:
        DataError: there are no images, no labels though they are asked for, or the classes do not fit.
    """
    if not root.is_dir():
        raise DataError(f"folder '{root}' not found", "check the path given as DATA", exit_code=2)
    if classes is None:
        files = scan(root)
        found = _Found(files.images, [UNLABELLED] * len(files.images), files.left_out)
    else:
        found = _labelled(root, classes, options)
    if not found.paths:
        raise no_images(root, found.left_out, f"expected files such as {root / 'some_class' / 'image.jpg'}")
    return ImageSet(
        found.paths,
        found.labels,
        partial(open_image, max_pixels=options.max_pixels),
        class_names={i: name for name, i in found.matched.index.items() if name != str(i)},
        how_classes=found.matched.how,
        left_out=found.left_out,
    )


def classes_of_train(train: Path, classes: ModelClasses) -> ModelClasses:
    """The model's classes, with the names of the training folders where only these say what its outputs are.

    A val folder may lack some of them, and may have no other.

    Raises:
        DataError: the order of the training folders is not known.
    """
    names = [writable(folder.name) for folder in _class_folders(train)]
    if classes.names or len(names) != classes.num_classes:
        return classes
    matched = match_classes(names, classes, str(train))
    return (
        replace(classes, names=tuple(matched.index), source=f"the folder '{train.name}'")
        if matched.by_order
        else classes
    )


def _labelled(root: Path, classes: ModelClasses, options: DataOptions) -> _Found:
    if options.labels is None and (folders := _class_folders(root)):
        scans = {writable(folder.name): scan(folder) for folder in folders}
        if any(found.images for found in scans.values()):
            # Empty class folders count as classes, or an incomplete copy would shift every index after them.
            return _by_folder(root, scans, match_classes(list(scans), classes, str(root)))
    return _by_file(root, classes, options)


def _by_folder(root: Path, scans: dict[str, Scan], matched: Matched) -> _Found:
    left_out = sum((found.left_out for found in scans.values()), Counter[str]())
    if loose := sum(path.is_file() and is_image(path) for path in root.iterdir()):
        left_out["image beside the class folders"] = loose
    pairs = [(path, matched.index[name]) for name, found in scans.items() for path in found.images]
    return _Found([path for path, _ in pairs], [label for _, label in pairs], left_out, matched)


def _by_file(root: Path, classes: ModelClasses, options: DataOptions) -> _Found:
    """Loose images, labelled by a file that was given or found."""
    files = scan(root)
    if not files.images:
        return _Found([], [], files.left_out)
    if options.labels is not None:
        file, values = options.labels, read_label_file(options.labels, files.images, root, options.columns)
    elif labelled := labels_in(find_label_files(root), files.images, root, options.columns):
        file, values = labelled
    else:
        raise _unlabelled(root)
    named = [(path, value) for path, value in zip(files.images, values, strict=True) if value is not None]
    matched = match_labels(sorted({value for _, value in named}), classes, file)
    chosen = [(path, matched.index[value]) for path, value in named]
    if unnamed := len(values) - len(chosen):
        files.left_out[f"image that '{file.name}' does not name"] = unnamed
    files.left_out[file.suffix.lower()] -= file.parent == root  # it was read
    how = replace(matched, how=f"labels of {len(chosen)} images from '{file.name}', {matched.how}")
    return _Found([path for path, _ in chosen], [label for _, label in chosen], +files.left_out, how)


def _unlabelled(root: Path) -> DataError:
    if any(each.is_dir() and not is_clutter(each) for each in root.iterdir()):
        class_folders(root)  # says which folder to give instead
    return Unlabelled(
        f"the images in '{root}' are not in class folders, so their labels are not known",
        "put them into one folder per class, name a file that labels them, --labels FILE, or train without labels: "
        "vitprune sparsify ... --no-labels",
    )
