"""`vitprune compare`: equal budgets, the same images, and what is trained here."""

import json

import pytest
from safetensors.torch import load_file, save_file

from vitprune.checkpoint.sparse_file import describe, save
from vitprune.cli.app import run

METHODS = ["random", "norm", "attention", "attention-fold", "tome", "tome-late", "paper", "ours"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr("vitprune.jobs.compare._BENCH_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text("warm_start_steps: 2\nsteps: 3\nbatch_size: 4\nprecision: fp32\n")


@pytest.fixture
def arguments(weights_file, image_folder):
    return [
        *("compare", "test_vit", str(image_folder), "--checkpoint", str(weights_file)),
        *("--recipe", "quick.yaml", "--device", "cpu", "-j", "0", "-b", "3", "--keep", "0.7"),
    ]


def test_all_methods_at_one_budget_on_the_same_images(arguments, capsys):
    assert run([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["dense", *METHODS]
    for name in METHODS:
        row = rows[name]
        assert row["available"], row["note"]
        assert 0.93 * result["budget_gmacs"] < row["gmacs"] <= result["budget_gmacs"] + 1e-9, name
        assert row["num_images"] == 6
        low, high = row["delta_points_ci95"]
        assert low <= row["delta_points"] <= high
        assert row["delta_points"] == pytest.approx(row["top1_pct"] - rows["dense"]["top1_pct"])
        assert row["slower"] == (row["speedup"] < 1)
    assert rows["dense"]["delta_points"] == 0
    assert rows["ours"]["train_steps"] == rows["paper"]["train_steps"] == 5
    assert rows["random"]["train_s"] == 0


def test_table_has_every_row_and_says_what_each_is(arguments, capsys):
    assert run([*arguments, "--methods", "random,tome-late"]) == 0
    out = capsys.readouterr().out
    for word in ("dense", "random", "tome-late", "more in late blocks", "GMACs", "6 images"):
        assert word in out
    assert "ours" not in out


def test_a_file_is_compared_with_the_model_it_came_from(arguments, weights_file, image_folder, capsys):
    sparsify = ["sparsify", "test_vit", "--checkpoint", str(weights_file), "--data", str(image_folder)]
    assert run([*sparsify, "--recipe", "quick.yaml", "--device", "cpu", "-j", "0", "-o", "run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    arguments[1] = "run/model.safetensors"
    del arguments[-2:]  # the keep ratio is the file's
    assert run([*arguments, "--methods", "tome,ours", "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["dense"]["top1_pct"] == report["dense"]["top1_pct"]
    assert rows["ours"]["top1_pct"] == report["sparse"]["top1_pct"]
    assert rows["ours"]["gmacs"] == pytest.approx(report["sparse"]["gmacs"])
    assert rows["ours"]["train_s"] == 0


def test_a_budget_that_merging_cannot_meet_is_said_not_hidden(arguments, capsys):
    arguments[arguments.index("--keep") + 1] = "0.02"
    assert run([*arguments, "--methods", "tome-late", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][1]
    assert not row["available"]
    assert row["note"].startswith("cannot merge down to 0.0")
    assert run([*arguments, "--methods", "tome-late"]) == 0
    assert "cannot merge down" in capsys.readouterr().out


def test_weights_that_do_not_fit_the_file_are_refused(arguments, weights_file, image_folder, tmp_path, capsys):
    state = load_file(weights_file)
    save_file({name: tensor for name, tensor in state.items() if "blocks.5" not in name}, tmp_path / "less.safetensors")
    arguments[arguments.index("--checkpoint") + 1] = "less.safetensors"
    assert run(arguments) == 1
    assert "less.safetensors" in capsys.readouterr().err


def test_a_run_folder_and_the_weights_of_a_model_that_timm_does_not_know_by_name(
    make_sparse, image_folder, tmp_path, capsys
):
    """The file says how its dense model is built; only the weights must be given."""
    sparse = make_sparse(num_classes=2, depth=4)
    save(sparse, tmp_path / "model.safetensors", describe(sparse, name="my_own_vit", class_names=("cat", "dog")))
    save_file(sparse.model.state_dict(), tmp_path / "dense.safetensors")
    options = ["--methods", "random,ours", "--checkpoint", str(tmp_path / "dense.safetensors"), "--device", "cpu"]
    assert run(["compare", str(tmp_path), str(image_folder), *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in result["rows"]] == ["dense", "random", "ours"]
    assert run(["compare", str(tmp_path), str(image_folder), "--methods", "random"]) == 2
    assert "my_own_vit" in capsys.readouterr().err
