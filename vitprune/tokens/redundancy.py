"""Which tokens a stage keeps: those that matter and that no token which matters more resembles.

A token is redundant as far as a more important one is like it: with keep scores a_i,

    r_i = max of cos(x_i, x_j) over the tokens j that are more important than i,

and the K tokens with the largest balance * a_i - r_i are kept. The most important token has nobody to be compared with,
so it always is. Each pruned token belongs to the kept one most similar to it. Nearest in print: Zero-TPrune's second
step (https://arxiv.org/abs/2305.17328), MCTF (https://arxiv.org/abs/2403.10030). Without a balance the scores alone
decide, as in DynamicViT. Constant counts, top-k, gather and products only, so that it compiles and exports.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitprune.tokens.precision import at_least_fp32, without_autocast
from vitprune.tokens.selection import split_tokens, topk_decision

MAX_MATRIX = 1024
"""Up to so many tokens all similarities of an image are held at once; above it, of so many as a tile has rows."""
_TILE = 256


class Choice(NamedTuple):
    """Which tokens a stage keeps, and where the others belong.

    Attributes:
        kept: indices of the kept tokens, rising, (B, K).
        pruned: indices of the others, (B, N - K).
        nearest: of each pruned token the row in `kept` of the kept one most similar to it, (B, N - K).
        redundancy: r of all tokens, (B, N); None where scores alone decided.
    """

    kept: Tensor
    pruned: Tensor
    nearest: Tensor
    redundancy: Tensor | None = None


def choose_tokens(x: Tensor, scores: Tensor, num_tokens: int, balance: float | None) -> Choice:
    """The `num_tokens` tokens to keep, and for each other one the kept token most similar to it.

    Args:
        x: patch tokens (B, N, C), or what they are compared by.
        scores: keep scores a, higher is more important, (B, N).
        num_tokens: K, in [1, N).
        balance: how much importance counts beside redundancy; None to rank by scores alone.
    """
    scores, count = at_least_fp32(scores.detach()), x.shape[1]
    with without_autocast(x):
        if balance is None or count > MAX_MATRIX:
            return _choose_in_tiles(unit_vectors(x), scores, num_tokens, balance)
        like = at_least_fp32(x.detach())
        scale = _inverse_lengths(like)
        # Not divided by a row's own length: what is nearest is so all the same, and redundancy is one number a token.
        similarity = (like @ like.transpose(1, 2)) * scale.unsqueeze(1)  # (B, N, N)
        alike = redundancy(like, scores, similarity) * scale
        kept, pruned = split_tokens(balance * scores - alike, num_tokens)
        rows = similarity.gather(1, pruned.unsqueeze(-1).expand(-1, -1, count))
        nearest = rows.gather(2, kept.unsqueeze(1).expand(-1, pruned.shape[1], -1)).argmax(dim=-1)
    return Choice(kept, pruned, nearest, alike)


def _choose_in_tiles(units: Tensor, scores: Tensor, num_tokens: int, balance: float | None) -> Choice:
    """As `choose_tokens`, of tokens of length 1, without all similarities at once."""
    alike = None if balance is None else redundancy(units, scores)
    rank = scores if balance is None or alike is None else balance * scores - alike
    kept, pruned = split_tokens(rank, num_tokens)
    targets, others = _rows(units, kept).transpose(1, 2), _rows(units, pruned)
    nearest = torch.cat([(tile @ targets).argmax(dim=-1) for tile in torch.split(others, _TILE, dim=1)], dim=1)
    return Choice(kept, pruned, nearest, alike)


def choose_masked(x: Tensor, scores: Tensor, num_tokens: int, kept: Tensor, balance: float | None) -> Tensor:
    """As `choose_tokens` for the masked pass: the decision D (B, N) of zeros and ones, among the tokens still kept.

    Args:
        x: patch tokens (B, N, C), or what they are compared by.
        scores: (B, N).
        num_tokens: K.
        kept: D-hat (B, N) so far.
        balance: see `choose_tokens`.
    """
    scores = at_least_fp32(scores.detach())
    if balance is not None:
        with without_autocast(x):
            scores = balance * scores - redundancy(unit_vectors(x), scores, present=kept > 0.5)
    return topk_decision(scores, num_tokens, kept)


def redundancy(
    units: Tensor, scores: Tensor, similarity: Tensor | None = None, present: Tensor | None = None
) -> Tensor:
    """r_i (B, N): the largest cosine to a more important token, in [-1, 1]; -inf where there is none.

    Of two tokens of one score the first counts as the more important.

    Args:
        units: (B, N, C) of length 1.
        scores: (B, N).
        similarity: units @ units^T, where it is there already.
        present: (B, N) of bool; tokens that are not there are compared with nobody. None when all are.
    """
    num_tokens = units.shape[1]
    order = torch.arange(num_tokens, device=units.device)
    size = num_tokens if num_tokens <= MAX_MATRIX else _TILE
    tiles = []
    for start in range(0, num_tokens, size):
        rows = slice(start, start + size)
        tile = similarity[:, rows] if similarity is not None else units[:, rows] @ units.transpose(1, 2)
        own, others = scores[:, rows, None], scores[:, None, :]
        # Not by operators, which Core ML's converter does not know.
        equal = torch.logical_and(others == own, order >= order[rows, None])  # or the token itself
        below = torch.logical_or(others < own, equal)
        if present is not None:
            below = torch.logical_or(below, ~present[:, None, :])
        tiles.append(tile.masked_fill(below, -torch.inf).amax(dim=-1))
    return torch.cat(tiles, dim=1)


def unit_vectors(x: Tensor) -> Tensor:
    """Tokens (B, N, C) at length 1, in fp32 at least, without gradient; a token of zeros stays one.

    What is chosen is no function to learn.
    """
    x = at_least_fp32(x.detach())
    return x * _inverse_lengths(x).unsqueeze(-1)


def _inverse_lengths(x: Tensor) -> Tensor:
    """One over the length of each token (B, N, C) in fp32 at least: (B, N), finite also where a token is zeros."""
    # Fastest, and not for exported graphs: onnxruntime cannot tell the shape of vector_norm's.
    exporting = torch.compiler.is_exporting()
    squares = (x * x).sum(dim=-1) if exporting else torch.linalg.vector_norm(x, dim=-1).square()
    return squares.clamp(min=torch.finfo(x.dtype).tiny).rsqrt()


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
