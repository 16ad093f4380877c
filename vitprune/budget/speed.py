"""From a speed to be reached to the plan that reaches it, by measurement on the device at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import nn

from vitprune.backbones import input_size, wrap
from vitprune.budget.gmacs import KEEP_STEPS, last_within
from vitprune.common.devices import Precision
from vitprune.errors import UsageError
from vitprune.measure.bound import ZeroOverheadViT
from vitprune.measure.throughput import benchmark
from vitprune.model import SparseViT, attach_as
from vitprune.schedule import NUM_STAGES, Schedule, Sparsity, Stage, default_stages

_SHARES = (0.75, 0.5, 0.25, 0.0625)
"""Of all patch tokens: where the time of blocks is measured; in between it is interpolated."""
_IN_HAND = 0.01
"""How much faster than asked the plan is to be, for the next measurement differs by about as much."""
_NEAR_ENOUGH = 0.02
_MAX_TRIES = 5
_LAST_LOOK_S = 3.0
_WORTH_A_STAGE = 0.04
"""How many more tokens, of those of all blocks of the dense model, two stages must keep to be better than three.

DynamicViT's ablation, DeiT-S at 2.9 GMACs: one, two, three stages have 77.4, 79.2, 79.3 % top-1; and from keep .7 to
.8, about a tenth of all tokens, are .3 points. So a tenth of a point is about 4 % of the tokens, and a single stage is
for what cannot be reached otherwise."""


@dataclass(frozen=True)
class SpeedTarget:
    """A speed to be reached, by one of two measures.

    Attributes:
        speedup: images per second over the dense model's, above 1; or None.
        latency_ms: time of a forward pass, passes back to back; or None.
        batch_size: images per pass.
        precision: of the pass.
    """

    speedup: float | None
    latency_ms: float | None
    batch_size: int
    precision: Precision

    def allowed_share(self, dense_ms: float) -> float:
        """What share of the dense model's time may be used."""
        return 1 / self.speedup if self.speedup is not None else (self.latency_ms or 0.0) / dense_ms

    def __str__(self) -> str:
        asked = f"--target-speedup {self.speedup:g}" if self.speedup else f"--target-latency-ms {self.latency_ms:g}"
        return f"{asked} at batch {self.batch_size}, {self.precision}"


@dataclass(frozen=True)
class Speed:
    """Dense and sparse, measured in turns.

    Attributes:
        dense_ms: median time of a forward pass.
        sparse_ms: the same of the sparse model.
    """

    dense_ms: float
    sparse_ms: float

    @property
    def speedup(self) -> float:
        """How many times as fast the sparse model is."""
        return self.dense_ms / self.sparse_ms


@dataclass(frozen=True)
class Promise:
    """What a plan was chosen for, and how fast its untrained model ran."""

    target: SpeedTarget
    speed: Speed

    def compared_with(self, outcome: Speed) -> dict[str, Any]:
        """Promise and outcome in JSON's types, units in the keys."""
        target = self.target
        share = outcome.sparse_ms / outcome.dense_ms
        return {
            "speedup": target.speedup,
            "latency_ms": target.latency_ms,
            "batch_size": target.batch_size,
            "precision": target.precision,
            "promised_speedup": self.speed.speedup,
            "promised_latency_ms": self.speed.sparse_ms,
            "measured_speedup": outcome.speedup,
            "measured_latency_ms": outcome.sparse_ms,
            "measured_dense_latency_ms": outcome.dense_ms,
            "met": share <= target.allowed_share(outcome.dense_ms),
        }


@dataclass(frozen=True)
class BlockTimes:
    """How much sooner a pass is over for each block that sees fewer tokens.

    Attributes:
        dense_ms: a pass of the dense model.
        counts: rising numbers of patch tokens, the last one all of them.
        saved_ms: what one block saves that sees so many; the last one 0.
    """

    dense_ms: float
    counts: tuple[int, ...]
    saved_ms: tuple[float, ...]

    def share(self, schedule: Schedule) -> float:
        """What share of the dense model's time a plan needs, choosing the tokens not counted."""
        saved = np.interp(schedule.tokens_per_block(), self.counts, self.saved_ms).sum()
        return 1.0 - float(saved) / self.dense_ms


def measure_speed(
    dense: nn.Module, sparse: nn.Module, target: SpeedTarget, device: torch.device, seconds: float = 1.0
) -> Speed:
    """Time a dense and a sparse model in turns, at the batch size and precision of `target`."""
    timings = _bench({"dense": dense, "sparse": sparse}, dense, target, device, seconds)
    return Speed(timings["dense"], timings["sparse"])


def measure_blocks(model: nn.Module, target: SpeedTarget, device: torch.device, seconds: float = 1.0) -> BlockTimes:
    """Time the model with all tokens, and with fewer of them (for free) from its second block on."""
    backbone = wrap(model)
    total, depth = backbone.num_patches, backbone.depth
    counts = sorted({max(1, int(total * share)) for share in _SHARES} - {total}, reverse=True)
    models: dict[str, nn.Module] = {str(total): model}
    for count in counts:
        schedule = Schedule(depth, total, (Stage(1, count / total, count),))
        models[str(count)] = ZeroOverheadViT(SparseViT(model, schedule, [nn.Identity()]))
    timings = _bench(models, model, target, device, seconds)
    blocks = depth - 1
    # Fewer tokens never take longer: where they seem to, that is noise, or a tile that is half empty.
    saved = np.maximum.accumulate([0.0, *((timings[str(total)] - timings[str(count)]) / blocks for count in counts)])
    return BlockTimes(timings[str(total)], (*reversed(counts), total), tuple(float(each) for each in saved[::-1]))


def find_plan(
    model: nn.Module,
    sparsity: Sparsity,
    target: SpeedTarget,
    device: torch.device,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Sparsity, Promise]:
    """The plan that keeps most and is still as fast as asked: a first guess from the time of blocks, then by trial.

    What choosing the tokens costs is what a trial needs more than the guess said; the next guess knows it. Fewer
    predictors are tried where this cost would rather keep tokens, unless the stages are given.

    Args:
        model: a timm model of a supported family, with weights.
        sparsity: the rest of the plan; its keep ratio is not used.
        target: the speed.
        device: where to run.
        tell: called with a sentence about each trial.

    Returns:
        The plan, its keep ratio to a thousandth, and how fast its untrained model ran when looked at once more; on a
        restless machine that may be slower than asked.

    Raises:
        UsageError: the dense model is as fast already, or no plan is.
    """
    blocks = measure_blocks(model, target, device)
    if target.allowed_share(blocks.dense_ms) >= 1:
        raise UsageError(
            f"{target} is what the dense model reaches already: {blocks.dense_ms:.3g} ms",
            "ask for more, or use the model as it is",
        )
    trials = _Trials(model, target, device, blocks, tell)
    best: _Found | None = None
    for stages in _stage_sets(sparsity, trials.backbone.depth):
        if best is not None and (len(stages) == 1 or not best.overhead_share / len(best.blocks) > _WORTH_A_STAGE):
            break
        found = trials.search(replace(sparsity, stages=stages))
        if found is not None and (best is None or found.tokens_share > best.tokens_share + _WORTH_A_STAGE):
            best = found
    if best is None:
        raise UsageError(
            f"{target} cannot be reached on {device}: {trials.nearest(sparsity)}",
            "ask for less, drop tokens earlier with --stages, or take a smaller model",
        )
    # The plan was chosen for having been fast in its trial, which luck helps: what is promised is measured anew.
    speed = measure_speed(model, attach_as(model, best.sparsity), target, device, _LAST_LOOK_S)
    tell(f"{best.sparsity.label} at stages {_listed(best.blocks)}, once more: {speed.speedup:.3f} x dense")
    return best.sparsity, Promise(target, speed)


@dataclass(frozen=True)
class _Found:
    """A plan that was tried."""

    sparsity: Sparsity
    speed: Speed
    blocks: tuple[int, ...]
    tokens_share: float
    overhead_share: float


class _Trials:
    """Plans tried for one target."""

    def __init__(
        self,
        model: nn.Module,
        target: SpeedTarget,
        device: torch.device,
        blocks: BlockTimes,
        tell: Callable[[str], None],
    ) -> None:
        self.model, self.target, self.device, self.blocks, self.tell = model, target, device, blocks, tell
        self.backbone = wrap(model)
        self.tried: list[_Found] = []

    def search(self, sparsity: Sparsity) -> _Found | None:
        """The plan that keeps most with these stages and was fast enough; None if none was."""
        overheads: list[float] = []
        best = None
        allowed = self.target.allowed_share(self.blocks.dense_ms)
        seen: set[float] = set()
        for _ in range(_MAX_TRIES):
            keep = self._guess(sparsity, allowed * (1 - _IN_HAND) - (fmean(overheads) if overheads else 0.0))
            if keep is None or keep in seen:
                break
            seen.add(keep)
            found = self._try(replace(sparsity, keep=keep))
            overheads.append(found.overhead_share)
            allowed = self.target.allowed_share(found.speed.dense_ms)
            reached = 1 / found.speed.speedup / allowed
            if reached <= 1 and (best is None or found.tokens_share > best.tokens_share):
                best = found
            if 1 - _NEAR_ENOUGH <= reached <= 1:
                break
        return best

    def nearest(self, sparsity: Sparsity) -> str:
        """How far one comes, for an error: the fastest plan tried, or what the time of blocks says of one token."""
        if self.tried:
            found = min(self.tried, key=lambda found: found.speed.sparse_ms)
            where, speed = f"{found.sparsity.label} at stages {_listed(found.blocks)} takes", found.speed
        else:
            dense = self.blocks.dense_ms
            where = "dropping nearly every token leaves about"
            speed = Speed(dense, dense * self.blocks.share(self._plan(sparsity, 1)))
        return f"{where} {speed.sparse_ms:.3g} ms, {speed.speedup:.2f} x as fast as dense"

    def _guess(self, sparsity: Sparsity, share: float) -> float | None:
        """The largest keep ratio, to a thousandth, that by the blocks needs at most this share; None if none does."""

        def cost(step: int) -> float:
            return self.blocks.share(self._plan(sparsity, step))

        step = last_within(share, cost, 1, KEEP_STEPS - 1)
        return step / KEEP_STEPS if cost(step) <= share else None

    def _plan(self, sparsity: Sparsity, step: int) -> Schedule:
        return replace(sparsity, keep=step / KEEP_STEPS).plan(self.backbone)

    def _try(self, sparsity: Sparsity) -> _Found:
        sparse = attach_as(self.model, sparsity)
        speed = measure_speed(self.model, sparse, self.target, self.device)
        schedule = sparse.schedule
        found = _Found(
            sparsity,
            speed,
            schedule.blocks,
            sum(schedule.tokens_per_block()) / (schedule.num_patches * schedule.depth),
            1 / speed.speedup - self.blocks.share(schedule),
        )
        self.tried.append(found)
        self.tell(
            f"{sparsity.label} at stages {_listed(found.blocks)}: {speed.sparse_ms:.3g} ms, {speed.speedup:.3f} x dense"
        )
        return found


def _stage_sets(sparsity: Sparsity, depth: int) -> Iterator[tuple[int, ...]]:
    """Which stages to try: those asked for, or the default ones and then fewer."""
    if sparsity.stages is not None:
        yield tuple(sparsity.stages)
        return
    yield from dict.fromkeys(default_stages(depth, number) for number in range(NUM_STAGES, 0, -1))


def _listed(blocks: tuple[int, ...]) -> str:
    return ",".join(map(str, blocks))


def _bench(
    models: dict[str, nn.Module], dense: nn.Module, target: SpeedTarget, device: torch.device, seconds: float
) -> dict[str, float]:
    """Median time of a pass in milliseconds, by name."""
    timings = benchmark(
        models,
        input_size(dense),
        [target.batch_size],
        device=device,
        precision=target.precision,
        rounds=6,
        min_seconds=seconds,
    )
    return {timing.model: timing.latency_ms_p50 for timing in timings}
