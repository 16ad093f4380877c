"""From a keep ratio to a plan: which blocks get a predictor, and how many tokens are kept after each.

DynamicViT (https://arxiv.org/abs/2106.02034, section 4): for a keep ratio rho, stage s = 1, 2, 3 keeps rho^s
of the ORIGINAL number of patch tokens. The late schedule prunes more of them later, where they are worth less, at the
same cost. Pure Python: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field

from vitprune.common.renamed import renamed
from vitprune.errors import UsageError
from vitprune.schedule.counts import aligned_counts, exact, joined, late_ratios, num_kept, stage_lengths

NUM_STAGES = 3
MIN_TOKENS = 2
"""Patch tokens that a stage should leave; with fewer than that many nothing is compared with anything."""
_RATIO_STEPS = 1_000_000

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
        prune_at: blocks before which predictors act, rising, each in [1, depth - 1]; None for `default_stages(depth)`.
        token_schedule: how the stages share the work, see `ScheduleName`.
        tokens_left: shares of the original tokens left after each stage, in (0, 1], not rising; instead of `keep` and
            `token_schedule`. One stage each.
        pruned: what happens to pruned tokens, see `Pruned`.
        align: after each stage prefix and patch tokens together are a multiple of this, so that they fill the tiles
            of the hardware, at nearly the same cost; 1 for any number.
        balance: with "merge", how much a token's importance counts beside its redundancy, 0 or more; None to rank by
            importance alone. See `vitprune.tokens.redundancy`.
        beta: with "merge", how much importance counts in the average of merged tokens, 0 or more: not at all, or
            exp(beta * a). See `vitprune.tokens.merging`.
        similarity: with "merge", what tokens are compared by, see `Similarity`. Keys pay where features of all patches
            are wanted, with many stages.
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

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)):
            raise UsageError(f"keep ratio is {self.keep!r}, expected a number in (0, 1]")
        if not 0 < self.keep <= 1:  # also catches NaN
            meant = self.keep / 100 if 10 <= self.keep <= 100 else 0.7  # percent
            raise UsageError(f"keep ratio is {self.keep:g}, expected a number in (0, 1]", f"try --keep {meant:g}")
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

    @property
    def label(self) -> str:
        """How much is kept, for people: "keep 0.7" or "ratios 0.8,0.6,0.4", and "align 8"."""
        return plan_label(None if self.tokens_left is not None else self.keep, self.tokens_left or (), self.align)

    @property
    def slug(self) -> str:
        """`label` as part of a folder's name: "keep0.7"."""
        return plan_slug(self.label)

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

    def plan(self, backbone: Any) -> Schedule:
        """The stages for a `vitprune.backbones.Backbone`; raises what `make_schedule` does."""
        return make_schedule(backbone.depth, backbone.num_patches, self, backbone.num_prefix_tokens)


Sparsity.__init__ = renamed(  # type: ignore[method-assign]
    stages="prune_at", schedule="token_schedule", ratios="tokens_left"
)(Sparsity.__init__)


@dataclass(frozen=True)
class Stage:
    """One place where tokens are pruned. Files hold it as it is; pydantic checks the bounds of what is read.

    Attributes:
        block: 0-based index of the block before which the predictor acts.
        ratio: share of the original patch tokens that is kept.
        num_tokens: number of patch tokens kept, the same for every image.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    block: Annotated[int, Field(ge=1)]
    ratio: Annotated[float, Field(gt=0, le=1)]
    num_tokens: Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Schedule:
    """The plan of a sparse model: its stages, in order, over `num_patches` patch tokens and `depth` blocks.

    Attributes:
        depth: number of blocks.
        num_patches: patch tokens before anything is pruned.
        stages: in order.
        align: the whole sequences after each stage, prefix tokens included, are multiples of this.
        sparsity: what was asked for, where that is known; two plans of the same stages are equal without.

    Raises:
        UsageError: blocks out of range or order, or a stage that keeps more tokens than reach it.
    """

    depth: int
    num_patches: int
    stages: tuple[Stage, ...]
    align: int = 1
    sparsity: Sparsity | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.stages:
            _check_stages(self.blocks, self.depth)
        counts = (self.num_patches, *self.num_tokens)
        if any(not 1 <= later <= earlier for earlier, later in pairwise(counts)):
            raise UsageError(f"stages keep {self.num_tokens} tokens of {self.num_patches}, expected falling counts")

    @property
    def blocks(self) -> tuple[int, ...]:
        """Block index of each stage."""
        return tuple(stage.block for stage in self.stages)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Share of the original patch tokens kept after each stage."""
        return tuple(stage.ratio for stage in self.stages)

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Number of patch tokens kept after each stage."""
        return tuple(stage.num_tokens for stage in self.stages)

    @property
    def too_few(self) -> str | None:
        """Where the stages leave a single patch token, and so nothing to choose from, a sentence that says so."""
        bare = next((stage.block for stage in self.stages if stage.num_tokens < MIN_TOKENS), None)
        if bare is None or self.num_patches < MIN_TOKENS:
            return None
        left = "/".join(map(str, self.num_tokens))
        asked = f"{self.sparsity.label} " if self.sparsity else "the plan "
        return (
            f"{asked}leaves {left} of {self.num_patches} patch tokens: from block {bare} on it is a single one, and "
            "accuracy will be poor"
        )

    def stages_for(self, num_patches: int, num_prefix_tokens: int) -> tuple[Stage, ...]:
        """The stages with counts for another number of patches; not aligned where no tile would be filled."""
        if num_patches == self.num_patches:
            return self.stages
        counts: Sequence[int] = [num_kept(num_patches, ratio) for ratio in self.ratios]
        aligned = aligned_counts(
            counts, stage_lengths(self.blocks, self.depth), num_patches, num_prefix_tokens, self.align
        )
        counts = aligned or counts
        return tuple(replace(stage, num_tokens=count) for stage, count in zip(self.stages, counts, strict=True))

    def resized(self, num_patches: int, num_prefix_tokens: int) -> Schedule:
        """The same plan for another number of patches."""
        if num_patches == self.num_patches:
            return self
        return replace(self, num_patches=num_patches, stages=self.stages_for(num_patches, num_prefix_tokens))

    def tokens_per_block(self) -> tuple[int, ...]:
        """Number of patch tokens that each of the `depth` blocks sees."""
        counts, current = [], self.num_patches
        at_block = {stage.block: stage.num_tokens for stage in self.stages}
        for block in range(self.depth):
            current = at_block.get(block, current)
            counts.append(current)
        return tuple(counts)


def make_schedule(
    depth: int, num_patches: int, sparsity: Sparsity | None = None, num_prefix_tokens: int = 0
) -> Schedule:
    """The stages of a model, and how many tokens each keeps.

    Args:
        depth: number of transformer blocks.
        num_patches: number of patch tokens N before anything is pruned, prefix tokens not counted.
        sparsity: what is asked for; None for the defaults.
        num_prefix_tokens: P, for `align`.

    Raises:
        UsageError: stages are out of range or order, or not as many as shares, or there are too few tokens to align.
    """
    asked = sparsity or Sparsity()
    if asked.prune_at is not None:
        _check_stages(asked.prune_at, depth)
    if asked.keep == 1 and asked.tokens_left is None:
        return Schedule(depth, num_patches, (), sparsity=asked)
    num_stages = NUM_STAGES if asked.tokens_left is None else len(asked.tokens_left)
    blocks = default_stages(depth, num_stages) if asked.prune_at is None else tuple(asked.prune_at)
    shares = _ratios(asked, blocks, depth)
    ratios, counts = [float(share) for share in shares], tuple(num_kept(num_patches, share) for share in shares)
    if asked.align > 1:
        aligned = aligned_counts(counts, stage_lengths(blocks, depth), num_patches, num_prefix_tokens, asked.align)
        if aligned is None:
            raise UsageError(
                f"--align is {asked.align}, but with {num_patches} patch and {num_prefix_tokens} prefix tokens no "
                "stage can fill such tiles",
                "try --align 8, or leave it out",
            )
        counts = aligned
        # Rounded up, so that the ratio gives the count back.
        ratios = [math.ceil(Fraction(count * _RATIO_STEPS, num_patches)) / _RATIO_STEPS for count in counts]
    return Schedule(depth, num_patches, tuple(map(Stage, blocks, ratios, counts)), asked.align, asked)


def default_stages(depth: int, num_stages: int = NUM_STAGES) -> tuple[int, ...]:
    """Blocks that split `depth` into `num_stages + 1` equal parts: 12 > 3,6,9; 16 > 4,8,12; 20 > 5,10,15.

    A model too shallow for that gets as many stages as it has blocks after the first.

    Args:
        depth: number of blocks, at least 2.
        num_stages: number of stages, at least 1.

    Raises:
        UsageError: the model has fewer than two blocks, or no stage is asked for.
    """
    if num_stages < 1:
        raise UsageError(f"number of stages is {num_stages}; at least 1 is needed")
    if depth < 2:
        raise UsageError(f"the model has {depth} block(s); dropping tokens needs at least 2")
    num_stages = min(num_stages, depth - 1)
    return tuple(depth * (s + 1) // (num_stages + 1) for s in range(num_stages))


def plan_label(keep: float | None, ratios: Sequence[float], align: int) -> str:
    """How much is kept, for people: "keep 0.7", or where `keep` is None "ratios 0.8,0.6,0.4", and "align 8"."""
    kept = f"keep {keep:g}" if keep is not None else f"ratios {joined(ratios)}"
    return kept if align == 1 else f"{kept} align {align}"


def plan_slug(label: str) -> str:
    """A plan's label as part of a folder's name: "keep0.7"."""
    return label.replace(" ", "").replace(",", "-")


def _ratios(asked: Sparsity, blocks: Sequence[int], depth: int) -> list[Fraction]:
    """Share of the original patch tokens kept after each stage."""
    if asked.tokens_left is None:
        geometric = [exact(asked.keep) ** s for s in range(1, len(blocks) + 1)]
        return late_ratios(geometric, stage_lengths(blocks, depth)) if asked.token_schedule == "late" else geometric
    if len(blocks) != len(asked.tokens_left):
        raise UsageError(
            f"{len(asked.tokens_left)} share(s) of tokens left for {len(blocks)} stage(s) ({joined(blocks)})",
            "give --tokens-left and --prune-at as many values",
        )
    return [exact(share) for share in asked.tokens_left]


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


def _check_stages(blocks: Sequence[int], depth: int) -> None:
    shown = joined(blocks)
    if not blocks:
        raise UsageError("no stages given", f"name at least one block in 1..{depth - 1}, e.g. --prune-at 3,6,9")
    if any(not 1 <= block < depth for block in blocks):
        raise UsageError(
            f"stages are {shown}, but the model has blocks 0..{depth - 1} and a stage needs a block before it",
            f"choose from 1..{depth - 1}; the default is {joined(default_stages(depth))}",
        )
    if any(later <= earlier for earlier, later in pairwise(blocks)):
        raise UsageError(f"stages are {shown}, expected rising block indices", "for example --prune-at 3,6,9")
