"""Models for use without vitprune: ONNX, torch.export's .pt2, a plain timm folder."""

from vitprune.export.agreement import BATCH_SIZES, Agreement
from vitprune.export.formats import Format
from vitprune.export.job import Exported, ExportPrecision, check_output, export, with_features

__all__ = [
    "BATCH_SIZES",
    "Agreement",
    "ExportPrecision",
    "Exported",
    "Format",
    "check_output",
    "export",
    "with_features",
]
