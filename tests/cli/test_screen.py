"""How much is told, progress, and terminals of all kinds."""

import re
import subprocess
import sys
import time

import pytest
from finished_run import make_task_report
from rich.cells import cell_len

from vitprune.cli.app import run
from vitprune.cli.output import print_error, print_line, print_table, say, waiting
from vitprune.cli.progress import RunProgress
from vitprune.cli.tables import print_summary
from vitprune.common.formatting import duration
from vitprune.report import Report
from vitprune.tasks import TASKS
from vitprune.training.progress import StepRecord

ESCAPE = "\x1b"
COLOUR = re.compile(r"\x1b\[[\d;]*\b(?:3\d|9\d|38;[\d;]+)m")


# How much is told


def test_quiet_leaves_results_errors_and_missed_limits(capsys):
    for arguments in (["-q", "eval"], ["eval", "--quiet"]):
        assert run([*arguments, "demo", "--limit", "8", "-j", "0"]) == 0
        out, err = capsys.readouterr()
        assert "top-1" in out
        assert err == ""
    assert run(["eval", "demo", "--limit", "8", "-j", "0", "-q", "--min-top1", "101"]) == 3
    assert capsys.readouterr().err.startswith("--min-top1: missed")
    assert run(["eval", "absent.safetensors", "-q"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


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
    assert re.match(r"training 10/20000 deployed: KL 0.1 \| 75/50 % of tokens kept \| 60 images/s .* left", lines[1])
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


def test_dumb_terminal_gets_plain_lines(screen):
    _, err = screen(80, TERM="dumb")
    with RunProgress() as progress, waiting("loading"):
        progress.begin("evaluating", 10)
        say("a note")
        print_error("it went wrong", "try again", 1, as_json=False)
    assert ESCAPE not in err.text()
    assert err.lines() == ["evaluating (10)", "a note", "error: it went wrong", "", "hint: try again"]


def test_waiting_names_what_for_and_goes(screen, capsys):
    _, err = screen(80)
    with waiting("loading deit_small"):
        say("a note")
    assert err.text().startswith("loading deit_small ...\r\x1b[2K")
    assert "a note\n" in err.text()
    assert err.text().endswith("\r\x1b[2K")


def test_waiting_is_silent_in_a_pipe(capsys):
    with waiting("loading"):
        pass
    assert capsys.readouterr() == ("", "")


# Terminals

HEAD = ["", "top-1", "change", "95 %", "img/s", "speed"]
ROWS = [
    ["attention-merge", "99.00", "-10.00", "-16.53 to -3.47", "94.2", "1.51 x"],
    ["a class with a very long name [/b]", "9.00", "", "", "142.0", "0.91 x SLOWER"],
]


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_tables_lose_nothing_and_fit(columns, screen):
    out, _ = screen(columns)
    print_table("a title", HEAD, ROWS)
    assert max(map(cell_len, out.lines())) <= columns
    if columns >= 60:
        shown = "".join(out.lines()).replace(" ", "")
        for cell in (cell for row in ROWS for cell in row[1:]):
            assert cell.replace(" ", "") in shown, "numbers are never broken"


def test_escape_codes_in_names_do_not_reach_the_terminal(screen):
    out, err = screen(80)
    name = "\x1b[31mcat\x1b]0;title\x07"
    print_table(name, [name, "n"], [[name, "1"]])
    print_line(name)
    say(name)
    with waiting(name):
        print_error(name, name, 1, as_json=False)
    with RunProgress() as progress:
        progress.begin(name, 2)
        progress.say(name)
    for stream in (out, err):
        assert "cat" in stream.text()
        assert "\x1b[31m" not in stream.text()
        assert "\x07" not in stream.text()


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
    assert any("attention-merge" in line and "1.51 x" in line for line in out.splitlines())


@pytest.mark.parametrize("asked", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_color_is_respected(asked, screen):
    out, err = screen(80, **asked)
    print_table("title", HEAD, ROWS)
    print_error("wrong", "right", 1, as_json=False)
    run(["info", "--help"])
    coloured = COLOUR.search(out.text() + err.text())
    assert bool(coloured) == (not asked)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437"])
def test_an_old_console_gets_question_marks(encoding, screen):
    out, err = screen(80, encoding)
    print_table("12 ± 3 → 4 模", ["±", "→"], [["a ± b", "1 → 2"], ["é", "2"]])
    say("± → × … 模 \udcff")
    with RunProgress() as progress:
        progress.begin("evaluating 模型", 10)
        progress.advance(10)
    assert "?" in out.text()
    assert "evaluating ??" in err.text()
    assert run(["info", "demo"]) == 0
    assert "GMACs" in out.text()


@pytest.mark.slow
def test_a_reader_who_leaves_is_no_error():
    code = "from vitprune.cli.app import main; main(['--help'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        done.stdout.close()
        assert done.stderr.read() == b""


# A run on one screen


@pytest.mark.parametrize("task", TASKS)
def test_summary_fits_one_screen(task, screen, tmp_path):
    long = {"model": "vit_base_patch16_224.augreg2_in21k_ft_in1k", "label": "keep 0.7, align 8", "seconds": 672.0}
    coverage = {"sparse_pct": 99.3, "random_pct": 26.6} if task == "classification" else None  # of the demo alone
    report = make_task_report(task, coverage=coverage, **long)
    report["training"] |= {"num_skipped": 2, "num_microbatches": 2, "num_unreadable": 3, "unreadable": ["a", "b", "c"]}
    out, _ = screen(80)
    print_summary(Report.model_validate(report), tmp_path / "runs" / "vit_base_patch16_224-keep0.7")
    lines = out.lines()
    assert sum(1 + len(line) // 80 for line in lines if str(tmp_path) not in line) < 22, "with the prompt"
    assert any("SLOWER" in line for line in lines)
