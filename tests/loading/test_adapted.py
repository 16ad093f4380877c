"""What timm adapts to other sizes is said, what it would leave random is refused; arguments of one's own."""

import logging
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

import vitprune
from vitprune.checkpoint.sparse_file import describe, save
from vitprune.errors import CheckpointError, UsageError
from vitprune.loading.load import load_dense, load_model
from vitprune.model import attach

TINY = {"depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 3}


@pytest.fixture
def file(make_vit, tmp_path):
    """`file(name, **kwargs)`: the weights of a small model as a file."""

    def write(name, **kwargs):
        model = make_vit(name, **TINY, **kwargs)
        save_file(model.state_dict(), tmp_path / "own.safetensors")
        return model, tmp_path / "own.safetensors"

    return write


@pytest.mark.parametrize(
    ("name", "kwargs", "line"),
    [
        ("vit_tiny_patch16_224", {"img_size": 160}, "position embeddings are resampled from 14x14 to 10x10 patches"),
        ("vit_tiny_patch16_224", {"img_size": (160, 224)}, "position embeddings are resampled from 14x14 to 10x14"),
        ("deit3_small_patch16_224", {"img_size": 160}, "position embeddings are resampled from 14x14 to 10x10 patches"),
        (
            "vit_tiny_patch16_224",
            {"patch_size": 8, "img_size": 112},
            "the patch embedding is resampled from 16x16 to 8x8",
        ),
        ("beit_base_patch16_224", {"img_size": 160}, "position biases are resampled from 732 to 364 distances"),
        ("vit_tiny_patch16_224", {}, None),
        ("vit_small_patch16_dinov3", {"img_size": 160}, None),  # rotary positions are computed
    ],
)
def test_what_is_resampled_is_said(name, kwargs, line, file):
    _, path = file(name)
    loaded = load_model(name, checkpoint=path, model_kwargs=TINY | kwargs)
    assert len(loaded.understood) == (line is not None), loaded.understood
    assert line is None or line in loaded.understood[0]
    assert logging.getLogger("timm").level == logging.NOTSET
    assert logging.getLogger("timm").propagate


def test_timms_own_weights_are_resampled_aloud(file, monkeypatch):
    model, _ = file("beit_base_patch16_224")

    def from_hub(name, arguments):
        overlay = {"state_dict": model.state_dict(), "custom_load": False, "num_classes": 3}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)

    monkeypatch.setattr("vitprune.loading.load.from_hub", from_hub)
    monkeypatch.setattr("vitprune.loading.load.check_hub", lambda *args, **kwargs: None)
    sizes = {key: value for key, value in TINY.items() if key != "num_classes"}
    loaded = load_model("beit_base_patch16_224", model_kwargs=sizes | {"img_size": 160, "patch_size": 8})
    assert "patch embedding is resampled from 16x16 to 8x8" in loaded.understood[0]
    with pytest.raises(UsageError, match="are for 1000 classes"):
        load_model("beit_base_patch16_224", model_kwargs=TINY)


def test_pooling_that_the_tensors_do_not_fit_is_refused(file):
    _, by_average = file("vit_tiny_patch16_224", global_pool="avg")
    with pytest.raises(CheckpointError, match="fc_norm") as caught:
        load_model("vit_tiny_patch16_224", checkpoint=by_average, model_kwargs=TINY)
    assert "--model-kwargs global_pool=avg" in caught.value.hint
    load_model("vit_tiny_patch16_224", checkpoint=by_average, model_kwargs=TINY | {"global_pool": "avg"})
    _, by_token = file("vit_base_patch16_siglip_gap_224", global_pool="avg")
    kwargs = TINY | {"global_pool": "avg", "fc_norm": True}
    with pytest.raises(CheckpointError, match=r"they lack .*fc_norm"):
        load_model("vit_base_patch16_siglip_gap_224", checkpoint=by_token, model_kwargs=kwargs)


def test_arguments_travel_with_the_sparse_file(file, make_images, tmp_path):
    """Averaging before the norm: the same tensors as with a class token, so only the arguments tell."""
    model, path = file("vit_tiny_patch16_224", global_pool="avg", fc_norm=False)
    kwargs = TINY | {"global_pool": "avg", "fc_norm": False}
    loaded = load_model("vit_tiny_patch16_224", checkpoint=path, model_kwargs=kwargs)
    images = make_images(model)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))
        sparse = attach(loaded.model, 0.7).eval()
        (tmp_path / "out").mkdir()
        metadata = describe(sparse, name=loaded.name, origin=loaded.origin)
        save(sparse, tmp_path / "out" / "model.safetensors", metadata)
        assert torch.equal(vitprune.load(tmp_path / "out")(images), sparse(images))
        again = load_model(str(tmp_path / "out"))
        assert torch.equal(load_dense(again, path).model(images), model(images))


@pytest.mark.parametrize(
    ("kwargs", "message", "hint"),
    [
        ({"pach_size": 8}, "model-kwargs pach_size: 'vit_tiny_patch16_224.* has no such argument", "patch_size"),
        ({"xyzzy": 8}, "has no such argument", "it has img_size, patch_size"),
        ({"pretrained": True}, "pretrained is no argument of a model's structure", "leave it out"),
        ({"embed_dim": 65}, "timm cannot build .* with --model-kwargs embed_dim=65: ", None),
        ({"act_layer": "none_such"}, "timm cannot build .* with --model-kwargs act_layer=none_such", None),
        ({"patch_size": 15}, "the image size 224x224 is no multiple of the patch size 15x15", "210 or 225"),
        ({"img_size": 300}, "300x300 is no multiple of the patch size 16x16", "288 or 304"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, message, hint):
    for weights in ("none", "random"):
        with pytest.raises(UsageError) as caught:
            load_model("vit_tiny_patch16_224", weights=weights, model_kwargs=kwargs)
        assert re.search(message, caught.value.message)
        assert hint is None or hint in caught.value.hint


def test_arguments_go_with_a_name_only(weights_file):
    for spec in ("demo", str(weights_file)):
        with pytest.raises(UsageError, match="says how its model is built"):
            load_model(spec, model_kwargs={"fc_norm": False})
    with pytest.raises(UsageError, match="both say the image size"):
        load_model("test_vit", weights="none", img_size=96, model_kwargs={"img_size": 96})
    with pytest.raises(UsageError, match="go with the name of a model"):
        vitprune.evaluate(timm.create_model("test_vit"), "demo", model_kwargs={"fc_norm": False})


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "naflexvit_base_patch16_gap", "qwen3_vit_88m", "gemma4_vit_167m"]
)
def test_models_that_take_whole_patches_refuse_other_sizes(name):
    """From timm.create_model too, whose forward would fail."""
    with torch.device("meta"):
        model = timm.create_model(name, img_size=300, depth=4)
        with pytest.raises(UsageError, match="image size 300x300 is no multiple of the patch size 16x16") as caught:
            attach(model, 0.7)
    assert "288 or 304" in caught.value.hint
    with pytest.raises(UsageError, match="no multiple of the patch size"):
        load_model(name, weights="random", img_size=300)
