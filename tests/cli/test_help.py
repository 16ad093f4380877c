"""Help, completion, and hints."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import timm
import typer
from rich.cells import cell_len

from vitprune.backbones.registry import ADAPTERS
from vitprune.cli import completion
from vitprune.cli.app import app, run
from vitprune.common.formatting import close_match

PROGRAM = typer.main.get_command(app)
COMMANDS = list(PROGRAM.commands)
EXAMPLES = [
    (name, line.strip())
    for name in COMMANDS
    for line in PROGRAM.commands[name].help.splitlines()
    if line.strip().startswith("vitprune ")
]

# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_and_both_levels(command, capsys):
    assert run([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "\nExamples:\n  vitprune " in out
    assert f"\n  vitprune {command}" in out
    assert "-q, --quiet" in out
    assert "-v, --verbose" in out


@pytest.mark.parametrize(("command", "line"), EXAMPLES)
def test_example_parses(command, line):
    words = shlex.split(line)
    assert words[1] == command
    PROGRAM.commands[command].make_context(command, words[2:])  # up to running


def test_a_wrong_example_would_not_parse():
    with pytest.raises(Exception, match="--kepe"):
        PROGRAM.commands["info"].make_context("info", ["demo", "--kepe", "1"])


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
@pytest.mark.parametrize("command", [[], ["sparsify"], ["export"]])
def test_help_fits(command, columns, screen):
    out, _ = screen(columns)
    assert run([*command, "--help"]) == 0
    for line in out.lines():
        is_one_word = len(line.removesuffix("\\").split()) == 1  # a path, say, stays whole
        assert cell_len(line) <= columns or is_one_word, line


def test_long_example_is_one_command_for_the_shell(screen):
    out, _ = screen(60)
    run(["sparsify", "--help"])
    text = "\n".join(out.lines()).replace("\\\n", " ")
    wanted = "vitprune sparsify deit_small --checkpoint my.safetensors --data path/to/my/images --no-labels"
    assert wanted in re.sub(" +", " ", text)


def test_help_says_what_an_option_takes_and_its_default(capsys):
    run(["sparsify", "--help"])
    out = capsys.readouterr().out
    assert "-o, --output DIR" in out
    assert "[default: runs/<model>-keep<ratio>]" in out
    assert "--schedule geometric|late" in out
    assert "--workers N" in out
    for noise in ("<int", "<float", "<str", "x>=", "default: (", "{MODEL}"):
        assert noise not in out


def test_without_a_command_there_is_help(capsys):
    assert run([]) == 2
    out, err = capsys.readouterr()
    assert "Commands:" in out
    assert err == ""


# Completion


def _completed(line, shell="bash"):
    environment = os.environ | {"_VITPRUNE_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line}
    environment |= {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    code = "import sys\nfrom vitprune.cli.app import main\n"
    code += "try:\n    main([])\nfinally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.slow
def test_shell_is_offered_commands_models_and_values(tmp_path, monkeypatch):
    """As the shell asks: in a process of its own, without importing torch."""
    monkeypatch.chdir(tmp_path)
    assert _completed("vitprune sp") == ["sparsify"]
    offered = _completed("vitprune sparsify deit_sm")
    assert "deit_small" in offered
    assert "deit_small_patch16_224" in offered
    assert _completed("vitprune info demo --schedule ") == ["geometric", "late"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completion_script_is_there(shell, monkeypatch, capsys):
    monkeypatch.setenv("_VITPRUNE_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit) as done:
        run([])
    assert done.value.code == 0
    assert f"complete_{shell}" in capsys.readouterr().out


def test_completed_models_are_those_of_timm_that_are_supported():
    supported = {name for name in timm.list_models() if _family(name) in completion._FAMILIES}
    offered = {name for letter in "abcdefghijklmnopqrstuvwxyz" for name in completion.model(letter)}
    assert supported <= offered
    homes = {adapted.__module__.rpartition(".")[2] for adapted in ADAPTERS if adapted.__module__.startswith("timm.")}
    assert homes <= set(completion._FAMILIES)
    tagged = completion.model("deit_small_patch16_224.")
    assert tagged == timm.list_pretrained("deit_small_patch16_224.*")


def _family(name):
    return timm.models._registry._model_to_module[name]


def test_completed_files_and_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "details").mkdir()
    (tmp_path / "deit.safetensors").touch()
    (tmp_path / "deit.txt").touch()
    (tmp_path / "short-run.yaml").touch()
    assert {"details/", "deit.safetensors", "deit_small"} <= set(completion.model("de"))
    assert "deit.txt" not in completion.model("de")
    assert completion.model("") == [*completion._FIRST, "deit.safetensors", "details/"]
    assert completion.model("details/x") == [], "then the shell completes file names by itself"
    assert completion.data("im") == ["imagenet", "imagenette"]
    assert completion.recipe("sh") == ["short", "short-run.yaml"]
    assert completion.several("random", "tome", "tome-late")("random,to") == ["random,tome", "random,tome-late"]
    assert completion.several("random", "tome")("tome,") == ["tome,random"]


# Hints

CLOSE = {
    "command": (["sparsfy"], "did you mean vitprune sparsify?"),
    "option": (["info", "demo", "--kepe", "0.7"], "did you mean --keep?"),
    "value": (["info", "demo", "--schedule", "lat"], "did you mean --schedule late?"),
    "recipe": (["info", "demo", "--recipe", "shrot"], "did you mean short?"),
    "model": (["info", "deit_smal"], "did you mean deit_small"),
    "data": (["eval", "demo", "imagnet"], "did you mean imagenet?"),
    "method": (["compare", "demo", "--methods", "randm"], "did you mean random?"),
    "nothing near": (["frobnicate"], "the commands are sparsify, eval"),
    "no such option at all": (["info", "demo", "--wrong"], "vitprune info --help shows"),
    "value missing": (["info", "--keep"], "--keep needs a value"),
    "value of a flag": (["info", "demo", "--json=5"], "--json takes no value"),
    "one too many": (["info", "demo", "more"], "does not know what to do with 'more'"),
    "out of range": (["eval", "demo", "-b", "0"], "--batch-size is 0, expected at least 1"),
    "no whole number": (["eval", "demo", "-b", "2.5"], "--batch-size is '2.5', expected a whole number"),
    "parser of ours": (["info", "demo", "--img-size", "big"], "--img-size: 'big' is no image size"),
}


@pytest.mark.parametrize("mistake", CLOSE)
def test_mistake_is_told_with_the_way_out(mistake, capsys):
    arguments, said = CLOSE[mistake]
    assert run(arguments) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert re.fullmatch(r"error: [^\n]+\n\nhint: [^\n]+\n", err)


def test_close_match_knows_beginnings_and_slips():
    assert close_match("lat", ["geometric", "late"]) == "late"
    assert close_match("SHORT", ["short", "paper"]) == "short"
    assert close_match("zzz", ["short", "paper"]) is None
    assert close_match("", ["short"]) is None
