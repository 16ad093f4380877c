"""`vitprune bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitprune.cli import completion
from vitprune.cli.commands.bench_models import BenchRequest, benchmarks
from vitprune.cli.model_options import StructureOptions
from vitprune.cli.options import AsJson, Device, Precision, option, parse_numbers, parse_ratios
from vitprune.cli.output import Check, enforce, print_json, print_line
from vitprune.cli.plan_options import SpeedOptions
from vitprune.cli.progress import RunProgress
from vitprune.cli.tables import print_bench
from vitprune.common import distributed

if TYPE_CHECKING:
    import torch

_DEFAULT_MODEL = "deit_small_patch16_224"
_DEFAULT_KEEPS = (0.9, 0.8, 0.7)
_CPU_SIZES, _CUDA_SIZES = [1, 8, 32], [1, 8, 32, 128, 256]


def bench(
    plan: SpeedOptions,
    structure: StructureOptions,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            autocompletion=completion.model,
            help="timm names (timed dense and at each --keep), sparse files (beside their dense backbone), "
            "exported files (beside the first of the others, or a dense one among them).",
            show_default="DeiT-S at keep 1.0, .9, .8, .7",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        option(
            "Keep ratios for timm names, and files of a range.",
            metavar="RATIOS",
            shown="0.7; 0.9,0.8,0.7 without MODEL",
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: Annotated[
        str | None, option("Images per pass.", "--batch-size", "-b", metavar="SIZES", shown="1,8,32; CUDA: +128,256")
    ] = None,
    mode: Annotated[
        str,
        option(
            "How to run: eager, compile (torch.compile), cudagraphs, or several: eager,compile.",
            metavar="MODES",
            autocompletion=completion.words("eager", "compile", "cudagraphs"),
        ),
    ] = "eager",
    bound: Annotated[
        bool, option("Show the zero-overhead bound: the same token counts, chosen for free.", "--bound/--no-bound")
    ] = True,
    seconds: Annotated[
        float, option("How long each row is timed; a single pass may take longer.", min=0, metavar="S")
    ] = 2.0,
    min_speedup: Annotated[
        float | None, option("Exit with 3 if a sparse row is slower than X times dense.", metavar="X")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Throughput and latency, dense and sparse interleaved in one run, MACs beside measured time.

    Weights do not matter for speed: timm names are measured with random ones, so nothing is downloaded. The
    zero-overhead bound of a row is its backbone with the same token counts, chosen for free: no choice is faster.

    Examples:

      vitprune bench

      vitprune bench deit_base --keep 0.7 --batch-size 1,32,256 --device cuda --mode eager,compile,cudagraphs

      vitprune bench deit_small --target-speedup 1.5 --batch-size 8

      vitprune bench runs/deit_small_patch16_224-keep0.7/model.safetensors

      vitprune bench dense.onnx model.onnx model-int8.onnx
    """
    distributed.refuse_several("bench")
    sizes = parse_numbers(batch_size, "--batch-size")

    from vitprune.common.devices import pick_device, pick_precision
    from vitprune.loading.load import device_for
    from vitprune.measure import check_mode, describe_environment, side_by_side
    from vitprune.training.recipe import load_recipe

    for spec in models or []:
        device = device_for(spec, device, precision)
    where = pick_device(device)
    modes = [check_mode(name.strip(), where) for name in dict.fromkeys(mode.split(","))]
    number_format = pick_precision(precision, where, training=False)
    sizes = sizes or (_CUDA_SIZES if where.type == "cuda" else _CPU_SIZES)
    keeps: Sequence[float | None] = parse_ratios(keep, "--keep") or [None]
    if not models and keep is None and plan.target_speedup is None and plan.target_latency_ms is None:
        keeps = _DEFAULT_KEEPS
    asked: dict[str, Any] = {"device": device}
    if plan.target_speedup is not None or plan.target_latency_ms is not None:
        asked |= {"target_batch_size": max(sizes), "target_precision": precision}
    plans = [plan.request(keep=each, dense_too=True, **asked) for each in keeps]
    request = BenchRequest(plans, load_recipe(), structure, bound, sizes)
    chosen = benchmarks(models or [_DEFAULT_MODEL], request, modes)
    rows: list[dict[str, Any]] = []
    with RunProgress() as progress:
        for each in chosen:
            progress.begin(f"timing {each.name}", len(modes) * len(sizes) * len(each.models))
            rows += side_by_side(
                each.name,
                each.models,
                each.input_size,
                sizes,
                modes,
                device=where,
                precision=number_format,
                min_seconds=seconds,
                baseline=each.baseline,
                listener=progress,
            )
    usable = [row for row in rows if row["kind"] != "bound"]
    environment = describe_environment()
    if as_json:
        bounds = [row for row in rows if row["kind"] == "bound"]  # apart, or somebody takes one for a model
        about = {"device": str(where), "precision": number_format}
        print_json({"rows": usable, "bounds": bounds, **about, "environment": environment})
    else:
        device_name = _device_name(where, environment)
        print_bench(rows, f"{device_name}, {number_format}, {environment['num_threads']} CPU threads")
        for each in chosen:
            if each.note:
                print_line(each.note)
    speedups = [row["speedup"] for row in usable if row["kind"] == "sparse"]
    enforce([Check("--min-speedup", min(speedups, default=1.0), min_speedup)])


def _device_name(device: torch.device, environment: dict[str, Any]) -> str:
    if device.type == "cuda":
        return f"{environment['gpus'][device.index or 0]['name']} ({device})"
    return f"{environment['cpu']} ({device})" if device.type == "cpu" else str(device)
