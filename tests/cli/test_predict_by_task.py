"""predict of models that name no class: labels, values, embeddings, features; as table, files, and from Python."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import vitprune
from vitprune.cli.app import run
from vitprune.data import eval_transform
from vitprune.errors import UsageError

OUTPUTS = {"multilabel": 6, "regression": 2, "embedding": 0, "dense": 0}
NAMES = ("1.png", "2.png", "3.png")


@pytest.fixture(params=OUTPUTS)
def task(request, make_sparse, make_vit, tmp_path, monkeypatch):
    """Its name; in the working directory are a sparse model for it, the dense weights and three images."""
    monkeypatch.chdir(tmp_path)
    name, outputs = request.param, OUTPUTS[request.param]
    sparse = make_sparse(keep=0.5, num_classes=outputs)
    sparse.task = name
    vitprune.save(sparse, "model.safetensors", class_names=tuple("abcdef") if name == "multilabel" else None)
    save_file(make_vit(num_classes=outputs).state_dict(), "dense.safetensors")
    generator = torch.Generator().manual_seed(0)
    for image in NAMES:
        pixels = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(image)
    return name


def only(*names):
    return pytest.mark.parametrize("task", names, indirect=True)


ONE = ["predict", "model.safetensors", *NAMES, "--device", "cpu"]
BOTH = [*ONE, "--checkpoint", "dense.safetensors"]


def outputs_of(model, method="__call__"):
    """What a model gives for the images, one at a time, by hand."""
    transform = eval_transform(getattr(model, "model", model))
    with torch.no_grad():
        return torch.cat(
            [getattr(model, method)(transform(Image.open(name).convert("RGB"))[None]) for name in NAMES]
        ).float()


def models(make_vit, task):
    return vitprune.load("model.safetensors"), make_vit(num_classes=OUTPUTS[task])


@only("multilabel")
def test_all_labels_above_half_and_none(task, make_vit, capsys):
    shares = outputs_of(models(make_vit, task)[0]).sigmoid()
    assert run([*ONE, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["task"] == "multilabel"
    for row, share in zip(result["rows"], shares, strict=True):
        given = {each["name"]: each["probability_pct"] for each in row["sparse"]}
        assert given == pytest.approx({"abcdef"[i]: 100 * p for i, p in enumerate(share.tolist()) if p > 0.5}, rel=1e-4)
        assert [*given.values()] == sorted(given.values(), reverse=True)
    assert run([*ONE, "--json", "--topk", "4"]) == 0
    for row, share in zip(json.loads(capsys.readouterr().out)["rows"], shares, strict=True):
        assert [each["index"] for each in row["sparse"]] == share.topk(4).indices.tolist(), "whatever they are"
    assert run(BOTH) == 0
    assert "% same labels as dense" in capsys.readouterr().out


@only("multilabel")
def test_an_image_without_labels_is_in_every_form(task, capsys):
    model = vitprune.load("model.safetensors")
    with torch.no_grad():
        model.model.head.bias.copy_(torch.tensor([-100.0] * 6))
    vitprune.save(model, "never.safetensors")
    command = ["predict", "never.safetensors", *NAMES, "--device", "cpu"]
    assert run(command) == 0
    assert capsys.readouterr().out.count("no label") == 3
    assert run([*command, "--json"]) == 0
    assert [row["sparse"] for row in json.loads(capsys.readouterr().out)["rows"]] == [[], [], []]
    assert run([*command, "-o", "labels.csv"]) == 0
    with Path("labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["rank"], row["index"]) for row in rows] == [(name, "", "") for name in NAMES]
    assert [each.classes for each in vitprune.predict(model, NAMES, device="cpu", progress=False)] == [
        {"sparse": []}
    ] * 3


@only("regression")
def test_values_as_table_csv_and_json(task, make_vit, capsys):
    sparse, dense = (outputs_of(each) for each in models(make_vit, task))
    assert run(BOTH) == 0
    out = capsys.readouterr().out
    for each in (sparse, dense):
        assert ", ".join(f"{value:.4g}" for value in each[0].tolist()) in out
    assert "correlation with dense (Pearson r)" in out
    assert run([*BOTH, "-o", "values.csv"]) == 0
    with Path("values.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "model", "value_0", "value_1"]
    assert [row[:2] for row in rows[1:3]] == [["1.png", "dense"], ["1.png", "sparse"]]
    assert [float(value) for value in rows[2][2:]] == pytest.approx(sparse[0].tolist(), abs=1e-4)
    assert run([*ONE, "-o", "values.json"]) == 0
    stored = [row["sparse"] for row in json.loads(Path("values.json").read_text())["rows"]]
    torch.testing.assert_close(torch.tensor(stored), sparse, rtol=0, atol=1e-4)


@only("embedding", "dense")
@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_vectors_are_written_with_the_images_names(task, make_vit, ending):
    method = "__call__" if task == "embedding" else "forward_features"
    expected = {
        name: outputs_of(each, method) for name, each in zip(("sparse", "dense"), models(make_vit, task), strict=True)
    }
    if task == "dense":
        prefix = models(make_vit, task)[0].backbone.num_prefix_tokens
        expected = {name: each[:, prefix:] for name, each in expected.items()}
    path = f"vectors{ending}"
    assert run([*BOTH, "-o", path]) == 0
    if ending == ".npz":
        with np.load(path) as file:
            names, found = list(file["images"]), {name: torch.from_numpy(file[name]) for name in ("dense", "sparse")}
    else:
        with safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["images"])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert names == [*NAMES]
    assert found.keys() == {"dense", "sparse"}
    for name, each in found.items():
        torch.testing.assert_close(each, expected[name], rtol=1e-4, atol=1e-4)
    assert run([*BOTH, "-o", path]) == 2, "it exists"


@only("embedding", "dense")
def test_the_table_says_how_far_apart_or_how_large(task, make_vit, capsys):
    assert run([*BOTH, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    distances = [row["distance"] for row in result["rows"]]
    figure = "cosine" if task == "embedding" else "token_cosine"
    assert result[figure] == pytest.approx(1 - sum(distances) / 3, abs=1e-5)
    assert min(distances) > 1e-3
    assert run(BOTH) == 0
    out = capsys.readouterr().out
    assert "1 - cosine, dense to sparse" in out
    for distance in distances:
        assert f"{distance:.4f}" in out
    assert run(ONE) == 0
    out, sparse = capsys.readouterr().out, models(make_vit, task)[0]
    first = vitprune.predict(sparse, NAMES[0], device="cpu", progress=False)[0].vectors["sparse"]
    shape = (64,) if task == "embedding" else (sparse.backbone.num_patches, 64)
    assert first.shape == shape
    assert f"{' x '.join(map(str, shape))} numbers: " in out
    assert "cosine" not in out


@only("embedding", "dense")
def test_json_has_an_embedding_and_of_features_their_shape(task, make_vit, capsys):
    sparse = models(make_vit, task)[0]
    assert run([*ONE, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    if task == "dense":
        assert row["sparse"] == {"shape": [sparse.backbone.num_patches, 64]}
    else:
        assert row["sparse"] == pytest.approx(outputs_of(sparse)[0].tolist(), abs=1e-4)
    assert "distance" not in row


def test_of_one_image_only_the_figures_that_there_are(task, capsys):
    command = [each for each in BOTH if each not in NAMES[1:]]
    assert run(command) == 0
    line = next(each for each in capsys.readouterr().out.splitlines() if each.startswith("on 1 image(s): "))
    several = {"regression": "Pearson", "embedding": "nearest"}.get(task)
    assert several is None or several not in line
    assert " -" not in line


def test_what_does_not_go_with_the_task_is_refused_and_writes_nothing(task, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    refused = {
        "multilabel": ([["-o", "a.npz"], ["-o", "a.safetensors"]], "would hold vectors, and the task is multilabel"),
        "regression": ([["--topk", "3"]], "--topk is of classes and labels, and the task is regression"),
        "embedding": ([["--topk", "3"]], "--topk is of classes and labels, and the task is embedding"),
        "dense": ([["-o", "a.csv"], ["-o", "a.json"]], "cannot hold features of patches"),
    }
    for arguments, said in ([more, refused[task][1]] for more in refused[task][0]):
        assert run([*ONE, *arguments]) == 2
        assert said in capsys.readouterr().err
    assert run([*ONE, "-o", "a.pt"]) == 2
    assert "expected a name that ends in .csv, .json, .npz or .safetensors" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UsageError, match=r"topk"):
        vitprune.predict("model.safetensors", NAMES, topk=0, device="cpu", progress=False)


def test_from_python_a_timm_model_and_its_task(task, make_vit):
    dense = make_vit(num_classes=OUTPUTS[task])
    found = vitprune.predict(dense, NAMES, task=task, device="cpu", progress=False)
    assert [each.image for each in found] == [*NAMES]
    for each in found:
        if task == "multilabel":
            assert not each.vectors
            assert all(label.probability_pct > 50 for label in each.classes["dense"])
        else:
            assert each.classes == {"dense": []}
            assert each.vectors["dense"].dtype == torch.float32
    if OUTPUTS[task]:
        with pytest.raises(UsageError, match="the model has a classifier"):
            vitprune.predict(dense, NAMES, task="embedding", device="cpu", progress=False)


@pytest.mark.slow
def test_an_exported_file_predicts_the_same(task, capsys):
    pytest.importorskip("onnxruntime")
    if task not in ("multilabel", "dense"):
        pytest.skip("exporting takes long; test_tasks does the others")
    rows = {}
    assert run(["export", "model.safetensors", "-o", "model.onnx"]) == 0
    ending = ".json" if task == "multilabel" else ".npz"
    for name in ("model.safetensors", "model.onnx"):
        assert run(["predict", name, *NAMES, "--device", "cpu", "-o", f"{name}{ending}"]) == 0
        if ending == ".json":
            rows[name] = [row["sparse"] for row in json.loads(Path(f"{name}.json").read_text())["rows"]]
        else:
            with np.load(f"{name}.npz") as file:
                rows[name] = file["sparse"]
    if ending == ".json":
        assert [[each["index"] for each in row] for row in rows["model.onnx"]] == [
            [each["index"] for each in row] for row in rows["model.safetensors"]
        ]
    else:
        np.testing.assert_allclose(rows["model.onnx"], rows["model.safetensors"], rtol=0, atol=1e-4)


def test_a_sparse_model_says_its_task_whatever_its_head(make_sparse):
    sparse, image = make_sparse(num_classes=24), Image.new("RGB", (40, 40))
    sparse.task = "embedding"
    (found,) = vitprune.predict(sparse, image, device="cpu", progress=False)
    assert found.vectors["sparse"].shape == (24,)
    sparse.task = "multilabel"
    with pytest.raises(UsageError, match="the model has a classifier"):
        vitprune.predict(sparse, image, task="embedding", device="cpu", progress=False)
