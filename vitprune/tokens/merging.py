"""Merging: a pruned token is averaged into the kept token most similar to it.

Similarity is the cosine. Attention then sees how many patches a token stands for (log size added to the logits of its
key), as in proportional attention of ToMe (https://arxiv.org/abs/2210.09461); that squeezing pruned tokens into kept
ones pays is dTPS's finding (https://arxiv.org/abs/2304.10716). What matters more weighs more in the average: size times
exp(beta * keep score). Constant counts, gathers and sums only, so that the result compiles and exports.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune.tokens.precision import at_least_fp32, without_autocast
from vitprune.tokens.redundancy import Choice, unit_vectors
from vitprune.tokens.selection import add_to_rows, flat_rows, take_rows

_MAX_EXPONENT = 30.0
"""Bounds of beta * a: the weights of an image's tokens then add up without overflow or a sum of 0."""


def merge_gains(scores: Tensor, beta: float, kept: Tensor | None = None) -> Tensor | None:
    """How much more a token weighs in an average for what it matters: exp(beta * a), (B, N); None for beta 0.

    a is a keep score less the mean over the image's tokens, in a masked pass over those still kept, by D-hat (B, N).
    """
    if beta == 0:
        return None
    scores = at_least_fp32(scores.detach())
    if kept is None:
        mean = scores.mean(dim=1, keepdim=True)
    else:
        weight = kept.detach().to(scores.dtype)
        mean = (scores * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
    return (beta * (scores - mean)).clamp(-_MAX_EXPONENT, _MAX_EXPONENT).exp()


def merge_tokens(
    x: Tensor, sizes: Tensor | None, choice: Choice, num_prefix_tokens: int = 0, gains: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The kept tokens, each averaged with the pruned ones that belong to it, weighted by size and gain.

    Args:
        x: tokens (B, P + N, C).
        sizes: how many patches each stands for, (B, P + N), at least 1; None for one each.
        choice: which patch tokens are kept, and where the others belong.
        num_prefix_tokens: P; these stay as they are.
        gains: of the patch tokens, (B, N), above 0; None for 1 each. They do not count in the sizes.

    Returns:
        Tokens (B, P + K, C) and their sizes (B, P + K), fp32 at least. The sum of the sizes is unchanged.
    """
    prefix, num_kept = num_prefix_tokens, choice.kept.shape[1]
    rows = flat_rows(x, prefix, choice.kept, choice.pruned)
    tokens, others = take_rows(x, rows[:, : prefix + num_kept]), take_rows(x, rows[:, prefix + num_kept :])
    kept_sizes, sizes_joined = _of_both(None if sizes is None else sizes[:, prefix:], choice, x)
    with without_autocast(x):
        total = new_sizes = add_to_rows(kept_sizes, choice.nearest, sizes_joined)
        if gains is not None:
            kept_gains, gains_joined = _of_both(gains, choice, x)
            kept_sizes, sizes_joined = kept_sizes * kept_gains, sizes_joined * gains_joined
            total = add_to_rows(kept_sizes, choice.nearest, sizes_joined)
    own = F.pad(kept_sizes / total, (prefix, 0), value=1.0)
    share = sizes_joined / total.gather(1, choice.nearest)
    # Shares in one dtype with the tokens: mixed ones are slow on CPUs.
    tokens, others = (each * part.unsqueeze(-1).to(x.dtype) for each, part in ((tokens, own), (others, share)))
    return add_to_rows(tokens, choice.nearest + prefix, others), F.pad(new_sizes, (prefix, 0), value=1.0)


def _of_both(values: Tensor | None, choice: Choice, x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of patch tokens (B, N), of the kept (B, K) and of the pruned ones (B, N - K); None for ones."""
    if values is None:
        return at_least_fp32(x.new_ones(choice.kept.shape)), at_least_fp32(x.new_ones(choice.pruned.shape))
    return values.gather(1, choice.kept), values.gather(1, choice.pruned)


def merge_masked(
    x: Tensor,
    sizes: Tensor,
    kept: Tensor,
    decision: Tensor,
    gains: Tensor | None = None,
    like: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `merge_tokens` for the masked pass: every token in its place, pruned ones unchanged, as no other sees them.

    Args:
        x: patch tokens (B, N, C).
        sizes: (B, N), at least 1.
        kept: D-hat before this stage, (B, N) of zeros and ones.
        decision: D of this stage, (B, N) of zeros and ones. It gets no gradient from merging: what a decision is worth
            comes through the attention gate.
        gains: (B, N), see `merge_tokens`.
        like: what tokens are compared by, (B, N, D); None for themselves.

    Returns:
        Tokens (B, N, C) and their sizes (B, N).
    """
    remain, pruned = (kept * decision).detach(), (kept * (1 - decision)).detach()
    units = unit_vectors(x if like is None else like)
    with without_autocast(x):
        similarity = (units @ units.transpose(1, 2)).masked_fill(remain.unsqueeze(1) < 0.5, -torch.inf)
    nearest = similarity.argmax(dim=-1, keepdim=True)
    joins = torch.zeros_like(similarity).scatter(2, nearest, 1.0)
    joins = joins * pruned.unsqueeze(-1) * remain.unsqueeze(1)  # there may be no token to join
    new_sizes = sizes + (joins * sizes.unsqueeze(-1)).sum(dim=1)
    weights = sizes if gains is None else sizes * gains
    joins = joins * weights.unsqueeze(-1)
    total = weights + joins.sum(dim=1)
    mixed = at_least_fp32(x) * (weights / total).unsqueeze(-1)
    mixed = mixed + (joins / total.unsqueeze(1)).transpose(1, 2) @ at_least_fp32(x)
    return mixed.to(x.dtype), new_sizes
