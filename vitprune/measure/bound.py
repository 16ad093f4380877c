"""Dense, sparse and zero-overhead bound in one run: what fewer MACs suggest, what was measured, what is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from vitprune.measure.macs import count_macs
from vitprune.measure.modes import Mode
from vitprune.measure.throughput import benchmark, speedup
from vitprune.model import SparseViT, Tokens
from vitprune.schedule import Stage

Kind = Literal["dense", "sparse", "bound"]


class ZeroOverheadViT(SparseViT):
    """The backbone with the token counts of a sparse model, its tokens chosen for free. To be timed, not to be used.

    At each stage the first K patch tokens are sliced off: no predictor, no ranking, no gather, no merging, no sizes in
    the attention. The predictions are worth nothing; the time is what no way of choosing tokens can beat at these
    counts. Positions that are not in the tokens themselves are still gathered, as every such method must. The sparse
    model is not changed, and its weights are shared.
    """

    def __init__(self, sparse: SparseViT) -> None:
        super().__init__(sparse.model, sparse.schedule, [nn.Identity() for _ in sparse.schedule.stages])

    def prune(self, tokens: Tokens, stage: Stage, predictor: nn.Module) -> Tokens:
        """Slice off the first tokens."""
        first = torch.arange(stage.num_tokens, device=tokens.x.device).expand(tokens.x.shape[0], -1)
        return Tokens(tokens.x[:, : self.backbone.num_prefix_tokens + stage.num_tokens], indices=(first,))


@dataclass(frozen=True)
class BenchModel:
    """A model to be timed beside others; a "bound" is the zero-overhead bound of a sparse one, and none one can use."""

    kind: Kind
    keep: float | None
    model: nn.Module
    bound_of: str | None = None
    """The label of a bound's sparse model."""


def with_bounds(models: Mapping[str, BenchModel]) -> dict[str, BenchModel]:
    """The same, and after every `SparseViT` that prunes something its zero-overhead bound."""
    result: dict[str, BenchModel] = {}
    for label, each in models.items():
        result[label] = each
        if each.kind == "sparse" and isinstance(each.model, SparseViT) and each.model.schedule.stages:
            result[f"bound of {label}"] = BenchModel("bound", each.keep, ZeroOverheadViT(each.model), label)
    return result


def side_by_side(
    name: str,
    models: Mapping[str, BenchModel],
    size: tuple[int, int, int],
    batch_sizes: Sequence[int],
    modes: Sequence[Mode],
    *,
    baseline: str = "dense",
    **settings: Any,
) -> list[dict[str, Any]]:
    """Time all models interleaved, mode by mode, and compare each with the baseline of its mode and batch size.

    Models, variants of the one called `name`, are by label, as is the baseline; the size is (C, H, W), and settings are
    the other arguments of `benchmark`.

    Returns:
        A row per mode, batch size and model, in JSON's types, with units in the keys. Of `Timing` all entries;
        `speedup` is images per second over the baseline, `efficiency` that over `macs_ratio` (1 is as fast as the MACs
        suggest), `overhead_over_bound_pct` how much longer a sparse model takes than its zero-overhead bound.
    """
    macs = {label: count_macs(each.model, size) for label, each in models.items()}
    bounds = {each.bound_of: label for label, each in models.items() if each.bound_of is not None}
    rows = []
    for mode in modes:
        timings = benchmark(
            {label: each.model for label, each in models.items()}, size, batch_sizes, mode=mode, **settings
        )
        measured = {(timing.batch_size, timing.model): timing for timing in timings}
        for timing in timings:
            label = timing.model
            bound = measured.get((timing.batch_size, bounds.get(label, "")))
            against = speedup(timing, measured[timing.batch_size, baseline])
            macs_ratio = macs[baseline] / macs[label]
            rows.append(
                asdict(timing)
                | {
                    "model": name,
                    "label": label,
                    "kind": models[label].kind,
                    "keep": models[label].keep,
                    "gmacs": macs[label] / 1e9,
                    "macs_ratio": macs_ratio,
                    **against,
                    "efficiency": against["speedup"] / macs_ratio,
                    "overhead_over_bound_pct": (
                        None if bound is None else 100 * (timing.latency_ms_p50 / bound.latency_ms_p50 - 1)
                    ),
                }
            )
    return rows
