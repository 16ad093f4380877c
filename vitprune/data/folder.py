"""Image folders: train/ and val/ with a folder per class, class folders alone, or loose images."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from PIL import Image

from vitprune.data.classes import Matched, ModelClasses, match_classes
from vitprune.data.images import UNLABELLED, ImageSet, open_image
from vitprune.errors import DataError

SPLIT_WORDS = (
    (("train", "training"),),
    (("val", "validation", "valid", "dev", "eval"), ("test", "testing")),
)
"""What splits for training and for evaluation are called; the later words only where there is none of the earlier."""
_CLUTTER = ("__MACOSX", "lost+found", "System Volume Information", "$RECYCLE.BIN")
_NO_CLASSES = (
    "images",
    "labels",
    "annotations",
    "masks",
    *(word for groups in SPLIT_WORDS for group in groups for word in group),
)


class Unlabelled(DataError):
    """Images without labels, where labels are needed."""


def image_files(path: Path) -> list[Path]:
    """An image file, or all images below a folder.

    Raises:
        DataError: there is no such file or folder, or it holds no image.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"image or folder '{path}' not found", "check the path", exit_code=2)
    if not (found := _images(path)):
        raise DataError(f"there are no images in '{path}'", "give image files, or a folder of them")
    return found


def find_splits(root: Path, names: tuple[str | None, str | None] = (None, None)) -> tuple[Path | None, Path | None]:
    """The folders with the training and the validation images; (None, None) if `root` has no such split.

    Args:
        root: the folder.
        names: of the folders in it, instead of the usual words, in which case does not matter.

    Raises:
        DataError: a folder that is named is not there, or several may be meant.
    """
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir()]
    found: list[Path | None] = []
    for option, given, groups in zip(("--train-split", "--val-split"), names, SPLIT_WORDS, strict=True):
        if given is not None:
            if not (root / given).is_dir():
                raise DataError(f"'{root}' has no folder '{given}'", f"{option} names one of its folders", exit_code=2)
            found.append(root / given)
            continue
        hits = next(
            (hits for words in groups if (hits := [each for each in folders if each.name.lower() in words])), []
        )
        if len(hits) > 1:
            choices = " and ".join(f"'{each.name}'" for each in hits)
            raise DataError(f"'{root}' has {choices}, and either may be meant", f"name one: {option} {hits[0].name}")
        found.append(hits[0] if hits else None)
    return found[0], found[1]


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


def is_clutter(path: Path) -> bool:
    """Whether a file or folder was left by a file system, an archive, a NAS or a notebook, and holds no images."""
    return path.name.startswith((".", "@")) or path.name in _CLUTTER


def is_output(folder: Path) -> bool:
    """Whether vitprune wrote a folder: a run, or a folder of runs or drawings."""
    written = ("report.json", "keepmaps.json", "sweep.json")
    return any((each / name).is_file() for each in (folder, *_subfolders(folder)) for name in written)


def _subfolders(folder: Path) -> list[Path]:
    return [each for each in folder.iterdir() if each.is_dir()] if folder.name == "runs" else []


def read_folder(root: Path, classes: ModelClasses | None) -> ImageSet:
    """All images below a folder.

    Args:
        root: a folder with one folder per class, or with loose images.
        classes: the model's classes, to label the images by the folder they are in; None to leave them unlabelled.

    Raises:
        DataError: there are no images, no class folders though labels are asked for, or the classes do not fit.
    """
    if not root.is_dir():
        raise DataError(f"folder '{root}' not found", "check the path given as DATA", exit_code=2)
    matched = Matched({}, "")
    if classes is None:
        paths = _images(root)
        labels = [UNLABELLED] * len(paths)
    else:
        folders = class_folders(root)
        by_class = {folder.name: found for folder in folders if (found := _images(folder))}
        if not by_class and _images(root):
            raise Unlabelled(
                f"the images in '{root}' are not in class folders, so their labels are not known",
                "put them into one folder per class, or train without labels: vitprune sparsify ... --no-labels",
            )
        # Empty class folders count as classes, or an incomplete copy would shift every index after them.
        if by_class:
            matched = match_classes([folder.name for folder in folders], classes, str(root))
        pairs = [(path, matched.index[name]) for name, found in by_class.items() for path in found]
        paths, labels = [path for path, _ in pairs], [label for _, label in pairs]
    if not paths:
        raise DataError(
            f"there are no images in '{root}'",
            f"expected files such as {root / 'some_class' / 'image.jpg'}",
        )
    names = {i: name for name, i in matched.index.items()}
    return ImageSet(paths, labels, open_image, class_names=names, how_classes=matched.how)


def classes_of_train(train: Path, classes: ModelClasses) -> ModelClasses:
    """The model's classes, with the names of the training folders where only these say what its outputs are.

    A val folder may lack some of them, and may have no other.

    Raises:
        DataError: the order of the training folders is not known.
    """
    names = [folder.name for folder in class_folders(train)]
    if classes.names or len(names) != classes.num_classes:
        return classes
    matched = match_classes(names, classes, str(train))
    return (
        replace(classes, names=tuple(matched.index), source=f"the folder '{train.name}'")
        if matched.by_order
        else classes
    )


def _images(folder: Path) -> list[Path]:
    known = Image.registered_extensions()
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in known
        and path.is_file()
        and not any(is_clutter(part) for part in (path, *takewhile(lambda each: each != folder, path.parents)))
    )
