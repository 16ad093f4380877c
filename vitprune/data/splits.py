"""Which part of the data is for training and which for evaluation, by the words in names."""

from __future__ import annotations

import re
from pathlib import Path

from vitprune.errors import DataError

SPLIT_WORDS = (
    (("train", "training"),),
    (("val", "validation", "valid", "dev", "eval"), ("test", "testing")),
)
"""What splits for training and for evaluation are called; the later words only where there is none of the earlier."""


def words(path: Path) -> set[str]:
    """The words of a file's or folder's name, without regard to case."""
    return set(re.split(r"[^a-z]+", path.name.lower()))


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
            (hits for alike in groups if (hits := [each for each in folders if each.name.lower() in alike])), []
        )
        if len(hits) > 1:
            choices = " and ".join(f"'{each.name}'" for each in hits)
            raise DataError(f"'{root}' has {choices}, and either may be meant", f"name one: {option} {hits[0].name}")
        found.append(hits[0] if hits else None)
    return found[0], found[1]
