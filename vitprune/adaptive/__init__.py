"""Each image as many tokens as it needs: passes that share their first blocks, and what can be promised of them."""

from vitprune.adaptive.bounds import images_needed
from vitprune.adaptive.curve import Reached, curve, worthwhile
from vitprune.adaptive.promise import Promise, Watched, promise
from vitprune.adaptive.vit import AdaptiveViT

__all__ = ["AdaptiveViT", "Promise", "Reached", "Watched", "curve", "images_needed", "promise", "worthwhile"]
