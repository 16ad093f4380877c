"""What every adapter holds to: dense as the model does it, and pruned by mask as pruned for real.

What positions do is where this can go wrong, so tokens are pruned in different places of every image.
"""

import functools

import pytest
import torch
from agreement import assert_dense_is_its_own, assert_masked_is_gathered, calm_attention, dense_twin
from architectures import ALL, LVVITS, OTHERS, VIT
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import nn

from vitprune.errors import UnsupportedModelError
from vitprune.measure import ZeroOverheadViT
from vitprune.model import SparseViT, attach
from vitprune.training.objective import Objective
from vitprune.training.recipe import Recipe

POOLED = [kind for kind in VIT if any(word in kind for word in ("attention pool", "average", "max", "refined"))]

ENCODERS = [
    "class token and 4 registers",
    "CLIP",
    "no class token, attention pool",
    "attention pool with prefix",
    "average of patches beside a class token",
    "gated MLP",
    "class and distillation token, two heads",
    "EVA-02 CLIP",
    "DINOv3",
    "DINOv3, average",
    "Perception Encoder",
    "Sapiens2",
    "BEiT",
    "relative positions",
    "CaiT",
    "NaFlex, attention pool",
    "NaFlex, RADIO",
    "Qwen3",
    "Gemma 4",
    "LV-ViT, skip_lam 2",
]

NORMED_AFTER_POOLING = ("class token", "one register", "no class token, attention pool")

by_kind = pytest.mark.parametrize("kind", ALL)


@pytest.fixture(scope="module")
def build(make_sparse):
    """A sparse model of a kind, built once: its backbone is the dense model."""

    @functools.cache
    def get(kind) -> SparseViT:
        sparse = make_sparse(**ALL[kind])
        calm_attention(sparse.model)
        return sparse

    return get


def merging(plain):
    return SparseViT(plain.model, plain.schedule, plain.predictors, "merge", balance=0.1, beta=1.0).eval()


def random_tokens(backbone, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(
        count, backbone.num_prefix_tokens + backbone.num_patches, backbone.embed_dim, generator=generator
    )


@by_kind
def test_keeping_all_is_the_models_own_output_bit_for_bit_or_nearly_with_a_mask(build, make_images, kind):
    """The way with a mask is our own code in some families: it must compute what timm computes."""
    sparse = build(kind)
    images = make_images(sparse)
    assert_dense_is_its_own(sparse, images)
    with torch.no_grad():
        masked = sparse.forward_masked(images, lambda log_pi, kept, stage: torch.ones_like(kept))
        torch.testing.assert_close(masked.logits, sparse.model(images), rtol=0, atol=1e-4)


@by_kind
@torch.no_grad()
def test_features_are_timms_and_of_every_patch_when_tokens_are_pruned(build, make_images, kind):
    sparse = build(kind)
    twin, images = dense_twin(sparse), make_images(sparse)
    features, timms = twin.forward_features(images), sparse.model.forward_features(images)
    assert torch.equal(features, timms.reshape(features.shape)), "language models' encoders give a grid"
    assert torch.equal(twin.forward_head(features), sparse.model(images))
    given = twin.forward_intermediates(images, [0, 2], norm=True, intermediates_only=True)
    assert given[0].shape == (2, sparse.backbone.embed_dim, *sparse.grid_size)
    if kind != "Gemma 4":  # timm's own stumbles over images of one size
        expected = sparse.model.forward_intermediates(images, [0, 2], norm=True, intermediates_only=True)
        assert all(map(torch.equal, given, expected))
    for pruned in (sparse, merging(sparse)):
        filled = pruned.forward_features(images)
        assert filled.shape == features.shape
        assert pruned.forward_head(filled, pre_logits=True).shape == pruned.select(images).pooled.shape
        if sparse.backbone.pooling == "class token" and "LV-ViT" not in kind and "refined" not in kind:
            torch.testing.assert_close(pruned.forward_head(filled), pruned(images), rtol=0, atol=1e-4)


@by_kind
def test_masking_tokens_is_removing_them_pruned_or_merged(build, make_images, kind):
    dropping = build(kind)
    images = make_images(dropping)
    for sparse in (dropping, merging(dropping)):
        assert_masked_is_gathered(sparse, images)
    with torch.no_grad():
        assert not torch.allclose(sparse(images), dropping(images), atol=1e-3), "merging changes nothing"
        assert (sparse.select(images).sizes.sum(1) == sparse.schedule.num_patches).all()


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_gives_the_same_embedding_masked_as_pruned(make_sparse, make_images, kind):
    """Without a head the output is what the model pools, (B, C)."""
    dropping = make_sparse(**{**ALL[kind], "num_classes": 0})
    calm_attention(dropping.model)
    images = make_images(dropping)
    for sparse in (dropping, merging(dropping)):
        assert_masked_is_gathered(sparse, images)
    with torch.no_grad():
        assert torch.equal(dropping(images), dropping.select(images).pooled)
        assert dropping(images).shape == (len(images), dropping.model.num_features)


@by_kind
def test_tokens_carry_their_positions(build, make_images, kind):
    """All tokens, but in another order: with their positions gathered along, the output is the same."""
    backbone, images = build(kind).backbone, make_images(build(kind))
    prefix = backbone.num_prefix_tokens
    order = torch.stack(
        [torch.randperm(backbone.num_patches, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    )
    with torch.no_grad():
        tokens = backbone.embed(images)
        patches = tokens[:, prefix:]
        shuffled = torch.cat((tokens[:, :prefix], patches.gather(1, order.unsqueeze(-1).expand_as(patches))), dim=1)
        positions = backbone.positions_of(order)
        for index in range(backbone.depth):
            tokens, shuffled = backbone.block(index, tokens), backbone.block(index, shuffled, None, positions)
        expected = backbone.head(backbone.norm(tokens))
        torch.testing.assert_close(backbone.head(backbone.norm(shuffled)), expected, rtol=0, atol=1e-4)


class First(nn.Module):
    """Ranks tokens by their place, the first highest."""

    def forward(self, x, kept=None):
        return -torch.arange(x.shape[1], dtype=torch.float32).expand(x.shape[:2])


@pytest.mark.parametrize("kind", OTHERS)
def test_the_bound_computes_what_keeping_the_first_tokens_does(build, make_images, kind):
    plain = build(kind)
    by_place = SparseViT(plain.model, plain.schedule, [First() for _ in plain.schedule.stages], "drop").eval()
    images = make_images(plain)
    with torch.no_grad():
        bound = ZeroOverheadViT(plain)(images)
        torch.testing.assert_close(bound, by_place(images), rtol=0, atol=1e-4)
        assert not torch.allclose(bound, plain(images), atol=1e-3), "ours keeps other tokens"


@by_kind
def test_adapter_describes_the_model(build, make_images, kind):
    sparse = build(kind)
    backbone = sparse.backbone
    with torch.no_grad():
        tokens = backbone.embed(make_images(sparse))
        features = backbone.token_features(backbone.norm(tokens))
    assert tokens.shape == (2, backbone.num_prefix_tokens + backbone.num_patches, backbone.embed_dim)
    assert features.shape == (2, backbone.num_patches, backbone.embed_dim)
    if kind in NORMED_AFTER_POOLING:
        with torch.no_grad():
            assert backbone.token_features(backbone.norm(100 * random_tokens(backbone))).std() < 2
    assert backbone.depth == len(backbone.blocks)
    assert backbone.num_patches == backbone.grid_size[0] * backbone.grid_size[1] == sparse.schedule.num_patches
    assert backbone.num_classes == sparse.num_classes == sparse.model.num_classes
    logits = backbone.token_logits(features)
    answers = kind in LVVITS and backbone.num_classes
    assert logits.shape == (*features.shape[:2], backbone.num_classes) if answers else logits is None


@by_kind
def test_tail_is_what_runs_from_a_block_on(build, make_images, kind):
    """With all else frozen, the gradient reaches the tail, and no block before it."""
    sparse = build(kind)
    backbone, images = sparse.backbone, make_images(sparse)
    sparse.model.requires_grad_(False)
    for module in backbone.tail(2):
        module.requires_grad_(True)
    assert not any(parameter.requires_grad for block in backbone.blocks[:2] for parameter in block.parameters())
    needed = [parameter for parameter in sparse.model.parameters() if parameter.requires_grad]
    logits = dense_twin(sparse)(images)
    gradients = torch.autograd.grad(logits.square().sum(), needed, allow_unused=True)
    assert sum(gradient is not None for gradient in gradients) >= 0.9 * len(needed)
    sparse.model.requires_grad_(True)


@by_kind
def test_drop_path_rises_to_the_last_block_and_comes_off(build, kind):
    backbone = build(kind).backbone
    backbone.set_drop_path(0.3)
    rates = [{m.drop_prob for m in block.modules() if isinstance(m, DropPath)} or {0.0} for block in backbone.blocks]
    expected = [0.3 * index / (backbone.depth - 1) for index in range(backbone.depth)]
    assert [max(found) for found in rates] == pytest.approx(expected)
    assert all(len(found) == 1 for found in rates)
    backbone.set_drop_path(0.0)
    assert not any(isinstance(module, DropPath) for module in backbone.model.modules())


@by_kind
def test_halves_of_a_block_are_the_block(build, make_images, kind):
    backbone = build(kind).backbone
    if {type(block) for block in backbone.blocks} != {Block}:
        with pytest.raises(UnsupportedModelError, match="cannot be run in halves"):
            backbone.check_halves()
        return
    backbone.check_halves()
    with torch.no_grad():
        x = backbone.embed(make_images(build(kind)))
        halves = backbone.mlp_half(1, backbone.attention_half(1, x))
        torch.testing.assert_close(halves, backbone.block(1, x))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMS norm under autocast
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("phase", ["pretraining", "sampled", "deployed"])
def test_every_phase_trains_what_it_should(make_vit, make_images, kind, phase):
    """Gradient reaches predictors and, from the first stage on, the blocks; in bf16, as training has it."""
    student, teacher = attach(make_vit(**ALL[kind])).train(), attach(make_vit(**ALL[kind]), 1.0)
    objective = Objective(student, teacher, Recipe())
    student.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(make_images(student), torch.tensor([0, 1]), phase)
    loss.total.backward()
    assert torch.isfinite(loss.total)

    def moved(module):
        return any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())

    assert moved(student.predictors) == (phase != "deployed")
    if phase != "pretraining":
        assert all(moved(block) for block in student.backbone.blocks[1:])


@pytest.mark.parametrize("kind", VIT)
def test_pooling_with_every_token_kept_is_timms(build, kind):
    backbone = build(kind).backbone
    x = random_tokens(backbone)
    with torch.no_grad():
        masked = backbone.head(x, torch.ones(2, backbone.num_patches))
        torch.testing.assert_close(masked, backbone.model.forward_head(x), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", [*POOLED, "LV-ViT, skip_lam 2"])
def test_pooling_of_a_mask_is_pooling_what_it_keeps_however_many_each_image_has(build, kind):
    backbone = build(kind).backbone
    x = random_tokens(backbone, 4)
    share = torch.tensor([0.2, 0.5, 0.8, 1.0]).unsqueeze(1)
    kept = (torch.rand(4, backbone.num_patches, generator=torch.Generator().manual_seed(1)) < share).float()
    with torch.no_grad():
        masked = backbone.head(x, kept)
        for image in range(4):
            present = torch.cat((torch.ones(backbone.num_prefix_tokens), kept[image])).bool()
            alone = backbone.head(x[image : image + 1, present])
            torch.testing.assert_close(masked[image : image + 1], alone, rtol=0, atol=1e-4)
        assert (masked - backbone.head(x))[:3].abs().amax(dim=1).min() > 0.01  # or pooling everything would do


@pytest.mark.parametrize("kind", POOLED)
def test_an_image_without_a_kept_token_gives_finite_logits_and_gradients(build, kind):
    backbone = build(kind).backbone
    x = random_tokens(backbone).requires_grad_()
    kept = torch.zeros(2, backbone.num_patches, requires_grad=True)
    logits = backbone.head(x, kept)
    gradients = torch.autograd.grad(logits.square().sum(), [x, kept], allow_unused=True)
    assert logits.isfinite().all()
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
