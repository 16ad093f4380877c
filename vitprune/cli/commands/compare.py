"""`vitprune compare`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitprune.cli import completion
from vitprune.cli.model_options import ModelOptions
from vitprune.cli.options import (
    AsJson,
    BatchSize,
    DataArgument,
    Device,
    ImageOptions,
    Model,
    Precision,
    RecipeName,
    Seed,
    Workers,
)
from vitprune.cli.output import number, print_json, print_line, print_table, say, signed, waiting
from vitprune.cli.plan_options import MacsOptions, open_as_asked, resolve_plan, say_middle
from vitprune.cli.progress import RunProgress
from vitprune.cli.promise_options import Adaptive, load_cascade
from vitprune.cli.tables import speedup_text
from vitprune.cli.training_options import Settings, parse_settings
from vitprune.common import distributed
from vitprune.common.files import check_new_file, write_json
from vitprune.common.json_version import SCHEMA_VERSION
from vitprune.errors import UsageError

_DEFAULT_METHODS = "random,norm,attention,attention-merge,tome,tome-late,paper,ours"

if TYPE_CHECKING:
    from vitprune.adaptive import AdaptiveViT
    from vitprune.tasks import Change, Figure


def compare(
    model: Model,
    plan: MacsOptions,
    weights: ModelOptions,
    images: ImageOptions,
    data: DataArgument = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            autocompletion=completion.words(*_DEFAULT_METHODS.split(","), "importance", "similarity"),
            help="'importance' and 'similarity' are ours without the other half. These two, 'paper' and, of a timm "
            "name, 'ours' are trained.",
        ),
    ] = _DEFAULT_METHODS,
    adaptive: Adaptive = None,
    recipe: RecipeName = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Of the paper's recipe.", show_default="as many as ours"),
    ] = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: BatchSize = 32,
    workers: Workers = None,
    seed: Seed = None,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Train without labels.")] = False,
    changes: Settings = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the result to FILE, as JSON.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --output that exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods at the same MACs: ours and others, on the same images, in one run.

    MODEL is a file that vitprune wrote (its dense model comes from the Hub, or from --checkpoint), or a timm name:
    then ours is trained here too.

    Examples:

      vitprune compare runs/deit_small_patch16_224-keep0.7/model.safetensors imagenet

      vitprune compare deit_small path/to/imagenet --keep 0.5 --methods tome,tome-late,ours

      vitprune compare runs/deit_small_patch16_224-keep0.5-0.9 imagenet --adaptive promise.json
    """
    distributed.refuse_several("compare")
    if output is not None:
        check_new_file(output, overwrite=overwrite)
    names = [name.strip() for name in methods.split(",") if name.strip()]

    with waiting("loading PyTorch"):
        from vitprune.common.devices import pick_device, pick_precision
        from vitprune.data import open_data
        from vitprune.jobs.compare import METHODS, TRAINED, CompareSettings, Subject
        from vitprune.jobs.compare import compare as run
        from vitprune.measure import describe_environment
        from vitprune.training.recipe import default_recipe, load_recipe

    given = {"seed": seed, "num_workers": workers, "labels": False if no_labels else None}
    settings = load_recipe(
        recipe or default_recipe(weights.task),
        **{key: value for key, value in given.items() if value is not None},
    )
    settings = settings.with_settings(parse_settings(changes))
    where = pick_device(device)
    number_format = pick_precision(precision, where, training=False)
    comparison = CompareSettings(names, where, number_format, batch_size, steps)
    request = plan.request()
    with waiting(f"loading {model}"):
        cascade: AdaptiveViT | None = None
        if adaptive is not None:
            keep = request.keep if isinstance(request.keep, float) else None
            loaded, cascade = load_cascade(adaptive, model, weights, keep)
        else:
            loaded = weights.load_apart(model)
        if loaded.sparse is None:
            subject = Subject(loaded.model, resolve_plan(request, loaded.model, settings)[0])
            say_middle(subject.sparsity)
        else:
            open_as_asked(loaded, request)
            trained = (loaded.metadata and loaded.metadata.training) or {}
            dense = cascade.models[-1].model if cascade is not None else weights.dense_of(loaded).model
            steps_done = trained.get("steps_done", 0)
            subject = Subject(dense, ours=loaded.sparse, steps=steps_done, adaptive=cascade)
        subject = replace(subject, task=loaded.task, class_vectors=loaded.class_vectors)
    trains = any(method in TRAINED and not (method == "ours" and subject.ours is not None) for method in names)
    spec = images.spec(data, loaded)
    if spec in METHODS:
        raise UsageError(f"'{spec}' is a method, not DATA", f"--methods takes them joined with commas: tome,{spec}")
    with waiting(f"opening {spec}"):
        opened = open_data(spec, loaded.targets, images.parsed(), training=trains, gallery=loaded.task == "embedding")
    for line in opened.understood:
        say(line)
    with RunProgress() as progress:
        result = run(subject, opened, settings, comparison, progress)
    result = {
        "model": loaded.name,
        "data": opened.name,
        "num_images": result["rows"][0]["num_images"],
        "num_unreadable": opened.faults.count,
        "left_out": opened.left_out or None,
        "remarks": opened.faults.remarks,
        **result,
        "precision": number_format,
        "device": str(where),
        "environment": describe_environment(),
    }
    if output is not None:
        write_json(output, {"schema_version": SCHEMA_VERSION} | result)
        say(f"written to {output}")
    if as_json:
        print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    from vitprune.tasks import task_named, zero_shot_task

    task = zero_shot_task() if "zero_shot_top1_pct" in result["rows"][0] else task_named(result["task"])
    measured = [figure for figure in task.accuracy[:1] if result["rows"][0][figure.key] is not None]
    change = task.change if measured else None
    against = [*task.fidelity[1:2]] if change and task.name == "classification" else [*task.fidelity]
    columns = [*(figure.short for figure in measured), *(["change", "95 %"] if change else [])]
    columns = ["", *columns, *(figure.short for figure in against), "GMACs", "img/s", "speed"]
    rows = [_cells(row, measured, change, against, len(columns)) for row in result["rows"]]
    print_table(f"{result['model']} at {result['budget_gmacs']:.3f} GMACs", columns, rows)
    for row in result["rows"]:
        trained = f"; {row['train_steps']} steps in {row['train_seconds'] / 60:.1f} min" if row["train_seconds"] else ""
        note = f" ({row['note']}{trained})" if row["note"] else ""
        print_line(f"{row['method']}: {row['what']}{note}")
    for figure in against:
        print_line(f"{figure.short}: {figure.text}")
    print_line(
        f"{result['num_images']} images, the same for all; {result['device']}, {result['precision']}; "
        f"batch {result['rows'][0]['batch_size']}"
    )


def _cells(
    row: dict[str, Any], measured: list[Figure], change: Change | None, against: list[Figure], width: int
) -> list[str]:
    if not row["available"]:
        return [row["method"], *["-"] * (width - 1)]
    is_dense, cells = row["method"] == "dense", [number(row[figure.key], figure.digits) for figure in measured]
    if change is not None:
        low, high = row[f"{change.key}_ci95"]
        between = f"{signed(low, change.digits)} to {signed(high, change.digits)}"
        cells += ["", ""] if is_dense else [signed(row[change.key], change.digits), between]
    cells += ["" if is_dense or row[each.key] is None else number(row[each.key], each.digits) for each in against]
    return [row["method"], *cells, number(row["gmacs"], 3), number(row["images_per_s"], 1), speedup_text(row)]
