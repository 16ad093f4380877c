"""Throughput as an application has it: pictures read, decoded and moved to the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitprune.data import Faults, Pictures, PictureSet, batches, make_loader
from vitprune.errors import UsageError
from vitprune.measure.runner import Runner, synchronised_clock


@dataclass(frozen=True)
class PictureSource:
    """Pictures to time with.

    Attributes:
        pictures: with the model's evaluation transform set.
        num_workers: processes that read them.
        seconds: how long each model is timed, at least two batches.
    """

    pictures: Pictures
    num_workers: int
    seconds: float = 2.0


def check_source(source: PictureSource, batch_sizes: Sequence[int]) -> None:
    """Make sure that there is a whole batch of pictures.

    Raises:
        UsageError: there are fewer.
    """
    pictures = source.pictures
    if isinstance(pictures, PictureSet) and len(pictures) < max(batch_sizes):
        raise UsageError(
            f"--data has {len(pictures)} pictures, which make no batch of {max(batch_sizes)}",
            "give more pictures, or lower --batch-size",
        )


def time_with_loader(runners: Sequence[Runner], source: PictureSource, images: Tensor) -> dict[str, float]:
    """Images per second of each model with reading, decoding and transfer, from the second batch on.

    One model after the other: two loaders at a time would fight for the same cores.

    Args:
        runners: the models.
        source: the pictures; it begins again where it ends, unreadable ones are left out.
        images: what the models were prepared with: shape, dtype and device are theirs.
    """
    return {runner.name: _rate(runner, source, images) for runner in runners}


def _rate(runner: Runner, source: PictureSource, like: Tensor) -> float:
    clock, count, started = synchronised_clock(like.device), 0, None
    for pictures in _whole_batches(source, like):
        runner.forward.run_on(pictures.to(like.device, like.dtype))
        if started is None:  # worker processes have begun by now
            started = clock()
            continue
        count += len(pictures)
        if count > len(pictures) and clock() - started >= source.seconds:
            break
    assert started is not None
    return count / (clock() - started)


def _whole_batches(source: PictureSource, like: Tensor) -> Iterator[Tensor]:
    """Batches of the shape of `like`, without end."""
    loader: Any = make_loader(source.pictures, len(like), num_workers=source.num_workers)
    while True:
        found = False
        for pictures, _ in batches(loader, Faults(allowed_share=1.0)):
            if pictures.shape == like.shape:
                found = True
                yield pictures
        if not found:
            raise UsageError(
                f"--data gives no batch of {len(like)} pictures of {'x'.join(map(str, like.shape[1:]))}",
                "give more pictures, or lower --batch-size",
            )
