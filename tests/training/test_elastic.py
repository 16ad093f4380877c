"""One training for a range of keep ratios: which ratio a step takes, and that the rest of training does not mind."""

from collections import Counter

import pytest

from vitprune.training.elastic import keep_of_step, ratios_of


def test_the_grid_covers_a_range_with_both_ends():
    assert ratios_of(0.5, 0.9) == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]
    assert ratios_of(0.6, 0.62) == [0.6, 0.62]
    assert ratios_of(0.3, 0.7)[:2] == [0.3, 0.35]


def test_every_ratio_comes_once_a_round_in_an_order_of_the_seed():
    drawn = [keep_of_step(0.5, 0.9, 0, step) for step in range(90)]
    assert all(Counter(drawn[start : start + 9]) == Counter(ratios_of(0.5, 0.9)) for start in range(0, 90, 9))
    assert drawn == [keep_of_step(0.5, 0.9, 0, step) for step in range(90)]
    assert drawn[:9] != drawn[9:18]
    assert drawn != [keep_of_step(0.5, 0.9, 1, step) for step in range(90)]


def test_steps_take_ratios_of_the_range_and_the_student_ends_at_its_own(run_training):
    trained = run_training(keep=(0.5, 0.9))
    keeps = [record.keep for record in trained.records]
    assert keeps == [keep_of_step(0.5, 0.9, 0, step) for step in range(11)]
    assert trained.student.keep == 0.7
    for record in trained.records:
        counts = trained.student.at(record.keep).schedule.ratios
        assert record.target_ratios == pytest.approx(counts)
        assert record.as_json()["keep"] == record.keep
    alone = run_training()
    assert "keep" not in alone.records[0].as_json()


def test_a_stopped_step_leaves_the_ratio_as_it_was(run_training):
    assert run_training(keep=(0.5, 0.9), stop_after=4).student.keep == 0.7


def test_in_microbatches_every_part_has_the_same_tokens(run_training):
    whole = run_training(keep=(0.5, 0.9), steps=2, deployed_share=1.0)
    split = run_training(whole.model, keep=(0.5, 0.9), steps=2, deployed_share=1.0, grad_accum=2)
    for one, other in zip(split.records, whole.records, strict=True):
        assert one.kept_ratios == other.kept_ratios
        assert one.total == pytest.approx(other.total, rel=1e-3)
