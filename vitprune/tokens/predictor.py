"""The token predictor: a light MLP that gives each patch token a probability of being kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprune.common.own_members import PublicModule


class TokenPredictor(PublicModule):
    """Keep and drop probabilities of every patch token (DynamicViT section 3.2).

    LayerNorm > Linear C>C > GELU, whose first half is the token's local feature and whose second half, averaged
    over the tokens still kept, is the global one; then Linear C>C/2 > GELU > Linear C/2>C/4 > GELU > Linear C/4>2 >
    log-softmax. 60,722 parameters at C = 192, 241,250 at 384, 961,730 at 768.

    Scores are fp32 whatever the model runs in: in bf16 those of weakly trained predictors tie, and top-k then takes the
    first rows of the image. So parameters stay in fp32 when the module is cast to less, and so do the last layer
    and, under autocast, all of it. Of bf16 or fp16 tokens the inner products are taken in their precision: on real
    images that moves a tenth to four tenths of a token an image, where the tokens' own rounding moves about one.

    Args:
        embed_dim: C, a multiple of 4.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        if embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4, got {embed_dim}")
        self.embed_dim = embed_dim
        self.in_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, embed_dim), nn.GELU())
        self.out_proj = nn.Sequential(
            nn.Linear(embed_dim, embed_dim // 2),
            nn.GELU(),
            nn.Linear(embed_dim // 2, embed_dim // 4),
            nn.GELU(),
            nn.Linear(embed_dim // 4, 2),
        )

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Log-probabilities of dropping [..., 0] and keeping [..., 1].

        Args:
            x: patch tokens of the residual stream (B, N, C), without prefix tokens.
            kept: D-hat (B, N), 1 where a token is still there; None when all are.

        Returns:
            log_pi (B, N, 2) in fp32 (float64 for a float64 predictor). Finite also when no token is kept.
        """
        return self.logits(x, kept).log_softmax(dim=-1)

    def logits(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """As `forward`, before the log-softmax: all that a ranking needs, which is by keep less drop."""
        dtype = next(self.parameters()).dtype
        # Switched off only where it is on: exported graphs would hold the switch as an operator of its own.
        mixed = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if mixed else nullcontext():
            inner = dtype if mixed or x.dtype not in (torch.bfloat16, torch.float16) else x.dtype
            norm, first, _ = self.in_proj
            hidden = F.gelu(_linear(first, norm(x.to(dtype)).to(inner)))
            local, shared = hidden.chunk(2, dim=-1)  # (B, N, C/2) each
            if kept is None:
                pooled = shared.mean(dim=1, keepdim=True, dtype=dtype)  # (B, 1, C/2)
            else:
                weight = kept.to(dtype).unsqueeze(-1)
                # The clamp guards an empty set (0/0); it never binds otherwise, as one kept token already sums to 1.
                pooled = (shared * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
            # Splitting the next layer would save half of its products, and make MACs differ from the published ones.
            features = torch.cat((local, pooled.to(inner).expand_as(local)), dim=-1)
            second, _, third, _, last = self.out_proj
            features = F.gelu(_linear(third, F.gelu(_linear(second, features))))
            logits: Tensor = last(features.to(dtype))
        return logits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenPredictor:
        # Every .to(), .half(), .cuda() comes through here: follow the device, never go below fp32.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self


def _linear(layer: Any, x: Tensor) -> Tensor:
    """The layer in the precision of `x`, whatever its own."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
