"""Encoders of transformers, read as timm's, against what transformers computes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vitprune.errors import CheckpointError
from vitprune.loading.load import load_model
from vitprune.loading.preprocessor import read_preprocessor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
VIT = {**SIZES, "intermediate_size": 172}  # of no width a ratio that binary fractions hold
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {
    "decoder_num_hidden_layers": 1,
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
AT_518 = {**SIZES, "patch_size": 14, "image_size": 518}


def class_token(model, images):
    return model(images).last_hidden_state[:, 0]


def pooled(model, images):
    return model(images).pooler_output


def unmasked(model, images):
    """Patches in their own order, none masked."""
    order = torch.arange((images.shape[-1] // 16) ** 2).float().expand(len(images), -1)
    return getattr(model, "vit", model)(images, noise=order).last_hidden_state[:, 0]


def of_images(model, images):
    found = model.get_image_features(images)
    return getattr(found, "pooler_output", found)


# By class: its configuration, what of its output the embedding is, and how many numbers that has.
ENCODERS = {
    "ViTModel": ("ViTConfig", VIT, class_token, 64),
    "DeiTModel": ("DeiTConfig", VIT, class_token, 64),
    "ViTMAEModel": ("ViTMAEConfig", {**VIT, "mask_ratio": 0.0}, unmasked, 64),
    "ViTMAEForPreTraining": ("ViTMAEConfig", {**VIT, **DECODER, "mask_ratio": 0.0}, unmasked, 64),
    "Dinov2Model": ("Dinov2Config", SIZES, pooled, 64),
    "Dinov2Model, gated MLP": ("Dinov2Config", {**SIZES, "use_swiglu_ffn": True}, pooled, 64),
    "Dinov2Model, at 224 of 518": ("Dinov2Config", AT_518, pooled, 64),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", SIZES, pooled, 64),
    "Dinov2WithRegistersModel, at 224 of 518": ("Dinov2WithRegistersConfig", AT_518, pooled, 64),
    "CLIPVisionModel": ("CLIPVisionConfig", VIT, pooled, 64),
    "CLIPVisionModelWithProjection": (
        "CLIPVisionConfig",
        {**VIT, "projection_dim": 24},
        lambda model, images: model(images).image_embeds,
        24,
    ),
    "CLIPModel": ("CLIPConfig", {"vision_config": VIT, "text_config": TEXT, "projection_dim": 24}, of_images, 24),
    "SiglipVisionModel": ("SiglipVisionConfig", VIT, pooled, 64),
    "SiglipVisionModel, no whole patches": ("SiglipVisionConfig", {**VIT, "image_size": 70}, pooled, 64),
    "SiglipModel": ("SiglipConfig", {"vision_config": VIT, "text_config": TEXT}, of_images, 64),
}


def saved(kind, configuration, settings, folder):
    """A small model with lively weights, and its folder."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, configuration)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model, str(folder)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_embedding_is_transformers_own(name, tmp_path):
    configuration, settings, reference, width = ENCODERS[name]
    model, folder = saved(name.split(",")[0], configuration, settings, tmp_path / "hf")
    loaded = load_model(folder)
    images = torch.randn(2, *loaded.model.pretrained_cfg["input_size"])
    with torch.no_grad():
        expected, found = reference(model, images), loaded.model(images)
    assert (loaded.task, found.shape) == ("embedding", (2, width))
    # Norms of ViT, DeiT and MAE add 1e-12 to a variance, timm's 1e-6.
    torch.testing.assert_close(
        found, expected, rtol=0, atol=2e-4 if configuration.startswith(("ViT", "DeiT")) else 1e-5
    )
    assert any(line.startswith(f"task: embedding of {width} numbers") for line in loaded.understood)


@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2WithRegistersModel", "SiglipModel"])
def test_tokens_are_transformers_own(name, tmp_path):
    configuration, settings, _, _ = ENCODERS[name]
    model, folder = saved(name, configuration, settings, tmp_path / "hf")
    loaded, images = load_model(folder), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = getattr(model, "vision_model", model)(images).last_hidden_state
        torch.testing.assert_close(loaded.model.forward_features(images), expected, rtol=0, atol=1e-5)


def test_dinov2_at_another_size_is_resampled_as_transformers_does(tmp_path):
    model, folder = saved("Dinov2Model", "Dinov2Config", AT_518, tmp_path / "hf")
    loaded, images = load_model(folder, img_size=(70, 98)), torch.randn(1, 3, 70, 98)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), pooled(model, images), rtol=0, atol=1e-5)
    assert any("resampled from 37x37 to 5x7 patches" in line for line in loaded.understood)


@pytest.mark.parametrize("name", ["Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"])
def test_dinov2s_classifier_is_refused_and_its_encoder_can_be_read(name, tmp_path):
    configuration = name.replace("ForImageClassification", "Config")
    model, folder = saved(name, configuration, SIZES, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="class token beside the mean of the patches") as caught:
        load_model(folder)
    assert "num_classes=0" in caught.value.hint
    loaded, images = load_model(folder, model_kwargs={"num_classes": 0}), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), pooled(model.base_model, images), rtol=0, atol=1e-5)
    assert f"the head of the {name} is left out" in loaded.understood


def test_a_head_of_another_model_is_left_out(tmp_path):
    for name, configuration, settings, line in (
        ("ViTForImageClassification", "ViTConfig", VIT, "the head of the ViTForImageClassification is left out"),
        ("CLIPVisionModelWithProjection", "CLIPVisionConfig", VIT, "the head of the CLIPVisionModelWithProjection"),
    ):
        _, folder = saved(name, configuration, settings, tmp_path / name)
        loaded = load_model(folder, model_kwargs={"num_classes": 0})
        assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 64)
        assert any(each.startswith(line) for each in loaded.understood)


@pytest.mark.parametrize(
    ("problem_type", "labels", "task"),
    [
        (None, 3, "classification"),
        ("single_label_classification", 3, "classification"),
        ("multi_label_classification", 3, "multilabel"),
        ("regression", 2, "regression"),
        ("regression", 1, "regression"),
    ],
)
def test_problem_type_is_the_task(problem_type, labels, task, tmp_path):
    settings = {**VIT, "num_labels": labels, "problem_type": problem_type}
    _, folder = saved("ViTForImageClassification", "ViTConfig", settings, tmp_path / "hf")
    assert load_model(folder).task == task


def test_a_problem_type_that_is_none_is_refused(tmp_path):
    _, folder = saved("ViTForImageClassification", "ViTConfig", VIT, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_type": "ranking"}))
    with pytest.raises(CheckpointError, match="problem_type is 'ranking'"):
        load_model(folder)


def test_a_siglip_without_attention_pool_is_refused(tmp_path):
    _, folder = saved("SiglipVisionModel", "SiglipVisionConfig", {**VIT, "vision_use_head": False}, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="without attention pool"):
        load_model(folder)


def test_weights_of_encoders_are_a_checkpoint_of_timms(tmp_path):
    full = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14, "image_size": 518}
    model, folder = saved("Dinov2Model", "Dinov2Config", full, tmp_path / "dinov2")
    loaded = load_model("vit_small_patch14_dinov2", checkpoint=Path(folder) / "model.safetensors")
    images = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), pooled(model, images), rtol=0, atol=1e-4)


def test_old_names_of_an_image_tower_are_read_too(tmp_path):
    """Before version 5 the tower was a module of its own within CLIPVisionModel."""
    from safetensors.torch import save_file

    model, folder = saved("CLIPVisionModel", "CLIPVisionConfig", VIT, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    state = {f"vision_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file({**state, "vision_model.embeddings.position_ids": torch.arange(17)[None]}, file)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(load_model(folder).model(images), pooled(model, images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("configuration", "preprocessor", "family", "processor"),
    [
        ("CLIPVisionConfig", {}, "clip", "CLIPImageProcessor"),
        ("CLIPVisionConfig", {"size": 224, "crop_size": 224, "do_center_crop": True}, "clip", "CLIPImageProcessor"),
        ("SiglipVisionConfig", {}, "siglip", "SiglipImageProcessor"),
    ],
)
def test_defaults_are_those_of_the_processor(configuration, preprocessor, family, processor):
    found = read_preprocessor(preprocessor, (224, 224), family)
    theirs = getattr(transformers, processor)(**preprocessor)
    assert found["mean"] == tuple(theirs.image_mean)
    assert found["std"] == tuple(theirs.image_std)
    assert found["interpolation"] == "bicubic"
    assert found["crop_mode"] == ("center" if theirs.do_center_crop else "squash")
    assert found["crop_pct"] == 1.0


def test_dinov2_takes_the_size_that_its_processor_cuts_out(tmp_path):
    _, folder = saved("Dinov2Model", "Dinov2Config", AT_518, tmp_path / "hf")
    processor = {"size": {"shortest_edge": 128}, "crop_size": {"height": 112, "width": 112}, "do_center_crop": True}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps({**processor, "resample": 3}))
    loaded = load_model(folder)
    config = loaded.model.pretrained_cfg
    assert (config["input_size"], config["crop_mode"], int(112 / config["crop_pct"])) == ((3, 112, 112), "center", 128)
    assert loaded.model(torch.zeros(1, 3, 112, 112)).shape == (1, 64)
