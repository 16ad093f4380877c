"""Help, completion, and hints."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import timm
import typer

from vitprune.backbones.registry import ADAPTERS
from vitprune.cli import completion
from vitprune.cli.app import app, renamed, run
from vitprune.common.formatting import close_match
from vitprune.training.recipe import load_recipe

PROGRAM = typer.main.get_command(app)
EXAMPLES = [
    (name, line.strip())
    for name, command in PROGRAM.commands.items()
    for line in command.help.splitlines()
    if line.startswith("vitprune ")
]


def _process(code, **environment):
    """What a process of its own prints; it must not have imported torch."""
    code = f"import sys\nfrom vitprune.cli.app import main, run\n{code}\nassert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | environment, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(environment.get("PYTHONIOENCODING", "utf-8")), done.stderr.decode("utf-8", "replace")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_help_text_shows_examples_and_loads_no_torch(encoding):
    code = f"for name in [[], *([each] for each in {list(PROGRAM.commands)})]:\n"
    code += "    assert run([*name, '--help']) == 0\n    print('===')"
    out, _ = _process(code, PYTHONIOENCODING=encoding, PYTHONUTF8="0", COLUMNS="80")
    pages = dict(zip(["", *PROGRAM.commands], out.split("===\n"), strict=False))
    for name, page in pages.items():
        assert f"Usage: vitprune {name}".rstrip() in page
        assert re.search(rf"Examples:\s+vitprune {name}", page), name
        assert max(map(len, page.splitlines())) <= 80
    for said in ("--output", "-o", "DIR", "runs/<model>-keep<r>", "geometric|late", "--set"):
        assert said in pages["sparsify"]
    assert "--quiet" in pages[""]


def test_examples_parse():
    assert {name for name, _ in EXAMPLES} == set(PROGRAM.commands)
    for command, line in EXAMPLES:
        words = shlex.split(line)
        assert words[1] == command
        PROGRAM.commands[command].make_context(command, words[2:])  # up to running
    with pytest.raises(Exception, match="--kepe"):
        PROGRAM.commands["info"].make_context("info", ["demo", "--kepe", "1"])


def test_the_defaults_that_help_shows_are_the_recipes():
    recipe = load_recipe("short")
    values = {"seed": recipe.seed, "batch_size": recipe.batch_size, "grad_accum": recipe.grad_accum}
    values |= {"pretraining_steps": recipe.pretraining_steps, "steps": recipe.num_steps(None)}
    values |= {"token_schedule": recipe.token_schedule, "pruned": recipe.pruned, "keep": recipe.plan_defaults.keep}
    command = typer.main.get_command(app).commands["sparsify"]
    shown = {parameter.name: parameter.show_default for parameter in command.params}
    assert {name: shown[name] for name in values} == {name: str(value) for name, value in values.items()}
    assert not any("recipe" in str(default) for default in shown.values())


def test_the_first_panel_of_sparsify_fits_one_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["sparsify", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(i for i, line in enumerate(lines) if "Pruning plan" in line) <= 50


def test_without_a_command_there_is_help(capsys):
    assert run([]) == 2
    out, err = capsys.readouterr()
    assert "Commands" in out
    assert err == ""


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vitprune 0.")


# Completion


def test_shell_is_offered_commands_models_and_values():
    lines = ["vitprune sp", "vitprune sparsify deit_sm", "vitprune info demo --token-schedule "]
    code = f"""import os, json
for line in {lines}:
    os.environ |= {{"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}}
    try: main([])
    except SystemExit: print("===")"""
    out, err = _process(code, _VITPRUNE_COMPLETE="complete_bash")
    commands, models, schedules = (part.split() for part in out.split("===\n")[:3])
    assert err == ""
    assert commands == ["sparsify"]
    assert "deit_small_patch16_224" in models
    assert schedules == ["geometric", "late"]


def test_completed_models_are_supported():
    homes = {adapted.__module__ for adapted in ADAPTERS}
    assert {f"timm.models.{family}" for family in completion._FAMILIES} <= homes
    assert set(timm.list_models("deit*", module="deit")) <= {*completion.model("deit")}
    assert completion.data("im") == ["imagenet", "imagenette"]


# Names


def test_close_match_knows_beginnings_and_slips():
    assert close_match("lat", ["geometric", "late"]) == "late"
    assert close_match("SHORT", ["short", "paper"]) == "short"
    assert close_match("zzz", ["short", "paper"]) is None
    assert close_match("", ["short"]) is None


def test_old_names_still_work_and_say_the_new_ones(capsys, no_hub):
    old = ["--stages", "2,4", "--schedule=geometric", "--dropped", "fold", "--keep", "0.5"]
    new = ["--prune-at", "2,4", "--token-schedule", "geometric", "--pruned", "merge", "--keep", "0.5"]
    assert run(["info", "test_vit", *new, "--json"]) == 0
    plan, err = capsys.readouterr()
    assert err == ""
    assert run(["info", "test_vit", *old, "--json"]) == 0
    again, err = capsys.readouterr()
    assert again == plan
    for line in ("--stages is now --prune-at", "--schedule is now --token-schedule", "--dropped is now --pruned"):
        assert f"warning: {line}" in err
    assert renamed(["--splits", "a,b", "--columns=x"])[0] == ["--train-split=a", "--val-split=b", "--input-key=x"]
    assert renamed(["--dropped"])[0] == ["--pruned="], "the parser says what is missing"


def test_data_is_an_argument_or_as_before_an_option(capsys):
    assert run(["eval", "demo", "demo", "--data", "imagenet"]) == 2
    assert "DATA is given twice: 'demo' and --data imagenet" in capsys.readouterr().err
    assert run(["eval", "demo", "--data", "demo", "--limit", "2", "-j", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 2
