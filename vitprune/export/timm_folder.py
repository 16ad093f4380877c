"""A plain timm folder: the backbone's weights, and the configuration that timm builds it by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf
from torch import nn

from vitprune.checkpoint.metadata import Metadata
from vitprune.common.formatting import first_line
from vitprune.errors import ExportError
from vitprune.export.target import ANY, Target
from vitprune.tasks import task_named

_OF_THE_WEIGHTS = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
"""What timm's configuration says of weights. One rebuilt from a file has that of its architecture's default ones."""


def write_timm(model: nn.Module, metadata: Metadata, folder: Path, target: Target = ANY) -> None:
    """Write `config.json` and `model.safetensors` for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    The metadata, of the sparse model whose backbone it is, gives class names, preprocessing, licence and origin, and
    what its outputs are if these are no classes: as transformers' `problem_type`.

    Raises:
        ExportError: the model's arguments cannot be stored.
    """
    config: dict[str, Any] = {"label_names": metadata.class_names} if metadata.class_names else {}
    if metadata.task != "classification" and (problem := task_named(metadata.task).problem_type):
        config["problem_type"] = problem
    if metadata.origin:  # else what timm says of the architecture's default weights stays
        known = {key: metadata.origin[key] for key in ("license", "origin_url") if metadata.origin.get(key)}
        config["pretrained_cfg"] = dict.fromkeys(_OF_THE_WEIGHTS) | known
    preprocessing = metadata.preprocessing.model_dump(exclude={"exif"})
    before = model.pretrained_cfg
    try:
        # timm knows no entry of that name, and refuses a folder that has it.
        model.pretrained_cfg = {key: value for key, value in before.items() if key != "exif"}  # type: ignore[union-attr,operator,assignment]
        save_for_hf(model, str(folder), model_config=config, data_config=preprocessing, safe_serialization=True)
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"timm cannot save the model: {first_line(error)}") from error
    finally:
        model.pretrained_cfg = before


def read_timm(folder: Path) -> nn.Module:
    """Open a folder as timm does."""
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval()
