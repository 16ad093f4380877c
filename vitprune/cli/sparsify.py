"""`vitprune sparsify`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitprune.cli.checks import enforce
from vitprune.cli.options import (
    AsJson,
    Checkpoint,
    DataDir,
    Device,
    ImgSize,
    Keep,
    Limit,
    Model,
    Precision,
    PrecisionName,
    Seed,
    Stages,
    Workers,
    parse_numbers,
)
from vitprune.cli.output import number, print_json, print_line, print_table, signed, talk
from vitprune.cli.progress import RunProgress
from vitprune.errors import UsageError
from vitprune.schedule import check_keep, make_schedule

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
    model: Model,
    keep: Keep = 0.7,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="imagenet, imagenette, hf:owner/name, a folder (train/ and val/ with a folder per class, or class "
            "folders alone), or demo.",
            show_default="imagenet; demo for the model demo",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Run folder.", show_default="runs/<model>-keep<ratio>"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into an --output that exists.")] = False,
    stages: Stages = None,
    checkpoint: Checkpoint = None,
    data_dir: DataDir = None,
    img_size: ImgSize = None,
    limit: Limit = None,
    device: Device = "auto",
    precision: Precision = PrecisionName.AUTO,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", min=1, help="Pictures per step.", show_default="by recipe"),
    ] = None,
    workers: Workers = None,
    seed: Seed = 0,
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
    ce_weight: Annotated[float | None, _weight("Cross-entropy with the labels.")] = None,
    ratio_weight: Annotated[float | None, _weight("Kept share against its target.")] = None,
    kl_weight: Annotated[float | None, _weight("KL divergence from the teacher's classes.")] = None,
    token_weight: Annotated[float | None, _weight("Kept tokens' features against the teacher's.")] = None,
    max_drop: Annotated[float | None, _check("Largest loss of top-1 against dense, in points.")] = None,
    min_top1: Annotated[float | None, _check("Lowest top-1, in percent.")] = None,
    min_speedup: Annotated[float | None, _check("Lowest speed-up at the largest batch size measured.")] = None,
    as_json: AsJson = False,
) -> None:
    """Attach token predictors to a model, train them for minutes, and report what that cost and gained.

    Writes model.safetensors, report.json and log.jsonl into the run folder.

    Examples:

      vitprune sparsify demo

      vitprune sparsify deit_small --keep 0.7 --data path/to/imagenet

      vitprune sparsify deit_small --checkpoint my.safetensors --data path/to/my/pictures --no-labels
    """
    given = {
        "batch_size": batch_size,
        "num_workers": workers,
        "warm_start_steps": warm_start_steps,
        "steps": steps,
        "epochs": epochs,
        "lr": lr,
        "backbone_lr_scale": backbone_lr_scale,
        "freeze_epochs": freeze_epochs,
    }
    weights = {"ce": ce_weight, "ratio": ratio_weight, "kl": kl_weight, "token": token_weight}
    recipe = _recipe(
        model,
        {name: value for name, value in given.items() if value is not None},
        {name: value for name, value in weights.items() if value is not None},
        labels=not no_labels,
        precision=precision.value,
        seed=seed,
    )
    loaded, pictures, settings = _prepare(
        model, keep, data, output, overwrite, stages, checkpoint, data_dir, img_size, limit, device, recipe
    )

    from vitprune.run import run

    talk(
        f"{loaded.name}, keep {keep:g}, on {settings.device}: "
        f"{len(pictures.train or ())} pictures to train on, {len(pictures.val)} to evaluate on"
    )
    if pictures.note:
        talk(pictures.note)
    with RunProgress() as progress:
        _, report = run(loaded, pictures, recipe, settings, progress)
    if as_json:
        print_json(report)
    else:
        _print_summary(report, settings.output)
    top1, delta = report["sparse"]["top1_pct"], report["delta"]
    enforce(
        [
            ("--max-drop (as change of top-1)", delta["top1_points"], None if max_drop is None else -max_drop),
            ("--min-top1", top1, min_top1),
            ("--min-speedup", delta["speedup"][-1]["speedup"], min_speedup),
        ]
    )


def _recipe(model: str, given: dict[str, Any], weights: dict[str, Any], **others: Any) -> Any:
    from pydantic import ValidationError

    from vitprune.training.recipe import DEMO, LossWeights, Recipe

    base = DEMO if model == "demo" else {}
    if "epochs" in given:
        base = {name: value for name, value in base.items() if name != "steps"}
    try:
        return Recipe(**{**base, **given}, **others, weights=LossWeights(**weights))
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + "-".join(map(str, first["loc"])).replace("_", "-") if first["loc"] else "the settings"
        raise UsageError(f"{name}: {first['msg']}") from error


def _prepare(
    model: str,
    keep: float,
    data: str | None,
    output: Path | None,
    overwrite: bool,
    stages: str | None,
    checkpoint: Path | None,
    data_dir: Path | None,
    img_size: int | None,
    limit: int | None,
    device: str,
    recipe: Any,
) -> tuple[Any, Any, Any]:
    """Everything that can be wrong with the input is found here, cheapest first, before anything is written."""
    blocks = parse_numbers(stages, "--stages")
    check_keep(keep)

    from vitprune.backbones import wrap
    from vitprune.data import ModelClasses, open_data
    from vitprune.files import choose_run_folder
    from vitprune.measure import pick_device, pick_precision
    from vitprune.run import RunSettings
    from vitprune.zoo import load_model

    where = pick_device(device)
    pick_precision(recipe.precision, where, training=True)
    spec = data or ("demo" if model == "demo" else "imagenet")
    loaded = load_model(model, checkpoint=checkpoint, img_size=img_size)
    if loaded.sparse is not None:
        raise UsageError(
            f"'{model}' is sparse already", "start from the dense model: a timm name, with --checkpoint FILE if need be"
        )
    backbone = wrap(loaded.model)
    make_schedule(backbone.depth, backbone.num_patches, keep, blocks)
    folder = choose_run_folder(output, f"{loaded.short_name}-keep{keep:g}", overwrite=overwrite)
    classes = ModelClasses(getattr(loaded.model, "num_classes", 0), loaded.class_names)
    pictures = open_data(spec, classes, data_dir=data_dir, training=True, labels=recipe.labels)
    if limit is not None:
        pictures.train = pictures.train and pictures.train.sample(limit)
        pictures.val = pictures.val.sample(limit)
    return loaded, pictures, RunSettings(keep, blocks, where, folder)


def _print_summary(report: dict[str, Any], folder: Path) -> None:
    dense, sparse, delta = report["dense"], report["sparse"], report["delta"]
    rows = [
        ["top-1 (%)", number(dense["top1_pct"]), number(sparse["top1_pct"]), signed(delta["top1_points"])],
        ["top-5 (%)", number(dense["top5_pct"]), number(sparse["top5_pct"]), ""],
        ["GMACs", number(dense["gmacs"], 3), number(sparse["gmacs"], 3), f"{delta['gmacs_pct']:+.1f} %"],
        ["parameters (M)", number(dense["params_m"], 3), number(sparse["params_m"], 3), ""],
    ]
    for before, after, change in zip(dense["speed"], sparse["speed"], delta["speedup"], strict=True):
        mark = " SLOWER" if change["slower"] else ""
        rows.append(
            [
                f"images/s at batch {before['batch_size']}",
                number(before["images_per_s"], 1),
                number(after["images_per_s"], 1),
                f"{change['speedup']:.2f} x{mark}",
            ]
        )
    print_table(f"{report['model']}, keep {report['keep']:g}", ["", "dense", "sparse", "change"], rows)
    images = f"{sparse['num_images']} pictures"
    if delta["top1_points"] is not None:
        low, high = delta["top1_points_ci95"]
        print_line(
            f"top-1 change {delta['top1_points']:+.2f} points on the same {images} (95 %: {low:+.2f} to {high:+.2f}); "
            f"random tokens {report['random']['top1_pct']:.2f} %, ours {delta['top1_points_over_random']:+.2f}"
        )
    print_line(f"same answer as dense on {delta['agreement_pct']:.1f} % of {images}")
    if report["coverage"]:
        shares = report["coverage"]
        print_line(
            f"kept tokens cover {shares['sparse_pct']:.1f} % of the object, random ones {shares['random_pct']:.1f} %"
        )
    skipped = report["training"]["num_skipped"]
    if skipped:
        print_line(f"{skipped} training steps were skipped: loss or gradient not finite")
    print_line(f"in {report['wall_s']:.0f} s, written to {folder}")
