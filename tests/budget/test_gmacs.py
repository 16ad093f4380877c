"""From a budget to a keep ratio."""

import pytest

from vitprune.budget import keep_for_gmacs, last_within
from vitprune.errors import UsageError
from vitprune.measure import count_macs
from vitprune.model import attach_as
from vitprune.schedule import Sparsity

SIZE = (3, 96, 96)


def test_last_within_is_the_last_that_fits():
    for budget in range(-3, 30):
        fitting = [n for n in range(2, 21) if n * n <= budget]
        assert last_within(budget, lambda n: n * n, 2, 20) == max(fitting, default=2)


@pytest.mark.parametrize("sparsity", [Sparsity(), Sparsity(schedule="late", dropped="fold"), Sparsity(stages=[1])])
def test_the_ratio_found_fits_and_the_next_does_not(make_vit, sparsity):
    model = make_vit(img_size=96, depth=3)
    dense = count_macs(model, SIZE) / 1e9
    target = 0.75 * dense
    found = keep_for_gmacs(model, sparsity, target)
    assert (found.stages, found.schedule, found.dropped) == (sparsity.stages, sparsity.schedule, sparsity.dropped)
    assert count_macs(attach_as(model, found), SIZE) / 1e9 <= target
    one_token_more = Sparsity(found.keep + 0.03, found.stages, found.schedule, None, found.dropped)
    assert count_macs(attach_as(model, one_token_more), SIZE) / 1e9 > target


@pytest.mark.parametrize(("share", "message"), [(1.0, "the dense model needs"), (0.1, "still leaves")])
def test_budgets_out_of_reach_are_refused_with_the_reachable_ones(make_vit, share, message):
    model = make_vit(img_size=96, depth=3)
    dense = count_macs(model, SIZE) / 1e9
    with pytest.raises(UsageError, match=message) as caught:
        keep_for_gmacs(model, Sparsity(), share * dense)
    assert f"{dense:.3f}" in caught.value.message
