"""`vitprune sparsify`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitprune.cli.options import (
    Align,
    AsJson,
    Checkpoint,
    Columns,
    Device,
    Dropped,
    ImgSize,
    Keep,
    Limit,
    Model,
    Precision,
    PrecisionName,
    Ratios,
    RecipeName,
    Schedule,
    Seed,
    Splits,
    Stages,
    Streaming,
    TargetBatchSize,
    TargetGmacs,
    TargetLatency,
    TargetSpeedup,
    Workers,
    data_options,
)
from vitprune.cli.output import enforce, print_json, talk, waiting
from vitprune.cli.plan_options import plan_request, resolve_plan
from vitprune.cli.progress import RunProgress
from vitprune.cli.tables import print_summary
from vitprune.cli.training_options import (
    PANEL,
    BenchSeconds,
    CheckpointEvery,
    Epochs,
    GradAccum,
    NoLabels,
    Overwrite,
    Settings,
    StepBatchSize,
    Steps,
    TrainingData,
    WarmStartSteps,
    batch_settings,
    chosen_recipe,
    load_dense_model,
    training_device,
    training_images,
)
from vitprune.common import distributed
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.loading.load import Loaded
    from vitprune.schedule import Sparsity

_CHECKS = "Checks (exit code 3 if missed)"


def _check(help_text: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel=_CHECKS)


def sparsify(
    context: typer.Context,
    model: Model,
    keep: Keep = None,
    data: TrainingData = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Run folder.", show_default="runs/<model>-keep<r>"),
    ] = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --output, or the last of its name, where it was cut."),
    ] = False,
    stages: Stages = None,
    schedule: Schedule = None,
    ratios: Ratios = None,
    dropped: Dropped = None,
    target_gmacs: TargetGmacs = None,
    align: Align = None,
    target_speedup: TargetSpeedup = None,
    target_latency_ms: TargetLatency = None,
    target_batch_size: TargetBatchSize = None,
    target_precision: Annotated[
        PrecisionName, typer.Option(help="Precision of a pass where a target or --align auto is measured.")
    ] = "fp32",
    recipe: RecipeName = "short",
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    limit: Limit = None,
    splits: Splits = None,
    columns: Columns = None,
    streaming: Streaming = False,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: StepBatchSize = None,
    grad_accum: GradAccum = None,
    workers: Workers = None,
    seed: Seed = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Run the transformer blocks through torch.compile: a wait at first, and on a CPU hardly faster.",
            rich_help_panel=PANEL,
        ),
    ] = False,
    no_labels: NoLabels = False,
    warm_start_steps: WarmStartSteps = None,
    steps: Steps = None,
    epochs: Epochs = None,
    changes: Settings = None,
    track: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Log the steps also to tensorboard, or another tracker that accelerate knows and that is installed.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    checkpoint_every: CheckpointEvery = None,
    bench_seconds: BenchSeconds = None,
    max_drop: Annotated[float | None, _check("Largest loss of top-1 against dense, in points.")] = None,
    min_top1: Annotated[float | None, _check("Lowest top-1, in percent.")] = None,
    min_speedup: Annotated[float | None, _check("Lowest speed-up at the largest batch size measured.")] = None,
    as_json: AsJson = False,
) -> None:
    """Attach token predictors to a model, train them for minutes, and report what that cost and gained.

    Writes model.safetensors, report.html, report.json and more into the run folder.

    Examples:

      vitprune sparsify demo

      vitprune sparsify deit_small --keep 0.7 --data path/to/imagenet

      vitprune sparsify deit_small --checkpoint my.safetensors --data path/to/my/images --no-labels

      vitprune sparsify deit_small --target-speedup 1.5 --target-batch-size 8
    """
    if resume and overwrite:
        raise UsageError("--resume goes on with a run, --overwrite replaces it", "give one of them")
    settings = {
        **batch_settings(batch_size, grad_accum),
        "num_workers": workers,
        "warm_start_steps": warm_start_steps,
        "steps": steps,
        "epochs": epochs,
        "seed": seed,
        "precision": None if precision == "auto" else precision,
        "labels": False if no_labels else None,
        "compile": True if compiled else None,
    }
    with waiting("loading PyTorch"):
        chosen = chosen_recipe(model, recipe, settings, changes)
        request = plan_request(
            keep=keep,
            stages=stages,
            schedule=schedule,
            ratios=ratios,
            dropped=dropped,
            align=align,
            target_gmacs=target_gmacs,
            target_speedup=target_speedup,
            target_latency_ms=target_latency_ms,
            target_batch_size=target_batch_size,
            precision=target_precision,
            device=device,
        )
    if resume and request.measured is not None:
        raise UsageError(
            f"{request.measured} may measure something else than the run to resume did",
            "give what it found: --keep, --stages and --align are in its config.json",
        )
    where = training_device(device, chosen)
    options = data_options(splits, columns, streaming, limit)
    if track is not None:
        from vitprune.training import check_tracker

        check_tracker(track)
    with waiting(f"loading {model}"):
        loaded = load_dense_model(model, checkpoint, img_size)
    sparsity, prediction = resolve_plan(request, loaded.model, chosen)
    folder = _folder(loaded, sparsity, output, overwrite, resume)
    images = training_images(loaded, data, options, chosen, sparsity.label, where)

    from vitprune.jobs.sparsify import RunSettings, run
    from vitprune.report.publishable import command_line

    run_settings = RunSettings(
        sparsity,
        where,
        folder,
        resume=resume,
        checkpoint_every=checkpoint_every,
        bench_seconds=bench_seconds,
        track=track,
        prediction=prediction,
        commands={"sparsify": command_line(context.obj)},
    )
    with RunProgress() as progress:
        _, report = run(loaded, images, chosen, run_settings, progress)
    if as_json:
        print_json(report.as_json())
    else:
        print_summary(report, folder)
    top1, delta = report.sparse.top1_pct, report.delta
    enforce(
        [
            ("--max-drop (as change of top-1)", delta.top1_points, None if max_drop is None else -max_drop),
            ("--min-top1", top1, min_top1),
            ("--min-speedup", delta.speedup[-1].speedup, min_speedup),
        ]
    )


def _folder(loaded: Loaded, sparsity: Sparsity, output: Path | None, overwrite: bool, resume: bool) -> Path:
    """The run folder, not made yet."""
    from vitprune.common.run_folder import RunFolder
    from vitprune.training import Checkpoints

    name = f"{loaded.short_name}-{sparsity.slug}"
    # One process chooses: another may be so late that the folder is there already.
    chosen = RunFolder.choose(output, name, overwrite=overwrite, resume=resume) if distributed.is_main() else None
    folder = distributed.from_main(chosen)
    if resume and Checkpoints(folder.checkpoints, {}).latest_step() is None:
        talk(f"'{folder}' holds no training checkpoint to go on from: the run begins anew")
    return folder.path
