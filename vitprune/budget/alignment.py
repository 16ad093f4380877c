"""Which alignment of token counts is fastest here: hardware multiplies in tiles, and half-filled ones cost as much."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from vitprune.backbones import input_size
from vitprune.common.devices import Precision
from vitprune.common.progress import Listener
from vitprune.errors import UsageError
from vitprune.measure.macs import count_macs
from vitprune.measure.throughput import benchmark
from vitprune.model import SparseViT, attach_as
from vitprune.schedule import Sparsity

CANDIDATES = (1, 8, 16, 32)
_WORTH_IT = 0.01
"""How much faster a coarser alignment must be: less is noise, and the plan asked for is then the better one."""


def fastest_align(
    model: nn.Module,
    sparsity: Sparsity,
    batch_size: int,
    device: torch.device,
    precision: Precision,
    listener: Listener,
) -> int:
    """The alignment with which the untrained sparse model runs fastest per multiply-accumulate, measured.

    Args:
        model: a timm model of a supported family, with weights.
        sparsity: the rest of the plan.
        batch_size: images per pass.
        device: where to run.
        precision: of a pass.
        listener: shows how far it is.
    """
    built = {str(align): each for align in CANDIDATES if (each := _attach(model, replace(sparsity, align=align)))}
    size = input_size(model)
    listener.begin("timing alignments", len(built))
    timings = benchmark(built, size, [batch_size], device=device, precision=precision, listener=listener)
    # Counts can be aligned to the same cost only nearly, so the cost is divided out.
    cost = {int(timing.model): timing.latency_ms_p50 / count_macs(built[timing.model], size) for timing in timings}
    return choose_align(cost)


def choose_align(cost: dict[int, float]) -> int:
    """The cheapest alignment, or a finer one that costs hardly more.

    Args:
        cost: by alignment, anything that is to be small.
    """
    return min(align for align in cost if cost[align] <= (1 + _WORTH_IT) * min(cost.values()))


def _attach(model: nn.Module, sparsity: Sparsity) -> SparseViT | None:
    """None where no stage can fill such tiles."""
    try:
        return attach_as(model, sparsity)
    except UsageError:
        if sparsity.align == 1:
            raise
        return None
