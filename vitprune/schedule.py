"""From a keep ratio to a plan: which blocks get a predictor, and how many tokens stay after each.

DynamicViT (https://arxiv.org/abs/2106.02034, section 4): for a keep ratio rho, stage s = 1, 2, 3 keeps rho^s
of the ORIGINAL number of patch tokens. The late schedule drops more of them later, where they are worth less, at the
same cost. Pure Python: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from vitprune.errors import UsageError

NUM_STAGES = 3
_RATIO_STEPS = 1_000_000

ScheduleName = Literal["geometric", "late"]


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
        num_patches: patch tokens before anything is dropped.
        stages: in order.
        align: the whole sequences after each stage, prefix tokens included, are multiples of this.

    Raises:
        UsageError: blocks out of range or order, or a stage that keeps more tokens than reach it.
    """

    depth: int
    num_patches: int
    stages: tuple[Stage, ...]
    align: int = 1

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

    def stages_for(self, num_patches: int, num_prefix_tokens: int) -> tuple[Stage, ...]:
        """The stages with counts for another number of patches; not aligned where no tile would be filled."""
        if num_patches == self.num_patches:
            return self.stages
        counts: Sequence[int] = [num_kept(num_patches, ratio) for ratio in self.ratios]
        if self.align > 1:
            counts = _aligned(counts, self.blocks, self.depth, num_patches, num_prefix_tokens, self.align) or counts
        return tuple(replace(stage, num_tokens=count) for stage, count in zip(self.stages, counts, strict=True))

    def tokens_per_block(self) -> tuple[int, ...]:
        """Number of patch tokens that each of the `depth` blocks sees."""
        counts, current = [], self.num_patches
        at_block = {stage.block: stage.num_tokens for stage in self.stages}
        for block in range(self.depth):
            current = at_block.get(block, current)
            counts.append(current)
        return tuple(counts)


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


def num_kept(num_patches: int, ratio: float | Fraction) -> int:
    """floor(num_patches * ratio), at least 1; exact, so that .29 of 100 is 29 whatever binary floats say."""
    exact = ratio if isinstance(ratio, Fraction) else Fraction(repr(float(ratio)))
    return max(1, int(num_patches * exact))


def plan_label(keep: float | None, ratios: Sequence[float], align: int) -> str:
    """How much is kept, for people: "keep 0.7", or where `keep` is None "ratios 0.8,0.6,0.4", and "align 8"."""
    kept = f"keep {keep:g}" if keep is not None else "ratios " + ",".join(f"{ratio:g}" for ratio in ratios)
    return kept if align == 1 else f"{kept} align {align}"


def plan_slug(label: str) -> str:
    """A plan's label as part of a folder's name: "keep0.7"."""
    return label.replace(" ", "").replace(",", "-")


def check_keep(keep: float) -> None:
    """Raise UsageError unless `keep` is in (0, 1]."""
    if not 0 < keep <= 1:  # also catches NaN
        raise UsageError(f"keep ratio is {keep:g}, expected a number in (0, 1]", "try --keep 0.7")


def make_schedule(
    depth: int,
    num_patches: int,
    keep: float = 0.7,
    stages: Sequence[int] | None = None,
    *,
    shape: ScheduleName = "geometric",
    ratios: Sequence[float] | None = None,
    align: int = 1,
    num_prefix_tokens: int = 0,
) -> Schedule:
    """The stages of a model that keeps `keep`, `keep`^2, `keep`^3, ... of its patch tokens, or others at that cost.

    Args:
        depth: number of transformer blocks.
        num_patches: number of patch tokens N before anything is dropped (prefix tokens not counted).
        keep: rho, the share of tokens one stage keeps, in (0, 1]. At 1 nothing is dropped and there are no stages.
        stages: block indices before which a predictor acts, rising, each in [1, depth - 1]; None for
            `default_stages(depth)`.
        shape: "geometric", the paper's, or "late": see `_late_ratios`.
        ratios: shares of the original tokens left after each stage, in (0, 1], not rising; instead of `keep` and
            `shape`. One stage each.
        align: after each stage prefix and patch tokens together are to be a multiple of this, so that they fill the
            tiles of the hardware; all blocks together see as many tokens as without, as nearly as that allows.
        num_prefix_tokens: P, for `align`.

    Raises:
        UsageError: `keep`, `stages` or `ratios` is out of range or out of order, or there are too few tokens to align.
    """
    if align < 1:
        raise UsageError(f"--align is {align}, expected at least 1", "try --align 8")
    schedule = _unaligned(depth, num_patches, keep, stages, shape, ratios)
    return schedule if align == 1 else _align(schedule, num_prefix_tokens, align)


def _unaligned(
    depth: int,
    num_patches: int,
    keep: float,
    stages: Sequence[int] | None,
    shape: ScheduleName,
    ratios: Sequence[float] | None,
) -> Schedule:
    if ratios is not None:
        return _free_schedule(depth, num_patches, ratios, stages)
    check_keep(keep)
    if keep == 1 and stages is None:
        return Schedule(depth, num_patches, ())
    blocks = default_stages(depth) if stages is None else tuple(stages)
    _check_stages(blocks, depth)
    if keep == 1:
        return Schedule(depth, num_patches, ())
    rho = Fraction(repr(float(keep)))
    exact = [rho**s for s in range(1, len(blocks) + 1)]
    if shape == "late":
        exact = _late_ratios(exact, blocks, depth)
    return _plan(depth, num_patches, blocks, exact)


def _late_ratios(geometric: Sequence[Fraction], blocks: Sequence[int], depth: int) -> list[Fraction]:
    """As many tokens in all blocks together as `geometric`, but every stage drops equally many: 1 - d, 1 - 2d, ...

    Where that leaves too little at the end (less than 3/4 of the geometric schedule's last ratio), go only as far
    towards it as that allows. At keep .7 and 12 blocks: .76/.51/.27; at .5: .52/.26/.09.
    """
    lengths = [end - start for start, end in pairwise((*blocks, depth))]
    dropped = sum((length * (1 - ratio) for length, ratio in zip(lengths, geometric, strict=True)), Fraction(0))
    step = dropped / sum(length * s for s, length in enumerate(lengths, start=1))
    even = [1 - step * s for s in range(1, len(blocks) + 1)]
    fall = geometric[-1] - even[-1]
    share = min(Fraction(1), geometric[-1] / 4 / fall) if fall > 0 else Fraction(1)
    return [ratio + share * (other - ratio) for ratio, other in zip(geometric, even, strict=True)]


def _align(schedule: Schedule, num_prefix_tokens: int, align: int) -> Schedule:
    depth, num_patches = schedule.depth, schedule.num_patches
    counts = _aligned(schedule.num_tokens, schedule.blocks, depth, num_patches, num_prefix_tokens, align)
    if counts is None:
        raise UsageError(
            f"--align is {align}, but with {num_patches} patch and {num_prefix_tokens} prefix tokens no stage can fill "
            "such tiles",
            "try --align 8, or leave it out",
        )
    # Rounded up, so that the ratio gives the count back.
    ratios = [math.ceil(Fraction(count * _RATIO_STEPS, num_patches)) / _RATIO_STEPS for count in counts]
    stages = (Stage(*each) for each in zip(schedule.blocks, ratios, counts, strict=True))
    return Schedule(depth, num_patches, tuple(stages), align)


def _aligned(
    counts: Sequence[int], blocks: Sequence[int], depth: int, num_patches: int, num_prefix_tokens: int, align: int
) -> tuple[int, ...] | None:
    """Each count rounded up or down to fill tiles, so that all blocks together see as many tokens as before.

    Of all ways to round that keep the counts from rising, the one nearest to that sum, then nearest to the counts.
    None if there is none.
    """
    lengths = [end - start for start, end in pairwise((*blocks, depth))]
    ways: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {(0, num_patches): (0, ())}
    for count, length in zip(counts, lengths, strict=True):
        below = (count + num_prefix_tokens) // align * align - num_prefix_tokens
        longer: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        for (surplus, last), (distance, chosen) in ways.items():
            for rounded in {below, count if below == count else below + align}:
                if 1 <= rounded <= last:
                    key = (surplus + length * (rounded - count), rounded)
                    way = (distance + abs(rounded - count), (*chosen, rounded))
                    longer[key] = min(way, longer.get(key, way))
        ways = longer
    best = min(((abs(surplus), *way) for (surplus, _), way in ways.items()), default=None)
    return None if best is None else best[2]


def _free_schedule(depth: int, num_patches: int, ratios: Sequence[float], stages: Sequence[int] | None) -> Schedule:
    shown = ",".join(f"{ratio:g}" for ratio in ratios)
    if not ratios or any(not 0 < ratio <= 1 for ratio in ratios):
        raise UsageError(f"ratios are '{shown}', expected numbers in (0, 1]", "for example --ratios 0.8,0.6,0.4")
    if any(later > earlier for earlier, later in pairwise(ratios)):
        raise UsageError(
            f"ratios are {shown}, but a token once dropped does not come back",
            "give falling shares of the original tokens, for example --ratios 0.8,0.6,0.4",
        )
    blocks = default_stages(depth, len(ratios)) if stages is None else tuple(stages)
    _check_stages(blocks, depth)
    if len(blocks) != len(ratios):
        where = ",".join(map(str, blocks))
        raise UsageError(f"{len(ratios)} ratios ({shown}) for {len(blocks)} stages ({where})", "give one ratio a stage")
    return _plan(depth, num_patches, blocks, [Fraction(repr(float(ratio))) for ratio in ratios])


def _plan(depth: int, num_patches: int, blocks: Sequence[int], ratios: Sequence[Fraction]) -> Schedule:
    return Schedule(
        depth,
        num_patches,
        tuple(Stage(b, float(r), num_kept(num_patches, r)) for b, r in zip(blocks, ratios, strict=True)),
    )


def _check_stages(blocks: Sequence[int], depth: int) -> None:
    shown = ",".join(map(str, blocks))
    if not blocks:
        raise UsageError("no stages given", f"name at least one block in 1..{depth - 1}, e.g. --stages 3,6,9")
    if any(not 1 <= block < depth for block in blocks):
        raise UsageError(
            f"stages are {shown}, but the model has blocks 0..{depth - 1} and a stage needs a block before it",
            f"choose from 1..{depth - 1}; the default is {','.join(map(str, default_stages(depth)))}",
        )
    if any(later <= earlier for earlier, later in pairwise(blocks)):
        raise UsageError(f"stages are {shown}, expected rising block indices", "for example --stages 3,6,9")
