"""From a request (a keep ratio, MACs, a speed, whole tiles) to a pruning plan."""

from vitprune.budget.gmacs import keep_for_gmacs, keep_within, last_within
from vitprune.budget.resolve import PlanRequest, resolve
from vitprune.budget.speed import Prediction, Speed, SpeedTarget, measure_speed

__all__ = [
    "PlanRequest",
    "Prediction",
    "Speed",
    "SpeedTarget",
    "keep_for_gmacs",
    "keep_within",
    "last_within",
    "measure_speed",
    "resolve",
]
