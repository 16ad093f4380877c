"""Other methods at the MACs of ours, on the same images, in the same run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from vitprune.adaptive import AdaptiveViT, account
from vitprune.backbones import input_size, wrap
from vitprune.baselines import EqualPredictor, ToMeViT, merges_per_block
from vitprune.budget.gmacs import keep_within, last_within
from vitprune.common.devices import Precision
from vitprune.common.formatting import close_match
from vitprune.common.progress import Listener
from vitprune.data import Data, count_images
from vitprune.errors import UnsupportedModelError, UsageError
from vitprune.evaluation import compared
from vitprune.jobs.side_by_side import bench, evaluate, over_images, random_baseline
from vitprune.jobs.sparsify import fit, new_student
from vitprune.measure import Timing, count_macs
from vitprune.model import AttentionViT, SparseViT, TaskName, attach_as
from vitprune.schedule import Sparsity, schedule_for
from vitprune.tasks import ClassVectors, Results, task_named
from vitprune.tokens.predictor import NormPredictor
from vitprune.training.recipe import Recipe, load_recipe

METHODS = {
    "random": "tokens at random",
    "norm": "tokens of largest norm",
    "attention": "what the class token attends to (EViT's ranking, untrained)",
    "attention-merge": "our selection by that attention, untrained (what --recipe none makes)",
    "tome": "token merging, equally in every block",
    "tome-late": "token merging, more in late blocks",
    "paper": "DynamicViT's recipe, cut to as many steps as ours",
    "importance": "ours without redundancy, trained alike",
    "similarity": "ours without importance, trained alike",
    "ours": "vitprune",
}
TRAINED = ("paper", "importance", "similarity", "ours")
_ADAPTIVE = "adaptive"
_BESIDE = {"dense": "the untouched model", _ADAPTIVE: "ours, and dense where ours is less sure"}
_BENCH_SECONDS = 1.0


@dataclass(frozen=True)
class CompareSettings:
    """What a comparison needs beside models, data and recipe.

    Attributes:
        methods: names out of METHODS, in the order of the table.
        device: where to run.
        precision: of accuracy and speed figures.
        batch_size: of accuracy and speed figures.
        steps: training steps of the paper's recipe; None for as many as ours had.

    Raises:
        UsageError: a method does not exist.
    """

    methods: Sequence[str]
    device: torch.device
    precision: Precision = "fp32"
    batch_size: int = 32
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                close = close_match(name, METHODS)
                hint = f"did you mean {close}?" if close else f"choose from {', '.join(METHODS)}"
                raise UsageError(f"unknown method '{name}'", hint)


@dataclass(frozen=True)
class Subject:
    """What is compared: the untouched timm model, and ours, by its plan or as it was trained before."""

    dense: nn.Module
    sparsity: Sparsity = field(default_factory=Sparsity)
    ours: SparseViT | None = None
    steps: int = 0
    """That `ours` was trained for."""
    task: TaskName = "classification"
    class_vectors: ClassVectors | None = None
    """Of a text tower, for zero-shot figures of an embedding."""
    adaptive: AdaptiveViT | None = None
    """Ours with the dense model behind it: a row more, at what it costs on average."""

    @property
    def plan(self) -> Sparsity:
        """That of ours, which its limits are trained with."""
        return (self.ours and self.ours.sparsity) or self.sparsity


def compare(
    subject: Subject, data: Data, recipe: Recipe, settings: CompareSettings, listener: Listener
) -> dict[str, Any]:
    """Every method at the MACs of ours: accuracy on the same images, difference to dense, MACs, speed.

    Images to train on are needed for methods in TRAINED that are not trained yet; the recipe is that of ours.

    Returns:
        `task`, `budget_gmacs` and `rows`, one per method, dense first, in JSON's types.

    Raises:
        UsageError: training is asked for without images to train on.
    """
    size = input_size(subject.dense)
    planned = attach_as(subject.dense, subject.sparsity) if subject.ours is None else subject.ours
    budget = count_macs(planned, size)
    models, rows = {"dense": subject.dense}, {"dense": _row("dense")}
    for name in sorted(settings.methods, key=lambda name: name != "ours"):
        if name == "ours" and subject.ours is not None:
            models[name], rows[name] = subject.ours, _row(name, "from the file", steps=subject.steps)
        elif name in TRAINED:
            plan = _paper(subject, budget, data, recipe, settings) if name == "paper" else (subject.plan, recipe)
            models[name], rows[name] = _trained(name, subject, *plan, data, settings.device, listener)
        else:
            try:
                models[name], note = _untrained(name, subject.dense, planned, budget)
                rows[name] = _row(name, note)
            except UnsupportedModelError as error:
                rows[name] = _row(name, error.message) | {"available": False}
    if (adaptive := subject.adaptive) is not None:
        adaptive.ended, models[_ADAPTIVE], rows[_ADAPTIVE] = [], adaptive, _row(_ADAPTIVE)
    device, precision, batch_size = settings.device, settings.precision, settings.batch_size
    task = task_named(subject.task, subject.class_vectors)
    results = evaluate(models, data, recipe, device, precision, listener, task=task, batch_size=batch_size)
    costs = {name: _cost(model, size) for name, model in models.items()}
    if adaptive is not None:
        adaptive.ended, models[_ADAPTIVE] = None, over_images(adaptive, data.val, [batch_size])
    timings = bench(models, device, precision, _BENCH_SECONDS, listener, [batch_size])
    for name, cost in costs.items():
        rows[name] |= _measured(name, results, timings) | cost
    return {
        "task": task.name,
        "budget_gmacs": budget / 1e9,
        "rows": [rows[name] for name in ("dense", *settings.methods, _ADAPTIVE) if name in rows],
    }


def untrained_models(subject: Subject, settings: CompareSettings) -> dict[str, nn.Module]:
    """The methods that need no training, at the MACs of ours, by name.

    Raises:
        UnsupportedModelError: the model cannot be pruned so, or not so far.
    """
    planned = attach_as(subject.dense, subject.sparsity) if subject.ours is None else subject.ours
    budget = count_macs(planned, input_size(subject.dense))
    return {name: _untrained(name, subject.dense, planned, budget)[0] for name in settings.methods}


def _row(name: str, note: str | None = None, seconds: float = 0.0, steps: int = 0) -> dict[str, Any]:
    """What is known of a method before it is measured; seconds and steps are of training it here."""
    return {
        "method": name,
        "what": _BESIDE.get(name) or METHODS[name],
        "note": note,
        "available": True,
        "train_seconds": seconds,
        "train_steps": steps,
    }


def _keep(model: nn.Module) -> float | None:
    """Of a dense model 1; None where no keep ratio says what is pruned."""
    if not isinstance(model, SparseViT):
        return None if isinstance(model, ToMeViT) else 1.0
    return model.sparsity.keep if model.sparsity is not None and model.sparsity.tokens_left is None else None


def _cost(model: nn.Module, size: tuple[int, int, int]) -> dict[str, Any]:
    """On paper; of an adaptive model on average over the images that it has seen, with a note on these."""
    if not isinstance(model, AdaptiveViT):
        return {"keep": _keep(model), "gmacs": count_macs(model, size) / 1e9}
    spent = account(model.ended or [], model.costs(size))
    note = (
        f"{model.label} below a lead of {model.threshold:.3f}: {spent['went_on_pct']:.1f} % of the images, "
        f"{spent['gmacs_worst']:.3f} GMACs each"
    )
    return {"keep": None, "gmacs": spent["gmacs_mean"], "note": note}


def _measured(name: str, results: Mapping[str, Results], timings: Sequence[Timing]) -> dict[str, Any]:
    against = compared(name, results, timings)
    (speed,) = against.pop("speedup")
    return {
        **results[name].summary(),
        **against,
        "images_per_s": next(timing.images_per_s for timing in timings if timing.model == name),
        **speed,
    }


def _untrained(name: str, dense: nn.Module, planned: SparseViT, budget: int) -> tuple[nn.Module, str]:
    """A method that needs no training, and a note on it.

    All but "random", which has the token counts of ours, come as close to the budget from below as their steps allow.

    Raises:
        UnsupportedModelError: the model cannot be pruned so, or not so far.
    """
    if name == "random":
        return random_baseline(dense, planned), f"the token counts of ours, {planned.pruned}"
    backbone, size = wrap(dense), input_size(dense)
    if name.startswith("tome"):

        def merging(fewer: int) -> ToMeViT:
            return ToMeViT(dense, merges_per_block(backbone.depth, -fewer, late=name == "tome-late"))

        # A block merges half of its tokens at most, so a late schedule may ask for more than that.
        fewer = last_within(budget, lambda step: count_macs(merging(step), size), -4 * backbone.num_patches, 0)
        found = merging(fewer)
        if count_macs(found, size) > budget:
            raise UnsupportedModelError(f"cannot merge down to {budget / 1e9:.3f} GMACs")
        return found, "merges " + ",".join(map(str, found.merges))

    def ranked(keep: float) -> SparseViT:
        if name == "attention-merge":
            return attach_as(dense, Sparsity(keep, predictor="attention"))
        sparsity = Sparsity(keep, token_schedule="geometric")
        schedule = schedule_for(backbone, sparsity)
        predictors = [NormPredictor() for _ in schedule.stages]
        if name == "norm":
            return SparseViT(dense, schedule, predictors, "drop")
        return AttentionViT(dense, schedule, "drop")

    keep = keep_within(budget, ranked, size)
    return ranked(keep), f"keep {keep:g}"


def _paper(
    subject: Subject, budget: int, data: Data, recipe: Recipe, settings: CompareSettings
) -> tuple[Sparsity, Recipe]:
    """The published settings but for what makes no sense so short.

    The rate is not scaled down to the small batch and weights are not averaged over ten thousand steps: both would
    hardly change the model. The shares of frozen and of warm-up steps are the published ones.
    """
    per_epoch = max(1, (count_images(data.train) or 0) // recipe.batch_size)
    steps = settings.steps or subject.steps or recipe.pretraining_steps + recipe.num_steps(per_epoch)
    cut = load_recipe(
        "paper",
        steps=steps,
        freeze_epochs=steps / 6 / per_epoch,
        batch_size=recipe.batch_size,
        lr_batch_size=None,
        ema_decay=0.0,
        seed=recipe.seed,
        precision=recipe.precision,
        num_workers=recipe.num_workers,
        labels=recipe.labels and data.train is not None and data.train.labelled,
    )

    def plan(keep: float) -> Sparsity:
        return replace(cut.plan_defaults, keep=keep)

    keep = keep_within(budget, lambda keep: attach_as(subject.dense, plan(keep)), input_size(subject.dense))
    return plan(keep), cut


def _trained(
    name: str,
    subject: Subject,
    sparsity: Sparsity,
    recipe: Recipe,
    data: Data,
    device: torch.device,
    listener: Listener,
) -> tuple[SparseViT, dict[str, Any]]:
    """A model that is trained here, and its row."""
    if name == "importance":
        sparsity = replace(sparsity, balance=None, beta=0.0)
    student = new_student(subject.dense, sparsity, recipe.seed, subject.task)
    if name == "similarity":
        equal = [EqualPredictor() for _ in student.schedule.stages]
        student = SparseViT(student.model, student.schedule, equal, "merge", balance=0.0, beta=0.0)
        student.task = subject.task
        recipe = recipe.model_copy(update={"pretraining_steps": 0})
    started = time.perf_counter()
    progress = fit(subject.dense, student, data, recipe, device, listener)
    how = f"{recipe.steps} steps" if name == "paper" else f"{sparsity.token_schedule}, {sparsity.pruned}"
    note = f"{sparsity.label}, {how}"
    return student.eval(), _row(name, note, time.perf_counter() - started, progress.steps_done)
