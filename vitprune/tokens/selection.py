"""Inference: the same number of tokens for every image, chosen by top-k and really removed.

Constant counts, top-k and gather only, so that the result compiles and exports.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probabilities(scores: Tensor) -> Tensor:
    """log_pi (B, N, 2), of dropping [..., 0] and keeping [..., 1], of keep scores (B, N), which are log-odds."""
    return torch.stack((F.logsigmoid(-scores), F.logsigmoid(scores)), dim=-1)


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
    return take_rows(x, flat_rows(x, 0, indices))


def flat_rows(x: Tensor, num_prefix_tokens: int, *indices: Tensor) -> Tensor:
    """Where tokens are among all tokens of a batch, prefix tokens first.

    Args:
        x: tokens (B, P + N, C).
        num_prefix_tokens: P.
        *indices: of patch tokens, each (B, K_i), one after the other.

    Returns:
        Rows of x.flatten(0, 1), (B, P + sum of K_i).
    """
    batch, length = x.shape[:2]
    # The prefix counts from -P, so that one addition is right for all.
    prefix = torch.arange(-num_prefix_tokens, 0, device=x.device).expand(batch, -1)
    first = torch.arange(num_prefix_tokens, num_prefix_tokens + batch * length, length, device=x.device)
    return torch.cat((prefix, *indices), dim=1) + first.unsqueeze(1)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens (B, N, C) at `rows` (B, K) of `flat_rows`, as (B, K, C)."""
    # Whole rows of one table are copied at once; `gather` would look up every number by itself.
    return F.embedding(rows, x.flatten(0, 1))


def topk_decision(scores: Tensor, num_tokens: int, kept: Tensor | None = None) -> Tensor:
    """The decision D (B, N) of top-k as zeros and ones, among the tokens still kept.

    What inference does, for the masked pass: pruned tokens (`kept` 0) never come back.

    Args:
        scores: (B, N), higher is kept.
        num_tokens: how many to keep.
        kept: D-hat (B, N) so far; None when all tokens are there.
    """
    if kept is not None:
        scores = scores.masked_fill(kept < 0.5, -torch.inf)
    chosen = scores.topk(num_tokens, dim=1, sorted=False).indices
    decision = torch.zeros_like(scores).scatter_(1, chosen, 1.0)
    # Sampled decisions may have kept fewer than num_tokens.
    return decision if kept is None else decision.masked_fill(kept < 0.5, 0.0)
