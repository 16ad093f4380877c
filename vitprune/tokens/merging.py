"""Merging: a pruned token is averaged into the kept token most similar to it.

Similarity is the cosine. Attention then sees how many patches a token stands for (log size added to the logits of its
key), as in proportional attention of ToMe (https://arxiv.org/abs/2210.09461); that squeezing pruned tokens into kept
ones pays is dTPS's finding (https://arxiv.org/abs/2304.10716). Dense products only, so that the result compiles and
exports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune.tokens.selection import flat_rows, take_rows


def merge_tokens(
    x: Tensor, sizes: Tensor | None, kept: Tensor, pruned: Tensor, num_prefix_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """The kept tokens, each averaged with the pruned ones nearest to it, weighted by size.

    Args:
        x: tokens (B, P + N, C).
        sizes: how many patches each stands for, (B, P + N), at least 1; None for one each.
        kept: indices (B, K) of the patch tokens to keep.
        pruned: indices (B, N - K) of the others; K < N.
        num_prefix_tokens: P; these stay as they are.

    Returns:
        Tokens (B, P + K, C) and their sizes (B, P + K), fp32 at least. The sum of the sizes is unchanged.
    """
    num_kept = num_prefix_tokens + kept.shape[1]
    rows = flat_rows(x, num_prefix_tokens, kept, pruned)
    tokens, others = take_rows(x, rows).tensor_split((num_kept,), dim=1)
    nearest = _nearest(others, tokens[:, num_prefix_tokens:]).unsqueeze(-1)  # (B, N - K, 1)
    # (B, N - K, P + K): how many patches each pruned token brings to each kept one.
    joins = torch.zeros(*pruned.shape, num_kept, device=x.device, dtype=_size_dtype(x))
    among_patches = joins[..., num_prefix_tokens:]
    if sizes is None:
        among_patches.scatter_(2, nearest, 1.0)
        new_sizes = 1 + joins.sum(dim=1)
    else:
        kept_sizes, other_sizes = sizes.take(rows).tensor_split((num_kept,), dim=1)
        among_patches.scatter_(2, nearest, other_sizes.unsqueeze(-1))
        new_sizes = kept_sizes + joins.sum(dim=1)
        tokens = tokens * kept_sizes.unsqueeze(-1).to(x.dtype)
    # Not baddbmm: autocast would round the kept tokens too. All in one dtype: mixed ones are slow on CPUs.
    total = tokens + joins.transpose(1, 2).to(x.dtype) @ others
    return total / new_sizes.unsqueeze(-1).to(x.dtype), new_sizes


def merge_masked(x: Tensor, sizes: Tensor, kept: Tensor, decision: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge_tokens` for the masked pass: every token in its place, pruned ones unchanged, as no other sees them.

    Args:
        x: patch tokens (B, N, C).
        sizes: (B, N), at least 1.
        kept: D-hat before this stage, (B, N) of zeros and ones.
        decision: D of this stage, (B, N) of zeros and ones. It gets no gradient from merging: what a decision is worth
            comes through the attention gate.

    Returns:
        Tokens (B, N, C) and their sizes (B, N).
    """
    remain, pruned = (kept * decision).detach(), (kept * (1 - decision)).detach()
    nearest = _nearest(x, x, remain > 0.5).unsqueeze(-1)
    joins = torch.zeros(*kept.shape, kept.shape[1], device=x.device, dtype=_size_dtype(x)).scatter(2, nearest, 1.0)
    joins = joins * (pruned * sizes).unsqueeze(-1) * remain.unsqueeze(1)  # there may be no token to join
    new_sizes = sizes + joins.sum(dim=1)
    total = x * sizes.unsqueeze(-1) + joins.transpose(1, 2).to(x.dtype) @ x
    return (total / new_sizes.unsqueeze(-1)).to(x.dtype), new_sizes


def _nearest(tokens: Tensor, others: Tensor, among: Tensor | None = None) -> Tensor:
    """Of each token (B, M, C) the index of the most similar one of (B, K, C), (B, M); only of those in `among` (B, K).

    By the cosine, but for the length of the token itself, which is the same for all it is compared with.
    """
    # Which token is nearest is a choice, not a function to learn: no gradient.
    tokens, others = tokens.detach(), others.detach()
    # Of a token of zeros the similarity is not a number; whatever is chosen then, the choice is valid.
    length: Tensor = torch.linalg.vector_norm(others, dim=-1, dtype=_size_dtype(others))
    similarity: Tensor = tokens @ others.transpose(1, 2) / length.unsqueeze(1)
    if among is not None:
        similarity = similarity.masked_fill(~among.unsqueeze(1), -torch.inf)
    return similarity.argmax(dim=-1)


def _size_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
