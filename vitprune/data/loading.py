"""Batches of images, and what becomes of those that cannot be read."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from vitprune.common import distributed
from vitprune.common.seeding import derive_seed, isolated_rng
from vitprune.data.images import ImageSet, Sample, Unreadable
from vitprune.data.tables import Images, ImageStream
from vitprune.errors import DataError, UsageError

_NAMES_KEPT = 20
_PATIENCE = 1000
"""A share is judged as of so many images at least: one bad image among the first ten says little."""


class Batch(NamedTuple):
    """What a loader gives."""

    images: Tensor | None  # (B, C, H, W) of those that could be read; None if that is none
    labels: Tensor  # (B,) classes, groups or UNLABELLED; (B, outputs) labels or values
    unreadable: tuple[Unreadable, ...]
    notes: tuple[str, ...] = ()  # on those that could be read
    gaps: tuple[int, ...] = ()  # where in the batch the unreadable ones would be


@dataclass
class Faults:
    """Images that could not be read: counted, the first ones kept by name, and an error if they are too many.

    Attributes:
        allowed_share: of the images seen, or of a thousand if those are fewer; 0 makes the first one an error.
        names: the first ones, each once; added to.
        count: how many so far, repeats counted.
        seen: images asked for so far.
        reason: why the first one could not be read.
        notes: on images that could be read, how often, such as that they were scaled to 8 bits.
        rows: the numbers of those that could not be read, in the order of reading; of one process.
    """

    allowed_share: float = 0.0
    names: list[str] = field(default_factory=list)
    count: int = 0
    seen: int = 0
    reason: str = ""
    notes: Counter[str] = field(default_factory=Counter)
    rows: list[int] = field(default_factory=list)

    @classmethod
    def merged(cls, parts: Sequence[Faults]) -> Faults:
        """Those of several processes as one."""
        names = list(dict.fromkeys(name for part in parts for name in part.names))
        counts = sum(part.count for part in parts), sum(part.seen for part in parts)
        reason = next((part.reason for part in parts if part.names), "")
        rows = parts[0].rows if len(parts) == 1 else []
        return cls(parts[0].allowed_share, names, *counts, reason, sum((part.notes for part in parts), Counter()), rows)

    @property
    def remarks(self) -> list[str]:
        """`notes` for people."""
        return [f"{count} image(s) {note}" for note, count in self.notes.items()]

    def none_read(self, what: str = "images") -> DataError:
        """The error where nothing could be read."""
        first = f": the first is '{self.names[0]}', {self.reason}" if self.names else ""
        return DataError(f"none of {self.seen} {what} could be read{first}", "repair the data set")

    def note(self, batch: Batch) -> None:
        """Count a batch.

        Raises:
            DataError: too many images could not be read; names the first of this batch.
        """
        self.rows += [self.seen + gap for gap in batch.gaps]
        self.seen += len(batch.labels) + len(batch.unreadable)
        self.count += len(batch.unreadable)
        self.notes.update(batch.notes)
        for image in batch.unreadable:
            if image.fatal:
                raise DataError(f"cannot read '{image.name}': {image.reason}", image.hint)
            self.reason = self.reason or image.reason
            if image.name not in self.names and len(self.names) < _NAMES_KEPT:
                self.names.append(image.name)
        if self.count == self.seen >= _PATIENCE:
            raise self.none_read()
        if not batch.unreadable or self.count <= self.allowed_share * max(self.seen, _PATIENCE):
            return
        first = batch.unreadable[0]
        if self.allowed_share == 0:
            raise first.error()
        raise DataError(
            f"{self.count} of {self.seen} images could not be read, which is more than the allowed share of "
            f"{self.allowed_share:g}; the last was '{first.name}': {first.reason}",
            "repair the data set, or allow more, such as --set max_unreadable=0.1",
        )


def make_loader(images: Images, batch_size: int, *, num_workers: int = 0) -> DataLoader[Any]:
    """Batches of (images (B, C, H, W), targets), every image once and in order; see `batches`.

    Set `images.transform` first. Use `batches` to iterate, so that unreadable images are dealt with.
    """
    if isinstance(images, ImageStream):
        num_workers = min(num_workers, images.num_shards)  # each reads shards of its own
    return DataLoader(images, batch_size, num_workers=num_workers, collate_fn=collate, worker_init_fn=leave_signals)


def training_loader(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    num_workers: int = 0,
    pin: bool = False,
) -> DataLoader[Any]:
    """Endless shuffled batches, one pass after another, each short of a last incomplete batch.

    What a batch holds depends on the seed and the number of the batch alone, so that reading can start at any, such as
    `first_step`. Not so a stream's: it starts over, in another order. The transform of the images is set; the batch
    size is of all processes together, at most the number of images; `pin` puts them into memory that a GPU reads fast.

    Raises:
        UsageError: the batch cannot be shared equally by the processes.
        DataError: there are fewer images than processes.
    """
    rank, world = distributed.rank(), distributed.world_size()
    if isinstance(images, ImageSet) and len(images) < world:
        raise DataError(f"{len(images)} images to train on cannot be shared by {world} processes", "start fewer")
    if batch_size % world:
        raise UsageError(
            f"a batch of {batch_size} images cannot be shared by {world} processes",
            f"--batch-size is of all processes together; try {world * max(1, round(batch_size / world))}",
        )
    # With a generator of its own, or the loader would draw from the caller's.
    common: dict[str, Any] = {
        "collate_fn": collate,
        "worker_init_fn": leave_signals,
        "pin_memory": pin,
        "generator": torch.Generator().manual_seed(derive_seed(seed)),
    }
    if isinstance(images, ImageStream):
        stream = images.shuffled(derive_seed(seed, first_step)).shard(rank, world)
        workers = min(num_workers, stream.num_shards)  # each reads shards of its own
        return DataLoader(stream, batch_size // world, num_workers=workers, drop_last=True, **common)
    batch_size = min(batch_size, len(images) - len(images) % world)
    order = _Order(len(images), batch_size, seed, first_step, rank, world)
    return DataLoader(_Seeded(images, seed), batch_sampler=order, num_workers=num_workers, **common)


@dataclass(eq=False)
class _Seeded(Dataset[Any]):
    """Images whose random crop depends on the seed, the pass and the image."""

    images: ImageSet
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> Sample | Unreadable:
        with isolated_rng(self.seed, *key):
            return self.images[key[1]]


@dataclass(eq=False)
class _Order(Sampler[list[tuple[int, int]]]):
    """Batches of (pass, image) without end; of each this process' share."""

    num_images: int
    batch_size: int
    seed: int
    first_step: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_pass, share = self.num_images // self.batch_size, self.batch_size // self.world
        current, order = -1, []
        for step in count(self.first_step):
            number, position = divmod(step, per_pass)
            if number != current:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, number))
                current, order = number, torch.randperm(self.num_images, generator=generator).tolist()
            start = position * self.batch_size + self.rank * share
            yield [(number, index) for index in order[start : start + share]]


def batches(loader: Any, faults: Faults | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over a loader of `make_loader`: images (B, C, H, W) and targets.

    These are classes, groups or UNLABELLED, int64 (B,), or labels or values, float32 (B, outputs).

    Unreadable images are skipped and counted in `faults`; without it there may be none.

    Raises:
        DataError: an image could not be read, or too many; names it.
    """
    faults = Faults() if faults is None else faults
    for batch in loader:
        faults.note(batch)
        if batch.images is not None:
            yield batch.images, batch.labels
    if isinstance(getattr(loader, "dataset", None), ImageStream):
        loader.dataset.passes += 1  # here and not in the stream: its copies in worker processes are made anew


@contextmanager
def explain_worker_crash() -> Iterator[None]:
    """In the block, the death of a process that reads images is an error with a way out.

    Around all that is done while they live, not only around reading: torch reports it by a signal, at any moment.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images died ({str(error).splitlines()[0]})",
            "most often because memory ran out: fewer --workers, or none (-j 0)",
        ) from error


def leave_signals(_: int) -> None:
    """In a worker: signals sent to the whole process group are for the main process, which ends its workers.

    It does so by SIGTERM too, and waits for them: the one that it sends must not be ignored.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere torch's handler stays, which heeds all of them
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def collate(samples: list[Sample | Unreadable]) -> Batch:
    """Stack what could be read."""
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    unreadable = tuple(sample for sample in samples if isinstance(sample, Unreadable))
    gaps = tuple(place for place, sample in enumerate(samples) if isinstance(sample, Unreadable))
    if not readable:
        return Batch(None, torch.empty(0, dtype=torch.long), unreadable, gaps=gaps)
    images, labels = default_collate(readable)
    return Batch(images, labels, unreadable, tuple(sample.note for sample in readable if sample.note), gaps)
