"""What a benchmark found: timings, and how they compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitprune.errors import UsageError


@dataclass(frozen=True)
class Timing:
    """How fast one model ran at one batch size.

    Attributes:
        model: its name in the benchmark.
        batch_size: images per forward pass.
        latency_ms_p50: median over the rounds of the mean time of a forward pass, passes back to back.
        latency_ms_p25: lower quartile of the same.
        latency_ms_p75: upper quartile of the same.
        images_per_s: from the median.
        peak_memory_mib: what PyTorch allocates for this model alone (weights, images, activations); None
            except on CUDA.
        num_runs: timed forward passes in all rounds together.
    """

    model: str
    batch_size: int
    latency_ms_p50: float
    latency_ms_p25: float
    latency_ms_p75: float
    images_per_s: float
    peak_memory_mib: float | None
    num_runs: int


@dataclass(frozen=True)
class Speedup:
    """How a model compares with the baseline at one batch size.

    Attributes:
        model: its name in the benchmark.
        batch_size: images per forward pass.
        ratio: its images per second over the baseline's; above 1 is faster.
        slower: whether it is slower than the baseline, and should be marked so.
    """

    model: str
    batch_size: int
    ratio: float
    slower: bool


def speedup(timings: Sequence[Timing], baseline: str) -> list[Speedup]:
    """Compare every timing, the baseline's own included, with the baseline at the same batch size.

    Raises:
        UsageError: the baseline was not timed at one of the batch sizes.
    """
    reference = {timing.batch_size: timing.images_per_s for timing in timings if timing.model == baseline}
    result = []
    for timing in timings:
        if timing.batch_size not in reference:
            raise UsageError(f"baseline {baseline!r} has no timing at batch size {timing.batch_size}")
        ratio = timing.images_per_s / reference[timing.batch_size]
        result.append(Speedup(timing.model, timing.batch_size, ratio, ratio < 1))
    return result
