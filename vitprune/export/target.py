"""What a program is written for, and the images that it is traced with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.program import quiet
from vitprune.common.formatting import first_line
from vitprune.errors import ExportError, VitpruneError
from vitprune.export.int8 import Quantisation
from vitprune.tasks import task_named

ExportPrecision = Literal["fp32", "fp16", "int8"]

TRACED_BATCH_SIZE = 3
"""Where any is to do. Not one: a batch of one would be taken for a constant."""
_ANY_BATCH_SIZE = ({0: torch.export.Dim("batch")},)
OPSETS = range(18, 25)
"""What onnxruntime runs of what torch writes."""
OPSET = 20
"""The first that knows GELU, and old enough for runtimes of the last years."""


class Target(NamedTuple):
    """What a program is written for.

    Attributes:
        precision: of the weights.
        batch: how many images at once, always; None for any number.
        opset: of ONNX, in `OPSETS`.
        quantisation: of INT8, which needs it.
    """

    precision: ExportPrecision = "fp32"
    batch: int | None = None
    opset: int = OPSET
    quantisation: Quantisation | None = None


ANY = Target()


class Ports(NamedTuple):
    """What a program takes and gives.

    Attributes:
        takes: name of its input.
        shape: of one of these, without the batch.
        gives: names of its outputs.
    """

    takes: str
    shape: tuple[int, ...]
    gives: tuple[str, ...]

    @classmethod
    def of(cls, metadata: Metadata) -> Ports:
        """Images to what the task puts out."""
        return cls("images", metadata.preprocessing.input_size, (task_named(metadata.task).output,))


def example(ports: Ports, target: Target) -> dict[str, Any]:
    """What to trace with, and which of its sizes stay open: arguments of torch's exporters."""
    batch = torch.zeros(target.batch or TRACED_BATCH_SIZE, *ports.shape)
    return {"args": (batch,), "dynamic_shapes": None if target.batch else _ANY_BATCH_SIZE}


@contextmanager
def converting(engine: str) -> Iterator[None]:
    """Hide what a converter says; of what it cannot do, say whose it is.

    Raises:
        ExportError: it stops.
    """
    try:
        with quiet(), torch.no_grad():
            yield
    except VitpruneError:
        raise
    except Exception as error:  # converters' errors have no common class
        raise ExportError(f"{engine} cannot convert the model: {first_line(error)}") from error
