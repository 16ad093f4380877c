"""Models for use without vitprune: ONNX, torch.export's .pt2, a plain timm folder."""

from pathlib import Path

from vitprune.export.agreement import BATCH_SIZES, Agreement, in_batches, random_batches
from vitprune.export.job import FORMATS, PRECISIONS, Exported, Format, check_output, export, export_model
from vitprune.export.onnx_file import read_onnx
from vitprune.export.program import Program, is_program, runs_on
from vitprune.export.pt2_file import read_pt2

__all__ = [
    "BATCH_SIZES",
    "FORMATS",
    "PRECISIONS",
    "Agreement",
    "Exported",
    "Format",
    "Program",
    "check_output",
    "export",
    "export_model",
    "in_batches",
    "is_program",
    "open_program",
    "random_batches",
    "runs_on",
]


def open_program(path: Path) -> Program:
    """An exported file as a module, by its suffix.

    Raises:
        ExportError: a package of the extra "onnx" is missing.
        CheckpointError: the file is missing, damaged, not ours, or does not fit its own metadata.
    """
    return read_onnx(path) if path.suffix == ".onnx" else read_pt2(path)
