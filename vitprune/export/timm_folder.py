"""A plain timm folder: the fine-tuned backbone by itself, all tokens kept, for whoever wants no predictors."""

from __future__ import annotations

from pathlib import Path

import timm
from timm.models import save_for_hf
from torch import nn

from vitprune.errors import ExportError
from vitprune.export.program import first_line
from vitprune.metadata import Metadata

FILES = ("model.safetensors", "config.json")


def write_timm(model: nn.Module, metadata: Metadata, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        model: a timm model.
        metadata: of the sparse model whose backbone it is; gives class names and preprocessing.
        folder: where to, created if need be.

    Raises:
        ExportError: the model's arguments cannot be stored.
    """
    names = metadata.class_names
    try:
        save_for_hf(
            model,
            str(folder),
            model_config={"label_names": names} if names else None,
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
