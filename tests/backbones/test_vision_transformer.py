"""Every shape of timm's VisionTransformer: dense as timm does it, and dropped by mask as dropped for real."""

import functools

import pytest
import torch
from agreement import assert_dense_is_its_own, assert_masked_is_gathered, assert_same_in_low_precision, dense_twin
from timm.layers import DropPath
from timm.models.vision_transformer import Block

from vitprune.errors import UnsupportedModelError
from vitprune.model import SparseViT, attach

TINY = {"embed_dim": 64, "depth": 4, "num_heads": 2, "img_size": 96}
PLAIN = {"name": "vit_tiny_patch16_224", **TINY}

MODELS = {
    # prefix tokens
    "class token": PLAIN,
    "class and distillation token, two heads": {"name": "deit_tiny_distilled_patch16_224", **TINY},
    "class token and 4 registers": {"name": "vit_small_patch14_reg4_dinov2", **TINY, "img_size": 84},
    "one register": {"name": "test_vit2", "img_size": 96},
    "DeiT-III": {"name": "deit3_small_patch16_224", **TINY},
    "CLIP": {"name": "vit_base_patch16_clip_224", **TINY},
    # pooling
    "no class token, attention pool": {"name": "vit_base_patch16_siglip_224", **TINY},
    "attention pool with prefix": {"name": "test_vit3", "img_size": 96},
    "average": {"name": "vit_medium_patch16_gap_256", **TINY},
    "average of patches beside a class token": {**PLAIN, "global_pool": "avg"},
    "average, normed before pooling": {**PLAIN, "global_pool": "avg", "fc_norm": False},
    "average with prefix": {**PLAIN, "global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    "max": {**PLAIN, "global_pool": "max"},
    "average and max": {**PLAIN, "global_pool": "avgmax"},
    "average and max with prefix, normed before pooling": {
        **PLAIN,
        "global_pool": "avgmax",
        "pool_include_prefix": True,
        "fc_norm": False,
    },
    "refined, class token": {**PLAIN, "global_pool": "prr"},
    "refined, average": {**PLAIN, "global_pool": "prr", "class_token": False, "reg_tokens": 2},
    "class token, normed after pooling": {**PLAIN, "fc_norm": True},
    # stem, sizes, classifier
    "hybrid stem": {"name": "vit_tiny_r_s16_p8_224", **TINY, "img_size": 160},
    "ViTamin": {"name": "vitamin_small_224", "depth": 4, "img_size": 96},
    "not square": {**PLAIN, "img_size": (64, 128)},
    "patches of 8": {"name": "vit_small_patch8_224", **TINY, "img_size": 48},
    "7 classes, 1 channel": {**PLAIN, "num_classes": 7, "in_chans": 1},
    "no classifier": {**PLAIN, "num_classes": 0},
    # blocks
    "RMS norm": {"name": "test_vit4", "img_size": 96},
    "norm of queries and keys": {**PLAIN, "qk_norm": True},
    # Without a norm before attention its logits grow, and the gate hides a dropped token only up to eps * exp(logit).
    "norm after": {"name": "vit_base_patch16_rpn_224", **TINY, "qk_norm": True},
    "parallel scaling": {"name": "vit_base_patch16_xp_224", **TINY},
    "parallel things": {"name": "vit_small_patch16_18x2_224", **TINY},
    "differential attention": {"name": "vit_dwee_patch16_reg1_gap_256", **TINY},
    "differential parallel": {"name": "vit_dpwee_patch16_reg1_gap_256", **TINY},
    "gated MLP": {"name": "vit_giant_patch14_dinov2", **TINY, "img_size": 84, "mlp_ratio": 4},
}
POOLED = [kind for kind in MODELS if any(word in kind for word in ("attention pool", "average", "max", "refined"))]

by_kind = pytest.mark.parametrize("kind", MODELS)
by_pooling = pytest.mark.parametrize("kind", POOLED)


@pytest.fixture(scope="module")
def build(make_sparse):
    """A sparse model of a kind, built once: its backbone is the dense timm model."""

    @functools.cache
    def get(kind) -> SparseViT:
        return make_sparse(**MODELS[kind])

    return get


@by_kind
def test_keep_1_is_timms_own_output_bit_for_bit(build, make_images, kind):
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
        assert (sparse.select(images).sizes.sum(1) == sparse.schedule.num_patches).all()


@by_kind
def test_halves_of_a_block_are_the_block(build, make_images, kind):
    backbone = build(kind).backbone
    if {type(block) for block in backbone.model.blocks} != {Block}:
        with pytest.raises(UnsupportedModelError, match="cannot be run in halves"):
            backbone.check_halves()
        return
    backbone.check_halves()
    with torch.no_grad():
        x = backbone.embed(make_images(build(kind)))
        halves = backbone.mlp_half(1, backbone.attention_half(1, x))
        torch.testing.assert_close(halves, backbone.block(1, x))


@by_kind
def test_tail_is_what_runs_from_a_block_on(build, make_images, kind):
    """With the tail frozen no gradient reaches it, and with everything else frozen it all comes from there."""
    sparse = build(kind)
    backbone, images = sparse.backbone, make_images(sparse)
    sparse.model.requires_grad_(False)
    for module in backbone.tail(2):
        module.requires_grad_(True)
    with torch.no_grad():
        x = backbone.block(1, backbone.block(0, backbone.embed(images)))
    for index in range(2, backbone.depth):
        x = backbone.block(index, x)
    logits = backbone.head(backbone.norm(x))
    needed = [p for p in sparse.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logits.square().sum(), needed, allow_unused=True)
    used = sum(gradient is not None for gradient in gradients)
    assert used >= 0.9 * len(needed)
    sparse.model.requires_grad_(True)


@by_kind
def test_drop_path_rises_to_the_last_block_and_comes_off(build, kind):
    sparse = build(kind)
    sparse.backbone.set_drop_path(0.2)
    rates = [
        max((m.drop_prob for m in block.modules() if isinstance(m, DropPath)), default=0.0)
        for block in sparse.model.blocks
    ]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.2)
    assert rates == sorted(rates)
    sparse.backbone.set_drop_path(0.0)
    assert not any(isinstance(module, DropPath) for module in sparse.model.modules())


@by_kind
def test_adapter_describes_the_model(build, make_images, kind):
    sparse = build(kind)
    backbone, images = sparse.backbone, make_images(sparse)
    with torch.no_grad():
        tokens = backbone.embed(images)
        features = backbone.token_features(backbone.norm(tokens))
    assert tokens.shape == (2, backbone.num_prefix_tokens + backbone.num_patches, backbone.embed_dim)
    assert features.shape == (2, backbone.num_patches, backbone.embed_dim)
    assert backbone.depth == len(sparse.model.blocks)
    assert backbone.num_patches == backbone.grid_size[0] * backbone.grid_size[1] == sparse.schedule.num_patches
    assert backbone.num_classes == sparse.num_classes == sparse.model.num_classes


@by_kind
def test_pooling_with_every_token_kept_is_timms(build, kind):
    sparse = build(kind)
    backbone = sparse.backbone
    x = torch.randn(2, backbone.num_prefix_tokens + backbone.num_patches, backbone.embed_dim)
    with torch.no_grad():
        masked = backbone.head(x, torch.ones(2, backbone.num_patches))
        torch.testing.assert_close(masked, sparse.model.forward_head(x), rtol=1e-4, atol=2e-5)


@by_pooling
def test_pooling_of_a_mask_is_pooling_what_it_keeps_however_many_each_image_has(build, kind):
    backbone = build(kind).backbone
    prefix, patches = backbone.num_prefix_tokens, backbone.num_patches
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, prefix + patches, backbone.embed_dim, generator=generator)
    share = torch.tensor([0.2, 0.5, 0.8, 1.0]).unsqueeze(1)
    kept = (torch.rand(4, patches, generator=generator) < share).float()
    with torch.no_grad():
        masked = backbone.head(x, kept)
        for image in range(4):
            stays = torch.cat((torch.ones(prefix), kept[image])).bool()
            alone = backbone.head(x[image : image + 1, stays])
            torch.testing.assert_close(masked[image : image + 1], alone, rtol=0, atol=1e-4)
        assert (masked - backbone.head(x))[:3].abs().amax(dim=1).min() > 0.01  # or pooling everything would do


@pytest.mark.parametrize("kind", list(POOLED))
def test_an_image_without_a_kept_token_gives_finite_logits_and_gradients(build, kind):
    backbone = build(kind).backbone
    x = torch.randn(2, backbone.num_prefix_tokens + backbone.num_patches, backbone.embed_dim).requires_grad_()
    kept = torch.zeros(2, backbone.num_patches, requires_grad=True)
    logits = backbone.head(x, kept)
    gradients = torch.autograd.grad(logits.square().sum(), [x, kept], allow_unused=True)
    assert logits.isfinite().all()
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", ["class token", "one register", "no class token, attention pool"])
def test_features_are_normed_where_timm_norms_only_after_pooling(build, kind):
    backbone = build(kind).backbone
    x = 100 * torch.randn(2, backbone.num_prefix_tokens + backbone.num_patches, backbone.embed_dim)
    with torch.no_grad():
        assert backbone.token_features(backbone.norm(x)).std() < 2


# Attention without PyTorch's fused kernel, gradient checkpointing, other input sizes, train mode


@pytest.mark.parametrize(
    "kind", ["class token", "no class token, attention pool", "differential attention", "refined, average"]
)
def test_unfused_attention_agrees_too(make_sparse, make_images, kind):
    sparse = make_sparse(**MODELS[kind])
    images = make_images(sparse)
    fused = sparse.forward_masked(images).logits
    for module in sparse.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    assert_masked_is_gathered(sparse, images)
    torch.testing.assert_close(sparse.forward_masked(images).logits, fused, rtol=0, atol=1e-4)
    assert torch.equal(dense_twin(sparse)(images), sparse.model(images))


@pytest.mark.parametrize("kind", ["class token", "one register", "parallel things"])
def test_gradient_checkpointing_changes_neither_output_nor_gradient(make_sparse, make_images, kind):
    sparse = make_sparse(**MODELS[kind])
    images = make_images(sparse)

    def outcome():
        sparse.zero_grad()
        logits = sparse.forward_masked(images).logits
        logits.square().sum().backward()
        return logits.detach(), [parameter.grad for parameter in sparse.model.parameters()]

    logits, gradients = outcome()
    sparse.model.set_grad_checkpointing()
    checkpointed_logits, checkpointed_gradients = outcome()
    assert torch.equal(checkpointed_logits, logits)
    for checkpointed, plain in zip(checkpointed_gradients, gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)
    assert_masked_is_gathered(sparse, images)
    assert torch.equal(dense_twin(sparse)(images), sparse.model(images))  # gradients on: timm checkpoints as well


def test_gradient_checkpointing_recomputes_every_block(make_sparse, make_images):
    sparse = make_sparse(**PLAIN)
    images = make_images(sparse)
    calls = []
    for index, block in enumerate(sparse.model.blocks):
        block.norm1.register_forward_hook(lambda *_, index=index: calls.append(index))
    sparse.model.set_grad_checkpointing()
    logits = sparse.forward_masked(images).logits
    assert calls == [0, 1, 2, 3]
    logits.sum().backward()
    assert sorted(calls) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("size", [(128, 96), (160, 160), (192, 224)])
def test_dynamic_image_size_is_timms_at_any_size(make_vit, make_images, size):
    model = make_vit("test_vit")
    images = make_images(model, size=size)
    with torch.no_grad():
        assert torch.equal(attach(model, keep=1.0)(images), model(images))


@pytest.mark.parametrize("size", [(128, 96), (192, 224)])
def test_dynamic_image_size_keeps_the_share_of_the_tokens_it_has(make_sparse, make_images, size):
    sparse = make_sparse("test_vit", keep=0.7)
    images = make_images(sparse, size=size)
    num_patches = size[0] * size[1] // 256
    with torch.no_grad():
        selection = sparse.select(images)
    assert [indices.shape[1] for indices in selection.indices] == [
        num_patches * 7 // 10,
        num_patches * 49 // 100,
        num_patches * 343 // 1000,
    ]


@pytest.mark.parametrize("size", [(160, 160), (128, 96), (192, 224)])
def test_dynamic_image_size_masked_is_gathered(make_sparse, make_images, size):
    sparse = make_sparse("test_vit")
    assert_masked_is_gathered(sparse, make_images(sparse, size=size))


def test_timms_random_patch_dropout_is_not_applied(make_sparse, make_images):
    sparse = make_sparse(**PLAIN, patch_drop_rate=0.5).train()
    images = make_images(sparse)
    assert sparse.forward_masked(images).features.shape[1] == 36
    assert [indices.shape[1] for indices in sparse.select(images).indices] == list(sparse.schedule.num_tokens)


def test_train_mode_without_random_layers_changes_nothing(make_sparse, make_images):
    sparse = make_sparse(**PLAIN)
    images = make_images(sparse)
    expected = sparse(images)
    assert torch.equal(sparse.train()(images), expected)


@pytest.mark.parametrize(
    "kind", ["class token", "no class token, attention pool", "average and max", "refined, average"]
)
def test_masked_and_gathered_pass_run_in_bf16(make_sparse, make_images, kind):
    sparse = make_sparse(**MODELS[kind])
    assert_same_in_low_precision(sparse, make_images(sparse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_mask_comes_in_the_dtype_of_the_tokens(make_sparse, make_images, dtype):
    """Fused attention on a GPU refuses anything else."""
    sparse = make_sparse(**PLAIN).to(dtype)
    seen = []
    for block in sparse.model.blocks:
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("attn_mask")), with_kwargs=True)
    sparse.forward_masked(make_images(sparse))
    assert seen[0] is None
    assert [mask.dtype for mask in seen[1:]] == [dtype] * 3
