"""Signals that end a run."""

import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from vitprune.common.stopping import Stopped, deferred, raising, stopped_error

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends signals")

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture(autouse=True)
def heeded(monkeypatch):
    """As of a command in the foreground, whatever the tests were started by."""
    before = {number: signal.getsignal(number) for number, _ in CODES}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_all_of_them_raise_as_ctrl_c_does(number, code):
    with pytest.raises(KeyboardInterrupt) as caught, raising():
        os.kill(os.getpid(), number)
    error = stopped_error(caught.value, " after 3 steps", "a hint")
    assert (error.exit_code, error.hint) == (code, "a hint")
    assert error.message.endswith("after 3 steps")
    assert signal.getsignal(number) is signal.default_int_handler


@pytest.mark.parametrize("number", [number for number, _ in CODES])
def test_the_first_is_noted_and_the_second_raises_at_once(number, capfd):
    reached = []
    with pytest.raises(Stopped) as caught, deferred("stopping\n") as signalled:  # noqa: PT012  where it raises
        assert signalled() == 0
        os.kill(os.getpid(), number)
        reached.append(signalled())
        os.kill(os.getpid(), number)
        reached.append("never")
    assert (reached, caught.value.number) == ([number], number)
    assert capfd.readouterr().err == "stopping\n"


def test_one_that_nobody_asked_for_is_not_lost():
    with pytest.raises(Stopped), deferred():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_launcher_that_repeats_it_does_not_cut_the_step_short(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    reached = []
    with pytest.raises(Stopped), deferred() as signalled:  # noqa: PT012  at its end
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        reached.append(signalled())
    assert reached == [signal.SIGINT]


class _Torn:
    done = False

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        _Torn.done = True


def test_one_that_comes_in_a_destructor_or_an_import_is_raised_after_it(tmp_path, monkeypatch):
    """There it would be lost, or leave half of a module."""
    (tmp_path / "half_a_module.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(0.1)\n    whole = True\n"
        "except BaseException:\n    whole = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for number, act in ((signal.SIGINT, _Torn), (signal.SIGTERM, lambda: importlib.import_module("half_a_module"))):
        with pytest.raises(Stopped) as caught, raising():  # noqa: PT012  some time later
            act()
            time.sleep(5)
        assert caught.value.number == number
    assert _Torn.done
    assert sys.modules["half_a_module"].whole


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with raising(), deferred() as signalled:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signalled() == 0


_HELD = """import torch
from PIL import Image
from vitprune.data import ImageSet, batches, make_loader
image = Image.new("RGB", (8, 8))
images = ImageSet(range(400), [0] * 400, lambda _: image, transform=lambda _: torch.zeros(1))
reading = batches(make_loader(images, 2, num_workers=2))
next(reading)
print("reads", flush=True)
raise KeyboardInterrupt
"""


def test_a_program_ends_though_it_still_holds_the_processes_that_read():
    """Python ends them by SIGTERM and waits: that one they must heed, though they leave others' to the program."""
    done = subprocess.run([sys.executable, "-c", _HELD], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "reads\n", done.stderr
    assert done.returncode == -signal.SIGINT
