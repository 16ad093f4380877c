"""From a request (MACs, a speed, whole tiles) to a pruning schedule."""

from vitprune.budget.alignment import fastest_align
from vitprune.budget.gmacs import keep_for_gmacs, keep_within, last_within
from vitprune.budget.speed import Promise, Speed, SpeedTarget, find_plan, measure_speed

__all__ = [
    "Promise",
    "Speed",
    "SpeedTarget",
    "fastest_align",
    "find_plan",
    "keep_for_gmacs",
    "keep_within",
    "last_within",
    "measure_speed",
]
