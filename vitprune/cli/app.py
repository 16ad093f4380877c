"""`vitprune`: the commands, and how errors become text and exit codes."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import Abort, TyperException

from vitprune._version import __version__
from vitprune.cli.commands import (
    bench,
    compare,
    convert,
    env,
    export,
    info,
    models,
    predict,
    push,
    report,
    sparsify,
    sweep,
    visualize,
)
from vitprune.cli.commands import eval as evaluate
from vitprune.cli.model_options import spread_model_kwargs
from vitprune.cli.options import grouped
from vitprune.cli.output import open_streams, prepare, print_error, print_line, say
from vitprune.cli.usage_errors import explain
from vitprune.common import distributed
from vitprune.common.stopping import deferred, raising, stopped_error
from vitprune.errors import OutputError, VitpruneError

_QUIET = ("--quiet", "-q")
_RENAMED = {
    "--stages": "--prune-at",
    "--ratios": "--tokens-left",
    "--schedule": "--token-schedule",
    "--dropped": "--pruned",
    "--grad-accum": "--grad-accum-steps",
    "--track": "--report-to",
    "--warm-start-steps": "--pretraining-steps",
    "--no-pictures": "--no-images",
    "--floor": "--bound",
    "--no-floor": "--no-bound",
}
"""Options under the names that they had before, for one release."""
_SPLIT = {"--splits": ("--train-split", "--val-split"), "--columns": ("--input-key", "--target-key")}
"""Options that took two values with a comma between them."""
_COMMANDS: dict[str, Callable[..., Any]] = {
    "sparsify": sparsify.sparsify,
    "eval": evaluate.evaluate,
    "predict": predict.predict,
    "bench": bench.bench,
    "compare": compare.compare,
    "sweep": sweep.sweep,
    "visualize": visualize.visualize,
    "report": report.report,
    "push": push.push,
    "convert": convert.convert,
    "export": export.export,
    "info": info.info,
    "models": models.models,
    "env": env.env,
}


def _help(command: Callable[..., Any]) -> str:
    """A docstring as help: a paragraph is a line, which the terminal breaks; an example is a line of its own."""
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")
    return re.sub(r"\n\n +(?=vitprune )", "\n", text)


class _Commands(TyperGroup):
    """Stopped by a signal they say so, which Typer would answer with an exit code alone."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _telling():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _telling():
            return super().invoke(ctx)


@contextmanager
def _telling() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise stopped_error(error, "; nothing was written", None) from error


app = typer.Typer(
    name="vitprune",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in _COMMANDS.items():
    app.command(_name, help=_help(_command))(grouped(_command))


def _version(asked: bool) -> None:
    if asked:
        print_line(f"vitprune {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option(*_QUIET, help="Results and errors only.")] = False,
) -> None:
    """Make a pretrained timm vision transformer cheaper and faster by pruning tokens, and measure the effect.

    Examples:

      vitprune sparsify demo

      vitprune info deit_small --keep 0.7

      vitprune sparsify --help
    """


app.callback(help=_help(_root))(_root)


def main(arguments: list[str] | None = None, stopped: KeyboardInterrupt | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 3 a stated limit missed, 130 interrupted.

    Terminated by SIGTERM it is 143, by SIGHUP 129. `stopped` is what came before it could begin.
    """
    open_streams()
    code = run(sys.argv[1:] if arguments is None else arguments, stopped)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is said: Ctrl-C now ends it without a traceback
    sys.exit(code)


def run(arguments: list[str], stopped: KeyboardInterrupt | None = None) -> int:
    """Run one command and return its exit code. Errors go to stderr; with --json also to stdout, as one object."""
    as_json = "--json" in arguments
    try:
        with raising():
            code = _run(arguments, stopped)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt as error:  # at the very end
        return 128 + getattr(error, "number", signal.SIGINT)
    except BrokenPipeError:  # the reader of stdout has left (`vitprune ... | head`): not worth a word
        return 1
    except OutputError as error:
        return _failed(error, as_json)


def renamed(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line in today's names, and a line for each old name in it."""
    found: list[str] = []
    lines: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in _RENAMED:
            new = _RENAMED[name]
            if new == "--pruned":
                value = (value if equals else next(rest, "")).replace("fold", "merge")
                equals = "="
            found.append(f"{new}{equals}{value}")
            lines.append(f"{name} is now {new}")
        elif name in _SPLIT:
            values = (value if equals else next(rest, "")).split(",")
            found += [f"{new}={each}" for new, each in zip(_SPLIT[name], values, strict=False) if each]
            lines.append(f"{name} is now {' and '.join(_SPLIT[name])}")
        else:
            found.append(argument)
    return found, lines


def _run(arguments: list[str], stopped: KeyboardInterrupt | None = None) -> int:
    as_json = "--json" in arguments
    quiet = not {*_QUIET}.isdisjoint(arguments)  # also behind the command's name
    arguments, old_names = renamed(spread_model_kwargs([each for each in arguments if each not in _QUIET]))
    if not distributed.is_main():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  one process prints
    try:
        prepare(quiet=quiet)
        if stopped is not None:
            raise stopped
        for line in old_names:
            say(f"warning: {line}")
        # Else its allocator, for one, warns of things that nobody can change, and across the progress display.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        code: int = app(args=arguments, prog_name="vitprune", standalone_mode=False, obj=arguments) or 0
        distributed.finish()
        return code
    except VitpruneError as error:
        return _failed(error, as_json)
    except TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # without a command help was shown
            return error.exit_code
        return _failed(VitpruneError(*explain(error), exit_code=error.exit_code), as_json)
    except (KeyboardInterrupt, Abort) as error:  # Abort: the end of stdin, at a question
        came = error if isinstance(error, KeyboardInterrupt) else KeyboardInterrupt()
        return _failed(stopped_error(came, "; nothing was written", None), as_json)
    except BrokenPipeError:
        raise
    except Exception as error:
        hint = "this is a bug in vitprune; VITPRUNE_DEBUG=1 shows where, and `vitprune env` what to report with it"
        return _failed(VitpruneError(f"unexpected {type(error).__name__}: {error}", hint), as_json)


def _failed(error: VitpruneError, as_json: bool) -> int:
    if os.environ.get("VITPRUNE_DEBUG") == "1":
        traceback.print_exc()
    with deferred():  # what was saved is told to the end
        print_error(error.message, error.hint, error.exit_code, as_json, error.saved)
    return error.exit_code
