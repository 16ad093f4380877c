"""One training for a range of keep ratios: which ratio a step takes, and that the rest of training does not mind."""

import copy
from collections import Counter

import pytest
import torch

from vitprune.backbones import input_size
from vitprune.model import attach
from vitprune.model.blend import tail_parameters
from vitprune.training.elastic import Range, keep_of_step, ratios_of


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


def test_a_step_trains_the_lowest_ratios_weights_by_those_in_between(make_vit):
    """The gradient is that of the loss as a function of the tuned end."""
    model = make_vit(num_classes=5).double()
    student, teacher = (attach(copy.deepcopy(model), keep) for keep in ((0.5, 0.9), 1.0))
    torch.manual_seed(1)
    images = torch.randn(2, *input_size(model)).double()
    with torch.no_grad():
        for parameter in tail_parameters(student.backbone, student.schedule.blocks[0]).values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    student.predictors.requires_grad_(False)
    student.keep = 0.8
    before = {name: each.detach().clone() for name, each in student.model.named_parameters()}
    with Range(student, teacher, blends=True).blended():
        loss = student(images).square().sum()
        loss.backward()

    dense = dict(teacher.model.named_parameters())
    ends = {name: value.clone().requires_grad_() for name, value in before.items()}
    between = {f"model.{name}": dense[name] + 0.4 * (end - dense[name]) for name, end in ends.items()}
    reference = torch.func.functional_call(student, between, images).square().sum()
    reference.backward()
    torch.testing.assert_close(loss, reference)
    for name, parameter in student.model.named_parameters():
        assert torch.equal(parameter, before[name]), "the tuned end is there again"
        if name in tail_parameters(student.backbone, student.schedule.blocks[0]):
            torch.testing.assert_close(parameter.grad, ends[name].grad, atol=1e-9, rtol=1e-6)


def test_what_was_trained_holds_both_ends(run_training):
    trained = run_training(keep=(0.5, 0.9), train_trunk=False)
    blend, dense = trained.student.blend, dict(trained.model.named_parameters())
    assert all(torch.equal(blend.dense[name], dense[name]) for name in blend.dense)
    assert any(not torch.equal(blend.tuned[name], dense[name]) for name in blend.dense)
    own = dict(trained.student.model.named_parameters())
    there = {name: torch.lerp(blend.dense[name], blend.tuned[name], (1 - 0.7) / 0.5) for name in blend.dense}
    assert all(torch.equal(own[name], there[name]) for name in there)
    for settings in ({"train_trunk": True}, {"train_trunk": False, "steps": 0}):
        without = run_training(keep=(0.5, 0.9), **settings)
        assert without.student.blend is None, "the trunk would not be shared; nothing was trained"
    assert run_training(train_trunk=False).student.blend is None


def test_a_resumed_run_blends_as_one_that_was_not_stopped(run_training, same_weights):
    whole = run_training(keep=(0.5, 0.9), train_trunk=False)
    part = run_training(whole.model, keep=(0.5, 0.9), train_trunk=False, stop_after=8)
    resumed = run_training(whole.model, keep=(0.5, 0.9), train_trunk=False, resume=part.state)
    assert same_weights(whole.student, resumed.student)
    assert same_weights(whole.student.blend, resumed.student.blend)
