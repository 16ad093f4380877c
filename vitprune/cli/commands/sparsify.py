"""`vitprune sparsify`: the main job."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitprune.cli.limits import MinFidelity, check_goes_with, check_measured, drop_check, fidelity_check, of_checks
from vitprune.cli.model_options import ModelOptions
from vitprune.cli.options import AsJson, DataArgument, Device, ImageOptions, Model, option
from vitprune.cli.output import Check, enforce, print_json, print_line, say, waiting
from vitprune.cli.plan_options import AllPlanOptions, resolve_plan
from vitprune.cli.progress import RunProgress
from vitprune.cli.tables import print_summary
from vitprune.cli.training_options import (
    Overwrite,
    RecipeOptions,
    RunOptions,
    load_dense_model,
    of_training,
    training_device,
    training_images,
)
from vitprune.common import distributed
from vitprune.common.files import check_writable
from vitprune.common.formatting import duration
from vitprune.common.run_folder import RUNS, RunFolder
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.data import Data
    from vitprune.jobs.train_run import RunSettings
    from vitprune.loading.load import Loaded
    from vitprune.schedule import Sparsity
    from vitprune.training.recipe import Recipe


def sparsify(
    context: typer.Context,
    model: Model,
    plan: AllPlanOptions,
    recipe: RecipeOptions,
    weights: ModelOptions,
    images: ImageOptions,
    running: RunOptions,
    data: DataArgument = None,
    output: Annotated[
        Path | None, option("Run folder.", "--output", "-o", metavar="DIR", shown="runs/<model>-keep<r>")
    ] = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, option("Resume the run in --output, or the last one.", "--resume")] = False,
    device: Device = "auto",
    compiled: Annotated[
        bool,
        of_training(
            "Run the transformer blocks through torch.compile: a wait at first, and on a CPU hardly faster.",
            "--compile",
        ),
    ] = False,
    track: Annotated[
        str | None,
        of_training(
            "Log the steps also to tensorboard, or another tracker that accelerate knows and that is installed.",
            "--report-to",
            metavar="NAME",
        ),
    ] = None,
    dry_run: Annotated[bool, option("Check all, estimate the time, write nothing.", "--dry-run")] = False,
    print_config: Annotated[
        bool, of_training("Print the recipe with what replaces it as YAML.", "--print-config")
    ] = False,
    force_labels: Annotated[
        bool, of_training("Go on though labels seem not to be the model's.", "--force-labels")
    ] = False,
    max_drop: Annotated[
        float | None,
        of_checks(
            "Largest loss against dense of what the task measures: top-1, mAP, error, k-NN top-1.",
            metavar="POINTS",
            min=0,
        ),
    ] = None,
    min_top1: Annotated[float | None, of_checks("Lowest top-1, in percent.", metavar="PERCENT", min=1)] = None,
    min_fidelity: MinFidelity = None,
    min_speedup: Annotated[
        float | None, of_checks("Lowest speed-up at any batch size of the report.", metavar="X", min=0)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prune tokens of a model: attach predictors, train for minutes, report what that cost and gained.

    Examples:

      vitprune sparsify demo

      vitprune sparsify deit_small path/to/imagenet --keep 0.7

      vitprune sparsify deit_small my/images --no-labels

      vitprune sparsify deit_small --target-speedup 1.5 --target-batch-size 8
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite are mutually exclusive", "give one of them")
    if not print_config:
        check_writable(output or RUNS)
    with waiting("loading PyTorch"):
        from vitprune.tasks import task_named

        request = plan.request(device=device)
        ranged = isinstance(request.keep, list)
        chosen = recipe.chosen(model, weights.task, ranged=ranged, compile=True if compiled else None)
    if print_config:
        import yaml

        print_line(yaml.safe_dump(chosen.model_dump(mode="json", exclude={"name"}), sort_keys=False).rstrip())
        return
    if resume and request.measured is not None:
        raise UsageError(
            f"{request.measured} may measure something else than the run to resume did",
            "give what it found: --keep, --prune-at and --align are in its config.json",
        )
    where = training_device(device, chosen)
    options, timing = images.parsed(), running.timing(where)
    if track is not None:
        from vitprune.training.progress import check_tracker

        check_tracker(track)
    with waiting(f"loading {model}"):
        loaded = load_dense_model(model, weights)
    task = task_named(loaded.task, loaded.class_vectors)
    check_goes_with(task, min_top1=min_top1, max_drop=max_drop, min_fidelity=min_fidelity)
    sparsity, prediction = resolve_plan(request, loaded.model, chosen)
    folder = _folder(loaded, sparsity, output, overwrite, resume)
    if not chosen.trains and data is None and images.data_option is None:
        _refuse_checks(max_drop=max_drop, min_top1=min_top1, min_fidelity=min_fidelity, min_speedup=min_speedup)
        _write_untrained(loaded, sparsity, folder, as_json)
        return
    opened = training_images(loaded, images.spec(data, loaded), options, chosen, sparsity.label, where)
    check_measured(task, opened, max_drop=max_drop, min_top1=min_top1)

    from vitprune.jobs.sparsify import run
    from vitprune.jobs.train_run import RunSettings
    from vitprune.report.publishable import command_line

    run_settings = RunSettings(
        sparsity,
        where,
        folder,
        resume=resume,
        checkpoint_every=running.checkpoint_every,
        **timing,
        track=track,
        prediction=prediction,
        force_labels=force_labels,
        commands={"sparsify": command_line(context.obj)},
    )
    if dry_run:
        _rehearse(loaded, opened, chosen, run_settings, as_json)
        return
    with RunProgress() as progress:
        _, report = run(loaded, opened, chosen, run_settings, progress)
    if as_json:
        print_json(report.as_json())
    else:
        print_summary(report, folder.path)
    enforce(
        [
            drop_check(task, report, max_drop),
            Check("--min-top1", report.sparse.top1_pct, min_top1),
            fidelity_check(task, report.delta.as_json(), min_fidelity),
            Check("--min-speedup", min(row.speedup for row in report.delta.speedup), min_speedup),
        ]
    )


def _refuse_checks(**limits: float | None) -> None:
    """Without DATA nothing is measured that could meet them."""
    for name, value in limits.items():
        if value is not None:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} needs a measurement, and without DATA there is none", "give DATA too")


def _write_untrained(loaded: Loaded, sparsity: Sparsity, folder: RunFolder, as_json: bool) -> None:
    """--recipe none without DATA: the file, and what is known of it."""
    from vitprune.jobs.untrained import write_untrained

    _, result = write_untrained(loaded, sparsity, folder)
    if as_json:
        print_json(result)
        return
    _print_plan(result)
    print_line("nothing was measured: neither accuracy nor speed")
    print_line(f"written to {folder}; vitprune eval {shlex.quote(str(folder))} DATA measures it")


def _print_plan(result: dict[str, Any]) -> None:
    counts = ", ".join(f"{stage['num_tokens']} before block {stage['block']}" for stage in result["stages"])
    print_line(f"of {result['num_patches']} patch tokens are left: {counts or 'all'}")
    print_line(f"GMACs {result['dense']['gmacs']:.3f} > {result['sparse']['gmacs']:.3f}")


def _rehearse(loaded: Loaded, images: Data, recipe: Recipe, settings: RunSettings, as_json: bool) -> None:
    """--dry-run: what the run would do and how long its training would take."""
    from vitprune.jobs.rehearsal import rehearse

    with RunProgress() as progress:
        force = settings.force_labels
        result = rehearse(loaded, images, recipe, settings.sparsity, settings.device, progress, force_labels=force)
    result |= {"output": str(settings.output)}
    if as_json:
        print_json(result)
        return
    _print_plan(result)
    print_line(
        f"training: {result['num_steps']} steps of {recipe.batch_size} images, about {duration(result['seconds'])} "
        f"(evaluation, timing and report come on top); memory used so far {result['peak_memory_mib']:.0f} MiB"
    )
    print_line(f"a run would write to {settings.output}; nothing was written, and not every image was opened")


def _folder(loaded: Loaded, sparsity: Sparsity, output: Path | None, overwrite: bool, resume: bool) -> RunFolder:
    """The run folder, not made yet."""
    from vitprune.training.checkpoints import Checkpoints

    name = f"{loaded.short_name}-{sparsity.slug}"
    # One process chooses: another may be so late that the folder is there already.
    chosen = RunFolder.choose(output, name, overwrite=overwrite, resume=resume) if distributed.is_main() else None
    folder = distributed.from_main(chosen)
    if output is None and not resume and folder.path.name != name:
        say(f"'{folder.path.with_name(name)}' exists: this run is written to '{folder}'")
    if resume and Checkpoints(folder.checkpoints, {}).latest_step() is None:
        say(f"'{folder}' holds no training checkpoint to resume from: the run starts over")
    return folder
