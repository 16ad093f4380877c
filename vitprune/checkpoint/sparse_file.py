"""model.safetensors: a sparse model that says itself how it is to be rebuilt, offline and without a pickle."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import get_model_args, load_state_dict
from torch import Tensor, nn

from vitprune.backbones import preprocessing, wrap
from vitprune.checkpoint.metadata import METADATA_KEY, Metadata, Preprocessing, parse_metadata
from vitprune.common.files import replacing, write_json
from vitprune.common.formatting import first_line
from vitprune.common.run_folder import CONFIG, RunFolder
from vitprune.errors import CheckpointError
from vitprune.model import SparseViT, Sparsity
from vitprune.schedule import Schedule

_PREDICTORS = "predictors."
_Shapes = dict[str, tuple[int, ...]]
_DAMAGE = (OSError, ValueError, EOFError, AttributeError, pickle.UnpicklingError)
"""What readers raise on a file that is not what its name says."""


def describe(
    model: SparseViT,
    *,
    name: str | None = None,
    sparsity: Sparsity | None = None,
    class_names: tuple[str, ...] | None = None,
    origin: dict[str, Any] | None = None,
) -> Metadata:
    """The metadata of a sparse model, checked to rebuild it.

    Args:
        model: the sparse model.
        name: full timm name with the tag of the weights.
        sparsity: what was asked for; None for a geometric schedule.
        class_names: in output order.
        origin: source and licence of the weights.

    Raises:
        CheckpointError: the timm model was not made by `timm.create_model`, or with arguments JSON cannot hold.
    """
    from vitprune._version import __version__

    config: dict[str, Any] = model.pretrained_cfg
    architecture = config.get("architecture")
    if not architecture:
        raise CheckpointError(
            "the model does not say which timm architecture it is, so a file could not be loaded again",
            "make it with timm.create_model(...)",
        )
    try:
        arguments = json.loads(json.dumps(get_model_args(model.model)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the arguments that '{architecture}' was created with cannot be stored: {error}",
            "create it with numbers, strings and lists only",
        ) from error
    schedule = model.schedule
    asked = sparsity or Sparsity(keep=schedule.ratios[0] if schedule.stages else 1.0)
    free = asked.ratios is not None
    metadata = Metadata(
        model=re.sub(r"[^A-Za-z0-9_.-]+", "_", name or architecture),
        architecture=architecture,
        model_args=arguments,
        num_patches=schedule.num_patches,
        keep=None if free else asked.keep,
        schedule=None if free else asked.schedule,
        dropped=model.dropped,
        align=schedule.align,
        stages=list(schedule.stages),
        preprocessing=Preprocessing(**preprocessing(model.model)),
        class_names=list(class_names) if class_names else None,
        origin=origin or {},
        versions={"vitprune": __version__, "torch": str(torch.__version__), "timm": timm.__version__},
    )
    _check_shapes(rebuild(metadata, "meta"), _flatten(model), "this model", f"timm's '{architecture}'")
    return metadata


def save(model: SparseViT, path: Path, metadata: Metadata) -> None:
    """Write model.safetensors and, beside it, config.json with the same metadata; whole or not at all.

    Backbone tensors carry timm's own names; `predictors.<stage>.*` stand beside them.

    Raises:
        OutputError: the folder cannot be written or the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _flatten(model).items()}
    header = {"format": "pt", METADATA_KEY: metadata.model_dump_json()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header)
    write_json(path.parent / CONFIG, metadata.model_dump(mode="json"))


def load(path: str | Path, device: str | torch.device = "cpu") -> SparseViT:
    """Load a sparse model from a file that vitprune wrote; needs no network.

    Args:
        path: model.safetensors, or the run folder it is in.
        device: where to put it.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: the file is missing, damaged, not ours, or does not fit its own metadata.
    """
    model, _ = load_sparse(RunFolder.weights_in(Path(path)))
    return model.to(device)


def load_sparse(path: Path) -> tuple[SparseViT, Metadata]:
    """As `load`, with the metadata."""
    metadata = read_metadata(path)
    # Without data first: a header that lies about sizes must not make us allocate what it says.
    _compare_shapes(_shapes(_flatten(rebuild(metadata, "meta"))), _read_shapes(path), f"'{path}'", "its own metadata")
    model = rebuild(metadata, "cpu")
    tensors = _read_safetensors(path)
    _check_finite(tensors, path)
    fill(model, tensors, f"'{path}'", "its own metadata")
    return model.eval(), metadata


def fill(model: SparseViT, tensors: dict[str, Tensor], what: str, against: str) -> None:
    """Put tensors, under the names of the file, into `model`.

    Args:
        model: the sparse model.
        tensors: the backbone's under timm's names, and `predictors.<stage>.*`.
        what: where they come from, for the error.
        against: what `model` was built from, for the error.

    Raises:
        CheckpointError: one is missing, unexpected or of another shape; names it.
    """
    _check_shapes(model, tensors, what, against)
    model.load_state_dict({_module_name(name): tensor for name, tensor in tensors.items()})


def read_metadata(path: Path) -> Metadata:
    """The metadata of one of our files.

    Raises:
        CheckpointError: the file is missing, damaged, or not ours.
    """
    check_exists(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is damaged or no safetensors file: {error}", "copy it again") from error
    if METADATA_KEY not in header:
        raise CheckpointError(
            f"'{path}' was not written by vitprune: its header has no '{METADATA_KEY}' entry",
            f"for plain weights name the architecture too: MODEL --checkpoint {path}",
        )
    return parse_metadata(header[METADATA_KEY], path)


def rebuild(metadata: Metadata, device: str) -> SparseViT:
    """The model that the metadata describes, with fresh weights.

    Raises:
        CheckpointError: timm does not know the architecture or refuses its arguments.
    """
    try:
        with torch.device(device):
            model: nn.Module = timm.create_model(
                metadata.architecture,
                pretrained=False,
                pretrained_cfg_overlay=metadata.preprocessing.model_dump(),
                **metadata.model_args,
            )
            backbone = wrap(model)
            if backbone.num_patches != metadata.num_patches:
                raise ValueError(f"stages: made for {metadata.num_patches} patches, not {backbone.num_patches}")
            schedule = Schedule(backbone.depth, metadata.num_patches, tuple(metadata.stages), metadata.align)
            return SparseViT(model, schedule, dropped=metadata.dropped)
    except Exception as error:  # arguments of a file from anywhere: timm may stumble over them in any way
        raise CheckpointError(
            f"cannot build '{metadata.architecture}' as the metadata says: {error}",
            f"it was written with timm {metadata.versions.get('timm', '?')}, this is {timm.__version__}",
        ) from error


def written_by_vitprune(path: Path) -> bool:
    """Whether a safetensors file carries our header."""
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def check_exists(path: Path) -> None:
    """Make sure that there is a file.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file '{path}'", "check the path")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name; never runs code from it.

    Of a torch pickle timm unpickles tensors, plain containers and an argparse.Namespace, which training files hold
    beside the weights; nothing else.

    Raises:
        CheckpointError: the file is missing, damaged, a pickle of more than tensors, or holds NaN.
    """
    check_exists(path)
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own word on pickles; ours follows
                state = load_state_dict(str(path), weights_only=True)
        except (*_DAMAGE, RuntimeError, KeyError) as error:
            if "weights_only" in str(error) or "Unsupported" in str(error):
                raise CheckpointError(
                    f"'{path}' holds pickled Python objects, which could run code; only tensors are read",
                    "save the state_dict alone, best as .safetensors",
                ) from error
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise CheckpointError(f"'{path}' is damaged or no weight file: {reason}", "copy it again") from error
    state = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if not state:
        raise CheckpointError(f"'{path}' holds no tensors")
    _check_finite(state, path)
    return state


def check_npz(path: Path) -> None:
    """Make sure that a JAX weight file is whole and holds finite arrays only; timm reads it afterwards.

    Raises:
        CheckpointError: it is missing, damaged, holds Python objects, NaN or infinite values.
    """
    check_exists(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            finite = {name: bool(np.isfinite(arrays[name]).all()) for name in arrays.files}
    except (*_DAMAGE, TypeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"'{path}' is damaged or no weight file: {error}", "copy it again") from error
    for name, good in finite.items():
        if not good:
            raise _not_finite(path, name)


def _not_finite(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"'{path}' holds NaN or infinite values in '{name}'", "the training that made it went wrong")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is damaged or no safetensors file: {error}", "copy it again") from error


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        # A single number may be a bound that binds nothing, as in Gemma's clipped layers.
        good = ~tensor.isnan() if tensor.ndim == 0 else tensor.isfinite()
        if tensor.is_floating_point() and not good.all():
            raise _not_finite(path, name)


def _check_shapes(model: SparseViT, tensors: dict[str, Tensor], what: str, against: str) -> None:
    _compare_shapes(_shapes(_flatten(model)), _shapes(tensors), what, against)


def _compare_shapes(expected: _Shapes, found: _Shapes, what: str, against: str) -> None:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{what} does not fit {against}: tensor '{name}' is {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'none')}"
            )


def _shapes(tensors: dict[str, Tensor]) -> _Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _read_shapes(path: Path) -> _Shapes:
    """What the header says of the tensors; safetensors has checked that the file is as long as that needs."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _flatten(model: SparseViT) -> dict[str, Tensor]:
    """Tensors under the names of the file: timm's own, and `predictors.*`."""
    return {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}


def _module_name(name: str) -> str:
    return name if name.startswith(_PREDICTORS) else f"model.{name}"
