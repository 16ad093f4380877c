"""Every error vitprune raises on purpose, and the exit code the command line gives it: 2 where an argument is wrong.

VitpruneError (1)
├── UsageError (2)             an argument is out of range or does not fit the others
├── UnknownModelError (2)      no model of that name
├── UnsupportedModelError (2)  a timm model whose tokens cannot be pruned, with the reason
├── CheckpointError (1)        a weight file that is damaged, foreign or does not fit; (2) that is missing
├── DataError (1)              images that are unreadable or do not fit the model's classes; (2) that are missing
├── HubError (1)               the Hugging Face Hub is out of reach, or the repository is gated or absent
├── DeviceError (2)            the device is not available
├── OutputError (1)            the output cannot be written, or the disk is full; (2) it exists
├── TrainingError (1)          training cannot continue
├── ExportError (1)            a model that cannot be exported, or whose file computes something else
├── Interrupted (130)          the user stopped the run; says what was saved
└── Preempted (143)            the run was terminated (SIGTERM, or with 129 SIGHUP); says what was saved
"""

from __future__ import annotations

import re
from typing import Any

__all__ = [
    "CheckpointError",
    "DataError",
    "DeviceError",
    "ExportError",
    "HubError",
    "Interrupted",
    "OutputError",
    "Preempted",
    "TrainingError",
    "UnknownModelError",
    "UnsupportedModelError",
    "UsageError",
    "VitpruneError",
]


_FLAGS = {
    "no-labels": "labels=False",
    "overwrite": "overwrite=True",
    "resume": "resume=True",
    "compile": "compile=True",
}
_RENAMED = {"workers": "num_workers", "grad-accum-steps": "grad_accum"}
_SET = re.compile(r"--set (?=[a-z])")
_KWARG = re.compile(r"--model-kwargs (\w+)=([\w.]+)")
_KEY = re.compile(r"--checkpoint-key (\S+)")
_LITERAL = re.compile(r"[\d.]+|True|False|None")
_OUTPUT = re.compile(r"(?<!\S)-o (?=\S)")
_PHRASES = {
    "of their architecture: NAME and --checkpoint": "of their architecture, as vitprune.sparsify and evaluate take "
    "it: NAME and --checkpoint",
    "vitprune sparsify --print-config": "help(vitprune.Recipe)",
    "eval --skip-unreadable and sparsify --set max_unreadable=0.1 skip such images": "in training, "
    "max_unreadable=0.1 skips such images",
}
_OF_TABLES = re.compile(
    r"--(train-split|val-split|input-key|target-key|streaming|class-order|class-map|labels|max-pixels|exif)\b"
)
"""What a Dataset of one's own says in Python."""
_OPTION = re.compile(
    r"--(?P<name>[a-z][a-z0-9-]*)"
    r"(?:[ =](?:(?P<word>cpu|cuda|auto|fp32|bf16|fp16|int8|eager"
    r"|onnx|openvino|pt2|aoti|executorch|litert|coreml|timm"
    r"|classification|multilabel|regression|embedding|dense)\b"
    r"|(?P<list>\d[\d.]*(?:,\d[\d.]*)+)"
    r"|(?P<range>[\d.]+-[\d.]+\d)"
    r"|(?P<other>\d[\d.e-]*(?![\w.])|[A-Z]+\b|[^\s:;,]*/[^\s:;,]+)))?"
)


def in_python(text: str) -> str:
    """What is said to users of the command line, said to those of Python: "--align 8" is "align=8"."""

    def argument(option: re.Match[str]) -> str:
        flag = option["name"]
        name = _RENAMED.get(flag, flag.replace("-", "_"))
        if option["word"]:
            return f'{name}="{option["word"]}"'
        if option["range"]:
            return f"{name}=({option['range'].replace('-', ', ')})"
        if option["list"]:
            return f"{name}=[{option['list'].replace(',', ', ')}]"
        return f"{name}={option['other']}" if option["other"] else _FLAGS.get(flag, name)

    def kwarg(option: re.Match[str]) -> str:
        value = option[2] if _LITERAL.fullmatch(option[2]) else f'"{option[2]}"'
        return f'model_kwargs={{"{option[1]}": {value}}}'

    text = _KEY.sub(r'checkpoint_key="\1"', _KWARG.sub(kwarg, text))
    for phrase, other in _PHRASES.items():
        text = text.replace(phrase, other)
    return _OPTION.sub(argument, _SET.sub("", _OUTPUT.sub("output=", text)))


class VitpruneError(Exception):
    """What was wrong (with the offending value) and, as `hint`, the way out.

    Both name options of the command line; the text of the exception, for Python programs, has arguments instead.

    Args:
        message: one sentence.
        hint: the way out.
        exit_code: of the command line; None for that of the kind.

    Attributes:
        saved: what a run that did not end well has written, for JSON; None where there is nothing.
    """

    exit_code = 1
    saved: dict[str, Any] | None = None

    def __init__(self, message: str, hint: str | None = None, *, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code

    def __str__(self) -> str:
        hint = self.hint
        if hint is not None and _OF_TABLES.search(hint):
            hint = "give its images as a torch Dataset instead"
        return in_python(self.message if hint is None else f"{self.message}\nhint: {hint}")


class UsageError(VitpruneError, ValueError):
    """An argument is out of range or does not fit the others."""

    exit_code = 2


class UnknownModelError(VitpruneError):
    """No model of that name."""

    exit_code = 2


class UnsupportedModelError(VitpruneError):
    """A model whose tokens cannot be pruned."""

    exit_code = 2


class CheckpointError(VitpruneError):
    """A weight file that is missing, damaged, foreign or does not fit."""


class DataError(VitpruneError):
    """Images that are missing, unreadable or do not fit the model's classes."""


class HubError(VitpruneError):
    """The Hugging Face Hub is out of reach, or the repository is gated or absent."""


class DeviceError(VitpruneError):
    """The device is not available."""

    exit_code = 2


class OutputError(VitpruneError):
    """The output exists, cannot be written, or the disk is full."""


class TrainingError(VitpruneError):
    """Training cannot continue."""


class ExportError(VitpruneError):
    """A model that cannot be exported, or whose file computes something else."""


class Interrupted(VitpruneError):
    """The user stopped the run."""

    exit_code = 130


class Preempted(VitpruneError):
    """The run was terminated by SIGTERM, or its terminal closed."""

    exit_code = 143
