"""Folders that timm and transformers wrote, against what they compute themselves."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import vitprune
from vitprune.checkpoint.sparse_file import describe, save
from vitprune.errors import CheckpointError, HubError, UsageError
from vitprune.loading.load import load_model

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
NAMES = {0: "cat", 1: "dog", 2: "eel"}


@pytest.fixture
def timm_folder(make_vit, tmp_path):
    model = make_vit("vit_tiny_patch16_224", embed_dim=64, num_heads=2, depth=4, img_size=96, num_classes=3)
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=(0.1, 0.2, 0.3))
    config = {"label_names": list(NAMES.values())}
    save_for_hf(model, tmp_path / "timm", model_config=config, safe_serialization=True)
    return model, tmp_path / "timm"


def _transformers(kind, folder, **settings):
    """A small model of transformers with lively weights, saved."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    configuration = transformers.DeiTConfig if kind.startswith("DeiT") else transformers.ViTConfig
    torch.manual_seed(0)
    model = getattr(transformers, kind)(configuration(**{**SIZES, **settings}, id2label=NAMES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def hub(monkeypatch):
    """A Hub that serves a folder of this machine as every repository."""
    import huggingface_hub

    def serve(folder):
        monkeypatch.setattr("vitprune.loading.hub.check_hub", lambda *arguments: None)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name, revision=None: folder / name)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **options: str(folder))

    return serve


def test_timm_folder_gives_timms_output_and_what_it_says(timm_folder, make_images):
    model, folder = timm_folder
    loaded = load_model(str(folder))
    images = make_images(model)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))
    assert loaded.class_names == ("cat", "dog", "eel")
    assert loaded.short_name == "timm"
    assert tuple(loaded.model.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert load_model(str(folder), img_size=64).model.patch_embed.img_size == (64, 64)


@pytest.mark.parametrize(
    ("kind", "qkv_bias"),
    [
        ("ViTForImageClassification", True),
        ("ViTForImageClassification", False),
        ("DeiTForImageClassification", True),
        ("DeiTForImageClassificationWithTeacher", True),
    ],
)
def test_transformers_folder_gives_transformers_output_here_and_on_the_hub(kind, qkv_bias, hub, tmp_path):
    model = _transformers(kind, tmp_path / "hf", qkv_bias=qkv_bias)
    images = torch.randn(2, 3, 32, 32)
    hub(tmp_path / "hf")
    for spec, name in ((str(tmp_path / "hf"), "hf"), ("hf-hub:someone/cats@main", "cats")):
        loaded = load_model(spec)
        with torch.no_grad():  # their norms add 1e-12, timm's 1e-6
            torch.testing.assert_close(loaded.model(images), model(images).logits, rtol=0, atol=1e-4)
        assert loaded.class_names == ("cat", "dog", "eel")
        assert loaded.short_name == name
    assert loaded.name == "cats"
    assert loaded.origin["source"] == "hf-hub:someone/cats@main"


def test_transformers_weights_as_a_checkpoint(tmp_path):
    model = _transformers(
        "ViTForImageClassification",
        tmp_path / "hf",
        image_size=224,
        patch_size=16,
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
    )
    loaded = load_model("vit_tiny_patch16_224", checkpoint=tmp_path / "hf" / "model.safetensors")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), model(images).logits, rtol=0, atol=1e-4)


def test_transformers_preprocessing_is_kept(tmp_path):
    """The image comes out as transformers' own processor has it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from vitprune.data import eval_transform

    _transformers("ViTForImageClassification", tmp_path / "hf")
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], resample=3
    )
    processor.save_pretrained(tmp_path / "hf")
    pixels = torch.randint(0, 256, (48, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = eval_transform(load_model(str(tmp_path / "hf")).model)(image)
    assert (ours - expected).abs().mean() < 0.05, "resizing differs in rounding only"


def test_an_unnamed_class_has_no_name(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)).save_pretrained(tmp_path / "hf")
    assert load_model(str(tmp_path / "hf")).class_names is None


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path):
    for files, message in (
        ({}, "no config.json"),
        ({"config.json": "{"}, "damaged"),
        ({"config.json": "[]"}, "no object"),
        ({"config.json": "{}"}, "neither timm's nor transformers'"),
        ({"config.json": json.dumps({"architectures": ["BertModel"]})}, "BertModel"),
        ({"config.json": json.dumps({"architecture": "test_vit"})}, "no weights"),
        ({"config.json": json.dumps({"architecture": "no_such"}), "model.safetensors": "x"}, "damaged"),
    ):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_model(str(tmp_path))
        assert str(tmp_path) in caught.value.message


def test_weights_of_another_model_are_refused(timm_folder):
    config = json.loads((timm_folder[1] / "config.json").read_text())
    config["model_args"]["embed_dim"] = 128
    (timm_folder[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="timm can build"):
        load_model(str(timm_folder[1]))


def test_a_folder_can_be_sparsified_and_rebuilt(timm_folder, tmp_path, make_images):
    from vitprune.model import attach

    loaded = load_model(str(timm_folder[1]))
    sparse = attach(loaded.model, 0.7).eval()
    (tmp_path / "out").mkdir()
    save(sparse, tmp_path / "out" / "model.safetensors", describe(sparse, class_names=loaded.class_names))
    images = make_images(sparse)
    with torch.no_grad():
        assert torch.equal(vitprune.load(tmp_path / "out")(images), sparse(images))
    assert timm.is_model(loaded.model.pretrained_cfg["architecture"])


def test_a_sparse_file_here_and_on_the_hub(hub, timm_folder, make_sparse, make_images, tmp_path):
    sparse = make_sparse(num_classes=2)
    save(sparse, tmp_path / "model.safetensors", describe(sparse, class_names=("cat", "dog")))
    hub(tmp_path)
    images = make_images(sparse)
    with torch.no_grad():
        for spec in (str(tmp_path), "hf-hub:someone/sparse"):
            loaded = load_model(spec)
            assert torch.equal(loaded.sparse(images), sparse(images))
            assert loaded.class_names == ("cat", "dog")
        assert torch.equal(vitprune.load("hf-hub:someone/sparse@v1")(images), sparse(images))
    hub(timm_folder[1])
    with pytest.raises(CheckpointError, match="is a dense model of timm"):
        vitprune.load("hf-hub:someone/dense")


def test_a_repository_without_a_model_is_refused(hub, monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    hub(tmp_path)
    for raised, expected, message in (
        (EntryNotFoundError, CheckpointError, "no config.json"),
        (LocalEntryNotFoundError, HubError, "out of reach"),
    ):

        def absent(*args, raised=raised, **kwargs):
            raise raised("no such file")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
        with pytest.raises(expected, match=message) as caught:
            load_model("hf-hub:someone/empty")
        assert "someone/empty" in caught.value.message


def test_sharded_and_wrapped_folders_are_read_alike(timm_folder, make_images):
    """As a folder and by --checkpoint, as one file, as shards, in fp16, with prefixes."""
    model, folder = timm_folder
    images, state = make_images(model), dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    places = {}
    for number in (0, 1):
        part = {f"module.{name}": tensor.half() for name, tensor in list(state.items())[number::2]}
        torch.save(part, folder / f"pytorch_model-{number}-of-2.bin")
        places |= dict.fromkeys(part, f"pytorch_model-{number}-of-2.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    loaded = load_model(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), model(images), rtol=0, atol=1e-2)
    assert "are fp16, converted to fp32" in loaded.understood[0]
    assert "resampled from 6x6 to 4x4" in load_model(str(folder), img_size=64).understood[1]
    with pytest.raises(UsageError, match="no multiple of the patch size"):
        load_model(str(folder), img_size=70)
    next(folder.glob("*-0-of-2.bin")).unlink()
    with pytest.raises(CheckpointError, match="not found"):
        load_model(str(folder))


def test_a_sparse_file_in_fp16_says_so(make_sparse, make_images, tmp_path):
    sparse = make_sparse(num_classes=2)
    save(sparse, tmp_path / "model.safetensors", describe(sparse))
    assert load_model(str(tmp_path)).understood == []
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        header = file.metadata()
    halves = {name: tensor.half() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(halves, tmp_path / "model.safetensors", metadata=header)
    loaded = load_model(str(tmp_path))
    assert loaded.understood == ["the weights in 'model.safetensors' are fp16, converted to fp32"]
    assert next(loaded.sparse.parameters()).dtype == torch.float32
