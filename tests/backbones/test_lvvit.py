"""LV-ViT: dense as the model does it, dropped by mask as dropped for real, and the heads that its patch tokens have."""

import copy

import pytest
import torch
from agreement import assert_dense_is_its_own, assert_masked_is_gathered, assert_same_in_low_precision
from timm.layers import DropPath
from torch import nn

from vitprune import LossWeights, Objective, Recipe
from vitprune.backbones import wrap
from vitprune.baselines import AttentionViT, ToMeViT
from vitprune.model import SparseViT, attach
from vitprune.tokens import gumbel_decision
from vitprune.training.pretraining import teacher_saliency

TINY = {"img_size": 96, "embed_dim": 64, "depth": 4, "num_heads": 2, "stem_width": 16}
MODELS = {
    "skip_lam 1": {"name": "lvvit_t", **TINY},
    "skip_lam 2": {"name": "lvvit_s", **TINY},
    "skip_lam 3": {"name": "lvvit_l", **TINY},
    "not square": {"name": "lvvit_s", **TINY, "img_size": (64, 128)},
    "7 classes, 1 channel": {"name": "lvvit_s", **TINY, "num_classes": 7, "in_chans": 1},
    "no classifier": {"name": "lvvit_s", **TINY, "num_classes": 0},
}
by_kind = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(scope="module")
def build(make_sparse):
    """A sparse model of a kind, built once, with batch norms that do something."""
    built = {}

    def get(kind="skip_lam 2") -> SparseViT:
        if kind not in built:
            built[kind] = with_statistics(make_sparse(**MODELS[kind]))
        return built[kind]

    return get


def with_statistics(model):
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return model


@by_kind
def test_keep_1_is_the_models_own_output_bit_for_bit(build, make_images, kind):
    sparse = build(kind)
    assert_dense_is_its_own(sparse, make_images(sparse))


@by_kind
def test_masking_tokens_is_removing_them(build, make_images, kind):
    sparse = build(kind)
    assert_masked_is_gathered(sparse, make_images(sparse))


@by_kind
def test_masking_with_folding_is_folding(build, make_images, kind):
    plain = build(kind)
    sparse = SparseViT(plain.model, plain.schedule, plain.predictors, "fold").eval()
    images = make_images(sparse)
    assert_masked_is_gathered(sparse, images)
    with torch.no_grad():
        assert not torch.allclose(sparse(images), plain(images), atol=1e-3), "folding changes nothing"


@by_kind
def test_adapter_describes_the_model(build, make_images, kind):
    sparse = build(kind)
    backbone, images = sparse.backbone, make_images(sparse)
    with torch.no_grad():
        tokens = backbone.embed(images)
        features = backbone.token_features(backbone.norm(tokens))
    assert tokens.shape == (2, 1 + backbone.num_patches, 64)
    assert features.shape == (2, backbone.num_patches, 64)
    assert backbone.depth == 4
    assert backbone.pooling == "class token"
    assert backbone.num_classes == sparse.model.num_classes
    answers = backbone.token_logits(features)
    assert answers is None if kind == "no classifier" else answers.shape == (*features.shape[:2], backbone.num_classes)


# The heads


def test_the_best_answer_is_looked_for_among_kept_tokens_however_many_each_image_has(build):
    backbone = build().backbone
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 37, 64, generator=generator)
    share = torch.tensor([0.2, 0.5, 0.8, 1.0]).unsqueeze(1)
    kept = (torch.rand(4, 36, generator=generator) < share).float()
    with torch.no_grad():
        masked = backbone.head(x, kept)
        for image in range(4):
            stays = torch.cat((torch.ones(1), kept[image])).bool()
            torch.testing.assert_close(masked[image : image + 1], backbone.head(x[image : image + 1, stays]))
        assert (masked - backbone.head(x))[:3].abs().amax(dim=1).min() > 0.01
        assert torch.equal(backbone.head(x, torch.ones(4, 36)), backbone.model.forward_head(x))
        assert torch.equal(backbone.head(x, sizes=torch.full((4, 36), 3.0)), backbone.model.forward_head(x))


def test_a_dropped_token_cannot_win_whatever_it_says(build):
    backbone = build().backbone
    x = torch.randn(2, 37, 64, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(2, 36)
    kept[:, 5] = 0
    loud = x.clone()
    loud[:, 6] *= 1e4
    with torch.no_grad():
        assert torch.equal(backbone.head(loud, kept), backbone.head(x, kept))
        assert not torch.allclose(backbone.head(loud), backbone.head(x))


def test_an_image_without_a_kept_token_is_answered_by_its_class_token(build):
    backbone = build().backbone
    x = torch.randn(2, 37, 64).requires_grad_()
    logits = backbone.head(x, torch.zeros(2, 36))
    torch.testing.assert_close(logits, backbone.model.head(x[:, 0]))
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    assert gradient.isfinite().all()


# Parts


def test_halves_of_a_block_are_the_block(build, make_images):
    backbone = build().backbone
    backbone.check_halves()
    with torch.no_grad():
        x = backbone.embed(make_images(build()))
        assert torch.equal(backbone.mlp_half(1, backbone.attention_half(1, x)), backbone.block(1, x))


def test_tail_is_what_runs_from_a_block_on(make_sparse, make_images):
    sparse = make_sparse(**MODELS["skip_lam 2"])
    backbone, images = sparse.backbone, make_images(sparse)
    sparse.model.requires_grad_(False)
    for module in backbone.tail(2):
        module.requires_grad_(True)
    names = {name for name, parameter in sparse.model.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in names} == {"blocks", "norm", "head", "aux_head"}
    assert {name.split(".")[1] for name in names if name.startswith("blocks")} == {"2", "3"}
    needed = [parameter for parameter in sparse.model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(sparse.model(images).square().sum(), needed)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_drop_path_rises_to_the_last_block_and_comes_off(build):
    sparse = build()
    sparse.backbone.set_drop_path(0.3)
    rates = [[m.drop_prob for m in block.modules() if isinstance(m, DropPath)] for block in sparse.model.blocks]
    assert rates == [[], pytest.approx([0.1] * 2), pytest.approx([0.2] * 2), pytest.approx([0.3] * 2)]
    sparse.backbone.set_drop_path(0.0)
    assert not any(isinstance(module, DropPath) for module in sparse.model.modules())


def test_gradient_checkpointing_changes_neither_output_nor_gradient(make_sparse, make_images):
    sparse = make_sparse(**MODELS["skip_lam 2"])
    images = make_images(sparse)

    def outcome():
        sparse.zero_grad()
        logits = sparse.forward_masked(images).logits
        logits.square().sum().backward()
        return [logits.detach(), *(parameter.grad for parameter in sparse.model.parameters())]

    plain = outcome()
    sparse.model.set_grad_checkpointing()
    for checkpointed, expected in zip(outcome(), plain, strict=True):
        torch.testing.assert_close(checkpointed, expected)


def test_unfused_attention_agrees_too(make_sparse, make_images):
    sparse = make_sparse(**MODELS["skip_lam 2"])
    images = make_images(sparse)
    fused = sparse.forward_masked(images).logits
    for block in sparse.model.blocks:
        block.attn.fused_attn = False
    assert_masked_is_gathered(sparse, images)
    torch.testing.assert_close(sparse.forward_masked(images).logits, fused, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_passes_run_in_every_precision(make_sparse, make_images, dtype):
    sparse = make_sparse(**MODELS["skip_lam 2"])
    assert_same_in_low_precision(sparse, make_images(sparse), dtype)


def test_baselines_run_on_it(build, make_images):
    sparse = build()
    images = make_images(sparse)
    with torch.no_grad():
        assert ToMeViT(sparse.model, (4, 4, 4, 4))(images).shape == (2, 1000)
        assert AttentionViT(sparse.model, sparse.schedule, "fold")(images).shape == (2, 1000)


def test_a_subclass_is_refused(build):
    from vitprune.backbones.lvvit_model import LvVit
    from vitprune.errors import UnsupportedModelError

    class Custom(LvVit):
        pass

    with pytest.raises(UnsupportedModelError, match="Custom"):
        wrap(Custom(**TINY))


@pytest.mark.parametrize("target", ["attention", "gradient", "both"])
def test_the_teacher_can_be_asked_what_matters(build, make_images, target):
    backbone = build().backbone
    x = backbone.embed(make_images(build())).detach()
    saliency = teacher_saliency(backbone, x, 0, target)
    assert saliency.shape == (2, 36)
    assert (saliency > 0).any(dim=1).all()


# Training


@pytest.fixture
def objective(make_vit):
    def make(**settings):
        model = with_statistics(make_vit(**MODELS["7 classes, 1 channel"]))
        weights = LossWeights(ce=1, ratio=2, kl=0.5, token=0.5)
        recipe = Recipe(**{"weights": weights, "decision": "gumbel", "train_trunk": True, **settings})
        return Objective(attach(copy.deepcopy(model), dropped="drop"), attach(model, 1.0), recipe).train()

    return make


@pytest.fixture
def batch(build, make_images):
    return make_images(build("7 classes, 1 channel"), count=3), torch.tensor([1, 2, 3])


def divergence(student, teacher):
    """KL(teacher || student) of two lists of logits, in float64."""
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    return (p * (p.log() - q.log())).sum().item()


def test_token_loss_of_a_sampled_step_is_the_divergence_of_kept_tokens_answers(objective, batch):
    objective = objective()
    images, labels = batch
    torch.manual_seed(1)
    loss = objective(images, labels, "sampled").components["token"]
    torch.manual_seed(1)
    out = objective.student.forward_masked(images, lambda log_pi, kept, stage: gumbel_decision(log_pi, 1.0, 1.0))
    student = objective.student.model.aux_head(out.features)
    teacher = objective.teacher.model.aux_head(objective.teacher.model.forward_features(images)[:, 1:])
    kept = out.kept[-1]
    terms = [divergence(student[b, n], teacher[b, n]) for b, n in kept.nonzero().tolist()]
    assert 0 < len(terms) < kept.numel()
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_token_loss_of_a_deployed_step_compares_at_the_tokens_own_positions(objective, batch):
    objective = objective(relative_token_loss=True)
    images, labels = batch
    loss = objective(images, labels, "deployed").components["token"]
    out = objective.student.select(images)
    student = objective.student.model.aux_head(out.features)
    teacher = objective.teacher.model.aux_head(objective.teacher.model.forward_features(images)[:, 1:])
    rows = [(b, k, n) for b, chosen in enumerate(out.indices[-1].tolist()) for k, n in enumerate(chosen)]
    terms = [divergence(student[b, k], teacher[b, n]) for b, k, n in rows]
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


@pytest.mark.parametrize("phase", ["sampled", "deployed"])
def test_token_loss_trains_the_auxiliary_head_and_not_the_teachers(objective, batch, phase):
    objective = objective(weights=LossWeights(ce=0, ratio=0, kl=0, token=1))
    objective(*batch, phase).total.backward()
    assert objective.student.model.aux_head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())


@pytest.mark.parametrize("train_trunk", [True, False])
@pytest.mark.parametrize("phase", ["warm", "sampled", "deployed"])
def test_batch_norms_keep_their_statistics_and_student_and_teacher_use_the_same(objective, batch, phase, train_trunk):
    objective = objective(train_trunk=train_trunk)
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    assert any(name.startswith("student") and name.endswith("running_mean") for name in before)
    objective(*batch, phase).total.backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in objective.named_buffers())
    assert torch.equal(objective.student.backbone.embed(batch[0]), objective.teacher.backbone.embed(batch[0]))
    if phase != "warm":
        trained = objective.student.model.patch_embed.bn1.weight.grad
        assert (trained is not None) == train_trunk
