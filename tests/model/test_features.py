"""A sparse model can be asked what timm's can: features on the full grid, intermediates, groups of weights."""

import copy

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch.nn.functional import cosine_similarity

from vitprune.baselines import RandomPredictor, ToMeViT
from vitprune.errors import UsageError
from vitprune.measure import count_macs
from vitprune.model import SparseViT, TokenFeatures, attach
from vitprune.tokens.filling import Grid

TINY = {"embed_dim": 64, "depth": 4, "num_heads": 2, "img_size": 96}
NANO = {"name": "test_vit", "img_size": 96}  # 6 blocks, 36 patches, class token
KINDS = {
    "class token": NANO,
    "distilled": {"name": "deit_tiny_distilled_patch16_224", **TINY},
    "average": {"name": "test_vit2", "img_size": 96},
    "attention pool": {"name": "test_vit3", "img_size": 96},
    "rotary": {"name": "vit_small_patch16_dinov3", **TINY, "num_classes": 7},
}
by_kind = pytest.mark.parametrize("kind", KINDS)
by_fate = pytest.mark.parametrize("pruned", ["merge", "drop"])


@pytest.fixture
def build(make_vit):
    def get(kind="class token", pruned="merge", keep=0.5, **more) -> SparseViT:
        return attach(make_vit(**KINDS[kind]), keep, pruned=pruned, **more).eval()

    return get


def followed(sparse, images):
    """Every patch by itself, block by block: its value, and the updates of the token that stands for it, if any."""
    backbone, prefix = sparse.backbone, sparse.backbone.num_prefix_tokens
    selection, updates = sparse.select(images), []

    def see(block, inputs, output):
        updates.append((output - inputs[0])[:, prefix:])

    handles = [block.register_forward_hook(see) for block in backbone.blocks]
    sparse(images)
    for handle in handles:
        handle.remove()
    patches = backbone.embed(images)[:, prefix:].clone()
    stages = dict(zip(sparse.schedule.blocks, range(9), strict=False))
    stage = None
    for block, update in enumerate(updates):
        stage = stages.get(block, stage)
        if stage is None:
            patches += update
        elif sparse.pruned == "merge":
            patches += update.gather(1, selection.owners(stage).unsqueeze(-1).expand_as(patches))
        else:
            rows = selection.indices[stage].unsqueeze(-1).expand_as(update)
            patches.scatter_add_(1, rows, update)
    return patches


@by_kind
@by_fate
@torch.no_grad()
def test_features_are_of_every_patch(build, make_images, kind, pruned):
    sparse = build(kind, pruned)
    images = make_images(sparse, 3)
    features, dense = sparse.forward_features(images), sparse.model.forward_features(images)
    assert features.shape == dense.shape == (3, sparse.backbone.num_prefix_tokens + 36, sparse.num_features)
    prefix = sparse.backbone.num_prefix_tokens
    expected = sparse.backbone.norm(followed(sparse, images))
    torch.testing.assert_close(features[:, prefix:], expected, rtol=0, atol=1e-4)
    assert not torch.allclose(features, dense, atol=1e-2)


@by_kind
@by_fate
@torch.no_grad()
def test_selection_has_kept_and_filled_tokens_where_asked(build, make_images, kind, pruned):
    sparse = build(kind, pruned)
    images = make_images(sparse, 3)
    selection, plain = sparse.select(images, filled=True), sparse.select(images)
    assert plain.filled is None
    assert torch.equal(selection.logits, plain.logits)
    kept = selection.kept()
    assert kept.shape == (3, 36)
    assert kept.dtype == torch.bool
    assert torch.equal(kept.nonzero()[:, 1].view(3, -1), selection.indices[-1])
    prefix = sparse.backbone.num_prefix_tokens
    expected = sparse.backbone.token_features(sparse.forward_features(images))
    if not isinstance(sparse.model.norm, torch.nn.Identity):
        expected = sparse.forward_features(images)[:, prefix:]
    torch.testing.assert_close(selection.filled, expected)
    if pruned == "drop":
        torch.testing.assert_close(selection.filled[kept], selection.features.flatten(0, 1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_dense_model_fills_nothing(build, make_images):
    dense = build(keep=1.0)
    images = make_images(dense)
    selection = dense.select(images, filled=True)
    assert torch.equal(selection.filled, selection.features)
    assert selection.kept().all()


def test_gradient_of_filled_tokens_reaches_all_blocks(build, make_images):
    sparse = build()
    sparse.predictors.requires_grad_(False)
    sparse.select(make_images(sparse), filled=True).filled.square().mean().backward()
    for name, parameter in sparse.model.blocks.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_no_grid_is_followed_unless_asked_for(build, make_images):
    sparse = build()
    x = sparse.backbone.embed(make_images(sparse))
    assert sparse.run_blocks(x).grid is None
    assert sparse.run_blocks(x, grid=Grid()).grid.offset.shape == (2, 36, 64)


@torch.no_grad()
def test_the_head_on_features_is_forward_where_a_class_token_is_read(build, make_images):
    for kind in ("class token", "distilled"):
        sparse = build(kind)
        images = make_images(sparse)
        features = sparse.forward_features(images)
        assert torch.equal(sparse.forward_head(features), sparse(images))
        pooled = sparse.forward_head(features, pre_logits=True)
        assert torch.equal(pooled, sparse.select(images).pooled)


@pytest.mark.parametrize("kind", ["average", "attention pool"])
@torch.no_grad()
def test_the_head_on_features_is_near_forward_where_patches_are_pooled(build, make_images, kind):
    """Exactly it as long as nothing sets merged patches apart: then filled ones count as often as sizes say."""
    sparse = build(kind, keep=0.9, beta=0.0)
    sparse.model.pos_embed.zero_()
    images = make_images(sparse)
    images[..., 16:] = images[..., :16].repeat(1, 1, 1, 5)  # six columns of the same patches
    torch.testing.assert_close(sparse.forward_head(sparse.forward_features(images)), sparse(images), rtol=0, atol=1e-4)


# Intermediates


@by_kind
@torch.no_grad()
def test_intermediates_of_a_dense_model_are_timms(build, make_images, kind):
    dense = build(kind, keep=1.0)
    images, depth = make_images(dense), dense.backbone.depth
    for settings in (
        {},
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": (1,), "stop_early": True, "output_fmt": "NLC"},
        {"indices": [1, 2], "return_prefix_tokens": True},
        {"indices": [1], "intermediates_only": True},
    ):
        given, expected = (model.forward_intermediates(images, **settings) for model in (dense, dense.model))
        flat, timms = torch.utils._pytree.tree_flatten(given), torch.utils._pytree.tree_flatten(expected)
        assert flat[1] == timms[1], settings
        assert all(map(torch.equal, flat[0], timms[0])), settings
    assert len(dense.forward_intermediates(images)[1]) == depth


@torch.no_grad()
def test_intermediates_by_name_and_by_dinos_interface_are_timms(build, make_images):
    dense = build(keep=1.0)
    images = make_images(dense)
    for settings in ({"return_prefix_tokens": True}, {"intermediates_only": True}):
        given, expected = (
            model.forward_intermediates(images, [1, 3], output_dict=True, **settings) for model in (dense, dense.model)
        )
        assert given.keys() == expected.keys()
        flat, timms = (sorted(map(torch.sum, torch.utils._pytree.tree_leaves(each))) for each in (given, expected))
        torch.testing.assert_close(flat, timms)
    for settings in ({}, {"n": [0, 2], "reshape": True, "norm": True}, {"n": 2, "return_prefix_tokens": True}):
        given, expected = (model.get_intermediate_layers(images, **settings) for model in (dense, dense.model))
        flat, timms = (torch.utils._pytree.tree_leaves(each) for each in (given, expected))
        assert all(map(torch.equal, flat, timms))


@by_fate
@torch.no_grad()
def test_intermediates_of_a_sparse_model_are_of_every_patch(build, make_images, pruned):
    sparse = build("class token", pruned)
    images, first = make_images(sparse), sparse.schedule.blocks[0]
    features, taken = sparse.forward_intermediates(images, [first - 1, 5], norm=True, output_fmt="NLC")
    assert torch.equal(features, sparse.forward_features(images))
    assert torch.equal(taken[1], features[:, 1:])
    before = sparse.model.forward_intermediates(images, [first - 1], norm=True, output_fmt="NLC")[1]
    assert torch.equal(taken[0], before[0]), "nothing is pruned yet"
    stopped = sparse.forward_intermediates(images, [first], stop_early=True, output_fmt="NLC", norm=True)
    assert torch.equal(stopped[0][:, 1:], stopped[1][0])
    assert sparse.forward_intermediates(images, 1, intermediates_only=True)[0].shape == (2, 64, 6, 6)


@torch.no_grad()
def test_the_grid_of_images_that_are_not_square(make_vit, make_images):
    sparse = attach(make_vit("test_vit", img_size=(64, 128)), 0.5).eval()
    images = make_images(sparse)
    (last,) = sparse.forward_intermediates(images, 1, intermediates_only=True, norm=True)
    assert last.shape == (2, 64, 4, 8)
    assert torch.equal(last.flatten(2).transpose(1, 2), sparse.forward_features(images)[:, 1:])


@pytest.mark.parametrize("indices", [[6], [-7], 0, 7, []])
def test_blocks_that_are_not_there_are_refused(build, make_images, indices):
    sparse = build()
    with pytest.raises(UsageError, match="indices are") as caught:
        sparse.forward_intermediates(make_images(sparse), indices)
    assert "0 to 5" in caught.value.hint


def test_an_unknown_form_is_refused(build, make_images):
    sparse = build()
    with pytest.raises(UsageError, match="'NHWC'"):
        sparse.forward_intermediates(make_images(sparse), output_fmt="NHWC")


# What is trained


def test_checkpointing_changes_no_gradient(build, make_images):
    sparse = build()
    sparse.predictors.requires_grad_(False)
    twin, images = copy.deepcopy(sparse), make_images(sparse)
    twin.set_grad_checkpointing()
    assert twin.model.grad_checkpointing
    assert not sparse.model.grad_checkpointing
    for model in (sparse, twin):
        model.forward_features(images).square().mean().backward()
    for one, other in zip(sparse.model.parameters(), twin.model.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


@by_kind
def test_timms_optimizer_groups_the_same_weights_as_in_the_dense_model(build, kind):
    sparse = build(kind)
    given, expected = (
        param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
        for model in (sparse, sparse.model)
    )

    def settings(groups, model):
        names = {id(parameter): name.removeprefix("model.") for name, parameter in model.named_parameters()}
        return {
            names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
            for group in groups
            for parameter in group["params"]
        }

    ours, timms = settings(given, sparse), settings(expected, sparse.model)
    predictors = {name: value for name, value in ours.items() if name.startswith("predictors.")}
    assert {scale for scale, _ in predictors.values()} == {1.0}
    assert {name: value for name, value in ours.items() if name not in predictors} == timms


# Others, and what it costs


@torch.no_grad()
def test_other_ways_to_prune_have_features_too(make_vit, make_images):
    model = make_vit(**NANO)
    images = make_images(model)
    dense = model.forward_features(images)
    plan = attach(model, 0.7)
    random = SparseViT(model, plan.schedule, map(RandomPredictor, range(3)), "merge", None, 0.0).eval()
    by_attention, tome = attach(model, 0.7, predictor="attention").eval(), ToMeViT(model, [4] * 6).eval()
    for sparse in (random, by_attention, tome):
        features = sparse.forward_features(images)
        assert features.shape == dense.shape
        likeness = cosine_similarity(features, dense, dim=-1).mean()
        assert 0.3 < likeness < 0.999, type(sparse)
    assert torch.equal(ToMeViT(model, [0] * 6).forward_features(images), dense)


@torch.no_grad()
def test_tome_follows_every_patch(make_vit, make_images):
    """Merging twins loses nothing, wherever they are; an odd number of tokens is split unevenly."""
    model = make_vit("test_vit2", img_size=112)  # 49 patches
    model.pos_embed.zero_()
    images = make_images(model)
    images[..., 16:] = images[..., :16].repeat(1, 1, 1, 6)
    tome = ToMeViT(model, [20, 12, 0, 2, 0, 0, 0, 0])
    torch.testing.assert_close(tome.forward_features(images), model.forward_features(images), rtol=0, atol=1e-3)


def test_filling_costs_no_products(build):
    sparse = build()
    assert count_macs(TokenFeatures(sparse), (3, 96, 96)) == count_macs(sparse, (3, 96, 96)) - 64 * sparse.num_classes


@torch.no_grad()
def test_casting_keeps_the_dtype(build, make_images):
    sparse = build()
    expected = sparse.forward_features(images := make_images(sparse))
    features = sparse.bfloat16().forward_features(images.bfloat16())
    assert features.dtype == torch.bfloat16
    assert cosine_similarity(features.float(), expected, dim=-1).median() > 0.99


@pytest.mark.slow
@torch.no_grad()
def test_features_compile_whole(make_vit, make_images):
    sparse = attach(make_vit(**NANO, depth=3), 0.5, [1, 2]).eval()
    compiled = torch.compile(TokenFeatures(sparse), fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 5):
        images = make_images(sparse, count)
        torch.testing.assert_close(compiled(images), sparse.forward_features(images), rtol=0, atol=1e-4)
