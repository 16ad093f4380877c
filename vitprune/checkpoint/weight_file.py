"""Weight files of anyone: tensors by name, read without running code from them."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vitprune.common.files import read_json
from vitprune.common.formatting import first_line
from vitprune.common.run_folder import WEIGHTS
from vitprune.errors import CheckpointError

INDEX = ".index.json"
WEIGHTS_ALONE = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".npz")
"""Endings of files that do not say of which model their weights are."""
EXPORTED = (".onnx", ".xml", ".pt2", ".pte", ".tflite", ".mlpackage")
"""Endings of what `vitprune export` writes beside timm folders."""
FOLDER_WEIGHTS = (
    WEIGHTS,
    f"{WEIGHTS}{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
    "model.bin",
    "pytorch_model.pth",
    "model.pth",
)
"""What the weights in a folder are called, the first that is there."""
_MAX_LEVELS = 3

_DAMAGE = (OSError, ValueError, EOFError, AttributeError, TypeError, pickle.UnpicklingError, zipfile.BadZipFile)
"""What readers raise on a file that is not what its name says."""


def check_exists(path: Path) -> None:
    """Make sure that there is a file.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_file():
        raise CheckpointError(f"file '{path}' not found", "check the path", exit_code=2)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        CheckpointError: the file is missing, damaged, or holds NaN.
    """
    tensors = _load_safetensors(path)
    _check_finite(tensors, path)
    return tensors


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    check_exists(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is damaged or no safetensors file: {error}", "copy it again") from error
    return tensors


def check_pickle(path: Path) -> None:
    """Make sure that a file begins as torch's do: as a zip archive, or a pickle.

    Raises:
        CheckpointError: it is missing, or neither.
    """
    check_exists(path)
    with path.open("rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):
            raise CheckpointError(f"'{path}' is not a PyTorch checkpoint", "check the file, or copy it again")


@dataclass(frozen=True)
class WeightFile:
    """What a weight file of anyone holds.

    Attributes:
        path: the file, or the index of several.
        groups: tensors by name, of each container in the file that has any, by the container's path: "" for the file
            itself, "state_dict_ema", "checkpoint.model".
        args: what a training script wrote down of its own options, {} where it did not.
    """

    path: Path
    groups: dict[str, dict[str, Tensor]]
    args: dict[str, Any] = field(default_factory=dict)


def open_weights(path: Path) -> WeightFile:
    """The tensors of a safetensors file, a torch pickle, or the shards that an index (`*.index.json`) names.

    Of a pickle tensors, plain containers and an argparse.Namespace are unpickled, which training files hold beside
    the weights; nothing else.

    Raises:
        CheckpointError: the file is missing, damaged, a pickle of more than tensors, or holds none.
    """
    if path.name.endswith(INDEX):
        return WeightFile(path, {"": _read_shards(path)})
    if path.suffix == ".safetensors":
        return WeightFile(path, {"": _load_safetensors(path)})
    content = _unpickle(path)
    groups = dict(_groups(content))
    if not groups:
        raise CheckpointError(f"'{path}' holds no tensors")
    args = content.get("args")
    return WeightFile(path, groups, dict(args if isinstance(args, Mapping) else getattr(args, "__dict__", {})))


def weights_in(path: Path) -> Path:
    """The weight file that a path names: itself, or of a folder the one in it.

    Raises:
        CheckpointError: the folder holds none.
    """
    if not path.is_dir():
        return path
    for name in FOLDER_WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"folder '{path}' holds no weights", f"there should be one of {', '.join(FOLDER_WEIGHTS)}", exit_code=2
    )


def in_fp32(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The same tensors, those of fewer or more bits in fp32, and what is to be said of it.

    Raises:
        CheckpointError: one is quantised, or holds NaN or infinite values; names it.
    """
    found, formats = {}, set[str]()
    for name, tensor in tensors.items():
        if tensor.is_quantized or tensor.layout != torch.strided:
            raise CheckpointError(f"'{path}' holds '{name}' quantised or sparse", "save its weights as plain floats")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            formats.add(_format(tensor.dtype))
            tensor = tensor.float()
        found[name] = tensor
    _check_finite(found, path)
    return found, _converted(formats, path)


def stored_formats(path: Path) -> list[str]:
    """What is to be said of the number formats in a safetensors file, whose tensors become fp32."""
    with safe_open(path, framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    found = {kind: re.match(r"(B?)F(\d+)", kind) for kind in kinds - {"F32"}}
    return _converted({f"{'bf' if each[1] else 'fp'}{each[2]}" for each in found.values() if each}, path)


def _converted(formats: set[str], path: Path) -> list[str]:
    return [f"the weights in '{path.name}' are {' and '.join(sorted(formats))}, converted to fp32"] if formats else []


def _format(dtype: torch.dtype) -> str:
    """The number format as options name it: fp16, bf16, fp8."""
    return f"{'bf' if dtype == torch.bfloat16 else 'fp'}{8 * dtype.itemsize}"


def _unpickle(path: Path) -> Mapping[Any, Any]:
    check_exists(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # torch's own word on pickles; ours follows
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (*_DAMAGE, RuntimeError, KeyError, IndexError) as error:
        check_pickle(path)
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"'{path}' holds pickled Python objects, which could run code; only tensors are read",
                "save the state_dict alone, best as .safetensors",
            ) from error
        what = "is damaged, or not a PyTorch checkpoint"
        reason = "" if isinstance(error, KeyError) else f": {first_line(error)}"  # which is of pickle's insides
        raise CheckpointError(f"'{path}' {what}{reason}", "check the file, or copy it again") from error
    return content if isinstance(content, Mapping) else {}


def _groups(content: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Containers that hold tensors, by path; an optimiser's go by number, and are none."""
    tensors = {name: each for name, each in content.items() if isinstance(name, str) and isinstance(each, Tensor)}
    if tensors:
        yield path, tensors
    if path.count(".") < _MAX_LEVELS:
        for name, each in content.items():
            if isinstance(name, str) and isinstance(each, Mapping):
                yield from _groups(each, f"{path}.{name}" if path else name)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index says are in files beside it."""
    check_exists(index)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(
            f"'{index}' is no index of weights: it has no 'weight_map'", "name the weight file itself"
        )
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, places.values()))):
        if Path(shard).name != shard:
            raise CheckpointError(f"'{index}' names '{shard}', which is no file beside it")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"shard '{shard}' of '{index}' not found", "copy all of its files", exit_code=2)
        held = open_weights(index.parent / shard).groups.get("", {})
        for name in (name for name, place in places.items() if place == shard):
            if name not in held:
                raise CheckpointError(f"'{index}' says that '{shard}' holds '{name}', and it does not", "copy it again")
            tensors[name] = held[name]
    return tensors


def check_npz(path: Path) -> None:
    """Make sure that a JAX weight file is whole and holds finite arrays only; timm reads it afterwards.

    Raises:
        CheckpointError: it is missing, damaged, holds Python objects, NaN or infinite values.
    """
    check_exists(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                if not np.isfinite(arrays[name]).all():
                    raise _not_finite(path, name)
    except _DAMAGE as error:
        raise CheckpointError(
            f"'{path}' is damaged, or not a JAX weight file: {error}", "check the file, or copy it again"
        ) from error


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype.itemsize == 1:  # eight bits know no infinity, and few operations
            tensor = tensor.float()
        # A single number may be a bound that binds nothing, as in Gemma's clipped layers.
        good = ~tensor.isnan() if tensor.ndim == 0 else tensor.isfinite()
        if tensor.is_floating_point() and not good.all():
            raise _not_finite(path, name)


def _not_finite(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"'{path}' holds NaN or infinite values in '{name}'", "the training that made it went wrong")
