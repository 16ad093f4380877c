"""Throughput as an application has it: images read, decoded and moved to the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitprune.data import Faults, Images, ImageSet, batches, make_loader
from vitprune.errors import UsageError
from vitprune.measure.runner import Runner, synchronised_clock


@dataclass(frozen=True)
class ImageSource:
    """Images to time with.

    Attributes:
        images: with the model's evaluation transform set.
        num_workers: processes that read them.
        seconds: how long each model is timed, at least two batches.
    """

    images: Images
    num_workers: int
    seconds: float = 2.0


def check_source(source: ImageSource, batch_sizes: Sequence[int]) -> None:
    """Make sure that there is a whole batch of images.

    Raises:
        UsageError: there are fewer.
    """
    images = source.images
    if isinstance(images, ImageSet) and len(images) < max(batch_sizes):
        raise UsageError(
            f"--data has {len(images)} images, which make no batch of {max(batch_sizes)}",
            "give more images, or lower --batch-size",
        )


def time_with_loader(runners: Sequence[Runner], source: ImageSource, images: Tensor) -> dict[str, float]:
    """Images per second of each model with reading, decoding and transfer, from the second batch on.

    One model after the other: two loaders at a time would fight for the same cores.

    Args:
        runners: the models.
        source: the images; it begins again where it ends, unreadable ones are left out.
        images: what the models were prepared with: shape, dtype and device are theirs.
    """
    return {runner.name: _rate(runner, source, images) for runner in runners}


def _rate(runner: Runner, source: ImageSource, like: Tensor) -> float:
    clock, count, started = synchronised_clock(like.device), 0, None
    for images in _whole_batches(source, like):
        runner.forward.run_on(images.to(like.device, like.dtype))
        if started is None:  # worker processes have begun by now
            started = clock()
            continue
        count += len(images)
        if count > len(images) and clock() - started >= source.seconds:
            break
    assert started is not None
    return count / (clock() - started)


def _whole_batches(source: ImageSource, like: Tensor) -> Iterator[Tensor]:
    """Batches of the shape of `like`, without end."""
    loader: Any = make_loader(source.images, len(like), num_workers=source.num_workers)
    while True:
        found = False
        for images, _ in batches(loader, Faults(allowed_share=1.0)):
            if images.shape == like.shape:
                found = True
                yield images
        if not found:
            raise UsageError(
                f"--data gives no batch of {len(like)} images of {'x'.join(map(str, like.shape[1:]))}",
                "give more images, or lower --batch-size",
            )
