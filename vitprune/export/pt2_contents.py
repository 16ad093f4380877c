"""What a .pt2 file may hold. To torch.export.load such a file is a program in more than one way.

As of torch 2.15 it unpickles any object that the file asks for (example inputs, constants, custom objects), loads
compiled libraries, evaluates size expressions as Python, calls whatever operator is named, below `torch` too, and
writes the names in the graph into Python code. vitprune's own files need none of that, so a file that has any of it is
refused before torch sees it. That narrows what a file can do and proves nothing: open only files that you trust.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitprune.errors import CheckpointError

METADATA_RECORD = "vitprune.json"

_WEIGHTS, _CONSTANTS, _EXAMPLES, _GRAPH = (
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
    "data/sample_inputs/model.pt",
    "models/model.json",
)
_RECORD = re.compile(
    r"\.?\w+|\.data/[\w.]+|data/weights/weight_\d+|data/constants/tensor_\d+|extra/vitprune\.json|"
    + "|".join(map(re.escape, (_WEIGHTS, _CONSTANTS, _EXAMPLES, _GRAPH))),
    re.ASCII,
)
_OPERATOR = re.compile(r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+|_operator\.\w+", re.ASCII)
_SYMBOL = re.compile(r"Symbol\('\w+'(, (positive|nonnegative|integer)=True)*\)|Integer\(-?\d{1,9}\)", re.ASCII)
_SIZE = re.compile(r"(\d{1,9}|Add|Mul|[-+(), ]|\*(?!\*))*", re.ASCII)
_WORD = re.compile(r"[\w.+-]{0,500}", re.ASCII)
_STRUCTURE = re.compile(r"[\w.\s\[\]{}:,\"-]*", re.ASCII)
_ABOUT_A_NODE = {"stack_trace", "nn_module_stack", "torch_fn"}
"""Texts that torch keeps as they are; others it looks up."""


def check_contents(content: bytes, path: Path) -> str:
    """Make sure that a .pt2 file is of the kind that vitprune writes.

    Args:
        content: the file.
        path: where it is, for the error.

    Returns:
        The metadata in it, as text.

    Raises:
        CheckpointError: it is damaged, has no metadata of ours, or holds more than tensors and plain operators.
    """
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(content))
        names: list[str] = reader.get_all_records()
    except RuntimeError as error:
        raise CheckpointError(f"'{path}' is damaged or no .pt2 file", "copy it again") from error
    if f"extra/{METADATA_RECORD}" not in names:
        raise CheckpointError(
            f"'{path}' was not written by vitprune: it has no '{METADATA_RECORD}'",
            "vitprune export MODEL --format pt2 writes a file that has one",
        )
    for name in names:
        if not _RECORD.fullmatch(name):
            raise _refused(path, f"it holds '{name}'")
    try:
        for config, folder in ((_WEIGHTS, "data/weights"), (_CONSTANTS, "data/constants")):
            for payload in json.loads(reader.get_record(config))["config"].values():
                if payload["use_pickle"]:
                    _check_pickle(reader.get_record(f"{folder}/{payload['path_name']}"), path)
        _check_pickle(reader.get_record(_EXAMPLES), path)
        _check_graph(json.loads(reader.get_record(_GRAPH)), path)
        return bytes(reader.get_record(f"extra/{METADATA_RECORD}")).decode("utf-8")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is damaged: {type(error).__name__}: {error}", "copy it again") from error


def _check_pickle(content: bytes, path: Path) -> None:
    """What torch's own restricted reader takes runs no code in the other one either."""
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # of a file from anywhere
        raise _refused(path, "it holds pickled Python objects") from error


def _check_graph(value: Any, path: Path, key: str = "") -> None:
    if isinstance(value, Mapping):
        if key == "metadata" and value.keys() <= _ABOUT_A_NODE:
            return
        for name, part in value.items():
            _check_text(name, path, "name")
            _check_graph(part, path, name)
    elif isinstance(value, list):
        for part in value:
            _check_graph(part, path, key)
    elif isinstance(value, str):
        _check_text(value, path, key)


def _check_text(text: str, path: Path, key: str) -> None:
    if key == "target" and not _OPERATOR.fullmatch(text):
        raise _refused(path, f"its graph calls '{text}'")
    if key == "expr_str":
        text, allowed = _SYMBOL.sub("0", text), _SIZE
    else:
        allowed = _STRUCTURE if key in ("in_spec", "out_spec") else _WORD
    if not allowed.fullmatch(text):
        raise _refused(path, f"its graph has '{text[:80]}' as a {key}")


def _refused(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"'{path}' could run code when opened: {what}, which no file of vitprune does",
        "export the model again with this version of vitprune and torch",
    )
