"""Batches of pictures, and what becomes of those that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from vitprune.data.pictures import PictureSet, Unreadable
from vitprune.data.tables import PictureStream
from vitprune.errors import DataError

_NAMES_KEPT = 20
_PATIENCE = 1000
"""A share is judged as of so many pictures at least: one bad picture among the first ten says little."""


class Batch(NamedTuple):
    """What a loader gives.

    Attributes:
        images: (B, C, H, W) of those that could be read; None if that is none.
        labels: (B,).
        unreadable: the others.
    """

    images: Tensor | None
    labels: Tensor
    unreadable: tuple[Unreadable, ...]


class Faults:
    """Pictures that could not be read: counted, the first ones kept by name, and an error if they are too many.

    Args:
        allowed_share: of the pictures seen, or of a thousand if those are fewer; 0 makes the first one an error.

    Attributes:
        count: how many, repeats counted.
        seen: pictures asked for.
        names: the first ones, each once.
    """

    def __init__(self, allowed_share: float = 0.0) -> None:
        self.allowed_share = allowed_share
        self.count = 0
        self.seen = 0
        self.names: list[str] = []

    def note(self, batch: Batch) -> None:
        """Count a batch.

        Raises:
            DataError: too many pictures could not be read; names the first of this batch.
        """
        for picture in batch.unreadable:
            if picture.fatal:
                raise DataError(f"cannot read '{picture.name}': {picture.reason}", "copy the shards again")
        self.seen += len(batch.labels) + len(batch.unreadable)
        self.count += len(batch.unreadable)
        for picture in batch.unreadable:
            if picture.name not in self.names and len(self.names) < _NAMES_KEPT:
                self.names.append(picture.name)
        if not batch.unreadable or self.count <= self.allowed_share * max(self.seen, _PATIENCE):
            return
        first = batch.unreadable[0]
        if self.allowed_share == 0:
            raise first.error()
        raise DataError(
            f"{self.count} of {self.seen} pictures could not be read, which is more than the allowed share of "
            f"{self.allowed_share:g}; the last was '{first.name}': {first.reason}",
            "repair the data set, or allow more: --max-unreadable",
        )


def make_loader(
    pictures: PictureSet | PictureStream,
    batch_size: int,
    *,
    training: bool,
    num_workers: int = 0,
    seed: int = 0,
    pin: bool = False,
) -> DataLoader[Any]:
    """Batches of (images (B, C, H, W), labels (B,)); a training loader shuffles and drops a last short batch.

    Set `pictures.transform` first. Use `batches` to iterate, so that unreadable pictures are dealt with.
    """
    if isinstance(pictures, PictureStream):
        pictures = pictures.shuffled(seed) if training else pictures
        num_workers = min(num_workers, pictures.num_shards)  # each reads shards of its own
    elif training:
        batch_size = min(batch_size, len(pictures))
    return DataLoader(
        pictures,
        batch_size=batch_size,
        shuffle=training if isinstance(pictures, PictureSet) else None,
        drop_last=training,
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
        pin_memory=pin,
        persistent_workers=False,
    )


def batches(loader: Any, faults: Faults | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over a loader of `make_loader`: images (B, C, H, W) and labels (B,).

    Args:
        loader: of `make_loader`.
        faults: where unreadable pictures are counted, which are left out; None if there may be none.

    Raises:
        DataError: a picture could not be read, or too many; names it.
    """
    faults = Faults() if faults is None else faults
    for batch in loader:
        faults.note(batch)
        if batch.images is not None:
            yield batch.images, batch.labels
    if isinstance(getattr(loader, "dataset", None), PictureStream):
        loader.dataset.passes += 1  # here and not in the stream: its copies in worker processes are made anew


def collate(samples: list[tuple[Tensor, int] | Unreadable]) -> Batch:
    """Stack what could be read."""
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    unreadable = tuple(sample for sample in samples if isinstance(sample, Unreadable))
    if not readable:
        return Batch(None, torch.empty(0, dtype=torch.long), unreadable)
    images, labels = default_collate(readable)
    return Batch(images, labels, unreadable)
