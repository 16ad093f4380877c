"""`vitprune sweep`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitprune.cli.model_options import ModelOptions, told
from vitprune.cli.options import AsJson, DataArgument, Device, ImageOptions, Model, option, parse_ratios
from vitprune.cli.output import print_json, say
from vitprune.cli.plan_options import StageOptions, resolve_plan
from vitprune.cli.progress import RunProgress
from vitprune.cli.tables import print_sweep
from vitprune.cli.training_options import (
    Overwrite,
    RecipeOptions,
    RunOptions,
    load_dense_model,
    training_device,
    training_images,
    untrained,
)
from vitprune.common import distributed
from vitprune.common.files import check_writable
from vitprune.common.run_folder import RUNS, RunFolder
from vitprune.errors import UsageError, VitpruneError

if TYPE_CHECKING:
    from vitprune.loading.load import Loaded


def sweep(
    context: typer.Context,
    model: Model,
    stages: StageOptions,
    recipe: RecipeOptions,
    weights: ModelOptions,
    images: ImageOptions,
    running: RunOptions,
    keep: Annotated[
        str | None,
        option(
            "Keep ratios in (0, 1), a run each; of a file that was trained for a range, without any training.",
            metavar="RATIOS",
            shown=".9,.8,.7,.6,.5",
        ),
    ] = None,
    elastic: Annotated[
        bool, option("One run for the whole range of --keep instead of one for each.", "--elastic")
    ] = False,
    also: Annotated[
        str | None,
        option(
            "Smaller dense models to compare with, on the same images: timm names with commas between, "
            "or NAME=FILE for weights that are not from the Hub.",
            metavar="NAMES",
            shown=False,
        ),
    ] = None,
    data: DataArgument = None,
    output: Annotated[
        Path | None,
        option("Folder with a run folder for each.", "--output", "-o", metavar="DIR", shown="runs/<model>-sweep"),
    ] = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool,
        option(
            "Resume the sweep in --output, or the last of its name: complete runs are kept, other ratios and --also "
            "models may be added.",
            "--resume",
        ),
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """One sparsify run after another, or one for all, then all of them beside the dense model and smaller dense ones.

    All models see the same images and are timed interleaved. Writes a run folder for each ratio, and sweep.html
    and sweep.json: accuracy and speed of each, and the Pareto front. Other settings of training: --set, or a YAML
    file as --recipe.

    Examples:

      vitprune sweep demo --keep .8,.6,.4

      vitprune sweep deit_small path/to/imagenet --elastic

      vitprune sweep runs/deit_small_patch16_224-keep0.5-0.9 path/to/imagenet --keep .9,.7,.5

      vitprune sweep deit_small path/to/imagenet --keep .9,.7,.5 --also deit_tiny

      vitprune sweep deit_small path/to/folder --checkpoint small.safetensors --also deit_tiny=tiny.safetensors
    """
    distributed.refuse_several("sweep")
    if resume and overwrite:
        raise UsageError("--resume and --overwrite are mutually exclusive", "give one of them")
    check_writable(output or RUNS)
    ratios = _ratios(keep or ".9,.8,.7,.6,.5")
    if elastic and len(ratios) < 2:
        raise UsageError(f"--elastic trains for a range, and --keep is '{keep}'", "give its ends: --keep .9,.5")
    named = _named(also)
    plan = recipe.chosen(model, weights.task, ranged=elastic)
    asked = [(ratios[-1], ratios[0])] if elastic else ratios
    requests = [stages.request(keep=each) for each in asked]
    where = training_device(device, plan)
    options, timing = images.parsed(), running.timing(where)
    trained = _trained(model, weights)
    if trained is None:
        loaded = load_dense_model(model, weights)
        plans = [resolve_plan(each, loaded.model, plan)[0] for each in requests]
    else:
        _refuse_training(model, recipe, stages, elastic=elastic)
        loaded, plans, plan = weights.dense_of(trained), [], untrained(plan)
        ratios = _within(trained, ratios, keep)
    others = _others(loaded, named, weights.img_size)

    from vitprune.jobs.sweep import sweep as run
    from vitprune.jobs.train_run import RunSettings
    from vitprune.report.publishable import command_line
    from vitprune.schedule import Sparsity

    folder = RunFolder.choose(output, f"{loaded.short_name}-sweep", overwrite=overwrite, resume=resume)
    keeps = f"keep {', '.join(f'{ratio:g}' for ratio in ratios)}"
    opened = training_images(loaded, images.spec(data, loaded), options, plan, keeps, where)
    common = RunSettings(
        plans[0] if plans else Sparsity(),
        where,
        folder,
        resume=resume,
        checkpoint_every=running.checkpoint_every,
        **timing,
        commands={"sweep": command_line(context.obj)},
    )
    with RunProgress() as progress:
        sparse = trained.sparse if trained else None
        result = run(loaded, opened, plan, plans, others, common, progress, ratios=ratios, trained=sparse)
    if as_json:
        print_json(result)
    else:
        print_sweep(result, folder.path)
    for row in result["failed"]:
        say(f"{row['label']} failed: {row['error']}; the same command with --resume tries it again")
    if result["failed"]:
        raise typer.Exit(1)


def _trained(model: str, weights: ModelOptions) -> Loaded | None:
    """A file of ours, which must have been trained for a range of keep ratios."""
    from vitprune.loading.load import sparse_file

    if sparse_file(model) is None:
        return None
    loaded = weights.load(model, checkpoint=None, checkpoint_key=None)
    if loaded.sparse is None or loaded.sparse.keep_range is None:
        raise UsageError(
            f"'{model}' was trained for one keep ratio",
            "sweep the dense model, or a file that was trained for a range: vitprune sparsify MODEL --keep 0.5-0.9",
        )
    return loaded


def _refuse_training(model: str, recipe: RecipeOptions, stages: StageOptions, *, elastic: bool) -> None:
    """A file that is trained already goes with no option that says how to train."""
    if elastic or stages != StageOptions() or replace(recipe, batch_size=None, workers=None) != RecipeOptions():
        raise UsageError(
            f"'{model}' is trained already: its keep ratios are measured, and options of training would do nothing",
            "leave them out",
        )


def _within(trained: Loaded, ratios: list[float], asked: str | None) -> list[float]:
    """The ratios to measure: those asked for, else those of the default that lie in the file's range."""
    low, high = (trained.sparse.keep_range if trained.sparse else None) or (0.0, 1.0)
    return ratios if asked else [ratio for ratio in ratios if low <= ratio <= high] or [low, high]


def _ratios(text: str) -> list[float]:
    """--keep, the highest first."""
    ratios = parse_ratios(text, "--keep") or []
    for ratio in ratios:
        if ratio == 1:
            raise UsageError(f"--keep is '{text}', and 1 is the dense model, which is always there", "leave out the 1")
        if ratios.count(ratio) > 1:
            raise UsageError(f"--keep is '{text}', which names {ratio:g} twice", "name each ratio once")
    return sorted(ratios, reverse=True)


def _named(also: str | None) -> dict[str, Path | None]:
    """--also as names and weight files."""
    found: dict[str, Path | None] = {}
    for part in [] if also is None else also.split(","):
        name, equals, file = part.strip().partition("=")
        if not name or (equals and not file):
            raise UsageError(
                f"--also is '{also}', expected names with commas between, or NAME=FILE", "--also deit_tiny"
            )
        if name in found:
            raise UsageError(f"--also names '{name}' twice", "name each model once")
        found[name] = Path(file) if file else None
    return found


def _others(dense: Loaded, named: dict[str, Path | None], img_size: tuple[int, int] | None) -> dict[str, Loaded]:
    """The models of --also, by the names they are to have in the table."""
    from vitprune.loading.load import load_model

    others: dict[str, Loaded] = {}
    for name, file in named.items():
        try:
            other = told(load_model(name, checkpoint=file, img_size=img_size, task=dense.task))
        except VitpruneError as error:
            error.hint = error.hint and error.hint.replace("--checkpoint FILE", f"--also {name}=FILE")
            raise
        if file is None and other.name == dense.name and other.origin == dense.origin:
            raise UsageError(f"--also names '{name}', which is MODEL itself", "name other models")
        label = name if len(name) < len(other.short_name) and not Path(name).exists() else other.short_name
        if label == "dense" or label in others:
            raise UsageError(f"--also names two models that would both be called '{label}'", "name one of them")
        others[label] = other
    return others
