"""`vitprune`: the commands, and how errors become text and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import typer
from typer.exceptions import Abort, TyperException

from vitprune._version import __version__
from vitprune.cli import clock
from vitprune.cli.commands import (
    bench,
    compare,
    convert,
    env,
    export,
    info,
    models,
    push,
    report,
    sparsify,
    sweep,
    visualize,
)
from vitprune.cli.commands import eval as evaluate
from vitprune.cli.help import Command, Group
from vitprune.cli.output import detail, print_error
from vitprune.cli.terminal import Level, prepare_streams, set_level
from vitprune.cli.usage_errors import explain
from vitprune.cli.verbosity import Quiet, Verbose, adjustable
from vitprune.common import distributed
from vitprune.errors import VitpruneError

_HELP = """Make a pretrained timm vision transformer cheaper and faster by dropping uninformative tokens, and prove
what that did.

Examples:

vitprune sparsify demo

vitprune info deit_small --keep 0.7

vitprune sparsify --help
"""

app = typer.Typer(
    name="vitprune",
    help=_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("sparsify")(sparsify.sparsify)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("sweep")(sweep.sweep)
app.command("visualize")(visualize.visualize)
app.command("report")(report.report)
app.command("push")(push.push)
app.command("convert")(convert.convert)
app.command("export")(export.export)
app.command("info")(info.info)
app.command("models")(models.models)
app.command("env")(env.env)
for _each in app.registered_commands:
    assert _each.callback is not None
    _each.cls, _each.callback = Command, adjustable(_each.callback)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Options before the command."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 3 a stated limit missed, 130 interrupted."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. Errors go to stderr; with --json also to stdout, as one object."""
    as_json = "--json" in arguments
    if not distributed.is_main():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  one process prints
    try:
        prepare_streams()
        # Else its allocator, for one, warns of things that nobody can change, and across the progress display.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        set_level(Level.NORMAL)
        clock.restart()
        code: int = app(args=arguments, prog_name="vitprune", standalone_mode=False, obj=arguments) or 0
        distributed.finish()
        detail(f"time: {clock.told()}")
        return code
    except VitpruneError as error:
        return _failed(error.message, error.hint, error.exit_code, as_json)
    except TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # without a command help was shown
            return error.exit_code
        return _failed(*explain(error), error.exit_code, as_json)
    except (KeyboardInterrupt, Abort):
        return _failed("interrupted", None, 130, as_json)
    except BrokenPipeError:
        # The reader of stdout has left (`vitprune ... | head`): not worth a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        hint = "this is a bug in vitprune; VITPRUNE_DEBUG=1 shows where, and `vitprune env` what to report with it"
        return _failed(f"unexpected {type(error).__name__}: {error}", hint, 1, as_json)


def _failed(message: str, hint: str | None, exit_code: int, as_json: bool) -> int:
    if os.environ.get("VITPRUNE_DEBUG") == "1":
        traceback.print_exc()
    print_error(message, hint, exit_code, as_json)
    return exit_code
