"""Model folders that are not ours: what timm's `save_for_hf` and transformers' `save_pretrained` write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from timm.models._hub import load_model_config_from_path
from torch import nn

from vitprune.checkpoint.weight_file import read_weights
from vitprune.common.files import read_json
from vitprune.common.formatting import first_line
from vitprune.common.run_folder import CONFIG, WEIGHTS
from vitprune.errors import CheckpointError
from vitprune.loading.transformers import convert_state, read_config

_WEIGHTS = (WEIGHTS, "pytorch_model.bin", "model.bin", "pytorch_model.pth", "model.pth")
FOLDER_FILES = (CONFIG, "preprocessor_config.json", *_WEIGHTS)
"""What is read of a folder."""


def build_from_folder(folder: Path, sizes: dict[str, Any]) -> nn.Module:
    """The timm model that a folder's config.json describes, with the weights beside it; `sizes` are timm's arguments.

    Raises:
        CheckpointError: no config.json or weights, or not of a kind that can be read; names the folder.
    """
    runs = [] if (folder / CONFIG).exists() else sorted(path.parent for path in folder.glob(f"*/{WEIGHTS}"))
    if runs:
        names = ", ".join(str(each) for each in runs[:3])
        raise CheckpointError(
            f"folder '{folder}' is no model, but holds some", f"name one of them: {names}", exit_code=2
        )
    config = read_json(folder / CONFIG)
    try:
        if "architectures" in config:
            preprocessor = folder / "preprocessor_config.json"
            architecture, arguments, overlay = read_config(
                config, read_json(preprocessor) if preprocessor.is_file() else {}
            )
            state = convert_state(_read_weights(folder))
        elif "architecture" in config:
            overlay, architecture, arguments = load_model_config_from_path(folder)
            state = _read_weights(folder)
        else:
            raise CheckpointError("its config.json is neither timm's nor transformers'")
        overlay = {**overlay, "source": None, "file": None, "state_dict": state, "custom_load": False}
        model: nn.Module = timm.create_model(
            architecture, pretrained=True, pretrained_cfg_overlay=overlay, **{**arguments, **sizes}
        )
    except CheckpointError as error:
        raise CheckpointError(f"folder '{folder}': {error.message}", error.hint) from error
    except (RuntimeError, KeyError, ValueError, TypeError, AssertionError) as error:
        raise CheckpointError(f"folder '{folder}' holds no model that timm can build: {first_line(error)}") from error
    config = getattr(model, "pretrained_cfg", {})
    config.pop("state_dict", None)  # or every copy of the model drags the weights along
    return model


def _read_weights(folder: Path) -> dict[str, Any]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return read_weights(folder / name)
    raise CheckpointError("it holds no weights", f"there should be one of {', '.join(_WEIGHTS)}")
