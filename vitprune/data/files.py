"""Which files below a folder are images, and which were left out; which folders are for training and evaluation."""

from __future__ import annotations

import mimetypes
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from vitprune.errors import DataError

_CLUTTER = ("__MACOSX", "lost+found", "System Volume Information", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini")
_WRITTEN = ("report.json", "keepmaps.json", "sweep.json")
_STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
"""What Pillow recognises and does not decode."""
_UNREAD = {".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".svg"}
"""Endings of images that Pillow cannot read."""
_SNIFFED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SPLIT_WORDS = (
    (("train", "training"),),
    (("val", "validation", "valid", "dev", "eval"), ("test", "testing")),
)
"""What splits for training and for evaluation are called; the later words only where there is none of the earlier."""


@dataclass
class Scan:
    """The images below a folder, sorted, and how many files were left out, by kind."""

    images: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def scan(folder: Path) -> Scan:
    """Look for images in a folder and all below it, through links too, less what file systems and vitprune left there.

    A file is one by its ending; where that says nothing, by its first bytes.
    """
    found = Scan()
    for path in _files(folder, found.left_out, ()):
        if kind := _not_an_image(path):
            found.left_out[kind] += 1
        else:
            found.images.append(path)
    found.images.sort()
    return found


def image_files(path: Path) -> list[Path]:
    """An image file, or all images below a folder.

    Raises:
        DataError: there is no such file or folder, or no image in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"image or folder '{path}' not found", "check the path", exit_code=2)
    found = scan(path)
    if not found.images:
        raise no_images(path, found.left_out, "give image files, or a folder of them")
    return found.images


def no_images(folder: Path, left_out: Counter[str], hint: str) -> DataError:
    """The error where none was found."""
    only = f", only {in_words(left_out)}" if left_out else ""
    return DataError(f"there are no images in '{folder}'{only}", hint)


def in_words(left_out: Counter[str]) -> str:
    """`2 x .txt, 1 x broken link`, the most frequent first; of more than six kinds the first six."""
    kinds = [f"{count} x {kind}" for kind, count in left_out.most_common(6)]
    return ", ".join([*kinds, "others"] if len(left_out) > 6 else kinds)


def is_image(file: Path) -> bool:
    """Whether a file is one, and no clutter."""
    return not is_clutter(file) and _not_an_image(file) is None


def is_clutter(path: Path) -> bool:
    """Whether a file or folder was left by a file system, an archive, a NAS or a notebook, and holds no images."""
    return path.name.startswith((".", "@")) or path.name in _CLUTTER


def is_output(folder: Path) -> bool:
    """Whether vitprune wrote a folder: a run, or a folder of runs or drawings."""
    below = [each for each in folder.iterdir() if each.is_dir()] if folder.name == "runs" else []
    return any((each / name).is_file() for each in (folder, *below) for name in _WRITTEN)


def _files(folder: Path, left_out: Counter[str], above: tuple[str, ...]) -> Iterator[Path]:
    """All that may be an image; `above` are the real paths of the folders that led here, lest links go in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError:
        left_out["folder that cannot be read"] += 1
        return
    if any(entry.name in _WRITTEN for entry in entries) and above:
        left_out["folder that vitprune wrote"] += 1
        return
    for entry in entries:
        path = folder / entry.name
        if is_clutter(path):
            continue
        if entry.is_dir():
            yield from _files(path, left_out, (*above, real))
        elif entry.is_file():
            yield path
        else:
            left_out["broken link" if entry.is_symlink() else "special file"] += 1


def _not_an_image(path: Path) -> str | None:
    """What a file is instead; None of an image."""
    ending = path.suffix.lower()
    if ending in _readable():
        return None
    if ending in _UNREAD:
        return f"{ending} (Pillow cannot read it: convert it)"
    if mimetypes.guess_type(path.name)[0] is None:
        with suppress(Exception), Image.open(path, formats=_SNIFFED):  # a decoder may raise anything
            return None
    return ending or "file without an ending"


@cache
def _readable() -> frozenset[str]:
    known = Image.registered_extensions()
    return frozenset(ending for ending, kind in known.items() if kind in Image.OPEN and kind not in _STUBS)


def words(path: Path) -> set[str]:
    """The words of a file's or folder's name, without regard to case."""
    return set(re.split(r"[^a-z]+", path.name.lower()))


def find_splits(root: Path, names: tuple[str | None, str | None] = (None, None)) -> tuple[Path | None, Path | None]:
    """The folders with the training and the validation images; (None, None) if `root` has no such split.

    They are called by `names` or by the usual words, in which case does not matter.

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
        by_group = ([each for each in folders if each.name.lower() in alike] for alike in groups)
        hits = next(filter(None, by_group), [])
        if len(hits) > 1:
            choices = " and ".join(f"'{each.name}'" for each in hits)
            raise DataError(f"'{root}' has {choices}, and either may be meant", f"name one: {option} {hits[0].name}")
        found.append(hits[0] if hits else None)
    return found[0], found[1]
