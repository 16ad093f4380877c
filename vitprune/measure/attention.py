"""Which of timm's attention kernels is faster here: that depends on the device, the precision and the shapes."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from vitprune.measure.runner import time_calls
from vitprune.measure.timing import Attention

AttentionChoice = Literal["fused", "unfused", "auto"]

_SECONDS = 1.0
_MIN_ROUNDS = 3


def set_attention(model: nn.Module, attention: Attention) -> bool:
    """Make every attention layer of a timm model use one kernel; the answers are the same but for rounding.

    Returns:
        Whether the model has such a switch (timm's `fused_attn`) at all.
    """
    layers = [module for module in model.modules() if isinstance(getattr(module, "fused_attn", None), bool)]
    for layer in layers:
        layer.fused_attn = attention == "fused"  # type: ignore[assignment]
    return bool(layers)


def choose_attention(models: Mapping[str, nn.Module], images: Tensor, choice: AttentionChoice) -> Attention:
    """Set the kernel of all models, and say which.

    Args:
        models: by name, ready to run on `images`.
        images: (B, C, H, W).
        choice: "fused" leaves all as they are; "auto" times the first model with both and takes the faster for all, so
            that the dense model, named first, is at its best.
    """
    first, *_ = models.values()
    if choice == "fused" or not any(set_attention(model, "unfused") for model in models.values()):
        return "fused"
    if choice == "unfused" or not set_attention(first, "unfused"):
        return "unfused"
    best = _faster(first, images)
    for model in models.values():
        set_attention(model, best)
    return best


def _faster(model: nn.Module, images: Tensor) -> Attention:
    """By the median over rounds in which both take turns."""
    times: dict[Attention, list[float]] = {"fused": [], "unfused": []}
    started = timeit.default_timer()
    while len(times["fused"]) < _MIN_ROUNDS or timeit.default_timer() - started < _SECONDS:
        for kernel, seconds in times.items():
            set_attention(model, kernel)
            model(images)
            seconds += time_calls(lambda: model(images), 1, images.device)
    return min(times, key=lambda kernel: statistics.median(times[kernel]))
