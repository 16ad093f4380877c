"""A run that is stopped, and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finished_run import same_weights
from safetensors.torch import save_file

import vitprune
from vitprune.budget.speed import Prediction, Speed, SpeedTarget
from vitprune.cli.app import run
from vitprune.errors import DataError
from vitprune.schedule import Sparsity
from vitprune.training.objective import Objective


def _interrupt():
    raise KeyboardInterrupt


def test_interrupted_and_resumed_is_the_same_file(finished, arguments, tmp_path, at_step, capsys):
    at_step(4, _interrupt)
    assert run([*arguments, "--checkpoint-every", "2"]) == 130
    err = capsys.readouterr().err
    assert "stopped after 3 of 6 steps; the model so far is in runs/" in err
    assert "the same command with --resume resumes after step 2" in err, "raised in the middle of a step"
    folder = tmp_path / "runs" / "test_vit-keep0.7"
    assert vitprune.load(folder)(torch.zeros(1, 3, 160, 160)).shape == (1, 2)
    assert json.loads((folder / "config.json").read_text())["training"] == {
        "steps_done": 3,
        "num_steps": 6,
        "completed": False,
    }
    assert run([*arguments, "--checkpoint-every", "2", "--resume"]) == 0
    assert same_weights(folder, finished.folder)
    assert not (folder / "checkpoints").exists()
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert run([*arguments, "--resume"]) == 2
    assert "is complete" in capsys.readouterr().err


def test_without_a_checkpoint_the_run_begins_anew(arguments, at_step, capsys):
    assert run([*arguments, "--resume"]) == 2
    assert "there is no run to resume in 'runs/test_vit-keep0.7'" in capsys.readouterr().err
    at_step(2, _interrupt)
    assert run(arguments) == 130
    assert "--resume" not in capsys.readouterr().err
    at_step(2, _interrupt)
    assert run([*arguments, "--resume"]) == 130
    assert "holds no training checkpoint to resume from: the run starts over" in capsys.readouterr().err


@pytest.fixture
def signals():
    """As of a command in the foreground, whatever the tests were started by."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


FOLDER = "runs/test_vit-keep0.7"


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize(
    ("sent", "code", "word"),
    [
        ("SIGINT", 130, "stopped"),
        ("SIGTERM", 143, "the run was terminated"),
        ("SIGHUP", 129, "its terminal was closed"),
    ],
)
def test_a_signal_ends_the_step_and_tells_what_there_is(signals, arguments, at_step, capsys, sent, code, word):
    at_step(4, lambda: os.kill(os.getpid(), getattr(signal, sent)))
    assert run([*arguments, "--json"]) == code
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert f"error: {told['error']}\n" in err
    assert word in told["error"]
    assert "after 4 of 6 steps; the model so far is in runs/test_vit-keep0.7/model.safetensors" in told["error"]
    assert told["hint"].startswith("the same command with --resume resumes after step 4;")
    assert told["saved"] == {"output": FOLDER, "steps_done": 4, "num_steps": 6, "resumes_after_step": 4}
    assert [path.name for path in Path(FOLDER, "checkpoints").iterdir()] == ["step-000000004.safetensors"]
    vitprune.load(FOLDER)


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
def test_twice_it_ends_at_once(signals, arguments, at_step, capsys):
    at_step(4, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert run([*arguments, "--json"]) == 130
    told = json.loads(capsys.readouterr().out)
    assert told["error"].startswith("stopped after 3 of 6 steps")
    assert told["saved"]["resumes_after_step"] is None


def test_before_the_first_step_nothing_is_left(arguments, at_step, capsys):
    at_step(1, _interrupt)
    assert run([*arguments, "--json"]) == 130
    told = json.loads(capsys.readouterr().out)
    assert told["error"] == "stopped before the first training step; nothing was saved"
    assert "saved" not in told
    assert not Path(FOLDER).exists()


@pytest.mark.parametrize("where", ["evaluate", "bench", "write_results"])
def test_after_training_it_tells_where_the_model_is_and_resumes(finished, arguments, monkeypatch, capsys, where):
    with monkeypatch.context() as patch:
        patch.setattr(f"vitprune.jobs.sparsify.{where}", lambda *_, **__: _interrupt())
        assert run([*arguments, "--json"]) == 130
    told = json.loads(capsys.readouterr().out)
    assert told["error"] == (
        f"stopped after training, before the report was whole; the trained model is in {FOLDER}/model.safetensors"
    )
    assert told["hint"] == "the same command with --resume measures it and writes the report"
    assert told["saved"] == {"output": FOLDER, "steps_done": 6, "num_steps": 6, "resumes_after_step": 6}
    assert run([*arguments, "--resume"]) == 0
    assert same_weights(Path(FOLDER), finished.folder)
    assert not Path(FOLDER, "checkpoints").exists()


def test_an_error_after_training_tells_where_the_model_is(arguments, monkeypatch, capsys):
    def fail(*_, **__):
        raise DataError("an image vanished", "put it back")

    monkeypatch.setattr("vitprune.jobs.sparsify.evaluate", fail)
    assert run([*arguments, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["error"] == "an image vanished"
    assert told["hint"] == (
        f"put it back; the trained model is in {FOLDER}/model.safetensors; "
        "the same command with --resume measures it and writes the report"
    )


def test_with_a_target_it_tells_what_to_resume_with(arguments, at_step, monkeypatch, capsys):
    plan = replace(Sparsity(0.625), prune_at=(2, 4)), Prediction(SpeedTarget(1.2, None, 32, "fp32"), Speed(6.0, 5.0))
    monkeypatch.setattr("vitprune.budget.resolve.find_plan", lambda *_: plan)
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run([*arguments, "--target-speedup", "1.2", "--json"]) == 143
    told = json.loads(capsys.readouterr().out)
    assert told["hint"].startswith(
        "the same command with --keep 0.625 --prune-at 2,4 in place of the target, and --resume, resumes after step 4"
    )
    assert run([*arguments, "--keep", "0.625", "--prune-at", "2,4", "--resume"]) == 0


def test_another_command_that_is_stopped_says_so(arguments, monkeypatch, capsys):
    monkeypatch.setattr("vitprune.loading.load.load_model", lambda *_, **__: _interrupt())
    for command in (["eval", "demo"], ["sweep", "demo"], ["compare", "demo"]):
        assert run([*command, "--json"]) == 130
        assert json.loads(capsys.readouterr().out)["error"] == "stopped; nothing was written"


def test_what_comes_before_the_command_line_is_there_is_told_too(capsys):
    assert run(["eval", "demo", "--json"], KeyboardInterrupt()) == 130
    assert json.loads(capsys.readouterr().out)["error"] == "stopped; nothing was written"


# What a run is resumed with


@pytest.fixture
def cut(arguments, at_step):
    """Arguments of a run that was stopped after three steps, in the folder `cut`."""
    arguments = [*arguments, "-o", "cut", "--checkpoint-every", "2"]
    at_step(4, _interrupt)
    assert run(arguments) == 130
    return arguments


def test_other_weights_images_or_settings_are_refused_by_name(cut, finished, images, make_vit, tmp_path, capsys):
    before = {path: path.read_bytes() for path in Path("cut").rglob("*") if path.is_file()}
    save_file(make_vit(num_classes=2, seed=3).state_dict(), tmp_path / "other.safetensors")
    (images / "train" / "cat" / "0.png").unlink()
    (images / "val" / "cat" / "0.png").write_bytes((images / "val" / "dog" / "0.png").read_bytes() + b"x")
    capsys.readouterr()
    for more, *said in (
        (["--checkpoint", str(tmp_path / "other.safetensors")], "model weights is '"),
        (["--data", str(images)], "training images is '12 images (", "there, '11 images (", "validation images is '6"),
        (["--limit", "4"], "training images is '12 images", "'4 images"),
        (["--mean", ".1,.2,.3"], "preprocessing is {", "'mean': [0.1, 0.2, 0.3]"),
        (["--set", "lr=0.1"], "lr is ", ", 0.1 now"),
        (["--keep", "0.6"], "keep is 0.7 there, 0.6 now"),
        (["--pruned", "drop"], "pruned is 'merge' there, 'drop' now"),
    ):
        arguments = [*cut, *more]
        for option in {*more} & {"--checkpoint", "--data"}:  # given once
            at = cut.index(option)
            arguments = [*cut[:at], *cut[at + 2 :], *more]
        assert run([*arguments, "--resume"]) == 2, more
        err = capsys.readouterr().err
        assert "error: the run in 'cut' has other settings: " in err
        assert "or start over with --overwrite" in err
        for words in said:
            assert words in err, (more, err)
    assert {path: path.read_bytes() for path in Path("cut").rglob("*") if path.is_file()} == before


def test_images_that_have_moved_and_what_changes_no_result_go_on(cut, finished, tmp_path):
    moved = shutil.copytree(finished.root / "images", tmp_path / "elsewhere")
    at = cut.index("--data")
    arguments = [*cut[:at], *cut[at + 2 :], "--data", str(moved), "--bench-batch-sizes", "2", "--grad-accum-steps", "1"]
    assert run([*arguments, "--resume"]) == 0
    assert same_weights(tmp_path / "cut", finished.folder)
    assert json.loads(Path("cut/report.json").read_text())["training"]["identity"]["model weights"]


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
@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_in_a_process_of_its_own_and_resumed(finished, arguments, tmp_path, sent, code):
    more = [*arguments, "--checkpoint-every", "2", "-o", "cut"]
    # As many threads as here, for sums of floats depend on how they are split, and a pause at every step. A shell's
    # background jobs ignore SIGINT and hand that down; a terminal's foreground process does not.
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOWED, *more],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "cut" / "log.jsonl"
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert run([*more, "--resume"]) == 0
    assert same_weights(tmp_path / "cut", finished.folder)


@pytest.mark.slow
def test_sigterm_to_the_whole_group_leaves_a_checkpoint(arguments, tmp_path):
    """As Slurm and `timeout` send it: to the processes that read images too."""
    index = arguments.index("-j")
    command = [*arguments[:index], "-j", "2", *arguments[index + 2 :], "--steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vitprune", *command], cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE
    )
    log = tmp_path / "runs" / "test_vit-keep0.7" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) > 4):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert b"the run was terminated" in err
    assert list((log.parent / "checkpoints").iterdir())


_SLOWED = """import time
from vitprune.cli.app import main
from vitprune.cli.progress import RunProgress
step = RunProgress.step
RunProgress.step = lambda *given: (step(*given), time.sleep(0.5))
main()
"""
