"""The fine-tuned backbone by itself, all tokens kept, for timm without vitprune: a folder, or a repository's part."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model, model_entrypoint, save_for_hf
from torch import nn

from vitprune.backbones import input_size
from vitprune.checkpoint.metadata import Metadata
from vitprune.common.files import read_json, write_error
from vitprune.common.formatting import first_line
from vitprune.common.run_folder import CONFIG, WEIGHTS
from vitprune.errors import ExportError
from vitprune.export.agreement import compare, random_batches

FILES = (WEIGHTS, CONFIG)
HUB_WEIGHTS = "timm_backbone.safetensors"
"""The backbone in a repository, where model.safetensors is the sparse model."""

_OF_THE_WEIGHTS = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
"""What timm's configuration says of weights. One rebuilt from a file has that of its architecture's default ones."""
_PICTURES_COMPARED = 2


def timm_builds(architecture: str) -> bool:
    """Whether timm has the architecture by itself, and not because vitprune or somebody else registered it there."""
    return bool(is_model(architecture)) and model_entrypoint(architecture).__module__.partition(".")[0] == "timm"


def hub_backbone(model: nn.Module, metadata: Metadata) -> tuple[bytes, dict[str, Any]]:
    """What a repository needs so that `timm.create_model("hf-hub:OWNER/NAME", pretrained=True)` opens the backbone.

    Args:
        model: the backbone, a timm model that timm builds; in eval mode, on the CPU.
        metadata: of the sparse model whose backbone it is.

    Returns:
        Content of the file `HUB_WEIGHTS`, and what timm wants to read in config.json.

    Raises:
        ExportError: timm cannot save it or open it again, or what it opens computes something else.
        OutputError: there is no room for a copy in the system's folder for temporary files.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="vitprune-") as name:
            folder = Path(name)
            write_timm(model, metadata, folder, hub_filename=HUB_WEIGHTS)
            compare(model, read_timm(folder), islice(random_batches(input_size(model)), _PICTURES_COMPARED), "fp32")
            return (folder / FILES[0]).read_bytes(), read_json(folder / FILES[1])
    except OSError as error:
        raise write_error(Path(tempfile.gettempdir()), error) from error


def write_timm(model: nn.Module, metadata: Metadata, folder: Path, *, hub_filename: str | None = None) -> None:
    """Write `config.json` and `model.safetensors` for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        model: a timm model.
        metadata: of the sparse model whose backbone it is; gives class names and preprocessing.
        folder: where to, created if need be.
        hub_filename: what the weights will be called in a repository; None for timm's own name.

    Raises:
        ExportError: the model's arguments cannot be stored.
    """
    names = metadata.class_names
    config: dict[str, Any] = {"label_names": names} if names else {}
    config["pretrained_cfg"] = _about(metadata) | ({"hf_hub_filename": hub_filename} if hub_filename else {})
    try:
        save_for_hf(
            model,
            str(folder),
            model_config=config,
            data_config=metadata.preprocessing.model_dump(),
            safe_serialization=True,
        )
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"timm cannot save the model: {first_line(error)}") from error


def read_timm(folder: Path) -> nn.Module:
    """What timm makes of the folder.

    Raises:
        ExportError: it cannot be opened.
    """
    try:
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # timm and safetensors have many
        raise ExportError(f"timm cannot open what was written: {first_line(error)}") from error
    return model.eval()


def _about(metadata: Metadata) -> dict[str, Any]:
    """Licence and origin as the file's header says them; of a header that says nothing, what timm says stays."""
    if not metadata.origin:
        return {}
    known = {key: metadata.origin[key] for key in ("license", "origin_url") if metadata.origin.get(key)}
    return dict.fromkeys(_OF_THE_WEIGHTS) | known
