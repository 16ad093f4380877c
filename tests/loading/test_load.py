"""From MODEL to a model."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import vitprune
from vitprune.backbones import input_size, wrap
from vitprune.data import ModelClasses, eval_transform, open_data
from vitprune.errors import CheckpointError, HubError, UnknownModelError, UnsupportedModelError, UsageError
from vitprune.loading.architectures import match_names
from vitprune.loading.load import load_model
from vitprune.loading.names import resolve_name


def test_short_names():
    for spec, name in (
        ("deit_tiny", "deit_tiny_patch16_224.fb_in1k"),
        ("deit_small_patch16_224.fb_in1k", "deit_small_patch16_224.fb_in1k"),
        ("timm/deit_tiny_patch16_224.fb_in1k", "deit_tiny_patch16_224.fb_in1k"),
        ("deit3_small", "deit3_small_patch16_224.fb_in1k"),
        ("deit_tiny_distilled", "deit_tiny_distilled_patch16_224.fb_in1k"),
        ("vit_base_patch16_clip_224.openai", "vit_base_patch16_clip_224.openai"),
    ):
        assert resolve_name(spec) == name


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("deit_smal", "model or file 'deit_smal' not found: no file or folder .* none of the \\d+ known", "deit_small"),
        ("dinov2", "model or file 'dinov2' not found", "`vitprune models dinov2` lists"),
        ("ViT-Base-Patch14-DINOv2", "not found", "vit_base_patch14_dinov2"),
        ("google/vit-base-patch16-224", "not found", "hf-hub:google/vit-base-patch16-224"),
        ("xyzzy", "model or file 'xyzzy' not found", "names are timm's"),
        ("deit_small.in22k", "no weights tagged 'in22k'", "fb_in1k"),
        ("vit_base_r50", "could be several models", "vit_base_r50_s16_224"),
        ("vit_base_patch16_clip", "could be several models", "vit_base_patch16_clip_224"),
    ],
)
def test_unknown_names_offer_others(spec, message, hint):
    with pytest.raises(UnknownModelError, match=message) as caught:
        resolve_name(spec)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_patterns_match_names():
    assert "deit_tiny_patch16_224" in match_names("deit_tiny")
    assert match_names("deit_tiny_*") == [name for name in match_names("deit_tiny") if name.startswith("deit_tiny_")]
    assert len(match_names()) > 1000
    with pytest.raises(UnknownModelError, match="no model that matches 'deit_tinny_patch16'") as caught:
        match_names("deit_tinny_patch16")
    assert "deit_tiny_patch16_224" in caught.value.hint


def test_unsupported_family_is_refused_before_anything_is_downloaded(no_hub):
    for spec in ("swin_tiny", "convnext_tiny", "resnet50"):
        with pytest.raises(UnsupportedModelError, match=spec):
            load_model(spec)


def test_checkpoint_gives_weights_and_class_count(weights_file, make_vit, make_images, tmp_path):
    expected = make_vit(num_classes=2)
    images = make_images(expected)
    for suffix in (".pth", ".bin"):
        torch.save({"model": expected.state_dict(), "epoch": 3}, tmp_path / f"weights{suffix}")
    for path in (weights_file, tmp_path / "weights.pth", tmp_path / "weights.bin"):
        loaded = load_model("test_vit", checkpoint=path)
        assert loaded.model.num_classes == 2
        assert torch.equal(loaded.model(images), expected(images))
        assert "state_dict" not in loaded.model.pretrained_cfg
        assert loaded.origin["source"] == path.name, "no path of the user's machine in files"


def test_image_size_resamples_position_embeddings(weights_file):
    model = load_model("test_vit", checkpoint=weights_file, img_size=96).model
    assert model.patch_embed.grid_size == (6, 6)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 2)


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit2").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other.safetensors' do not fit test_vit"):
        load_model("test_vit", checkpoint=tmp_path / "other.safetensors")


def test_weights_that_do_not_fit_are_refused_by_name(weights_file):
    state = load_file(weights_file)
    wrong = torch.zeros(7, 7), torch.full_like(state["norm.bias"], float("inf"))
    for name, tensor, message in (
        ("blocks.0.mlp.fc1.weight", wrong[0], r"blocks\.0\.mlp\.fc1\.weight"),
        ("norm.bias", wrong[1], r"NaN or infinite values in 'norm\.bias'"),
    ):
        save_file(state | {name: tensor}, weights_file)
        with pytest.raises(CheckpointError, match=message):
            load_model("test_vit", checkpoint=weights_file)


def test_missing_and_damaged_checkpoints_are_named(tmp_path):
    for suffix in (".pth", ".bin", ".npz", ".safetensors"):
        path = tmp_path / f"weights{suffix}"
        with pytest.raises(CheckpointError, match=f"file .*weights{suffix}"):
            load_model("test_vit", checkpoint=path)
        path.write_bytes(b"PK\x03\x04 no weights at all")
        with pytest.raises(CheckpointError, match=f"weights{suffix}' is damaged"):
            load_model("test_vit", checkpoint=path)


def test_architecture_without_weights_asks_for_a_file(no_hub):
    name = next(n for n in ("vit_tiny_patch16_384", "vit_small_patch16_18x2_224") if not timm.is_model_pretrained(n))
    with pytest.raises(UsageError, match="no pretrained weights") as caught:
        load_model(name)
    assert "--checkpoint" in caught.value.hint


def test_hub_out_of_reach_is_said_with_a_way_out(no_hub):
    for spec in ("deit_tiny", "hf-hub:nobody/nothing"):
        with pytest.raises(HubError, match="out of reach") as caught:
            load_model(spec)
        assert "--checkpoint" in caught.value.hint


def test_gated_and_absent_repositories_are_told_apart(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    for kind, message in ((GatedRepoError, "is gated"), (RepositoryNotFoundError, "there is no")):

        def refuse(*args, kind=kind, **kwargs):
            error = kind.__new__(kind)
            Exception.__init__(error, "no")
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
        with pytest.raises(HubError, match=message):
            load_model("hf-hub:some/model")


def test_what_is_cached_is_not_asked_for(no_hub, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("vitprune.loading.load.from_hub", lambda name, sizes: asked.append(name) or torch.nn.Identity())
    snapshot = tmp_path / "hub" / "models--timm--deit_tiny_patch16_224.fb_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    with pytest.raises(HubError):
        load_model("deit_tiny")
    (snapshot / "model.safetensors").touch()
    load_model("deit_tiny")
    assert asked == ["deit_tiny_patch16_224.fb_in1k"]


def test_options_of_timm_names_do_not_go_with_what_has_weights(weights_file, tmp_path):
    for spec in (weights_file, tmp_path, "hf-hub:a/b", "demo"):
        with pytest.raises(UsageError, match="has weights of its own; checkpoint goes with a timm name"):
            load_model(str(spec), checkpoint=weights_file)
    with pytest.raises(UsageError, match="has an image size of its own"):
        load_model(str(weights_file), img_size=96)


def test_files_that_are_no_model_are_refused_by_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("w.pth", "'w.pth' holds weights alone"),
        ("w.npz", "'w.npz' holds weights alone"),
        ("m.onnx", "'m.onnx' is an exported file, which"),
        ("m.pt2", "'m.pt2' is a program of PyTorch"),
    ):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(UsageError, match=message):
            load_model(name)
    (tmp_path / "two words.npz").touch()
    with pytest.raises(UsageError) as error:
        load_model("two words.npz")
    assert "--checkpoint 'two words.npz'; " in error.value.hint, "can be pasted into a shell"


def test_demo_is_there_offline(no_hub):
    loaded = load_model("demo")
    assert loaded.name == "demo"
    assert loaded.model.num_classes == len(loaded.class_names) == 10
    assert len(loaded.model.blocks) == 12
    assert loaded.model.patch_embed.num_patches >= 64


@pytest.mark.parametrize(
    ("name", "img_size", "grid"),
    [
        ("deit_base_patch16_384", None, (24, 24)),
        ("vit_base_patch14_dinov2", None, (37, 37)),
        ("vit_small_patch8_224", None, (28, 28)),
        ("vit_base_patch32_224", None, (7, 7)),
        ("deit_tiny", 384, (24, 24)),
        ("deit_tiny", (256, 320), (16, 20)),
        ("vit_small_patch16_dinov3", (256, 320), (16, 20)),
        ("beit_base", (256, 320), (16, 20)),
        ("naflexvit_base_patch16_gap", (256, 320), (16, 20)),
    ],
)
def test_sizes_and_patches(name, img_size, grid):
    loaded = load_model(name, weights="none", img_size=img_size)
    assert next(loaded.model.parameters()).is_meta
    backbone = wrap(loaded.model)
    assert backbone.grid_size == grid
    assert input_size(loaded.model)[1:] == tuple(n * (input_size(loaded.model)[1] // grid[0]) for n in grid)


def test_a_file_of_one_channel_makes_a_model_of_one_channel(make_vit, image_folder, tmp_path):
    model = make_vit(num_classes=2, in_chans=1)
    save_file(model.state_dict(), tmp_path / "grey.safetensors")
    loaded = load_model("test_vit", checkpoint=tmp_path / "grey.safetensors")
    images = open_data(str(image_folder), ModelClasses(2)).val
    images.transform = eval_transform(loaded.model)
    image = images[0][0][None]
    assert image.shape[1] == 1
    with torch.no_grad():
        assert torch.equal(loaded.model(image), model(image))


def test_five_channels_are_refused_for_images(make_vit):
    with pytest.raises(UnsupportedModelError, match="5 channels"):
        eval_transform(make_vit(in_chans=5))


LOADS = {
    "plain.safetensors": ("was not written by vitprune", "NAME and checkpoint="),
    "plain.pth": ("holds weights alone", "NAME and checkpoint="),
    "model.onnx": ("is an exported file", "model.safetensors"),
    "missing.safetensors": ("not found", "timm.create_model"),
    "folder": ("holds no model.safetensors", "vitprune.sparsify"),
    "bad.safetensors": ("damaged", "copy it again"),
}


@pytest.mark.parametrize("name", LOADS)
def test_what_load_cannot_load_is_said_in_words_of_python(make_vit, tmp_path, name):
    save_file(make_vit().state_dict(), tmp_path / "plain.safetensors")
    torch.save(make_vit().state_dict(), tmp_path / "plain.pth")
    (tmp_path / "folder").mkdir()
    for file in ("model.onnx", "bad.safetensors"):
        (tmp_path / file).write_bytes(b"xxxx")
    with pytest.raises(vitprune.errors.CheckpointError) as caught:
        vitprune.load(tmp_path / name)
    assert all(words in str(caught.value) for words in LOADS[name])
    assert "--" not in str(caught.value)


def test_load_says_what_a_name_a_model_or_a_device_that_is_not_there_is(make_sparse, tmp_path):
    file = vitprune.save(make_sparse(), tmp_path)
    for arguments, kind, words in (
        (("deit_tiny",), vitprune.errors.CheckpointError, "timm.create_model"),
        ((make_sparse(),), vitprune.errors.UsageError, "a SparseViT is no path"),
        ((file, "cudaa"), vitprune.errors.DeviceError, "device 'cudaa' is unknown"),
    ):
        with pytest.raises(kind, match=words):
            vitprune.load(*arguments)
    assert next(vitprune.load(file, torch.device("meta")).parameters()).is_meta
