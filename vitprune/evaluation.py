"""Evaluation: several models on the same images in one pass, so that their difference is paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.common import distributed
from vitprune.common.devices import DTYPES, Precision, explained_out_of_memory
from vitprune.common.progress import SILENT, Listener
from vitprune.data import Faults, Images, batches, count_images, explain_worker_crash, make_loader
from vitprune.measure import Timing, speedups
from vitprune.tasks import Record, Results, Task, joined


def compared(name: str, results: Mapping[str, Results], timings: Sequence[Timing]) -> dict[str, Any]:
    """How a model differs from the one called "dense", on the same images and in one benchmark, for JSON."""
    model, dense = results[name], results["dense"]
    return {**model.change(dense), **model.fidelity(dense), "speedup": speedups(name, timings)}


@torch.inference_mode()
def predict(
    models: Mapping[str, nn.Module],
    images: Images,
    device: torch.device,
    precision: Precision = "fp32",
    *,
    task: Task,
    gallery: Images | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    reference: str | None = None,
    allowed_share: float = 0.0,
    listener: Listener = SILENT,
) -> tuple[dict[str, Results], Faults]:
    """Run every model over every image once; of several processes each reads a part, and all know the result.

    Models are moved to the device and left in eval mode; the transform of the images is set. Batch size and number of
    workers are of one process. The task says what is kept of their outputs, which the others' are compared with those
    of the model `reference`. At most `allowed_share` of the images, in [0, 1], may be unreadable; those are left out.
    The models also run over `gallery`, training images with their transform, where the task asks these.

    Returns:
        Results by name, and the unreadable images.

    Raises:
        DataError: an image cannot be read, too many, or all; names it. Or a process that reads them died.
        VitpruneError: out of memory.
    """
    shard = images.shard(distributed.rank(), distributed.world_size())
    loader, faults = make_loader(shard, batch_size, num_workers=num_workers), Faults(allowed_share)
    records: dict[str, list[Record]] = {name: [] for name in models}
    targets: list[Tensor] = []
    for model in models.values():
        model.to(device).eval()
    what = f"evaluating {batch_size} images at a time on {device}"
    with explained_out_of_memory(what, "try a lower --batch-size"), explain_worker_crash():
        for batch, batch_targets in batches(loader, faults):
            batch = batch.to(device, non_blocking=True)
            with autocast(device, precision):
                outputs = {name: task.run(model, batch) for name, model in models.items()}
            for name, output in outputs.items():
                beside = None if reference in (None, name) else outputs[str(reference)]
                records[name].append(task.record(output, beside))
            targets.append(batch_targets)
            listener.advance(len(batch_targets))
    shards = distributed.gather((records, targets, faults))
    all_faults = Faults.merged([faults for *_, faults in shards])
    all_targets = [each for _, targets, _ in shards for each in targets]
    if not all_targets:
        raise all_faults.none_read()
    results = {
        name: task.results(joined([each for records, *_ in shards for each in records[name]]), torch.cat(all_targets))
        for name in models
    }
    if gallery is not None:
        listener.begin("evaluating the training images", count_images(gallery))
        training, _ = predict(
            models,
            gallery,
            device,
            precision,
            task=task,
            batch_size=batch_size,
            num_workers=num_workers,
            allowed_share=1.0,
            listener=listener,
        )
        results = {name: each.beside(training[name]) for name, each in results.items()}
    return results, all_faults


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """torch.autocast for "bf16" and "fp16", nothing for "fp32"."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
