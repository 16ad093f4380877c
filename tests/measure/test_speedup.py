"""A speed-up is stated with what the rounds of its measurement allow to say."""

import statistics

import pytest
import torch

from vitprune.measure import Timing, remark, speedups
from vitprune.measure.throughput import interval


def timings(dense, sparse):
    """At batch size 2, from the ms of each round."""
    return [
        Timing(name, 2, statistics.median(ms), 0, 0, 2e3 / statistics.median(ms), None, 1, rounds_ms=tuple(ms))
        for name, ms in (("dense", dense), ("sparse", sparse))
    ]


def test_the_interval_is_that_of_the_median():
    """Of ten values the second smallest to the second largest: 97.9 %, and the next inner pair has 89.1 %."""
    assert interval(range(10)) == [1, 8]
    assert interval(range(6)) == [0, 5]
    assert interval(range(5)) is None
    draws = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0))
    held = sum(low <= 0 <= high for low, high in map(interval, draws.tolist()))
    assert 0.96 < held / len(draws) < 0.99


def test_what_slows_both_models_in_a_round_does_not_blur_their_ratio():
    load = [1.0, 3.0, 1.5, 1.0, 2.0, 5.0, 1.0, 1.2, 1.0, 2.5]
    (row,) = speedups("sparse", timings([20 * part for part in load], [10 * part for part in load]))
    assert row == {"batch_size": 2, "speedup": 2.0, "speedup_ci95": [2.0, 2.0], "slower": False}
    assert remark(row["slower"], row["speedup_ci95"]) == ""


@pytest.mark.parametrize(
    ("sparse", "slower", "said"),
    [
        ([9, 11, 9, 12, 8, 11, 9, 12, 10, 11], False, "within noise"),
        ([11, 12, 11, 13, 11, 12, 11, 12, 11, 12], True, "SLOWER"),
        ([8, 9, 8, 9, 8, 9, 8, 9, 8, 9], False, ""),
    ],
)
def test_slower_is_said_only_beyond_the_noise(sparse, slower, said):
    (row,) = speedups("sparse", timings([10.0] * 10, sparse))
    assert row["slower"] is slower
    assert row["speedup_ci95"][0] <= row["speedup"] <= row["speedup_ci95"][1]
    assert remark(row["slower"], row["speedup_ci95"]) == said


def test_few_rounds_give_a_ratio_and_no_interval():
    (row,) = speedups("sparse", timings([10.0] * 2, [11.0] * 2))
    assert row == {"batch_size": 2, "speedup": pytest.approx(10 / 11), "speedup_ci95": None, "slower": True}
