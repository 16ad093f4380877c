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
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from vitprune.errors import UsageError
from vitprune.schedule.counts import aligned_counts, exact, joined, late_ratios, num_kept, stage_lengths
from vitprune.schedule.sparsity import Sparsity

NUM_STAGES = 3
_RATIO_STEPS = 1_000_000
MIN_TOKENS = 2
"""Patch tokens that a stage should leave; with fewer than that many nothing is compared with anything."""


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
            check_stages(self.blocks, self.depth)
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
        check_stages(asked.prune_at, depth)
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


def schedule_for(backbone: Any, sparsity: Sparsity) -> Schedule:
    """The stages of a `vitprune.backbones.Backbone`; raises what `make_schedule` does."""
    return make_schedule(backbone.depth, backbone.num_patches, sparsity, backbone.num_prefix_tokens)


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


def check_stages(blocks: Sequence[int], depth: int) -> None:
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
