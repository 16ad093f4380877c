"""Each image as many tokens as it needs: passes that share their first blocks, and what can be promised of them."""

from vitprune.adaptive.curve import Reached, curve, worthwhile
from vitprune.adaptive.program import AdaptiveHeader, AdaptiveProgram, read_adaptive
from vitprune.adaptive.promise import Promise, Watched, cheapest_promise, check_enough, promise
from vitprune.adaptive.vit import AdaptiveViT, Tail, Trunk, account

__all__ = [
    "AdaptiveHeader",
    "AdaptiveProgram",
    "AdaptiveViT",
    "Promise",
    "Reached",
    "Tail",
    "Trunk",
    "Watched",
    "account",
    "cheapest_promise",
    "check_enough",
    "curve",
    "promise",
    "read_adaptive",
    "worthwhile",
]
