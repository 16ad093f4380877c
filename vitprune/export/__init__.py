"""Models for use without vitprune: ONNX, torch.export's .pt2, a plain timm folder."""

from vitprune.export.agreement import Agreement, batch_sizes
from vitprune.export.formats import Format
from vitprune.export.images import images_to_compare, quantisation_by
from vitprune.export.int8 import Quantisation
from vitprune.export.job import Exported, check_folder, check_output, export, known_target, with_features
from vitprune.export.parts import export_parts
from vitprune.export.target import ExportPrecision

__all__ = [
    "Agreement",
    "ExportPrecision",
    "Exported",
    "Format",
    "Quantisation",
    "batch_sizes",
    "check_folder",
    "check_output",
    "export",
    "export_parts",
    "images_to_compare",
    "known_target",
    "quantisation_by",
    "with_features",
]
