"""What the parser objects to, as one sentence with the offending value, and a hint with the way out."""

from __future__ import annotations

import re
from typing import Any

from typer.exceptions import TyperException

from vitprune.common.formatting import close_match

_NUMBERS = {"int": "a whole number", "float": "a number"}
_BOUNDS = {
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "greater_than": "above {gt:g}",
    "less_than": "below {lt:g}",
}


def explain(error: TyperException) -> tuple[str, str]:
    """Message and hint of an error in the command line itself."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "vitprune COMMAND"
    help_hint = f"{command} --help shows arguments and options"
    name = type(error).__name__
    if name == "NoSuchOption":
        return _no_such_option(error, command, help_hint)
    if name == "MissingParameter":
        return _missing(error, command, help_hint)
    if name == "BadParameter" and error.__cause__ is not None:
        return _bad_value(error, help_hint)
    message = error.format_message().rstrip(".")
    if ours := re.match(r"Invalid value for '(.*?)': (.*)", message, flags=re.DOTALL):
        return f"{ours[1]}: {ours[2]}", help_hint
    unknown = re.match(r"No such command '(.*?)'", message)
    if unknown:
        known = [] if context is None else context.command.list_commands(context)
        match = close_match(unknown[1], known)
        hint = f"did you mean vitprune {match}?" if match else f"the commands are {', '.join(known)}"
        return f"there is no command '{unknown[1]}'", hint
    if needs := re.match(r"Option '(.*?)' requires", message):
        return f"{needs[1]} needs a value", help_hint
    if flag := re.match(r"Option '(.*?)' does not take a value", message):
        return f"{flag[1]} takes no value", help_hint
    if extra := re.match(r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)", message):
        return f"{command} does not know what to do with '{extra[1]}'", f"options go by name; {help_hint}"
    if message == "Missing command":
        return "vitprune needs a command", "vitprune --help lists them"
    return message, help_hint


def _no_such_option(error: Any, command: str, help_hint: str) -> tuple[str, str]:
    given = error.option_name
    known = [
        option
        for param in error.ctx.command.get_params(error.ctx)
        for option in (*param.opts, *param.secondary_opts)
        if option.startswith("--") and not getattr(param, "hidden", False)
    ]
    # Without the dashes, or all options would be much alike.
    match = close_match(given[2:], [option[2:] for option in known]) if given.startswith("--") else None
    return f"{command} has no option {given}", f"did you mean --{match}?" if match else help_hint


def _missing(error: Any, command: str, help_hint: str) -> tuple[str, str]:
    param = error.param
    name = getattr(param, "metavar", None) or getattr(param, "name", "an argument")
    examples = re.search(r"^\s*(vitprune .*)$", error.ctx.command.help or "", flags=re.MULTILINE)
    return f"{command} needs {name}", f"for example {examples[1]}" if examples else help_hint


def _bad_value(error: Any, help_hint: str) -> tuple[str, str]:
    """A value that pydantic could not read: its own words are for programmers."""
    fault = error.__cause__.errors()[0]
    param, value, kind = error.param, fault["input"], str(fault["type"])
    option = max(param.opts, key=len) if param.param_type_name == "option" else param.metavar
    choices = [str(getattr(each, "value", each)) for each in _choices(param)]
    if choices:
        match = close_match(str(value), choices)
        hint = f"did you mean {option} {match}?" if match else f"for example {option} {choices[0]}"
        return f"{option} is '{value}', expected one of {', '.join(choices)}", hint
    if kind in _BOUNDS:
        return f"{option} is {value}, expected {_BOUNDS[kind].format(**fault['ctx'])}", help_hint
    for start, what in _NUMBERS.items():
        if kind.startswith(start):
            return f"{option} is '{value}', expected {what}", help_hint
    return f"{option}: {str(fault['msg']).removeprefix('Value error, ')}", help_hint


def _choices(param: Any) -> tuple[Any, ...]:
    """The values that an option takes, where they are few; () too where this version of Typer does not tell."""
    return tuple(getattr(getattr(param, "type_descriptor", None), "choices", None) or ())
