"""What is asked for, to stages and exact token counts."""

import math
from fractions import Fraction

import pytest

from vitprune.errors import UsageError
from vitprune.schedule import Sparsity, default_stages, keep_in_words, make_schedule, num_kept, plan_label


def paper(depth, num_patches, keep=0.7, prune_at=None, prefix=0, **plan):
    return make_schedule(
        depth, num_patches, Sparsity(keep, prune_at, **{"token_schedule": "geometric", **plan}), prefix
    )


def late(depth, num_patches, keep, prune_at=None):
    return paper(depth, num_patches, keep, prune_at, token_schedule="late")


@pytest.mark.parametrize("num_patches", [1, 49, 100, 196, 256, 576, 1000])
def test_counts_are_the_floor_of_exact_decimal_arithmetic(num_patches):
    assert num_kept(9, Fraction(1, 3)) == 3
    for percent in range(1, 100):
        exact = [max(1, num_patches * percent**s // 100**s) for s in (1, 2, 3)]
        assert paper(12, num_patches, percent / 100).num_tokens == tuple(exact), percent


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.35])
def test_ratios_are_powers_of_keep_and_give_back_the_counts(keep):
    schedule = paper(12, 196, keep)
    assert schedule.ratios == pytest.approx((keep, keep**2, keep**3), rel=1e-15)
    assert tuple(num_kept(196, ratio) for ratio in schedule.ratios) == schedule.num_tokens


# Stages


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(12, (3, 6, 9)), (16, (4, 8, 12)), (20, (5, 10, 15)), (24, (6, 12, 18)), (2, (1,)), (3, (1, 2)), (5, (1, 2, 3))],
)
def test_default_stages_are_the_papers_and_as_many_as_fit(depth, blocks):
    assert default_stages(depth) == blocks == make_schedule(depth, 196).blocks


def test_any_number_of_stages_is_spread_over_any_depth():
    for depth in range(2, 65):
        for num_stages in range(1, 13):
            blocks = default_stages(depth, num_stages)
            assert len(blocks) == min(num_stages, depth - 1)
            lengths = [later - earlier for earlier, later in zip((0, *blocks), (*blocks, depth), strict=True)]
            assert min(lengths) >= 1
            assert max(lengths) - min(lengths) <= 1


def test_chosen_stages_are_used_as_given():
    schedule = paper(12, 196, 0.5, [1, 2, 7, 11])
    assert (schedule.blocks, schedule.num_tokens) == ((1, 2, 7, 11), (98, 49, 24, 12))


def test_tokens_per_block_fall_at_the_stages():
    assert paper(12, 196).tokens_per_block() == (196,) * 3 + (137,) * 3 + (96,) * 3 + (67,) * 3
    assert paper(3, 10, 0.5, [2]).tokens_per_block() == (10, 10, 5), "a stage before the last block counts"


def test_a_dense_plan_has_no_stages():
    schedule = make_schedule(12, 196, Sparsity(1.0))
    assert schedule.blocks == schedule.ratios == schedule.num_tokens == schedule.stages == ()
    assert schedule.tokens_per_block() == (196,) * 12


def test_a_keep_ratio_is_said_in_both_readings():
    assert keep_in_words(0.7, "late", 196, (148, 100, 52)) == (
        "keep 0.7 leaves 148/100/52 of 196 patch tokens (late schedule), at about the cost of the paper's 137/96/67"
    )
    assert keep_in_words(0.7, "geometric", 196, (137, 96, 67)).endswith("patch tokens, as in the paper")
    assert make_schedule(12, 196).num_tokens == (148, 100, 52)


# What is refused

REFUSED = [
    *(({"keep": keep}, f"keep ratio is {keep:g}") for keep in (0, -1, 1.5, math.nan, math.inf, -math.inf)),
    *(({name: value}, f"{name} .*{value}") for name, value in (("token_schedule", "latee"), ("pruned", "folded"))),
    *(({"align": align}, f"align is {align}") for align in (0, -8, 500)),
    ({"num_patches": 5, "align": 8}, "align is 8"),
    *(
        ({"keep": keep, "prune_at": prune_at}, message)
        for keep in (0.7, 1.0)
        for message, group in (
            (r"0\.\.11", ((0,), (12,), (-1, 3), (3, 6, 99))),
            ("no stages", ((),)),
            ("are (6,3|3,3|3,6,6), expected rising", ((6, 3), (3, 3), (3, 6, 6))),
        )
        for prune_at in group
    ),
    *(({"tokens_left": ratios}, "expected numbers in") for ratios in ([], [0.8, 0], [1.2], [math.nan])),
    ({"tokens_left": [0.4, 0.6]}, "does not come back"),
    ({"tokens_left": [0.8, 0.6], "prune_at": [3, 6, 9]}, r"2 share\(s\) .* for 3 stage"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_a_plan_that_cannot_be_is_refused_with_what_was_asked_for(settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        paper(12, **{"num_patches": 196, "prefix": 1} | settings)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("depth", "num_stages", "word"), [(0, 3, "at least 2"), (1, 3, "at least 2"), (12, 0, "least 1")]
)
def test_a_model_of_one_block_and_no_stage_are_refused(depth, num_stages, word):
    with pytest.raises(UsageError, match=word):
        default_stages(depth, num_stages)


# Late and free schedules


@pytest.mark.parametrize("keep", [0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1])
@pytest.mark.parametrize(("depth", "stages"), [(12, None), (16, None), (12, [2, 3, 9]), (12, [5])])
def test_late_prunes_later_at_the_same_cost(keep, depth, stages):
    geometric, other = paper(depth, 196, keep, stages), late(depth, 196, keep, stages)
    assert other.blocks == geometric.blocks
    cost = sum(geometric.tokens_per_block())
    assert sum(other.tokens_per_block()) == pytest.approx(cost, abs=depth), "within rounding down to whole tokens"
    if len(geometric.stages) > 1:
        assert other.num_tokens[0] >= geometric.num_tokens[0]
        assert other.num_tokens[-1] <= geometric.num_tokens[-1]
        assert other.ratios[-1] >= 0.75 * geometric.ratios[-1] - 1e-12


def test_late_is_the_default_and_prunes_equally_many_at_every_stage_where_it_can():
    assert make_schedule(12, 196).num_tokens == late(12, 196, 0.7).num_tokens == (148, 100, 52)
    assert late(12, 196, 0.5).num_tokens == (102, 50, 18)


def test_free_ratios_choose_the_number_of_stages():
    schedule = paper(12, 196, tokens_left=[0.8, 0.6, 0.4])
    assert (schedule.blocks, schedule.num_tokens) == ((3, 6, 9), (156, 117, 78))
    assert paper(12, 196, tokens_left=[0.5]).blocks == (6,)
    assert paper(12, 196, tokens_left=[0.5, 0.5], prune_at=[2, 9]).blocks == (2, 9)


# Aligned counts


@pytest.mark.parametrize("num_patches", [196, 256, 576])
@pytest.mark.parametrize("shape", ["geometric", "late"])
@pytest.mark.parametrize(("align", "prefix"), [(8, 1), (8, 2), (16, 1), (8, 5)])
def test_aligned_counts_fill_tiles_at_the_same_cost(num_patches, shape, align, prefix):
    for keep in (0.9, 0.8, 0.7, 0.6, 0.5):
        plain = paper(12, num_patches, keep, token_schedule=shape)
        aligned = paper(12, num_patches, keep, token_schedule=shape, align=align, prefix=prefix)
        assert (aligned.blocks, aligned.align) == (plain.blocks, align)
        for count, before, ratio in zip(aligned.num_tokens, plain.num_tokens, aligned.ratios, strict=True):
            assert (prefix + count) % align == 0
            assert abs(count - before) <= align
            assert num_kept(num_patches, ratio) == count
        cost = sum(plain.tokens_per_block())
        assert sum(aligned.tokens_per_block()) == pytest.approx(cost, abs=3 * align / 2), "half a tile of three blocks"


def test_aligning_by_one_or_what_is_aligned_changes_nothing():
    assert paper(12, 196, align=1) == paper(12, 196)
    assert paper(12, 196, tokens_left=[0.5, 0.25], align=7).num_tokens == (98, 49)


def test_many_stages_and_other_sizes_are_aligned_too_where_they_can_be():
    many = paper(40, 1369, 0.97, list(range(1, 40)), align=8, prefix=5)
    assert all((5 + count) % 8 == 0 for count in many.num_tokens)
    schedule = paper(12, 196, align=8, prefix=1)
    assert schedule.stages_for(196, 1) == schedule.stages
    larger = schedule.stages_for(576, 1)
    assert all((1 + stage.num_tokens) % 8 == 0 for stage in larger)
    assert [stage.ratio for stage in larger] == [stage.ratio for stage in schedule.stages]
    assert [stage.num_tokens for stage in schedule.stages_for(4, 1)] == [max(1, int(4 * r)) for r in schedule.ratios]


def test_the_label_says_the_alignment_and_the_slug_names_a_folder():
    assert plan_label(0.7, [], 1) == Sparsity().label == "keep 0.7"
    assert plan_label(0.7, [], 8) == "keep 0.7 align 8"
    assert Sparsity(tokens_left=(0.8, 0.5), align=16).label == "ratios 0.8,0.5 align 16"
    assert Sparsity(tokens_left=(0.8, 0.5), align=16).slug == "ratios0.8-0.5align16"
