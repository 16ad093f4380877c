"""The same budget by other means: every method at the MACs of ours, on the same images, in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vitprune.backbones import input_size, wrap
from vitprune.baselines import AttentionViT, NormPredictor, RandomPredictor, ToMeViT, merges_per_block
from vitprune.budget import keep_within, last_within
from vitprune.common.devices import Precision
from vitprune.common.formatting import close_match
from vitprune.common.progress import Listener
from vitprune.data import Data, count_images
from vitprune.errors import UnsupportedModelError, UsageError
from vitprune.evaluation import Predictions, compared
from vitprune.jobs.side_by_side import evaluate
from vitprune.jobs.sparsify import fit, new_student
from vitprune.measure import Timing, benchmark, count_macs, rates
from vitprune.model import SparseViT, Sparsity, attach_as
from vitprune.training import Progress, Recipe, load_recipe

METHODS = {
    "random": "tokens at random",
    "norm": "tokens of largest norm",
    "attention": "what the class token attends to (EViT's ranking, untrained)",
    "attention-fold": "the same, dropped tokens folded into kept ones",
    "tome": "token merging, equally in every block",
    "tome-late": "token merging, more in late blocks",
    "paper": "DynamicViT's recipe, cut to as many steps as ours",
    "ours": "vitprune",
}
TRAINED = ("paper", "ours")
_BENCH_SECONDS = 1.0


@dataclass
class _Row:
    """A method: its model, what was spent on training it here, or why there is none."""

    model: nn.Module | None
    seconds: float = 0.0
    steps: int = 0
    note: str | None = None


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
                raise UsageError(f"there is no method '{name}'", hint)


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        dense: the untouched timm model.
        sparsity: how ours is made.
        ours: the sparse model where it was trained before; None to train it here.
        steps: that `ours` was trained for.
    """

    dense: nn.Module
    sparsity: Sparsity = field(default_factory=Sparsity)
    ours: SparseViT | None = None
    steps: int = 0


def compare(
    subject: Subject, data: Data, recipe: Recipe, settings: CompareSettings, listener: Listener
) -> dict[str, Any]:
    """Every method at the MACs of ours: accuracy on the same images, difference to dense, MACs, speed.

    Args:
        subject: the models.
        data: the images; those to train on are needed for methods in TRAINED that are not there yet.
        recipe: for training ours, where that is still to be done.
        settings: which methods, and where.
        listener: told of progress.

    Returns:
        `budget_gmacs` and `rows`, one per method, dense first, in JSON's types.

    Raises:
        UsageError: training is asked for without images to train on.
    """
    size = input_size(subject.dense)
    budget = count_macs(subject.ours or attach_as(subject.dense, subject.sparsity), size)
    rows: dict[str, _Row] = {"dense": _Row(subject.dense)}
    if "ours" in settings.methods:
        rows["ours"] = _ours(subject, data, recipe, settings, listener)
    for name in settings.methods:
        if name != "ours":
            rows[name] = _build(name, subject, budget, data, recipe, settings, listener)
    ordered = {name: rows[name] for name in ("dense", *settings.methods)}
    models = {name: row.model for name, row in ordered.items() if row.model is not None}
    predictions = evaluate(
        models, data, recipe, settings.device, settings.precision, listener, batch_size=settings.batch_size
    )
    listener.begin("measuring speed", len(models))
    timings = benchmark(
        models,
        size,
        [settings.batch_size],
        device=settings.device,
        precision=settings.precision,
        min_seconds=_BENCH_SECONDS,
        listener=listener,
    )
    return {
        "budget_gmacs": budget / 1e9,
        "rows": [_describe(name, row, predictions, timings, size) for name, row in ordered.items()],
    }


def _build(
    name: str,
    subject: Subject,
    budget: int,
    data: Data,
    recipe: Recipe,
    settings: CompareSettings,
    listener: Listener,
) -> _Row:
    """A baseline whose MACs come as close to the budget from below as its steps allow."""
    size = input_size(subject.dense)
    if name == "paper":
        return _paper(subject, budget, data, recipe, settings, listener)
    if name.startswith("tome"):
        return _merging(subject.dense, budget, late=name == "tome-late")
    build = _RANKINGS[name]
    try:
        keep = keep_within(budget, lambda ratio: build(subject.dense, ratio), size)
    except UnsupportedModelError as error:
        return _Row(None, note=error.message)
    return _Row(build(subject.dense, keep), note=f"keep {keep:g}")


def _ranked(model: nn.Module, keep: float, make: Callable[[int], nn.Module]) -> SparseViT:
    backbone = wrap(model)
    schedule = Sparsity(keep).plan(backbone)
    return SparseViT(model, schedule, [make(stage) for stage in range(len(schedule.stages))])


_RANKINGS: Mapping[str, Callable[[nn.Module, float], SparseViT]] = {
    "random": lambda model, keep: _ranked(model, keep, RandomPredictor),
    "norm": lambda model, keep: _ranked(model, keep, lambda _: NormPredictor()),
    "attention": lambda model, keep: AttentionViT(model, Sparsity(keep).plan(wrap(model))),
    "attention-fold": lambda model, keep: AttentionViT(model, Sparsity(keep).plan(wrap(model)), "fold"),
}


def _merging(model: nn.Module, budget: int, *, late: bool) -> _Row:
    backbone = wrap(model)
    size = input_size(model)

    def build(fewer: int) -> ToMeViT:
        return ToMeViT(model, merges_per_block(backbone.depth, -fewer, late=late))

    try:
        # A block merges half of its tokens at most, so a late schedule may ask for more than there are.
        fewer = last_within(budget, lambda step: count_macs(build(step), size), -4 * backbone.num_patches, 0)
        merging = build(fewer)
    except UnsupportedModelError as error:
        return _Row(None, note=error.message)
    if count_macs(merging, size) > budget:
        return _Row(None, note=f"cannot merge down to {budget / 1e9:.3f} GMACs")
    return _Row(merging, note="merges " + ",".join(map(str, merging.merges)))


def _ours(subject: Subject, data: Data, recipe: Recipe, settings: CompareSettings, listener: Listener) -> _Row:
    if subject.ours is not None:
        return _Row(subject.ours, steps=subject.steps, note="from the file")
    student = new_student(subject.dense, subject.sparsity, recipe.seed)
    row = _train(student, subject.dense, data, recipe, settings, listener)
    row.note = f"{subject.sparsity.label}, {subject.sparsity.schedule}, {subject.sparsity.dropped}"
    return row


def _paper(
    subject: Subject, budget: int, data: Data, recipe: Recipe, settings: CompareSettings, listener: Listener
) -> _Row:
    """The published settings but for what makes no sense so short.

    The rate is not scaled down to the small batch and weights are not averaged over ten thousand steps: both would
    leave the model as it was. The shares of frozen and of warm-up steps are the published ones.
    """
    per_epoch = max(1, (count_images(data.train) or 0) // recipe.batch_size)
    ours = subject.steps or recipe.warm_start_steps + recipe.num_steps(per_epoch)
    steps = settings.steps or ours
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
        return Sparsity(keep, schedule=cut.schedule, dropped=cut.dropped)

    size = input_size(subject.dense)
    sparsity = plan(keep_within(budget, lambda keep: attach_as(subject.dense, plan(keep)), size))
    student = new_student(subject.dense, sparsity, cut.seed)
    row = _train(student, subject.dense, data, cut, settings, listener)
    row.note = f"{sparsity.label}, {steps} steps"
    return row


def _train(
    student: SparseViT, dense: nn.Module, data: Data, recipe: Recipe, settings: CompareSettings, listener: Listener
) -> _Row:
    started, progress = time.perf_counter(), Progress()
    fit(dense, student, data, recipe, settings.device, listener, progress)
    return _Row(student.eval(), seconds=time.perf_counter() - started, steps=progress.steps_done)


def _describe(
    name: str,
    row: _Row,
    predictions: Mapping[str, Predictions],
    timings: Sequence[Timing],
    size: tuple[int, int, int],
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "method": name,
        "what": "the untouched model" if name == "dense" else METHODS[name],
        "note": row.note,
        "available": row.model is not None,
        "train_s": row.seconds,
        "train_steps": row.steps,
    }
    if row.model is None:
        return result
    own = rates(timings, name)
    against = compared(predictions[name], predictions["dense"], own, rates(timings, "dense"))
    (speed,) = against["speedup"]
    return result | {
        **predictions[name].summary(),
        "delta_points": against["top1_points"],
        "delta_points_ci95": against["top1_points_ci95"],
        "agreement_pct": against["agreement_pct"],
        "kl": against["kl"],
        "gmacs": count_macs(row.model, size) / 1e9,
        "images_per_s": own[speed["batch_size"]],
        **speed,
    }
