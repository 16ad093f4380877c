"""From a request to a plan, as the command line and Python do it."""

import sys

import pytest

import vitprune
from vitprune.budget import PlanRequest, Prediction, Speed, resolve
from vitprune.common.progress import Listener
from vitprune.errors import UsageError
from vitprune.measure import count_macs
from vitprune.model import attach_as
from vitprune.schedule import Sparsity

DEFAULTS = Sparsity(schedule="late", dropped="fold")


class Hearing(Listener):
    def __init__(self):
        self.sentences = []

    def say(self, sentence):
        self.sentences.append(sentence)


@pytest.fixture(scope="module")
def vit(make_vit):
    return make_vit(img_size=96, depth=3)


def test_what_is_not_asked_for_is_the_default(vit):
    assert resolve(PlanRequest(), vit, DEFAULTS) == (DEFAULTS, None)
    asked = PlanRequest(ratios=[0.5], stages=[2], dropped="drop", align=8)
    assert resolve(asked, vit, DEFAULTS)[0] == Sparsity(0.7, [2], "late", [0.5], "drop", 8)
    assert PlanRequest(device="cpu", precision="bf16").is_empty
    assert not PlanRequest(stages=[2]).is_empty


def test_a_budget_in_macs_becomes_a_keep_ratio(vit):
    hearing = Hearing()
    sparsity, prediction = resolve(PlanRequest(target_gmacs=0.0055), vit, DEFAULTS, hearing)
    assert prediction is None
    assert 0.005 < count_macs(attach_as(vit, sparsity), (3, 96, 96)) / 1e9 <= 0.0055
    assert hearing.sentences == [f"--target-gmacs 0.0055: keep ratio {sparsity.keep:g}"]


def test_what_is_measured_gets_device_precision_and_batch_size(vit, monkeypatch):
    seen = []

    def fastest_align(model, sparsity, *how):
        seen.append((sparsity.align, *map(str, how[:3])))
        return 8

    def find_plan(model, sparsity, target, device, listener):
        seen.append((sparsity.align, str(target), str(device)))
        return sparsity, Prediction(target, Speed(2.0, 1.0))

    module = sys.modules["vitprune.budget.resolve"]  # the package's `resolve` is the function
    monkeypatch.setattr(module, "fastest_align", fastest_align)
    monkeypatch.setattr(module, "find_plan", find_plan)
    how = {"target_batch_size": 4, "precision": "bf16", "device": "cpu"}
    request = PlanRequest(align="auto", target_speedup=1.5, **how)
    sparsity, prediction = resolve(request, vit, DEFAULTS)
    assert (sparsity.align, prediction.speed.speedup) == (8, 2.0)
    assert seen == [(1, "4", "cpu", "bf16"), (8, "--target-speedup 1.5 at batch 4, bf16", "cpu")]
    measured = [PlanRequest(align="auto"), request, PlanRequest(target_latency_ms=1.0), PlanRequest(align=8)]
    assert [each.measured for each in measured] == ["--align auto", "--target-speedup", "--target-latency-ms", None]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"keep": 0.5, "target_gmacs": 1.0}, "--keep and --target-gmacs say the same thing"),
        ({"ratios": [0.5], "schedule": "late"}, "a schedule of their own"),
        ({"keep": 1.5}, "keep ratio is 1.5"),
        ({"target_speedup": 1.0}, "--target-speedup is 1, expected more than 1"),
        ({"target_latency_ms": float("inf")}, "--target-latency-ms is inf"),
    ],
)
def test_what_excludes_each_other_is_refused(asked, said):
    with pytest.raises(UsageError, match=said) as error:
        PlanRequest(**asked)
    assert error.value.hint or "schedule" in said


def test_python_has_budgets_too(vit):
    with pytest.warns(UserWarning, match="not trained"):
        sparse = vitprune.sparsify(vit, target_gmacs=0.0055)
    assert count_macs(sparse, (3, 96, 96)) / 1e9 <= 0.0055
    with pytest.raises(UsageError, match="--keep and --target-gmacs"):
        vitprune.sparsify(vit, 0.7, target_gmacs=0.0055)
