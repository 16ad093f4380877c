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
    """Indices (B, num_tokens) of the highest scores (B, N) of each image, rising; `num_tokens` is in [1, N]."""
    return _in_order(scores.topk(num_tokens, dim=1, sorted=False).indices)


def split_tokens(scores: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """As `topk_tokens`, and the indices (B, N - num_tokens) of the others, best first."""
    order = scores.topk(scores.shape[1], dim=1).indices
    return _in_order(order[:, :num_tokens]), order[:, num_tokens:]


def _in_order(indices: Tensor) -> Tensor:
    """Indices (B, K), rising; not in an exported graph: its outputs are the same, and some engines cannot sort."""
    return indices if torch.compiler.is_exporting() else indices.sort(dim=1).values


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
    dtype = index_dtype()
    # The prefix counts from -P, so that one addition is right for all.
    prefix = torch.arange(-num_prefix_tokens, 0, dtype=dtype, device=x.device).expand(batch, -1)
    first = torch.arange(num_prefix_tokens, num_prefix_tokens + batch * length, length, dtype=dtype, device=x.device)
    return torch.cat((prefix, *(rows.to(dtype) for rows in indices)), dim=1) + first.unsqueeze(1)


def index_dtype() -> torch.dtype:
    """Of indices to be joined; in exported graphs of 32 bits, as LiteRT's top-k gives them: it joins one type only."""
    return torch.int32 if torch.compiler.is_exporting() else torch.int64


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens (B, N, C) at `rows` (B, K) of `flat_rows`, as (B, K, C)."""
    # Whole rows of one table are copied at once; `gather` would look up every number by itself.
    return F.embedding(rows, x.flatten(0, 1))


def add_to_rows(base: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Tokens (B, M, C) or numbers (B, M), each added to the row of `base` (B, K, C) or (B, K) that `rows` (B, M) names.

    `base` is used up.
    """
    # Of plain tensors: what is counted is the product.
    plain = type(base) is Tensor and base.device.type == "cpu" and not torch.compiler.is_compiling()
    if plain and base.dtype.itemsize >= 4:
        if base.ndim == 2:
            return base.scatter_add(1, rows, values)
        first = torch.arange(0, base.shape[0] * base.shape[1], base.shape[1], device=rows.device)
        base.flatten(0, 1).index_add_(0, (rows + first.unsqueeze(1)).flatten(), values.flatten(0, 1))
        return base
    # Elsewhere a product: it is fast, adds in the same order every time, sums bf16 in fp32, and exports to any engine.
    joins = (rows.unsqueeze(-1) == torch.arange(base.shape[1], device=rows.device)).to(values.dtype)  # (B, M, K)
    return base + (joins * values.unsqueeze(-1)).sum(dim=1) if base.ndim == 2 else base + joins.mT @ values


def topk_decision(scores: Tensor, num_tokens: int, kept: Tensor | None = None) -> Tensor:
    """The decision D (B, N) of top-k by scores (B, N) as zeros and ones, among the tokens still kept.

    What inference does, for the masked pass: pruned tokens never come back. `kept` is D-hat (B, N) so far, None when
    all tokens are there.
    """
    if kept is not None:
        scores = scores.masked_fill(kept < 0.5, -torch.inf)
    chosen = scores.topk(num_tokens, dim=1, sorted=False).indices
    decision = torch.zeros_like(scores).scatter_(1, chosen, 1.0)
    # Sampled decisions may have kept fewer than num_tokens.
    return decision if kept is None else decision.masked_fill(kept < 0.5, 0.0)
