"""Examples cannot drift: they run."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"train_loop.py", "train_demo_model.py"}


def _run(name, *arguments, cwd):
    command = [sys.executable, "-W", "error::UserWarning:vitprune", str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_own_training_loop_runs_and_saves(tmp_path):
    done = _run("train_loop.py", "--steps", "12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout.split("top-1 of the sparse model: ")[1].split(" %")[0])
    assert accuracy > 20, "chance is 10; with so few steps the predictors still rank poorly"
    assert (tmp_path / "runs" / "train_loop" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["train_loop.py", "train_demo_model.py"])
def test_examples_explain_themselves(name, tmp_path):
    done = _run(name, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "python examples/" in done.stdout
