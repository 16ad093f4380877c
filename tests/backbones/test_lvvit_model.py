"""The LV-ViT models: names and sizes of the published checkpoints, every wrapping of a weight file."""

import argparse

import pytest
import timm
import torch

import vitprune
from vitprune.checkpoint.sparse_file import describe, save
from vitprune.errors import CheckpointError, UnknownModelError
from vitprune.loading.load import load_model
from vitprune.loading.names import resolve_name
from vitprune.measure import count_macs, count_params
from vitprune.model import attach
from vitprune.model.plan import PLAN_KEY

TINY = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 2, "stem_width": 8, "num_classes": 5}


def on_meta(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


@pytest.fixture
def tiny(make_vit):
    return make_vit("lvvit_s", **TINY)


@pytest.mark.parametrize(
    ("name", "num_params", "num_tensors", "crop_pct", "shape"),
    [
        ("lvvit_t", 8_534_720, 160, 0.9, (240, 12, 4, 1)),
        ("lvvit_s", 26_151_824, 204, 0.9, (384, 16, 6, 2)),
        ("lvvit_m", 55_830_544, 248, 1.0, (512, 20, 8, 2)),
        ("lvvit_l", None, 292, 1.0, (768, 24, 12, 3)),  # published at 448 pixels, to a tenth of a million
    ],
)
def test_sizes_and_preparation_of_images_are_the_published_ones(name, num_params, num_tensors, crop_pct, shape):
    if num_params is None:
        assert round(count_params(on_meta(name, img_size=448)) / 1e6, 1) == 150.5
    model = on_meta(name)
    assert num_params in (None, count_params(model))
    assert len(model.state_dict()) == num_tensors
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads, model.blocks[0].ls1.by) == shape
    config = timm.get_pretrained_cfg(name)
    assert (config.crop_pct, config.interpolation, config.mean) == (crop_pct, "bicubic", (0.485, 0.456, 0.406))
    assert not config.has_weights


@pytest.mark.parametrize(
    ("name", "num_params", "num_tensors", "dense_gmacs", "sparse_gmacs", "blocks"),
    [
        ("lvvit_s", 26_875_574, 234, 6.551, 4.650, (4, 8, 12)),
        ("lvvit_m", 57_115_030, 278, 12.678, 8.593, (5, 10, 15)),
    ],
)
def test_sparse_sizes_and_macs_are_the_published_ones(name, num_params, num_tensors, dense_gmacs, sparse_gmacs, blocks):
    model = on_meta(name)
    sparse = attach(model, 0.7, token_schedule="geometric", pruned="drop", predictor="paper")
    assert sparse.schedule.blocks == blocks
    assert count_params(sparse) == num_params
    assert len({*sparse.state_dict()} - {PLAN_KEY}) == num_tensors
    assert round(count_macs(model, (3, 224, 224)) / 1e9, 3) == dense_gmacs
    assert round(count_macs(sparse, (3, 224, 224)) / 1e9, 3) == sparse_gmacs


def test_features_are_tokens_and_the_class_token_is_what_precedes_logits(tiny, make_images):
    features = tiny.forward_features(make_images(tiny))
    assert features.shape == (2, 17, 48)
    assert torch.equal(tiny.forward_head(features, pre_logits=True), features[:, 0])


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (70, 65), (79, 95)])
def test_grid_is_what_the_stem_makes_of_any_size(size, make_vit):
    model = make_vit("lvvit_s", **TINY | {"img_size": size})
    with torch.no_grad():
        assert model(torch.zeros(1, 3, *size)).shape == (1, 5)


def test_another_size_or_pooling_is_refused(tiny):
    with pytest.raises(ValueError, match="expected images of 64x64 pixels, got 96x64"):
        tiny(torch.zeros(1, 3, 96, 64))
    with pytest.raises(ValueError, match="expected global_pool='token', got 'avg'"):
        timm.create_model("lvvit_s", **TINY, global_pool="avg")


def test_a_new_classifier_replaces_both_heads(tiny, make_images):
    tiny.reset_classifier(7)
    assert [head.out_features for head in tiny.get_classifier()] == [7, 7]
    assert tiny(make_images(tiny)).shape == (2, 7)
    tiny.reset_classifier(0)
    assert tiny(make_images(tiny)).shape == (2, 48)


def test_drop_path_rises_from_block_to_block():
    model = timm.create_model("lvvit_s", **TINY, drop_path_rate=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.fixture
def weights():
    """Random weights of the smallest published model."""
    torch.manual_seed(0)
    return timm.create_model("lvvit_t", num_classes=10).eval()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapping", [None, "state_dict", "state_dict_ema", "model"])
def test_checkpoints_load_in_every_wrapping(weights, wrapping, prefix, tmp_path):
    state = {prefix + name: tensor for name, tensor in weights.state_dict().items()}
    arguments = argparse.Namespace(lr=1e-3, model="lvvit_t", amp=True, betas=[0.9, 0.999], name=None)
    content = state if wrapping is None else {wrapping: state, "args": arguments, "epoch": 3}
    torch.save(content, tmp_path / "lvvit.pth.tar")
    loaded = load_model("lvvit_t", checkpoint=tmp_path / "lvvit.pth.tar").model
    assert loaded.num_classes == 10
    for name, tensor in weights.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


class _Surprise(argparse.Namespace):
    """Not the class that is let in."""


def test_only_a_namespace_is_let_in_beside_tensors(weights, tmp_path):
    torch.save({"model": weights.state_dict(), "args": _Surprise(lr=1)}, tmp_path / "surprise.pth")
    with pytest.raises(CheckpointError, match="only tensors are read"):
        load_model("lvvit_t", checkpoint=tmp_path / "surprise.pth")


def test_another_image_size_resamples_positions_and_another_model_is_refused(weights, tmp_path):
    torch.save(weights.state_dict(), tmp_path / "lvvit.pth")
    with pytest.raises(CheckpointError, match=r"lvvit\.pth' do not fit lvvit_s"):
        load_model("lvvit_s", checkpoint=tmp_path / "lvvit.pth")
    model = load_model("lvvit_t", checkpoint=tmp_path / "lvvit.pth", img_size=96).model
    assert model.patch_embed.grid_size == (6, 6)
    assert model.pos_embed.shape == (1, 37, 240)
    assert torch.equal(model.pos_embed[:, :1], weights.pos_embed[:, :1])
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 10)


def test_timm_itself_adapts_classes_and_channels(weights):
    overlay = {"state_dict": weights.state_dict(), "num_classes": 10}
    model = timm.create_model("lvvit_t", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1)
    assert torch.equal(model.norm.weight, weights.norm.weight)
    torch.testing.assert_close(model.patch_embed.conv1.weight, weights.patch_embed.conv1.weight.sum(1, keepdim=True))
    assert model.head.out_features == model.aux_head.out_features == 3


def test_names_resolve():
    assert resolve_name("lvvit_s") == "lvvit_s"
    with pytest.raises(UnknownModelError, match="could be several models") as caught:
        resolve_name("lvvit")
    assert "lvvit_m" in caught.value.hint


@pytest.mark.parametrize("pruned", ["drop", "merge"])
def test_a_sparse_model_comes_back_from_its_file(make_sparse, make_images, tmp_path, pruned):
    plain = make_sparse("lvvit_s", **TINY)
    sparse = vitprune.SparseViT(plain.model, plain.schedule, plain.predictors, pruned).eval()
    torch.nn.init.uniform_(sparse.model.patch_embed.bn2.running_var, 0.5, 2.0)
    save(sparse, tmp_path / "model.safetensors", describe(sparse))
    images = make_images(sparse)
    loaded = vitprune.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(images), sparse(images))
    assert set(loaded.state_dict()) == set(sparse.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"train_trunk": True, "deployed_share": 0.5, "ema_decay": 0.9}])
def test_it_is_sparsified_saved_and_loaded(make_vit, make_images, image_folder, tmp_path, quick_bench, settings):
    model = make_vit("lvvit_s", **TINY | {"num_classes": 2})
    images = make_images(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = vitprune.Recipe(
        pretraining_steps=2, steps=4, batch_size=4, num_workers=0, precision="fp32", drop_path=0.1, **settings
    )
    output = tmp_path / "run"
    sparse = vitprune.sparsify(model, keep=0.5, data=image_folder, recipe=recipe, device="cpu", output=output)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(vitprune.load(output)(images), sparse(images))
    trained = sparse.model.state_dict()
    assert not torch.equal(trained["aux_head.weight"], before["aux_head.weight"])
    assert torch.equal(trained["patch_embed.bn1.running_mean"], before["patch_embed.bn1.running_mean"])
    moved = not torch.equal(trained["patch_embed.conv1.weight"], before["patch_embed.conv1.weight"])
    assert moved == recipe.train_trunk
