"""`vitprune.sparsify`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from vitprune.api.arguments import (
    AskedTask,
    Images,
    Model,
    ProgressShown,
    chosen_recipe,
    known,
    loader_settings,
    opened,
)
from vitprune.backbones import wrap
from vitprune.budget.resolve import PlanRequest, resolve
from vitprune.checkpoint.sparse_file import remember
from vitprune.common.devices import pick_device
from vitprune.common.progress import Listener
from vitprune.common.renamed import renamed
from vitprune.common.run_folder import RunFolder
from vitprune.data import Data
from vitprune.errors import UsageError
from vitprune.jobs.label_check import check_labels
from vitprune.jobs.sparsify import describe_run, fit, measured, new_student, run
from vitprune.jobs.train_run import RunSettings
from vitprune.jobs.untrained import write_untrained
from vitprune.loading.load import Loaded
from vitprune.model import SparseViT, attach_as
from vitprune.report import accuracy_of
from vitprune.schedule import Pruned, ScheduleName
from vitprune.training.recipe import Recipe, default_recipe, usual


@renamed(stages="prune_at", schedule="token_schedule", ratios="tokens_left")
def sparsify(
    model: Model,
    data: Images | None = None,
    keep: float | tuple[float, float] | None = None,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    task: AskedTask = "auto",
    class_embeddings: str | Path | None = None,
    val_data: Dataset[Any] | DataLoader[Any] | None = None,
    limit: int | None = None,
    prune_at: Sequence[int] | None = None,
    tokens_left: Sequence[float] | None = None,
    token_schedule: ScheduleName | None = None,
    pruned: Pruned | None = None,
    align: int = 1,
    target_gmacs: float | None = None,
    target_speedup: float | None = None,
    target_latency_ms: float | None = None,
    target_batch_size: int | None = None,
    recipe: Recipe | str | None = None,
    device: str = "auto",
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    class_names: Sequence[str] | None = None,
    force_labels: bool = False,
    evaluate: bool = True,
    bench_seconds: float | None = None,
    progress: bool = True,
    **settings: Any,
) -> SparseViT:
    """Make a timm vision transformer prune its unimportant and redundant tokens, train it for that, and measure both.

    Example:
        model = timm.create_model("deit_small_patch16_224.fb_in1k", pretrained=True)
        sparse = vitprune.sparsify(model, "path/to/images", keep=0.7)
        print(sparse.report.delta.top1_points, sparse.report.delta.speedup)
        logits = sparse(images)

    Args:
        model: a timm model of a supported family, the teacher, which is not changed; or a name: "deit_small", "demo".
        data: images to train on: a folder, "imagenet", "hf:owner/name" or "demo", a Dataset of PIL images or of
            tensors (C, H, W), alone or with labels, or a DataLoader of one. None attaches untrained predictors and
            warns: they rank tokens no better than chance until you train them.
        keep: share of patch tokens that one stage keeps, in (0, 1); None for 0.7, or for what a target finds. Of a
            range, such as (0.5, 0.9), one training serves every ratio: `sparse.keep = 0.6`.
        checkpoint: weights for a model given by its name.
        checkpoint_key: which of several sets of weights in it, such as "state_dict"; None for the EMA.
        img_size: image size in pixels of a model given by its name.
        model_kwargs: more arguments for timm.create_model, of a model given by its name.
        task: what the model is for: "classification", "multilabel", "regression", "embedding" or "dense" (token
            features); "auto" believes its weights.
        class_embeddings: a .safetensors file with vectors of the classes by a text tower, for zero-shot figures.
        val_data: images to evaluate on, where `data` is a Dataset or DataLoader; None holds a tenth of it out.
        limit: at most so many images to train on, and as many to evaluate on.
        prune_at: block indices before which predictors act; None for the default (12 blocks: 3, 6, 9).
        tokens_left: shares of the original tokens left after each stage, instead of `keep`.
        token_schedule: "geometric" or "late"; None for the recipe's.
        pruned: "drop" or "merge"; None for the recipe's.
        align: token counts in multiples of this, prefix tokens included, at the same cost.
        target_gmacs: most multiply-accumulates of one image, in billions; instead of `keep`.
        target_speedup: images per second over the dense model's, measured on `device` in fp32; instead of `keep`.
        target_latency_ms: time of a pass, measured likewise; instead of `keep`.
        target_batch_size: images per pass when measuring.
        recipe: training settings, or the name or path of a settings file; None for "short", or "dense" of that task.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        output: run folder for model.safetensors, the report and the log; None writes nothing.
        overwrite: whether `output` may exist.
        resume: resume the run in `output` from its training checkpoint.
        class_names: in output order, to match folders by name and to store in the file.
        force_labels: whether to go on although the labels seem to be others than the model's.
        evaluate: whether to evaluate and time the result; a run with `output` always does.
        bench_seconds: how long each model is timed at each batch size; None for 2.
        progress: whether to show how far it is, on stderr.
        **settings: settings of the recipe to replace, such as `steps=200`, `lr=1e-3`, `labels=False`.

    Returns:
        The sparse model in eval mode, called like the dense one; its `report` is report.json's, or None.

    Raises:
        VitpruneError: see `vitprune.errors`.
    """
    if isinstance(data, (int, float)):
        raise UsageError(f"{data} stands where the images go: a keep ratio is given as keep={data}")
    name = str(model) if isinstance(model, (str, Path)) else ""
    if name == "demo":
        data = "demo" if data is None else data
    recipe = recipe or default_recipe(task)
    if isinstance(recipe, str):
        settings = usual(recipe, name, settings, ranged=isinstance(keep, Sequence))
    chosen = chosen_recipe(recipe, loader_settings(data) | settings)
    request = PlanRequest(
        keep,
        prune_at,
        tokens_left,
        token_schedule,
        pruned,
        align=align,
        target_gmacs=target_gmacs,
        target_speedup=target_speedup,
        target_latency_ms=target_latency_ms,
        target_batch_size=target_batch_size,
        device=device,
    )
    loaded = known(
        model,
        checkpoint,
        img_size,
        class_names,
        checkpoint_key=checkpoint_key,
        model_kwargs=model_kwargs,
        task=task,
        class_embeddings=class_embeddings,
        progress=progress,
    )
    if loaded.sparse is not None:
        raise UsageError("the model is sparse already", "start from the dense model")
    with ProgressShown(progress) as listener:
        sparsity, prediction = resolve(request, loaded.model, chosen.plan_for(wrap(loaded.model).depth), listener)
        if data is None and not chosen.trains:
            if output is None:
                return attach_as(loaded.model, sparsity).eval()
            chosen_folder = RunFolder.choose(Path(output), "", overwrite=overwrite)
            return write_untrained(loaded, sparsity, chosen_folder)[0]
        if data is None:
            message = "no data given: the token predictors are attached but not trained"
            warnings.warn(message, UserWarning, stacklevel=2)
            return attach_as(loaded.model, sparsity).eval()
        where = pick_device(device)
        folder = None if output is None else RunFolder.choose(Path(output), "", overwrite=overwrite, resume=resume)
        images = opened(data, loaded, val_data, limit, training=chosen.trains, labels=chosen.labels)
        run_settings = RunSettings(
            sparsity,
            where,
            folder or RunFolder(Path()),
            resume=resume,
            bench_seconds=bench_seconds,
            prediction=prediction,
            force_labels=force_labels,
        )
        if folder is not None:
            student, report = run(loaded, images, chosen, run_settings, listener)
            student.report = report
        else:
            student = _without_folder(loaded, images, chosen, run_settings, listener, evaluate=evaluate)
    student.class_names = loaded.class_names or images.class_names(student.num_classes)
    return student.eval()


def _without_folder(
    loaded: Loaded, images: Data, recipe: Recipe, settings: RunSettings, listener: Listener, *, evaluate: bool
) -> SparseViT:
    """Train, and measure if that is asked for; `settings.output` is not used."""
    started = time.perf_counter()
    student = new_student(loaded.model, settings.sparsity, recipe.seed, loaded.task)
    metadata = describe_run(student, loaded, images, recipe, settings.sparsity) if evaluate else None
    if evaluate and not settings.force_labels:
        check_labels(loaded, images, settings.device, listener)
    done = fit(loaded.model, student, images, recipe, settings.device, listener)
    if metadata is not None:
        metadata.training = {"steps_done": done.steps_done, "num_steps": done.num_steps, "completed": True}
        report = measured(student, loaded, images, recipe, settings, metadata, done, listener, started=started)
        student.report = report
        metadata.accuracy = None if report is None else accuracy_of(report)
        remember(student, metadata)
    return student
