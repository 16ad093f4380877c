"""The one place that knows timm's insides: a file per family, and `wrap`, which picks one or refuses by name."""

from vitprune.backbones.base import Backbone
from vitprune.backbones.preprocessing import input_size, preprocessing
from vitprune.backbones.recorder import AttentionRecorder
from vitprune.backbones.registry import wrap
from vitprune.backbones.vision_transformer import VisionTransformerBackbone

__all__ = ["AttentionRecorder", "Backbone", "VisionTransformerBackbone", "input_size", "preprocessing", "wrap"]
