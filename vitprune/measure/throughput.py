"""What a model costs in time: all models on the same images, in the same run, taking turns."""

from __future__ import annotations

import copy
import statistics
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from vitprune.errors import UsageError, VitpruneError
from vitprune.measure.devices import DTYPES, Precision
from vitprune.measure.timing import Timing

_MIN_WARM_UP_S = 0.3  # a GPU needs about this long to raise its clocks
_MAX_WARM_UP_S = 3.0
_STABLE_WITHIN = 1.1
_MIB = 2**20


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
    on_row: Callable[[Timing], None] | None = None,
) -> list[Timing]:
    """Time the forward passes of all models side by side, in inference mode.

    Every model is warmed up, then timed once per round, in alternating order, so that heat, clock changes and other
    programs hit all alike. The images (random, the same for all) are on the device already: loading and transfer
    are not part of the time.

    Lower precision means a copy of the model cast to it, not autocast: casting every operator's inputs anew takes so
    long at batch 1 that it would hide what fewer tokens save. Token predictors stay in fp32 by themselves.

    Args:
        models: by name; not changed, copies of them run.
        input_size: (C, H, W).
        batch_sizes: images per forward pass, each at least 1.
        device: where to run.
        precision: what weights and images are cast to.
        rounds: how often each model is timed, at least 2, so that each goes first and last.
        min_seconds: how long a model is timed at one batch size, all rounds together; a single pass may take longer.
        max_seconds: no further rounds once a batch size has been timed this long per model.
        on_row: called with each timing of a batch size as soon as that batch size is done.

    Returns:
        A timing per batch size and model, in the order given.

    Raises:
        UsageError: nothing to time, or a number is out of range.
        VitpruneError: out of memory; rows of earlier batch sizes have gone to `on_row`.
    """
    _check(models, batch_sizes, rounds)
    dtype = DTYPES[precision]
    with _explained_out_of_memory(f"loading {len(models)} model(s) on {device}", "name fewer models at once"):
        copies = {name: copy.deepcopy(model).to(device, dtype).eval() for name, model in models.items()}
    timings: list[Timing] = []
    for batch_size in batch_sizes:
        # Made on the CPU, so that every device and precision sees the same pictures.
        images = torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0))
        what, way_out = f"timing batch size {batch_size} on {device}", "try a lower --batch-size"
        with _explained_out_of_memory(what, way_out), torch.inference_mode():
            rows = _time_all(copies, images.to(device, dtype), rounds, min_seconds, max_seconds)
        timings += rows
        if on_row is not None:
            for row in rows:
                on_row(row)
    return timings


@dataclass
class _Runner:
    """One model during the rounds of one batch size."""

    name: str
    timer: timeit.Timer
    peak_memory_mib: float | None
    num_calls: int  # per round
    seconds: list[float] = field(default_factory=list)  # per call, one entry per round

    def time_block(self) -> float:
        """Time one round's calls, and return how long they took."""
        if self.num_calls > 1:
            self.timer.timeit(1)  # the caches hold the model before; a single call that fills a block hides that
        total = self.timer.timeit(self.num_calls)
        self.seconds.append(total / self.num_calls)
        return total

    def timing(self, batch_size: int) -> Timing:
        low, median, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        num_runs = self.num_calls * len(self.seconds)
        milliseconds = (1e3 * median, 1e3 * low, 1e3 * high)
        return Timing(self.name, batch_size, *milliseconds, batch_size / median, self.peak_memory_mib, num_runs)


def _time_all(
    models: Mapping[str, nn.Module], images: Tensor, rounds: int, min_seconds: float, max_seconds: float
) -> list[Timing]:
    runners = [_warmed_up(name, model, images, min_seconds / rounds) for name, model in models.items()]
    spent = 0.0
    for index in range(rounds):
        # Whole pairs of rounds only: in each pair every model is as often early as late.
        if index % 2 == 0 and index > 0 and spent > max_seconds * len(runners):
            break
        spent += sum(runner.time_block() for runner in (runners if index % 2 == 0 else reversed(runners)))
    return [runner.timing(len(images)) for runner in runners]


def _warmed_up(name: str, model: nn.Module, images: Tensor, block_seconds: float) -> _Runner:
    """Run until three calls in a row agree, within bounds, then choose how many calls fill a block."""
    # Not torch.utils.benchmark.Timer: its two warm-up calls per block triple the time where a call takes seconds,
    # and it waits for the current CUDA device only.
    timer = timeit.Timer(lambda: model(images), timer=_clock(images.device))
    times: list[float] = []
    while True:
        times.append(timer.timeit(1))
        recent, total = times[-3:], sum(times)
        if len(times) >= 3 and total >= _MIN_WARM_UP_S and max(recent) <= _STABLE_WITHIN * min(recent):
            break
        if len(times) >= 2 and total >= _MAX_WARM_UP_S:
            break
    # At least a nanosecond: clocks of some systems tick slowly.
    num_calls = max(1, round(block_seconds / max(min(recent), 1e-9)))
    return _Runner(name, timer, _peak_memory_mib(model, images), num_calls)


def _clock(device: torch.device) -> Callable[[], float]:
    """A clock that first waits for what the device still has to do."""
    if device.type == "cpu":
        return timeit.default_timer

    def synchronised() -> float:
        torch.accelerator.synchronize(device)
        return timeit.default_timer()

    return synchronised


def _peak_memory_mib(model: nn.Module, images: Tensor) -> float | None:
    """Peak of one pass as if the other models were not there."""
    if images.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(images.device)
    others = torch.cuda.memory_allocated(images.device)
    model(images)
    activations = torch.cuda.max_memory_allocated(images.device) - others
    own = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers(), [images]))
    return (activations + own) / _MIB


def _check(models: Mapping[str, nn.Module], batch_sizes: Sequence[int], rounds: int) -> None:
    if not models or not batch_sizes:
        raise UsageError(f"nothing to time: {len(models)} model(s), {len(batch_sizes)} batch size(s)")
    if min(batch_sizes) < 1:
        raise UsageError(f"batch size is {min(batch_sizes)}, expected at least 1", "try --batch-size 1,32")
    if rounds < 2:
        raise UsageError(f"number of rounds is {rounds}, expected at least 2")


@contextmanager
def _explained_out_of_memory(what: str, way_out: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # Only CUDA has its own class (a RuntimeError); MPS and the CPU's allocator say it in words.
        words = ("out of memory", "can't allocate memory")
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words):
            raise VitpruneError(f"out of memory while {what}", way_out) from error
        raise
