"""A plan for a speed: found by trial on a clock that is known, so that the best plan is known too."""

import math
import random
import statistics

import pytest
import torch

from vitprune.budget.speed import Speed, SpeedTarget, find_plan, measure_speed
from vitprune.common.progress import SILENT
from vitprune.errors import UsageError
from vitprune.measure import Timing, ZeroOverheadViT
from vitprune.model import SparseViT, attach_as
from vitprune.schedule import Sparsity

CPU = torch.device("cpu")


class Clock:
    """Stands in for `benchmark`: a pass takes a millisecond per block with all tokens, and `stage_ms` per choice.

    From trial to trial all become slower by `drift`, and each is off by chance, by `noise`.
    """

    def __init__(self, stage_ms=0.0, drift=1.0, noise=0.0, seed=0):
        self.stage_ms, self.drift, self.noise, self.num_trials = stage_ms, drift, noise, 0
        self.chance = random.Random(seed)

    def __call__(self, models, input_size, batch_sizes, *, device, precision, rounds, min_seconds):
        self.num_trials += 1
        speed = self.drift**self.num_trials
        return [
            Timing(name, batch_sizes[0], speed * self.milliseconds(model) * self.luck(), 0, 0, 1, None, 1)
            for name, model in models.items()
        ]

    def luck(self):
        return math.exp(self.chance.gauss(0, self.noise))

    def milliseconds(self, model):
        if not isinstance(model, SparseViT):
            return 12.0
        schedule = model.schedule
        choosing = 0 if isinstance(model, ZeroOverheadViT) else self.stage_ms * len(schedule.stages)
        return sum(schedule.tokens_per_block()) / schedule.num_patches + choosing


@pytest.fixture(scope="module")
def vit(make_vit):
    return make_vit(depth=12, img_size=112)  # 49 patches


@pytest.fixture
def find(vit, monkeypatch):
    """`find(clock, sparsity, speedup or latency_ms)`: a plan by this clock."""

    def find(clock, sparsity=None, **target):
        monkeypatch.setattr("vitprune.budget.speed.benchmark", clock)
        target = {"speedup": None, "latency_ms": None} | target
        return find_plan(
            vit, sparsity or Sparsity(), SpeedTarget(**target, batch_size=1, precision="fp32"), CPU, SILENT
        )

    return find


def best_keep(vit, clock, allowed_ms, **plan):
    """By trying them all."""
    steps = (step / 200 for step in range(199, 0, -1))
    return next(k for k in steps if clock.milliseconds(attach_as(vit, Sparsity(k, **plan))) <= allowed_ms)


@pytest.mark.parametrize("target", [{"speedup": 1.5}, {"latency_ms": 8.0}])
@pytest.mark.parametrize(("stage_ms", "pruned"), [(0.0, "drop"), (0.1, "merge")])
def test_it_keeps_what_fits_and_hardly_less(vit, find, target, stage_ms, pruned):
    clock = Clock(stage_ms)
    found, prediction = find(clock, Sparsity(token_schedule="late", pruned=pruned), **target)
    assert prediction.speed.sparse_ms <= 8.0
    assert prediction.speed.sparse_ms == pytest.approx(clock.milliseconds(attach_as(vit, found)), rel=0.01)
    assert found.keep == pytest.approx(best_keep(vit, clock, 8.0, token_schedule="late"), abs=0.03)
    assert (found.token_schedule, found.pruned) == ("late", pruned)
    assert attach_as(vit, found).schedule.blocks == (3, 6, 9)
    assert clock.num_trials <= 11


def test_fewer_stages_where_choosing_is_dear(find):
    found, _ = find(Clock(stage_ms=1.2), speedup=1.5)
    assert found.prune_at == (4, 8)
    found, _ = find(Clock(stage_ms=1.2), Sparsity(prune_at=[2, 5, 8]), speedup=1.5)
    assert found.prune_at == (2, 5, 8), "stages that are given stay"
    found, prediction = find(Clock(stage_ms=3.0), speedup=1.2)
    assert found.prune_at == (6,), "one stage only where nothing else reaches it"
    assert prediction.speed.sparse_ms <= 10


def test_a_machine_that_becomes_slower_misleads_nobody(vit, find):
    found, prediction = find(Clock(stage_ms=0.1, drift=1.3), speedup=1.5)
    assert prediction.speed.speedup == pytest.approx(1.5, rel=0.04)
    assert found.keep == pytest.approx(best_keep(vit, Clock(0.1), 8.0), abs=0.03)


def test_the_prediction_is_not_the_luck_of_a_trial(vit, find):
    """A quotient of two times that are each off by 4 % is off by 5.7 %; the prediction of a whole search by half."""
    off = []
    for seed in range(16):
        clock = Clock(stage_ms=0.1, noise=0.04, seed=seed)
        found, prediction = find(clock, Sparsity(prune_at=[3, 6, 9]), speedup=1.5)
        off.append(prediction.speed.speedup / (12 / clock.milliseconds(attach_as(vit, found))) - 1)
        assert prediction.speed.speedup == pytest.approx(1.5 / 0.99, rel=0.02), "the plan is the one that it meets"
    assert statistics.fmean(error**2 for error in off) ** 0.5 < 0.035
    assert abs(statistics.fmean(off)) < 0.02, "nor is it off to one side"


def test_an_impossible_target_is_refused_with_what_is_possible(find):
    clock = Clock(stage_ms=1.0)
    with pytest.raises(UsageError, match=r"1.5 at batch 1, fp32 cannot be reached on cpu.* 4,8: 6.16 ms") as error:
        find(clock, latency_ms=1.5)
    assert "take a smaller model" in error.value.hint
    assert clock.num_trials == 3, "one for each number of stages"
    with pytest.raises(UsageError, match=r"what the dense model reaches already: 12 ms"):
        find(clock, latency_ms=12)


def test_prediction_and_outcome_are_kept_apart(find):
    _, prediction = find(Clock(), speedup=1.5)
    outcome = prediction.compared_with(Speed(12.0, 8.4))
    assert (outcome["speedup"], outcome["measured_speedup"], outcome["met"]) == (1.5, pytest.approx(12 / 8.4), False)
    assert outcome["predicted_speedup"] >= 1.5
    assert prediction.compared_with(Speed(12.0, 7.9))["met"]


def test_speed_is_measured_for_real(make_vit):
    model = make_vit(img_size=64)
    speed = measure_speed(model, attach_as(model, Sparsity(0.5)), SpeedTarget(2.0, None, 1, "fp32"), CPU, 0.01)
    assert speed.dense_ms > 0
    assert speed.speedup == speed.dense_ms / speed.sparse_ms
