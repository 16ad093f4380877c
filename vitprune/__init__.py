"""vitprune makes a pretrained timm vision transformer cheaper and faster by dropping uninformative tokens.

model = timm.create_model("deit_small_patch16_224.fb_in1k", pretrained=True)
sparse = vitprune.sparsify(model, keep=0.7, data="path/to/images")
logits = sparse(images)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitprune._version import __version__ as __version__

if TYPE_CHECKING:
    from vitprune.api import sparsify
    from vitprune.errors import VitpruneError
    from vitprune.export import export_model
    from vitprune.loading.hub import load
    from vitprune.model import SparseViT, attach
    from vitprune.schedule import Schedule, Stage, make_schedule
    from vitprune.tokens import TokenPredictor
    from vitprune.training import LossWeights, Objective, Recipe

# Imported when first used, so that `vitprune --help` does not wait for torch.
_HOMES = {
    "LossWeights": "vitprune.training",
    "Objective": "vitprune.training",
    "Recipe": "vitprune.training",
    "Schedule": "vitprune.schedule",
    "SparseViT": "vitprune.model",
    "Stage": "vitprune.schedule",
    "TokenPredictor": "vitprune.tokens",
    "VitpruneError": "vitprune.errors",
    "attach": "vitprune.model",
    "export_model": "vitprune.export",
    "load": "vitprune.loading.hub",
    "make_schedule": "vitprune.schedule",
    "sparsify": "vitprune.api",
}

__all__ = [
    "LossWeights",
    "Objective",
    "Recipe",
    "Schedule",
    "SparseViT",
    "Stage",
    "TokenPredictor",
    "VitpruneError",
    "attach",
    "export_model",
    "load",
    "make_schedule",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vitprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
