"""From a request to a plan, as the command line and Python do it."""

from dataclasses import replace

import pytest

import vitprune
from vitprune.budget.gmacs import last_within
from vitprune.budget.resolve import PlanRequest, resolve
from vitprune.budget.speed import Prediction, Speed
from vitprune.common.progress import Listener
from vitprune.errors import UsageError
from vitprune.measure import count_macs
from vitprune.model import attach_as
from vitprune.schedule import Sparsity

SIZE = (3, 96, 96)
DEFAULTS = Sparsity(token_schedule="late", pruned="merge")


class Hearing(Listener):
    def __init__(self):
        self.sentences = []

    def say(self, sentence):
        self.sentences.append(sentence)


@pytest.fixture(scope="module")
def vit(make_vit):
    return make_vit(img_size=96, depth=2)


def test_what_is_not_asked_for_is_the_default(vit):
    assert resolve(PlanRequest(), vit, DEFAULTS) == (DEFAULTS, None)
    asked = PlanRequest(tokens_left=[0.5], prune_at=[1], pruned="drop", align=8)
    assert resolve(asked, vit, DEFAULTS)[0] == Sparsity(0.7, [1], "late", [0.5], "drop", 8)
    assert PlanRequest(device="cpu").is_empty
    assert not PlanRequest(prune_at=[2]).is_empty


@pytest.mark.parametrize("asked", [{"keep": 1}, {"keep": 1.0}, {"tokens_left": [1, 1, 1.0]}])
def test_a_plan_that_prunes_nothing_is_refused_unless_it_is_compared_with_others(vit, asked):
    with pytest.raises(UsageError, match="1 prunes nothing: the dense model is what you have") as caught:
        PlanRequest(**asked)
    assert "0.7" in caught.value.hint or "0.8,0.6,0.4" in caught.value.hint
    assert next(iter(asked)) in str(caught.value)
    assert PlanRequest(**asked, dense_too=True)
    assert PlanRequest(tokens_left=[1, 1, 0.5])
    with pytest.raises(UsageError, match="prunes nothing"):
        vitprune.sparsify(vit, **asked)


def test_a_plan_that_starves_the_model_is_said(vit):
    hearing = Hearing()
    resolve(PlanRequest(keep=0.05, prune_at=[1]), vit, DEFAULTS, hearing)
    assert hearing.sentences == [
        "keep 0.05 leaves 1 of 36 patch tokens: from block 1 on it is a single one, and accuracy will be poor"
    ]
    resolve(PlanRequest(keep=0.06, prune_at=[1]), vit, DEFAULTS, hearing)
    assert len(hearing.sentences) == 1, "2 of 36"


def test_last_within_is_the_last_that_fits():
    for budget in range(-3, 30):
        fitting = [n for n in range(2, 21) if n * n <= budget]
        assert last_within(budget, lambda n: n * n, 2, 20) == max(fitting, default=2)


@pytest.mark.parametrize("defaults", [DEFAULTS, Sparsity(token_schedule="geometric", pruned="drop")])
def test_a_budget_in_macs_becomes_the_largest_keep_ratio_that_fits(vit, defaults):
    hearing, target = Hearing(), 0.75 * count_macs(vit, SIZE) / 1e9
    found, prediction = resolve(PlanRequest(target_gmacs=target, prune_at=[1]), vit, defaults, hearing)
    assert prediction is None
    assert found == replace(defaults, keep=found.keep, prune_at=[1])
    assert count_macs(attach_as(vit, found), SIZE) / 1e9 <= target
    assert count_macs(attach_as(vit, replace(found, keep=found.keep + 0.03)), SIZE) / 1e9 > target, "one token more"
    assert hearing.sentences == [f"--target-gmacs {target:g}: keep ratio {found.keep:g}"]


def test_budgets_out_of_reach_are_refused_with_the_reachable_ones(vit):
    dense = count_macs(vit, SIZE) / 1e9
    for share, message in ((1.0, "the dense model needs"), (0.1, "still leaves")):
        with pytest.raises(UsageError, match=message) as caught:
            resolve(PlanRequest(target_gmacs=share * dense), vit, DEFAULTS)
        assert f"{dense:.3f}" in caught.value.message


def test_what_is_measured_gets_device_precision_and_batch_size(vit, monkeypatch):
    seen = []

    def find_plan(model, sparsity, target, device, listener):
        seen.append((sparsity.align, str(target), str(device)))
        return sparsity, Prediction(target, Speed(2.0, 1.0))

    monkeypatch.setattr("vitprune.budget.resolve.find_plan", find_plan)
    how = {"target_batch_size": 4, "precision": "bf16", "device": "cpu"}
    request = PlanRequest(align=8, target_speedup=1.5, **how)
    sparsity, prediction = resolve(request, vit, DEFAULTS)
    assert (sparsity.align, prediction.speed.speedup) == (8, 2.0)
    assert seen == [(8, "--target-speedup 1.5 at batch 4, bf16", "cpu")]
    measured = [request, PlanRequest(target_latency_ms=1.0), PlanRequest(align=8)]
    assert [each.measured for each in measured] == ["--target-speedup", "--target-latency-ms", None]


def test_python_has_budgets_too(vit):
    target = 0.75 * count_macs(vit, SIZE) / 1e9
    with pytest.warns(UserWarning, match="not trained"):
        sparse = vitprune.sparsify(vit, target_gmacs=target)
    assert count_macs(sparse, SIZE) / 1e9 <= target
    with pytest.raises(UsageError, match="keep and target_gmacs are mutually exclusive"):
        vitprune.sparsify(vit, keep=0.7, target_gmacs=target)
