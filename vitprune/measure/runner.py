"""A stopwatch for one model: warmed up until stable, then timed in blocks."""

from __future__ import annotations

import gc
import timeit
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

MIN_WARM_UP_S = 0.3  # a GPU needs about this long to raise its clocks
MAX_WARM_UP_S = 3.0
_STABLE_WITHIN = 1.1
_SINGLE_PASSES = 20
"""Per block, where single passes are timed beside those back to back: 200 in ten blocks, enough for a p99."""


@dataclass
class Runner:
    """One model during the rounds of one batch size."""

    name: str
    forward: Callable[[], object]
    device: torch.device
    num_calls: int
    """Per block."""
    seconds: list[float] = field(default_factory=list)
    """Per pass of passes back to back, one entry per block."""
    single_seconds: list[float] = field(default_factory=list)
    """Of passes one by one, from the call to the result."""
    peak_memory_mib: float | None = None

    def time_block(self) -> float:
        """Time one block of passes, and return how long that took."""
        started = timeit.default_timer()
        was_on = gc.isenabled()
        gc.disable()  # as timeit does
        try:
            if self.num_calls > 1:
                self.forward()  # the caches hold the model before; a single call that fills a block hides that
            if self.device.type == "cpu":
                times = time_calls(self.forward, self.num_calls, self.device)
                total, single = sum(times), times
            else:
                total = time_together(self.forward, self.num_calls, self.device)
                single = time_calls(self.forward, min(self.num_calls, _SINGLE_PASSES), self.device)
        finally:
            if was_on:
                gc.enable()
        self.seconds.append(total / self.num_calls)
        self.single_seconds += single
        return timeit.default_timer() - started


def warmed_up(name: str, forward: Callable[[], object], device: torch.device, block_seconds: float) -> Runner:
    """Run until three passes in a row agree, within bounds, then choose how many fill a block.

    A single pass may take longer than a block is to take.
    """
    # Not torch.utils.benchmark.Timer: its two warm-up calls per block triple the time where a call takes seconds,
    # and it waits for the current CUDA device only.
    times: list[float] = []
    while True:
        times += time_calls(forward, 1, device)
        recent, total = times[-3:], sum(times)
        if len(times) >= 3 and total >= MIN_WARM_UP_S and max(recent) <= _STABLE_WITHIN * min(recent):
            break
        if len(times) >= 2 and total >= MAX_WARM_UP_S:
            break
    # At least a nanosecond: clocks of some systems tick slowly.
    return Runner(name, forward, device, max(1, round(block_seconds / max(min(recent), 1e-9))))


def time_calls(run: Callable[[], object], num_calls: int, device: torch.device) -> list[float]:
    """How long each call takes to its result, in seconds."""
    clock = _synchronised_clock(device)
    marks = [clock()]
    for _ in range(num_calls):
        run()
        marks.append(clock())
    return [after - before for before, after in pairwise(marks)]


def time_together(run: Callable[[], object], num_calls: int, device: torch.device) -> float:
    """How long calls take that do not wait for each other's results, in seconds."""
    if device.type != "cuda":
        clock = _synchronised_clock(device)
        started = clock()
        for _ in range(num_calls):
            run()
        return clock() - started
    with torch.cuda.device(device):
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        begin, end = events
        torch.cuda.synchronize()
        begin.record()
        for _ in range(num_calls):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def cuda_peak_mib(run: Callable[[], object], model: nn.Module, images: Tensor) -> float | None:
    """Weights, images, and what the pass `run` allocates at most on CUDA, in MiB, other models not counted.

    None on other devices: PyTorch does not count what it allocates on them.
    """
    if images.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    run()
    activations = torch.cuda.max_memory_allocated(images.device) - before
    weights = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    return (weights + images.nbytes + activations) / 2**20


def _synchronised_clock(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that first waits for what the device still has to do."""
    if device.type == "cpu":
        return timeit.default_timer

    def synchronised() -> float:
        torch.accelerator.synchronize(device)
        return timeit.default_timer()

    return synchronised
