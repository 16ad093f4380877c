"""-q and -v, before the command and after it."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from vitprune.cli.terminal import Level, level, set_level
from vitprune.errors import UsageError


def _set(wanted: Level, given: bool) -> None:
    if not given:
        return
    if level() not in (Level.NORMAL, wanted):
        raise UsageError("--quiet and --verbose ask for opposite things", "give one of them")
    set_level(wanted)
    if wanted is Level.QUIET:  # of downloads; read when the Hub's packages are imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _quiet(given: bool) -> None:
    _set(Level.QUIET, given)


def _verbose(given: bool) -> None:
    _set(Level.VERBOSE, given)


Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=_quiet, is_eager=True, help="Results and errors only."),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_verbose,
        is_eager=True,
        help="Tell more: plan, settings, environment, where the time goes.",
    ),
]


def adjustable(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the options -q and -v, whose callbacks do all there is to do."""

    @functools.wraps(command)
    def with_both(*args: Any, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        return command(*args, **kwargs)

    signature = inspect.signature(command, eval_str=True)
    both = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", Quiet), ("verbose", Verbose))
    ]
    parameters = [*signature.parameters.values(), *both]
    with_both.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_both
