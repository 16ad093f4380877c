"""Each image as many tokens as it needs: passes that share their first blocks, and what can be promised of them."""

from vitprune.adaptive.bounds import images_needed
from vitprune.adaptive.promise import Promise, Watched, promise
from vitprune.adaptive.vit import AdaptiveViT

__all__ = ["AdaptiveViT", "Promise", "Watched", "images_needed", "promise"]
