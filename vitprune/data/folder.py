"""Picture folders: train/ and val/ with a folder per class, class folders alone, or loose pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vitprune.data.classes import ModelClasses, match_classes
from vitprune.data.pictures import UNLABELLED, PictureSet, open_picture
from vitprune.errors import DataError

_TRAIN = ("train",)
_VAL = ("val", "validation", "valid", "test")


def find_splits(root: Path) -> tuple[Path | None, Path | None]:
    """The folders with the training and the validation pictures; (None, None) if `root` has no such split."""
    train = next((root / name for name in _TRAIN if (root / name).is_dir()), None)
    val = next((root / name for name in _VAL if (root / name).is_dir()), None)
    return train, val


def read_folder(root: Path, classes: ModelClasses | None) -> PictureSet:
    """All pictures below a folder.

    Args:
        root: a folder with one folder per class, or with loose pictures.
        classes: the model's classes, to label the pictures by the folder they are in; None to leave them unlabelled.

    Raises:
        DataError: there are no pictures, no class folders where labels are wanted, or the classes do not fit.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder '{root}'", "check the path given as DATA")
    class_folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    index: dict[str, int] = {}
    if classes is None:
        paths = _pictures(root)
        labels = [UNLABELLED] * len(paths)
    else:
        by_class = {folder.name: found for folder in class_folders if (found := _pictures(folder))}
        if not by_class and _pictures(root):
            raise DataError(
                f"the pictures in '{root}' are not in class folders, so their labels are not known",
                "put them into one folder per class, or train without labels: vitprune sparsify ... --no-labels",
            )
        # Empty class folders count as classes, or an incomplete copy would shift every index after them.
        names = [folder.name for folder in class_folders]
        index = match_classes(names, classes, str(root)) if by_class else {}
        pairs = [(path, index[name]) for name, found in by_class.items() for path in found]
        paths, labels = [path for path, _ in pairs], [label for _, label in pairs]
    if not paths:
        raise DataError(
            f"there are no pictures in '{root}'",
            f"expected files such as {root / 'some_class' / 'picture.jpg'}",
        )
    return PictureSet(paths, labels, open_picture, class_names={i: name for name, i in index.items()})


def _pictures(folder: Path) -> list[Path]:
    known = Image.registered_extensions()
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file())
