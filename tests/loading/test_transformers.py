"""config.json and preprocessor_config.json of transformers, against a plain rewriting of what they mean."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vitprune.data import eval_transform
from vitprune.errors import CheckpointError
from vitprune.loading.load import load_model
from vitprune.loading.preprocessor import read_preprocessor

CONFIG = {
    "architectures": ["ViTForImageClassification"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 16,
    "id2label": {"0": "cat", "1": "dog"},
}
GELU_TANH = torch.nn.GELU(approximate="tanh")


def state():
    """Tensors of that model under transformers' names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "vit.embeddings.cls_token": (1, 1, 32),
        "vit.embeddings.position_embeddings": (1, 5, 32),
        "vit.embeddings.patch_embeddings.projection.weight": (32, 3, 16, 16),
        "vit.embeddings.patch_embeddings.projection.bias": (32,),
        "vit.layernorm.weight": (32,),
        "vit.layernorm.bias": (32,),
        "classifier.weight": (2, 32),
        "classifier.bias": (2,),
    }
    for layer in range(2):
        prefix = f"vit.encoder.layer.{layer}."
        for name, rows, columns in (
            *((f"attention.attention.{part}", 32, 32) for part in ("query", "key", "value")),
            ("attention.output.dense", 32, 32),
            ("intermediate.dense", 64, 32),
            ("output.dense", 32, 64),
        ):
            shapes |= {f"{prefix}{name}.weight": (rows, columns), f"{prefix}{name}.bias": (rows,)}
        for norm in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{prefix}{norm}.weight": (32,), f"{prefix}{norm}.bias": (32,)}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def reference(tensors, images, activation):
    """The classifier as the paper of ViT has it."""

    def linear(x, name):
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (32,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-12)

    patches = "vit.embeddings.patch_embeddings.projection"
    x = torch.nn.functional.conv2d(images, tensors[f"{patches}.weight"], tensors[f"{patches}.bias"], stride=16)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([tensors["vit.embeddings.cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + tensors["vit.embeddings.position_embeddings"]
    for layer in range(2):
        at = f"vit.encoder.layer.{layer}"
        y = norm(x, f"{at}.layernorm_before")
        heads = [
            linear(y, f"{at}.attention.attention.{part}").unflatten(-1, (2, 16)).transpose(1, 2)
            for part in ("query", "key", "value")
        ]
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{at}.attention.output.dense")
        hidden = activation(linear(norm(x, f"{at}.layernorm_after"), f"{at}.intermediate.dense"))
        x = x + linear(hidden, f"{at}.output.dense")
    return linear(norm(x, "vit.layernorm")[:, 0], "classifier")


def folder(path, config, preprocessor=None):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    if preprocessor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    save_file(state(), path / "model.safetensors")
    return str(path)


@pytest.mark.parametrize(
    ("hidden_act", "activation"),
    [
        ("gelu", torch.nn.functional.gelu),
        ("gelu_new", GELU_TANH),
        ("gelu_pytorch_tanh", GELU_TANH),
        ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
        ("relu", torch.relu),
        ("swish", torch.nn.functional.silu),
    ],
)
def test_the_activation_is_the_one_of_the_config(hidden_act, activation, tmp_path):
    loaded = load_model(folder(tmp_path / "hf", {"hidden_act": hidden_act}, {}))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = reference(state(), images, activation)
        torch.testing.assert_close(loaded.model(images), expected, rtol=0, atol=1e-4)
    assert loaded.understood == []


def test_what_timm_does_not_have_is_refused_by_name(tmp_path):
    for config, message in (
        ({"hidden_act": "laplace"}, "hidden_act is 'laplace'"),
        ({"layer_norm_eps": 1e-3}, r"layer_norm_eps is 0\.001"),
        ({"layer_norm_eps": -1}, "layer_norm_eps is -1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(folder(tmp_path / "hf", config, {}))


PROCESSORS = {
    "the defaults": {},
    "no normalising": {"do_normalize": False},
    "no rescaling": {"do_rescale": False, "image_mean": [127, 127, 127], "image_std": [60, 70, 80]},
    "to -1 .. 1": {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
    "nearest": {"resample": 0},
    "lanczos": {"resample": 1},
    "bicubic": {"resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
    "box": {"resample": 4},
    "hamming": {"resample": 5},
    "size as a number": {"size": 32},
    "shorter side, then the middle": {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": 32},
    "stretched, then the middle": {"size": {"height": 43, "width": 43}, "do_center_crop": True},
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_images_are_prepared_as_the_processor_does(processor, tmp_path):
    what = PROCESSORS[processor]
    generator = torch.Generator().manual_seed(0)
    image = Image.fromarray(torch.randint(0, 256, (48, 64, 3), generator=generator, dtype=torch.uint8).numpy())
    size = what.get("size", 32)
    if isinstance(size, dict) and "shortest_edge" in size:
        resized = (48, 36)
    else:
        resized = (size["width"], size["height"]) if isinstance(size, dict) else (size, size)
    pixels = image.resize(resized, Image.Resampling(what.get("resample", 2)))
    left, top = round((resized[0] - 32) / 2), round((resized[1] - 32) / 2)
    array = np.asarray(pixels.crop((left, top, left + 32, top + 32)), dtype=np.float64)
    if what.get("do_rescale", True):
        array = array * what.get("rescale_factor", 1 / 255)
    if what.get("do_normalize", True):
        array = (array - what.get("image_mean", [0.5] * 3)) / what.get("image_std", [0.5] * 3)
    loaded = load_model(folder(tmp_path / "hf", {}, what))
    ours = eval_transform(loaded.model)(image)
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), array, rtol=1e-4, atol=1e-3)


def test_what_timms_transforms_cannot_do_is_refused_by_name(tmp_path):
    for processor, message in (
        ({"do_resize": False}, "do_resize False"),
        ({"resample": 9}, "resample 9"),
        ({"rescale_factor": 0}, "rescale_factor 0"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"size": {"height": 64, "width": 64}}, "size .* the model takes 32x32"),
        ({"size": {"shortest_edge": 32}}, "size .* the model takes 32x32"),
        ({"size": {"longest_edge": 32}}, "size"),
        ({"do_center_crop": True, "size": 64, "crop_size": {"height": 48, "width": 48}}, "crop_size"),
        ({"do_center_crop": True, "size": 16}, "size 16 with a crop of 32x32"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order True"),
        ({"crop_pct": 0.9}, r"crop_pct 0\.9"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(folder(tmp_path / "hf", {}, processor))


def test_defaults_are_said_where_there_is_no_processor(tmp_path):
    assert "no preprocessor_config.json" in load_model(folder(tmp_path / "hf", {})).understood[0]
    deit = read_preprocessor({}, (224, 224), "deit")
    assert deit["interpolation"] == "bicubic"
    assert (deit["crop_mode"], deit["crop_pct"]) == ("squash", 224 / 256)


@pytest.mark.parametrize("crop", [32, 224, 225, 384])
def test_every_size_comes_back_from_its_share(crop):
    for size in range(crop, 2 * crop):
        processor = {"do_center_crop": True, "size": {"shortest_edge": size}, "crop_size": crop}
        share = read_preprocessor(processor, (crop, crop))["crop_pct"]
        assert int(crop / share) == size
