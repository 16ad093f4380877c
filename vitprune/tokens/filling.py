"""Filling: every patch of the image gets a token again, also where tokens were pruned on the way.

A merged token is taken from the one it became part of, moved by what set the two apart at the stage where they were
merged: it goes on from where it was, by the updates of the token that stands for it. A dropped token stays what it was
when it left. Constant counts, gathers and additions only, so that it compiles, exports and costs no products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitprune.tokens.redundancy import Choice
from vitprune.tokens.selection import flat_rows, take_rows


class Grid(NamedTuple):
    """Where each patch of the image is among the tokens that are left; of a new one, every patch has its own.

    Attributes:
        rows: of each patch the row of its token among the K patch tokens left, (B, N); K where it was dropped.
        offset: what each patch had beyond that token when it was pruned, (B, N, C): all it was, where it was dropped.
    """

    rows: Tensor | None = None
    offset: Tensor | None = None


def rows_after_merging(choice: Choice) -> Tensor:
    """Of each token that reached a stage the row of the kept one that it is part of now, (B, N) of rows in K."""
    rows = torch.empty(
        choice.kept.shape[0],
        choice.kept.shape[1] + choice.pruned.shape[1],
        dtype=choice.kept.dtype,
        device=choice.kept.device,
    )
    rows.scatter_(1, choice.kept, torch.arange(choice.kept.shape[1], device=rows.device).expand_as(choice.kept))
    return rows.scatter_(1, choice.pruned, choice.nearest)


def rows_after_dropping(kept: Tensor, num_tokens: int) -> Tensor:
    """Of each of the `num_tokens` tokens that reached a stage its row in `kept` (B, K), or K: (B, num_tokens)."""
    rows = kept.new_full((kept.shape[0], num_tokens), kept.shape[1])
    return rows.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))


def pruned_grid(grid: Grid, before: Tensor, after: Tensor, rows: Tensor) -> Grid:
    """The grid after a stage.

    Args:
        grid: before it.
        before: patch tokens that reached the stage, (B, K, C).
        after: patch tokens that left it, (B, K', C).
        rows: of each token that reached it the row in `after` of the one it is part of, or K' if it is gone: (B, K).
    """
    if grid.rows is None or grid.offset is None:
        return Grid(rows, before - _rows_or_zero(after, rows))
    gone = rows.new_full((rows.shape[0], 1), after.shape[1])
    now = torch.cat((rows, gone), dim=1).gather(1, grid.rows)
    return Grid(now, grid.offset + _rows_or_zero(before, grid.rows) - _rows_or_zero(after, now))


def fill_tokens(x: Tensor, grid: Grid, num_prefix_tokens: int = 0) -> Tensor:
    """Tokens of the residual stream that are left, (B, P + K, C), to the full grid, (B, P + N, C), by that so far.

    Of no gradient less than its parts.
    """
    if grid.rows is None or grid.offset is None:
        return x
    patches = _rows_or_zero(x[:, num_prefix_tokens:], grid.rows) + grid.offset
    return torch.cat((x[:, :num_prefix_tokens], patches), dim=1)


def _rows_or_zero(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens (B, K, C) at `rows` (B, N) as (B, N, C); zeros at row K."""
    x = torch.cat((x, x.new_zeros(x.shape[0], 1, x.shape[2])), dim=1)
    return take_rows(x, flat_rows(x, 0, rows))
