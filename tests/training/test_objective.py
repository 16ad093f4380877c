"""What a step minimises."""

import copy

import pytest
import torch

from vitprune import LossWeights, Objective, attach
from vitprune.tokens import distillation_loss, ratio_loss, token_loss

PAPER = LossWeights(ce=1, ratio=2, kl=0.5, token=0.5)


@pytest.fixture
def batch(make_images, make_vit):
    return make_images(make_vit(), count=4), torch.tensor([1, 2, 3, 4])


@pytest.fixture
def build(make_vit):
    def build(weights=None, labels=True):
        model = make_vit()
        return Objective(attach(copy.deepcopy(model)), attach(model, 1.0), weights or PAPER, labels=labels)

    return build


def test_warm_start_trains_predictors_alone(build, batch):
    objective = build()
    objective.student.model.requires_grad_(False)
    loss = objective(*batch, "warm")
    loss.total.backward()
    assert set(loss.components) == {"rank"}
    assert all(p.grad is not None for p in objective.student.predictors.parameters())
    assert all(p.grad is None for p in objective.student.model.parameters())


@pytest.mark.parametrize(
    ("phase", "names"), [("sampled", {"ce", "kl", "token", "ratio"}), ("deployed", {"ce", "kl", "token"})]
)
def test_total_is_the_weighted_sum_of_the_named_components(build, batch, phase, names):
    weights = LossWeights(ce=1.5, ratio=3, kl=0.7, token=0.2)
    loss = build(weights)(*batch, phase)
    assert set(loss.components) == names
    expected = sum(getattr(weights, name) * value for name, value in loss.components.items())
    torch.testing.assert_close(loss.total.detach(), expected)


def test_sampled_components_are_the_pure_losses(build, batch):
    objective = build()
    images, labels = batch
    torch.manual_seed(1)
    loss = objective(images, labels, "sampled")
    torch.manual_seed(1)
    out = objective.student.forward_masked(images, objective._sample)
    teacher = objective.teacher.select(images)
    expected = {
        "ce": torch.nn.functional.cross_entropy(out.logits, labels),
        "kl": distillation_loss(out.logits, teacher.logits),
        "token": token_loss(out.features, teacher.features, out.kept[-1]),
        "ratio": ratio_loss(out.kept, objective.student.schedule.ratios),
    }
    for name, value in expected.items():
        torch.testing.assert_close(loss.components[name], value.detach())
    torch.testing.assert_close(loss.kept_ratios, torch.stack([mask.mean() for mask in out.kept]).detach())


def test_sampled_gradient_reaches_predictors_and_backbone(build, batch):
    objective = build()
    objective(*batch, "sampled").total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.student.predictors.parameters())
    assert all(b.attn.qkv.weight.grad.abs().sum() > 0 for b in objective.student.model.blocks)
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_deployed_tokens_are_compared_at_their_own_positions(build, batch):
    objective = build()
    images, labels = batch
    loss = objective(images, labels, "deployed")
    out = objective.student.select(images)
    teacher = objective.teacher.select(images).features
    rows = torch.stack([teacher[i, indices] for i, indices in enumerate(out.indices[-1])])
    torch.testing.assert_close(loss.components["token"], (out.features - rows).square().mean().detach())


def test_without_labels_labels_do_not_matter(build, batch):
    objective = build(labels=False)
    images, labels = batch
    for phase in ("sampled", "deployed"):
        torch.manual_seed(0)
        one = objective(images, labels, phase)
        torch.manual_seed(0)
        other = objective(images, torch.full_like(labels, -1), phase)
        assert "ce" not in one.components
        assert torch.equal(one.total, other.total)


def test_teacher_stays_in_eval_mode(build):
    objective = build().train()
    assert objective.student.training
    assert not objective.teacher.training
