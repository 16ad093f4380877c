"""Folding: what is left out is not lost but averaged into the most similar token that stays.

Each leaving token joins its nearest staying one by cosine similarity, and attention is told how many patches a token
now stands for (log size added to the logits of its key), as in proportional attention of ToMe
(https://arxiv.org/abs/2210.09461); that squeezing pruned tokens into kept ones pays is dTPS's finding
(https://arxiv.org/abs/2304.10716). Dense products only, no scatter, so that the result compiles and exports.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune.tokens.selection import gather_tokens


def fold_tokens(x: Tensor, sizes: Tensor, stays: Tensor, leaves: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that stay, each averaged with those that leave nearest to it, weighted by size.

    Args:
        x: patch tokens (B, N, C).
        sizes: how many patches each stands for, (B, N), at least 1.
        stays: indices (B, K) of the tokens that stay.
        leaves: indices (B, N - K) of the others; K < N.

    Returns:
        Tokens (B, K, C) and their sizes (B, K). The sum of the sizes is unchanged.
    """
    staying, leaving = gather_tokens(x, stays), gather_tokens(x, leaves)
    similarity = _direction(leaving) @ _direction(staying).transpose(1, 2)  # (B, N - K, K)
    joins = _joins(similarity) * sizes.gather(1, leaves).unsqueeze(-1)
    staying_sizes = sizes.gather(1, stays)
    new_sizes = staying_sizes + joins.sum(dim=1)
    total = staying * staying_sizes.unsqueeze(-1) + joins.transpose(1, 2).to(x.dtype) @ leaving
    return (total / new_sizes.unsqueeze(-1)).to(x.dtype), new_sizes


def fold_masked(x: Tensor, sizes: Tensor, kept: Tensor, decision: Tensor) -> tuple[Tensor, Tensor]:
    """The same for the masked pass, every token in its place; those that left keep their value, which no one sees.

    Args:
        x: patch tokens (B, N, C).
        sizes: (B, N), at least 1.
        kept: D-hat before this stage, (B, N) of zeros and ones.
        decision: D of this stage, (B, N) of zeros and ones. No gradient flows into the fold from it: what a decision
            is worth is told by the attention gate.

    Returns:
        Tokens (B, N, C) and their sizes (B, N).
    """
    stays, leaves = (kept * decision).detach(), (kept * (1 - decision)).detach()
    unit = _direction(x)
    similarity = (unit @ unit.transpose(1, 2)).masked_fill(stays.unsqueeze(1) < 0.5, -torch.inf)
    joins = _joins(similarity) * (leaves * sizes).unsqueeze(-1) * stays.unsqueeze(1)  # nobody may be left to join
    new_sizes = sizes + joins.sum(dim=1)
    total = x * sizes.unsqueeze(-1) + joins.transpose(1, 2).to(x.dtype) @ x
    return (total / new_sizes.unsqueeze(-1)).to(x.dtype), new_sizes


def _direction(x: Tensor) -> Tensor:
    # Which token is nearest is a choice, not a function to learn: no gradient.
    return F.normalize(x.detach(), dim=-1)


def _joins(similarity: Tensor) -> Tensor:
    """One-hot of the most similar along the last dimension, in the dtype of sizes."""
    nearest = similarity.argmax(dim=-1, keepdim=True)
    dtype = torch.float64 if similarity.dtype == torch.float64 else torch.float32
    return (nearest == torch.arange(similarity.shape[-1], device=similarity.device)).to(dtype)
