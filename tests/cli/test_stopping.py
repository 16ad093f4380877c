"""A run that is stopped, and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from finished_run import same_weights

import vitprune
from vitprune.cli.app import run
from vitprune.training.objective import Objective


def _interrupt():
    raise KeyboardInterrupt


def test_interrupted_and_resumed_is_the_same_file(finished, arguments, tmp_path, at_step, capsys):
    at_step(4, _interrupt)
    assert run([*arguments, "--checkpoint-every", "2"]) == 130
    err = capsys.readouterr().err
    assert "stopped after 3 of 6 steps; the model so far is in runs/" in err
    assert "the same command with --resume resumes after step 2" in err
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


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
def test_sigterm_ends_the_step_and_writes_a_checkpoint(arguments, tmp_path, at_step, capsys):
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(arguments) == 143
    err = capsys.readouterr().err
    assert "error: the run was terminated" in err
    assert "--resume" in err
    assert list((tmp_path / "runs" / "test_vit-keep0.7" / "checkpoints").glob("step-*4.safetensors"))


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
