"""Reading attention out of a model that does not hand it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitprune.errors import UnsupportedModelError


class AttentionRecorder(TorchFunctionMode):
    """In a `with` block, keeps query and key of every `scaled_dot_product_attention` call, without gradient.

    timm's fused attention never forms the attention matrix; what is needed of it is computed afterwards from what
    went in. Works with any model whose attention is PyTorch's, as long as it is fused.

    Attributes:
        queries: per call, (B, heads, Tq, D).
        keys: per call, (B, heads, Tk, D).
        scales: per call, what the logits are multiplied by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.scales: list[float] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Listen, and let everything through."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.queries.append(args[0].detach())
            self.keys.append(args[1].detach())
            scale = kwargs.get("scale")
            self.scales.append(args[0].shape[-1] ** -0.5 if scale is None else scale)
        return func(*args, **kwargs)

    def forget(self, but_last: int = 0) -> None:
        """Drop all calls but the last few."""
        for recorded in (self.queries, self.keys, self.scales):
            del recorded[: len(recorded) - but_last]

    def attention(self, rows: slice = slice(None)) -> Tensor:
        """Attention that the queries `rows` pay to each key, mean over those, heads and calls: (B, Tk), sums to 1.

        Gates and size biases are not in it. Returns fp32.

        Raises:
            UnsupportedModelError: nothing was recorded.
        """
        if not self.queries:
            raise UnsupportedModelError(
                "its attention cannot be read: it does not go through PyTorch's scaled_dot_product_attention",
                "leave TIMM_FUSED_ATTN alone",
            )
        means = []
        for query, key, scale in zip(self.queries, self.keys, self.scales, strict=True):
            logits = (query * scale)[:, :, rows].float() @ key.float().transpose(-2, -1)
            means.append(logits.softmax(dim=-1).mean(dim=(1, 2)))
        return torch.stack(means).mean(dim=0)
