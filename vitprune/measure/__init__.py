"""MACs, throughput, and the environment they were measured in."""

from vitprune.measure.bound import BenchModel, Kind, ZeroOverheadViT, side_by_side, with_bounds
from vitprune.measure.environment import describe_environment
from vitprune.measure.macs import count_macs, count_params, describe_plan
from vitprune.measure.modes import Mode, check_mode
from vitprune.measure.throughput import Timing, benchmark, remark, speedups, unclear

__all__ = [
    "BenchModel",
    "Kind",
    "Mode",
    "Timing",
    "ZeroOverheadViT",
    "benchmark",
    "check_mode",
    "count_macs",
    "count_params",
    "describe_environment",
    "describe_plan",
    "remark",
    "side_by_side",
    "speedups",
    "unclear",
    "with_bounds",
]
