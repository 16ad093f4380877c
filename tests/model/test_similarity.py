"""Tokens compared by their keys: those of the attention itself, and in both passes the same choice."""

import pytest
import torch
from agreement import assert_masked_is_gathered

from vitprune.backbones import AttentionRecorder, wrap
from vitprune.errors import UnsupportedModelError, UsageError
from vitprune.measure import count_macs
from vitprune.model import SparseViT, attach
from vitprune.tokens.redundancy import choose_tokens

TINY = {"embed_dim": 64, "depth": 4, "num_heads": 2, "img_size": 96}
KINDS = {
    "ViT": {"name": "vit_tiny_patch16_224", **TINY},
    "DINOv3": {"name": "vit_small_patch16_dinov3", **TINY, "num_classes": 7},
    "one layer for keys": {"name": "eva02_base_patch16_clip_224", **TINY},
    "fewer keys than queries": {
        "name": "vit_base_patch16_sapiens2",
        **TINY,
        "num_heads": 4,
        "num_kv_heads": (4, 2, 2, 4),
        "num_classes": 7,
    },
    "LV-ViT": {"name": "lvvit_t", **TINY, "stem_width": 32},
}
by_kind = pytest.mark.parametrize("kind", KINDS)


@by_kind
@torch.no_grad()
def test_keys_are_those_of_the_attention(make_vit, make_images, kind):
    model = make_vit(**KINDS[kind])
    backbone = wrap(model)
    x = backbone.embed(make_images(model))
    if hasattr(attention := backbone.blocks[0].attn, "k_norm"):
        attention.k_norm = torch.nn.Identity()
    recorder = AttentionRecorder()
    with recorder:
        backbone.block(0, x)
    keys = backbone.keys(0, x)
    prefix, recorded = backbone.num_prefix_tokens, recorder.keys[0].mean(dim=1)
    # Prefix tokens have no position; of the others rotation changes all but the length.
    torch.testing.assert_close(keys[:, :prefix], recorded[:, :prefix], rtol=0, atol=1e-4)
    torch.testing.assert_close(keys.norm(dim=-1), recorded.norm(dim=-1), rtol=1e-3, atol=1e-4)


@by_kind
def test_masked_pass_agrees_with_the_gathered_one(make_sparse, make_images, kind):
    plain = make_sparse(**KINDS[kind])
    by_keys, by_features = (
        SparseViT(plain.model, plain.schedule, plain.predictors, "merge", 0.1, 1.0, similarity).eval()
        for similarity in ("keys", "features")
    )
    images = make_images(plain)
    assert_masked_is_gathered(by_keys, images)
    with torch.no_grad():
        assert not torch.equal(by_keys.select(images).indices[-1], by_features.select(images).indices[-1])


@torch.no_grad()
def test_choices_are_by_cosine_of_keys(make_vit, make_images):
    sparse = attach(make_vit(**KINDS["ViT"]), 0.5, prune_at=[1], similarity="keys").eval()
    images = make_images(sparse)
    selection = sparse.select(images)
    patches = sparse.backbone.block(0, sparse.backbone.embed(images))[:, 1:]
    keys = sparse.model.blocks[1].attn.qkv(sparse.model.blocks[1].norm1(patches)).unflatten(-1, (3, 2, 32))
    keys = keys[:, :, 1].mean(dim=2)
    expected = choose_tokens(keys, selection.scores[0], sparse.schedule.num_tokens[0], sparse.balance)
    assert torch.equal(selection.choices[0].kept, expected.kept)
    assert torch.equal(selection.choices[0].nearest, expected.nearest)


def test_a_layer_with_an_adapter_is_asked_itself(make_vit, make_images):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make_vit(**KINDS["ViT"])
    backbone, images = wrap(model), make_images(model)
    with torch.no_grad():
        x = backbone.embed(images)
        before = backbone.keys(1, x)
        model.blocks[1].attn.qkv.__class__ = Doubled
        torch.testing.assert_close(backbone.keys(1, x), 2 * before)


def test_keys_cost_their_products(make_vit):
    model = make_vit(**KINDS["ViT"])
    by_keys, by_features = (attach(model, 0.5, prune_at=[1], similarity=name) for name in ("keys", "features"))
    assert count_macs(by_keys, (3, 96, 96)) == count_macs(by_features, (3, 96, 96)) - 36 * 36 * 32 + 36 * 64 * 32


@pytest.mark.parametrize(
    "name", ["cait_xxs24_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224", "vit_base_patch16_xp_224"]
)
def test_blocks_that_do_not_show_their_keys_are_refused(make_vit, name):
    model = make_vit(name, **TINY)
    with pytest.raises(UnsupportedModelError, match="keys of block 1") as caught:
        attach(model, 0.7, similarity="keys")
    assert 'similarity="features"' in caught.value.hint
    attach(model, 0.7, pruned="drop", similarity="keys")  # nothing is compared


def test_an_unknown_similarity_is_refused(make_vit):
    with pytest.raises(UsageError, match="similarity 'values' is unknown"):
        attach(make_vit(**KINDS["ViT"]), similarity="values")
