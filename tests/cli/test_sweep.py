"""Several keep ratios from the command line, on a tiny model and a folder of images."""

import json
import shutil

import pytest
from finished_run import same_weights
from safetensors.torch import save_file
from timm.models import save_for_hf

from vitprune.adaptive import Reached
from vitprune.checkpoint.sparse_file import describe, save
from vitprune.cli.app import run
from vitprune.errors import Preempted, TrainingError
from vitprune.jobs.sparsify import run as run_one
from vitprune.measure import Timing
from vitprune.model import SparseViT
from vitprune.report.sweep import WithDense, dominated_by

FOLDER = "runs/test_vit-sweep"


def _cost(model, batch_size):
    """Of dense as a share; at batch 1 sparse models cost more than they save."""
    if not isinstance(model, SparseViT):
        return 1.0
    return 1.1 if batch_size == 1 else sum(model.schedule.tokens_per_block()) / model.schedule.depth / 100


def _benchmark(models, input_size, batch_sizes, **settings):
    assert len({id(model) for model in models.values()}) == len(models)
    assert settings["precision"] == "fp32"
    return [
        Timing(name, size, *[10.0 * size] * 3, 100 / _cost(model, size), None, 1)
        for size in batch_sizes
        for name, model in models.items()
    ]


@pytest.fixture(autouse=True, scope="module")
def told_from_the_tokens():
    """Time and MACs, which are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitprune.jobs.side_by_side.benchmark", _benchmark)
        patch.setattr("vitprune.report.build.count_macs", lambda model, size: int(1e9 * _cost(model, 32)))
        yield


@pytest.fixture(scope="module")
def of_model(make_vit, make_image_folder, tmp_path_factory):
    """What is trained."""
    folder = tmp_path_factory.mktemp("sweep-of")
    save_file(make_vit(num_classes=2).state_dict(), folder / "weights.safetensors")
    save_file(make_vit(num_classes=2, seed=3).state_dict(), folder / "other.safetensors")
    return [
        *("test_vit", "--checkpoint", str(folder / "weights.safetensors")),
        *("--data", str(make_image_folder(folder / "images"))),
        *("--device", "cpu", "--precision", "fp32", "-b", "4", "-j", "0", "--pretraining-steps", "2", "--steps", "4"),
    ]


@pytest.fixture(scope="module")
def images(of_model):
    return of_model[of_model.index("--data") + 1]


@pytest.fixture(scope="module")
def other_file(of_model):
    """Weights of another `test_vit` with two classes."""
    return of_model[2].replace("weights", "other")


@pytest.fixture
def arguments(of_model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return ["sweep", *of_model, "--keep", ".5,.8"]


@pytest.fixture(scope="module")
def swept(of_model, other_file, tmp_path_factory):
    """Where a sweep of keep 0.8 and 0.5 was run, beside a run of 0.5 alone; and what both printed."""
    root = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run(["sweep", *of_model, "--keep", ".5,.8", "--also", f"test_vit={other_file}"]) == 0
        assert run(["sparsify", *of_model, "--keep", "0.5", "-o", "alone"]) == 0
    return root


@pytest.fixture
def copied(swept, arguments, tmp_path):
    """The arguments of a sweep that is finished in tmp_path/runs."""
    shutil.copytree(swept / "runs", tmp_path / "runs")
    return arguments


def test_a_sweep_writes_runs_and_page_and_each_run_is_what_sparsify_gives(
    swept, of_model, other_file, images, tmp_path, capsys
):
    folder, alone = swept / FOLDER, swept / "alone"
    assert sorted(path.name for path in folder.iterdir()) == ["keep0.5", "keep0.8", "sweep.html", "sweep.json"]
    result = json.loads((folder / "sweep.json").read_text())
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "keep 0.8", "keep 0.5", "test_vit"]
    assert result["failed"] == []

    # The second run, which another came before.
    assert sorted(p.name for p in (folder / "keep0.5").iterdir()) == sorted(p.name for p in alone.iterdir())
    assert same_weights(folder / "keep0.5", alone)
    report, by_itself = (json.loads((each / "report.json").read_text()) for each in (folder / "keep0.5", alone))
    assert report["commands"]["sweep"].startswith("vitprune sweep test_vit")
    for key in ("top1_pct", "top5_pct", "num_images", "gmacs", "params_m"):
        assert rows["keep 0.5"][key] == by_itself["sparse"][key] == report["sparse"][key]
    for key in ("top1_points", "top1_points_ci95", "agreement_pct", "kl"):
        assert rows["keep 0.5"]["delta"][key] == by_itself["delta"][key]
    assert run(["eval", "test_vit", images, "--checkpoint", other_file, "-j", "0", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert rows["test_vit"]["top1_pct"] == other["top1_pct"]
    assert rows["test_vit"]["gmacs"] == rows["dense"]["gmacs"]
    assert all(row["num_images"] == 6 for row in rows.values())
    for key, merit in (
        ("by_throughput", lambda row: row["speed"][-1]["images_per_s"]),
        ("by_gmacs", lambda row: -row["gmacs"]),
    ):
        found = dominated_by({label: (row["top1_pct"], merit(row)) for label, row in rows.items()})
        assert {label: [rival["label"] for rival in row[key]["dominated_by"]] for label, row in rows.items()} == found
        assert {label for label, row in rows.items() if row[key]["on_front"]} == {x for x in found if not found[x]}
    page = (folder / "sweep.html").read_text()
    assert str(swept) not in page
    assert "<script" not in page


def test_a_finished_sweep_is_printed_without_training_and_takes_further_ratios(
    copied, other_file, tmp_path, capsys, monkeypatch
):
    trained = []

    def counted(loaded, data, recipe, settings, listener):
        trained.append(settings.sparsity.keep)
        return run_one(loaded, data, recipe, settings, listener)

    monkeypatch.setattr("vitprune.jobs.sweep.run", counted)
    assert run([*copied, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert trained == []
    assert "run 1 of 2: keep 0.8 is complete and kept" in err
    table = [line for line in out.splitlines() if line.startswith(("dense  ", "keep 0.8  ", "keep 0.5  "))]
    assert len(table) == 3
    assert max(len(line) for line in table) <= 80
    assert "The fastest within 1 point of dense is" in out
    assert "Slower than dense at batch 1: keep 0.8, keep 0.5." in out
    assert "--also NAME" in out
    assert f"written to {FOLDER}" in out

    before = (tmp_path / FOLDER / "keep0.8" / "report.json").read_bytes()
    assert run([*copied, "--resume", "--keep", ".8,.6,.5", "--also", f"test_vit={other_file}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert trained == [0.6]
    assert [row["label"] for row in result["rows"]] == ["dense", "keep 0.8", "keep 0.6", "keep 0.5", "test_vit"]
    assert (tmp_path / FOLDER / "keep0.8" / "report.json").read_bytes() == before


def test_without_labels_models_are_judged_by_the_dense_predictions(copied, images, tmp_path, capsys):
    copied[copied.index("--data") + 1] = f"{images}/train/cat"
    assert run([*copied, "--resume", "--no-labels"]) == 2
    err = capsys.readouterr().err
    for said in ("keep0.8' has other settings", "labels is True there, False now", "12 images", "5 images"):
        assert said in err
    assert run([*copied, "--overwrite", "-o", FOLDER, "--no-labels"]) == 0
    assert "no labels" in capsys.readouterr().out
    result = json.loads((tmp_path / FOLDER / "sweep.json").read_text())
    assert result["accuracy"] == "agreement_pct"
    assert result["rows"][1]["top1_pct"] is None


def test_another_models_images_are_prepared_as_it_needs_them(copied, make_vit, images, tmp_path, capsys):
    """The same weights with other means, so that prepared as for the dense model it would predict as that does."""
    data_config = {"mean": (0.9, 0.1, 0.1), "std": (0.1, 0.9, 0.5)}
    save_for_hf(make_vit(num_classes=2), tmp_path / "shifted", data_config=data_config, safe_serialization=True)
    capsys.readouterr()
    assert run(["eval", "shifted", images, "-j", "0", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert run([*copied, "--resume", "--keep", ".8", "--also", "shifted", "--json"]) == 0
    rows = {row["label"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["shifted"]["top1_pct"] == expected["top1_pct"]
    assert rows["shifted"]["delta"]["kl"] is None, "dense saw other numbers"
    assert rows["keep 0.8"]["delta"]["kl"] > 0


def test_the_threshold_for_most_of_the_answers_is_timed_with_the_others(copied, tmp_path, capsys, monkeypatch):
    def behind(entries, results):
        point = Reached(0.4, 50.0, 0.005, 0.5, "keep 0.8")
        return WithDense([point], [point], point, gmacs_dense=1.0)

    monkeypatch.setattr("vitprune.jobs.sweep.with_dense", behind)
    assert run([*copied, "--resume"]) == 0
    assert "on average, dense 1.000, 1.00 x as fast at batch 32" in capsys.readouterr().out
    result = json.loads((tmp_path / FOLDER / "sweep.json").read_text())
    assert [row["label"] for row in result["rows"]] == ["dense", "keep 0.8", "keep 0.5"]
    assert [row["batch_size"] for row in result["adaptive"]["speed"]] == [1, 32]


# Runs that fail or are cut


def _fail(error):
    raise error


@pytest.mark.slow
def test_a_sweep_that_was_stopped_resumes_bit_identically(swept, arguments, tmp_path, capsys, at_step):
    at_step(9, lambda: _fail(KeyboardInterrupt))
    assert run([*arguments, "--checkpoint-every", "1"]) == 130
    err = capsys.readouterr().err
    assert "1 of 2 runs are complete" in err
    assert "--resume resumes" in err
    assert not (tmp_path / FOLDER / "sweep.json").exists()
    assert run([*arguments, "--resume", "--seed", "1"]) == 2, "the cut run has other settings"
    assert run([*arguments, "--resume"]) == 0
    for name in ("keep0.8", "keep0.5"):
        folders = [root / FOLDER / name for root in (swept, tmp_path)]
        assert same_weights(*folders)
        logs = [(folder / "log.jsonl").read_text().splitlines() for folder in folders]
        assert len({str([json.loads(line)["step"] for line in log]) for log in logs}) == 1
    assert (tmp_path / FOLDER / "sweep.html").is_file()


def test_a_run_that_fails_does_not_lose_the_others(arguments, tmp_path, capsys, at_step):
    at_step(3, lambda: _fail(TrainingError("the loss was not finite")))
    assert run([*arguments, "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [row["label"] for row in result["rows"]] == ["dense", "keep 0.5"]
    assert result["failed"][0]["keep"] == 0.8
    assert result["failed"][0]["error"].startswith("the loss was not finite")
    assert "keep 0.8 failed" in err
    assert "--resume tries it again" in err
    assert "Runs that failed" in (tmp_path / FOLDER / "sweep.html").read_text()
    assert run([*arguments, "--resume", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in result["rows"]] == ["dense", "keep 0.8", "keep 0.5"]
    assert result["failed"] == []


def test_where_every_run_fails_or_the_machine_is_taken_that_is_the_error(arguments, capsys, monkeypatch):
    told = "error: the run was terminated; 0 of 2 runs are complete"
    for error, code, lines in (
        (TrainingError("out of memory", "try -b 2"), 1, ["error: out of memory", "", "hint: try -b 2"]),
        (
            Preempted("the run was terminated", "vitprune sparsify ..."),
            143,
            [told, "", "hint: vitprune sweep with the same options and --resume resumes it"],
        ),
    ):
        monkeypatch.setattr("vitprune.jobs.sweep.run", lambda *args, error=error: _fail(error))
        assert run([*arguments, "--overwrite"]) == code
        assert capsys.readouterr().err.splitlines()[-3:] == lines


# Mistakes

MISTAKES = [
    (["--keep", "0,.5"], 2, "keep ratio is 0, expected a number in (0, 1]"),
    (["--keep", "1,.5"], 2, "1 is the dense model"),
    (["--keep", ".7,.70"], 2, "names 0.7 twice"),
    (["--keep", ".5,x"], 2, "--keep is '.5,x', expected numbers such as"),
    (["--also", "deit_smal"], 2, "model or file 'deit_smal' not found"),
    (["--also", "swin_tiny"], 2, "plain sequence of tokens"),
    (["--also", "a,,b"], 2, "--also is 'a,,b'"),
    (["--also", "a="], 2, "--also is 'a='"),
    (["--also", "deit_tiny,deit_tiny"], 2, "--also names 'deit_tiny' twice"),
    (["--also", "deit_tiny"], 1, "give a weight file that is already here: --also deit_tiny=FILE"),
    (["--also", "test_vit=absent.safetensors"], 2, "file 'absent.safetensors' not found"),
    (["--also", "test_vit=three.safetensors"], 2, "'test_vit' has 3 classes and test_vit"),
    (["--also", "large"], 2, "takes images of 3x192x192"),
    (["--also", "sparse"], 2, "is sparse, and --also is for dense models"),
    (["--resume"], 2, f"there is no run to resume in '{FOLDER}'"),
    (["-o", "there"], 2, "the output folder 'there' exists"),
]


def test_a_mistake_is_told_before_anything_is_trained_or_written(
    arguments, make_vit, make_sparse, tmp_path, capsys, no_hub
):
    for name in ("sparse", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "there" / "file").touch()
    save_file(make_vit(num_classes=3).state_dict(), tmp_path / "three.safetensors")
    save_for_hf(
        make_vit(num_classes=2, img_size=192), tmp_path / "large", model_args={"img_size": 192, "num_classes": 2}
    )
    sparse = make_sparse(num_classes=2)
    save(sparse, tmp_path / "sparse" / "model.safetensors", describe(sparse))
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    for options, code, message in MISTAKES:
        assert run([*arguments, *options]) == code, options
        out, err = capsys.readouterr()
        assert out == "", options
        assert message in err, options
        assert "training" not in err, options
    assert run(["sweep", "sparse/model.safetensors", "--data", "demo"]) == 2
    assert "was trained for one keep ratio" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
