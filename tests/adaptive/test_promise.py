"""Which threshold is chosen, and that what is promised holds on images that were not seen."""

import numpy as np
import pytest

from vitprune.adaptive import Watched, images_needed, promise
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
        ({}, "mutually exclusive"),
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
