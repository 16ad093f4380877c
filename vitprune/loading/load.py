"""From a MODEL argument to a timm model with its weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

from vitprune.backbones import input_size, wrap
from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.sparse_file import check_npz, is_ours, load_sparse, read_weights
from vitprune.common.run_folder import RunFolder
from vitprune.errors import CheckpointError, UnknownModelError, UsageError
from vitprune.export import is_program, open_program
from vitprune.loading.dynamicvit import load_authors
from vitprune.loading.hub import check_hub, fetch, first_mismatch, from_hub
from vitprune.loading.saved_folder import build_from_folder
from vitprune.loading.transformers import convert_state, is_transformers_state
from vitprune.model import SparseViT

Weights = Literal["pretrained", "random", "none"]

_PICKLES = (".pth", ".pt", ".tar", ".bin", ".ckpt")


@dataclass
class Loaded:
    """A model and what is known of it.

    Attributes:
        spec: the MODEL argument.
        name: full timm name, with the tag of its weights where there is one.
        model: the timm model; of one of our files, its backbone, which was trained for dropped tokens; of an exported
            file, the program in it.
        sparse: the sparse model of one of our files or of DynamicViT's authors, else None.
        class_names: in output order, where known.
        origin: where the weights come from and under which licence.
        metadata: header of one of our files, or what it would be.
    """

    spec: str
    name: str
    model: nn.Module
    sparse: SparseViT | None = None
    class_names: tuple[str, ...] | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    metadata: Metadata | None = None

    @property
    def short_name(self) -> str:
        """A name fit for a folder."""
        return "demo" if self.spec == "demo" else re.sub(r"[^A-Za-z0-9_.-]+", "_", self.name.partition(".")[0])


def load_model(
    spec: str,
    *,
    checkpoint: Path | None = None,
    weights: Weights = "pretrained",
    img_size: int | tuple[int, int] | None = None,
    keep: float | None = None,
    stages: Sequence[int] | None = None,
    exported: bool = False,
) -> Loaded:
    """Build the model that `spec` names and load its weights.

    Args:
        spec: a timm name or short name, `hf-hub:owner/name`, a .safetensors file of ours or its run folder, a folder
            that timm or transformers saved, a checkpoint of DynamicViT's authors, or `demo`.
        checkpoint: a weight file (.safetensors, .pth, .bin, .npz) instead of the Hub's.
        weights: "pretrained", or without any file or download "random", or "none": the structure alone, on the
            meta device.
        img_size: another image size in pixels, or height and width; position embeddings are resampled.
        keep: of a checkpoint of the authors, which does not say, the share of tokens that one stage keeps.
        stages: of such a checkpoint, the block indices before which its predictors act; None for the default.
        exported: whether a file that `vitprune export` wrote will do, which can be run and nothing else.

    Raises:
        UnknownModelError: no such model; offers close matches.
        UnsupportedModelError: the model's tokens cannot be dropped.
        UsageError: options that do not go together.
        CheckpointError: a weight file is missing, damaged, or does not fit.
        HubError: the weights cannot be had from the Hub.
    """
    sizes = {} if img_size is None else {"img_size": img_size}
    theirs = spec.endswith(_PICKLES) and not Path(spec).is_dir()
    if (keep is not None or stages is not None) and not theirs:
        raise UsageError(
            f"'{spec}' is no checkpoint of DynamicViT's authors: --keep and --stages say how such a file is to be run",
            "leave them out; vitprune sparsify makes a dense model sparse",
        )
    if is_program(spec):
        return _load_program(spec, checkpoint is not None or img_size is not None, exported)
    if theirs or spec.endswith(".safetensors") or Path(spec).is_file():
        if checkpoint is not None or img_size is not None:
            raise UsageError(f"'{spec}' is a file of its own; --checkpoint and --img-size go with a timm name")
        sparse, metadata = load_authors(Path(spec), keep, stages) if theirs else load_sparse(Path(spec))
        return Loaded(
            spec, metadata.model, sparse.model, sparse, _tuple(metadata.class_names), metadata.origin, metadata
        )
    if spec == "demo":
        return _load_demo()
    if Path(spec).is_dir():
        return _load_folder(spec, checkpoint, sizes)
    if spec.startswith("hf-hub:"):
        return _load_hub(spec, sizes)
    name = resolve_name(spec)
    if weights == "random" and checkpoint is None:
        return _loaded(spec, name, timm.create_model(name, **sizes), {})
    with torch.device("meta"):
        structure = timm.create_model(name, **sizes)
    wrap(structure)  # refuses what cannot be sparsified before anything is read or downloaded
    if checkpoint is not None:
        return _load_file(spec, name, checkpoint, sizes)
    if weights == "none":
        return _loaded(spec, name, structure, {})
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UsageError(f"timm has no pretrained weights for '{name}'", "give a weight file: --checkpoint FILE")
    if config.hf_hub_id:
        check_hub(config.hf_hub_id)
    return _loaded(spec, name, from_hub(name, sizes), {})


def load_dense(sparse: Loaded, checkpoint: Path | None) -> Loaded:
    """The dense model that a sparse file was made from, at the file's image size.

    Args:
        sparse: what `load_model` gave for one of our files.
        checkpoint: weights of the dense model; None to get them by name.

    Raises:
        UnknownModelError: without `checkpoint`, the name in the file is not timm's.
        CheckpointError: `checkpoint` does not fit.
    """
    metadata = sparse.metadata
    assert metadata is not None
    if checkpoint is not None:
        return _load_file(metadata.model, metadata.architecture, checkpoint, metadata.model_args)
    _, height, width = input_size(sparse.model)
    return load_model(metadata.model, img_size=None if metadata.model == "demo" else (height, width))


def sparse_file(spec: str) -> Path | None:
    """The file that MODEL names if it is one of ours, by itself or by its run folder."""
    path = RunFolder.weights_in(Path(spec))
    return path if path.is_file() and is_ours(path) else None


def resolve_name(spec: str) -> str:
    """The full timm name of a name or an unambiguous short name: `deit_small` is `deit_small_patch16_224`.

    Raises:
        UnknownModelError: no or several models of that name; offers some.
    """
    base, _, tag = spec.partition(".")
    known = timm.list_models()
    if base not in known:
        starts = [name for name in known if name.startswith(base + "_")]
        usual = f"{base}_patch16_224"
        plain = [name for name in starts if re.fullmatch(r"_patch\d+(_\d+)?", name[len(base) :])]
        if usual in known:
            base = usual
        elif len(plain) == 1 or (not plain and len(starts) == 1):
            base = (plain or starts)[0]
        elif starts:
            shown = ", ".join((plain or starts)[:6])
            raise UnknownModelError(f"'{spec}' could be several models", f"choose one of: {shown}")
        else:
            short = sorted({re.sub(r"_patch\d+.*", "", name) for name in known} | set(known))
            close = difflib.get_close_matches(base, short, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else "names are timm's: timm.list_models('vit*')"
            raise UnknownModelError(f"there is no model or file '{spec}'", hint)
    tags = {name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")}
    if tag and tag not in tags:
        raise UnknownModelError(
            f"'{base}' has no weights tagged '{tag}'", f"its tags are: {', '.join(sorted(tags)) or 'none'}"
        )
    if not tag:
        default = timm.get_pretrained_cfg(base)
        tag = (default.tag or "") if default is not None else ""
    return f"{base}.{tag}" if tag else base


def loaded_from(model: nn.Module, class_names: Sequence[str] | None = None) -> Loaded:
    """What is known of a timm model that the caller has made."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    architecture, tag = config.get("architecture") or type(model).__name__, config.get("tag")
    name = f"{architecture}.{tag}" if tag else architecture
    loaded = _loaded(name, name, model, {})
    loaded.class_names = _tuple(class_names) or loaded.class_names
    return loaded


def _loaded(spec: str, name: str, model: nn.Module, origin: dict[str, Any]) -> Loaded:
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    labels = config.get("label_names")
    about = {
        "source": config.get("hf_hub_id") or name,
        "license": config.get("license"),
        "origin_url": config.get("origin_url"),
    }
    names = _tuple(labels) if labels and len(labels) == getattr(model, "num_classes", 0) else None
    return Loaded(spec, name, model.eval(), class_names=names, origin=about | origin)


def _load_file(spec: str, name: str, path: Path, sizes: dict[str, Any]) -> Loaded:
    """A timm model with the weights of a file, through timm's own conversion of foreign layouts."""
    overlay: dict[str, Any]
    channels: dict[str, int] = {}
    if path.suffix == ".npz":
        check_npz(path)
        overlay, classes = {"file": str(path), "custom_load": True}, {}
    else:
        state = read_weights(path)
        if is_transformers_state(state):
            state = convert_state(state)
        config = timm.get_pretrained_cfg(name)
        head = (config.classifier if config is not None else None) or "head"
        head_weight = state.get(f"{head if isinstance(head, str) else head[0]}.weight")
        # A fine-tuned model has its own class count; the file says which.
        classes = {"num_classes": int(head_weight.shape[0])} if head_weight is not None else {}
        first = state.get(f"{config.first_conv if config is not None else ''}.weight")
        if first is not None and first.ndim == 4 and first.shape[1] != 3:
            channels = {"in_chans": int(first.shape[1])}
        overlay = {"state_dict": state, "custom_load": False, **classes}
    try:
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **{**sizes, **classes, **channels}
        )
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"the weights in '{path}' do not fit {name}: {first_mismatch(error)}",
            "check that MODEL is the architecture the file was saved from",
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # or every copy of the model drags the weights along
    # What timm says of the weights of that name need not hold for these.
    return _loaded(spec, name, model, {"source": path.name, "license": None, "origin_url": None})


def _load_program(spec: str, changed: bool, wanted: bool) -> Loaded:
    if not wanted:
        raise UsageError(
            f"'{spec}' is an exported file, which `vitprune eval` and `bench` run and other commands cannot use",
            "name the model.safetensors that it was made from",
        )
    if changed:
        raise UsageError(f"'{spec}' is a file of its own; --checkpoint and --img-size go with a timm name")
    program = open_program(Path(spec))
    metadata = program.metadata
    names = _tuple(metadata.class_names)
    return Loaded(spec, metadata.model, program, None, names, metadata.origin, metadata)


def _load_folder(spec: str, checkpoint: Path | None, sizes: dict[str, Any]) -> Loaded:
    """A run folder of ours, or a model that timm or transformers saved."""
    if checkpoint is not None:
        raise UsageError(f"'{spec}' is a folder with weights of its own; --checkpoint goes with a timm name")
    folder = Path(spec)
    ours = sparse_file(spec)
    if ours is not None:
        return load_model(str(ours), **sizes)
    model = build_from_folder(folder, sizes)
    return _loaded(spec, folder.resolve().name, model, {"source": folder.resolve().name})


def _load_demo() -> Loaded:
    from vitprune.data import demo

    model = timm.create_model(
        demo.ARCHITECTURE, pretrained=False, pretrained_cfg_overlay=demo.PREPROCESSING, **demo.MODEL_ARGS
    )
    model.load_state_dict(read_weights(demo.WEIGHTS))
    origin = {"source": "vitprune's demo model", "license": "apache-2.0"}
    return Loaded("demo", "demo", model.eval(), class_names=demo.CLASS_NAMES, origin=origin)


def _load_hub(spec: str, sizes: dict[str, Any]) -> Loaded:
    """A repository of timm's layout, of transformers', or with a file of ours."""
    repository, _, revision = spec.removeprefix("hf-hub:").partition("@")
    folder = fetch(repository, revision or None)
    if folder is None:
        return _loaded(spec, spec.rpartition("/")[2], from_hub(spec, sizes), {"source": spec})
    loaded = _load_folder(str(folder), None, sizes)
    if loaded.sparse is None:  # the folder in the cache is named by a commit
        loaded.name = repository.rpartition("/")[2]
    loaded.spec, loaded.origin = spec, loaded.origin | {"source": spec}
    return loaded


def _tuple(names: Any) -> tuple[str, ...] | None:
    return None if names is None else tuple(str(name) for name in names)
