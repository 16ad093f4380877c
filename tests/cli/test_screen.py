"""What a person meets: help, completion, hints, how much is told, and terminals of all kinds."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time

import pytest
import timm
import typer
from rich.cells import cell_len

from vitprune.backbones.registry import ADAPTERS
from vitprune.cli import clock, complete
from vitprune.cli.app import app, run
from vitprune.cli.output import print_error, print_line, print_table, talk, waiting
from vitprune.cli.progress import RunProgress
from vitprune.cli.summary import print_summary
from vitprune.cli.terminal import Level, prepare_streams, set_level
from vitprune.text import close_match, duration
from vitprune.training import StepRecord

PROGRAM = typer.main.get_command(app)
COMMANDS = list(PROGRAM.commands)
EXAMPLES = [
    (name, line.strip())
    for name in COMMANDS
    for line in PROGRAM.commands[name].help.splitlines()
    if line.strip().startswith("vitprune ")
]
ESCAPE = "\x1b"
COLOUR = re.compile(r"\x1b\[[\d;]*\b(?:3\d|9\d|38;[\d;]+)m")


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
        prepare_streams()
        return out, err

    return make


@pytest.fixture(autouse=True)
def normal_level():
    yield
    set_level(Level.NORMAL)


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
    wanted = "vitprune sparsify deit_small --checkpoint my.safetensors --data path/to/my/pictures --no-labels"
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
    supported = {name for name in timm.list_models() if _family(name) in complete._FAMILIES}
    offered = {name for letter in "abcdefghijklmnopqrstuvwxyz" for name in complete.model(letter)}
    assert supported <= offered
    homes = {adapted.__module__.rpartition(".")[2] for adapted in ADAPTERS if adapted.__module__.startswith("timm.")}
    assert homes <= set(complete._FAMILIES)
    tagged = complete.model("deit_small_patch16_224.")
    assert tagged == timm.list_pretrained("deit_small_patch16_224.*")


def _family(name):
    return timm.models._registry._model_to_module[name]


def test_completed_files_and_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "details").mkdir()
    (tmp_path / "deit.safetensors").touch()
    (tmp_path / "deit.txt").touch()
    (tmp_path / "short-run.yaml").touch()
    assert {"details/", "deit.safetensors", "deit_small"} <= set(complete.model("de"))
    assert "deit.txt" not in complete.model("de")
    assert complete.model("") == [*complete._FIRST, "deit.safetensors", "details/"]
    assert complete.model("details/x") == [], "then the shell completes file names by itself"
    assert complete.data("im") == ["imagenet", "imagenette"]
    assert complete.recipe("sh") == ["short", "short-run.yaml"]
    assert complete.several("random", "tome", "tome-late")("random,to") == ["random,tome", "random,tome-late"]
    assert complete.several("random", "tome")("tome,") == ["tome,random"]


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


# How much is told


@pytest.mark.parametrize("arguments", [["-q", "eval"], ["eval", "-q"], ["eval", "--quiet"]])
def test_quiet_leaves_the_result(arguments, capsys):
    assert run([*arguments, "demo", "--limit", "8", "-j", "0"]) == 0
    out, err = capsys.readouterr()
    assert "top-1" in out
    assert err == ""


def test_quiet_still_tells_errors_and_missed_limits(capsys):
    assert run(["eval", "demo", "--limit", "8", "-j", "0", "-q", "--min-top1", "101"]) == 3
    assert capsys.readouterr().err.startswith("--min-top1: missed")
    assert run(["eval", "absent.safetensors", "-q"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("where", [0, 1])
def test_verbose_tells_model_settings_environment_and_times(where, capsys):
    arguments = ["eval", "demo", "--limit", "8", "-j", "0", "--json"]
    arguments.insert(where, "-v")
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["num_images"] == 8, "all of it goes to stderr"
    for said in ("model: name demo", "settings: device cpu, precision fp32", "environment: vitprune", "time: "):
        assert said in err
    assert re.search(r"evaluating demo [\d.]+ s.*; [\d.]+ s in all", err)
    assert run(["eval", "demo", "--limit", "8", "-j", "0"]) == 0
    assert "environment" not in capsys.readouterr().err, "the next command begins anew"


@pytest.mark.parametrize("arguments", [["-q", "-v"], ["-qv"], ["-v", "--quiet"]])
def test_both_at_once_are_refused(arguments, capsys):
    assert run(["info", "demo", *arguments]) == 2
    assert "--quiet and --verbose ask for opposite things" in capsys.readouterr().err
    assert run([arguments[0], "info", "demo", *arguments[1:]]) == 2


def test_clock_adds_up(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock.restart()
    for part, seconds in (("reading", 2.0), ("thinking", 0.01), ("reading", 3.0)):
        clock.begin(part)
        now[0] += seconds
    assert clock.told() == "reading 5.0 s; 5.0 s in all"


def test_durations_are_readable():
    assert [duration(seconds) for seconds in (7.6, 99, 200, 7500)] == ["8 s", "99 s", "3 min 20 s", "2 h 5 min"]


# Progress


def _record(step, num_steps=1000):
    return StepRecord(step, num_steps, "deployed", {"kl": 0.1}, 0.1, (0.75, 0.5), (0.75, 0.5), 1e-3, 60.0)


def test_progress_in_a_pipe_is_a_few_plain_lines(monkeypatch, capsys):
    """Ten hours of training."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with RunProgress() as progress:
        for step in range(1, 20_001):
            progress.step(_record(step, 20_000))
            now[0] += 1.8
        progress.begin("evaluating", 10)
        progress.advance(10)
    out, err = capsys.readouterr()
    assert out == ""
    assert ESCAPE not in err
    assert "\r" not in err
    lines = err.splitlines()
    assert 50 < len(lines) < 400
    assert lines[0] == "training (20000)"
    assert re.match(
        r"training 10/20000 deployed: kl 0.1 \| kept 0.75/0.50 of 0.75/0.50 \| 60 images/s .* left", lines[1]
    )
    assert "training: done in 10 h 0 min" in lines
    assert lines[-1] == "evaluating (10)", "what was quick is not told"


def test_resumed_training_does_not_count_the_steps_of_before(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with RunProgress() as progress:
        for step in range(901, 1001):
            progress.step(_record(step))
            now[0] += 10.0
    assert "training 903/1000" in capsys.readouterr().err.splitlines()[1]


def test_forced_colour_in_a_pipe_draws_no_bar(monkeypatch, capsys):
    """As on CI machines."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RunProgress() as progress:
        progress.begin("evaluating", 10)
        progress.advance(10)
    assert capsys.readouterr().err == "evaluating (10)\n"


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_live_progress_ends_with_a_line_per_part(columns, screen):
    _, err = screen(columns)
    with RunProgress() as progress:
        progress.step(_record(1))
        progress.begin("evaluating [b] vit", 10)
        progress.advance(10)
        progress.begin("drawing the report", None)
    lines = [line for line in err.lines() if line.strip()]
    assert max(map(cell_len, lines)) <= columns
    assert any("10/10" in line for line in lines)
    assert "drawing the report" in lines[-1]
    assert "?" not in lines[-1]


def test_live_progress_on_an_old_console(screen):
    _, err = screen(80, "cp1252")
    with RunProgress() as progress:
        progress.begin("evaluating 模型", 10)
        progress.advance(10)
    assert "evaluating ??" in err.text()


def test_dumb_terminal_gets_plain_lines(screen):
    _, err = screen(80, TERM="dumb")
    with RunProgress() as progress, waiting("loading"):
        progress.begin("evaluating", 10)
        talk("a note")
        print_error("it went wrong", "try again", 1, as_json=False)
    assert ESCAPE not in err.text()
    assert err.lines() == ["evaluating (10)", "a note", "error: it went wrong", "", "hint: try again"]


def test_waiting_names_what_for_and_goes(screen, capsys):
    _, err = screen(80)
    with waiting("loading deit_small"):
        talk("a note")
    assert err.text().endswith("\r\x1b[2K")
    assert err.text().count("loading deit_small ...") == 2, "again after the note"
    assert "a note\n" in err.text()


def test_waiting_is_silent_in_a_pipe(capsys):
    with waiting("loading"):
        pass
    assert capsys.readouterr() == ("", "")


# Terminals

HEAD = ["", "top-1", "change", "95 %", "img/s", "speed"]
ROWS = [
    ["attention-fold", "99.00", "-10.00", "-16.53 to -3.47", "94.2", "1.51 x"],
    ["a class with a very long name [/b]", "9.00", "", "", "142.0", "0.91 x SLOWER"],
]


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120])
def test_tables_lose_nothing_and_fit(columns, screen):
    out, _ = screen(columns)
    print_table("a title that is longer than a narrow terminal is wide", HEAD, ROWS)
    assert max(map(cell_len, out.lines())) <= columns
    shown = "".join(out.lines()).replace(" ", "")
    for cell in (cell for row in ROWS for cell in row[1:]):
        assert cell.replace(" ", "") in shown, "numbers are never broken"
    assert "awith" not in shown


@pytest.mark.parametrize(("columns", "is_table"), [(80, True), (40, False)])
def test_narrow_tables_become_lists(columns, is_table, screen):
    out, _ = screen(columns)
    print_table("title", HEAD, ROWS[:1])
    assert ("  top-1   99.00" in out.lines()) != is_table
    assert any("99.00" in line and "94.2" in line for line in out.lines()) == is_table


def test_text_is_broken_between_words_and_paths_stay_whole(screen):
    out, err = screen(40)
    path = "runs/" + "deit_small_patch16_224" * 3
    print_line(f"in 12 s, all of it written to {path} as ever")
    print_error("something went wrong in a long sentence that goes on", f"look into {path}", 1, as_json=False)
    for stream in (out, err):
        assert path in stream.lines()
        assert all(len(line) <= 40 for line in stream.lines() if path not in line)


def test_pipes_get_full_lines_without_colour(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "40")
    print_table("title", HEAD, ROWS)
    print_line("word " * 60)
    print_error("word " * 60, "hint", 1, as_json=False)
    out, err = capsys.readouterr()
    assert ESCAPE not in out + err
    assert "word " * 59 in out
    assert "word " * 59 in err
    assert any("attention-fold" in line and "1.51 x" in line for line in out.splitlines())


@pytest.mark.parametrize("asked", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_color_is_respected(asked, screen):
    out, err = screen(80, **asked)
    print_table("title", HEAD, ROWS)
    print_error("wrong", "right", 1, as_json=False)
    run(["info", "--help"])
    coloured = COLOUR.search(out.text() + err.text())
    assert bool(coloured) == (not asked)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437"])
def test_what_a_console_cannot_show_has_a_likeness(encoding, screen):
    out, err = screen(80, encoding)
    print_table("12 ± 3 → 4 × 5 … é 模", ["±", "→"], [["a ± b", "1 → 2"], ["é", "2"]])
    print_line("± → × …")
    talk("± → × … 模 \udcff")
    text = out.text() + err.text()
    assert "1 -> 2" in text
    assert "?" in text
    if encoding == "ascii":
        assert "12 +- 3 -> 4 x 5 ... e ?" in text
    table = out.lines()[1:-2]
    assert len({len(line.rstrip()) for line in table if "-" * 5 not in line}) <= 3


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_to_an_old_console_in_a_process_of_its_own(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    code = "from vitprune.cli.app import run; run(['recipe → ± ×', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b""
    assert "there is no command 'recipe -> " in done.stderr.decode(encoding)


def test_a_table_of_a_command_on_an_old_console(screen):
    out, err = screen(80, "ascii")
    assert run(["info", "demo"]) == 0
    assert "-" * 20 in out.text()
    assert err.text() == ""


def test_a_reader_who_leaves_is_no_error():
    code = "from vitprune.cli.app import main; main(['--help'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        done.stdout.close()
        assert done.stderr.read() == b""


# A run on one screen


def test_summary_fits_one_screen(screen, tmp_path):
    speed = [{"batch_size": size, "images_per_s": 12345.6} for size in (1, 32)]
    accuracy = {
        "top1_pct": 99.5,
        "top5_pct": 100.0,
        "gmacs": 17.56,
        "params_m": 86.5,
        "num_images": 50000,
        "speed": speed,
    }
    report = {
        "model": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "label": "keep 0.7, align 8",
        "dense": accuracy,
        "sparse": accuracy,
        "random": {"top1_pct": 71.5},
        "delta": {
            "top1_points": -0.51,
            "top1_points_ci95": (-1.62, 0.6),
            "top1_points_over_random": 6.4,
            "gmacs_pct": -36.9,
            "agreement_pct": 97.1,
            "kl": 0.025,
            "kl_random": 0.254,
            "speedup": [{"speedup": 0.98, "slower": True}, {"speedup": 1.43, "slower": False}],
        },
        "coverage": {"sparse_pct": 99.3, "random_pct": 26.6},
        "training": {
            "seconds": 600.0,
            "num_images": 22400,
            "seconds_by_part": {"data": 50.0, "teacher": 200.0, "student": 150.0, "backward": 190.0, "update": 10.0},
            "num_unreadable": 3,
            "unreadable": ["a.png", "b.png", "c.png"],
            "num_skipped": 2,
            "num_restored": 0,
            "num_parts": 2,
        },
        "data": {"num_unreadable_val": 0, "unreadable_val": []},
        "wall_s": 672.0,
    }
    out, _ = screen(80)
    print_summary(report, tmp_path / "runs" / "vit_base_patch16_224-keep0.7")
    lines = out.lines()
    assert len(lines) < 24, "with the prompt"
    assert all(len(line) <= 80 for line in lines if str(tmp_path) not in line)
    assert any("SLOWER" in line for line in lines)
