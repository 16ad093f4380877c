"""From a MODEL argument to a timm model with its weights."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import timm

from vitprune.adaptive import read_adaptive
from vitprune.backbones import input_size
from vitprune.checkpoint.engine_programs import read_executorch, read_litert, read_openvino
from vitprune.checkpoint.onnx_program import read_onnx
from vitprune.checkpoint.program import Program
from vitprune.checkpoint.sparse_file import load_sparse, written_by_vitprune
from vitprune.checkpoint.weight_file import (
    EXPORTED,
    INDEX,
    WEIGHTS_ALONE,
    check_exists,
    check_pickle,
    read_safetensors,
    stored_formats,
)
from vitprune.common.run_folder import ADAPTIVE, RunFolder
from vitprune.errors import UsageError
from vitprune.loading.adapted import adaptations, resampled
from vitprune.loading.hub import HUB_PREFIX, check_hub, fetch, from_hub
from vitprune.loading.loaded import Loaded, as_loaded, find_task, loaded_from, names_of, without_head
from vitprune.loading.names import resolve_name
from vitprune.loading.own_weights import build_with_weights, check_made_from
from vitprune.loading.saved_folder import build_from_folder
from vitprune.loading.structure import check_size, structure
from vitprune.loading.task import AskedTask, check_same_task, check_task, with_head

__all__ = ["Loaded", "Weights", "device_for", "is_exported", "load_dense", "load_model", "loaded_from", "sparse_file"]

Weights = Literal["pretrained", "random", "none"]

_READERS: dict[str, Callable[[Path], Program]] = {
    ".onnx": read_onnx,
    ".xml": read_openvino,
    ".pte": read_executorch,
    ".tflite": read_litert,
}
_PROGRAMS = {".pt2": "PyTorch", ".mlpackage": "Core ML"}
_KEY = "checkpoint_key"
"""Entry of a file's origin: which of several sets of weights it was made from."""
_OF_WEIGHTS = ("img_size", "num_classes", "in_chans")
"""Arguments of a model that its weights bring along."""


def load_model(
    spec: str,
    *,
    checkpoint: Path | None = None,
    checkpoint_key: str | None = None,
    weights: Weights = "pretrained",
    img_size: int | tuple[int, int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    exported: bool = False,
    task: AskedTask = "auto",
) -> Loaded:
    """Build the model that `spec` names and load its weights.

    Args:
        spec: a timm name or short name, `hf-hub:owner/name`, a .safetensors file of ours or its run folder, a folder
            that timm or transformers saved, or `demo`.
        checkpoint: a weight file (.safetensors, .pth, .bin, .npz) instead of the Hub's, the index of several, or a
            folder with one.
        checkpoint_key: which of several sets of weights in it, such as "state_dict_ema".
        weights: "pretrained", or without any file or download "random", or "none": the structure alone, on the
            meta device.
        img_size: another image size in pixels, or height and width; position embeddings are resampled.
        model_kwargs: more arguments for timm.create_model.
        preprocessing: replaces entries of timm's data configuration, beside `checkpoint`.
        exported: whether an ONNX file that `vitprune export` wrote will do, which can be run and nothing else.
        task: what the model is for; "auto" believes the checkpoint, see `vitprune.loading.task.task_of`. "embedding"
            leaves a classifier out.

    Raises:
        UnknownModelError: no such model; offers close matches.
        UnsupportedModelError: the model's tokens cannot be pruned.
        UsageError: options that do not go together, or a task that does not go with the model.
        CheckpointError: a weight file is missing, damaged, or does not fit.
        HubError: the weights cannot be had from the Hub.
    """
    check_task(task)
    load = next(load for matches, load in _SOURCES if matches(spec))
    if checkpoint is not None and load is not _load_name:
        raise UsageError(
            f"'{spec}' has weights of its own; --checkpoint goes with a timm name",
            "name the model.safetensors that it was made from" if is_exported(spec) else None,
        )
    if checkpoint_key is not None and checkpoint is None:
        raise UsageError("--checkpoint-key names weights in a file, and there is no --checkpoint")
    kwargs = dict(model_kwargs or {})
    if "img_size" in kwargs:
        if img_size is not None:
            raise UsageError("--img-size and --model-kwargs img_size both say the image size", "give one of them")
        img_size = kwargs.pop("img_size")
    options = _Options(checkpoint, checkpoint_key, weights, img_size, kwargs, exported, task)
    loaded = load(spec, options)
    if loaded.metadata is not None:
        check_same_task(task, loaded.metadata.task, spec)
        loaded.task = loaded.metadata.task
    else:
        find_task(loaded, task, headless=options.headless)
    if preprocessing:
        if loaded.metadata is not None:
            given = ", ".join(f"--{key.replace('_', '-')}" for key in preprocessing)
            raise UsageError(f"'{spec}' says itself how images are prepared", f"leave out {given}")
        _prepare_images(loaded.model, preprocessing)
    return loaded


def _prepare_images(model: Any, preprocessing: Mapping[str, Any]) -> None:
    """Replace entries of the model's data configuration."""
    if (channels := input_size(model)[0]) != 3:
        wrong = [key for key in ("mean", "std") if len(preprocessing.get(key, range(channels))) != channels]
        if wrong:
            raise UsageError(f"--{wrong[0]} has 3 numbers, and the model takes images of {channels} channel(s)")
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **preprocessing}


@dataclass(frozen=True)
class _Options:
    """The arguments of `load_model` beside MODEL, see there."""

    checkpoint: Path | None
    checkpoint_key: str | None
    weights: Weights
    img_size: int | tuple[int, int] | None
    model_kwargs: dict[str, Any]
    exported: bool
    task: AskedTask

    @property
    def headless(self) -> bool:
        """Whether a classifier is asked to be left out."""
        return self.model_kwargs.get("num_classes") == 0

    @property
    def may_lack_head(self) -> bool:
        """Whether weights of an encoder will do."""
        return self.headless or self.task in ("embedding", "dense")

    @property
    def arguments(self) -> dict[str, Any]:
        """For timm.create_model; a head is left out once the weights are in."""
        arguments = self.model_kwargs | ({} if self.img_size is None else {"img_size": self.img_size})
        return with_head(arguments)


def is_exported(spec: str) -> bool:
    """Whether MODEL names a file that `vitprune export` wrote, or its folder of a cascade."""
    path = Path(spec)
    return path.name.endswith(EXPORTED) or (path / ADAPTIVE).is_file()


def device_for(spec: str, device: str, precision: str) -> str:
    """The device that MODEL runs on: the one asked for, or the CPU for an exported file.

    Raises:
        UsageError: an exported file is asked to run elsewhere, or in another precision than it has.
    """
    if not is_exported(spec):
        return device
    for option, value, allowed in (("--device", device, ("auto", "cpu")), ("--precision", precision, ("auto",))):
        if value not in allowed:
            raise UsageError(
                f"{option} {value} does not go with '{spec}': exported files run on the CPU, in their own precision",
                f"leave out {option}, or name the model.safetensors that it was made from",
            )
    return "cpu"


def _load_exported(spec: str, options: _Options) -> Loaded:
    path = Path(spec)
    read = read_adaptive if (path / ADAPTIVE).is_file() else _READERS.get(path.suffix)
    if read is None:
        raise UsageError(
            f"'{spec}' is a program of {_PROGRAMS[path.suffix]}, which vitprune writes and does not run",
            "torch.export.load opens .pt2, torch._inductor.aoti_load_package .aoti.pt2, coremltools .mlpackage; name "
            f"the model.safetensors that it was made from, or a file in {', '.join(_READERS)}",
        )
    if not options.exported:
        raise UsageError(
            f"'{spec}' is an exported file, which only `vitprune eval`, `predict` and `bench` can use",
            "name the model.safetensors that it was made from",
        )
    _refuse_arguments(spec, options)
    program = read(path)
    metadata = program.metadata
    names = names_of(metadata.class_names)
    return Loaded(spec, metadata.model, program, None, names, metadata.origin, metadata, task=metadata.task)


def _refuse_weights_alone(spec: str, options: _Options) -> NoReturn:
    (check_exists if spec.endswith((".npz", ".tar", INDEX)) else check_pickle)(Path(spec))
    file = shlex.quote(spec)
    raise UsageError(
        f"'{spec}' holds weights alone, which do not say of which model",
        f"name it: MODEL --checkpoint {file}; an official DynamicViT checkpoint: vitprune convert {file} --keep 0.7",
    )


def _load_file(spec: str, options: _Options) -> Loaded:
    _refuse_arguments(spec, options)
    if not spec.endswith(".safetensors"):
        folder = Path(spec).parent
        hint = f"name the run folder: {folder}" if sparse_file(str(folder)) else "name a timm model or a run folder"
        raise UsageError(f"'{spec}' is not a model", hint)
    sparse, metadata = load_sparse(Path(spec))
    names = names_of(metadata.class_names)
    said = stored_formats(Path(spec))
    about = (names, metadata.origin, metadata, said, metadata.task)
    return Loaded(spec, metadata.model, sparse.model, sparse, *about)


def _refuse_arguments(spec: str, options: _Options) -> None:
    if options.img_size is not None:
        raise UsageError(f"'{spec}' has an image size of its own; --img-size goes with a timm name")
    if options.model_kwargs:
        raise UsageError(f"'{spec}' says how its model is built; --model-kwargs goes with a timm name")


def _load_demo(spec: str, options: _Options) -> Loaded:
    from vitprune.data import demo

    _refuse_arguments(spec, options)
    model = timm.create_model(
        demo.ARCHITECTURE, pretrained=False, pretrained_cfg_overlay=demo.PREPROCESSING, **demo.MODEL_ARGS
    )
    model.load_state_dict(read_safetensors(demo.WEIGHTS))
    origin = {"source": "vitprune's demo model", "license": "apache-2.0"}
    return Loaded(spec, "demo", model.eval(), class_names=demo.CLASS_NAMES, origin=origin)


def _load_folder(spec: str, options: _Options) -> Loaded:
    """A run folder of ours, or a model that timm or transformers saved."""
    if file := sparse_file(spec):
        return _load_file(str(file), options)
    folder = Path(spec).resolve()
    model, said = build_from_folder(Path(spec), options.arguments, headless=options.headless)
    check_size(model, options.arguments)
    return as_loaded(spec, folder.name, model, {"source": folder.name}, said)


def _load_hub(spec: str, options: _Options) -> Loaded:
    """A repository of timm's layout, of transformers', or with a file of ours."""
    repository, _, revision = spec.removeprefix(HUB_PREFIX).partition("@")
    folder = fetch(repository, revision or None)
    if folder is None:
        return _from_hub(spec, spec, spec.rpartition("/")[2], options, {"source": spec})
    loaded = _load_folder(str(folder), options)
    if loaded.sparse is None:  # the folder in the cache is named by a commit
        loaded.name = repository.rpartition("/")[2]
    loaded.spec, loaded.origin = spec, loaded.origin | {"source": spec}
    return loaded


def _load_name(spec: str, options: _Options) -> Loaded:
    name = resolve_name(spec)
    # Refuses what cannot be sparsified before anything is read or downloaded.
    model = structure(name, options.arguments, options.model_kwargs)
    check_size(model, options.arguments)
    if options.checkpoint is not None:
        how = {"key": options.checkpoint_key, "any_tag": "." not in spec.removeprefix("timm/")}
        return _with_weights(spec, name, options.checkpoint, options.arguments, headless=options.may_lack_head, **how)
    if options.weights != "pretrained":
        model = timm.create_model(name, **options.arguments) if options.weights == "random" else model
        return as_loaded(spec, name, model, {})
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UsageError(f"timm has no pretrained weights for '{name}'", "give a weight file: --checkpoint FILE")
    classes = options.model_kwargs.get("num_classes", config.num_classes)
    if classes not in (0, config.num_classes):
        raise UsageError(
            f"--model-kwargs num_classes={classes}: the weights of '{name}' are for {config.num_classes} classes",
            "a classifier of other classes comes from weights of your own: --checkpoint FILE",
        )
    if config.hf_hub_id:
        check_hub(config.hf_hub_id, names=(config.hf_hub_filename or "model.safetensors",))
    return _from_hub(spec, name, name, options, {})


def _from_hub(spec: str, source: str, name: str, options: _Options, origin: dict[str, Any]) -> Loaded:
    with adaptations(f"the weights of '{name}'") as said:
        model = from_hub(source, options.arguments)
    check_size(model, options.arguments)
    shapes = structure(source, {}, {}).state_dict() if options.arguments else {}
    return as_loaded(spec, name, model, origin, [*said, *resampled(model, shapes)])


_SOURCES: tuple[tuple[Callable[[str], bool], Callable[[str, _Options], Loaded]], ...] = (
    (is_exported, _load_exported),
    (lambda spec: spec.endswith((*WEIGHTS_ALONE, INDEX)) and not Path(spec).is_dir(), _refuse_weights_alone),
    (lambda spec: spec.endswith(".safetensors") or Path(spec).is_file(), _load_file),
    (lambda spec: spec == "demo", _load_demo),
    (lambda spec: Path(spec).is_dir(), _load_folder),
    (lambda spec: spec.startswith(HUB_PREFIX), _load_hub),
    (lambda spec: True, _load_name),
)
"""Which MODEL is loaded how; the first that matches."""


def load_dense(sparse: Loaded, checkpoint: Path | None, key: str | None = None) -> Loaded:
    """The dense model that a sparse file was made from, at the file's image size.

    Without `checkpoint` it is in the file, if that was trained for a range of keep ratios, or else found by its name.

    Of several sets of weights in `checkpoint` it is the one of `key`, or the one that the file was made from.

    Raises:
        UnknownModelError: the name in the file is not timm's.
        CheckpointError: `checkpoint` does not fit.
    """
    metadata = sparse.metadata
    assert metadata is not None
    if checkpoint is not None:
        of_file = sparse.origin.get(_KEY)
        arguments = with_head(metadata.model_args)
        headless = arguments != metadata.model_args
        how = {"key": key or of_file, "headless": headless}
        dense = _with_weights(metadata.model, metadata.architecture, checkpoint, arguments, **how)
        if headless:
            without_head(dense)
        dense.task = metadata.task
        if of_file is not None and key is None:
            dense.understood.append(
                f"of '{checkpoint.name}' the weights that MODEL was made from are taken: '{of_file}'"
            )
        if sparse.sparse is not None:  # of an exported file the weights cannot be read
            check_made_from(sparse.model, dense.model, str(checkpoint), sparse.spec)
        _prepare_images(dense.model, metadata.preprocessing.model_dump(exclude={"input_size"}))
        return dense
    if sparse.sparse is not None and (blend := sparse.sparse.blend) is not None:
        model, names = blend.dense_model(sparse.model), sparse.class_names
        return Loaded(sparse.spec, metadata.model, model, None, names, sparse.origin, task=metadata.task)
    if metadata.model == "demo":
        return load_model(metadata.model, task=metadata.task)
    _, height, width = input_size(sparse.model)
    kwargs = {key: value for key, value in metadata.model_args.items() if key not in _OF_WEIGHTS}
    kwargs |= {"num_classes": 0} if metadata.model_args.get("num_classes") == 0 else {}
    return load_model(metadata.model, img_size=(height, width), model_kwargs=kwargs, task=metadata.task)


def sparse_file(spec: str) -> Path | None:
    """The file that MODEL names if it is one of ours, by itself or by its run folder."""
    path = RunFolder.weights_in(Path(spec))
    return path if path.is_file() and written_by_vitprune(path) else None


def _with_weights(spec: str, name: str, path: Path, arguments: dict[str, Any], **how: Any) -> Loaded:
    # What timm says of the weights of that name need not hold for these.
    about = {"source": path.name, "license": None, "origin_url": None}
    own = build_with_weights(name, path, arguments, **how)
    return as_loaded(spec, name, own.model, about | ({} if own.key is None else {_KEY: own.key}), own.said)
