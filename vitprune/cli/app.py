"""`vitprune`: the commands, and how errors become text and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import typer
from typer.exceptions import Abort, TyperException

from vitprune import processes
from vitprune.cli import (
    bench,
    compare,
    convert,
    env,
    evaluate,
    export,
    info,
    models,
    push,
    report,
    sparsify,
    sweep,
    visualize,
)
from vitprune.cli.output import print_error
from vitprune.errors import VitpruneError

app = typer.Typer(
    name="vitprune",
    help="Make a pretrained timm vision transformer cheaper and faster by dropping uninformative tokens, "
    "and prove what that did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
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


def _version(wanted: bool) -> None:
    if wanted:
        from vitprune import __version__

        typer.echo(f"vitprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the command."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 3 a stated limit missed, 130 interrupted."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. Errors go to stderr; with --json also to stdout, as one object."""
    as_json = "--json" in arguments
    if not processes.is_main():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  one process prints
    try:
        code: int = app(args=arguments, prog_name="vitprune", standalone_mode=False, obj=arguments) or 0
        processes.finish()
        return code
    except VitpruneError as error:
        return _failed(error.message, error.hint, error.exit_code, as_json)
    except TyperException as error:
        hint = "vitprune COMMAND --help shows arguments and options"
        return _failed(error.format_message(), hint, error.exit_code, as_json)
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
