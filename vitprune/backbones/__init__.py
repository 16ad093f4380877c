"""The one place that knows timm's insides: a file per kind of attention, and `wrap`, which picks one or refuses."""

from vitprune.backbones.base import PREPROCESSING, Backbone, check_whole_patches, input_size, preprocessing
from vitprune.backbones.recorder import AttentionRecorder
from vitprune.backbones.registry import family_of, why_not, wrap

__all__ = [
    "PREPROCESSING",
    "AttentionRecorder",
    "Backbone",
    "check_whole_patches",
    "family_of",
    "input_size",
    "preprocessing",
    "why_not",
    "wrap",
]
