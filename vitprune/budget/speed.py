"""From a target for speed to the plan that meets it, by measurement on the device at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from vitprune.backbones import input_size, wrap
from vitprune.budget.gmacs import last_within
from vitprune.common.devices import Precision
from vitprune.common.progress import Listener
from vitprune.errors import UsageError
from vitprune.measure.bound import ZeroOverheadViT
from vitprune.measure.throughput import benchmark
from vitprune.model import SparseViT, attach_as
from vitprune.schedule import NUM_STAGES, Sparsity, default_stages, schedule_for

_KEEP_STEPS = 200
"""Keep ratios are tried in steps of half a percent: finer ones are noise on the clock."""
_MARGIN = 0.01
"""How much faster than the target a plan is to be, for the next measurement differs by about as much."""
_FEWEST, _MOST = 4, 10
"""Trials near the target before their mean may be believed, and trials in all."""
_NEAR = 0.1
"""Trials whose share of the tokens differs by more than this from the wanted one say little of the level there."""
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
        """Share of the dense model's time that may be used."""
        return 1 / self.speedup if self.speedup is not None else (self.latency_ms or 0.0) / dense_ms

    def __str__(self) -> str:
        asked = f"--target-speedup {self.speedup:g}" if self.speedup else f"--target-latency-ms {self.latency_ms:g}"
        return f"{asked} at batch {self.batch_size}, {self.precision}"


@dataclass(frozen=True)
class Speed:
    """Dense and sparse, measured interleaved.

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
class Prediction:
    """The speed that a plan was chosen for, and how fast its untrained model ran."""

    target: SpeedTarget
    speed: Speed

    def compared_with(self, outcome: Speed) -> dict[str, Any]:
        """Target, prediction and outcome in JSON's types, units in the keys."""
        target = self.target
        share = outcome.sparse_ms / outcome.dense_ms
        return {
            "speedup": target.speedup,
            "latency_ms": target.latency_ms,
            "batch_size": target.batch_size,
            "precision": target.precision,
            "predicted_speedup": self.speed.speedup,
            "predicted_latency_ms": self.speed.sparse_ms,
            "measured_speedup": outcome.speedup,
            "measured_latency_ms": outcome.sparse_ms,
            "measured_dense_latency_ms": outcome.dense_ms,
            "met": share <= target.allowed_share(outcome.dense_ms),
        }


@dataclass(frozen=True)
class _Trial:
    """A plan that was measured.

    Attributes:
        sparsity: the plan.
        model: its untrained model.
        speed: what was measured.
        tokens_share: tokens that all blocks together see, as a share of the dense model's.
    """

    sparsity: Sparsity
    model: SparseViT
    speed: Speed
    tokens_share: float

    def __str__(self) -> str:
        return (
            f"{self.sparsity.label} at stages {','.join(map(str, self.model.schedule.blocks))}: "
            f"{self.speed.sparse_ms:.3g} ms, {self.speed.speedup:.3f} x dense"
        )


def measure_speed(
    dense: nn.Module, sparse: nn.Module, target: SpeedTarget, device: torch.device, seconds: float = 1.0
) -> Speed:
    """Time a dense and a sparse model interleaved, at the batch size and precision of `target`."""
    timings = _bench({"dense": dense, "sparse": sparse}, target, device, seconds)
    return Speed(timings["dense"], timings["sparse"])


def find_plan(
    model: nn.Module, sparsity: Sparsity, target: SpeedTarget, device: torch.device, listener: Listener
) -> tuple[Sparsity, Prediction]:
    """The plan that keeps most and is as fast as the target, by plans that are measured beside dense.

    Single measurements differ by several percent where other programs run, so none decides: time is taken to rise with
    the tokens along a line through all of them, and the next plan tried is where that line meets the target.

    Fewer stages are tried where choosing the tokens takes so long that it would rather keep tokens, unless the stages
    are given.

    Args:
        model: a timm model of a supported family, with weights.
        sparsity: the rest of the plan; its keep ratio is not used.
        target: the speed.
        device: where to run.
        listener: hears of each trial.

    Returns:
        The plan, and how fast its untrained model is by all measurements together.

    Raises:
        UsageError: the dense model is as fast already, or no plan is.
    """
    listener.begin("timing plans", None)
    search = _Search(model, target, device, listener)
    best: _Trial | None = None
    fewer = (default_stages(wrap(model).depth, number) for number in range(NUM_STAGES, 0, -1))
    for stages in dict.fromkeys(fewer) if sparsity.prune_at is None else [tuple(sparsity.prune_at)]:
        if best is not None and (len(stages) == 1 or search.overhead_share(best) / len(stages) <= _WORTH_A_STAGE):
            break
        found = search.find(replace(sparsity, prune_at=stages))
        if found is not None and (best is None or found.tokens_share > best.tokens_share + _WORTH_A_STAGE):
            best = found
    if best is None:
        fastest = min(search.trials, key=lambda trial: trial.speed.sparse_ms)
        raise UsageError(
            f"{target} cannot be reached on {device}; the fastest plan is {fastest}",
            "ask for less, drop tokens earlier with --prune-at, or take a smaller model",
        )
    listener.say(f"all {len(search.trials)} trials together: {best}")
    return best.sparsity, Prediction(target, best.speed)


class _Search:
    """Measures plans for one target."""

    def __init__(self, model: nn.Module, target: SpeedTarget, device: torch.device, listener: Listener) -> None:
        self.model, self.target, self.device, self.listener = model, target, device, listener
        self.backbone = wrap(model)
        self.trials: list[_Trial] = []

    def find(self, sparsity: Sparsity) -> _Trial | None:
        """The plan with these stages that keeps most and meets the target, as fast as a line through trials says.

        None if no plan meets it.
        """
        trials = [self.measure(replace(sparsity, keep=1 / _KEEP_STEPS))]  # the fastest: can the target be met at all?
        if trials[0].speed.sparse_ms > self._allowed_ms(trials):
            return None
        while True:
            line = _Line([(each.tokens_share, 1 / each.speed.speedup) for each in trials])
            dense_ms = median(each.speed.dense_ms for each in trials)
            step = self._most_that_fits(sparsity, line, self._allowed_ms(trials) / dense_ms)
            chosen = replace(sparsity, keep=step / _KEEP_STEPS)
            share = self._tokens_share(chosen)
            if len(trials) >= _MOST or (len(trials) > _FEWEST and line.doubt(share) < _MARGIN):
                speed = Speed(dense_ms, dense_ms * line.at(share))
                return _Trial(chosen, attach_as(self.model, chosen), speed, share)
            trials.append(self.measure(chosen))

    def _allowed_ms(self, trials: Sequence[_Trial]) -> float:
        dense_ms = median(each.speed.dense_ms for each in trials)
        return (1 - _MARGIN) * self.target.allowed_share(dense_ms) * dense_ms

    def _most_that_fits(self, sparsity: Sparsity, line: _Line, share: float) -> int:
        """The highest keep ratio that takes at most this share of the dense model's time, in steps."""

        def time(step: int) -> float:
            return line.at(self._tokens_share(replace(sparsity, keep=step / _KEEP_STEPS)))

        return last_within(share, time, 1, _KEEP_STEPS - 1)

    def _tokens_share(self, sparsity: Sparsity) -> float:
        schedule = schedule_for(self.backbone, sparsity)
        return sum(schedule.tokens_per_block()) / (schedule.num_patches * schedule.depth)

    def measure(self, sparsity: Sparsity) -> _Trial:
        """Time a plan beside the dense model."""
        sparse = attach_as(self.model, sparsity)
        speed = measure_speed(self.model, sparse, self.target, self.device)
        if self.target.allowed_share(speed.dense_ms) >= 1:
            raise UsageError(
                f"{self.target} is what the dense model reaches already: {speed.dense_ms:.3g} ms",
                "ask for more, or use the model as it is",
            )
        trial = _Trial(sparsity, sparse, speed, self._tokens_share(sparsity))
        self.trials.append(trial)
        self.listener.say(str(trial))
        return trial

    def overhead_share(self, trial: _Trial) -> float:
        """What choosing the tokens takes, as a share of the dense model's time."""
        models = {"dense": self.model, "sparse": trial.model, "bound": ZeroOverheadViT(trial.model)}
        timings = _bench(models, self.target, self.device, 1.0)
        return (timings["sparse"] - timings["bound"]) / timings["dense"]


class _Line:
    """Time over tokens, both as shares of the dense model's: a line through trials.

    Those near the point that is asked for say how high it lies there, the others how steep it is. While there are no
    three, the dense model is one more; later it would mislead, for it chooses no tokens.
    """

    def __init__(self, trials: Sequence[tuple[float, float]]) -> None:
        dense = [(1.0, 1.0)] if len(trials) < 3 else []
        self.x, self.y = (np.array(values) for values in zip(*trials, *dense, strict=True))

    def at(self, x: float) -> float:
        """The share of the time that a share of the tokens takes."""
        weights = self._weights(x)
        x_mean, y_mean = np.average(self.x, weights=weights), np.average(self.y, weights=weights)
        spread = weights * (self.x - x_mean)
        slope = spread @ (self.y - y_mean) / (spread @ (self.x - x_mean))
        return float(y_mean + slope * (x - x_mean))

    def doubt(self, x: float) -> float:
        """The standard error there, as a share of the value, by how far trials near it lie from the line."""
        near = np.abs(self.x - x) < _NEAR
        if near.sum() < _FEWEST:
            return math.inf
        off = [y / self.at(own) - 1 for own, y in zip(self.x[near], self.y[near], strict=True)]
        return float(np.sqrt(np.square(off).sum() / (near.sum() - 1) / near.sum()))

    def _weights(self, x: float) -> np.ndarray[Any, Any]:
        return 1 / (1 + np.square((self.x - x) / _NEAR))


def _bench(models: dict[str, nn.Module], target: SpeedTarget, device: torch.device, seconds: float) -> dict[str, float]:
    """Median time of a pass in milliseconds, by name; the first model is dense."""
    timings = benchmark(
        models,
        input_size(models["dense"]),
        [target.batch_size],
        device=device,
        precision=target.precision,
        rounds=6,
        min_seconds=seconds,
    )
    return {timing.model: timing.latency_ms_p50 for timing in timings}
