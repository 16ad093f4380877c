"""MACs, throughput, devices and the environment they were measured in."""

from vitprune.measure.budget import keep_for_gmacs, keep_within, last_within
from vitprune.measure.devices import DTYPES, Precision, cpu_has_fast_bf16, pick_device, pick_precision
from vitprune.measure.environment import describe_environment
from vitprune.measure.macs import count_macs, count_params
from vitprune.measure.throughput import benchmark
from vitprune.measure.timing import Speedup, Timing, speedup

__all__ = [
    "DTYPES",
    "Precision",
    "Speedup",
    "Timing",
    "benchmark",
    "count_macs",
    "count_params",
    "cpu_has_fast_bf16",
    "describe_environment",
    "keep_for_gmacs",
    "keep_within",
    "last_within",
    "pick_device",
    "pick_precision",
    "speedup",
]
