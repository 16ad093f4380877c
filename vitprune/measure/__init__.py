"""MACs, throughput, devices and the environment they were measured in."""

from vitprune.measure.attention import AttentionChoice, set_attention
from vitprune.measure.bound import FloorViT
from vitprune.measure.environment import describe_environment
from vitprune.measure.loader import ImageSource, check_source
from vitprune.measure.macs import count_macs, count_params
from vitprune.measure.modes import Mode, check_mode
from vitprune.measure.sidebyside import DENSE, Contestant, Kind, side_by_side, with_floors
from vitprune.measure.throughput import benchmark
from vitprune.measure.timing import Speedup, Timing, speedup

__all__ = [
    "DENSE",
    "AttentionChoice",
    "Contestant",
    "FloorViT",
    "ImageSource",
    "Kind",
    "Mode",
    "Speedup",
    "Timing",
    "benchmark",
    "check_mode",
    "check_source",
    "count_macs",
    "count_params",
    "describe_environment",
    "set_attention",
    "side_by_side",
    "speedup",
    "with_floors",
]
