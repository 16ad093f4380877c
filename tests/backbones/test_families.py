"""Every other family of timm's plain transformers: dense as timm does it, and dropped by mask as dropped for real.

What positions do is where these can go wrong, so tokens are dropped in different places of every image.
"""

import functools

import pytest
import torch
from agreement import assert_dense_is_its_own, assert_masked_is_gathered, calm_attention
from torch import nn

from vitprune.errors import UsageError
from vitprune.measure import ZeroOverheadViT
from vitprune.model import SparseViT
from vitprune.training import Objective, Recipe

TINY = {"embed_dim": 64, "depth": 4, "num_heads": 2, "img_size": 96}
ENCODER = {**TINY, "num_classes": 7}

MODELS = {
    # rotary positions
    "EVA": {"name": "eva_giant_patch14_224", **TINY, "img_size": 84},
    "EVA-02": {"name": "eva02_tiny_patch14_224", **TINY, "img_size": 84},
    "EVA-02 CLIP": {"name": "eva02_base_patch16_clip_224", **TINY},
    "EVA-02 CLIP, norm after": {"name": "eva02_enormous_patch14_clip_224", **TINY, "img_size": 84},
    "DINOv3": {"name": "vit_small_patch16_dinov3", **TINY, "num_classes": 7},
    "DINOv3, average": {"name": "vit_small_patch16_dinov3", **TINY, "num_classes": 7, "global_pool": "avg"},
    "DINOv3, not square": {"name": "vit_small_patch16_dinov3", **TINY, "num_classes": 7, "img_size": (64, 128)},
    "Perception Encoder": {"name": "vit_pe_core_tiny_patch16_384", **TINY, "num_classes": 7},
    "RoPE ViT, axial": {"name": "vit_small_patch16_rope_224", **TINY},
    "RoPE ViT, mixed": {"name": "vit_small_patch16_rope_mixed_224", **TINY},
    "RoPE ViT, mixed, absolute too": {"name": "vit_small_patch16_rope_mixed_ape_224", **TINY},
    "Sapiens2": {
        "name": "vit_base_patch16_sapiens2",
        **TINY,
        "num_classes": 7,
        "num_heads": 4,
        "num_kv_heads": (4, 2, 2, 4),
    },
    # a bias for every pair of tokens
    "BEiT": {"name": "beit_base_patch16_224", **TINY},
    "BEiT v2": {"name": "beitv2_base_patch16_224", **TINY},
    "BEiT, class token": {"name": "beit_base_patch16_224", **TINY, "global_pool": "token"},
    "BEiT, shared bias": {
        "name": "beit_base_patch16_224",
        **TINY,
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
        "init_values": None,
    },
    "BEiT, own and shared bias": {"name": "beit_base_patch16_224", **TINY, "use_shared_rel_pos_bias": True},
    "BEiT, not square": {"name": "beit_base_patch16_224", **TINY, "img_size": (64, 128)},
    "relative positions": {"name": "vit_relpos_small_patch16_224", **TINY},
    "relative positions, class token": {"name": "vit_relpos_base_patch16_cls_224", **TINY},
    "relative positions beside a class token": {"name": "vit_relpos_base_patch16_clsgap_224", **TINY},
    "relative positions, norm after": {"name": "vit_relpos_base_patch16_rpn_224", **TINY, "qk_norm": True},
    "relative positions, shared": {"name": "vit_srelpos_small_patch16_224", **TINY},
    # talking heads and class attention
    "CaiT": {"name": "cait_xxs24_224", **TINY},
    "CaiT, average": {"name": "cait_xxs24_224", **TINY, "global_pool": "avg"},
    # variable sizes
    "NaFlex, average": {"name": "naflexvit_base_patch16_gap", **TINY},
    "NaFlex, attention pool": {"name": "naflexvit_base_patch16_map", **TINY},
    "NaFlex, factorized positions": {"name": "naflexvit_base_patch16_parfac_gap", **TINY},
    "NaFlex, RADIO": {"name": "naflexvit_base_patch16_radio_v3", **TINY, "num_classes": 7},
    "NaFlex, axial": {"name": "naflexvit_base_patch16_gap", **TINY, "rope_type": "axial"},
    "NaFlex, mixed": {"name": "naflexvit_base_patch16_gap", **TINY, "rope_type": "mixed"},
    # encoders of language models, as classifiers
    "Qwen3": {"name": "qwen3_vit_88m", **ENCODER},
    "DeepSeek": {"name": "deepseek_vit_412m", **ENCODER, "img_size": 84},
    "Gemma 4": {"name": "gemma4_vit_167m", **ENCODER, "head_dim": 32, "intermediate_size": 128},
}
ROTARY = ("EVA-02", "DINOv3", "RoPE ViT, mixed", "NaFlex, axial", "Qwen3", "Gemma 4")


by_kind = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(scope="module")
def build(make_sparse):
    """A sparse model of a kind, built once: its backbone is the dense timm model."""

    @functools.cache
    def get(kind) -> SparseViT:
        sparse = make_sparse(**MODELS[kind])
        calm_attention(sparse.model)
        return sparse

    return get


@by_kind
def test_keep_1_is_timms_own_output_bit_for_bit(build, make_images, kind):
    sparse = build(kind)
    assert_dense_is_its_own(sparse, make_images(sparse))


@by_kind
@pytest.mark.parametrize("dropped", ["drop", "fold"])
def test_masking_tokens_is_removing_them(build, make_images, kind, dropped):
    plain = build(kind)
    sparse = SparseViT(plain.model, plain.schedule, plain.predictors, dropped).eval()
    assert_masked_is_gathered(sparse, make_images(sparse))


class First(nn.Module):
    """Ranks tokens by their place, the first highest."""

    def forward(self, x, kept=None):
        place = torch.arange(x.shape[1], dtype=torch.float32).expand(x.shape[:2])
        return torch.stack((place, -place), dim=-1).log_softmax(dim=-1)


@by_kind
def test_the_floor_computes_what_keeping_the_first_tokens_does(build, make_images, kind):
    plain = build(kind)
    by_place = SparseViT(plain.model, plain.schedule, [First() for _ in plain.schedule.stages]).eval()
    images = make_images(plain)
    with torch.no_grad():
        floor = ZeroOverheadViT(plain)(images)
        torch.testing.assert_close(floor, by_place(images), rtol=0, atol=1e-4)
        assert not torch.allclose(floor, plain(images), atol=1e-3), "ours keeps other tokens"


@by_kind
def test_an_all_kept_mask_changes_nothing(build, make_images, kind):
    """The way with a mask is our own code in some families: it must compute what timm computes."""
    sparse = build(kind)
    images = make_images(sparse)
    with torch.no_grad():
        masked = sparse.forward_masked(images, lambda log_pi, kept, stage: torch.ones_like(kept))
        torch.testing.assert_close(masked.logits, sparse.model(images), rtol=0, atol=2e-5)


@by_kind
def test_tokens_are_told_where_they_sit(build, make_images, kind):
    """All tokens, but in another order: with their positions gathered along, the answer is the same."""
    backbone = build(kind).backbone
    images = make_images(build(kind))
    order = torch.stack(
        [torch.randperm(backbone.num_patches, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    )
    with torch.no_grad():
        tokens = backbone.embed(images)
        prefix = backbone.num_prefix_tokens
        shuffled = torch.cat(
            (tokens[:, :prefix], tokens[:, prefix:].gather(1, order.unsqueeze(-1).expand_as(tokens[:, prefix:]))), dim=1
        )
        place = backbone.positions_of(order)
        for index in range(backbone.depth):
            tokens, shuffled = backbone.block(index, tokens), backbone.block(index, shuffled, None, place)
        expected = backbone.head(backbone.norm(tokens))
        torch.testing.assert_close(backbone.head(backbone.norm(shuffled)), expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMS norm under autocast
@by_kind
@pytest.mark.parametrize("phase", ["warm", "sampled", "deployed"])
def test_every_phase_trains_what_it_should(make_vit, make_images, kind, phase):
    """Gradient reaches predictors and, from the first stage on, the blocks; in bf16, as training has it."""
    from vitprune.model import attach

    student = attach(make_vit(**MODELS[kind]), 0.7, dropped="fold").train()
    teacher = attach(make_vit(**MODELS[kind]), 1.0)
    objective = Objective(student, teacher, Recipe())
    student.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(make_images(student), torch.tensor([0, 1]), phase)
    loss.total.backward()
    assert torch.isfinite(loss.total)

    def moved(module):
        return any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())

    assert moved(student.predictors) == (phase != "deployed")
    if phase != "warm":
        assert all(moved(block) for block in student.backbone.blocks[1:])


@pytest.mark.parametrize("kind", ROTARY)
def test_another_image_size_than_the_positions_are_for_is_refused(build, make_images, kind):
    sparse = build(kind)
    height, width = make_images(sparse).shape[-2:]
    with pytest.raises((UsageError, AssertionError), match=r"img_size|positions are for|doesn't match"):
        sparse(torch.randn(1, 3, 2 * height, 2 * width))


def test_timms_own_token_dropout_and_coordinate_noise_are_left_out(make_vit, make_images):
    """Teacher and student share the trunk and must see the same tokens in the same places."""
    from vitprune.model import attach

    model = make_vit(
        "vit_small_patch16_dinov3", **TINY, num_classes=7, patch_drop_rate=0.5, rope_rescale_coords=2.0
    ).train()
    sparse = attach(model, 1.0).train()
    images = make_images(sparse)
    with torch.no_grad():
        assert torch.equal(sparse(images), sparse(images))
        assert sparse.select(images).features.shape[1] == 36
    assert model.patch_drop is not None
    assert model.rope.training
