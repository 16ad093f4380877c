"""Inference: the same number of tokens for every image, chosen by top-k and really removed.

Constant counts, top-k and gather only, so that the result compiles and exports.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_tokens(scores: Tensor, num_tokens: int) -> Tensor:
    """Indices of the `num_tokens` highest scores of each image, in raster order.

    Args:
        scores: (B, N), higher is kept.
        num_tokens: how many to keep, in [1, N].

    Returns:
        Indices (B, num_tokens) into N, rising.
    """
    indices = scores.topk(num_tokens, dim=1, sorted=False).indices
    return indices.sort(dim=1).values


def split_tokens(scores: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """As `topk_tokens`, and the indices (B, N - num_tokens) of the others, best first."""
    order = scores.topk(scores.shape[1], dim=1).indices
    return order[:, :num_tokens].sort(dim=1).values, order[:, num_tokens:]


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` (B, K) of the tokens `x` (B, N, C), as (B, K, C)."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def topk_decision(scores: Tensor, num_tokens: int, kept: Tensor | None = None) -> Tensor:
    """The decision D (B, N) of top-k as zeros and ones, among the tokens still kept.

    What inference does, for the masked pass: dropped tokens (`kept` 0) never come back.

    Args:
        scores: (B, N), higher is kept.
        num_tokens: how many to keep.
        kept: D-hat (B, N) so far; None when all tokens are there.
    """
    if kept is not None:
        scores = scores.masked_fill(kept < 0.5, -torch.inf)
    chosen = scores.topk(num_tokens, dim=1, sorted=False).indices
    decision = torch.zeros_like(scores).scatter_(1, chosen, 1.0)
    # Sampled decisions may have left fewer than num_tokens.
    return decision if kept is None else decision.masked_fill(kept < 0.5, 0.0)
