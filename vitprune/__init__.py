"""Make a pretrained timm vision transformer cheaper and faster by pruning uninformative tokens.

    model = timm.create_model("deit_small_patch16_224.fb_in1k", pretrained=True)
    sparse = vitprune.sparsify(model, "path/to/images", keep=0.7)
    print(sparse.report.delta.top1_points)  # what it cost
    logits = sparse(images)                 # call it like the model

The jobs: sparsify, evaluate, predict, benchmark, visualize, promise, export_model, save, load, list_models.
For a training loop of your own: attach, Objective, Recipe, LossWeights, Augmentation; Sparsity, Schedule and Stage are
the plan, and Selection, MaskedOutput and StepLoss what passes give. AdaptiveViT gives each image as many tokens as it
needs; count_macs says what a model costs.
Every error that vitprune raises on purpose is a VitpruneError; vitprune.errors lists the kinds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitprune._version import __version__ as __version__

if TYPE_CHECKING:  # for type checkers; a test holds that these are the names below
    from vitprune import errors as errors
    from vitprune.adaptive import AdaptiveViT as AdaptiveViT
    from vitprune.api.adaptive import promise as promise
    from vitprune.api.exporting import export_model as export_model
    from vitprune.api.inspecting import benchmark as benchmark
    from vitprune.api.inspecting import evaluate as evaluate
    from vitprune.api.inspecting import predict as predict
    from vitprune.api.inspecting import save as save
    from vitprune.api.inspecting import visualize as visualize
    from vitprune.api.listing import list_models as list_models
    from vitprune.api.training import sparsify as sparsify
    from vitprune.data import Augmentation as Augmentation
    from vitprune.errors import VitpruneError as VitpruneError
    from vitprune.export import Exported as Exported
    from vitprune.jobs.predict import ImagePrediction as ImagePrediction
    from vitprune.loading.hub import load as load
    from vitprune.measure import count_macs as count_macs
    from vitprune.model import MaskedOutput as MaskedOutput
    from vitprune.model import Selection as Selection
    from vitprune.model import SparseViT as SparseViT
    from vitprune.model import attach as attach
    from vitprune.schedule import Schedule as Schedule
    from vitprune.schedule import Sparsity as Sparsity
    from vitprune.schedule import Stage as Stage
    from vitprune.schedule import make_schedule as make_schedule
    from vitprune.tokens.predictor import TokenPredictor as TokenPredictor
    from vitprune.training.objective import Objective as Objective
    from vitprune.training.objective import StepLoss as StepLoss
    from vitprune.training.recipe import LossWeights as LossWeights
    from vitprune.training.recipe import Recipe as Recipe

# Imported when first used, so that `vitprune --help` does not wait for torch.
_NAMES = {
    "adaptive": ("AdaptiveViT",),
    "api.adaptive": ("promise",),
    "api.exporting": ("export_model",),
    "api.inspecting": ("benchmark", "evaluate", "predict", "save", "visualize"),
    "api.listing": ("list_models",),
    "api.training": ("sparsify",),
    "data": ("Augmentation",),
    "errors": ("VitpruneError",),
    "export": ("Exported",),
    "jobs.predict": ("ImagePrediction",),
    "loading.hub": ("load",),
    "measure": ("count_macs",),
    "model": ("MaskedOutput", "Selection", "SparseViT", "attach"),
    "schedule": ("Schedule", "Sparsity", "Stage", "make_schedule"),
    "tokens.predictor": ("TokenPredictor",),
    "training.objective": ("Objective", "StepLoss"),
    "training.recipe": ("LossWeights", "Recipe"),
}
_HOMES = {name: f"vitprune.{home}" for home, names in _NAMES.items() for name in names}
__all__ = sorted([*_HOMES, "errors"])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "errors":
        return import_module("vitprune.errors")
    raise AttributeError(f"module 'vitprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
