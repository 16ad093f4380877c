"""What a benchmark found: timings, and how they compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vitprune.errors import UsageError
from vitprune.measure.modes import Mode

Attention = Literal["fused", "unfused"]
"""timm's two ways to compute attention: PyTorch's scaled_dot_product_attention, or product, softmax, product."""


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
        peak_memory_mib: what PyTorch allocates for this model alone (weights, images, activations), of a CUDA graph in
            an eager pass; None on devices that do not tell.
        num_runs: timed forward passes in all rounds together.
        single_pass_ms_p50: median time of one pass alone, from its call until its result is there.
        single_pass_ms_p90: what nine of ten such passes stay below.
        single_pass_ms_p99: what 99 of 100 such passes stay below; of few passes about the slowest.
        num_single_passes: how many such passes there were.
        loader_images_per_s: with images read, decoded and moved to the device; None where not measured.
        mode: how it ran, see `vitprune.measure.modes`.
        attention: which of timm's kernels its attention used.
    """

    model: str
    batch_size: int
    latency_ms_p50: float
    latency_ms_p25: float
    latency_ms_p75: float
    images_per_s: float
    peak_memory_mib: float | None
    num_runs: int
    single_pass_ms_p50: float | None = None
    single_pass_ms_p90: float | None = None
    single_pass_ms_p99: float | None = None
    num_single_passes: int = 0
    loader_images_per_s: float | None = None
    mode: Mode = "eager"
    attention: Attention = "fused"


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
