"""Several keep ratios from the command line, on a tiny model and a folder of images."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from vitprune.checkpoint.sparse_file import describe, save
from vitprune.cli.app import run
from vitprune.errors import Preempted, TrainingError
from vitprune.jobs.sparsify import run as run_one
from vitprune.measure import Timing
from vitprune.model import SparseViT
from vitprune.training.objective import Objective

STEPS = ["--warm-start-steps", "2", "--steps", "4"]


@pytest.fixture
def of_model(weights_file, image_folder, monkeypatch, tmp_path):
    """What is trained; folders go to tmp_path/runs. Time and MACs, tested elsewhere, are told from the tokens here."""
    monkeypatch.chdir(tmp_path)

    def benchmark(models, input_size, batch_sizes, **settings):
        assert len({id(model) for model in models.values()}) == len(models)
        assert settings["precision"] == "fp32"
        return [
            Timing(name, size, *[10.0 * size] * 3, 100 / _cost(model, size), None, 1)
            for size in batch_sizes
            for name, model in models.items()
        ]

    monkeypatch.setattr("vitprune.jobs.side_by_side.benchmark", benchmark)
    for where in ("build", "sweep"):
        monkeypatch.setattr(f"vitprune.report.{where}.count_macs", lambda model, size: int(1e9 * _cost(model, 32)))
    return [
        *("test_vit", "--checkpoint", str(weights_file), "--data", str(image_folder)),
        *("--device", "cpu", "--precision", "fp32", "-b", "4", "-j", "0", *STEPS),
    ]


def _cost(model, batch_size):
    """Of dense as a share; at batch 1 sparse models cost more than they save."""
    if not isinstance(model, SparseViT):
        return 1.0
    return 1.1 if batch_size == 1 else sum(model.schedule.tokens_per_block()) / model.schedule.depth / 100


@pytest.fixture
def arguments(of_model):
    return ["sweep", *of_model, "--keep", ".5,.8"]


@pytest.fixture
def other_file(make_vit, tmp_path):
    """Weights of another `test_vit` with two classes."""
    save_file(make_vit(num_classes=2, seed=3).state_dict(), tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def same_weights(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_sweep_leaves_runs_table_and_page_and_each_run_is_what_sparsify_gives(
    arguments, of_model, other_file, tmp_path, capsys
):
    assert run([*arguments, "--also", f"test_vit={other_file}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    folder = tmp_path / "runs" / "test_vit-sweep"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("keep0.5", "keep0.8", "sweep.csv", "sweep.html", "sweep.json")
    ]
    assert json.loads((folder / "sweep.json").read_text()) == result
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "keep 0.8", "keep 0.5", "test_vit"]
    assert result["failed"] == []

    # The second run, which another came before; of the first see the shared warm start.
    assert run(["sparsify", *of_model, "--keep", "0.5", "-o", "alone", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    files = [sorted(path.name for path in each.iterdir()) for each in (folder / "keep0.5", tmp_path / "alone")]
    assert files[0] == files[1]
    assert same_weights(folder / "keep0.5" / "model.safetensors", tmp_path / "alone" / "model.safetensors")
    report = json.loads((folder / "keep0.5" / "report.json").read_text())
    assert report["training"]["warm_start_of"] is None
    assert report["commands"]["sweep"].startswith("vitprune sweep test_vit")
    for key in ("top1_pct", "top5_pct", "num_images", "gmacs", "params_m"):
        assert rows["keep 0.5"][key] == alone["sparse"][key] == report["sparse"][key]
    for key in ("top1_points", "top1_points_ci95", "agreement_pct", "kl"):
        assert rows["keep 0.5"]["delta"][key] == alone["delta"][key]
    assert run(["eval", "test_vit", str(of_model[4]), "--checkpoint", str(other_file), "-j", "0", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert rows["test_vit"]["top1_pct"] == other["top1_pct"]
    assert rows["test_vit"]["gmacs"] == rows["dense"]["gmacs"]
    assert all(row["num_images"] == 6 for row in rows.values())
    check_fronts(result["rows"])

    with (folder / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["label"] for line in table] == list(rows)
    assert float(table[1]["images_per_s_batch32"]) == rows["keep 0.8"]["speed"][-1]["images_per_s"]
    page = (folder / "sweep.html").read_text()
    assert str(tmp_path) not in page
    assert "<script" not in page


def check_fronts(rows):
    """The rule, written anew."""
    for key, merit in (
        ("by_throughput", lambda row: row["speed"][-1]["images_per_s"]),
        ("by_gmacs", lambda row: -row["gmacs"]),
    ):
        for row in rows:
            here = row["top1_pct"], merit(row)
            better = {
                rival["label"]
                for rival in rows
                if all(a >= b for a, b in zip((rival["top1_pct"], merit(rival)), here, strict=True))
                and (rival["top1_pct"], merit(rival)) != here
            }
            assert row[key]["on_front"] == (not better)
            assert {rival["label"] for rival in row[key]["beaten_by"]} <= better
            assert bool(row[key]["beaten_by"]) == bool(better)


def test_without_labels_models_are_judged_by_the_dense_answers(arguments, image_folder, capsys):
    arguments[arguments.index("--data") + 1] = str(image_folder / "train" / "cat")
    assert run([*arguments, "--no-labels", "--keep", ".6"]) == 0
    assert "no labels" in capsys.readouterr().out
    result = json.loads(Path("runs/test_vit-sweep/sweep.json").read_text())
    assert result["accuracy"] == "agreement_pct"
    assert result["rows"][1]["top1_pct"] is None


def test_another_models_images_are_prepared_as_it_wants_them(arguments, make_vit, image_folder, tmp_path, capsys):
    """The same weights with other means, so that prepared as for the dense model it would answer as that does."""
    data_config = {"mean": (0.9, 0.1, 0.1), "std": (0.1, 0.9, 0.5)}
    save_for_hf(make_vit(num_classes=2), tmp_path / "shifted", data_config=data_config, safe_serialization=True)
    capsys.readouterr()
    assert run(["eval", "shifted", str(image_folder), "-j", "0", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert run([*arguments, "--keep", ".8", "--also", "shifted", "--json"]) == 0
    rows = {row["label"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["shifted"]["top1_pct"] == expected["top1_pct"]
    assert rows["shifted"]["delta"]["kl"] is None, "there is no answer of dense to the same numbers"
    assert rows["keep 0.8"]["delta"]["kl"] > 0


# A shared warm start


def test_a_shared_warm_start_is_that_of_the_highest_ratio_and_is_told(arguments, of_model, tmp_path, capsys):
    steps = Counter()
    real = Objective.forward

    def forward(self, images, labels, phase, *rest):
        steps[phase] += torch.is_grad_enabled()
        return real(self, images, labels, phase, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "forward", forward)
        assert run([*arguments, "--warm-start", "shared", "--json"]) == 0
    assert steps == {"warm": 2, "sampled": 2, "deployed": 6}
    result = json.loads(capsys.readouterr().out)
    assert result["warm_start"] == {"mode": "shared", "of": "keep 0.8", "steps": 2}
    folder = tmp_path / "runs" / "test_vit-sweep"
    assert not (folder / "checkpoints").exists()
    assert "The warm start was done once" in (folder / "sweep.html").read_text()
    for keep, told in (("0.8", None), ("0.5", "keep 0.8")):
        report = json.loads((folder / f"keep{keep}" / "report.json").read_text())
        assert report["training"]["warm_start_of"] == told
        assert report["training"]["steps_done"] == 6
        page = (folder / f"keep{keep}" / "report.html").read_text()
        assert ("as for keep 0.8" in page) == (told is not None)
        card = (folder / f"keep{keep}" / "README.md").read_text()
        assert ("as for keep 0.8" in card) == (told is not None)
        assert "vitprune sweep test_vit" in card
        assert run(["sparsify", *of_model, "--keep", keep, "-o", f"alone{keep}"]) == 0
        alone = tmp_path / f"alone{keep}" / "model.safetensors"
        assert same_weights(folder / f"keep{keep}" / "model.safetensors", alone) == (told is None)


# Runs that fail or are cut


@pytest.fixture
def cut(monkeypatch):
    """`cut(step, error)`: training raises `error` at that step of the sweep, once."""

    def cut(step, error):
        real, calls = Objective.forward, iter(range(1000))

        def forward(*args):
            if torch.is_grad_enabled() and next(calls) == step - 1:
                raise error
            return real(*args)

        monkeypatch.setattr(Objective, "forward", forward)

    return cut


def _lines(path):
    return path.read_text().splitlines()


@pytest.mark.parametrize(("warm_start", "step"), [("shared", 2), ("shared", 9)])
def test_a_sweep_that_was_stopped_goes_on(arguments, tmp_path, capsys, cut, step, warm_start):
    arguments += ["--warm-start", warm_start, "--checkpoint-every", "1"]
    assert run([*arguments, "-o", "whole"]) == 0
    cut(step, KeyboardInterrupt)
    assert run([*arguments, "-o", "cut"]) == 130
    err = capsys.readouterr().err
    assert f"{0 if step < 7 else 1} of 2 runs are complete" in err
    assert "--resume goes on" in err
    assert not (tmp_path / "cut" / "sweep.json").exists()
    first = tmp_path / "cut" / "keep0.8" / "report.json"
    before = first.read_bytes() if step > 6 else None
    assert run([*arguments, "-o", "cut", "--resume"]) == 0
    assert before in (None, first.read_bytes()), "a complete run is kept"
    for keep in ("0.8", "0.5"):
        files = (tmp_path / name / f"keep{keep}" for name in ("whole", "cut"))
        whole, resumed = files
        assert same_weights(whole / "model.safetensors", resumed / "model.safetensors")
        logged = [[json.loads(line)["step"] for line in _lines(f / "log.jsonl")] for f in (whole, resumed)]
        assert logged[0] == logged[1]
    assert (tmp_path / "cut" / "sweep.html").is_file()
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_a_run_that_fails_does_not_lose_the_others(arguments, tmp_path, capsys, cut):
    cut(3, TrainingError("the loss was not finite"))
    assert run([*arguments, "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [row["label"] for row in result["rows"]] == ["dense", "keep 0.5"]
    assert result["failed"][0]["keep"] == 0.8
    assert result["failed"][0]["error"].startswith("the loss was not finite")
    assert "keep 0.8 failed" in err
    assert "--resume tries it again" in err
    assert "Runs that failed" in (tmp_path / "runs" / "test_vit-sweep" / "sweep.html").read_text()
    assert run([*arguments, "--resume", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in result["rows"]] == ["dense", "keep 0.8", "keep 0.5"]
    assert result["failed"] == []


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (TrainingError("out of memory", "try -b 2"), 1, ["error: out of memory", "", "hint: try -b 2"]),
        (
            Preempted("the run was told to stop", "vitprune sparsify ..."),
            143,
            [
                "error: the run was told to stop; 0 of 2 runs are complete",
                "",
                "hint: vitprune sweep with the same options and --resume goes on",
            ],
        ),
    ],
)
def test_where_every_run_fails_or_the_machine_is_taken_that_is_the_error(
    arguments, capsys, monkeypatch, error, code, lines
):
    def fail(*args):
        raise error

    monkeypatch.setattr("vitprune.jobs.sweep.run", fail)
    assert run(arguments) == code
    assert capsys.readouterr().err.splitlines()[-3:] == lines


def test_ratios_and_models_may_be_added_and_other_settings_are_refused(
    arguments, other_file, image_folder, capsys, monkeypatch
):
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    table = [line for line in out.splitlines() if line.startswith(("dense  ", "keep 0.8  ", "keep 0.5  "))]
    assert len(table) == 3
    assert max(len(line) for line in table) <= 80
    assert "The fastest within 1 point of dense is" in out
    assert "Slower than dense at batch 1: keep 0.8, keep 0.5." in out
    assert "--also NAME" in out
    assert "written to runs/test_vit-sweep" in out
    assert "run 1 of 2: keep 0.8" in err
    for changed in (["--seed", "1"], ["--schedule", "geometric"], ["--limit", "5"], ["--warm-start", "shared"]):
        capsys.readouterr()
        assert run([*arguments, "--resume", *changed]) == 2
        assert "has other settings" in capsys.readouterr().err
    trained = []

    def counted(loaded, data, recipe, settings, listener):
        trained.append(settings.sparsity.keep)
        return run_one(loaded, data, recipe, settings, listener)

    monkeypatch.setattr("vitprune.jobs.sweep.run", counted)
    assert run([*arguments, "--resume", "--keep", ".8,.6,.5", "--also", f"test_vit={other_file}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert trained == [0.6]
    assert [row["label"] for row in result["rows"]] == ["dense", "keep 0.8", "keep 0.6", "keep 0.5", "test_vit"]


# Mistakes


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--keep", "0,.5"], 2, "keep ratio is 0, expected a number in (0, 1]"),
        (["--keep", ".5,1.5"], 2, "keep ratio is 1.5"),
        (["--keep", ".5,nan"], 2, "keep ratio is nan"),
        (["--keep", "1,.5"], 2, "1 is the dense model"),
        (["--keep", ".7,.70"], 2, "names 0.7 twice"),
        (["--keep", ".5,x"], 2, "--keep is '.5,x', expected ratios"),
        (["--keep", ""], 2, "--keep is ''"),
        (["--stages", "9,3"], 2, "stages are 9,3"),
        (["--also", "deit_smal"], 2, "there is no model or file 'deit_smal'"),
        (["--also", "swin_tiny"], 1, "hierarchical"),
        (["--also", "a,,b"], 2, "--also is 'a,,b'"),
        (["--also", "a="], 2, "--also is 'a='"),
        (["--also", "deit_tiny,deit_tiny"], 2, "--also names 'deit_tiny' twice"),
        (["--also", "deit_tiny"], 1, "give a weight file that is already here: --also deit_tiny=FILE"),
        (["--also", "test_vit=absent.safetensors"], 1, "there is no file 'absent.safetensors'"),
        (["--also", "test_vit=three.safetensors"], 2, "'test_vit' has 3 classes and test_vit"),
        (["--also", "large"], 2, "takes images of 3x192x192"),
        (["--also", "sparse"], 2, "is sparse, and --also is for dense models"),
        (["--data", "nowhere"], 1, "the data 'nowhere' is not there"),
        (["--data", "empty"], 1, "there are no images"),
        (["--warm-start", "none"], 2, "--warm-start is 'none', expected one of each, shared"),
        (["--warm-start", "shared", "--warm-start-steps", "0"], 2, "no warm start to share"),
        (["--resume"], 1, "there is no run to resume in 'runs/test_vit-sweep'"),
        (["--resume", "--overwrite"], 2, "give one of them"),
        (["-o", "images"], 1, "the output folder 'images' exists"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained_or_written(
    arguments, options, code, message, make_vit, make_sparse, tmp_path, capsys, no_hub, monkeypatch
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "sparse").mkdir()
    save_file(make_vit(num_classes=3).state_dict(), tmp_path / "three.safetensors")
    save_for_hf(
        make_vit(num_classes=2, img_size=192), tmp_path / "large", model_args={"img_size": 192, "num_classes": 2}
    )
    sparse = make_sparse(num_classes=2)
    save(sparse, tmp_path / "sparse" / "model.safetensors", describe(sparse))
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert run([*arguments, *options]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert "training" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sparse_model_is_refused(make_sparse, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sparse = make_sparse(num_classes=2)
    save(sparse, tmp_path / "model.safetensors", describe(sparse))
    assert run(["sweep", "model.safetensors", "--data", "demo"]) == 2
    assert "is sparse already" in capsys.readouterr().err
