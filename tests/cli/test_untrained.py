"""`--recipe none`: a sparse model without training, with or without images."""

import json

import pytest
import torch

import vitprune
from vitprune.cli.app import run
from vitprune.model import AttentionViT


@pytest.fixture
def start(finished, monkeypatch, tmp_path):
    """Arguments that name a tiny model; its folders go to tmp_path/runs."""
    monkeypatch.chdir(tmp_path)
    weights = str(finished.root / "weights.safetensors")
    return ["sparsify", "test_vit", "--checkpoint", weights, "--recipe", "none", "--keep", "0.5"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "test_vit-keep0.5"


def test_without_data_it_writes_the_file_and_says_that_nothing_was_measured(start, folder, capsys, make_vit):
    assert run(start) == 0
    out = capsys.readouterr().out
    assert "nothing was measured" in out
    assert "vitprune eval" in out
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}
    sparse = vitprune.load(folder)
    assert isinstance(sparse, AttentionViT)
    assert (sparse.balance, sparse.beta, sparse.pruned) == (0.1, 1.0, "merge")
    dense = make_vit(num_classes=2)
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in sparse.model.state_dict().items())


def test_as_json_it_has_the_plan_and_no_accuracy(start, folder, capsys):
    assert run([*start, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["measured"] is False
    assert result["sparse"]["gmacs"] < result["dense"]["gmacs"]
    assert "top1_pct" not in json.dumps(result)


def test_with_data_it_is_evaluated_and_its_file_serves_the_other_commands(start, finished, folder, capsys):
    images = str(finished.root / "images")
    quick = ["--device", "cpu", "-j", "0", "--bench-batch-sizes", "2"]
    assert run([*start, images, *quick]) == 0
    said = capsys.readouterr()
    assert "no training, 6 images to evaluate on" in said.err
    report = json.loads((folder / "report.json").read_text())
    assert report["training"]["steps_done"] == 0
    assert report["sparse"]["num_images"] == 6
    assert report["training"]["recipe"]["predictor"] == "attention"
    assert (folder / "report.html").is_file()
    assert run(["eval", str(folder), images, "--device", "cpu", "-j", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1_pct"] == report["sparse"]["top1_pct"]
    assert run(["bench", str(folder), "--device", "cpu", "-b", "1", "--seconds", "0.05", "--json"]) == 0
    assert run(["export", str(folder), "--format", "timm", "-o", "timm"]) == 0
    assert run(["visualize", str(folder), str(finished.root / "images" / "val"), "-o", "maps"]) == 0


def test_from_python(make_vit, make_images, tmp_path, recwarn):
    model = make_vit(num_classes=3)
    sparse = vitprune.sparsify(model, keep=0.5, recipe="none", output=tmp_path / "run", progress=False)
    assert not recwarn.list, "untrained on purpose"
    images = make_images(model)
    assert torch.equal(vitprune.load(tmp_path / "run")(images), sparse(images))
    alone = vitprune.sparsify(model, keep=0.5, recipe="none", progress=False)
    assert torch.equal(alone(images), sparse(images))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-drop", "1"], "--max-drop needs a measurement"),
        (["--predictor", "light"], "--predictor light would have to be trained"),
        (["--steps", "5"], "predictor 'attention' goes with no training"),
        (["--pretraining-steps", "5"], "predictor 'attention' goes with no training"),
        (["--set", "balance=-1"], "balance: expected greater than or equal to 0, got -1"),
    ],
)
def test_what_makes_no_sense_is_refused_and_writes_nothing(start, tmp_path, capsys, options, said):
    assert run([*start, *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
