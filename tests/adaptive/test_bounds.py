"""Bounds on a mean loss: known values, and that they hold as often as they say."""

import math

import numpy as np
import pytest

from vitprune.adaptive.bounds import holds, images_needed, upper_bound


@pytest.mark.parametrize(
    ("count", "n", "delta", "expected"),
    [
        (0, 299, 0.05, 1 - 0.05 ** (1 / 299)),
        (0, 10, 0.05, 1 - 0.05**0.1),
        (1, 600, 0.05, 0.00788),  # chi-squared quantiles in tables: 4.744 / 600, less what is binomial
        (3, 20, 0.025, 0.37893),  # tables of exact 95 % intervals: 3 of 20 is 0.0321 to 0.3789
        (10, 10, 0.05, 1.0),
    ],
)
def test_of_counts_they_are_clopper_and_pearsons(count, n, delta, expected):
    losses = np.r_[np.ones(count), np.zeros(n - count)]
    assert upper_bound(losses, delta) == pytest.approx(expected, abs=2e-5)


def test_the_number_of_images_is_that_for_which_nothing_lost_is_enough():
    for risk, delta in ((0.01, 0.05), (0.001, 0.05), (0.05, 0.2), (0.3, 0.01)):
        needed = images_needed(risk, delta)
        assert holds(np.zeros(needed), risk, delta)
        assert not holds(np.zeros(needed - 1), risk, delta)
    assert images_needed(0.01, 0.05) == 299


def test_a_quick_answer_is_the_bounds():
    random = np.random.default_rng(0)
    for _ in range(200):
        losses = random.random(int(random.integers(5, 200))) ** 3
        losses = (losses > 0.8).astype(float) if random.random() < 0.5 else losses
        risk, delta = random.uniform(0.01, 0.9), random.uniform(0.01, 0.4)
        bound = upper_bound(losses, delta)
        if abs(bound - risk) > 1e-6:
            assert holds(losses, risk, delta) == (bound <= risk)


@pytest.mark.parametrize("kind", ["counts", "shares"])
def test_they_are_wrong_no_more_often_than_they_say(kind):
    random, mean, n, delta, trials = np.random.default_rng(1), 0.1, 120, 0.1, 2000
    wrong = 0
    for _ in range(trials):
        losses = (random.random(n) < mean).astype(float)
        if kind == "shares":
            losses *= random.random(n)
        wrong += upper_bound(losses, delta) < (mean if kind == "counts" else mean / 2)
    assert wrong / trials <= delta + 3 * math.sqrt(delta / trials)


def test_of_nothing_nothing_is_known():
    assert upper_bound(np.zeros(0), 0.05) == 1.0
    assert not holds(np.zeros(0), 0.5, 0.05)
