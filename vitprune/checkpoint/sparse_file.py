"""model.safetensors: a sparse model that says itself how it is to be rebuilt, offline and without a pickle."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import get_model_args
from torch import Tensor, nn

from vitprune._version import __version__
from vitprune.backbones import preprocessing, wrap
from vitprune.checkpoint.metadata import METADATA_KEY, Metadata, Preprocessing, parse_metadata
from vitprune.checkpoint.weight_file import EXPORTED, WEIGHTS_ALONE, check_exists, read_safetensors
from vitprune.common.files import replacing, write_json
from vitprune.common.run_folder import CONFIG
from vitprune.errors import CheckpointError, UsageError
from vitprune.model import SparseViT, build
from vitprune.model.blend import Blend, tail_parameters
from vitprune.schedule import Schedule, Sparsity

_Shapes = dict[str, tuple[int, ...]]


class Header(NamedTuple):
    """What the file of a model says of it, and the sum of each tensor when it said so."""

    metadata: Metadata
    sums: tuple[float, ...]


def describe(
    model: SparseViT,
    *,
    name: str | None = None,
    sparsity: Sparsity | None = None,
    class_names: tuple[str, ...] | None = None,
    origin: dict[str, Any] | None = None,
) -> Metadata:
    """The metadata of a sparse model, checked to rebuild it.

    A model that is from a file, or was saved, keeps what that says of its origin, and while its weights are the same
    of accuracy and training.

    Args:
        model: the sparse model.
        name: full timm name with the tag of the weights.
        sparsity: what was asked for; None for what the model's schedule says, else its stages' own ratios.
        class_names: in output order; None for the model's own.
        origin: source and licence of the weights.

    Raises:
        CheckpointError: the timm model was not made by `timm.create_model`, or with arguments JSON cannot hold.
    """
    if class_names is not None and len(class_names) != model.num_classes:
        raise UsageError(
            f"{len(class_names)} class names for {model.num_classes} classes", "one for each output, in their order"
        )
    config: dict[str, Any] = model.pretrained_cfg
    architecture = config.get("architecture")
    if not architecture:
        raise CheckpointError(
            "the model does not say which timm architecture it is, so a file could not be loaded again",
            "make it with timm.create_model(...)",
        )
    _check_plain(model)
    try:
        arguments = json.loads(json.dumps(get_model_args(model.model) | {"num_classes": model.num_classes}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the arguments that '{architecture}' was created with cannot be stored: {error}",
            "create it with numbers, strings and lists only",
        ) from error
    if model.predictor is None:
        raise CheckpointError("the model's predictors are not vitprune's, so a file could not be loaded again")
    schedule, asked = model.schedule, sparsity or model.sparsity
    free = bool(schedule.stages) and (asked is None or asked.tokens_left is not None)
    before = model.header.metadata if model.header else None
    measured = before.at(model.keep, schedule.stages) if before and model.header.sums == _sums(model) else None
    metadata = Metadata(
        model=re.sub(r"[^A-Za-z0-9_.-]+", "_", name or (before.model if before else architecture)),
        architecture=architecture,
        model_args=arguments,
        task=model.task,
        num_patches=schedule.num_patches,
        keep=None if free else asked.keep if asked else 1.0,
        keep_range=asked and asked.keep_range,
        blended=model.blend is not None,
        schedule=None if free else asked.token_schedule if asked else "geometric",
        pruned=model.pruned,
        predictor=model.predictor,
        balance=model.balance,
        beta=model.beta,
        similarity=model.similarity,
        align=schedule.align,
        stages=list(schedule.stages),
        preprocessing=Preprocessing(**preprocessing(model.model)),
        class_names=list(class_names or model.class_names or ()) or None,
        origin=origin or (before.origin if before else {}),
        accuracy=measured and measured.accuracy,
        training=measured and measured.training,
        versions={"vitprune": __version__, "torch": str(torch.__version__), "timm": timm.__version__},
    )
    hint = "a layer was replaced since timm.create_model made it, or the model was changed in a way timm does not know"
    _check_shapes(rebuild(metadata, "meta"), _shapes(_flatten(model)), "this model", f"timm's '{architecture}'", hint)
    return metadata


def save(model: SparseViT, path: Path, metadata: Metadata) -> None:
    """Write model.safetensors and, beside it, config.json with the same metadata; whole or not at all.

    Backbone tensors carry timm's own names; `predictors.<stage>.*` stand beside them, and of a model with a blend
    `dense.*`: timm's names then have the weights for the lowest keep ratio.

    Raises:
        OutputError: the folder cannot be written or the disk is full.
    """
    metadata.blended = model.blend is not None  # only training tells
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _flatten(model).items()}
    header = {"format": "pt", METADATA_KEY: metadata.model_dump_json()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header)
    write_json(path.parent / CONFIG, metadata.model_dump(mode="json"))
    remember(model, metadata)


def remember(model: SparseViT, metadata: Metadata) -> None:
    """Let a model know what its file says, or would, for `describe`."""
    model.header = Header(metadata.model_copy(), _sums(model))


def load_sparse(path: Path) -> tuple[SparseViT, Metadata]:
    """A sparse model from a file that vitprune wrote, in eval mode, and its metadata; needs no network.

    Raises:
        CheckpointError: the file is missing, damaged, not ours, or does not fit its own metadata.
    """
    metadata = read_metadata(path)
    # Without data first: a header that lies about sizes must not make us allocate what it says.
    _check_shapes(rebuild(metadata, "meta"), _read_shapes(path), f"'{path}'", "its own metadata")
    model = rebuild(metadata, "cpu")
    fill(model, read_safetensors(path), f"'{path}'", "its own metadata")
    remember(model, metadata)
    return model.eval(), metadata


def fill(model: SparseViT, tensors: dict[str, Tensor], what: str, against: str) -> None:
    """Put tensors, under the names of the file, into `model`.

    An error says that `what` they come from does not fit `against`, which the model was built from.

    Raises:
        CheckpointError: one is missing, unexpected or of another shape; names it.
    """
    _check_shapes(model, _shapes(tensors), what, against)
    parts: dict[str, dict[str, Tensor]] = {"predictors": {}, **({"dense": {}} if model.blend else {}), "": {}}
    for name, tensor in tensors.items():
        part = next(part for part in parts if not part or name.startswith(f"{part}."))
        parts[part][name.removeprefix(f"{part}.")] = tensor
    model.predictors.load_state_dict(parts["predictors"])
    model.model.load_state_dict(parts[""])
    if model.blend is not None:
        model.blend = Blend(parts["dense"], {name: parts[""][name] for name in parts["dense"]}, model.blend.lowest)
        model.blend.fill(model.model, model.keep or 1.0)


def read_metadata(path: Path) -> Metadata:
    """The metadata of one of our files.

    Raises:
        CheckpointError: the file is missing, damaged, or not ours.
    """
    check_exists(path)
    if path.suffix in EXPORTED:
        raise CheckpointError(f"'{path}' is an exported file", "load the model.safetensors that it was made from")
    alone = f"plain weights go with the name of their architecture: NAME and --checkpoint {path}"
    if path.suffix in WEIGHTS_ALONE:
        raise CheckpointError(f"'{path}' holds weights alone, no model that vitprune wrote", alone)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is damaged or no safetensors file: {error}", "copy it again") from error
    if METADATA_KEY not in header:
        raise CheckpointError(
            f"'{path}' was not written by vitprune: its header has no '{METADATA_KEY}' entry",
            alone,
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
                pretrained_cfg_overlay=metadata.preprocessing.model_dump(exclude={"exif"}),  # not one of timm's
                **metadata.model_args,
            )
            if metadata.preprocessing.exif:
                model.pretrained_cfg = {**model.pretrained_cfg, "exif": True}  # type: ignore[assignment,dict-item]
            backbone = wrap(model)
            if backbone.num_patches != metadata.num_patches:
                raise ValueError(f"stages: made for {metadata.num_patches} patches, not {backbone.num_patches}")
            stages, asked = tuple(metadata.stages), _asked_for(metadata)
            schedule = Schedule(backbone.depth, metadata.num_patches, stages, metadata.align, asked)
            selection = metadata.predictor, metadata.pruned, metadata.balance, metadata.beta, metadata.similarity
            sparse = build(model, schedule, *selection)
            sparse.class_names = tuple(metadata.class_names) if metadata.class_names else None
            sparse.task = metadata.task
            if metadata.blended:
                if metadata.keep_range is None:
                    raise ValueError("blended, but made for one keep ratio")
                tail = tail_parameters(backbone, stages[0].block)
                sparse.blend = Blend(tail, tail, metadata.keep_range[0])
            return sparse
    except Exception as error:  # arguments of a file from anywhere: timm may stumble over them in any way
        raise CheckpointError(
            f"cannot build '{metadata.architecture}' as the metadata says: {getattr(error, 'message', error)}",
            f"it was written with timm {metadata.versions.get('timm', '?')}, this is {timm.__version__}",
        ) from error


def written_by_vitprune(path: Path) -> bool:
    """Whether a safetensors file carries our header."""
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _asked_for(metadata: Metadata) -> Sparsity:
    """What the model of a file was asked to be."""
    return Sparsity(
        keep=metadata.keep or Sparsity.keep,
        prune_at=[stage.block for stage in metadata.stages] or None,
        token_schedule=metadata.schedule or Sparsity.token_schedule,
        tokens_left=[stage.ratio for stage in metadata.stages] if metadata.keep is None else None,
        pruned=metadata.pruned,
        align=metadata.align,
        balance=metadata.balance,
        beta=metadata.beta,
        predictor=metadata.predictor,
        similarity=metadata.similarity,
        keep_range=metadata.keep_range,
    )


def _sums(model: SparseViT) -> tuple[float, ...]:
    """The sum of each tensor: equal weights have equal ones, on the CPU."""
    return tuple(tensor.detach().cpu().double().sum().item() for tensor in _flatten(model).values())


def _check_plain(model: SparseViT) -> None:
    """Layers that something else put in the place of timm's and ours cannot be rebuilt from the file."""
    for name, value in _flatten(model).items():
        if not isinstance(value, Tensor):
            layer = re.sub(r"\._packed_params.*", "", name)
            raise UsageError(
                f"the layer '{layer}' is quantised, and a file could not hold it", "save before quantising"
            )
        if ".base_layer." in name or ".lora_" in name:
            hint = "merge the adapters first: of PEFT's model, merge_and_unload() gives the SparseViT"
            raise UsageError(f"'{name}' is of an adapter such as LoRA, and a file could not hold it", hint)


def _check_shapes(model: SparseViT, found: _Shapes, what: str, against: str, hint: str | None = None) -> None:
    expected = _shapes(_flatten(model))
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{what} does not fit {against}: tensor '{name}' is {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'none')}",
                hint,
            )


def _shapes(tensors: dict[str, Tensor]) -> _Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _read_shapes(path: Path) -> _Shapes:
    """What the header says of the tensors; safetensors has checked that the file is as long as that needs."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _flatten(model: SparseViT) -> dict[str, Tensor]:
    """Tensors under the names of the file: timm's own, and `predictors.*`. The plan is not there: the header has it."""
    tensors: dict[str, Tensor] = model.model.state_dict()
    if model.blend is not None:
        tensors |= model.blend.tuned | {f"dense.{name}": tensor for name, tensor in model.blend.dense.items()}
    return tensors | model.predictors.state_dict(prefix="predictors.")
