"""stdout and stderr that cannot be written: closed, full, or without a reader."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="redirects as a shell of Unix does")

_TALKS = """import sys
from pathlib import Path
from vitprune.cli import app
from vitprune.cli.output import print_json, print_line, say

def talk(arguments, stopped):
    for number in range(1000):
        say(f"message {number}")
    Path("done").write_text(" ".join(arguments))
    for number in range(1000):
        print_line(f"line {number}")
    print_json({"a": 1})
    return 0

app._run = talk
app.main(sys.argv[1:])
"""


def _shell(tmp_path, redirected):
    """What a command says that does work, and talks a lot before and after it; `redirected` in a shell."""
    command = f'set -o pipefail; "{sys.executable}" -c "$CODE" {redirected}'
    environment = os.environ | {"CODE": _TALKS}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (tmp_path / "done").is_file(), "the work was lost"
    for word in ("Traceback", "Exception ignored", "bug in vitprune"):
        assert word not in done.stderr
    return done


@pytest.mark.parametrize(
    ("redirected", "code"),
    [
        ("2>&-", 0),
        ("2>/dev/full", 0),
        ("2> >(head -n 1 >head)", 0),
        (">&- 2>&-", 0),
        (">&-", 0),
        ("| head -n 1", 1),
        ("2>&1 | head -n 1", 1),
        (">/dev/full", 1),
        (">/dev/full 2>/dev/full", 1),
        ("<&- >&- 2>&-", 0),
    ],
)
def test_the_work_is_done_and_the_end_is_quiet_or_a_sentence(tmp_path, redirected, code):
    done = _shell(tmp_path, redirected)
    assert done.returncode == code
    if redirected == ">/dev/full":
        assert "error: cannot write to stdout: No space left on device\n" in done.stderr
    elif redirected == "| head -n 1":
        assert done.stdout == "line 0\n"
        assert "error" not in done.stderr


def test_a_closed_stream_does_not_lead_into_the_next_file(tmp_path):
    _shell(tmp_path, ">&- 2>&-")
    assert (tmp_path / "done").read_text() == ""


def test_a_pipe_that_does_not_wait_loses_nothing(tmp_path):
    """As a terminal's other program may set it: a write to the full pipe would be an error."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen([sys.executable, "-c", _TALKS], cwd=tmp_path, stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    with os.fdopen(reader) as file:
        out = file.read()
    assert process.wait() == 0
    assert [line for line in out.splitlines() if line.startswith("line")] == [f"line {n}" for n in range(1000)]


@pytest.mark.parametrize("arguments", ["--help", "--version", "sparsify --help"])
def test_help_too(tmp_path, arguments):
    for redirected, code in (("| head -n 1", (0, 1)), (">/dev/full", (1,)), (">&-", (0,))):
        done = subprocess.run(
            ["bash", "-c", f'set -o pipefail; "{sys.executable}" -m vitprune {arguments} {redirected}'],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in code, (redirected, done.stderr)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
