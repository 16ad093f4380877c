"""The main job from the command line, on a tiny model and a folder of images."""

import json
import re
import shutil
from pathlib import Path

import pytest
import typer
from finished_run import same_weights

import vitprune
from vitprune.checkpoint.sparse_file import read_metadata
from vitprune.cli.app import run
from vitprune.cli.output import Check, enforce
from vitprune.cli.progress import RunProgress
from vitprune.cli.training_options import chosen_recipe

# A complete run


def test_run_writes_checkpoint_report_log_and_summary(finished):
    folder = finished.folder
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "config.json", "keepmaps.json", "log.jsonl", "model.safetensors", "report.html", "report.json")
    ]
    report = json.loads((folder / "report.json").read_text())
    assert {
        *("schema_version", "model", "keep", "stages", "dense", "sparse", "delta", "training", "data", "environment")
    } <= set(report)
    assert report["sparse"]["num_images"] == 6
    assert report["data"]["num_train_images"] == 12
    assert report["sparse"]["gmacs"] < report["dense"]["gmacs"]
    assert report["training"]["recipe"]["batch_size"] == 4
    assert report["training"]["phases"] == {"pretraining": 2, "deployed": 4}
    assert sum(report["correct"].values()) == 6
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"rank"} == set(lines[0]["losses"])
    for said in ("top-1", "GMACs", "random baseline"):
        assert said in finished.out
    assert "training" in finished.err, "messages go to stderr"
    metadata = json.loads((folder / "config.json").read_text())
    assert metadata["accuracy"]["sparse"]["top1_pct"] == report["sparse"]["top1_pct"]
    assert metadata["training"]["completed"] is True
    assert finished.code == 3
    assert "--min-top1: missed" in finished.err
    assert "--max-drop" not in finished.err


def test_run_names_no_path_of_this_machine(finished):
    report = json.loads((finished.folder / "report.json").read_text())
    assert report["commands"]["sparsify"].startswith(
        "vitprune sparsify test_vit --checkpoint path/to/weights.safetensors --data path/to/images"
    )
    for name in ("model.safetensors", "report.html", "keepmaps.json", "README.md"):
        assert str(finished.root).encode() not in (finished.folder / name).read_bytes()
    assert "data:image/jpeg" in (finished.folder / "report.html").read_text()
    card = (finished.folder / "README.md").read_text()
    assert f"| top-1 (%) | {report['dense']['top1_pct']:.2f} | {report['sparse']['top1_pct']:.2f} |" in card


def test_drawn_again_page_and_card_are_the_same(finished, tmp_path):
    again = shutil.copytree(finished.folder, tmp_path / "again")
    assert run(["report", str(again)]) == 0
    for name in ("report.html", "README.md"):
        assert (again / name).read_bytes() == (finished.folder / name).read_bytes()


def test_report_agrees_with_eval_of_the_file(finished, capsys):
    options = ["--device", "cpu", "-j", "0", "--json"]
    assert run(["eval", str(finished.folder / "model.safetensors"), str(finished.root / "images"), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    report = json.loads((finished.folder / "report.json").read_text())
    for key in ("top1_pct", "top5_pct", "num_images"):
        assert result[key] == report["sparse"][key]


def test_limits(capsys):
    enforce([Check("--min-top1", 80.0, 80.0), Check("--max-drop", None, None), Check("--min-speedup", 1.0, None)])
    assert capsys.readouterr().err == ""
    for checks, said in (
        ([("--min-top1", 79.9, 80.0)], "--min-top1: missed, measured 79.900, at least 80 was asked for"),
        ([("--max-drop (as change of top-1)", -0.6, -0.5)], "measured -0.600, at least -0.5"),
        ([("--min-speedup", 2.0, 1.5), ("--min-top1", None, 80.0)], "the images have no labels"),
    ):
        with pytest.raises(typer.Exit) as exit_:
            enforce([Check(*each) for each in checks])
        assert exit_.value.exit_code == 3
        assert said in capsys.readouterr().err


def test_images_without_labels_into_an_existing_output_on_request(
    finished, arguments, images, tmp_path, monkeypatch, capsys
):
    """What the old run wrote must not be taken for the new one's."""
    mine = shutil.copytree(finished.folder, tmp_path / "mine")
    loose = (images / "train" / "cat").rename(tmp_path / "loose")
    arguments = [*arguments, "--data", str(loose), "-o", "mine"]
    assert run(arguments) == 2
    assert "the output folder 'mine' exists" in capsys.readouterr().err
    assert run([*arguments, "--overwrite"]) == 1
    assert "not in class folders" in capsys.readouterr().err
    (mine / "README.md").write_text("# My own words\n")
    (mine / "checkpoints").mkdir()
    (mine / "checkpoints" / "step-000009999.safetensors").write_bytes(b"of the old run")
    seen = []
    step = RunProgress.step
    monkeypatch.setattr(RunProgress, "step", lambda *given: (seen.append({*mine.rglob("*")}), step(*given)))
    (mine / "checkpoints" / "best.ckpt").write_bytes(b"mine")
    assert run([*arguments, "--no-labels", "--overwrite", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["sparse"]["top1_pct"] is None
    assert 0 <= report["delta"]["agreement_pct"] <= 100
    assert mine / "report.json" not in seen[0]
    assert mine / "checkpoints" / "step-000009999.safetensors" not in seen[0]
    assert not same_weights(mine, finished.folder)
    assert (mine / "README.md").read_text() == "# My own words\n"
    assert "'mine/README.md' exists and is kept as it is" in err
    assert (mine / "checkpoints" / "best.ckpt").read_bytes() == b"mine"
    assert "'mine/checkpoints/best.ckpt' is not of vitprune and stays" in err


def test_an_output_that_cannot_be_written_is_found_before_anything_is_loaded(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("vitprune.loading.load.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    for arguments in (
        *(["sparsify", "demo", "-o", "file/run", *more] for more in ([], ["--dry-run"], ["--target-speedup", "1.2"])),
        ["sweep", "demo", "-o", "file/run"],
        ["visualize", "run", "-o", "file/run"],
        *([*command, "-o", "file/x.json"] for command in (["compare", "demo"], ["predict", "demo", "file"])),
        ["report", str(finished.folder), "-o", "absent/x.html"],
    ):
        monkeypatch.chdir(tmp_path)
        assert run(arguments) in (1, 2), arguments
        assert re.match("error: (cannot write 'file/|there is no folder '(file|absent)')", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Options


def test_recipe_takes_options_and_settings():
    changes = ["lr=2e-3", "backbone_lr_scale=0.2", "weights.kl=0.3", "clip_grad=null", "augmentation.mixup=0.8"]
    recipe = chosen_recipe("test_vit", "paper", {"seed": 5, "steps": 7, "labels": None}, changes)
    assert (recipe.name, recipe.seed, recipe.steps, recipe.labels) == ("paper", 5, 7, True)
    assert (recipe.lr, recipe.backbone_lr_scale, recipe.clip_grad) == (2e-3, 0.2, None)
    assert (recipe.weights.kl, recipe.augmentation.mixup) == (0.3, 0.8)
    assert chosen_recipe("demo", "short", {}, []).steps == 20
    assert chosen_recipe("demo", "short", {"epochs": 2}, []).steps is None
    assert chosen_recipe("demo", "short", {}, ["epochs=2"]).epochs == 2


def test_paper_recipe_with_other_settings_and_plan(arguments, tmp_path, capsys):
    changed = ["--set", "weights.ratio=0.2", "--set", "weights.ce=0.1", "--pretraining-steps", "0"]
    plan = ["--keep", "0.6", "--prune-at", "2,4", "--align", "8", "--limit", "5", "--seed", "5"]
    plan += ["--grad-accum-steps", "2"]
    assert run([*arguments, "--recipe", "paper", *changed, *plan]) == 0
    assert "in 2 passes" in capsys.readouterr().out
    folder = tmp_path / "runs" / "test_vit-keep0.6align8"
    report = json.loads((folder / "report.json").read_text())
    recipe = report["training"]["recipe"]
    assert (recipe["weights"]["ratio"], recipe["weights"]["ce"], recipe["seed"]) == (0.2, 0.1, 5)
    assert report["training"]["phases"] == {"sampled": 4}
    assert (report["schedule"], report["pruned"], report["align"]) == ("geometric", "drop", 8)
    assert report["data"]["num_train_images"] == report["data"]["num_val_images"] == 5
    sparse = vitprune.load(folder)
    assert (sparse.pruned, sparse.schedule.align, sparse.schedule.blocks) == ("drop", 8, (2, 4))
    assert all((1 + count) % 8 == 0 for count in sparse.schedule.num_tokens)


def test_a_recipe_of_your_own_with_free_ratios_and_unreadable_images(arguments, images, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "deployed_share: 0.5\nema_decay: 0.5\npruned: drop\ntrain_trunk: true\n"
        "augmentation: {mixup: 0.8, cutmix: 1.0, smoothing: 0.1}\nweights: {ce: 1.0, token: 0.5}\n"
    )
    victims = [images / part / "dog" / "1.png" for part in ("train", "val")]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:50])
    arguments = [*arguments, "--data", str(images)]
    assert run([*arguments, "--set", "max_unreadable=0"]) == 1
    assert f"cannot read image '{victims[0]}'" in capsys.readouterr().err
    options = ["--recipe", "mine.yaml", "--set", "weights.kl=0.25", "--tokens-left", ".8,.5", "-b", "auto"]
    assert run([*arguments, *options]) == 0
    assert f"1 unreadable image(s) were left out in the evaluation: {victims[1]}" in capsys.readouterr().out
    folder = tmp_path / "runs" / "test_vit-ratios0.8-0.5"
    report = json.loads((folder / "report.json").read_text())
    training, recipe = report["training"], report["training"]["recipe"]
    assert (recipe["name"], recipe["deployed_share"], recipe["ema_decay"]) == ("mine", 0.5, 0.5)
    assert recipe["weights"] == {"ce": 1.0, "ratio": 2.0, "kl": 0.25, "pooled": 0.5, "token": 0.5}
    assert (recipe["grad_accum"], recipe["batch_size"], training["num_microbatches"]) == ("auto", 32, 1)
    assert (training["unreadable"], training["num_unreadable"] >= 1) == ([str(victims[0])], True)
    assert (report["data"]["unreadable_val"], report["data"]["num_unreadable_val"]) == ([str(victims[1])], 1)
    assert report["sparse"]["num_images"] == 5
    assert (report["keep"], report["schedule"], report["pruned"]) == (None, None, "drop")
    sparse = vitprune.load(folder)
    assert (sparse.schedule.ratios, sparse.pruned) == ((0.8, 0.5), "drop")


# Images


def test_a_dry_run_checks_estimates_and_writes_nothing(arguments, tmp_path, capsys):
    assert run([*arguments, "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_steps"], result["num_train_images"], result["num_val_images"]) == (6, 12, 6)
    assert result["seconds"] > 0
    assert result["sparse"]["gmacs"] < result["dense"]["gmacs"]
    assert result["peak_memory_mib"] > 10
    assert run([*arguments, "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert run([*arguments, "--dry-run", "--data", "nowhere"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_measured_as_asked_and_own_preprocessing_travels(arguments, capsys):
    how = ["--eval-precision", "bf16", "--bench-batch-sizes", "2,1", "--bench-seconds", "0", "--json"]
    prepared = ["--mean", ".4,.5,.6", "--std", ".2,.2,.2", "--crop-pct", "1", "--interpolation", "nearest"]
    assert run([*arguments, *how, *prepared, "--min-speedup", "1000"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["precision"] == "bf16"
    assert [row["batch_size"] for row in report["sparse"]["speed"]] == [1, 2]
    about = json.loads(Path("runs/test_vit-keep0.7/config.json").read_text())["preprocessing"]
    assert (about["mean"], about["std"]) == ([0.4, 0.5, 0.6], [0.2, 0.2, 0.2])
    assert (about["crop_pct"], about["interpolation"]) == (1.0, "nearest")


def test_a_folder_of_broken_images_ends_at_once(arguments, images, capsys):
    for victim in (images / "train").glob("*/*.png"):
        victim.write_bytes(b"no image")
    arguments = [*arguments, "--data", str(images)]
    assert run(arguments) == 1
    assert "12 of 12 images could not be read" in capsys.readouterr().err
    assert run([*arguments, "--set", "max_unreadable=1", "--overwrite"]) == 1
    assert "none of 1000 images could be read: the first is" in capsys.readouterr().err


def test_names_travel_in_the_file_and_come_back(finished, images, capsys):
    report = json.loads((finished.folder / "report.json").read_text())
    assert [(row["index"], row["name"], row["num_images"]) for row in report["classes"]] == [
        (0, "cat", 3),
        (1, "dog", 3),
    ]
    assert read_metadata(finished.folder / "model.safetensors").class_names == ["cat", "dog"]

    # One class alone: only the names in the file say that it is the second.
    shutil.rmtree(images / "val" / "cat")
    command = ["eval", str(finished.folder), str(images / "val"), "-j", "0"]
    assert run([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["index"], row["name"]) for row in result["classes"]] == [(1, "dog")]
    assert run([*command, "--per-class"]) == 0
    assert "dog" in capsys.readouterr().out


def test_a_folder_with_another_class_is_refused_with_both_sides(finished, images, capsys):
    (images / "val" / "dog").rename(images / "val" / "wolf")
    assert run(["eval", str(finished.folder), str(images), "-j", "0"]) != 0
    error = capsys.readouterr().err
    assert "cat, dog" in error
    assert "cat, wolf" in error


def test_eval_refuses_unreadable_images_unless_told(finished, images, capsys):
    victim = images / "val" / "dog" / "1.png"
    victim.write_bytes(b"no image")
    weights = ["--checkpoint", str(finished.root / "weights.safetensors")]
    command = ["eval", "test_vit", str(images), *weights, "--device", "cpu", "-j", "0"]
    assert run(command) == 1
    assert f"cannot read image '{victim}'" in capsys.readouterr().err
    assert run([*command, "--skip-unreadable", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_images"], result["num_unreadable"], result["unreadable"]) == (5, 1, [str(victim)])
    assert run([*command, "--skip-unreadable"]) == 0
    assert "1 unreadable image(s) were left out" in capsys.readouterr().out
