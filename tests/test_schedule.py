"""Keep ratios to stages and exact token counts."""

import math
from fractions import Fraction
from itertools import product

import pytest

from vitprune.errors import UsageError
from vitprune.schedule import default_stages, make_schedule, num_kept, plan_label

DEIT_COUNTS = {
    0.9: (176, 158, 142),
    0.8: (156, 125, 100),
    0.7: (137, 96, 67),
    0.6: (117, 70, 42),
    0.5: (98, 49, 24),
}


@pytest.mark.parametrize(("keep", "counts"), DEIT_COUNTS.items())
def test_counts_are_the_published_ones_for_196_tokens(keep, counts):
    assert make_schedule(12, 196, keep).num_tokens == counts


@pytest.mark.parametrize("num_patches", [1, 49, 100, 196, 256, 576, 1000])
def test_counts_are_the_floor_of_exact_decimal_arithmetic(num_patches):
    for percent in range(1, 100):
        exact = [max(1, num_patches * percent**s // 100**s) for s in (1, 2, 3)]
        assert make_schedule(12, num_patches, percent / 100).num_tokens == tuple(exact), percent


@pytest.mark.parametrize(("num_patches", "ratio", "count"), [(100, 0.29, 29), (100, 0.57, 57), (1000, 0.7, 700)])
def test_binary_floats_do_not_lose_a_token(num_patches, ratio, count):
    assert num_kept(num_patches, ratio) == count


def test_the_naive_product_would_lose_a_token():
    assert int(0.29 * 100) == 28  # what the test above guards against


def test_a_ratio_may_be_a_fraction():
    assert num_kept(9, Fraction(1, 3)) == 3


def test_at_least_one_token_stays():
    assert num_kept(10, 0.01) == 1
    assert make_schedule(12, 4, 0.1).num_tokens == (1, 1, 1)


def test_ratios_are_powers_of_keep():
    assert make_schedule(12, 196, 0.7).ratios == pytest.approx((0.7, 0.49, 0.343), rel=1e-15)


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.35])
def test_the_stated_ratio_gives_back_the_stated_count(keep):
    schedule = make_schedule(12, 196, keep)
    assert tuple(num_kept(196, ratio) for ratio in schedule.ratios) == schedule.num_tokens


@pytest.mark.parametrize(("depth", "blocks"), [(12, (3, 6, 9)), (16, (4, 8, 12)), (20, (5, 10, 15)), (24, (6, 12, 18))])
def test_default_stages_are_the_papers(depth, blocks):
    assert default_stages(depth) == blocks
    assert make_schedule(depth, 196).blocks == blocks


@pytest.mark.parametrize("depth", range(2, 65))
def test_default_stages_fit_any_depth(depth):
    blocks = default_stages(depth)
    assert len(blocks) == min(3, depth - 1)
    assert all(1 <= block < depth for block in blocks)
    assert list(blocks) == sorted(set(blocks))


@pytest.mark.parametrize("num_stages", range(1, 13))
def test_any_number_of_stages_is_spread_over_the_depth(num_stages):
    blocks = default_stages(12, num_stages)
    assert len(blocks) == min(num_stages, 11)
    assert list(blocks) == sorted(set(blocks))
    parts = [later - earlier for earlier, later in zip((0, *blocks), (*blocks, 12), strict=True)]
    assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize(("depth", "blocks"), [(2, (1,)), (3, (1, 2)), (4, (1, 2, 3)), (5, (1, 2, 3))])
def test_a_shallow_model_gets_a_stage_per_block_after_the_first(depth, blocks):
    assert default_stages(depth) == blocks


def test_chosen_stages_are_used_as_given():
    schedule = make_schedule(12, 196, 0.5, stages=[1, 2, 7, 11])
    assert schedule.blocks == (1, 2, 7, 11)
    assert schedule.num_tokens == (98, 49, 24, 12)


def test_tokens_per_block_fall_at_the_stages():
    counts = make_schedule(12, 196, 0.7).tokens_per_block()
    assert counts == (196,) * 3 + (137,) * 3 + (96,) * 3 + (67,) * 3


def test_tokens_per_block_of_a_dense_plan_are_all_tokens():
    schedule = make_schedule(12, 196, 1.0)
    assert schedule.stages == ()
    assert schedule.blocks == schedule.ratios == schedule.num_tokens == ()
    assert schedule.tokens_per_block() == (196,) * 12


def test_a_stage_before_the_last_block_counts():
    assert make_schedule(3, 10, 0.5, [2]).tokens_per_block() == (10, 10, 5)


@pytest.mark.parametrize("keep", [0, -1, 1.5, math.nan, math.inf, -math.inf])
def test_keep_out_of_range_is_refused_with_its_value(keep):
    with pytest.raises(UsageError, match="keep ratio") as caught:
        make_schedule(12, 196, keep)
    assert f"{keep:g}" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("stages", "word"),
    [((0,), "0..11"), ((12,), "0..11"), ((-1, 3), "0..11"), ((3, 6, 99), "0..11"), ((), "no stages")],
)
def test_stages_out_of_range_or_absent_are_refused(stages, word):
    with pytest.raises(UsageError) as caught:
        make_schedule(12, 196, 0.7, stages)
    assert word in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("stages", [(6, 3), (3, 3), (3, 6, 6), (3, 9, 6)])
def test_stages_out_of_order_or_twice_are_refused(stages):
    with pytest.raises(UsageError, match="rising") as caught:
        make_schedule(12, 196, 0.7, stages)
    assert ",".join(map(str, stages)) in caught.value.message


def test_wrong_stages_are_refused_for_a_dense_plan_too():
    with pytest.raises(UsageError):
        make_schedule(12, 196, 1.0, [99])


@pytest.mark.parametrize("depth", [0, 1])
def test_a_model_of_one_block_has_no_place_for_a_stage(depth):
    with pytest.raises(UsageError, match="at least 2"):
        default_stages(depth)


def test_no_stage_is_not_a_number_of_stages():
    with pytest.raises(UsageError, match="at least 1"):
        default_stages(12, 0)


# Late and free schedules


@pytest.mark.parametrize("keep", [0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1])
@pytest.mark.parametrize(("depth", "stages"), [(12, None), (16, None), (12, [2, 3, 9]), (12, [5])])
def test_late_drops_later_at_the_same_cost(keep, depth, stages):
    paper = make_schedule(depth, 196, keep, stages)
    late = make_schedule(depth, 196, keep, stages, shape="late")
    assert late.blocks == paper.blocks
    cost, other = sum(paper.tokens_per_block()), sum(late.tokens_per_block())
    assert other == pytest.approx(cost, abs=depth), "within rounding down to whole tokens"
    if len(paper.stages) > 1:
        assert late.num_tokens[0] >= paper.num_tokens[0]
        assert late.num_tokens[-1] <= paper.num_tokens[-1]
        assert late.ratios[-1] >= 0.75 * paper.ratios[-1] - 1e-12


def test_late_drops_equally_many_at_every_stage_where_it_can():
    counts = (196, *make_schedule(12, 196, 0.7, shape="late").num_tokens)
    assert counts == (196, 148, 100, 52)
    assert make_schedule(12, 196, 0.5, shape="late").num_tokens == (102, 50, 18)


def test_free_ratios_choose_the_number_of_stages():
    schedule = make_schedule(12, 196, ratios=[0.8, 0.6, 0.4])
    assert (schedule.blocks, schedule.num_tokens) == ((3, 6, 9), (156, 117, 78))
    assert make_schedule(12, 196, ratios=[0.5]).blocks == (6,)
    assert make_schedule(12, 196, ratios=[0.5, 0.5], stages=[2, 9]).blocks == (2, 9)


@pytest.mark.parametrize(
    ("ratios", "stages", "message"),
    [
        ([], None, "expected numbers in"),
        ([0.8, 0], None, "expected numbers in"),
        ([1.2], None, "expected numbers in"),
        ([float("nan")], None, "expected numbers in"),
        ([0.4, 0.6], None, "does not come back"),
        ([0.8, 0.6], [3, 6, 9], "2 ratios .* for 3 stages"),
    ],
)
def test_ratios_that_make_no_schedule_are_refused(ratios, stages, message):
    with pytest.raises(UsageError, match=message):
        make_schedule(12, 196, ratios=ratios, stages=stages)


# Aligned counts


@pytest.mark.parametrize("keep", [0.9, 0.8, 0.7, 0.6, 0.5])
@pytest.mark.parametrize("shape", ["geometric", "late"])
@pytest.mark.parametrize(("align", "prefix"), [(8, 1), (8, 2), (16, 1), (8, 5)])
def test_aligned_counts_fill_tiles_at_the_same_cost(keep, shape, align, prefix):
    plain = make_schedule(12, 196, keep, shape=shape)
    aligned = make_schedule(12, 196, keep, shape=shape, align=align, num_prefix_tokens=prefix)
    assert (aligned.blocks, aligned.align) == (plain.blocks, align)
    for count, before, ratio in zip(aligned.num_tokens, plain.num_tokens, aligned.ratios, strict=True):
        assert (prefix + count) % align == 0
        assert abs(count - before) < align
        assert num_kept(196, ratio) == count
    cost, other = sum(plain.tokens_per_block()), sum(aligned.tokens_per_block())
    assert other == pytest.approx(cost, abs=3 * align / 2), "half a tile of one stage's three blocks"


def test_of_all_roundings_the_nearest_in_cost_is_taken():
    plain = make_schedule(12, 196, 0.7, shape="late")
    aligned = make_schedule(12, 196, 0.7, shape="late", align=8, num_prefix_tokens=1)
    options = [((1 + count) // 8 * 8 - 1, (1 + count) // 8 * 8 + 7) for count in plain.num_tokens]
    best = min(abs(sum(chosen) - sum(plain.num_tokens)) for chosen in product(*options))
    assert abs(sum(aligned.num_tokens) - sum(plain.num_tokens)) == best


def test_aligning_by_one_or_what_is_aligned_changes_nothing():
    assert make_schedule(12, 196, 0.7, align=1) == make_schedule(12, 196, 0.7)
    counts = make_schedule(12, 196, ratios=[0.5, 0.25], align=7).num_tokens
    assert counts == (98, 49)


@pytest.mark.parametrize(("num_patches", "align"), [(196, 0), (196, -8), (196, 500), (5, 8)])
def test_tiles_that_no_stage_can_fill_are_refused(num_patches, align):
    with pytest.raises(UsageError, match=f"--align is {align}"):
        make_schedule(12, num_patches, 0.7, align=align, num_prefix_tokens=1)


def test_other_sizes_are_aligned_too_where_they_can_be():
    schedule = make_schedule(12, 196, 0.7, align=8, num_prefix_tokens=1)
    assert schedule.stages_for(196, 1) == schedule.stages
    larger = schedule.stages_for(576, 1)
    assert all((1 + stage.num_tokens) % 8 == 0 for stage in larger)
    assert [stage.ratio for stage in larger] == [stage.ratio for stage in schedule.stages]
    assert [stage.num_tokens for stage in schedule.stages_for(4, 1)] == [max(1, int(4 * r)) for r in schedule.ratios]


def test_many_stages_are_aligned_quickly():
    schedule = make_schedule(40, 1369, 0.97, stages=list(range(1, 40)), align=8, num_prefix_tokens=5)
    assert all((5 + count) % 8 == 0 for count in schedule.num_tokens)


def test_the_label_says_the_alignment():
    assert plan_label(0.7, [], 1) == "keep 0.7"
    assert plan_label(0.7, [], 8) == "keep 0.7 align 8"
    assert plan_label(None, [0.8, 0.5], 16) == "ratios 0.8,0.5 align 16"
