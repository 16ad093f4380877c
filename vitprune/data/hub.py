"""Data sets of the Hugging Face Hub, through `datasets`."""

from __future__ import annotations

from typing import Any

from PIL import Image

from vitprune.data.classes import ModelClasses, match_classes, named
from vitprune.data.pictures import UNLABELLED, PictureSet
from vitprune.errors import DataError, HubError

_TRAIN = ("train",)
_VAL = ("validation", "val", "valid", "test")


def read_hub(
    repository: str, classes: ModelClasses | None, config: str | None = None
) -> tuple[PictureSet | None, PictureSet | None]:
    """Training and validation pictures of a Hub data set; downloads what is not cached.

    Args:
        repository: `owner/name`.
        classes: the model's classes, None for unlabelled use.
        config: configuration of the data set, where it has several.

    Raises:
        HubError: the Hub is out of reach, or the data set is gated or absent.
        DataError: the data set has no pictures, or its classes do not fit the model.
    """
    splits = _load(repository, config)
    train = next((splits[name] for name in _TRAIN if name in splits), None)
    val = next((splits[name] for name in _VAL if name in splits), None)
    return tuple(  # type: ignore[return-value]
        None if table is None else from_table(table, classes, repository) for table in (train, val)
    )


def _load(repository: str, config: str | None) -> Any:
    from datasets import DownloadConfig, load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError

    try:
        # Never `trust_remote_code`: a data set is data.
        return load_dataset(repository, config, download_config=DownloadConfig(max_retries=1))
    except (DatasetNotFoundError, GatedRepoError) as error:
        if "gated" in str(error).lower():
            raise HubError(
                f"the data set '{repository}' is gated",
                f"accept its terms on https://huggingface.co/datasets/{repository}, then run: hf auth login; "
                "or pass a local folder as DATA",
            ) from error
        raise HubError(
            f"there is no data set '{repository}' on the Hugging Face Hub", "check the name, or pass a folder"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # no connection, offline mode, HTTP errors
        raise HubError(
            f"cannot load '{repository}' from the Hugging Face Hub: {str(error).splitlines()[0]}",
            "check the connection, or pass a local folder as DATA (for ImageNet also by $VITPRUNE_IMAGENET or "
            "--data-dir)",
        ) from error


def from_table(table: Any, classes: ModelClasses | None, source: str) -> PictureSet:
    """A picture set over one split of a `datasets` table with an image column and, for labels, a class column.

    Raises:
        DataError: a column is missing, or the classes do not fit the model.
    """
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    pictures = next((name for name, kind in table.features.items() if isinstance(kind, ImageFeature)), None)
    if pictures is None:
        raise DataError(f"'{source}' has no column of pictures, only {', '.join(table.features)}")
    labels = [UNLABELLED] * len(table)
    spelled: dict[int, str] = {}
    if classes is not None:
        column = next((name for name, kind in table.features.items() if isinstance(kind, ClassLabel)), None)
        if column is None:
            raise DataError(f"'{source}' has no column of class labels", "train without labels: --no-labels")
        names = table.features[column].names
        # The Hub's ImageNet spells its classes out, in the usual order; only names known to the model reorder.
        index = match_classes(names, classes, source) if set(names) <= set(classes.names or ()) else None
        if index is None and (len(names) != classes.num_classes or named(classes)):
            match_classes(names, classes, source)  # says what does not fit
        labels = [index[names[label]] if index else label for label in table[column]]
        spelled = {index[name] if index else i: name for i, name in enumerate(names)}
    rows = range(len(table))
    return PictureSet(rows, labels, _TableReader(table, pictures), _RowName(source), spelled)


class _TableReader:
    """Reads the picture of a row (a class and not a closure, so that worker processes can receive it)."""

    def __init__(self, table: Any, column: str) -> None:
        self.table = table
        self.column = column

    def __call__(self, row: int) -> Image.Image:
        picture: Image.Image = self.table[row][self.column]
        return picture.convert("RGB")


class _RowName:
    def __init__(self, source: str) -> None:
        self.source = source

    def __call__(self, row: int) -> str:
        return f"{self.source} row {row}"
