"""The main job from Python."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from vitprune.budget.resolve import PlanRequest, resolve
from vitprune.common.devices import pick_device
from vitprune.common.progress import SILENT
from vitprune.common.run_folder import RunFolder
from vitprune.data import Data, ModelClasses, open_data
from vitprune.jobs.sparsify import RunSettings, fit, new_student, run
from vitprune.loading.load import loaded_from
from vitprune.model import SparseViT, attach_as
from vitprune.schedule import Pruned, ScheduleName
from vitprune.training.recipe import Recipe, load_recipe


def sparsify(
    model: nn.Module,
    keep: float | None = None,
    data: str | Path | None = None,
    *,
    stages: Sequence[int] | None = None,
    ratios: Sequence[float] | None = None,
    schedule: ScheduleName | None = None,
    pruned: Pruned | None = None,
    align: int = 1,
    target_gmacs: float | None = None,
    target_speedup: float | None = None,
    target_latency_ms: float | None = None,
    target_batch_size: int = 32,
    recipe: Recipe | str = "short",
    device: str = "auto",
    output: str | Path | None = None,
    class_names: Sequence[str] | None = None,
) -> SparseViT:
    """Make a timm vision transformer drop its least informative tokens, and train it for that.

    Args:
        model: a timm model of a supported family; it is the teacher and is not changed.
        keep: share of patch tokens that one stage keeps, in (0, 1]; None for 0.7, or for what a target finds.
        data: images to train on: a folder, "imagenet", "hf:owner/name" or "demo". None attaches untrained
            predictors and warns: they rank tokens no better than chance until you train them.
        stages: block indices before which predictors act; None for the default (12 blocks: 3, 6, 9).
        ratios: free shares of the original tokens left after each stage, instead of `keep`.
        schedule: "geometric" or "late"; None for the recipe's.
        pruned: "drop" or "merge"; None for the recipe's.
        align: token counts in multiples of this, prefix tokens included, at the same cost.
        target_gmacs: most multiply-accumulates of one image, in billions; instead of `keep`.
        target_speedup: images per second over the dense model's, measured on `device` in fp32; instead of `keep`.
        target_latency_ms: time of a pass, measured likewise; instead of `keep`.
        target_batch_size: images per pass when measuring.
        recipe: training settings, or the name or path of a settings file.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        output: folder for model.safetensors, report.json and log.jsonl, which also takes an evaluation; None writes
            nothing.
        class_names: in output order, to match folders by name and to store in the file.

    Returns:
        The sparse model in eval mode; call it like the dense one.

    Raises:
        VitpruneError: see `vitprune.errors`.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    request = PlanRequest(
        keep,
        stages,
        ratios,
        schedule,
        pruned,
        align,
        target_gmacs,
        target_speedup,
        target_latency_ms,
        target_batch_size,
        device=device,
    )
    sparsity, prediction = resolve(request, model, recipe.plan_defaults)
    if data is None:
        warnings.warn("no data given: the token predictors are attached but not trained", UserWarning, stacklevel=2)
        return attach_as(copy.deepcopy(model), sparsity).eval()
    where = pick_device(device)
    loaded = loaded_from(copy.deepcopy(model), class_names)  # training moves and freezes the teacher
    classes = ModelClasses(getattr(model, "num_classes", 0), loaded.class_names)
    images: Data = open_data(str(data), classes, training=True, labels=recipe.labels)
    if output is None:
        student = new_student(model, sparsity, recipe.seed)
        fit(loaded.model, student, images, recipe, where, SILENT)
        return student.eval()
    folder = RunFolder.choose(Path(output), "").path
    student, _ = run(loaded, images, recipe, RunSettings(sparsity, where, folder, prediction=prediction), SILENT)
    return student
