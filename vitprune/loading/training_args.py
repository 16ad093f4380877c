"""What timm's training script writes into its checkpoints beside the weights: its own options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm

from vitprune.backbones import PREPROCESSING
from vitprune.checkpoint.weight_file import WeightFile
from vitprune.errors import CheckpointError, UsageError

_FROM_FILE = ("img_size", "in_chans", "num_classes")
"""Arguments of a model that the tensors or the command line say."""
_NUM_COLOURS = (1, 3)
_WORDS = {
    "interpolation": ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"),
    "crop_mode": ("center", "squash", "border"),
}


@dataclass(frozen=True)
class TrainingArguments:
    """What of a training script's options tells how its weights are to be used, and what was understood, a line each.

    The name is the architecture's, with the tag of the weights it began with, where known; the others are arguments for
    timm.create_model and entries of timm's data configuration.
    """

    name: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, file: WeightFile, name: str, *, any_tag: bool) -> TrainingArguments:
        """Those of a weight file for the model `name`, which may have none; with `any_tag` it may say another tag.

        Raises:
            UsageError: the file was trained as another of timm's models.
            CheckpointError: it has options of no use.
        """
        args, said = file.args, []
        trained = args.get("model")
        trained = str(trained).removeprefix("timm/") if isinstance(trained, str) else ""
        base = name.partition(".")[0]
        if timm.is_model(trained) and trained.partition(".")[0] != base:
            raise UsageError(
                f"'{file.path}' was trained as '{trained}', and MODEL is '{base}'", f"name that as MODEL: {trained}"
            )
        if any_tag and trained != name and timm.is_model_pretrained(trained) and "." in trained:
            name = trained
            said.append(f"'{file.path.name}' says that it began as {trained}: images are prepared as for that")
        built_with = args.get("model_kwargs")
        kwargs = {"global_pool": args.get("gp"), **(built_with if isinstance(built_with, Mapping) else {})}
        kwargs = {key: value for key, value in kwargs.items() if value is not None and key not in _FROM_FILE}
        if kwargs:
            text = " ".join(f"{key}={value}" for key, value in kwargs.items())
            said.append(f"'{file.path.name}' says that its model was built with {text}")
        prepared = _preprocessing(file)
        if prepared:
            text = ", ".join(f"{key} {_text(value)}" for key, value in prepared.items())
            said.append(f"'{file.path.name}' says how its images were prepared: {text}")
        return cls(name, kwargs, prepared, said)


def _preprocessing(file: WeightFile) -> dict[str, Any]:
    """What differs in the data configuration: an option that was not given is None, or in timm's script empty."""
    found: dict[str, Any] = {}
    for key in PREPROCESSING:
        value = file.args.get(key)
        if key == "input_size" or value is None or value == "" or value == "random":
            continue
        if key in ("mean", "std"):
            numbers = tuple(value) if isinstance(value, (list, tuple)) else ()
            good = len(numbers) in _NUM_COLOURS and all(isinstance(each, (int, float)) for each in numbers)
            value = tuple(map(float, numbers)) if good and (key == "mean" or min(numbers) > 0) else None
        elif key == "crop_pct":
            value = float(value) if isinstance(value, (int, float)) and 0.1 <= value <= 10 else None
        elif value not in _WORDS[key]:
            value = None
        if value is None:
            option = key.replace("_", "-")
            raise CheckpointError(
                f"'{file.path}' says that it was trained with {key} {file.args[key]!r}, which is none",
                f"save its state_dict alone, and give --{option}",
            )
        found[key] = value
    return found


def _text(value: Any) -> str:
    return ",".join(f"{each:.4g}" for each in value) if isinstance(value, tuple) else str(value)
