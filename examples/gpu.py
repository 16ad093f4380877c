"""All that a GPU has to show, in one go: is it right there, how fast is it, does it train, is a speed target kept?

    python examples/gpu.py
    python examples/gpu.py --models deit_small_patch16_224 --mode eager --batch-size 1,32 --seconds 0.5

What was measured is kept in --output, and not repeated when the command is given again: a long table can be made in
several goes. Prints Markdown with the device's name. Exit code 3 where a target is missed: from batch 32 on a speed-up
of 95 % of what MACs suggest, at batch 1 no slower than dense in the same mode, and the same tokens as on the CPU.
Weights are random (of the demo model: trained), so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vitprune import attach
from vitprune.backbones import input_size
from vitprune.common.files import write_json
from vitprune.errors import VitpruneError
from vitprune.loading.load import load_model
from vitprune.measure import BenchModel, describe_environment, side_by_side, with_bounds

MODELS = ("deit_small_patch16_224", "deit_base_patch16_224", "vit_large_patch16_224", "vit_base_patch14_dinov2@518")
"""timm names; @ an image size."""
RIGHT = ("deit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224", "cait_xxs24_224")
EFFICIENCY, FROM_BATCH = 0.95, 32
LARGEST_DIFFERENCE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--right", default=",".join(RIGHT), help="models whose tokens are compared with the CPU's")
    parser.add_argument("--precision", default="bf16,fp16")
    parser.add_argument("--mode", default="eager,compile,cudagraphs")
    parser.add_argument("--batch-size", default="1,8,32,128,256")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--pruned", default="merge", choices=("drop", "merge"))
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each row is timed")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("error: this PyTorch sees no CUDA GPU")
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"## {device_name(args.device)}\n", flush=True)
    missed = [*check_right(args), *measure_speed(args)]
    if not args.no_training:
        missed += train(args)
    print("\nMissed:\n" if missed else "\nNothing missed.")
    print("\n".join(f"- {each}" for each in missed))
    sys.exit(3 if missed else 0)


def device_name(device: str) -> str:
    """Of the GPU, or the CPU."""
    environment = describe_environment()
    where = torch.device(device)
    name = environment["gpus"][where.index or 0]["name"] if where.type == "cuda" else environment["cpu"]
    return f"{name}, torch {torch.__version__}"


@torch.no_grad()
def check_right(args: argparse.Namespace) -> list[str]:
    """In fp32: the same tokens and logits as on the CPU, and what is masked in training is what is deployed."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print("| model | logits, device against CPU | other tokens | masked against deployed |\n|---|---|---|---|")
    missed = []
    for name in filter(None, args.right.split(",")):
        torch.manual_seed(0)
        sparse = attach(load_model(name, weights="random").model, args.keep, pruned=args.pruned).eval()
        images = torch.randn(4, *input_size(sparse.model))
        here = sparse.select(images)
        sparse, images = sparse.to(args.device), images.to(args.device)
        there = sparse.select(images)
        masked = (sparse.forward_masked(images).logits - there.logits).abs().max().item()
        logits = (there.logits.cpu() - here.logits).abs().max().item()
        other = sum((a.cpu() != b).sum().item() for a, b in zip(there.indices, here.indices, strict=True))
        print(f"| {name} | {logits:.1e} | {other} | {masked:.1e} |", flush=True)
        if max(logits, masked) > LARGEST_DIFFERENCE or other:
            missed.append(f"{name} computes something else than on the CPU, or masks something else than it drops")
    return missed


def measure_speed(args: argparse.Namespace) -> list[str]:
    """Dense, sparse and bound interleaved, per model, precision and mode."""
    print(
        "\n| model | precision | mode | batch | dense images/s | sparse images/s | speed-up | of promise | over bound |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    missed: list[str] = []
    for spec in args.models.split(","):
        for precision in args.precision.split(","):
            for mode in args.mode.split(","):
                rows = measured(args, spec, precision, mode)
                missed += [line for row in rows if (line := print_row(row, rows, spec, precision))]
    return missed


def measured(args: argparse.Namespace, spec: str, precision: str, mode: str) -> list[dict[str, Any]]:
    """Rows of one benchmark, or what a run before this one found; none where it cannot be done, which is said."""
    plan = f"{args.keep}-{args.pruned}-{args.batch_size.replace(',', '_')}"
    path = args.output / f"{spec}-{precision}-{mode}-{plan}.json"
    if path.exists():
        found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
        return found
    name, _, size = spec.partition("@")
    dense = load_model(name, weights="random", img_size=(int(size), int(size)) if size else None).model
    sparse = attach(dense, args.keep, token_schedule="late", pruned=args.pruned)
    models = {"dense": BenchModel("dense", 1.0, dense), "sparse": BenchModel("sparse", args.keep, sparse)}
    try:
        rows = side_by_side(
            name,
            with_bounds(models),
            input_size(dense),
            [int(each) for each in args.batch_size.split(",")],
            [mode],  # type: ignore[list-item]
            device=torch.device(args.device),
            precision=precision,
            min_seconds=args.seconds,
        )
    except VitpruneError as error:
        print(f"| {spec} | {precision} | {mode} | {error.message} ||||||")
        return []
    write_json(path, {"rows": rows, "environment": describe_environment()})
    return rows


def print_row(row: dict[str, Any], rows: list[dict[str, Any]], spec: str, precision: str) -> str | None:
    """A line of the table for a sparse row, and what it misses."""
    if row["kind"] != "sparse":
        return None
    batch = row["batch_size"]
    dense = next(each for each in rows if each["kind"] == "dense" and each["batch_size"] == batch)
    print(
        f"| {spec} | {precision} | {row['mode']} | {batch} | {dense['images_per_s']:,.0f} | {row['images_per_s']:,.0f} "
        f"| {row['speedup']:.2f} x{' SLOWER' if row['slower'] else ''} | {100 * row['efficiency']:.0f} % "
        f"| {row['overhead_over_bound_pct']:+.1f} % |",
        flush=True,
    )
    where = f"{spec}, {precision}, {row['mode']}, batch {batch}"
    if batch >= FROM_BATCH and row["efficiency"] < EFFICIENCY:
        return f"{where}: {100 * row['efficiency']:.0f} % of what MACs suggest"
    return f"{where}: slower than dense" if row["slower"] else None


def train(args: argparse.Namespace) -> list[str]:
    """The demo, eager and compiled, and a speed target."""
    runs: dict[str, tuple[list[str], list[str]]] = {
        "demo": (["demo"], ["--max-drop", "1"]),
        "demo, compiled": (["demo", "--compile"], ["--max-drop", "1"]),
        "1.3 x at batch 32": (["demo", "--target-speedup", "1.3", "--target-batch-size", "32"], []),
    }
    print("\n| run | top-1 change | trained on | asked | promised | measured |\n|---|---|---|---|---|---|")
    missed = []
    for name, (model, checks) in runs.items():
        folder = args.output / name.replace(" ", "-").replace(",", "")
        command = [sys.executable, "-m", "vitprune", "sparsify", *model, *checks]
        command += ["-o", str(folder), "--overwrite", "--device", args.device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 3):
            missed.append(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            continue
        report = json.loads((folder / "report.json").read_text())
        training, target = report["training"], report["target"] or {}
        speeds = (f"{target[key]:.2f} x" if key in target else "" for key in SPEEDS)
        print(
            f"| {name} | {report['delta']['top1_points']:+.2f} "
            f"| {training['num_images'] / training['seconds']:,.0f} images/s | {' | '.join(speeds)} |",
            flush=True,
        )
        if done.returncode == 3 or target.get("met") is False:
            missed.append(f"{name}: a check or the promise")
    return missed


SPEEDS = ("speedup", "predicted_speedup", "measured_speedup")


if __name__ == "__main__":
    main()
