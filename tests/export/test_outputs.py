"""What comes out of an exported file, by task: name, shape, numbers, and what the file says of them."""

import json

import pytest
import timm
import torch

import vitprune
from vitprune.checkpoint.onnx_program import read_onnx
from vitprune.cli.app import run
from vitprune.errors import UsageError
from vitprune.loading.load import load_model
from vitprune.measure import count_macs
from vitprune.model import SparseViT, TokenFeatures

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 0}
ENCODERS = {
    "class token": {"name": "vit_tiny_patch16_224", **TINY},
    "average": {"name": "vit_tiny_patch16_224", **TINY, "global_pool": "avg"},
    "attention pool": {"name": "vit_base_patch16_siglip_224", **TINY},
    "registers": {"name": "vit_small_patch14_reg4_dinov2", **TINY, "img_size": 56},
    "projection": {"name": "vit_base_patch16_clip_224", **TINY, "num_classes": 24},
}
WIDTH = dict.fromkeys(ENCODERS, 64) | {"projection": 24}


@pytest.fixture
def encoder(make_sparse):
    def get(kind, pruned="merge", stages=(1,)):
        plain = make_sparse(keep=0.5, prune_at=stages, **ENCODERS[kind] | {"depth": 1 + len(stages)})
        sparse = SparseViT(plain.model, plain.schedule, plain.predictors, pruned).eval()
        sparse.task = "embedding"
        return sparse

    return get


def images_of(sparse, count=4):
    return torch.randn(count, *sparse.pretrained_cfg["input_size"][:1], *_size(sparse))


def _size(sparse):
    return sparse.model.patch_embed.img_size


@pytest.mark.parametrize("kind", ["class token", "attention pool"])
def test_encoders_as_programs_of_torch(encoder, tmp_path, kind):
    sparse = encoder(kind)
    done = vitprune.export_model(sparse, tmp_path / "model.pt2")
    assert done.task == "embedding"
    assert done.agreement.num_clear is None
    images, extra = images_of(sparse), {"vitprune.json": ""}
    stored = torch.export.load(done.output, extra_files=extra)
    assert stored.graph_signature.user_outputs == ("embedding",), "though an operator of torch's is called so too"
    with torch.no_grad():
        torch.testing.assert_close(stored.module()(images), sparse(images), rtol=0, atol=1e-5)
    assert json.loads(extra["vitprune.json"])["task"] == "embedding"


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_as_timm_folders(encoder, tmp_path, kind):
    sparse = encoder(kind)
    images = images_of(sparse)
    folder = vitprune.export_model(sparse, tmp_path / "timm").output
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == (0 if WIDTH[kind] == 64 else 24)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        found = again(images)
        assert torch.equal(found, sparse.model(images))
    assert found.shape == (4, WIDTH[kind])
    if kind != "projection":  # timm has no word for it
        assert load_model(str(folder)).task == "embedding"


@pytest.mark.parametrize("kind", ["class token", *(pytest.param(k, marks=pytest.mark.slow) for k in [*ENCODERS][1:])])
def test_encoders_as_onnx(encoder, tmp_path, kind):
    sparse = encoder(kind, "drop" if kind == "average" else "merge")
    path = vitprune.export_model(sparse, tmp_path / "model.onnx").output
    session, images = runtime.InferenceSession(path), images_of(sparse)
    (found,) = session.run(["embedding"], {"images": images.numpy()})
    with torch.no_grad():
        expected = sparse(images)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(read_onnx(path)(images), expected, rtol=0, atol=2e-5)
    assert session.get_outputs()[0].shape == ["batch", WIDTH[kind]]
    loaded = load_model(str(path), exported=True)
    assert loaded.task == "embedding"
    assert loaded.model.num_features == WIDTH[kind]


@pytest.mark.parametrize(
    ("kind", "precision", "pruned"),
    [
        ("class token", "fp32", "drop"),
        *(
            pytest.param(*each, "merge", marks=pytest.mark.slow)
            for each in (("average", "fp32"), ("registers", "fp16"))
        ),
    ],
)
def test_features_as_onnx(encoder, tmp_path, kind, precision, pruned):
    sparse = encoder(kind, pruned, stages=(1, 2))
    done = vitprune.export_model(sparse, tmp_path / "model.onnx", precision=precision, features=True)
    assert done.task == "dense"
    images = images_of(sparse, 5)  # not as many as are traced
    (found,) = runtime.InferenceSession(done.output).run(["features"], {"images": images.numpy()})
    with torch.no_grad():
        expected = sparse.forward_features(images)
    assert found.shape == expected.shape == (5, sparse.backbone.num_prefix_tokens + 16, 64)
    if precision == "fp32":
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=5e-5)
    program = load_model(str(done.output), exported=True)
    assert (program.task, program.model.num_prefix_tokens) == ("dense", sparse.backbone.num_prefix_tokens)
    assert (program.model.num_classes, program.class_names) == (0, None)
    size = (3, *_size(sparse))
    assert count_macs(program.model, size) == count_macs(TokenFeatures(sparse), size)
    assert (count_macs(program.model, size) < count_macs(sparse, size)) == (kind in ("attention pool", "projection"))


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_a_timm_folder_says_that_its_outputs_are_no_classes(make_vit, tmp_path, task):
    model = make_vit(num_classes=3)
    done = vitprune.export_model(model, tmp_path / "timm", task=task)
    assert done.task == task
    assert load_model(str(done.output)).task == task
    assert load_model(str(vitprune.export_model(model, tmp_path / "plain").output)).task == "classification"
    assert "problem_type" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.slow
def test_values_and_labels_as_onnx_are_called_so(make_vit, tmp_path):
    for task, output in (("regression", "values"), ("multilabel", "logits")):
        path = vitprune.export_model(make_vit(num_classes=1), tmp_path / f"{task}.onnx", task=task).output
        assert [each.name for each in onnx.load(path).graph.output] == [output]
        assert load_model(str(path), exported=True).task == task


def test_a_task_that_does_not_go_with_the_model_is_refused(make_vit, tmp_path):
    for outputs, task, said in (
        (0, "regression", 'task="regression" needs outputs, and the model has none'),
        (0, "classification", 'task="classification" needs outputs'),
        (2, "retrieval", "'retrieval' is no task"),
        (2, "embedding", "the model has a classifier"),
        (1, "classification", "has one output"),
        (1, "auto", "has one output"),
    ):
        with pytest.raises(UsageError, match=said):
            vitprune.export_model(make_vit(num_classes=outputs), tmp_path / "model.pt2", task=task)
    assert list(tmp_path.iterdir()) == []


def test_what_a_timm_model_is_for_is_found_as_everywhere(tmp_path):
    clip = timm.create_model("vit_base_patch32_clip_224", embed_dim=64, depth=1, num_heads=2, num_classes=512)
    assert vitprune.export_model(clip, tmp_path / "clip").task == "embedding"
    names = [f"class {index}" for index in range(512)]
    assert vitprune.export_model(clip, tmp_path / "named", class_names=names).task == "classification"


def test_vectors_of_classes_are_of_no_use(encoder, tmp_path, capsys):
    vitprune.save(encoder("class token"), tmp_path / "model.safetensors")
    for command, more in (("export", []), ("predict", ["cat.jpg"])):
        given = [str(tmp_path / "model.safetensors"), *more, "--class-embeddings", "text.safetensors"]
        assert run([command, *given]) == 2
        assert f"for zero-shot figures, and `vitprune {command}` gives none" in capsys.readouterr().err


def test_the_command_speaks_of_the_task(encoder, tmp_path, capsys):
    vitprune.save(encoder("class token"), tmp_path / "model.safetensors")
    export = ["export", str(tmp_path / "model.safetensors")]
    assert run([*export, "--format", "pt2"]) == 0
    out = capsys.readouterr().out
    assert "numbers of the embedding differ by" in out
    assert "passed: a typical image's numbers of the embedding differ by" in out
    for word in ("class", "clear", "logits"):
        assert word not in out
    assert run([*export, "--format", "pt2", "--features", "--overwrite", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["task"], result["agreement"]["agreement_pct"]) == ("dense", None)
    assert run([*export, "--format", "timm", "--features"]) == 2
    assert "a timm folder holds weights" in capsys.readouterr().err
    assert not (tmp_path / "timm").exists()


def test_a_timm_folder_of_a_model_for_features_is_compared_by_what_timm_gives(encoder, tmp_path, capsys):
    sparse = encoder("class token")
    sparse.task = "dense"
    vitprune.save(sparse, tmp_path / "model.safetensors")
    assert run(["export", str(tmp_path), "--format", "timm"]) == 0
    out = capsys.readouterr().out
    assert "numbers of the embedding differ by" in out
    assert "features" not in out
