"""What a pruned model gains in each engine that is installed here, beside the dense one in the same engine.

    python examples/engines.py
    python examples/engines.py deit_small_patch16_224 --keep 0.5 --batch-size 1,8,32 --seconds 20

Each engine gets the dense model, and sparse ones that merge and that drop pruned tokens. The table says whether it
loads them, how far their outputs are from PyTorch's, their size, and images per second with the quotient to the dense
model, all timed interleaved on one thread per core. Weights are random (of the demo model: trained). Engines:
PyTorch, its exported program, ONNX Runtime, OpenVINO, ExecuTorch, LiteRT and, on macOS, Core ML (the last three one
image at a time, whatever the batch); with --compile, which takes minutes, torch.compile and AOTInductor. Of one that
is missing or fails it says so.
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
from vitprune.checkpoint.program import FixedBatch
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
        done = vitprune.export_model(model, folder / f"m{its.ending}", precision="fp32", overwrite=True)
        if not its.runs_here():
            raise VitpruneError(f"converted ({done.size_mib:.1f} MiB), and runs on macOS only")
        program = its.read(done.output)
        return FixedBatch(program, done.batch) if done.batch else program, done.size_mib

    return opener


ENGINES: dict[str, Opener] = {
    "PyTorch": lambda model, _: (model, None),
    "torch.export": exported("pt2"),
    "ONNX Runtime": exported("onnx"),
    "OpenVINO": exported("openvino"),
    "ExecuTorch": exported("executorch"),
    "LiteRT": exported("litert"),
    "Core ML": exported("coreml"),
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
    print(
        "| engine | model | loads | difference | MiB | " + " | ".join(columns) + " |\n|" + "---|" * (5 + len(columns))
    )
    engines = ENGINES | (COMPILED if args.compile else {})
    for engine, opener in engines.items():
        with tempfile.TemporaryDirectory() as folder:
            opened, failed = {}, {}
            for name, model in models.items():
                try:
                    opened[name] = opener(model, Path(folder))
                except VitpruneError as error:
                    failed.setdefault(first_line(error), []).append(name)
            for line in table(engine, models, opened, sizes, args.seconds) if opened else []:
                print(line, flush=True)
        for why, names in failed.items():
            print(f"| {engine} | {', '.join(names)} | no: {why} |" + " |" * (2 + len(columns)), flush=True)


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
    of_dense = "dense" in programs
    gains = {
        (name, row["batch_size"]): f" ({row['speedup']:.2f} x)"
        for name in programs
        if name != "dense" and of_dense
        for row in speedups(name, timings)
    }
    lines = []
    for name, (_, mib) in opened.items():
        cells = [engine, name, "yes", f"{off[name]:.0e}", "" if mib is None else f"{mib:.1f}"]
        cells += [f"{rates[name, batch]:,.1f}{gains.get((name, batch), '')}" for batch in sizes]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
