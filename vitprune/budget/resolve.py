"""From what a user asks for to a plan: the one way, for the command line and for Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from vitprune.backbones import input_size, wrap
from vitprune.budget.gmacs import keep_for_gmacs
from vitprune.budget.speed import Prediction, SpeedTarget, find_plan
from vitprune.common import distributed
from vitprune.common.devices import pick_device, pick_precision
from vitprune.common.progress import SILENT, Listener
from vitprune.errors import UsageError
from vitprune.measure.macs import count_macs
from vitprune.model import attach_as
from vitprune.schedule import PredictorName, Pruned, ScheduleName, Sparsity, middle, schedule_for


@dataclass(frozen=True)
class PlanRequest:
    """What is asked of a plan; None leaves it to the defaults. At most one of keep, tokens_left and targets is given.

    Attributes:
        keep: share of patch tokens that one stage keeps, in (0, 1); or a range that one training is for, (0.5, 0.9).
        prune_at: block indices before which predictors act.
        tokens_left: shares of the original tokens left after each stage.
        token_schedule: how the stages share the work.
        pruned: what happens to pruned tokens.
        predictor: what scores tokens.
        align: token counts in multiples of this.
        target_gmacs: most multiply-accumulates of one image, in billions.
        target_speedup: images per second over the dense model's, measured; above 1.
        target_latency_ms: time of a pass, measured.
        target_batch_size: images per pass in these measurements; 32 if None.
        precision: of a pass in these measurements: "auto", "fp32", "bf16" or "fp16"; None is fp32.
        device: where to measure: "auto", "cpu", "cuda", "cuda:N" or "mps".
        dense_too: whether a plan may prune nothing, for a comparison with those that do.

    Raises:
        UsageError: a value out of range, or two that exclude each other.
    """

    keep: float | Sequence[float] | None = None
    prune_at: Sequence[int] | None = None
    tokens_left: Sequence[float] | None = None
    token_schedule: ScheduleName | None = None
    pruned: Pruned | None = None
    predictor: PredictorName | None = None
    align: int = 1
    target_gmacs: float | None = None
    target_speedup: float | None = None
    target_latency_ms: float | None = None
    target_batch_size: int | None = None
    precision: str | None = None
    device: str = "auto"
    dense_too: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        given = {
            "--keep": self.keep,
            "--target-gmacs": self.target_gmacs,
            "--tokens-left": self.tokens_left,
            "--target-speedup": self.target_speedup,
            "--target-latency-ms": self.target_latency_ms,
        }
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} are mutually exclusive", "give one of them")
        if self.tokens_left is not None and self.token_schedule is not None:
            raise UsageError(
                "--tokens-left is a schedule of its own; --token-schedule goes with --keep or --target-gmacs"
            )
        how = {"--target-batch-size": self.target_batch_size, "--target-precision": self.precision}
        idle = [name for name, value in how.items() if value is not None]
        if idle and self.measured is None:
            raise UsageError(
                f"{idle[0]} says how a target is measured, and there is none", "add --target-speedup or leave it out"
            )
        for name, value, other in (("--keep", self.keep, "0.7"), ("--tokens-left", self.tokens_left, "0.8,0.6,0.4")):
            if not self.dense_too and (value == 1 or (isinstance(value, Sequence) and value and min(value) == 1)):
                raise UsageError(f"{name} 1 prunes nothing: the dense model is what you have", f"try {name} {other}")
        self.sparsity(Sparsity())  # raises what is wrong with the rest
        for name, value, least, example in (
            ("--target-speedup", self.target_speedup, 1, 1.5),
            ("--target-latency-ms", self.target_latency_ms, 0, 10),
        ):
            if value is not None and not least < value < math.inf:
                raise UsageError(f"{name} is {value:g}, expected more than {least}", f"try {name} {example}")

    @property
    def measured(self) -> str | None:
        """The option whose value is found by measuring, if there is one."""
        if self.target_speedup is not None:
            return "--target-speedup"
        return None if self.target_latency_ms is None else "--target-latency-ms"

    @property
    def by_keep(self) -> bool:
        """Whether a keep ratio alone says how much is pruned, and nothing where."""
        others = (self.prune_at, self.tokens_left, self.target_gmacs, self.measured)
        return all(each is None for each in others)

    @property
    def is_empty(self) -> bool:
        """Whether everything is left to the defaults; the device is nothing that is asked of a plan."""
        return self == PlanRequest(device=self.device)

    def sparsity(self, defaults: Sparsity) -> Sparsity:
        """The part that needs neither a model nor a measurement.

        Args:
            defaults: what applies where nothing is asked for.
        """
        if self.predictor is not None and defaults.predictor == "attention":
            raise UsageError(
                f"--predictor {self.predictor} would have to be trained, and the recipe does not train",
                "leave it out, or take --recipe short",
            )
        return replace(
            defaults,
            **Sparsity.asked(defaults.keep if self.keep is None else self.keep),
            prune_at=self.prune_at,
            token_schedule=self.token_schedule or defaults.token_schedule,
            tokens_left=self.tokens_left,
            pruned=self.pruned or defaults.pruned,
            predictor=self.predictor or defaults.predictor,
            align=self.align,
        )


def _at_cost_of_default_stages(
    model: nn.Module, sparsity: Sparsity, stages: Sequence[int], listener: Listener
) -> Sparsity:
    """The plan in these stages that costs what the keep ratio costs in the default ones, or does if few are left."""
    default, blocks = schedule_for(wrap(model), sparsity).blocks, ",".join(map(str, stages))

    def found(keep: float) -> float:
        asked = replace(sparsity, keep=keep, keep_range=None)
        budget = count_macs(attach_as(model, asked), input_size(model)) / 1e9
        same = keep_for_gmacs(model, replace(asked, prune_at=stages), budget).keep
        listener.say(
            f"keep ratio {keep:g} in {len(default)} stages costs {budget:.3f} GMACs, and so does "
            f"{same:g} in {len(stages)}, before blocks {blocks}"
        )
        return same

    if sparsity.keep_range is None:
        return replace(sparsity, keep=found(sparsity.keep), prune_at=stages)
    low, high = (found(keep) for keep in sparsity.keep_range)
    return replace(sparsity, keep=middle(low, high), keep_range=(low, high), prune_at=stages)


def resolve(
    request: PlanRequest, model: nn.Module, defaults: Sparsity, listener: Listener = SILENT
) -> tuple[Sparsity, Prediction | None]:
    """The plan for a model; what is to be measured is measured by one process, or several might disagree.

    Args:
        request: what is asked for.
        model: a timm model of a supported family; with weights where something is measured.
        defaults: what applies where nothing is asked for.
        listener: shows how measuring goes.

    Returns:
        The plan, and with a target for speed how fast its untrained model ran.

    Raises:
        UsageError: it does not fit the model, or a target cannot be met.
    """
    sparsity = request.sparsity(defaults)
    if request.by_keep and defaults.prune_at is not None and sparsity.keep < 1:
        sparsity = _at_cost_of_default_stages(model, sparsity, defaults.prune_at, listener)
    if request.target_gmacs is not None:
        sparsity = keep_for_gmacs(model, sparsity, request.target_gmacs)
        listener.say(f"--target-gmacs {request.target_gmacs:g}: keep ratio {sparsity.keep:g}")
    if few := schedule_for(wrap(model), sparsity).too_few:
        listener.say(few)
    if request.measured is None:
        return sparsity, None
    device = pick_device(request.device)
    precision = pick_precision(request.precision or "fp32", device, training=False)
    target = SpeedTarget(request.target_speedup, request.target_latency_ms, request.target_batch_size or 32, precision)
    listener.say(f"{target}: measuring on {device}")
    found = find_plan(model, sparsity, target, device, listener) if distributed.is_main() else None
    result: tuple[Sparsity, Prediction] = distributed.from_main(found)
    plan = schedule_for(wrap(model), result[0])
    listener.say(f"{target}: {result[0].label}, stages {','.join(map(str, plan.blocks))}")
    if few := plan.too_few:
        listener.say(few)
    return result
