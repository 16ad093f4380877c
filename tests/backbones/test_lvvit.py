"""LV-ViT: the heads that its patch tokens have, and how they train. The rest of its adapter: test_contract."""

import copy

import pytest
import torch
from agreement import assert_same_in_low_precision
from architectures import LVVIT
from torch import nn

from vitprune import LossWeights, Objective, Recipe
from vitprune.baselines import ToMeViT
from vitprune.model import AttentionViT, attach
from vitprune.tasks import task_named
from vitprune.tokens.masking import gumbel_decision
from vitprune.training.pretraining import teacher_saliency


@pytest.fixture(scope="module")
def sparse(make_sparse):
    return with_statistics(make_sparse(**LVVIT))


def with_statistics(model):
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return model


def test_a_pruned_token_cannot_win_whatever_it_says(sparse):
    backbone = sparse.backbone
    x = torch.randn(2, 37, 64, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(2, 36)
    kept[:, 5] = 0
    loud = x.clone()
    loud[:, 6] *= 1e4
    with torch.no_grad():
        assert torch.equal(backbone.head(loud, kept), backbone.head(x, kept))
        assert not torch.allclose(backbone.head(loud), backbone.head(x))


def test_an_image_without_a_kept_token_is_answered_by_its_class_token(sparse):
    backbone = sparse.backbone
    x = torch.randn(2, 37, 64).requires_grad_()
    logits = backbone.head(x, torch.zeros(2, 36))
    torch.testing.assert_close(logits, backbone.model.head(x[:, 0]))
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_passes_run_in_every_precision(make_sparse, make_images, dtype):
    sparse = make_sparse(**LVVIT)
    assert_same_in_low_precision(sparse, make_images(sparse), dtype)


def test_baselines_run_on_it_and_the_teacher_can_be_asked_what_matters(sparse, make_images):
    images = make_images(sparse)
    with torch.no_grad():
        assert ToMeViT(sparse.model, (4, 4, 4, 4))(images).shape == (2, 1000)
        assert AttentionViT(sparse.model, sparse.schedule, "merge", 0.1, 1.0)(images).shape == (2, 1000)
        x = sparse.backbone.embed(images)
    for target in ("attention", "gradient", "both"):
        saliency = teacher_saliency(sparse.backbone, x, 0, target, task_named("classification").influence)
        assert saliency.shape == (2, 36)
        assert (saliency > 0).any(dim=1).all()


@pytest.fixture
def objective(make_vit):
    def make(**settings):
        model = with_statistics(make_vit(**LVVIT, num_classes=7, in_chans=1))
        weights = LossWeights(ce=1, ratio=2, kl=0.5, pooled=0, token=0.5)
        recipe = Recipe(**{"weights": weights, "train_trunk": True, **settings})
        return Objective(attach(copy.deepcopy(model), pruned="drop"), attach(model, 1.0), recipe).train()

    return make


@pytest.fixture
def batch(make_vit, make_images):
    return make_images(make_vit(**LVVIT, in_chans=1), count=3), torch.tensor([1, 2, 3])


def divergence(student, teacher):
    """KL(teacher || student) of two lists of logits, in float64."""
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    return (p * (p.log() - q.log())).sum().item()


@pytest.mark.parametrize("phase", ["sampled", "deployed"])
def test_token_loss_is_the_divergence_of_kept_tokens_answers_at_their_own_positions(objective, batch, phase):
    objective = objective(relative_token_loss=phase == "deployed")
    images, labels = batch
    torch.manual_seed(1)
    loss = objective(images, labels, phase).components["token"]
    torch.manual_seed(1)
    if phase == "sampled":
        out = objective.student.forward_masked(images, lambda log_pi, kept, stage: gumbel_decision(log_pi, 1.0, 1.0))
        rows = [(b, n, n) for b, n in out.kept[-1].nonzero().tolist()]
    else:
        out = objective.student.select(images)
        rows = [(b, k, n) for b, chosen in enumerate(out.indices[-1].tolist()) for k, n in enumerate(chosen)]
    student = objective.student.model.aux_head(out.features)
    teacher = objective.teacher.model.aux_head(objective.teacher.model.forward_features(images)[:, 1:])
    terms = [divergence(student[b, k], teacher[b, n]) for b, k, n in rows]
    assert 0 < len(terms) < 3 * 36
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


@pytest.mark.parametrize("phase", ["sampled", "deployed"])
def test_token_loss_trains_the_auxiliary_head_and_not_the_teachers(objective, batch, phase):
    objective = objective(weights=LossWeights(ce=0, ratio=0, kl=0, pooled=0, token=1))
    objective(*batch, phase).total.backward()
    assert objective.student.model.aux_head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())


@pytest.mark.parametrize("train_trunk", [True, False])
@pytest.mark.parametrize("phase", ["pretraining", "sampled", "deployed"])
def test_batch_norms_keep_their_statistics_and_student_and_teacher_use_the_same(objective, batch, phase, train_trunk):
    objective = objective(train_trunk=train_trunk)
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    assert any(name.startswith("student") and name.endswith("running_mean") for name in before)
    objective(*batch, phase).total.backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in objective.named_buffers())
    assert torch.equal(objective.student.backbone.embed(batch[0]), objective.teacher.backbone.embed(batch[0]))
    if phase != "pretraining":
        trained = objective.student.model.patch_embed.bn1.weight.grad
        assert (trained is not None) == train_trunk
