"""What a model costs in time, and how much faster that is: all models on the same images, in one run, taking turns."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.common.devices import DTYPES, Precision, explained_out_of_memory
from vitprune.common.progress import SILENT, Listener
from vitprune.errors import UsageError
from vitprune.measure.modes import Mode, prepare
from vitprune.measure.runner import Runner, cuda_peak_mib, warmed_up


@dataclass(frozen=True)
class Timing:
    """How fast one model ran at one batch size.

    Attributes:
        latency_ms_p50: median over the rounds of the mean time of a forward pass, passes back to back; beside it its
            quartiles.
        images_per_s: from the median.
        peak_memory_mib: what PyTorch allocates on CUDA for this model alone (weights, images, activations), of a CUDA
            graph in an eager pass; None on other devices.
        num_runs: timed forward passes in all rounds together.
        single_pass_ms_p50: median time of one pass alone, from its call to its result; percentiles beside it, of few
            passes the 99th is about the slowest.
        mode: how it ran, see `vitprune.measure.modes`.
        rounds_ms: mean time of a pass in each round; what models took in one round is comparable, whatever else ran.
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
    mode: Mode = "eager"
    rounds_ms: tuple[float, ...] = ()


def benchmark(
    models: Mapping[str, nn.Module],
    input_size: tuple[int, int, int],
    batch_sizes: Sequence[int],
    *,
    device: torch.device,
    precision: Precision,
    rounds: int = 10,
    min_seconds: float = 2.0,
    max_seconds: float = 60.0,
    mode: Mode = "eager",
    listener: Listener = SILENT,
) -> list[Timing]:
    """Time the forward passes of all models side by side, in inference mode.

    Every model is warmed up, then timed once per round, in alternating order, so that heat, clock changes and other
    programs hit all alike. The images (random, the same for all) are on the device already: loading and transfer
    are not part of the time. On CUDA passes back to back are timed by events on the GPU, single passes by the clock.

    Lower precision means a copy of the model cast to it, not autocast: casting every operator's inputs anew takes so
    long at batch 1 that it would hide what fewer tokens save. Token predictors stay in fp32 by themselves.

    Models are not changed, copies of them run on images (C, H, W). Each is timed at least twice, so that it goes first
    and last, and at one batch size for `min_seconds`, all rounds together; a single pass may take longer. There are no
    further rounds once a batch size has been timed for `max_seconds` per model. The listener advances by one for every
    model, batch size by batch size.

    Returns:
        A timing per batch size and model, in the order given.

    Raises:
        UsageError: nothing to time, or a number is out of range.
        VitpruneError: out of memory, or a model does not compile.
    """
    if not models or not batch_sizes:
        raise UsageError(f"nothing to time: {len(models)} model(s), {len(batch_sizes)} batch size(s)")
    if min(batch_sizes) < 1:
        raise UsageError(f"batch size is {min(batch_sizes)}, expected at least 1", "try --batch-size 1,32")
    if rounds < 2:
        raise UsageError(f"number of rounds is {rounds}, expected at least 2")
    dtype = DTYPES[precision]
    with explained_out_of_memory(f"loading {len(models)} model(s) on {device}", "name fewer models at once"):
        # Copied together: models that share a backbone still share it, and a large one is in memory once.
        copies = {name: model.to(device, dtype).eval() for name, model in copy.deepcopy(dict(models)).items()}
    timings: list[Timing] = []
    for batch_size in batch_sizes:
        # Made on the CPU, so that every device and precision sees the same images.
        images = torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0))
        what, way_out = f"timing batch size {batch_size} on {device}", "try a lower --batch-size"
        with explained_out_of_memory(what, way_out), torch.inference_mode():
            runners = _runners(copies, images.to(device, dtype), mode, min_seconds / rounds)
            _time_in_turns(runners, rounds, max_seconds)
        if mode == "compile":
            torch.compiler.reset()  # the next batch size has another shape, and memory is not endless
        timings += [_timing(runner, batch_size, mode) for runner in runners]
        listener.advance(len(runners))
    return timings


def _runners(models: Mapping[str, nn.Module], images: Tensor, mode: Mode, block_seconds: float) -> list[Runner]:
    runners = []
    for name, model in models.items():
        runner = warmed_up(name, prepare(model, images, mode), images.device, block_seconds)
        # Replaying a graph allocates nothing; what it holds is what its eager pass needs.
        shown = prepare(model, images, "eager") if mode == "cudagraphs" else runner.forward
        runner.peak_memory_mib = cuda_peak_mib(shown, model, images)
        runners.append(runner)
    return runners


def _time_in_turns(runners: list[Runner], rounds: int, max_seconds: float) -> None:
    spent = 0.0
    for index in range(rounds):
        # Whole pairs of rounds only: in each pair every model is as often early as late.
        if index % 2 == 0 and index > 0 and spent > max_seconds * len(runners):
            break
        spent += sum(runner.time_block() for runner in (runners if index % 2 == 0 else reversed(runners)))


def _timing(runner: Runner, batch_size: int, mode: Mode) -> Timing:
    low, median, high = (1e3 * np.percentile(runner.seconds, (25, 50, 75))).tolist()
    half, most, nearly_all = (1e3 * np.percentile(runner.single_seconds, (50, 90, 99))).tolist()
    return Timing(
        runner.name,
        batch_size,
        latency_ms_p50=median,
        latency_ms_p25=low,
        latency_ms_p75=high,
        images_per_s=1e3 * batch_size / median,
        peak_memory_mib=runner.peak_memory_mib,
        num_runs=runner.num_calls * len(runner.seconds),
        single_pass_ms_p50=half,
        single_pass_ms_p90=most,
        single_pass_ms_p99=nearly_all,
        num_single_passes=len(runner.single_seconds),
        mode=mode,
        rounds_ms=tuple(1e3 * seconds for seconds in runner.seconds),
    )


def speedups(name: str, timings: Sequence[Timing], baseline: str = "dense") -> list[dict[str, Any]]:
    """A model beside another that was timed with it, at each batch size, for JSON.

    `speedup` is its images per second over the baseline's, `speedup_ci95` see `interval`, and `slower` whether it is
    slower beyond what the rounds differ by.
    """
    others = {timing.batch_size: timing for timing in timings if timing.model == baseline}
    return [
        {"batch_size": timing.batch_size, **speedup(timing, others[timing.batch_size])}
        for timing in timings
        if timing.model == name
    ]


def speedup(timing: Timing, baseline: Timing) -> dict[str, Any]:
    """As `speedups`, of one timing and its baseline, without the batch size."""
    ratio = timing.images_per_s / baseline.images_per_s
    pairs = [dense / sparse for dense, sparse in zip(baseline.rounds_ms, timing.rounds_ms, strict=True)]
    between = interval(pairs)
    if between is not None:
        between = [min(between[0], ratio), max(between[1], ratio)]
    return {"speedup": ratio, "speedup_ci95": between, "slower": (ratio if between is None else between[1]) < 1}


def interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % confidence interval of the median, from order statistics; None of fewer than six values."""
    count = len(values)
    # The median lies below the k-th smallest value with the probability of fewer than k heads in `count` tosses.
    tails = [sum(comb(count, heads) for heads in range(k)) / 2**count for k in range(1, count + 1)]
    inner = sum(tail <= 0.025 for tail in tails)
    return [sorted(values)[inner - 1], sorted(values)[-inner]] if inner else None


def unclear(between: Sequence[float] | None) -> bool:
    """Whether the interval of a speed-up holds both slower and faster."""
    return between is not None and between[0] < 1 <= between[1]


def remark(slower: bool, between: Sequence[float] | None) -> str:
    """What a speed-up must not be shown without: "SLOWER", "within noise", or nothing."""
    return "SLOWER" if slower else "within noise" if unclear(between) else ""
