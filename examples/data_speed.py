"""How fast images come, and what memory that takes: folders, parquet and webdataset tar files of the same images.

    python examples/data_speed.py path/to/imagenet --count 50000 --model deit_tiny --checkpoint deit_tiny.safetensors
    python examples/data_speed.py demo --count 200

Makes `--count` images out of those of DATA (each used as often as needed) in all three forms, then reads every one
once: alone, and with the model (`--with-model folder,parquet,tar`). Each measurement is a process of its own, whose
peak memory is the sum of its own and of its largest worker's. At last ten passes of training batches over a tenth of
them, with the memory after each.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FORMS = ("folder", "parquet", "tar")
_PER_SHARD = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with train/ or val/, or demo")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--model", default="demo", help="whose preprocessing and classes are used")
    parser.add_argument("--checkpoint")
    parser.add_argument("--with-model", default="", help="forms to evaluate the model on, too")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--workers", "-j", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/data-speed"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    make(args)
    print(f"{args.count} images, {os.cpu_count()} cores, {args.workers} workers")
    print("| form | reading | images/s | peak memory, MiB |\n|---|---|---|---|")
    evaluated = [form for form in args.with_model.split(",") if form]
    for form, what in [*itertools.product(FORMS, ["alone"]), *((form, "with the model") for form in evaluated)]:
        found = in_a_process(f"{form}:{what}")
        print(f"| {form} | {what} | {found['images_per_s']:.0f} | {found['peak_mib']:.0f} |", flush=True)
    after = in_a_process("epochs")["mib"]
    print("memory after each of ten passes, MiB: " + ", ".join(f"{mib:.0f}" for mib in after))


def in_a_process(what: str) -> dict[str, Any]:
    """One measurement, so that its memory is its own."""
    done = subprocess.run([sys.executable, *sys.argv, "--measure", what], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """In the process: read everything once, or a tenth of it ten times."""
    import torch

    from vitprune.common.devices import pick_precision
    from vitprune.data import batches, eval_transform, make_loader, open_data
    from vitprune.evaluation import predict
    from vitprune.tasks import task_named

    model, classes = model_classes(args)
    if args.measure == "epochs":
        return {"mib": list(passes(model, open_data(str(args.output / "folder"), classes), args.workers))}
    form, what = args.measure.split(":")
    spec = {"folder": args.output / "folder", "parquet": args.output / "*.parquet", "tar": args.output / "*.tar"}[form]
    val = open_data(str(spec), classes).val
    val.transform = eval_transform(model)
    start = time.perf_counter()
    if what == "alone":
        count = sum(len(labels) for _, labels in batches(make_loader(val, 64, num_workers=args.workers)))
    else:
        device = torch.device("cpu")
        precision = pick_precision(args.precision, device, training=False)
        task = task_named("classification")
        found, _ = predict({"model": model}, val, device, precision, task=task, num_workers=args.workers)
        count = found["model"].num_images
    seconds = time.perf_counter() - start
    if count != args.count:
        raise SystemExit(f"{count} images were read instead of {args.count}")
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    return {"images_per_s": count / seconds, "peak_mib": peak}


def model_classes(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its classes."""
    from vitprune.data import ModelClasses
    from vitprune.loading.load import load_model

    loaded = load_model(args.model, checkpoint=args.checkpoint and Path(args.checkpoint))
    return loaded.model, ModelClasses(loaded.model.num_classes, loaded.class_names)


def passes(model: Any, data: Any, workers: int) -> Iterator[float]:
    """Resident memory of this process after each of ten passes of training batches, in MiB."""
    from vitprune.data import Augmentation, batches, train_transform, training_loader

    images = data.val.sample(max(64, len(data.val) // 10))
    images.transform = train_transform(model, Augmentation())
    stream = batches(training_loader(images, 32, seed=0, num_workers=workers))
    for _ in range(10):
        for _ in range(len(images) // 32):
            next(stream)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        yield pages * resource.getpagesize() / 2**20


def make(args: argparse.Namespace) -> None:
    """The images in three forms, unless they are there."""
    from datasets import Dataset, Features, Image, Value, disable_progress_bars

    from vitprune.data.classes import match_classes

    output, count = args.output, args.count
    if (output / "folder").exists():
        return
    disable_progress_bars()
    output.mkdir(parents=True, exist_ok=True)
    sources = list(originals(args.data, output))
    index = match_classes([*{path.parent.name for path in sources}], model_classes(args)[1], str(args.data)).index
    rows: list[dict[str, Any]] = []
    for number, path in zip(range(count), itertools.cycle(sources), strict=False):
        target = output / "folder" / path.parent.name / f"{number:06d}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        target.write_bytes(content)
        rows.append({"image": {"bytes": content, "path": None}, "label": path.parent.name})
        if len(rows) == _PER_SHARD or number == count - 1:
            shard = f"val-{number // _PER_SHARD:05d}-of-{-(-count // _PER_SHARD):05d}"
            features = Features({"image": Image(), "label": Value("string")})
            Dataset.from_list(rows, features=features).to_parquet(output / f"{shard}.parquet")
            write_tar(output / f"{shard}.tar", rows, index)
            rows = []


def write_tar(path: Path, rows: list[dict[str, Any]], index: Mapping[str, int]) -> None:
    """A webdataset shard; it numbers its classes."""
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for suffix, content in (("jpg", row["image"]["bytes"]), ("cls", str(index[row["label"]]).encode())):
                entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def originals(data: Path, output: Path) -> Iterator[Path]:
    """The images of DATA; of the demo set a few, as files."""
    if str(data) != "demo":
        yield from sorted(path for path in data.glob("*/*/*") if path.is_file())
        return
    from vitprune.data.demo import CLASS_NAMES, demo_images

    images = demo_images("val")
    for index in range(40):
        path = output / "originals" / CLASS_NAMES[images.labels[index]] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        images.read(index).save(path)
        yield path


if __name__ == "__main__":
    main()
