"""Predictions for images without labels: table, CSV, JSON, dense and sparse side by side, and from Python."""

import csv
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vitprune
from vitprune.checkpoint.sparse_file import describe, save
from vitprune.cli.app import run
from vitprune.data import eval_transform


@pytest.fixture
def sparse(make_sparse):
    return make_sparse(num_classes=7, depth=3, prune_at=[1, 2])


@pytest.fixture
def folder(sparse, make_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(sparse, tmp_path / "model.safetensors", describe(sparse, class_names=tuple("abcdefg")))
    save_file(make_vit(num_classes=7, depth=3).state_dict(), tmp_path / "dense.safetensors")
    (tmp_path / "images" / "deep").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("1.png", "2.png", "deep/3.png"):
        pixels = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    return tmp_path


def expected(model, path):
    with Image.open(path) as image, torch.no_grad():
        return model(eval_transform(getattr(model, "model", model))(image.convert("RGB"))[None]).softmax(-1)[0]


def test_the_likeliest_classes_of_each_image_and_what_could_not_be_read(folder, sparse, capsys):
    assert run(["predict", "model.safetensors", "images", "--topk", "3", "--device", "cpu", "--json"]) == 0
    captured = capsys.readouterr()
    assert "'images/broken.png' could not be read" in captured.err
    result = json.loads(captured.out)
    assert (result["num_images"], result["num_unreadable"]) == (3, 1)
    assert [row["image"] for row in result["rows"]] == ["images/1.png", "images/2.png", "images/deep/3.png"]
    for row in result["rows"]:
        best = expected(sparse, row["image"]).topk(3)
        assert [each["index"] for each in row["sparse"]] == best.indices.tolist()
        assert [each["name"] for each in row["sparse"]] == ["abcdefg"[i] for i in best.indices]
        assert [each["probability_pct"] for each in row["sparse"]] == pytest.approx(
            (100 * best.values).tolist(), rel=1e-4
        )


def test_images_none_of_which_can_be_read_are_an_error(folder, capsys):
    assert run(["predict", "model.safetensors", "images/broken.png"]) == 1
    assert "none of 1 images could be read: the first is 'images/broken.png', " in capsys.readouterr().err


def test_dense_and_sparse_side_by_side_as_table_and_csv(folder, make_vit, capsys):
    arguments = ["predict", "model.safetensors", "images/1.png", "--checkpoint", "dense.safetensors", "--device", "cpu"]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert "dense" in out
    assert "same prediction as dense" in out
    assert run([*arguments, "--topk", "2", "-o", "p.csv"]) == 0
    with (folder / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["rank"]) for row in rows] == [(m, r) for m in ("dense", "sparse") for r in ("1", "2")]
    best = expected(make_vit(num_classes=7, depth=3), "images/1.png").argmax().item()
    assert rows[0]["index"] == str(best)
    assert run([*arguments, "-o", "p.csv"]) == 2
    assert run([*arguments, "-o", "p.json"]) == 0
    assert json.loads((folder / "p.json").read_text())["schema_version"] == 2


def test_from_python_paths_and_images_give_the_same(folder, sparse):
    sparse.class_names = tuple("abcdefg")
    by_path = vitprune.predict(sparse, "images/1.png", topk=2, progress=False)
    with Image.open("images/1.png") as image:
        by_image = vitprune.predict("model.safetensors", [image], topk=2, progress=False)
    assert by_path[0].image == "images/1.png"
    assert by_path[0].classes["sparse"] == by_image[0].classes["sparse"]
    assert by_path[0].classes["sparse"][0].name in "abcdefg"
    with pytest.raises(vitprune.VitpruneError, match="not found"):
        vitprune.predict(sparse, "absent.png")


def test_an_exported_file_predicts_as_the_model_that_it_was_made_from_and_is_called_sparse(folder, capsys):
    assert run(["export", "model.safetensors", "-o", "model.onnx"]) == 0
    rows = {}
    for name in ("model.safetensors", "model.onnx"):
        capsys.readouterr()
        assert run(["predict", name, "images", "--topk", "1", "--device", "cpu", "--json"]) == 0
        rows[name] = json.loads(capsys.readouterr().out)["rows"]
    for one, other in zip(rows["model.safetensors"], rows["model.onnx"], strict=True):
        assert one["sparse"][0]["name"] == other["sparse"][0]["name"]
        assert "dense" not in other


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict", "model.onnx", "images", "--checkpoint", "dense.safetensors"], "name the model.safetensors that"),
        (["export", "model.safetensors", "-o", "model.pt2"], "--format pt2 writes it"),
        (["visualize", "model.onnx", "images"], "only `vitprune eval`, `predict` and `bench` can use"),
    ],
)
def test_what_an_exported_file_is_not_for_is_said(folder, capsys, arguments, said):
    (folder / "model.onnx").write_bytes(b"")
    assert run(arguments) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(vitprune.errors.CheckpointError, match="is an exported file"):
        vitprune.load("model.onnx")
