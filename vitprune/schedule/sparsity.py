"""What a user may ask of a plan: how many tokens to prune, where, and what happens to them. Pure Python: no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from vitprune.common.renamed import renamed
from vitprune.errors import UsageError
from vitprune.schedule.counts import joined

ScheduleName = Literal["geometric", "late"]
"""How the stages share the work: as in the paper, or more of it in later stages at the same cost."""

Pruned = Literal["drop", "merge"]
"""What happens to pruned tokens: removed, or merged into the kept ones (see `vitprune.tokens.merging`)."""


Similarity = Literal["features", "keys"]
"""What tokens are compared by: themselves, or the keys that the next block's attention makes of them, mean over heads,
which tell better where they belong."""

PredictorName = Literal["light", "paper", "attention", "norm"]
"""What scores tokens: a small network of ours, or DynamicViT's (see `vitprune.tokens.predictor`), or the class token's
attention, which needs no training (see `vitprune.model.attention`)."""


def known_pruned(value: str) -> Pruned:
    """What happens to pruned tokens, by its name or by "fold", the old one of "merge".

    Raises:
        UsageError: there is no such name.
    """
    name: Pruned = _known("pruned", "merge" if value == "fold" else value, Pruned)
    return name


def _known(name: str, value: str, choices: Any) -> Any:
    if value not in get_args(choices):
        raise UsageError(f"{name} '{value}' is unknown", f"choose from {', '.join(get_args(choices))}")
    return value


@dataclass(frozen=True)
class Sparsity:
    """What a user may ask for: how many tokens to prune, where, and what happens to them.

    Example:
        sparsity = vitprune.Sparsity(0.7, token_schedule="geometric")
        vitprune.make_schedule(depth=12, num_patches=196, sparsity=sparsity).num_tokens  # (137, 96, 67)

    Attributes:
        keep: rho, the share of tokens one stage keeps, in (0, 1]. After s stages rho^s of the patch tokens are left,
            or other shares at that cost. At 1 nothing is pruned and there are no stages.
        keep_range: the lowest and highest keep ratio that one training is for, in (0, 1); None for `keep` alone.
        prune_at: blocks before which predictors act, rising, each in [1, depth - 1]; None for `default_stages(depth)`.
        token_schedule: how the stages share the work, see `ScheduleName`.
        tokens_left: shares of the tokens left after each stage, in (0, 1]; instead of `keep` and `token_schedule`.
        pruned: what happens to pruned tokens, see `Pruned`.
        align: after each stage prefix and patch tokens together are a multiple of this, so that they fill the tiles
            of the hardware, at nearly the same cost; 1 for any number.
        balance: with "merge", how much a token's importance counts beside its redundancy, 0 or more; None to rank by
            importance alone. See `vitprune.tokens.redundancy`.
        beta: with "merge", how much importance counts in the average of merged tokens, 0 or more: not at all, or
            exp(beta * a). See `vitprune.tokens.merging`.
        similarity: with "merge", what tokens are compared by, see `Similarity`. Keys pay for features of all patches.
        predictor: what scores tokens: "light" or "paper", small networks that learn it, or "attention", that of the
            model itself, which needs no training; see `PredictorName`.

    Raises:
        UsageError: a number is out of range, or a name is unknown.
    """

    keep: float = 0.7
    prune_at: Sequence[int] | None = None
    token_schedule: ScheduleName = "late"
    tokens_left: Sequence[float] | None = None
    pruned: Pruned = "merge"
    align: int = 1
    balance: float | None = 0.1
    beta: float = 1.0
    predictor: PredictorName = "light"
    similarity: Similarity = "features"
    keep_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)):
            raise UsageError(f"keep ratio is {self.keep!r}, expected a number in (0, 1]")
        if not 0 < self.keep <= 1:  # also catches NaN
            meant = self.keep / 100 if 10 <= self.keep <= 100 else 0.7  # percent
            raise UsageError(f"keep ratio is {self.keep:g}, expected a number in (0, 1]", f"try --keep {meant:g}")
        if self.keep_range is not None:
            object.__setattr__(self, "keep_range", _checked_range(*self.keep_range))
            if self.tokens_left is not None:
                raise UsageError("a range of keep ratios and tokens_left are mutually exclusive", "give one of them")
            low, high = self.keep_range
            if not low <= self.keep <= high:
                raise UsageError(
                    f"keep ratio {self.keep:g} is outside of the range that the model was trained for, {low:g} to "
                    f"{high:g}",
                    f"choose from {low:g} to {high:g}",
                )
        if self.tokens_left is not None:
            _check_tokens_left(self.tokens_left)
            if self.keep != type(self).keep:
                raise UsageError("keep and tokens_left are mutually exclusive", "give one of them")
        _known("token_schedule", self.token_schedule, ScheduleName)
        _known("predictor", self.predictor, PredictorName)
        _known("similarity", self.similarity, Similarity)
        object.__setattr__(self, "pruned", known_pruned(self.pruned))
        for name, value in (("balance", self.balance), ("beta", self.beta)):
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{name} is {value:g}, expected 0 or more", f"try {getattr(Sparsity, name):g}")
        if self.align < 1:
            raise UsageError(f"--align is {self.align}, expected at least 1", "try --align 8")

    @classmethod
    def asked(cls, keep: float | Sequence[float]) -> dict[str, Any]:
        """The arguments `keep` and `keep_range` for a keep ratio, or for a range of them, (0.5, 0.9).

        A model of a range opens at its middle.

        Raises:
            UsageError: these are not two numbers in (0, 1), the lower one first.
        """
        if not isinstance(keep, Sequence) or isinstance(keep, str):
            return {"keep": keep}
        if len(keep) != 2:
            raise UsageError(f"the range of keep ratios is {keep}, expected its two ends", "try --keep 0.5-0.9")
        low, high = _checked_range(*keep)
        return {"keep": middle(low, high), "keep_range": (low, high)}

    def at(self, keep: float) -> Sparsity:
        """The same for another keep ratio of its range.

        Raises:
            UsageError: there is no range, or the ratio lies outside.
        """
        if self.keep_range is None and keep != self.keep:
            raise UsageError(
                f"the model was trained for {self.label} alone, and keep {keep:g} is asked for",
                "train for a range, such as --keep 0.5-0.9, or for that ratio",
            )
        return replace(self, keep=keep)

    @property
    def label(self) -> str:
        """How much is kept, for people: "keep 0.7" or "ratios 0.8,0.6,0.4", and "align 8"."""
        return plan_label(None if self.tokens_left is not None else self.keep, self.tokens_left or (), self.align)

    @property
    def slug(self) -> str:
        """What was asked for as part of a folder's name: "keep0.7", "keep0.5-0.9"."""
        if self.keep_range is None:
            return plan_slug(self.label)
        return plan_slug(plan_label("{:g}-{:g}".format(*self.keep_range), (), self.align))

    @property
    def selection(self) -> dict[str, Any]:
        """How tokens are chosen and what becomes of the others: arguments of `vitprune.model.build`."""
        return {
            "predictor": self.predictor,
            "pruned": self.pruned,
            "balance": self.balance,
            "beta": self.beta,
            "similarity": self.similarity,
        }

    @classmethod
    def as_published(cls, keep: float, prune_at: Sequence[int] | None = None) -> Sparsity:
        """DynamicViT's: geometric, tokens dropped by importance alone, with its predictors."""
        return cls(keep, prune_at, "geometric", pruned="drop", balance=None, beta=0.0, predictor="paper")


Sparsity.__init__ = renamed(  # type: ignore[method-assign]
    stages="prune_at", schedule="token_schedule", ratios="tokens_left"
)(Sparsity.__init__)


def middle(low: float, high: float) -> float:
    """The keep ratio at which a model of a range opens."""
    return round((low + high) / 2, 6)


def plan_label(keep: float | str | None, ratios: Sequence[float], align: int) -> str:
    """How much is kept, for people: "keep 0.7", or where `keep` is None "ratios 0.8,0.6,0.4", and "align 8"."""
    number = keep if isinstance(keep, str) or keep is None else f"{keep:g}"
    kept = f"keep {number}" if number is not None else f"ratios {joined(ratios)}"
    return kept if align == 1 else f"{kept} align {align}"


def plan_slug(label: str) -> str:
    """A plan's label as part of a folder's name: "keep0.7"."""
    return label.replace(" ", "").replace(",", "-")


def _checked_range(low: float, high: float) -> tuple[float, float]:
    for value in (low, high):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise UsageError(
                f"the range of keep ratios is {low!r} to {high!r}, expected two numbers in (0, 1)", "try --keep 0.5-0.9"
            )
    if low >= high:
        raise UsageError(
            f"the range of keep ratios is {low:g} to {high:g}, expected the lower one first", "try --keep 0.5-0.9"
        )
    return float(low), float(high)


def _check_tokens_left(shares: Sequence[float]) -> None:
    shown = joined(shares)
    if not shares or any(not 0 < share <= 1 for share in shares):
        raise UsageError(
            f"shares of tokens left are '{shown}', expected numbers in (0, 1]", "for example --tokens-left 0.8,0.6,0.4"
        )
    if any(later > earlier for earlier, later in pairwise(shares)):
        raise UsageError(
            f"shares of tokens left are {shown}, but a token once pruned does not come back",
            "give falling shares of the original tokens, for example --tokens-left 0.8,0.6,0.4",
        )
