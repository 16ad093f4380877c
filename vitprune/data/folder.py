"""Image folders: train/ and val/ with a folder per class, class folders alone, or loose images."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vitprune.data.classes import ModelClasses, match_classes
from vitprune.data.images import UNLABELLED, ImageSet, open_image
from vitprune.errors import DataError

_TRAIN = ("train",)
_VAL = ("val", "validation", "valid", "test")


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


def find_splits(root: Path) -> tuple[Path | None, Path | None]:
    """The folders with the training and the validation images; (None, None) if `root` has no such split."""
    train = next((root / name for name in _TRAIN if (root / name).is_dir()), None)
    val = next((root / name for name in _VAL if (root / name).is_dir()), None)
    return train, val


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
    class_folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    index: dict[str, int] = {}
    if classes is None:
        paths = _images(root)
        labels = [UNLABELLED] * len(paths)
    else:
        by_class = {folder.name: found for folder in class_folders if (found := _images(folder))}
        if not by_class and _images(root):
            raise Unlabelled(
                f"the images in '{root}' are not in class folders, so their labels are not known",
                "put them into one folder per class, or train without labels: vitprune sparsify ... --no-labels",
            )
        # Empty class folders count as classes, or an incomplete copy would shift every index after them.
        names = [folder.name for folder in class_folders]
        index = match_classes(names, classes, str(root)) if by_class else {}
        pairs = [(path, index[name]) for name, found in by_class.items() for path in found]
        paths, labels = [path for path, _ in pairs], [label for _, label in pairs]
    if not paths:
        raise DataError(
            f"there are no images in '{root}'",
            f"expected files such as {root / 'some_class' / 'image.jpg'}",
        )
    return ImageSet(paths, labels, open_image, class_names={i: name for name, i in index.items()})


def _images(folder: Path) -> list[Path]:
    known = Image.registered_extensions()
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file())
