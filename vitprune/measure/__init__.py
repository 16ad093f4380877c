"""MACs, throughput, devices and the environment they were measured in."""

from vitprune.measure.attention import AttentionChoice, set_attention
from vitprune.measure.budget import keep_for_gmacs, keep_within, last_within
from vitprune.measure.devices import DTYPES, Precision, cpu_has_fast_bf16, pick_device, pick_precision
from vitprune.measure.environment import describe_environment
from vitprune.measure.floor import FloorViT
from vitprune.measure.loader import PictureSource, check_source
from vitprune.measure.macs import count_macs, count_params
from vitprune.measure.modes import Mode, check_mode
from vitprune.measure.sidebyside import DENSE, Contestant, Kind, side_by_side, with_floors
from vitprune.measure.target import Promise, Speed, SpeedTarget, find_plan, measure_speed
from vitprune.measure.throughput import benchmark
from vitprune.measure.tiles import fastest_align
from vitprune.measure.timing import Speedup, Timing, speedup

__all__ = [
    "DENSE",
    "DTYPES",
    "AttentionChoice",
    "Contestant",
    "FloorViT",
    "Kind",
    "Mode",
    "PictureSource",
    "Precision",
    "Promise",
    "Speed",
    "SpeedTarget",
    "Speedup",
    "Timing",
    "benchmark",
    "check_mode",
    "check_source",
    "count_macs",
    "count_params",
    "cpu_has_fast_bf16",
    "describe_environment",
    "fastest_align",
    "find_plan",
    "keep_for_gmacs",
    "keep_within",
    "last_within",
    "measure_speed",
    "pick_device",
    "pick_precision",
    "set_attention",
    "side_by_side",
    "speedup",
    "with_floors",
]
