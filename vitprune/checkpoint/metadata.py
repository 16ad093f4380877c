"""The header of model.safetensors, and what it may not say: the file may come from anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vitprune.common.formatting import first_fault
from vitprune.common.json_version import SCHEMA_VERSION, upgraded
from vitprune.errors import CheckpointError
from vitprune.model import TaskName
from vitprune.schedule import PredictorName, Similarity, Stage, plan_label

METADATA_KEY = "vitprune"
PRECISION_KEY = "vitprune_precision"
MAX_METADATA_BYTES = 8 * 2**20
_MAX_NUMBER = 1_000_000
_MAX_DEPTH = 1000
_MAX_TEXT = 1000
REACHES_OUT = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only"}
)
"""Arguments of timm.create_model that read files or the network, or build something else than a classifier."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]
Text = Annotated[str, Field(max_length=_MAX_TEXT)]
Side = Annotated[int, Field(ge=1, le=16384)]
Colour = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]


class Preprocessing(BaseModel):
    """timm's data configuration; bounded, or a tiny crop share would ask for an image of any size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: tuple[Annotated[int, Field(ge=1, le=1024)], Side, Side]
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming", "random"]
    mean: tuple[Colour, ...]
    std: tuple[Colour, ...]
    crop_pct: float = Field(ge=0.1, le=10)
    crop_mode: Literal["center", "squash", "border"]
    exif: bool = Field(False, description="whether images are turned by their EXIF orientation first")


class Metadata(BaseModel):
    """The header of model.safetensors: enough to rebuild the model offline."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    schema_version: Literal[2] = SCHEMA_VERSION
    model: Name = Field(description="full timm name with the tag of the weights")
    architecture: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,200}$")] = Field(
        description="name for timm.create_model"
    )
    model_args: dict[str, Any] = Field(description="arguments for timm.create_model")
    task: TaskName = Field("classification", description="what the model is for")
    num_patches: int = Field(ge=1, le=_MAX_NUMBER)
    keep: float | None = Field(gt=0, le=1, description="null where the stages' ratios were chosen freely")
    keep_range: tuple[float, float] | None = Field(
        None, description="the lowest and highest keep ratio it was trained for; it opens at keep"
    )
    blended: bool = Field(False, description="whether the dense weights are in the file too, see Blend")
    stages: list[Stage] = Field(max_length=_MAX_DEPTH)
    schedule: Literal["geometric", "late"] | None = "geometric"
    pruned: Literal["drop", "merge"] = "drop"
    predictor: PredictorName = "paper"
    balance: float | None = Field(None, ge=0, le=_MAX_NUMBER, description="of importance against redundancy")
    beta: float = Field(0.0, ge=0, le=_MAX_NUMBER, description="of importance in averages of merged tokens")
    similarity: Similarity = Field("features", description="what tokens are compared by")
    align: int = Field(1, ge=1, le=4096, description="token counts are multiples of this, prefix tokens included")
    preprocessing: Preprocessing
    class_names: list[Text] | None = Field(None, max_length=_MAX_NUMBER)
    origin: dict[str, Any] = Field(default_factory=dict, description="source and licence of the weights")
    versions: dict[str, str] = Field(default_factory=dict)
    accuracy: dict[str, Any] | None = None
    training: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _of_a_model_without_outputs(self) -> Metadata:
        """Files of versions before tasks say nothing; without a classifier it was no classification."""
        if self.task == "classification" and self.model_args.get("num_classes") == 0:
            self.task = "embedding"
        return self

    @model_validator(mode="after")
    def _a_range_holds_its_ratio(self) -> Metadata:
        """A model of a range is remade by its ratio alone."""
        if self.keep_range is not None and not (
            self.stages and self.keep and 0 < self.keep_range[0] <= self.keep <= self.keep_range[1] < 1
        ):
            raise ValueError(f"keep_range is {self.keep_range}, and keep {self.keep}")
        return self

    @property
    def label(self) -> str:
        """How much is kept, for people: "keep 0.7" or "ratios 0.8,0.6,0.4", and "align 8"; or "dense"."""
        if not self.stages:
            return "dense"
        return plan_label(self.keep, [stage.ratio for stage in self.stages], self.align)

    def at(self, keep: float | None, stages: Sequence[Stage]) -> Metadata:
        """The same of another keep ratio of the range, with what was measured of that."""
        if keep is None or keep == self.keep:
            return self
        rows = (self.accuracy or {}).get("keeps")
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []  # files of others
        row = next((row for row in rows if row.get("keep") == keep), None)
        accuracy = row and {**(self.accuracy or {}), "sparse": row, "fidelity": row}
        return self.model_copy(update={"keep": keep, "stages": list(stages), "accuracy": accuracy})

    @field_validator("model_args")
    @classmethod
    def _only_what_builds_a_model(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(arguments.keys() & REACHES_OUT):
            raise ValueError(f"'{name}' is no argument that a saved model may have")
        if isinstance(depth := arguments.get("depth"), int) and depth > _MAX_DEPTH:
            raise ValueError(f"a depth of {depth} is more than {_MAX_DEPTH}")
        _check_bounded(arguments)
        return arguments


def parse_metadata(text: str, path: Path) -> Metadata:
    """The metadata in a file's header.

    Args:
        text: the JSON found there.
        path: the file, for the error.

    Raises:
        CheckpointError: it is too long, or not what vitprune writes; names the file.
    """
    if len(text) > MAX_METADATA_BYTES:
        raise CheckpointError(
            f"the metadata in '{path}' is {len(text)} bytes long, more than {MAX_METADATA_BYTES}",
            "vitprune did not write it",
        )
    try:
        return Metadata.model_validate(upgraded(json.loads(text)))
    except (ValueError, RecursionError) as error:  # pydantic's and json's are kinds of it
        why = first_fault(error) if isinstance(error, ValidationError) else "it is not JSON"
        raise CheckpointError(
            f"the metadata in '{path}' cannot be read: {why}",
            "the file may come from a newer vitprune: pip install -U vitprune",
        ) from error


def _check_bounded(value: Any, level: int = 0) -> None:
    """Numbers, texts and lists of a size that a model's arguments have."""
    if level > 4:
        raise ValueError("arguments are nested too deeply")
    if isinstance(value, (int, float)) and not abs(value) <= _MAX_NUMBER:
        raise ValueError(f"{value} is out of range")
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        raise ValueError("an argument is too long")
    if isinstance(value, (list, dict)):
        if len(value) > _MAX_TEXT:
            raise ValueError("an argument has too many parts")
        for part in value.values() if isinstance(value, dict) else value:
            _check_bounded(part, level + 1)
