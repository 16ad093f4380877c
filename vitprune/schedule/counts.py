"""The arithmetic of a plan: shares of tokens, exactly, and how many tokens that is. Knows no model and no request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise


def num_kept(num_patches: int, ratio: float | Fraction) -> int:
    """floor(num_patches * ratio), at least 1; exact, so that .29 of 100 is 29 whatever binary floats say."""
    return max(1, int(num_patches * exact(ratio)))


def keep_in_words(keep: float, schedule: str | None, num_patches: int, num_tokens: Sequence[int]) -> str:
    """What a keep ratio means: what the paper does with it, and where tokens are pruned otherwise, what is done.

    Args:
        keep: rho.
        schedule: "late" or "geometric".
        num_patches: N.
        num_tokens: kept after each stage.
    """
    paper = [num_kept(num_patches, exact(keep) ** s) for s in range(1, len(num_tokens) + 1)]
    used, papers = ("/".join(map(str, counts)) for counts in (num_tokens, paper))
    if used == papers:
        return f"keep {keep:g} leaves {used} of {num_patches} patch tokens, as in the paper"
    at_cost = f"at about the cost of the paper's {papers}"
    return f"keep {keep:g} leaves {used} of {num_patches} patch tokens ({schedule} schedule), {at_cost}"


def late_ratios(geometric: Sequence[Fraction], lengths: Sequence[int]) -> list[Fraction]:
    """As many tokens in all blocks together as `geometric`, but every stage prunes equally many: 1 - d, 1 - 2d, ...

    Where that leaves too little at the end (less than 3/4 of the geometric schedule's last ratio), go only as far
    towards it as that allows. At keep .7 and 12 blocks: .76/.51/.27; at .5: .52/.26/.09.
    """
    pruned = sum((length * (1 - ratio) for length, ratio in zip(lengths, geometric, strict=True)), Fraction(0))
    step = pruned / sum(length * s for s, length in enumerate(lengths, start=1))
    even = [1 - step * s for s in range(1, len(lengths) + 1)]
    fall = geometric[-1] - even[-1]
    share = min(Fraction(1), geometric[-1] / 4 / fall) if fall > 0 else Fraction(1)
    return [ratio + share * (other - ratio) for ratio, other in zip(geometric, even, strict=True)]


def aligned_counts(
    counts: Sequence[int], lengths: Sequence[int], num_patches: int, num_prefix_tokens: int, align: int
) -> tuple[int, ...] | None:
    """Each count rounded so that it fills tiles with the prefix; None if none can.

    What rounding adds to the tokens of one stage's blocks is taken off the next stages', and the other way round.
    """

    def rounded(count: float, to_tile: Callable[[float], float]) -> int:
        return int(to_tile((count + num_prefix_tokens) / align)) * align - num_prefix_tokens

    smallest, largest, surplus = rounded(1, math.ceil), rounded(num_patches, math.floor), 0
    if smallest > largest:
        return None
    aligned = []
    for count, length in zip(counts, lengths, strict=True):
        largest = min(max(smallest, rounded(count - surplus / length, round)), largest)
        surplus += length * (largest - count)
        aligned.append(largest)
    return tuple(aligned)


def stage_lengths(blocks: Sequence[int], depth: int) -> list[int]:
    """How many blocks each stage serves."""
    return [end - start for start, end in pairwise((*blocks, depth))]


def exact(ratio: float | Fraction) -> Fraction:
    return ratio if isinstance(ratio, Fraction) else Fraction(repr(float(ratio)))


def joined(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
