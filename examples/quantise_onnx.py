"""INT8 on top of pruned tokens: quantise an exported ONNX file and see what that costs and brings.

    vitprune export runs/deit_tiny_patch16_224-keep0.7/model.safetensors --format onnx
    python examples/quantise_onnx.py runs/deit_tiny_patch16_224-keep0.7/model.onnx --data path/to/imagenet

onnxruntime's static quantisation (QDQ), calibrated on training images. Only the backbone's linear layers are computed
in 8 bits, weights with a scale per channel. The token predictors stay in fp32: they are three percent of the work and
say which tokens the rest sees. So do the products of attention and the patch embedding, which gain no time here, and
what multiplies no matrices (norms, softmax, GELU). --everything quantises all products, to see what that does.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from vitprune.backbones import input_size
from vitprune.checkpoint.onnx_program import OnnxProgram, read_onnx
from vitprune.data import DataOptions, ModelClasses, batches, eval_transform, make_loader, open_data
from vitprune.evaluation import predict
from vitprune.measure import benchmark
from vitprune.tasks import task_named

BATCH_SIZES = (1, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a fp32 file of vitprune export")
    parser.add_argument("--data", default="imagenet", help="images: train/ to calibrate, val/ to evaluate")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N images to evaluate on")
    parser.add_argument("--calibrate", type=int, default=128, metavar="N", help="images to calibrate on")
    parser.add_argument("--output", "-o", type=Path, help="default: MODEL-int8.onnx")
    parser.add_argument("--everything", action="store_true", help="quantise all products, the predictors' too")
    parser.add_argument("--reduce-range", action="store_true", help="7 bits, for CPUs without VNNI: they saturate")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each file is timed per batch size")
    args = parser.parse_args()
    if not args.model.is_file():
        parser.error(f"there is no file '{args.model}'; vitprune export MODEL --format onnx writes one")
    output = args.output or args.model.with_name(f"{args.model.stem}-int8.onnx")

    program = read_onnx(args.model)
    names = program.metadata.class_names
    classes = ModelClasses(program.num_classes, tuple(names) if names else None)
    limit = None if args.limit is None else max(args.limit, args.calibrate)
    data = open_data(args.data, classes, DataOptions(limit=limit), training=True)
    data.train.transform = data.val.transform = eval_transform(program)
    quantise(args.model, output, Calibration(data.train, args.calibrate), args.everything, args.reduce_range)

    programs = {"fp32": program, "int8": read_onnx(output)}
    val = data.val if args.limit is None else data.val.subset(range(min(args.limit, len(data.val))))
    for line in table(programs, val, args.seconds):
        print(line, flush=True)


class Calibration(CalibrationDataReader):
    """Training images, in batches of 16 under the name of the file's input."""

    def __init__(self, images: Any, count: int) -> None:
        some = images.subset(range(0, len(images), max(1, len(images) // count)))
        self.batches = batches(make_loader(some, 16))

    def get_next(self) -> dict[str, Any] | None:
        images, _ = next(self.batches, (None, None))
        return None if images is None else {"images": images.numpy()}


def quantise(model: Path, output: Path, calibration: Calibration, everything: bool, reduce_range: bool) -> None:
    """Write an INT8 file; the metadata in it stays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_static(
            model,
            output,
            calibration,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"] if everything else ["MatMul", "Gemm"],
            nodes_to_quantize=[node for node, linear in products(model) if everything or linear],
            # An average of the batches' ranges: one image with an outlier must not make all steps coarse.
            extra_options={
                "CalibMovingAverage": True,
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm", "Conv"],
            },
        )


def products(model: Path) -> Iterator[tuple[str, bool]]:
    """Names of the nodes that multiply, and whether each is a linear layer of the backbone."""
    graph = onnx.load(model).graph
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            yield node.name, node.op_type != "Conv" and node.input[1] in weights and "predictors." not in node.name


def table(programs: dict[str, OnnxProgram], images: Any, seconds: float) -> Iterator[str]:
    """A line for each file, fp32 first."""
    task, cpu = task_named("classification"), torch.device("cpu")
    found, _ = predict(programs, images, cpu, task=task, batch_size=32, reference="fp32")
    size = input_size(programs["fp32"])
    timings = benchmark(programs, size, BATCH_SIZES, device=torch.device("cpu"), precision="fp32", min_seconds=seconds)
    speed = {(timing.model, timing.batch_size): timing.images_per_s for timing in timings}
    columns = ["file", "top-1", "change, points", "same prediction", "KL from fp32", "MiB"]
    columns += [f"images/s, batch {size}" for size in BATCH_SIZES]
    yield "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)
    for name, predictions in found.items():
        top1, (change, interval) = predictions.top1_pct, predictions.change(found["fp32"]).values()
        cells = [
            name,
            "-" if top1 is None else f"{top1:.2f} %",
            "-" if interval is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(change, *interval),
            f"{predictions.agreement_pct(found['fp32']):.1f} %",
            "0" if predictions.mean_kl is None else f"{predictions.mean_kl:.4f}",
            f"{programs[name].path.stat().st_size / 2**20:.1f}",
            *(f"{speed[name, size]:.1f} ({speed[name, size] / speed['fp32', size]:.2f} x)" for size in BATCH_SIZES),
        ]
        yield "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
