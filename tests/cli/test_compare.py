"""`vitprune compare`: equal budgets, the same images, and what is trained here."""

import json

import pytest
from safetensors.torch import save_file

from vitprune.checkpoint.sparse_file import describe, save
from vitprune.cli.app import run
from vitprune.measure import Timing
from vitprune.model import SparseViT

METHODS = ["random", "norm", "attention", "attention-merge", "tome", "tome-late", "paper", "ours"]


@pytest.fixture(autouse=True, scope="module")
def untimed():
    """Speed, which is measured elsewhere: sparse models of ours are slower here."""

    def benchmark(models, input_size, batch_sizes, **settings):
        rate = {name: 5.0 if isinstance(model, SparseViT) else 10.0 for name, model in models.items()}
        return [Timing(name, size, *[1.0] * 3, rate[name], None, 1) for size in batch_sizes for name in models]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitprune.jobs.side_by_side.benchmark", benchmark)
        yield


@pytest.fixture(scope="module")
def folder(make_vit, make_image_folder, tmp_path_factory):
    """Images, a recipe and weights of a `test_vit`, and a run of it."""
    folder = tmp_path_factory.mktemp("compare")
    make_image_folder(folder / "images")
    save_file(make_vit(num_classes=2).state_dict(), folder / "weights.safetensors")
    (folder / "quick.yaml").write_text("pretraining_steps: 2\nsteps: 3\nbatch_size: 4\nprecision: fp32\n")
    sparsify = ["sparsify", "test_vit", "--checkpoint", str(folder / "weights.safetensors")]
    options = ["--recipe", str(folder / "quick.yaml"), "--device", "cpu", "-j", "0", "-o", str(folder / "run")]
    assert run([*sparsify, "--data", str(folder / "images"), *options]) == 0
    return folder


@pytest.fixture
def arguments(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return [
        *("compare", "test_vit", str(folder / "images"), "--checkpoint", str(folder / "weights.safetensors")),
        *("--recipe", str(folder / "quick.yaml"), "--device", "cpu", "-j", "0", "-b", "4", "--keep", "0.7"),
    ]


@pytest.mark.slow
def test_all_methods_at_one_budget_on_the_same_images(arguments, capsys, monkeypatch):
    monkeypatch.setattr("vitprune.budget.gmacs.KEEP_STEPS", 50)  # what is searched is exact to a thousandth else
    assert run([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["dense", *METHODS]
    for name in METHODS:
        row = rows[name]
        assert row["available"], row["note"]
        assert 0.93 * result["budget_gmacs"] < row["gmacs"] <= result["budget_gmacs"] + 1e-9, name
        assert row["num_images"] == 6
        low, high = row["top1_points_ci95"]
        assert low <= row["top1_points"] <= high
        assert row["top1_points"] == pytest.approx(row["top1_pct"] - rows["dense"]["top1_pct"])
        assert row["slower"] == (row["speedup"] < 1) == (not name.startswith("tome"))
    assert rows["dense"]["top1_points"] == 0
    assert rows["ours"]["train_steps"] == rows["paper"]["train_steps"] == 5
    assert rows["random"]["train_seconds"] == 0


def test_table_has_every_row_and_says_what_each_is(arguments, unsearched, capsys, monkeypatch):
    monkeypatch.setattr("vitprune.jobs.compare.count_macs", lambda model, size: 10**9)
    assert run(arguments) == 0
    out = capsys.readouterr().out
    for name in ("dense", *METHODS):
        assert f"\n{name}  " in out
        assert f"\n{name}: " in out
    for words in ("more in late blocks", "GMACs", "6 images", "SLOWER", "5 steps in 0.0 min"):
        assert words in out


def test_a_file_is_compared_with_the_model_it_came_from_and_random_is_that_of_its_report(
    arguments, folder, unsearched, capsys
):
    report = json.loads((folder / "run" / "report.json").read_text())
    arguments[1] = str(folder / "run" / "model.safetensors")
    del arguments[-2:]  # the keep ratio is the file's
    assert run([*arguments, "--methods", "tome,ours,random", "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["dense"]["top1_pct"] == report["dense"]["top1_pct"]
    assert rows["ours"]["top1_pct"] == report["sparse"]["top1_pct"]
    assert rows["ours"]["gmacs"] == pytest.approx(report["sparse"]["gmacs"])
    assert rows["ours"]["train_seconds"] == 0
    assert rows["random"]["top1_pct"] == report["random"]["top1_pct"]
    assert rows["random"]["kl"] == pytest.approx(report["random"]["kl"], rel=1e-4)


def test_the_limits_of_a_file_are_trained_with_its_plan(arguments, folder, unsearched, capsys, tmp_path):
    """And not with the default keep ratio."""
    sparsify = ["sparsify", *arguments[1:-2], "--keep", "0.5", "-o", str(tmp_path / "half")]
    sparsify.remove("-b")
    sparsify.remove("4")
    assert run(sparsify) == 0
    arguments[1] = str(tmp_path / "half")
    del arguments[-2:]
    capsys.readouterr()
    assert run([*arguments, "--methods", "importance,similarity,ours", "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["importance"]["keep"] == rows["similarity"]["keep"] == 0.5
    for name in ("importance", "similarity"):  # they choose by less, of as many tokens
        assert 0.9 * rows["ours"]["gmacs"] < rows[name]["gmacs"] < rows["ours"]["gmacs"]


def test_a_budget_that_merging_cannot_meet_is_said_not_hidden(arguments, unsearched, capsys):
    arguments[arguments.index("--keep") + 1] = "0.02"
    assert run([*arguments, "--methods", "tome-late", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][1]
    assert not row["available"]
    assert row["note"].startswith("cannot merge down to 0.0")
    assert run([*arguments, "--methods", "tome-late"]) == 0
    assert "cannot merge down" in capsys.readouterr().out


def test_a_run_folder_and_the_weights_of_a_model_that_timm_does_not_know_by_name(
    make_sparse, folder, tmp_path, monkeypatch, capsys
):
    """The file says how its dense model is built; only the weights must be given."""
    monkeypatch.chdir(tmp_path)
    sparse = make_sparse(num_classes=2, depth=4)
    save(sparse, tmp_path / "model.safetensors", describe(sparse, name="my_own_vit", class_names=("cat", "dog")))
    save_file(sparse.model.state_dict(), tmp_path / "dense.safetensors")
    options = ["--methods", "random,ours", "--checkpoint", "dense.safetensors", "--device", "cpu"]
    assert run(["compare", ".", str(folder / "images"), *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in result["rows"]] == ["dense", "random", "ours"]
    assert run(["compare", ".", str(folder / "images"), "--methods", "random"]) == 2
    assert "my_own_vit" in capsys.readouterr().err


def test_ours_with_dense_behind_it_is_a_row_at_what_it_costs_on_average(arguments, folder, capsys):
    arguments[1] = str(folder / "run")
    del arguments[-2:]
    assert run([*arguments, "--methods", "ours", "--adaptive", "1", "--json"]) == 0
    dense, ours, adaptive = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in (dense, ours, adaptive)] == ["dense", "ours", "adaptive"]
    assert (adaptive["agreement_pct"], adaptive["kl"]) == (100, pytest.approx(0, abs=1e-6))
    assert ours["gmacs"] < dense["gmacs"] < adaptive["gmacs"], "all go on"
    assert run([*arguments, "--methods", "random,ours", "--adaptive", "0"]) == 0
    out = capsys.readouterr().out
    assert "adaptive: ours, and dense where ours is less sure (keep 0.7, then dense below a lead of 0.000: 0.0 %" in out
    for options, words in (
        (["--adaptive", "absent.json"], "file 'absent.json' not found"),
        (["--methods", "adaptive"], "unknown method 'adaptive'"),
    ):
        assert run([*arguments, *options]) == 2
        assert words in capsys.readouterr().err
    arguments[1] = "test_vit"
    assert run([*arguments, "--adaptive", "0.5"]) == 2
    assert "'test_vit' is no sparse file, and --adaptive is of one" in capsys.readouterr().err
