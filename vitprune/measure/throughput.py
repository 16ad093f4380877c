"""What a model costs in time: all models on the same images, in the same run, taking turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vitprune.common.devices import DTYPES, Precision
from vitprune.common.oom import explained_out_of_memory
from vitprune.errors import UsageError
from vitprune.measure.attention import AttentionChoice, choose_attention
from vitprune.measure.loader import ImageSource, time_with_loader
from vitprune.measure.memory import peak_memory_mib
from vitprune.measure.modes import Mode, prepare
from vitprune.measure.runner import Runner, warmed_up
from vitprune.measure.timing import Attention, Timing


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
    attention: AttentionChoice = "fused",
    source: ImageSource | None = None,
    on_row: Callable[[Timing], None] | None = None,
) -> list[Timing]:
    """Time the forward passes of all models side by side, in inference mode.

    Every model is warmed up, then timed once per round, in alternating order, so that heat, clock changes and other
    programs hit all alike. The images (random, the same for all) are on the device already: loading and transfer
    are not part of the time, unless `source` asks for that beside it. On CUDA passes back to back are timed by
    events on the GPU, single passes by the clock from call to result.

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
        mode: how all of them run.
        attention: timm's kernel, the same for all; "auto" takes the one with which the first model is faster.
        source: images to be read, decoded and moved in a second measurement; None for none.
        on_row: called with each timing of a batch size as soon as that batch size is done.

    Returns:
        A timing per batch size and model, in the order given.

    Raises:
        UsageError: nothing to time, or a number is out of range.
        VitpruneError: out of memory, or a model does not compile; rows of earlier batch sizes have gone to `on_row`.
    """
    _check(models, batch_sizes, rounds)
    dtype = DTYPES[precision]
    with explained_out_of_memory(f"loading {len(models)} model(s) on {device}", "name fewer models at once"):
        # Copied together: models that share a backbone still share it, and a large one is there once.
        copies = {name: model.to(device, dtype).eval() for name, model in copy.deepcopy(dict(models)).items()}
    timings: list[Timing] = []
    for batch_size in batch_sizes:
        # Made on the CPU, so that every device and precision sees the same images.
        images = torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0))
        what, way_out = f"timing batch size {batch_size} on {device}", "try a lower --batch-size"
        with explained_out_of_memory(what, way_out), torch.inference_mode():
            there = images.to(device, dtype)
            kernel = choose_attention(copies, there, attention)
            runners = _runners(copies, there, mode, min_seconds / rounds)
            _time_in_turns(runners, rounds, max_seconds)
            rates = time_with_loader(runners, source, there) if source is not None else {}
            rows = [_timing(runner, batch_size, mode, kernel, rates.get(runner.name)) for runner in runners]
        if mode == "compile":
            torch.compiler.reset()  # the next batch size has another shape, and memory is not endless
        timings += rows
        if on_row is not None:
            for row in rows:
                on_row(row)
    return timings


def _runners(models: Mapping[str, nn.Module], images: Tensor, mode: Mode, block_seconds: float) -> list[Runner]:
    runners = []
    for name, model in models.items():
        forward = prepare(model, images, mode)
        runner = warmed_up(name, forward, images.device, block_seconds)
        # Replaying a graph allocates nothing; what it holds is what its eager pass needs.
        shown = prepare(model, images, "eager") if mode == "cudagraphs" else forward
        runner.peak_memory_mib = peak_memory_mib(shown.run, model, images)
        runners.append(runner)
    return runners


def _time_in_turns(runners: list[Runner], rounds: int, max_seconds: float) -> None:
    spent = 0.0
    for index in range(rounds):
        # Whole pairs of rounds only: in each pair every model is as often early as late.
        if index % 2 == 0 and index > 0 and spent > max_seconds * len(runners):
            break
        spent += sum(runner.time_block() for runner in (runners if index % 2 == 0 else reversed(runners)))


def _timing(runner: Runner, batch_size: int, mode: Mode, kernel: Attention, loader_rate: float | None) -> Timing:
    low, median, high = (1e3 * seconds for seconds in runner.quartiles())
    half, most, nearly_all = (1e3 * seconds for seconds in runner.single_pass_percentiles(50, 90, 99))
    return Timing(
        runner.name,
        batch_size,
        median,
        low,
        high,
        1e3 * batch_size / median,
        runner.peak_memory_mib,
        runner.num_calls * len(runner.seconds),
        half,
        most,
        nearly_all,
        num_single_passes=len(runner.single_seconds),
        loader_images_per_s=loader_rate,
        mode=mode,
        attention=kernel,
    )


def _check(models: Mapping[str, nn.Module], batch_sizes: Sequence[int], rounds: int) -> None:
    if not models or not batch_sizes:
        raise UsageError(f"nothing to time: {len(models)} model(s), {len(batch_sizes)} batch size(s)")
    if min(batch_sizes) < 1:
        raise UsageError(f"batch size is {min(batch_sizes)}, expected at least 1", "try --batch-size 1,32")
    if rounds < 2:
        raise UsageError(f"number of rounds is {rounds}, expected at least 2")
