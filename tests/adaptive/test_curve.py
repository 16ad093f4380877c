"""The curve of loss against cost, from what passes gave."""

import numpy as np
import pytest

from vitprune.adaptive import Reached, Watched, curve, promise, worthwhile


def passes(n=400):
    random = np.random.default_rng(0)
    certainty = random.random(n)
    wrong = (random.random(n) < 0.3 * (1 - certainty)).astype(float)
    return [Watched(certainty, wrong, 600_000_000), Watched(np.zeros(n), np.zeros(n), 1_600_000_000)]


def test_it_goes_from_all_in_the_first_pass_to_none_and_every_point_is_what_its_threshold_gives():
    first, last = passes()
    found = curve([first, last], "keep 0.5", most=20)
    assert len(found) == 21
    start, end = found[0], found[-1]
    assert (start.went_on_pct, start.loss, start.gmacs_mean) == (0, first.loss.mean(), pytest.approx(0.6))
    assert (end.went_on_pct, end.loss, end.gmacs_mean) == (100, 0, pytest.approx(1.6))
    assert [each.gmacs_mean for each in found] == sorted(each.gmacs_mean for each in found)
    for each in found:
        stops = first.certainty >= each.threshold
        assert each.went_on_pct == pytest.approx(100 * (~stops).mean())
        assert each.loss == pytest.approx((first.loss * stops).mean())
        assert each.first == "keep 0.5"
    made = promise([first, last], 0.05)
    (same,) = (each for each in curve([first, last], most=400) if each.threshold == made.threshold)
    assert (same.loss, same.gmacs_mean) == pytest.approx((made.loss, made.gmacs))


def test_all_images_alike_are_two_points():
    nothing = np.zeros(5)
    assert len(curve([Watched(np.full(5, 0.5), nothing, 1), Watched(nothing, nothing, 2)])) == 2


def test_of_several_curves_what_loses_less_than_all_that_is_cheaper_remains():
    points = [Reached(0.1, 0, loss, gmacs, name) for loss, gmacs, name in (
        (0.3, 1, "a"), (0.2, 2, "a"), (0.0, 5, "a"), (0.25, 1, "b"), (0.2, 3, "b"), (0.1, 4, "b"), (0.0, 6, "b")
    )]  # fmt: skip
    assert [(each.first, each.gmacs_mean) for each in worthwhile(points)] == [("b", 1), ("a", 2), ("b", 4), ("a", 5)]
    assert worthwhile([]) == []
