"""What a pruned model gains in each engine that is installed here, beside the dense one in the same engine.

    python examples/engines.py
    python examples/engines.py deit_small_patch16_224 --keep 0.5 --batch-size 1,8,32 --seconds 20

Each engine gets the dense model, and sparse ones that merge and that drop pruned tokens. The table says whether it
opens them, how far their outputs are from PyTorch's, their size, and images per second with the quotient to the dense
model, all timed interleaved on one thread per core. Weights are random (of the demo model: trained). Engines:
PyTorch, ONNX Runtime, OpenVINO, ExecuTorch and LiteRT (one image at a time); with --compile, which takes minutes,
torch.compile and AOTInductor. Of one that is missing it says so.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import vitprune
from vitprune.backbones import input_size
from vitprune.common.formatting import first_line
from vitprune.errors import VitpruneError
from vitprune.export.formats import FORMATS, Format
from vitprune.loading.load import load_model
from vitprune.measure import benchmark, speedups

Opener = Callable[[nn.Module, Path], tuple[nn.Module, float | None]]


def exported(kind: Format) -> Opener:
    """Opens what is exported in a format."""
    its = FORMATS[kind]

    def opener(model: nn.Module, folder: Path) -> tuple[nn.Module, float | None]:
        done = vitprune.export_model(model, folder / f"m{its.ending}", overwrite=True)
        return its.read(done.output), done.size_mib

    return opener


ENGINES: dict[str, Opener] = {
    "PyTorch": lambda model, _: (model, None),
    "ONNX Runtime": exported("onnx"),
    "OpenVINO": exported("openvino"),
    "ExecuTorch": exported("executorch"),
    "LiteRT": exported("litert"),
}
COMPILED: dict[str, Opener] = {
    "torch.compile": lambda model, _: (torch.compile(model, fullgraph=True, dynamic=True), None),
    "AOTInductor": exported("aoti"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="a timm name")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--batch-size", default="1,8")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each row is timed")
    parser.add_argument("--compile", action="store_true", help="torch.compile and AOTInductor too")
    args = parser.parse_args()
    torch.manual_seed(0)
    dense = load_model(args.model, weights="random").model.eval()
    models = {"dense": dense} | {
        name: vitprune.attach(dense, args.keep, pruned=name).eval() for name in ("merge", "drop")
    }
    sizes = [int(size) for size in args.batch_size.split(",")]
    columns = [f"images/s, batch {size}" for size in sizes]
    print("| engine | model | difference | MiB | " + " | ".join(columns) + " |\n|" + "---|" * (4 + len(columns)))
    engines = ENGINES | (COMPILED if args.compile else {})
    for engine, opener in engines.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                opened = {name: opener(model, Path(folder)) for name, model in models.items()}
            except VitpruneError as error:
                print(f"| {engine} | - | {first_line(error)} |" + " |" * (1 + len(columns)), flush=True)
                continue
        for line in table(engine, models, opened, sizes, args.seconds):
            print(line, flush=True)


@torch.inference_mode()
def table(
    engine: str,
    models: dict[str, nn.Module],
    opened: dict[str, tuple[nn.Module, float | None]],
    sizes: list[int],
    seconds: float,
) -> list[str]:
    """A line for each model in one engine."""
    size, generator = input_size(models["dense"]), torch.Generator().manual_seed(0)
    off = {}
    for name, (program, _) in opened.items():
        batches = [torch.randn(count, *size, generator=generator) for count in sizes]
        off[name] = max((program(images) - models[name](images)).abs().max().item() for images in batches)
    programs = {name: program for name, (program, _) in opened.items()}
    device = torch.device("cpu")
    timings = benchmark(programs, size, sizes, device=device, precision="fp32", min_seconds=seconds)
    rates = {(row.model, row.batch_size): row.images_per_s for row in timings}
    gains = {(name, row["batch_size"]): row["speedup"] for name in programs for row in speedups(name, timings)}
    lines = []
    for name, (_, mib) in opened.items():
        cells = [engine, name, f"{off[name]:.0e}", "" if mib is None else f"{mib:.1f}"]
        for batch in sizes:
            gain = "" if name == "dense" else f" ({gains[name, batch]:.2f} x)"
            cells.append(f"{rates[name, batch]:,.1f}{gain}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
