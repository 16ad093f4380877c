"""`vitprune sparsify`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitprune import processes
from vitprune.cli import complete
from vitprune.cli.checks import enforce
from vitprune.cli.options import (
    Align,
    AsJson,
    Checkpoint,
    Columns,
    DataDir,
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
    Workers,
    data_options,
)
from vitprune.cli.output import print_json, talk, waiting
from vitprune.cli.plan import Measuring, parse_sparsity, resolve_sparsity
from vitprune.cli.progress import RunProgress
from vitprune.cli.settings import batch_settings, chosen_recipe
from vitprune.cli.summary import print_summary
from vitprune.cli.verbose import explain_environment, explain_model, explain_plan, explain_settings
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.data import Data, DataOptions, Pictures
    from vitprune.model import Sparsity
    from vitprune.training import Recipe
    from vitprune.zoo import Loaded

_TRAINING = "Training"
_LOSSES = "Loss weights"
_CHECKS = "Checks (exit code 3 if missed)"
_Steps = Annotated[
    int | None,
    typer.Option(min=0, help="Steps after the warm start.", rich_help_panel=_TRAINING, show_default="by recipe"),
]


def _weight(help_text: str) -> Any:
    return typer.Option(min=0, help=help_text, rich_help_panel=_LOSSES, show_default="by recipe")


def _setting(help_text: str, **limits: Any) -> Any:
    return typer.Option(help=help_text, rich_help_panel=_TRAINING, show_default="by recipe", **limits)


def _check(help_text: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel=_CHECKS)


def sparsify(
    context: typer.Context,
    model: Model,
    keep: Keep = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            autocompletion=complete.data,
            help="imagenet, imagenette, hf:owner/name, parquet or tar files, a folder (train/ and val/ "
            "with a folder per class, or class folders alone), or demo.",
            show_default="imagenet; demo for the model demo",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Run folder.", show_default="runs/<model>-keep<ratio>"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into an --output that exists.")] = False,
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
    target_batch_size: TargetBatchSize = None,
    recipe: RecipeName = "short",
    checkpoint: Checkpoint = None,
    data_dir: DataDir = None,
    img_size: ImgSize = None,
    limit: Limit = None,
    fraction: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="SHARE", help="Train on this share of the training pictures.")
    ] = None,
    splits: Splits = None,
    columns: Columns = None,
    streaming: Streaming = False,
    device: Device = "auto",
    precision: Precision = PrecisionName.AUTO,
    batch_size: Annotated[
        str | None,
        typer.Option(
            "--batch-size",
            "-b",
            metavar="N|auto",
            help="Pictures per step, of all processes together. auto: the recipe's number, in as many passes "
            "(--grad-accum) as memory asks for.",
            show_default="by recipe",
        ),
    ] = None,
    grad_accum: Annotated[
        int | None,
        _setting("Passes that share a step's pictures: less memory, the same result but for rounding.", min=1),
    ] = None,
    workers: Workers = None,
    seed: Seed = None,
    no_labels: Annotated[
        bool,
        typer.Option(
            "--no-labels", help="Distillation alone: any folder of pictures will do.", rich_help_panel=_TRAINING
        ),
    ] = False,
    warm_start_steps: Annotated[int | None, _setting("Steps of the warm start.", min=0)] = None,
    steps: _Steps = None,
    epochs: Annotated[float | None, _setting("The same as --steps, in passes over the pictures.", min=0)] = None,
    lr: Annotated[float | None, _setting("Peak learning rate of the predictors.")] = None,
    backbone_lr_scale: Annotated[float | None, _setting("The backbone's rate as a share of --lr.", min=0)] = None,
    freeze_epochs: Annotated[
        float | None, _setting("Passes after the warm start with the backbone frozen.", min=0)
    ] = None,
    max_unreadable: Annotated[
        float | None,
        _setting("Share of training pictures that may be unreadable; they are skipped, named, counted.", min=0, max=1),
    ] = None,
    ce_weight: Annotated[float | None, _weight("Cross-entropy with the labels.")] = None,
    ratio_weight: Annotated[float | None, _weight("Kept share against its target.")] = None,
    kl_weight: Annotated[float | None, _weight("KL divergence from the teacher's classes.")] = None,
    token_weight: Annotated[float | None, _weight("Kept tokens' features against the teacher's.")] = None,
    track: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Log the steps also to tensorboard, or another tracker that accelerate knows and that is installed.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="Steps between two training checkpoints.",
            rich_help_panel=_TRAINING,
            show_default="about every two minutes",
        ),
    ] = None,
    keep_checkpoints: Annotated[
        int, typer.Option(min=1, help="How many of them to keep, the last ones.", rich_help_panel=_TRAINING)
    ] = 2,
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

      vitprune sparsify deit_small --checkpoint my.safetensors --data path/to/my/pictures --no-labels
    """
    if resume and overwrite:
        raise UsageError("--resume goes on with a run, --overwrite replaces it", "give one of them")
    if resume and align == "auto":
        raise UsageError("--align auto may measure something else than the run to resume did", "give its --align N")
    settings = {
        **batch_settings(batch_size, grad_accum),
        "num_workers": workers,
        "warm_start_steps": warm_start_steps,
        "steps": steps,
        "epochs": epochs,
        "lr": lr,
        "backbone_lr_scale": backbone_lr_scale,
        "freeze_epochs": freeze_epochs,
        "max_unreadable": max_unreadable,
        "seed": seed,
        "precision": None if precision is PrecisionName.AUTO else precision.value,
        "labels": False if no_labels else None,
    }
    weights = {"ce": ce_weight, "ratio": ratio_weight, "kl": kl_weight, "token": token_weight}
    with waiting("loading PyTorch"):
        plan = chosen_recipe(model, recipe, settings, weights)
    sparsity = parse_sparsity(plan, keep, stages, schedule, ratios, dropped, target_gmacs, align)
    where = _device(device, plan)
    options = data_options(data_dir, splits, columns, streaming, limit, fraction)
    if track is not None:
        from vitprune.training import check_tracker

        check_tracker(track)
    measuring = Measuring(device, batch_size=target_batch_size)
    with waiting(f"loading {model}"):
        loaded, sparsity = _load(model, checkpoint, img_size, sparsity, target_gmacs, align, measuring)
    with waiting("opening the pictures"):
        folder, pictures = _open(loaded, data, options, plan, sparsity, output, overwrite, resume)

    from vitprune.cli.repeat import commands
    from vitprune.run import RunSettings, run

    of_data = {"data_dir": data_dir, "limit": limit, "splits": splits, "columns": columns, "streaming": streaming}
    talk(
        f"{loaded.name}, {sparsity.label}, on {where}: "
        f"{_counted(pictures.train)} to train on, {_counted(pictures.val)} to evaluate on"
    )
    if pictures.note:
        talk(pictures.note)
    _explain(loaded, sparsity, plan)
    settled = RunSettings(
        sparsity,
        where,
        folder,
        resume=resume,
        keep_checkpoints=keep_checkpoints,
        checkpoint_every=checkpoint_every,
        track=track,
        commands=commands(context.obj, pictures.name, str(where), of_data),
    )
    with RunProgress() as progress:
        _, report = run(loaded, pictures, plan, settled, progress)
    if as_json:
        print_json(report)
    else:
        print_summary(report, folder)
    top1, delta = report["sparse"]["top1_pct"], report["delta"]
    enforce(
        [
            ("--max-drop (as change of top-1)", delta["top1_points"], None if max_drop is None else -max_drop),
            ("--min-top1", top1, min_top1),
            ("--min-speedup", delta["speedup"][-1]["speedup"], min_speedup),
        ]
    )


def _explain(loaded: Loaded, sparsity: Sparsity, recipe: Recipe) -> None:
    """For --verbose."""
    from vitprune.backbones import wrap

    explain_model(loaded)
    explain_plan(sparsity.plan(wrap(loaded.model)), sparsity.dropped)
    explain_settings("recipe", recipe.model_dump(mode="json"))
    explain_environment()


def _device(device: str, recipe: Recipe) -> Any:
    from vitprune.measure import pick_device, pick_precision

    where = pick_device(device)
    processes.start(where)
    pick_precision(recipe.precision, where, training=True)
    return where


def _load(
    model: str,
    checkpoint: Path | None,
    img_size: tuple[int, int] | None,
    sparsity: Sparsity,
    target_gmacs: float | None,
    align: str | None,
    measuring: Measuring,
) -> tuple[Loaded, Sparsity]:
    """The dense model, and a plan that fits it."""
    from vitprune.zoo import load_model

    loaded = load_model(model, checkpoint=checkpoint, img_size=img_size)
    if loaded.sparse is not None:
        raise UsageError(
            f"'{model}' is sparse already", "start from the dense model: a timm name, with --checkpoint FILE if need be"
        )
    return loaded, resolve_sparsity(loaded.model, sparsity, target_gmacs, align, measuring)


def _open(
    loaded: Loaded,
    data: str | None,
    options: DataOptions,
    recipe: Recipe,
    sparsity: Sparsity,
    output: Path | None,
    overwrite: bool,
    resume: bool,
) -> tuple[Path, Data]:
    """The run folder, not made yet, and the pictures."""
    from vitprune.data import ModelClasses, open_data
    from vitprune.files import choose_run_folder

    name = f"{loaded.short_name}-{_slug(sparsity.label)}"
    # One process chooses: another may be so late that the folder is there already.
    chosen = choose_run_folder(output, name, overwrite=overwrite, resume=resume) if processes.is_main() else None
    folder: Path = processes.from_main(chosen)
    classes = ModelClasses(getattr(loaded.model, "num_classes", 0), loaded.class_names)
    spec = data or ("demo" if loaded.spec == "demo" else "imagenet")
    pictures = open_data(spec, classes, options, training=True, labels=recipe.labels)
    return folder, pictures


def _counted(pictures: Pictures | None) -> str:
    from vitprune.data import count_pictures

    count = count_pictures(pictures)
    return "a stream of pictures" if count is None else f"{count} pictures"


def _slug(label: str) -> str:
    return label.replace(" ", "").replace(",", "-")
