"""From the options of a plan, --keep, --stages, --ratios, --align, the targets and so on, to a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vitprune.cli.options import (
    DroppedName,
    PrecisionName,
    ScheduleName,
    parse_align,
    parse_numbers,
    parse_ratios,
)
from vitprune.cli.output import talk
from vitprune.common import distributed
from vitprune.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vitprune.budget import Promise
    from vitprune.common.devices import Precision
    from vitprune.schedule import Sparsity
    from vitprune.training import Recipe

DEFAULT_KEEP = 0.7
DEFAULT_TARGET_BATCH_SIZE = 32


def parse_sparsity(
    recipe: Recipe,
    keep: float | None,
    stages: str | None,
    schedule: ScheduleName | None,
    ratios: str | None,
    dropped: DroppedName | None,
    target_gmacs: float | None,
    align: str | None = None,
    measuring: Measuring | None = None,
) -> Sparsity:
    """What the options ask for; what they leave open is the recipe's. --target-gmacs and --align auto are still to be
    looked for, see `resolve_sparsity`, and a speed by `meet_target`.

    Raises:
        UsageError: options that cannot be read or do not go together.
    """
    from vitprune.schedule import Sparsity, check_keep

    given = {"--keep": keep, "--target-gmacs": target_gmacs, "--ratios": ratios}
    given |= {} if measuring is None else measuring.targets()
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} say the same thing in two ways", "give one of them")
    if ratios is not None and schedule is not None:
        raise UsageError("--ratios are a schedule of their own; --schedule goes with --keep or --target-gmacs")
    if keep is not None:
        check_keep(keep)
    if measuring is not None:
        measuring.check()
    free = parse_ratios(ratios, "--ratios")
    return Sparsity(
        keep=DEFAULT_KEEP if keep is None else keep,
        stages=parse_numbers(stages, "--stages"),
        schedule=recipe.schedule if schedule is None else schedule,
        ratios=None if free is None else tuple(free),
        dropped=recipe.dropped if dropped is None else dropped,
        align=parse_align(align) or 1,
    )


def refuse_plan(model: str, *options: object) -> None:
    """A sparse file has its plan: an option that asks for another would do nothing.

    Raises:
        UsageError: one of the options was given.
    """
    if any(option is not None for option in options):
        raise UsageError(
            f"'{model}' has its own plan, which options cannot change",
            "leave out --keep, --stages, --schedule, --ratios, --dropped, --align and the targets, or start from a "
            "timm name",
        )


@dataclass(frozen=True)
class Measuring:
    """Where and how to measure what a plan leaves to a measurement.

    Attributes:
        device: --device.
        precision: of the sparse model in use.
        batch_size: --target-batch-size.
        speedup: --target-speedup.
        latency_ms: --target-latency-ms.
    """

    device: str = "auto"
    precision: PrecisionName = "fp32"
    batch_size: int | None = None
    speedup: float | None = None
    latency_ms: float | None = None

    def targets(self) -> dict[str, float | None]:
        """The speeds asked for, by option."""
        return {"--target-speedup": self.speedup, "--target-latency-ms": self.latency_ms}

    def check(self) -> None:
        """Raise UsageError where a target is none."""
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise UsageError(
                f"--target-speedup is {self.speedup:g}, expected more than 1: times as fast as the dense model",
                "try --target-speedup 1.5",
            )
        if self.latency_ms is not None and not 0 < self.latency_ms < math.inf:
            raise UsageError(
                f"--target-latency-ms is {self.latency_ms:g}, expected milliseconds above 0",
                "try --target-latency-ms 10",
            )


def resolve_sparsity(
    model: nn.Module,
    sparsity: Sparsity,
    target_gmacs: float | None,
    align: str | None = None,
    measuring: Measuring | None = None,
) -> Sparsity:
    """Find the keep ratio for --target-gmacs and what --align auto is here; make sure that the plan fits the model.

    Args:
        model: the timm model; with weights where something is to be measured.
        sparsity: of `parse_sparsity`.
        target_gmacs: --target-gmacs.
        align: --align.
        measuring: for --align auto.

    Raises:
        UsageError: it does not fit, or the budget cannot be met.
    """
    from vitprune.backbones import wrap
    from vitprune.budget import keep_for_gmacs

    if target_gmacs is not None:
        sparsity = keep_for_gmacs(model, sparsity, target_gmacs)
        talk(f"--target-gmacs {target_gmacs:g}: keep ratio {sparsity.keep:g}")
    if parse_align(align) is None:
        sparsity.plan(wrap(model))
        sparsity = replace(sparsity, align=_measured_align(model, sparsity, measuring or Measuring()))
    sparsity.plan(wrap(model))
    return sparsity


def _measured_align(model: nn.Module, sparsity: Sparsity, measuring: Measuring) -> int:
    """--align auto; measured by one process, or several might disagree."""
    from vitprune.budget import fastest_align

    device, precision, batch_size = _settled(measuring)
    found = None
    if distributed.is_main():
        talk(f"--align auto: measuring on {device}, {precision}, batch size {batch_size}")
        found = fastest_align(model, sparsity, batch_size, device, precision)
        talk(f"--align auto: {found}")
    align: int = distributed.from_main(found)
    return align


def meet_target(model: nn.Module, sparsity: Sparsity, measuring: Measuring) -> tuple[Sparsity, Promise | None]:
    """Find keep ratio and stages for a speed; by one process, or several might disagree.

    Returns:
        The plan, and what it promises; without a target `sparsity` as it is, and None.

    Raises:
        UsageError: it cannot be met, or the dense model does.
    """
    from vitprune.backbones import wrap
    from vitprune.budget import SpeedTarget, find_plan

    if measuring.speedup is None and measuring.latency_ms is None:
        return sparsity, None
    device, precision, batch_size = _settled(measuring)
    target = SpeedTarget(measuring.speedup, measuring.latency_ms, batch_size, precision)
    found = None
    if distributed.is_main():
        talk(f"{target}: measuring on {device}")
        found = find_plan(model, sparsity, target, device, talk)
        talk(f"{target}: {found[0].label}, stages {','.join(map(str, found[0].plan(wrap(model)).blocks))}")
    return distributed.from_main(found)


def _settled(measuring: Measuring) -> tuple[torch.device, Precision, int]:
    from vitprune.common.devices import pick_device, pick_precision

    device = pick_device(measuring.device)
    precision = pick_precision(measuring.precision, device, training=False)
    return device, precision, measuring.batch_size or DEFAULT_TARGET_BATCH_SIZE
