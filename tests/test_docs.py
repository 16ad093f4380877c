"""The commands of README, cookbook and results run or exist, and the file map is true."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from vitprune.cli.app import app, run
from vitprune.measure import benchmark

ROOT = Path(__file__).parent.parent
README, COOKBOOK, RESULTS = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "examples/README.md", "examples/RESULTS.md")
)


def _commands(text):
    """Lines of the bash blocks, those that go on with a backslash joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


LINES = [*_commands(README), *_commands(COOKBOOK)]
ELSEWHERE = "vitprune export demo --precision int8"  # export/test_int8.py runs it
RUNNABLE = [line for line in LINES if line.startswith("vitprune") and "# needs:" not in line]
RUNNABLE = [line for line in RUNNABLE if not line.startswith(ELSEWHERE)]
NEEDING = [line for line in LINES if "# needs:" in line]
MEASURED = [line for line in _commands(RESULTS) if line.startswith("vitprune")]
QUICK = ("vitprune env", "vitprune info deit_small --keep")


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[] if line.startswith(QUICK) else pytest.mark.slow) for line in RUNNABLE]
)
def test_readme_command_runs_offline(line, tmp_path, monkeypatch, capsys, no_hub):
    """On a part of the demo set, keep ratios searched in coarse steps: figures are tested elsewhere."""
    monkeypatch.setattr("vitprune.budget.gmacs.KEEP_STEPS", 50)
    quick = {"rounds": 2, "min_seconds": 0.01}
    monkeypatch.setattr("vitprune.measure.bound.benchmark", lambda *args, **given: benchmark(*args, **given | quick))
    monkeypatch.setattr("vitprune.data.demo._NUM_IMAGES", {"train": 100, "val": 40})
    monkeypatch.chdir(tmp_path)
    assert run(shlex.split(line, comments=True)[1:]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", [*NEEDING, *MEASURED])
def test_command_that_needs_something_has_options_that_exist(line):
    """Parsed, not run: images, weights, the network or a GPU are what it needs."""
    words = shlex.split(line, comments=True)
    name, *arguments = words[words.index("vitprune") + 1 :]
    command = typer.main.get_command(app).commands[name]
    with command.make_context(name, [word for word in arguments if word != "..."]):
        pass
    with pytest.raises(typer.exceptions.TyperException, match="No such option"):
        command.make_context(name, [*arguments, "--no-such-option"])


def test_set_up_commands_are_the_promised_ones():
    assert LINES[0] == "pip install -e . && vitprune sparsify demo"
    assert 'pip install -e ".[dev]" && pytest' in LINES


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_is_done_within_a_point_of_dense(tmp_path, monkeypatch, capsys):
    """The command of the first line, after the install."""
    monkeypatch.chdir(tmp_path)
    assert run(["sparsify", "demo", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "demo"
    assert report["delta"]["top1_points"] >= -1.0
    assert report["coverage"]["sparse_pct"] > 90
    share = "a quarter of the tokens, a quarter of the object"
    assert report["coverage"]["random_pct"] == pytest.approx(26, abs=6), share
    assert report["seconds"] < 300, "two minutes on two idle cores; some room for a busy machine"


def test_readme_is_short():
    assert len(README.split()) <= 900
    assert [line for line in README.splitlines() if len(line) > 100 and not line.startswith("|")] == []


def test_examples_that_are_named_exist():
    named = set(re.findall(r"examples/(\w+\.py)", README + COOKBOOK + RESULTS))
    assert named
    assert all((ROOT / "examples" / name).is_file() for name in named)


def test_file_map_names_every_module():
    block = re.search(r"```\nvitprune/\n(.*?)```", COOKBOOK, flags=re.DOTALL).group(1)
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
