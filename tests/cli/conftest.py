"""A terminal that keeps what was written to it, and one complete run."""

import io
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from vitprune.cli import output
from vitprune.cli.app import run
from vitprune.training.objective import Objective


class Screen(io.TextIOWrapper):
    """A terminal that keeps what was written to it."""

    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def isatty(self):
        return True

    def text(self):
        return self.buffer.getvalue().decode(self.encoding)

    def lines(self):
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self.text()).splitlines()


@pytest.fixture
def screen(monkeypatch):
    """`screen(columns, encoding, **environment)`: stdout and stderr as terminals of that width."""

    def make(columns=80, encoding="utf-8", **environment):
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", "COLUMNS": str(columns), **environment}.items():
            monkeypatch.setenv(name, value)
        out, err = Screen(encoding), Screen(encoding)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        output.prepare(quiet=False)
        return out, err

    return make


@pytest.fixture(autouse=True)
def not_quiet():
    yield
    output._quiet = False


@pytest.fixture(scope="session")
def finished(make_vit, make_image_folder, tmp_path_factory):
    """One run of six steps on 12 + 6 images of cats and dogs; it misses --min-top1.

    Attributes: `root`, where it was begun, `folder`, its `arguments` (without the checks), `code`, `out` and `err`.
    """
    root = tmp_path_factory.mktemp("finished")
    make_image_folder(root / "images")
    save_file(make_vit(num_classes=2).state_dict(), root / "weights.safetensors")
    arguments = [
        *("sparsify", "test_vit", "--checkpoint", str(root / "weights.safetensors"), "--data", str(root / "images")),
        *("--device", "cpu", "--precision", "fp32", "-j", "0", "-b", "4", "--pretraining-steps", "2", "--steps", "4"),
    ]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(root)
        code = run([*arguments, "--min-top1", "100.5", "--max-drop", "100"])
    folder = root / Path("runs/test_vit-keep0.7")
    return SimpleNamespace(
        root=root, folder=folder, arguments=arguments, code=code, out=out.getvalue(), err=err.getvalue()
    )


@pytest.fixture
def arguments(finished, monkeypatch, tmp_path):
    """The arguments of the finished run; others' folders go to tmp_path/runs."""
    monkeypatch.chdir(tmp_path)
    return finished.arguments


@pytest.fixture
def images(finished, tmp_path):
    """A copy of its images, to be spoilt."""
    return shutil.copytree(finished.root / "images", tmp_path / "images")


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(step, action)`: once, in training, `action()` is called in the forward pass of that step, from 1."""

    def patch(step, action):
        real, steps = Objective.forward, iter(range(1, 1000))

        def forward(*args):
            if torch.is_grad_enabled() and next(steps) == step:  # without gradient it is no step
                action()
            return real(*args)

        monkeypatch.setattr(Objective, "forward", forward)

    return patch


@pytest.fixture
def unsearched(monkeypatch):
    """Keep 0.7 and as many merges as there can be, whatever they cost: the search takes most of a comparison's time."""
    monkeypatch.setattr("vitprune.jobs.compare.keep_within", lambda *args: 0.7)
    monkeypatch.setattr("vitprune.jobs.compare.last_within", lambda budget, cost, low, high: low)
