"""Ways to spend the same budget without training, to compare with."""

from vitprune.baselines.rankings import EqualPredictor, RandomPredictor
from vitprune.baselines.tome import ToMeViT, merges_per_block

__all__ = ["EqualPredictor", "RandomPredictor", "ToMeViT", "merges_per_block"]
