"""`vitprune bench`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from vitprune import processes
from vitprune.cli.checks import enforce
from vitprune.cli.options import (
    AsJson,
    Device,
    Dropped,
    ImgSize,
    Precision,
    PrecisionName,
    Schedule,
    Stages,
    parse_numbers,
    parse_ratios,
)
from vitprune.cli.output import number, print_json, print_line, print_table
from vitprune.cli.plan import parse_sparsity, refuse_plan
from vitprune.cli.progress import RunProgress

if TYPE_CHECKING:
    from torch import nn

    from vitprune.measure import Timing

_DEFAULT_MODEL = "deit_small_patch16_224"
_DEFAULT_KEEPS = "0.9,0.8,0.7"
_DENSE = "dense"


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="timm names (compared dense and at --keep) or files that vitprune wrote (compared with their dense "
            "backbone).",
            show_default="DeiT-S at keep 1.0, .9, .8, .7",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="RATIOS", help="Keep ratios for timm names.", show_default=f"0.7; {_DEFAULT_KEEPS} without MODEL"
        ),
    ] = None,
    stages: Stages = None,
    schedule: Schedule = None,
    dropped: Dropped = None,
    img_size: ImgSize = None,
    device: Device = "auto",
    precision: Precision = PrecisionName.AUTO,
    batch_size: Annotated[
        str | None,
        typer.Option("--batch-size", "-b", metavar="SIZES", help="Pictures per pass.", show_default="1,32; CUDA: +256"),
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="Exit with 3 if a sparse row is less than this times as fast as dense.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Throughput and latency, dense and sparse in turns in one run, MACs beside what the clock says.

    Weights do not matter for speed: timm names are measured with random ones, so nothing is downloaded.

    Examples:

      vitprune bench

      vitprune bench deit_base --keep 0.7 --batch-size 1,32,256 --device cuda

      vitprune bench runs/deit_small_patch16_224-keep0.7/model.safetensors
    """
    processes.refuse_several("bench")
    sizes = parse_numbers(batch_size, "--batch-size")

    from vitprune.measure import describe_environment, pick_device, pick_precision
    from vitprune.model import attach_as
    from vitprune.training import load_recipe
    from vitprune.zoo import load_model, sparse_file

    plans = [
        parse_sparsity(load_recipe(), each, stages, schedule, None, dropped, None)
        for each in parse_ratios(keep or ("0.7" if models else _DEFAULT_KEEPS), "--keep") or []
    ]
    plans = [plan for plan in plans if plan.keep < 1]
    where = pick_device(device)
    number_format = pick_precision(precision.value, where, training=False)
    sizes = sizes or ([1, 32, 256] if where.type == "cuda" else [1, 32])
    rows: list[dict[str, Any]] = []
    for spec in models or []:
        if sparse_file(spec):
            refuse_plan(spec, keep, stages, schedule, dropped)
    loaded = [load_model(spec, weights="random", img_size=img_size) for spec in models or [_DEFAULT_MODEL]]
    with RunProgress() as progress:
        for each in loaded:
            if each.sparse is not None and each.metadata is not None:
                sparse = {each.metadata.label: _Variant(each.metadata.keep, each.sparse)}
            else:
                sparse = {plan.label: _Variant(plan.keep, attach_as(each.model, plan)) for plan in plans}
            variants = {_DENSE: _Variant(1.0, each.model)} | sparse
            progress.begin(f"timing {each.name}", len(sizes) * len(variants))
            rows += _measure(each.name, variants, sizes, where, number_format, progress)
    environment = describe_environment()
    if as_json:
        print_json({"rows": rows, "device": str(where), "precision": number_format, "environment": environment})
    else:
        _print(rows, f"{where}, {number_format}, {environment['num_threads']} threads, torch {environment['torch']}")
    speedups = [row["speedup"] for row in rows if row["keep"] != 1]
    enforce([("--min-speedup", min(speedups, default=1.0), min_speedup)])


class _Variant(NamedTuple):
    keep: float | None
    model: nn.Module


def _measure(
    name: str, variants: dict[str, _Variant], sizes: list[int], device: Any, precision: Any, progress: RunProgress
) -> list[dict[str, Any]]:
    from vitprune.backbones import input_size
    from vitprune.measure import benchmark, count_macs, speedup

    size = input_size(variants[_DENSE].model)
    macs = {label: count_macs(variant.model, size) for label, variant in variants.items()}
    timings: list[Timing] = benchmark(
        {label: variant.model for label, variant in variants.items()},
        size,
        sizes,
        device=device,
        precision=precision,
        on_row=lambda _: progress.advance(1),
    )
    rows = []
    for timing, against in zip(timings, speedup(timings, _DENSE), strict=True):
        label = timing.model
        rows.append(
            asdict(timing)
            | {
                "model": name,
                "label": label,
                "keep": variants[label].keep,
                "gmacs": macs[label] / 1e9,
                "macs_ratio": macs[_DENSE] / macs[label],
                "speedup": against.ratio,
                "slower": against.slower,
            }
        )
    return rows


def _print(rows: list[dict[str, Any]], where: str) -> None:
    columns = ["", "batch", "images/s", "ms a batch", "GMACs", "fewer MACs", "measured"]
    for model in dict.fromkeys(row["model"] for row in rows):
        print_table(model, columns, [_cells(row) for row in rows if row["model"] == model])
    print_line(f"{where}; timed in turns; median ± half the interquartile range; MACs with attention")


def _cells(row: dict[str, Any]) -> list[str]:
    half_spread = (row["latency_ms_p75"] - row["latency_ms_p25"]) / 2
    return [
        row["label"],
        str(row["batch_size"]),
        number(row["images_per_s"], 1),
        f"{row['latency_ms_p50']:.2f} ±{half_spread:.2f}",
        number(row["gmacs"], 3),
        f"{row['macs_ratio']:.2f} x",
        f"{row['speedup']:.2f} x" + (" SLOWER" if row["slower"] else ""),
    ]
