"""`vitprune eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitprune.cli.limits import MinFidelity, check_goes_with, check_measured, fidelity_check
from vitprune.cli.model_options import ModelOptions
from vitprune.cli.options import AsJson, BatchSize, DataArgument, Device, ImageOptions, Model, Precision, Workers
from vitprune.cli.output import Check, enforce, number, print_json, print_line, print_table, say, signed, waiting
from vitprune.cli.plan_options import FileKeep
from vitprune.cli.progress import RunProgress
from vitprune.cli.promise_options import PromiseOptions, check_sparse, print_promise, refuse_beside
from vitprune.common import distributed
from vitprune.errors import DataError, UsageError

if TYPE_CHECKING:
    from vitprune.data import Data, DataOptions
    from vitprune.loading.load import Loaded
    from vitprune.tasks import Task


def evaluate(
    model: Model,
    weights: ModelOptions,
    images: ImageOptions,
    promised: PromiseOptions,
    data: DataArgument = None,
    keep: FileKeep = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = None,
    min_top1: Annotated[float | None, typer.Option(min=1, metavar="PERCENT", help="Exit with 3 below it.")] = None,
    min_fidelity: MinFidelity = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read, and say how many.")
    ] = False,
    per_class: Annotated[bool, typer.Option("--per-class", help="Show the accuracy of every class.")] = False,
    as_json: AsJson = False,
) -> None:
    """How good a sparse file or a dense timm model is, with timm's preprocessing for it.

    Of a classifier top-1 and top-5; of other models what --task says.

    Of a sparse file, --checkpoint names the weights of the dense model that it was made from: both are evaluated and
    compared. Images without labels are enough for that. MODEL may also be a file that vitprune export wrote
    (.onnx, .xml, .pte, .tflite), or its folder of --adaptive, which run on the CPU.

    --fidelity 99 promises the dense model's answer on 99 % of such images: those that the sparse model is not sure of
    go on, from the blocks that both share, through the dense one.

    Examples:

      vitprune eval runs/deit_small_patch16_224-keep0.7/model.safetensors imagenet

      vitprune eval deit_small path/to/imagenet --checkpoint my.safetensors

      vitprune eval model.onnx path/to/imagenet

      vitprune eval runs/deit_small_patch16_224-keep0.5 path/to/images --fidelity 99 -o promise.json -o promise.html
    """
    with waiting("loading PyTorch"):
        from vitprune.adaptive import AdaptiveProgram
        from vitprune.common.devices import pick_device, pick_precision
        from vitprune.data import count_images, eval_transform
        from vitprune.evaluation import predict
        from vitprune.jobs.label_check import WHAT_TO_CHECK, doubt
        from vitprune.jobs.side_by_side import gallery_of, has_accuracy
        from vitprune.loading.load import device_for, is_exported, sparse_file
        from vitprune.tasks import class_accuracy, task_named
        from vitprune.training.recipe import Recipe

    asked = promised.asked(keep)
    where = pick_device(device_for(model, device, precision))
    distributed.start(where)
    number_format = pick_precision(precision, where, training=False)
    with waiting(f"loading {model}"):
        of_dense = weights.checkpoint is not None and (is_exported(model) or sparse_file(model) is not None)
        of_model = {"checkpoint": None, "checkpoint_key": None} if of_dense else {}
        loaded = weights.load(model, exported=True, **of_model)
        loaded.open_at(keep)
        if asked is not None:
            beside = {"--min-top1": min_top1, "--min-fidelity": min_fidelity, "--per-class": per_class}
            refuse_beside("a promise, which measures fidelity and cost", beside)
            check_sparse(loaded, "--fidelity")
    task = task_named(loaded.task, loaded.class_vectors)
    check_goes_with(task, min_top1=min_top1, min_fidelity=min_fidelity)
    if per_class and task.decides != "class":
        raise UsageError(f"--per-class is of classifiers, and the task is {task.name}", "leave out --per-class")
    holds_dense = loaded.sparse is not None and loaded.sparse.blend is not None
    of_dense = of_dense or (min_fidelity is not None and holds_dense)
    if min_fidelity is not None and not of_dense:
        raise UsageError("--min-fidelity compares with the dense model", "name its weights too: --checkpoint FILE")
    subject = loaded.sparse or loaded.model
    adaptive = subject if isinstance(subject, AdaptiveProgram) else None
    if adaptive is not None:
        adaptive.ended = []
    spec = images.spec(data, loaded)
    with waiting(f"opening {spec}"):
        opened = _open(spec, images.parsed(), loaded, task, alone=loaded.sparse is None and not of_dense)
        compares = of_dense or asked is not None or not has_accuracy(task, opened)
        check_measured(task, opened, min_top1=min_top1)
        models = {"dense": weights.dense_of(loaded).model} if compares else {}
    val, gallery, transform = opened.val, gallery_of(opened, task), eval_transform(loaded.model)
    for each in (val, gallery):
        if each is not None:
            each.transform = transform
    for line in opened.understood:
        say(line)
    workers = Recipe(num_workers=workers).workers()
    if asked is not None:
        how = promised.how(where, number_format, batch_size, workers, skip_unreadable=skip_unreadable)
        print_promise(loaded, models["dense"], opened, task, asked, how, promised.output or (), as_json=as_json)
        return
    with RunProgress() as progress:
        progress.begin(f"evaluating {loaded.name}", count_images(val))
        found, faults = predict(
            models | {"model": subject},
            val,
            where,
            number_format,
            task=task,
            gallery=gallery,
            batch_size=batch_size,
            num_workers=workers,
            reference="dense" if models else None,
            allowed_share=1.0 if skip_unreadable else 0.0,
            listener=progress,
        )
    results = found["model"]
    names = val.class_names | dict(enumerate(loaded.class_names or ()))
    result = {
        "model": loaded.name,
        "task": task.name,
        "keep": loaded.keep,
        "data": opened.name,
        **results.summary(),
        "num_unreadable": faults.count,
        "unreadable": faults.names,
        "how_classes": opened.how_classes or None,
        "left_out": opened.left_out or None,
        "remarks": faults.remarks,
        "note": opened.note,
        "precision": getattr(subject, "precision", number_format),
        "device": str(where),
        "classes": class_accuracy(names, top1_pct=results),
    }
    if adaptive is not None:
        result |= adaptive.account()
    if models:
        result |= {
            "dense": found["dense"].summary(),
            "delta": results.change(found["dense"]) | results.fidelity(found["dense"]),
        }
    suspicion = doubt(found.get("dense", results), getattr(loaded.model, "num_classes", 0))
    if suspicion:
        say(f"warning: {suspicion}; {WHAT_TO_CHECK}", always=True)
    result["doubt"] = suspicion
    if as_json:
        print_json(result)
    else:
        label = getattr(subject, "label", loaded.metadata.label if loaded.metadata else "dense")
        _print(result, label, per_class)
    enforce(
        [Check("--min-top1", result.get("top1_pct"), min_top1), fidelity_check(task, result.get("delta"), min_fidelity)]
    )


def _open(spec: str, options: DataOptions, loaded: Loaded, task: Task, *, alone: bool) -> Data:
    """The images; a model that is not `alone` can be compared with its dense one where they have no labels.

    Raises:
        DataError: there is nothing to measure it by.
    """
    from vitprune.data import Unlabelled, open_data
    from vitprune.jobs.side_by_side import has_accuracy

    try:
        opened = open_data(spec, loaded.targets, options, gallery=loaded.task == "embedding")
    except Unlabelled as error:
        if alone:
            raise DataError(
                f"{error.message}, and accuracy needs labels",
                "put them into one folder per class; `vitprune predict` shows predictions",
            ) from error
        opened = open_data(spec, None, options)
    if not has_accuracy(task, opened):
        if alone:
            what, way = "a dense model", "a sparse one is compared with its dense one"
            if loaded.metadata is not None:  # an exported file, which does not say where its dense model is
                what, way = f"'{loaded.spec}' alone", "name the dense model's weights: --checkpoint FILE"
            raise DataError(f"there is nothing to measure {what} by: {task.no_accuracy}", way)
        say(f"{task.no_accuracy}: what the model gives is compared with what the dense model gives")
    return opened


def _print(result: dict[str, Any], label: str, per_class: bool) -> None:
    if per_class:
        rows = [
            [row["name"] or str(row["index"]), str(row["num_images"]), number(row["top1_pct"])]
            for row in result["classes"]
        ]
        print_table("by class", ["class", "images", "top-1 (%)"], rows)
    about, delta = f"{result['model']}, {label}:", result.get("delta")
    images, task = f"{result['num_images']} images", _task_of(result)
    measured = [each for each in task.accuracy if result.get(each.key) is not None]
    if measured:
        said = ", ".join(each.said(number(result[each.key], each.digits)) for each in measured)
        print_line(f"{about} {said} on {images}")
    if delta is not None:
        parts = [each.said(number(delta[each.key], each.digits)) for each in task.fidelity]
        if (change := task.change) is not None and delta.get(change.key) is not None:
            parts.insert(0, f"{change.text} {signed(delta[change.key], change.digits)} {change.unit}".strip())
        print_line(f"{about} against dense, on {images}: {', '.join(parts)}")
    if "went_on_pct" in result:
        print_line(
            f"{result['went_on_pct']:.1f} % of the images went on; GMACs {result['gmacs_mean']:.3f} on average and "
            f"{result['gmacs_worst']:.3f} at worst"
        )
    for remark in result["remarks"]:
        print_line(remark)
    if result["num_unreadable"]:
        print_line(
            f"{result['num_unreadable']} unreadable image(s) were left out: {', '.join(result['unreadable'][:3])}"
        )


def _task_of(result: dict[str, Any]) -> Task:
    from vitprune.tasks import task_named, zero_shot_task

    return zero_shot_task() if "zero_shot_top1_pct" in result else task_named(result["task"])
