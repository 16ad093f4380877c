"""What is known of a sparse model before it runs: its plan, and what it costs beside the dense one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vitprune.backbones import input_size
from vitprune.measure.macs import count_macs, count_params
from vitprune.model import SparseViT, attach


def describe_plan(sparse: SparseViT, name: str) -> dict[str, Any]:
    """Plan and cost, for JSON: the same keys in every command.

    Args:
        sparse: from `attach` or a file; on any device, meta included.
        name: of the dense model.
    """
    asked, plan, size = sparse.sparsity, sparse.schedule, input_size(sparse.model)
    by_keep = asked is not None and asked.tokens_left is None
    models = {"dense": attach(sparse.model, keep=1.0), "sparse": sparse}
    macs = {side: count_macs(model, size) for side, model in models.items()}
    return {
        "model": name,
        "task": sparse.task,
        "keep": sparse.keep if by_keep else None,
        "schedule": asked.token_schedule if asked is not None and by_keep else None,
        "pruned": sparse.pruned,
        "align": plan.align,
        "input_size": list(size),
        "depth": plan.depth,
        "num_prefix_tokens": sparse.backbone.num_prefix_tokens,
        "num_patches": plan.num_patches,
        "num_classes": sparse.num_classes,
        **({"keep_range": list(sparse.keep_range)} if sparse.keep_range else {}),
        "stages": [asdict(stage) for stage in plan.stages],
        **{side: {"gmacs": macs[side] / 1e9, "params_m": count_params(model) / 1e6} for side, model in models.items()},
        "delta": {"gmacs_pct": 100 * (macs["sparse"] / macs["dense"] - 1)},
    }
