"""The main job from the command line, on a tiny model and a folder of images."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import vitprune
from vitprune.cli.app import run
from vitprune.training.objective import Objective


@pytest.fixture
def arguments(weights_file, image_folder, quick_bench, monkeypatch, tmp_path):
    """A run of a few steps; its folders go to tmp_path/runs."""
    monkeypatch.chdir(tmp_path)
    return [
        *("sparsify", "test_vit", "--checkpoint", str(weights_file), "--data", str(image_folder)),
        *("--device", "cpu", "--precision", "fp32", "-b", "4", "-j", "0", "--warm-start-steps", "2", "--steps", "4"),
    ]


def test_run_leaves_checkpoint_report_log_and_summary(arguments, tmp_path, capsys):
    assert run([*arguments, "--keep", "0.5"]) == 0
    folder = tmp_path / "runs" / "test_vit-keep0.5"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "keepmaps.json",
        "log.jsonl",
        "model.safetensors",
        "report.html",
        "report.json",
    ]
    report = json.loads((folder / "report.json").read_text())
    assert {
        *("schema_version", "model", "keep", "stages", "dense", "sparse", "delta", "training", "data", "environment")
    } <= set(report)
    assert report["sparse"]["num_images"] == 6
    assert report["data"]["num_train_images"] == 12
    assert report["sparse"]["gmacs"] < report["dense"]["gmacs"]
    assert report["training"]["recipe"]["batch_size"] == 4
    assert report["training"]["phases"] == {"warm": 2, "sampled": 1, "deployed": 3}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"rank"} == set(lines[0]["losses"])

    out, err = capsys.readouterr()
    assert "top-1" in out
    assert "GMACs" in out
    assert "random tokens" in out
    assert "training" in err, "talk goes to stderr"
    assert str(tmp_path) not in (folder / "model.safetensors").read_bytes().decode("latin-1"), "no paths in the file"

    metadata = json.loads((folder / "config.json").read_text())
    assert metadata["accuracy"]["sparse"]["top1_pct"] == report["sparse"]["top1_pct"]
    assert metadata["training"]["completed"] is True

    assert sum(report["answers"].values()) == 6
    assert report["commands"]["sparsify"].startswith(
        "vitprune sparsify test_vit --checkpoint path/to/weights.safetensors"
    )
    page = (folder / "report.html").read_text()
    assert "data:image/jpeg" in page
    assert str(tmp_path) not in page
    assert str(tmp_path) not in (folder / "keepmaps.json").read_text()
    card = (folder / "README.md").read_text()
    assert f"| top-1 (%) | {report['dense']['top1_pct']:.2f} | {report['sparse']['top1_pct']:.2f} |" in card
    assert str(tmp_path) not in card
    before = [(folder / name).read_bytes() for name in ("report.html", "README.md")]
    assert run(["report", str(folder)]) == 0
    after = [(folder / name).read_bytes() for name in ("report.html", "README.md")]
    assert after == before, "made again they are the same"


def test_report_agrees_with_eval_of_the_file(arguments, image_folder, tmp_path, capsys):
    assert run([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    path = str(tmp_path / "runs" / "test_vit-keep0.7" / "model.safetensors")
    assert run(["eval", path, str(image_folder), "--device", "cpu", "-j", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for key in ("top1_pct", "top5_pct", "num_images"):
        assert result[key] == report["sparse"][key]


def test_second_run_gets_a_number_and_explicit_output_needs_overwrite(arguments, tmp_path, capsys):
    assert run(arguments) == 0
    assert run(arguments) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["test_vit-keep0.7", "test_vit-keep0.7-2"]
    assert run([*arguments, "-o", "mine"]) == 0
    before = (tmp_path / "mine" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert run([*arguments, "-o", "mine", "--seed", "1"]) == 1
    assert "the output folder 'mine' exists" in capsys.readouterr().err
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == before
    card = tmp_path / "mine" / "README.md"
    card.write_text("# My own words\n")
    assert run([*arguments, "-o", "mine", "--seed", "1", "--overwrite"]) == 0
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() != before
    assert card.read_text() == "# My own words\n"
    assert "is your own and was left as it is" in capsys.readouterr().err


def test_same_seed_same_file(arguments, tmp_path):
    assert run([*arguments, "-o", "one"]) == 0
    assert run([*arguments, "-o", "other"]) == 0
    one, other = (vitprune.load(tmp_path / name).state_dict() for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_labels_the_default_gives_the_same_file(arguments, tmp_path):
    """The default distils only, so what holds for it holds for any images."""
    assert run([*arguments, "-o", "one"]) == 0
    assert run([*arguments, "-o", "other", "--no-labels"]) == 0
    one, other = (vitprune.load(tmp_path / name).state_dict() for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_training_option_reaches_the_recipe(arguments, capsys):
    options = {
        "--lr": 2e-3,
        "--backbone-lr-scale": 0.2,
        "--freeze-epochs": 0.5,
        "--ce-weight": 0.1,
        "--ratio-weight": 0.2,
        "--kl-weight": 0.3,
        "--token-weight": 0.4,
        "--seed": 5,
    }
    extra = [text for option, value in options.items() for text in (option, str(value))]
    assert run([*arguments, *extra, "--recipe", "paper", "--stages", "2,4", "--limit", "5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    recipe = report["training"]["recipe"]
    assert recipe["weights"] == {"ce": 0.1, "ratio": 0.2, "kl": 0.3, "token": 0.4}
    assert (recipe["lr"], recipe["backbone_lr_scale"], recipe["freeze_epochs"]) == (2e-3, 0.2, 0.5)
    assert recipe["seed"] == 5
    assert [stage["block"] for stage in report["stages"]] == [2, 4]
    assert report["data"]["num_train_images"] == report["data"]["num_val_images"] == 5


def test_plan_options_reach_the_file(arguments, tmp_path, capsys):
    assert run([*arguments, "--ratios", ".8,.5", "--dropped", "drop", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["keep"], report["schedule"], report["dropped"]) == (None, None, "drop")
    assert [stage["ratio"] for stage in report["stages"]] == [0.8, 0.5]
    sparse = vitprune.load(tmp_path / "runs" / "test_vit-ratios0.8-0.5")
    assert sparse.schedule.ratios == (0.8, 0.5)
    assert sparse.dropped == "drop"
    assert run([*arguments, "--keep", "0.6", "--schedule", "geometric", "--align", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["schedule"], report["dropped"], report["align"]) == ("geometric", "fold", 8)
    sparse = vitprune.load(tmp_path / "runs" / "test_vit-keep0.6align8")
    assert (sparse.dropped, sparse.schedule.align) == ("fold", 8)
    assert all((1 + count) % 8 == 0 for count in sparse.schedule.num_tokens)


def test_a_recipe_of_your_own(arguments, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "decision: gumbel\nema_decay: 0.5\ndropped: drop\ntrain_trunk: true\n"
        "augmentation: {mixup: 0.8, cutmix: 1.0, smoothing: 0.1}\nweights: {ce: 1.0, token: 0.5}\n"
    )
    assert run([*arguments, "--recipe", "mine.yaml", "--kl-weight", "0.25", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    recipe = report["training"]["recipe"]
    assert (recipe["name"], recipe["decision"], recipe["ema_decay"]) == ("mine", "gumbel", 0.5)
    assert recipe["weights"] == {"ce": 1.0, "ratio": 2.0, "kl": 0.25, "token": 0.5}
    assert report["dropped"] == "drop"


def test_the_papers_recipe_runs(arguments, capsys):
    where = arguments.index("--warm-start-steps")
    del arguments[where : where + 2]
    assert run([*arguments, "--recipe", "paper", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["training"]["phases"] == {"sampled": 4}
    assert (report["schedule"], report["dropped"]) == ("geometric", "drop")


def test_no_labels_takes_any_folder(arguments, image_folder, capsys):
    arguments[arguments.index("--data") + 1] = str(image_folder / "train" / "cat")
    assert run(arguments) == 1
    assert "not in class folders" in capsys.readouterr().err
    assert run([*arguments, "--no-labels", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sparse"]["top1_pct"] is None
    assert 0 <= report["delta"]["agreement_pct"] <= 100


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (["--min-top1", "0"], 0),
        (["--min-top1", "100.5"], 3),
        (["--max-drop", "100"], 0),
        (["--max-drop", "-101"], 3),
        (["--min-speedup", "0.001"], 0),
        (["--min-speedup", "1000"], 3),
    ],
)
def test_limits_make_the_run_a_check(arguments, check, code, capsys, tmp_path):
    assert run([*arguments, *check]) == code
    assert (check[0] in capsys.readouterr().err) == (code == 3)
    assert (tmp_path / "runs" / "test_vit-keep0.7" / "report.json").is_file(), "the results are there all the same"


def test_interrupt_leaves_a_usable_checkpoint_and_says_where(arguments, tmp_path, monkeypatch, capsys):
    _interrupted_at(3, monkeypatch)
    assert run(arguments) == 130
    path = tmp_path / "runs" / "test_vit-keep0.7" / "model.safetensors"
    assert "stopped after 3 of 6 steps; the model so far is in runs/" in capsys.readouterr().err
    assert vitprune.load(path)(torch.zeros(1, 3, 160, 160)).shape == (1, 2)
    assert json.loads((path.parent / "config.json").read_text())["training"] == {
        "steps_done": 3,
        "num_steps": 6,
        "completed": False,
    }


def _interrupted_at(step, monkeypatch):
    real, calls = Objective.forward, iter(range(100))

    def forward(*args):
        if torch.is_grad_enabled() and next(calls) == step:  # without gradient it is no step
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Objective, "forward", forward)


@pytest.mark.parametrize("every", [[], ["--checkpoint-every", "2"]])
def test_an_interrupted_run_says_whether_it_can_go_on(arguments, monkeypatch, capsys, every):
    with monkeypatch.context() as once:
        _interrupted_at(3, once)
        assert run([*arguments, *every]) == 130
    err = capsys.readouterr().err
    assert ("the same command with --resume goes on after step 2" in err) == bool(every)
    assert run([*arguments, *every, "--resume"]) == 0
    err = capsys.readouterr().err
    assert ("holds no training checkpoint to go on from: the run begins anew" in err) == (not every)


def test_training_that_cannot_go_on_keeps_the_last_good_weights(arguments, tmp_path, monkeypatch, capsys):
    real = Objective.forward

    def forward(*args):
        loss = real(*args)
        return loss._replace(total=loss.total * float("inf"))

    monkeypatch.setattr(Objective, "forward", forward)
    assert run([*arguments, "--steps", "40"]) == 1
    assert "not finite for 20 steps in a row" in capsys.readouterr().err
    vitprune.load(tmp_path / "runs" / "test_vit-keep0.7")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT as a terminal does")
def test_real_ctrl_c_in_a_real_process(arguments, tmp_path):
    command = [sys.executable, "-c", "from vitprune.cli.app import main; main()", *arguments, "--steps", "100000"]
    # A shell's background jobs ignore SIGINT and hand that down; a terminal's foreground process does not.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        _interrupt_when_training(process, tmp_path / "runs" / "test_vit-keep0.7")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _interrupt_when_training(process, folder):
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") > 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: stopped after" in err
    assert "Traceback" not in err
    vitprune.load(log.parent)


def test_unreadable_images_are_skipped_named_and_counted(arguments, image_folder, capsys):
    victims = [image_folder / part / "dog" / "1.png" for part in ("train", "val")]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:50])
    assert run([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["training"]["unreadable"] == [str(victims[0])]
    assert report["training"]["num_unreadable"] >= 1
    assert report["data"]["unreadable_val"] == [str(victims[1])]
    assert report["data"]["num_unreadable_val"] == 1
    assert report["sparse"]["num_images"] == 5
    assert run([*arguments, "--overwrite"]) == 0
    assert f"1 unreadable image(s) were left out in the evaluation: {victims[1]}" in capsys.readouterr().out


def test_none_allowed_is_an_error_that_names_the_image(arguments, image_folder, capsys):
    victim = image_folder / "train" / "dog" / "3.png"
    victim.write_bytes(victim.read_bytes()[:50])
    assert run([*arguments, "--max-unreadable", "0"]) == 1
    assert f"cannot read image '{victim}'" in capsys.readouterr().err


def test_a_folder_of_broken_images_ends_at_once(arguments, image_folder, capsys):
    images = sorted((image_folder / "train").glob("*/*.png"))
    for victim in images:
        victim.write_bytes(b"no image")
    assert run(arguments) == 1
    assert "12 of 12 images could not be read" in capsys.readouterr().err
    assert run([*arguments, "--max-unreadable", "1", "--overwrite"]) == 1
    assert "none of the first 1000 images could be read" in capsys.readouterr().err


def test_demo_reports_object_coverage(quick_bench, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--warm-start-steps", "1", "--steps", "0", "--limit", "100", "--device", "cpu", "--json"]
    assert run(["sparsify", "demo", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "demo"
    assert report["coverage"]["random_pct"] == pytest.approx(26, abs=6), (
        "a quarter of the tokens, a quarter of the object"
    )
    assert 0 <= report["coverage"]["sparse_pct"] <= 100


# Resuming


def _start(arguments, *options):
    command = [sys.executable, "-m", "vitprune", *arguments, *options]
    # As many threads as in this process: sums of floats depend on how they are split.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _wait_for(process, path, lines):
    deadline = time.monotonic() + 120
    while not (path.is_file() and path.read_text().count("\n") >= lines):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_is_the_same_file(arguments, tmp_path, capsys, sent):
    steps = ["--steps", "60", "--checkpoint-every", "3", "--bench-seconds", "0.1"]
    assert run([*arguments, *steps, "-o", "undisturbed"]) == 0
    process = _start(arguments, *steps, "-o", "cut")
    _wait_for(process, tmp_path / "cut" / "log.jsonl", 12)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if sent == signal.SIGKILL else 143), err
    if sent == signal.SIGTERM:
        assert "error: the run was told to stop" in err
        assert "--resume" in err
    assert run([*arguments, *steps, "-o", "cut", "--resume"]) == 0
    capsys.readouterr()
    for name in ("undisturbed", "cut"):
        folder = tmp_path / name
        assert not (folder / "checkpoints").exists()
        steps_logged = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
        assert steps_logged == list(range(1, len(steps_logged) + 1))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("undisturbed", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_written_over_leaves_nothing_to_resume_from(arguments, tmp_path, monkeypatch):
    """Else its later checkpoints would win over the new run's, and its report would call the new run complete."""
    output = ["-o", str(tmp_path / "out")]
    assert run([*arguments, *output]) == 0
    checkpoints = tmp_path / "out" / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step-000009999.safetensors").write_bytes(b"of the old run")
    seen = []

    def stop(self, record):
        seen.append(sorted(path.name for path in (tmp_path / "out").glob("**/*") if path.is_file()))
        raise KeyboardInterrupt

    monkeypatch.setattr("vitprune.cli.progress.RunProgress.step", stop)
    assert run([*arguments, *output, "--overwrite"]) == 130
    assert "report.json" not in seen[0]
    assert "step-000009999.safetensors" not in seen[0]


def test_what_cannot_be_resumed_is_said(arguments, tmp_path, capsys):
    assert run([*arguments, "--resume"]) == 1
    assert "there is no run to resume in 'runs/test_vit-keep0.7'" in capsys.readouterr().err
    assert run([*arguments, "--resume", "--overwrite"]) == 2
    assert run(arguments) == 0
    assert run([*arguments, "--resume"]) == 1
    assert "is complete" in capsys.readouterr().err


def test_batch_size_auto_and_passes(arguments, tmp_path, capsys):
    assert run([*arguments[:-8], "-b", "auto", *arguments[-6:], "-o", "auto", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["training"]["recipe"]["grad_accum"] == "auto"
    assert report["training"]["recipe"]["batch_size"] == 32
    assert report["training"]["num_parts"] == 1
    assert run([*arguments, "--grad-accum", "2", "-o", "parts"]) == 0
    assert "in 2 passes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-b", "many"], "--batch-size is 'many'"),
        (["-b", "0"], "--batch-size is '0'"),
        (["-b", "auto", "--grad-accum", "2"], "leave out --grad-accum"),
    ],
)
def test_impossible_batch_sizes(arguments, tmp_path, capsys, options, words):
    assert run([*arguments, *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
