"""What a timm model wants its images to be."""

from __future__ import annotations

from typing import Any

import timm.data
from timm.models import get_model_input_config
from torch import nn

KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """Timm's data configuration of a timm model, at the image size it was built for.

    timm's own `resolve_model_data_config` gives the size the weights came with, which differs after
    `create_model(..., img_size=...)`.
    """
    size = {"input_size": get_model_input_config(model)["input_size"]}
    config = timm.data.resolve_model_data_config(model, args=size)
    if config["input_size"][0] == 1:  # grey: timm keeps the three colours' figures
        config |= {key: (sum(config[key]) / len(config[key]),) for key in ("mean", "std")}
    return {key: config[key] for key in KEYS}


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a timm model takes."""
    channels, height, width = preprocessing(model)["input_size"]
    return int(channels), int(height), int(width)
