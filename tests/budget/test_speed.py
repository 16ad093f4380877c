"""A plan for a speed: found by trial on a clock that is known, so that the best plan is known too."""

import json
from dataclasses import replace

import pytest
import torch

from vitprune.budget import Speed, SpeedTarget, find_plan
from vitprune.budget.speed import measure_blocks
from vitprune.cli.app import run
from vitprune.errors import UsageError
from vitprune.measure import Timing, ZeroOverheadViT
from vitprune.model import SparseViT, attach_as
from vitprune.schedule import Sparsity

CPU = torch.device("cpu")


class Clock:
    """Stands in for `benchmark`: a pass takes a millisecond per block with all tokens, and `stage_ms` per choice."""

    def __init__(self, stage_ms=0.0, drift=1.0):
        self.stage_ms, self.drift, self.num_trials = stage_ms, drift, 0

    def __call__(self, models, input_size, batch_sizes, *, device, precision, rounds, min_seconds):
        self.num_trials += 1
        speed = self.drift**self.num_trials
        return [
            Timing(name, batch_sizes[0], speed * self.milliseconds(model), 0, 0, 1, None, 1)
            for name, model in models.items()
        ]

    def milliseconds(self, model):
        if not isinstance(model, SparseViT):
            return 12.0
        schedule = model.schedule
        choosing = 0 if isinstance(model, ZeroOverheadViT) else self.stage_ms * len(schedule.stages)
        return sum(schedule.tokens_per_block()) / schedule.num_patches + choosing


@pytest.fixture
def vit(make_vit):
    return make_vit(depth=12, img_size=112)  # 49 patches


def use(monkeypatch, clock):
    monkeypatch.setattr("vitprune.budget.speed.benchmark", clock)
    return clock


def target(speedup=None, latency_ms=None):
    return SpeedTarget(speedup, latency_ms, 1, "fp32")


def best_keep(vit, clock, allowed_ms, **plan):
    """By trying them all."""
    steps = (step / 1000 for step in range(999, 0, -1))
    return next(k for k in steps if clock.milliseconds(attach_as(vit, Sparsity(k, **plan))) <= allowed_ms)


@pytest.mark.parametrize("asked", [{"speedup": 1.5}, {"latency_ms": 8.0}])
@pytest.mark.parametrize(("stage_ms", "dropped"), [(0.0, "drop"), (0.1, "drop"), (0.1, "fold")])
def test_it_keeps_what_fits_and_hardly_less(vit, monkeypatch, asked, stage_ms, dropped):
    clock = use(monkeypatch, Clock(stage_ms))
    found, promise = find_plan(vit, Sparsity(schedule="late", dropped=dropped), target(**asked), CPU)
    assert promise.speed.sparse_ms <= 8.0
    assert promise.speed.sparse_ms == pytest.approx(clock.milliseconds(attach_as(vit, found)))
    assert found.keep == pytest.approx(best_keep(vit, clock, 8.0, schedule="late"), abs=0.03)
    assert (found.schedule, found.dropped) == ("late", dropped)
    assert attach_as(vit, found).schedule.blocks == (3, 6, 9)


def test_where_choosing_is_dear_there_are_two_stages(vit, monkeypatch):
    use(monkeypatch, Clock(stage_ms=1.2))
    found, _ = find_plan(vit, Sparsity(), target(1.5), CPU)
    assert found.stages == (4, 8)


def test_one_stage_only_where_nothing_else_reaches_it(vit, monkeypatch):
    clock = use(monkeypatch, Clock(stage_ms=3.0))
    found, promise = find_plan(vit, Sparsity(), target(1.2), CPU)
    assert found.stages == (6,)
    assert promise.speed.sparse_ms <= 10
    assert clock.num_trials > 3


def test_stages_asked_for_stay(vit, monkeypatch):
    use(monkeypatch, Clock(stage_ms=1.2))
    found, _ = find_plan(vit, Sparsity(stages=[2, 5, 8]), target(1.5), CPU)
    assert tuple(found.stages) == (2, 5, 8)


def test_a_machine_that_becomes_slower_misleads_nobody(vit, monkeypatch):
    use(monkeypatch, Clock(stage_ms=0.1, drift=1.3))
    found, promise = find_plan(vit, Sparsity(), target(1.5), CPU)
    assert promise.speed.speedup == pytest.approx(1.5, rel=0.04)
    assert found.keep == pytest.approx(best_keep(vit, Clock(0.1), 8.0), abs=0.03)


def test_what_is_promised_is_not_the_luck_of_a_trial(vit, monkeypatch):
    class Lucky(Clock):
        """The sparse model is a tenth faster than it is while plans are tried."""

        def __call__(self, models, *args, min_seconds, **kwargs):
            trial = set(models) == {"dense", "sparse"} and min_seconds < 2
            timings = super().__call__(models, *args, min_seconds=min_seconds, **kwargs)
            luck = 0.9 if trial else 1.0
            return [replace(t, latency_ms_p50=t.latency_ms_p50 * (luck if t.model == "sparse" else 1)) for t in timings]

    use(monkeypatch, Lucky())
    found, promise = find_plan(vit, Sparsity(), target(1.5), CPU)
    assert promise.speed.sparse_ms == pytest.approx(Clock().milliseconds(attach_as(vit, found)))
    assert promise.speed.speedup < 1.5


def test_what_cannot_be_is_told_with_what_can(vit, monkeypatch):
    use(monkeypatch, Clock(stage_ms=1.0))
    with pytest.raises(UsageError, match=r"ms 1.5 at batch 1, fp32 cannot be reached on cpu.* about 3.\d+ ms") as error:
        find_plan(vit, Sparsity(), target(latency_ms=1.5), CPU)
    assert "take a smaller model" in error.value.hint
    with pytest.raises(UsageError, match=r"cannot be reached on cpu: keep 0.\d+ at stages 3,6,9 takes \d"):
        find_plan(vit, Sparsity(), target(latency_ms=3.8), CPU)
    with pytest.raises(UsageError, match=r"what the dense model reaches already: 12 ms"):
        find_plan(vit, Sparsity(), target(latency_ms=12), CPU)


def test_blocks_are_timed_for_real(vit):
    blocks = measure_blocks(vit, target(2.0), CPU, seconds=0.01)
    assert blocks.counts[-1] == 49
    assert list(blocks.counts) == sorted(blocks.counts)
    assert list(blocks.saved_ms) == sorted(blocks.saved_ms, reverse=True)
    assert blocks.saved_ms[-1] == 0
    assert blocks.share(attach_as(vit, Sparsity(1.0)).schedule) == 1


def test_promise_and_outcome_are_told_apart(vit, monkeypatch):
    use(monkeypatch, Clock())
    _, promise = find_plan(vit, Sparsity(), target(1.5), CPU)
    said = promise.compared_with(Speed(12.0, 8.4))
    assert (said["speedup"], said["promised_speedup"] >= 1.5, said["measured_speedup"], said["met"]) == (
        *(1.5, True, pytest.approx(12 / 8.4), False),
    )
    assert promise.compared_with(Speed(12.0, 7.9))["met"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target-speedup", "0.9"], "--target-speedup is 0.9, expected more than 1"),
        (["--target-speedup", "nan"], "--target-speedup is nan"),
        (["--target-latency-ms", "0"], "--target-latency-ms is 0, expected milliseconds above 0"),
        (["--target-speedup", "1.5", "--keep", "0.7"], "--keep and --target-speedup say the same thing"),
        (["--target-speedup", "2", "--target-latency-ms", "4"], "--target-speedup and --target-latency-ms say"),
    ],
)
@pytest.mark.parametrize("command", ["sparsify", "bench"])
def test_targets_that_are_none(command, options, said, capsys):
    assert run([command, "demo", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_resumed_run_does_not_measure_again(capsys):
    assert run(["sparsify", "demo", "--resume", "--target-speedup", "1.5"]) == 2
    assert "--target-speedup may measure something else" in capsys.readouterr().err


def test_the_report_holds_promise_and_outcome(tmp_path, monkeypatch, capsys):
    use(monkeypatch, Clock(stage_ms=0.05))
    options = ["--limit", "8", "--steps", "1", "--warm-start-steps", "1", "-b", "4", "-j", "0", "--device", "cpu"]
    monkeypatch.setattr("vitprune.jobs.side_by_side.BENCH_SECONDS", 0.01)
    asked = ["--target-speedup", "1.3", "--target-batch-size", "2", "--json"]
    assert run(["sparsify", "demo", "-o", str(tmp_path / "run"), *options, *asked]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["target"] == json.loads((tmp_path / "run/report.json").read_text())["target"]
    assert report["target"]["batch_size"] == 2
    assert report["target"]["speedup"] == 1.3
    assert report["target"]["promised_speedup"] == pytest.approx(report["target"]["measured_speedup"])
    assert report["target"]["met"]
    assert f"keep {report['keep']:g}" in printed.err
