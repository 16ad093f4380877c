"""Which threshold is chosen, and that what is promised holds on images that were not seen."""

import numpy as np
import pytest

from vitprune.adaptive import Watched, cheapest_promise, check_enough, promise
from vitprune.adaptive.bounds import images_needed
from vitprune.adaptive.promise import ended
from vitprune.errors import UsageError
from vitprune.jobs.promise import Asked


def watched(n, seed=0):
    """A first pass that is wrong the more often the less sure it is, and a second that never is."""
    random = np.random.default_rng(seed)
    confidence = random.random(n)
    wrong = random.random(n) < 0.3 * (1 - confidence) ** 3
    return [Watched(confidence, wrong.astype(float), 600), Watched(np.zeros(n), np.zeros(n), 1600)]


def test_the_last_threshold_before_the_first_that_fails_is_taken():
    confidence = np.array([0.9, 0.8, 0.7, 0.6, *np.linspace(0.1, 0.5, 596)])
    loss = np.zeros(600)
    loss[[1, 3]] = 1  # one is allowed of 600 at 99 %, two are not
    passes = [Watched(confidence, loss, 1), Watched(np.zeros(600), np.zeros(600), 3)]
    made = promise(passes, 0.01)
    assert made.threshold == 0.7
    assert made.loss == 1 / 600
    assert made.bound == pytest.approx(0.0079, abs=1e-4)
    assert made.share_pct == pytest.approx((0.5, 99.5))
    assert made.gmacs == pytest.approx((0.005 * 1 + 0.995 * 3) / 1e9)


def test_what_is_promised_holds_for_nine_of_ten_samples():
    population = watched(200_000, seed=9)
    broken = 0
    for seed in range(200):
        rows = np.random.default_rng(seed).choice(200_000, 600, replace=False)
        sample = [Watched(each.certainty[rows], each.loss[rows], each.macs) for each in population]
        threshold = promise(sample, 0.02, confidence=0.9).threshold
        broken += np.choose(ended(population, threshold), [each.loss for each in population]).mean() > 0.02
    assert broken <= 200 * 0.1 + 3 * (200 * 0.1 * 0.9) ** 0.5


def test_a_promise_of_less_costs_less():
    passes = watched(2000)
    costs = [promise(passes, risk).gmacs for risk in (0.005, 0.01, 0.03, 0.2)]
    assert costs == sorted(costs, reverse=True)
    assert promise(passes, 0.2).share_pct[0] == 100


def several(n, seed=0):
    """Cascades of a file of a range: the more a first pass costs, the surer it is, and the seldomer wrong."""
    random = np.random.default_rng(seed)
    hard, cascades = random.random(n) ** 2, []
    for wrong_pct, macs in zip((11, 7, 5, 3.5, 2), (594, 685, 796, 924, 1084), strict=True):
        lead = 1 - hard * (1 + wrong_pct / 20) * random.uniform(0.7, 1.3, n) / 1.6
        wrong = random.random(n) < wrong_pct / 100 * 6 * (1 - lead) ** 3
        first = Watched(lead.clip(0, 1), wrong.astype(float), macs)
        cascades.append([first, Watched(np.zeros(n), np.zeros(n), macs + 920)])
    return cascades


def taken(cascade, rows):
    return [Watched(each.certainty[rows], each.loss[rows], each.macs) for each in cascade]


def true_values(cascade, threshold):
    """Mean loss and cost of a threshold over a whole population."""
    found = ended(cascade, threshold)
    macs = np.array([each.macs for each in cascade])
    return np.choose(found, [each.loss for each in cascade]).mean(), macs[found].mean()


def test_of_several_cascades_a_cheap_one_is_promised_and_the_promise_holds():
    """To choose by a fifth of the images is valid, cheaper than to test all with a part of the error, and than one."""
    population, risk, confidence, trials = several(20_000, seed=7), 0.01, 0.95, 40
    broken, costs = 0, {"chosen": [], "all tested": [], "the middle": []}
    for seed in range(trials):
        rows = np.random.default_rng(seed).choice(20_000, 600, replace=False)
        sample = [taken(each, rows) for each in population]
        number, made = cheapest_promise(sample, risk, confidence)
        assert made.num_images == 480
        loss, cost = true_values(population[number], made.threshold)
        broken += loss > risk
        costs["chosen"].append(cost)
        each_tested = [promise(each, risk, 1 - (1 - confidence) / len(sample)) for each in sample]
        best = int(np.argmin([each.gmacs for each in each_tested]))
        costs["all tested"].append(true_values(population[best], each_tested[best].threshold)[1])
        costs["the middle"].append(true_values(population[2], promise(sample[2], risk, confidence).threshold)[1])
    assert broken <= trials * 0.05 + 3 * (trials * 0.05 * 0.95) ** 0.5
    mean = {name: np.mean(values) for name, values in costs.items()}
    assert mean["chosen"] < min(mean["all tested"], mean["the middle"]), mean


def test_one_cascade_is_tested_on_all_images():
    assert cheapest_promise([watched(600)], 0.01) == (0, promise(watched(600), 0.01))


def test_to_choose_takes_a_fourth_more_images():
    check_enough(374, 0.01, 0.95, several=True)
    with pytest.raises(UsageError, match=r"373 images are too few .* it takes 374") as caught:
        cheapest_promise(several(373), 0.01)
    assert "--keep" in caught.value.hint
    assert cheapest_promise(several(374), 0.01)[1].num_images == 300


def test_too_few_images_and_a_last_pass_that_loses_are_said():
    with pytest.raises(UsageError, match=f"298 images are too few .* it takes {images_needed(0.01, 0.05)}"):
        promise(watched(298), 0.01)
    first, last = watched(600)
    with pytest.raises(UsageError, match="with all images in the last pass the loss may be"):
        promise([first, Watched(last.certainty, np.full(600, 0.02), last.macs)], 0.01)


def test_mean_divergence_is_promised_too():
    passes = watched(2000)
    small = [each._replace(loss=each.loss * 0.3) for each in passes]
    assert promise(small, 0.01).gmacs < promise(passes, 0.01).gmacs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "nothing to promise"),
        ({"fidelity_pct": 99, "max_kl": 0.1}, "mutually exclusive"),
        ({"fidelity_pct": 100}, "expected percent from 50"),
        ({"fidelity_pct": 0.99}, "expected percent from 50"),
        ({"max_kl": 0}, "expected nats between 0 and 1"),
        ({"max_kl": 1.5}, "expected nats between 0 and 1"),
    ],
)
def test_a_promise_out_of_range_is_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        Asked(**arguments)
