"""Weight files of anyone: tensors by name, read without running code from them."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import load_state_dict
from torch import Tensor

from vitprune.common.formatting import first_line
from vitprune.errors import CheckpointError

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
    check_exists(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is damaged or no safetensors file: {error}", "copy it again") from error
    _check_finite(tensors, path)
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


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a torch pickle by name.

    Of a pickle timm unpickles tensors, plain containers and an argparse.Namespace, which training files hold beside
    the weights; nothing else.

    Raises:
        CheckpointError: the file is missing, damaged, a pickle of more than tensors, or holds NaN.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    check_exists(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own word on pickles; ours follows
            content = load_state_dict(str(path), weights_only=True)
    except (*_DAMAGE, RuntimeError, KeyError) as error:
        check_pickle(path)
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"'{path}' holds pickled Python objects, which could run code; only tensors are read",
                "save the state_dict alone, best as .safetensors",
            ) from error
        what = "is damaged, or not a PyTorch checkpoint"
        reason = "" if isinstance(error, KeyError) else f": {first_line(error)}"  # which is of pickle's insides
        raise CheckpointError(f"'{path}' {what}{reason}", "check the file, or copy it again") from error
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise CheckpointError(f"'{path}' holds no tensors")
    _check_finite(tensors, path)
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
        # A single number may be a bound that binds nothing, as in Gemma's clipped layers.
        good = ~tensor.isnan() if tensor.ndim == 0 else tensor.isfinite()
        if tensor.is_floating_point() and not good.all():
            raise _not_finite(path, name)


def _not_finite(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"'{path}' holds NaN or infinite values in '{name}'", "the training that made it went wrong")
