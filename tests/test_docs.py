"""The README's commands run, its file map and its numbers of commands are true."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vitprune.cli.app import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
RUNNABLE = [line for line in LINES if line.startswith("vitprune") and "# needs:" not in line]
QUICK = ("vitprune env", "vitprune info deit_small --keep")


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[] if line.startswith(QUICK) else pytest.mark.slow) for line in RUNNABLE]
)
def test_readme_command_runs_offline(line, tmp_path, monkeypatch, capsys, no_hub):
    monkeypatch.chdir(tmp_path)
    assert run(shlex.split(line, comments=True)[1:]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", [line for line in LINES if "# needs:" in line])
def test_readme_command_with_needs_has_options_that_exist(line, tmp_path, monkeypatch, capsys, no_hub):
    """It stops at what it needs: images, weights, the network or a GPU; not at an option or a command."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)
    command, *arguments = words[words.index("vitprune") + 1 :]
    quick = {"bench": ["-b", "1"], "convert": [], "report": [], "push": []}.get(command, ["--limit", "1"])
    run([command, *arguments, *quick])
    error = capsys.readouterr().err
    assert "has no option" not in error
    assert "there is no command" not in error
    assert "does not know what to do" not in error
    assert "unexpected" not in error


def test_set_up_commands_are_the_promised_ones():
    assert LINES[0] == "pip install -e . && vitprune sparsify demo"
    assert 'pip install -e ".[dev]" && pytest' in LINES


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_is_done_within_a_point_of_dense(tmp_path):
    """The command of the first line, after the install, as a user runs it."""
    command = [sys.executable, "-c", "from vitprune.cli.app import main; main()", "sparsify", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["delta"]["top1_points"] >= -1.0
    assert report["coverage"]["sparse_pct"] > 90
    assert report["wall_s"] < 300, "two minutes on two idle cores; some room for a busy machine"


def test_file_map_names_every_module():
    block = re.search(r"```\nvitprune/\n(.*?)```", README, flags=re.DOTALL).group(1)
    named = set(re.findall(r"^  (\S+)", block, flags=re.MULTILINE))
    there = {
        entry.name + ("/" if entry.is_dir() else "")
        for entry in (ROOT / "vitprune").iterdir()
        if not entry.name.startswith("__pycache__") and (entry.is_dir() or entry.suffix == ".py")
    }
    assert named == there


def test_top_level_holds_nothing_unexpected():
    allowed = {"vitprune", "tests", "examples", "pyproject.toml", "README.md", "LICENSE", "runs", "dist"}
    there = {entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".")}
    assert there <= allowed
