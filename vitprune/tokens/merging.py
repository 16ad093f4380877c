"""Folding: what is left out is not lost but averaged into the most similar token that stays.

Each leaving token joins its nearest staying one by cosine similarity, and attention is told how many patches a token
now stands for (log size added to the logits of its key), as in proportional attention of ToMe
(https://arxiv.org/abs/2210.09461); that squeezing pruned tokens into kept ones pays is dTPS's finding
(https://arxiv.org/abs/2304.10716). Dense products only, no scatter, so that the result compiles and exports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune.tokens.selection import flat_rows, take_rows


def merge_tokens(
    x: Tensor, sizes: Tensor | None, stays: Tensor, leaves: Tensor, num_prefix_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """The tokens that stay, each averaged with those that leave nearest to it, weighted by size.

    Args:
        x: tokens (B, P + N, C).
        sizes: how many patches each stands for, (B, P + N), at least 1; None for one each.
        stays: indices (B, K) of the patch tokens that stay.
        leaves: indices (B, N - K) of the others; K < N.
        num_prefix_tokens: P; these stay as they are.

    Returns:
        Tokens (B, P + K, C) and their sizes (B, P + K), fp32 at least. The sum of the sizes is unchanged.
    """
    num_staying = num_prefix_tokens + stays.shape[1]
    rows = flat_rows(x, num_prefix_tokens, stays, leaves)
    staying, leaving = take_rows(x, rows).tensor_split((num_staying,), dim=1)
    nearest = _nearest(leaving, staying[:, num_prefix_tokens:]).unsqueeze(-1)  # (B, N - K, 1)
    # (B, N - K, P + K): how many patches each leaving token brings to each that stays.
    joins = torch.zeros(*leaves.shape, num_staying, device=x.device, dtype=_size_dtype(x))
    among_patches = joins[..., num_prefix_tokens:]
    if sizes is None:
        among_patches.scatter_(2, nearest, 1.0)
        new_sizes = 1 + joins.sum(dim=1)
    else:
        staying_sizes, leaving_sizes = sizes.take(rows).tensor_split((num_staying,), dim=1)
        among_patches.scatter_(2, nearest, leaving_sizes.unsqueeze(-1))
        new_sizes = staying_sizes + joins.sum(dim=1)
        staying = staying * staying_sizes.unsqueeze(-1).to(x.dtype)
    # Not baddbmm: autocast would round the tokens that stay too. All in one dtype: mixed ones are slow on CPUs.
    total = staying + joins.transpose(1, 2).to(x.dtype) @ leaving
    return total / new_sizes.unsqueeze(-1).to(x.dtype), new_sizes


def merge_masked(x: Tensor, sizes: Tensor, kept: Tensor, decision: Tensor) -> tuple[Tensor, Tensor]:
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
    nearest = _nearest(x, x, stays > 0.5).unsqueeze(-1)
    joins = torch.zeros(*kept.shape, kept.shape[1], device=x.device, dtype=_size_dtype(x)).scatter(2, nearest, 1.0)
    joins = joins * (leaves * sizes).unsqueeze(-1) * stays.unsqueeze(1)  # nobody may be left to join
    new_sizes = sizes + joins.sum(dim=1)
    total = x * sizes.unsqueeze(-1) + joins.transpose(1, 2).to(x.dtype) @ x
    return (total / new_sizes.unsqueeze(-1)).to(x.dtype), new_sizes


def _nearest(leaving: Tensor, staying: Tensor, among: Tensor | None = None) -> Tensor:
    """Of each token (B, M, C) the index of the most similar one of (B, K, C), (B, M); only of those in `among` (B, K).

    By the cosine, but for the length of the leaving token, which is the same for all it is compared with.
    """
    # Which token is nearest is a choice, not a function to learn: no gradient.
    leaving, staying = leaving.detach(), staying.detach()
    # Of a token of zeros the similarity is not a number; whoever is chosen then, the choice is valid.
    length: Tensor = torch.linalg.vector_norm(staying, dim=-1, dtype=_size_dtype(staying))
    similarity: Tensor = leaving @ staying.transpose(1, 2) / length.unsqueeze(1)
    if among is not None:
        similarity = similarity.masked_fill(~among.unsqueeze(1), -torch.inf)
    return similarity.argmax(dim=-1)


def _size_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
