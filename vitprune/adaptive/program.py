"""A cascade of passes as ONNX files in a folder, opened: a program like any other exported file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from vitprune.adaptive.vit import Tail, Trunk, account, end_of_trunk, route
from vitprune.checkpoint.metadata import Name
from vitprune.checkpoint.onnx_program import OnnxGraph, open_onnx
from vitprune.checkpoint.program import Program
from vitprune.checkpoint.sparse_file import rebuild
from vitprune.common import distributed
from vitprune.common.files import read_json
from vitprune.common.formatting import first_fault
from vitprune.common.json_version import SCHEMA_VERSION
from vitprune.common.run_folder import ADAPTIVE
from vitprune.errors import CheckpointError
from vitprune.measure import count_macs


class AdaptiveHeader(BaseModel):
    """adaptive.json: how the programs beside it are run.

    `trunk` turns images into tokens, and each of `passes` these into outputs and how sure it is of each, `certainty`.
    All images take the first pass; the tokens of those that are less sure than the threshold go on to the next one.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[2] = SCHEMA_VERSION
    threshold: float = Field(ge=0, le=1)
    trunk: Name
    passes: list[Name] = Field(min_length=2, max_length=20)
    promise: dict[str, Any] | None = Field(None, description="what was promised with that threshold, for people")


class AdaptiveProgram(Program):
    """A folder that `vitprune export --adaptive` wrote, as a module: what `AdaptiveViT` gives, by onnxruntime.

    Example:
        program = read_adaptive(Path("adaptive"))
        logits = program(images)

    Args:
        trunk: images to tokens.
        tails: tokens to outputs and certainty, cheapest first.
        threshold: images of at least this certainty stop.
        path: the folder.

    Attributes:
        threshold: as above; it can be set.
        ended: of each image since it was set to a list, the number of the pass that decided; None to keep no account.
    """

    def __init__(self, trunk: OnnxGraph, tails: Sequence[OnnxGraph], threshold: float, path: Path) -> None:
        first = tails[0]
        super().__init__(self._routed, trunk.takes, first.gives[0], first.metadata, first.precision, path)
        self.trunk, self.tails, self.threshold = trunk, tuple(tails), threshold
        self.ended: list[int] | None = None

    @property
    def label(self) -> str:
        """The passes, for people: "keep 0.5, then dense"."""
        return ", then ".join(each.metadata.label for each in self.tails)

    def account(self) -> dict[str, Any]:
        """What became of the images since `ended` was set, for JSON."""
        ended = [number for of_process in distributed.gather(self.ended or []) for number in of_process]
        return {"threshold": self.threshold, **account(ended, self.costs())}

    def at(self, threshold: float) -> AdaptiveProgram:
        """The same programs with another threshold."""
        return AdaptiveProgram(self.trunk, self.tails, threshold, self.path)

    def costs(self) -> list[int]:
        """Multiply-accumulates of an image that ends in each pass."""
        size = self.metadata.preprocessing.input_size
        return [count_macs(self._up_to(number), size) for number in range(len(self.tails))]

    def structure(self) -> nn.Module:
        """As in `Program`, of an image that takes all passes, or where none goes on the first."""
        return self._up_to(len(self.tails) - 1 if self.threshold > 0 else 0)

    def _up_to(self, number: int) -> nn.Module:
        models = [rebuild(each.metadata, "meta") for each in self.tails]
        first_block, task = end_of_trunk(models), self.metadata.task
        return nn.Sequential(
            Trunk(models[0], first_block), _InTurn(Tail(each, first_block, task) for each in models[: number + 1])
        )

    def _routed(self, images: Tensor) -> Tensor:
        (tokens,) = self.trunk.run(images)
        outputs, ended = route(tokens, [each.run for each in self.tails], self.threshold)
        if self.ended is not None:
            self.ended += ended.tolist()
        return outputs


class _InTurn(nn.ModuleList):
    """Modules that all see the same."""

    def forward(self, tokens: Tensor) -> list[Any]:
        return [each(tokens) for each in self]


def read_adaptive(folder: Path) -> AdaptiveProgram:
    """Open a folder that `vitprune export --adaptive` wrote; it may come from anywhere, as files of `open_onnx`.

    Raises:
        ExportError: a package is missing.
        CheckpointError: a file is missing, damaged, not ours, or does not fit the others.
    """
    file = folder / ADAPTIVE
    try:
        header = AdaptiveHeader.model_validate(read_json(file))
    except ValidationError as error:
        raise CheckpointError(f"'{file}' cannot be read: {first_fault(error)}", "export the model again") from error
    trunk, *tails = (open_onnx(folder / name) for name in (header.trunk, *header.passes))
    if not tails[0].metadata.stages:
        raise CheckpointError(
            f"the first pass, '{folder / header.passes[0]}', prunes nothing", "export the model again"
        )
    for name, tail in zip(header.passes, tails, strict=True):
        fits = len(trunk.gives) == 1 and len(tail.gives) == 2 and tail.takes[1:] == trunk.gives[0][1:]
        if not (fits and tail.gives[0][1:] == tails[0].gives[0][1:] and len(tail.gives[1]) == 1):
            raise CheckpointError(
                f"'{folder / name}' does not fit '{folder / header.trunk}' or the first pass",
                "export the model again",
            )
    return AdaptiveProgram(trunk, tails, header.threshold, folder)
