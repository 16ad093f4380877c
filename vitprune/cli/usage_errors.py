"""What the parser objects to, as one sentence with the offending value, and a hint with the way out."""

from __future__ import annotations

import re
from typing import Any

from typer.exceptions import TyperException

from vitprune.common.formatting import JOIN_WITH_COMMAS, close_match, is_number

_NUMBERS = {"int": "a whole number", "float": "a number"}
_BOUNDS = {
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "greater_than": "above {gt:g}",
    "less_than": "below {lt:g}",
}
_REWORDED = (
    (r"Invalid value for '(.*?)': (.*)", "{0}: {1}"),
    (r"Option '(.*?)' requires .*", "{0} needs a value"),
    (r"Option '(.*?)' does not take a value.*", "{0} takes no value"),
    (r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", "{command}: unexpected argument '{0}'"),
)
_COMMANDS_ELSEWHERE = {
    **dict.fromkeys(("train", "prune", "finetune"), "sparsify"),
    **dict.fromkeys(("validate", "evaluate", "test"), "eval"),
    "benchmark": "bench",
}
"""What other tools call our commands."""
_OPTIONS_ELSEWHERE = {
    **dict.fromkeys(("--keep-ratio", "--keep-rate"), "--keep"),
    "--amp": "--precision bf16",
    "--bs": "--batch-size",
    **{f"--{key}": f"--set {key.replace('-', '_')}=VALUE" for key in ("lr", "weight-decay", "backbone-lr-scale")},
}
"""What other tools, and we before, call our options."""
_RUNTIMES = {
    **dict.fromkeys(("tensorrt", "trt", "engine"), "--format onnx, then trtexec --onnx=model.onnx"),
    **dict.fromkeys(("ov", "ir"), "--format openvino"),
    **dict.fromkeys(("aotinductor", "inductor"), "--format aoti"),
    **dict.fromkeys(("pte", "xnnpack"), "--format executorch"),
    **dict.fromkeys(("tflite", "tensorflow"), "--format litert"),
    **dict.fromkeys(("mlpackage", "mlmodel", "mlprogram"), "--format coreml"),
    **dict.fromkeys(("torchscript", "jit", "torch"), "--format pt2, torch.export's program"),
}
"""How engines of other names are reached."""


def explain(error: TyperException) -> tuple[str, str]:
    """Message and hint of an error in the command line itself."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "vitprune COMMAND"
    help_hint = f"{command} --help shows arguments and options"
    kind = type(error).__name__
    if kind == "NoSuchOption":
        return _no_such_option(error, command, help_hint)
    if kind == "MissingParameter":
        return _missing(error, command, help_hint)
    if kind == "BadParameter" and error.__cause__ is not None:
        return _bad_value(error, help_hint)
    message = error.format_message().rstrip(".")
    if unknown := re.match(r"No such command '(.*?)'(?:\. Did you mean '(.*?)')?", message):
        names = [] if context is None else context.command.list_commands(context)
        meant = _COMMANDS_ELSEWHERE.get(unknown[1], unknown[2])
        near = f"did you mean vitprune {meant}?" if meant else f"the commands are {', '.join(names)}"
        return f"unknown command '{unknown[1]}'", near
    if message == "Missing command":
        return "vitprune needs a command", "vitprune --help lists them"
    for pattern, ours in _REWORDED:
        if found := re.fullmatch(pattern, message, flags=re.DOTALL):
            several = found.re.pattern.startswith("Got") and is_number(found[1].replace(" ", ""))
            hint = JOIN_WITH_COMMAS if several else help_hint
            return ours.format(*found.groups(), command=command), hint
    return message, help_hint


def _no_such_option(error: Any, command: str, help_hint: str) -> tuple[str, str]:
    # Typer compares with the dashes, which makes all options much alike.
    near = close_match(error.option_name.strip("-"), [option.strip("-") for option in error.possibilities or ()])
    meant = _OPTIONS_ELSEWHERE.get(error.option_name, near and f"--{near}")
    return f"{command} has no option {error.option_name}", f"did you mean {meant}?" if meant else help_hint


def _missing(error: Any, command: str, help_hint: str) -> tuple[str, str]:
    name = getattr(error.param, "metavar", None) or getattr(error.param, "name", "an argument")
    examples = re.search(r"^\s*(vitprune .*)$", error.ctx.command.help or "", flags=re.MULTILINE)
    return f"{command} needs {name}", f"for example {examples[1]}" if examples else help_hint


def _bad_value(error: Any, help_hint: str) -> tuple[str, str]:
    """A value that pydantic could not read: its own words are for programmers."""
    fault = error.__cause__.errors()[0]
    param, value, kind = error.param, fault["input"], str(fault["type"])
    option = max(param.opts, key=len) if param.param_type_name == "option" else param.metavar
    choices = [str(each) for each in getattr(getattr(param, "type_descriptor", None), "choices", None) or ()]
    if option == "--format" and (use := _RUNTIMES.get(str(value).lower())):
        return f"{option} is '{value}', expected one of {', '.join(choices)}", use
    if choices:
        match = close_match(str(value), choices)
        hint = f"did you mean {option} {match}?" if match else f"for example {option} {choices[0]}"
        return f"{option} is '{value}', expected one of {', '.join(choices)}", hint
    if option == "--min-top1" and kind in _BOUNDS and 0 < float(value) < 1:
        help_hint = f"it is in percent: --min-top1 {100 * float(value):g}"
    if kind in _BOUNDS:
        return f"{option} is {value}, expected {_BOUNDS[kind].format(**fault['ctx'])}", help_hint
    for start, what in _NUMBERS.items():
        if kind.startswith(start):
            return f"{option} is '{value}', expected {what}", as_number(option, str(value)) or help_hint
    return f"{option}: {str(fault['msg']).removeprefix('Value error, ')}", help_hint


def as_number(option: str, value: str) -> str | None:
    """What to write for a text that people write for a number, "70%" or "0,7"; None where it is not known."""
    if share := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value):
        return f"{share[1]} % is {float(share[1]) / 100:g}"
    return f"try {option} {value.replace(',', '.')}" if re.fullmatch(r"\d+,\d+", value) else None
