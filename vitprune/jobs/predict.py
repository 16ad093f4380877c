"""What models say of images that need no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vitprune.adaptive import AdaptiveViT
from vitprune.common.devices import Precision
from vitprune.common.formatting import writable
from vitprune.common.progress import SILENT, Listener
from vitprune.data import (
    UNLABELLED,
    Faults,
    ImageSet,
    batches,
    eval_transform,
    image_files,
    make_loader,
    open_image,
    to_rgb,
)
from vitprune.errors import UsageError
from vitprune.evaluation import autocast
from vitprune.tasks import NamedClass, Record, Task, joined

_NUM_CLASSES = 5
_OF_VECTORS = ("embedding", "dense")
"""Tasks whose outputs are for machines."""


@dataclass(frozen=True)
class ImagePrediction:
    """What the models say of one image.

    Attributes:
        image: its path; of an image without one its number.
        classes: by the name of the model its likeliest classes or its labels, best first; empty where it gives numbers.
        vectors: by the name of the model the numbers that it gives, where it is for these: values (num_values,), an
            embedding (D,), features of all patches (N, C).
        distance: of an embedding or features, how far the sparse model's are from the dense one's, as
            `Results.distances`; None without both.
    """

    image: str
    classes: dict[str, list[NamedClass]]
    vectors: dict[str, Tensor] = field(default_factory=dict)
    distance: float | None = None

    def as_json(self) -> dict[str, Any]:
        """In JSON's types; features of all patches are too many for it, and only their shape is there."""
        found: dict[str, Any] = {"image": self.image}
        if self.distance is not None:
            found["distance"] = self.distance
        for model, classes in self.classes.items():
            vector = self.vectors.get(model)
            if vector is None:
                found[model] = [each.model_dump() for each in classes]
            else:
                found[model] = vector.tolist() if vector.ndim == 1 else {"shape": list(vector.shape)}
        return found


def image_set(images: Sequence[str | Path | Image.Image]) -> ImageSet:
    """Image files, all images in folders, or images of PIL's, without labels.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    items: list[Any] = []
    for each in images:
        if isinstance(each, Image.Image):
            items.append((len(items), to_rgb(each)))
        else:
            items += image_files(Path(each).expanduser())

    def read(item: Any) -> Image.Image:
        return item[1] if isinstance(item, tuple) else open_image(item)

    def name(item: Any) -> str:
        return writable(item[0] if isinstance(item, tuple) else item)

    return ImageSet(items, range(len(items)), read, name)  # numbers in the place of labels


@torch.inference_mode()
def predict_images(
    models: Mapping[str, nn.Module],
    images: ImageSet,
    names: Mapping[int, str],
    device: torch.device,
    precision: Precision = "fp32",
    *,
    task: Task,
    topk: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    listener: Listener = SILENT,
) -> tuple[list[ImagePrediction], Faults, dict[str, Any] | None]:
    """What every model says of each image, images prepared as the first model needs them.

    Args:
        models: by name; moved to the device and left in eval mode.
        images: of `image_set`.
        names: of the classes, by index, where known.
        device: where to run.
        precision: of the passes.
        task: what the models are for.
        topk: the likeliest classes or labels, so many; None for 5 classes, or all labels that a model gives.
        batch_size: images per pass.
        num_workers: processes that read images.
        listener: hears how far it is.

    Returns:
        One entry per image that could be read, in order; what could not; and, of a "sparse" model beside a "dense" one,
        how close it is, by the task.

    Raises:
        DataError: no image could be read.
        UsageError: `topk` is below 1, or the task has neither classes nor labels.
    """
    _check_topk(topk, task)
    first = next(iter(models.values()))
    first = first.models[0] if isinstance(first, AdaptiveViT) else first
    images.transform = eval_transform(getattr(first, "model", first))
    faults, found = Faults(allowed_share=1.0), list[ImagePrediction]()
    records: dict[str, list[Record]] = {name: [] for name in models}
    for model in models.values():
        model.to(device).eval()
    for batch, numbers in batches(make_loader(images, batch_size, num_workers=num_workers), faults):
        with autocast(device, precision):
            outputs = {name: task.run(model, batch.to(device)) for name, model in models.items()}
        answers = {name: _classes(task, output, names, topk) for name, output in outputs.items()}
        vectors = {name: task.vectors(output) for name, output in outputs.items()}
        for name, output in outputs.items() if len(models) > 1 else ():
            records[name].append(task.record(output, outputs.get("dense")))
        for row, number in enumerate(numbers.tolist()):
            named = {name: each[row] for name, each in answers.items()}
            numbered = {name: each[row].float().cpu() for name, each in vectors.items() if each is not None}
            found.append(ImagePrediction(images.name(images.items[number]), named, numbered))
        listener.advance(len(numbers))
    if not found:
        raise faults.none_read()
    if len(models) < 2:
        return found, faults, None
    unknown = torch.full((len(found),), UNLABELLED)
    results = {name: task.results(joined(each), unknown) for name, each in records.items()}
    if task.name in _OF_VECTORS:
        distances = results["sparse"].distances(results["dense"]).tolist()
        found = [replace(row, distance=distance) for row, distance in zip(found, distances, strict=True)]
    return found, faults, results["sparse"].fidelity(results["dense"])


def _check_topk(topk: int | None, task: Task) -> None:
    if topk is None:
        return
    if not task.decides:
        raise UsageError(f"--topk is of classes and labels, and the task is {task.name}", "leave it out")
    if topk < 1:
        raise UsageError(f"--topk is {topk}, expected at least 1")


def _classes(task: Task, output: Any, names: Mapping[int, str], topk: int | None) -> list[list[NamedClass]]:
    """The classes or labels of each image."""
    if topk is not None:
        answers = task.ranked(output, names, topk)
    else:
        answers = task.answers(output, names, _NUM_CLASSES if task.name == "classification" else len(output[0]))
    return [[] if isinstance(each, str) else each for each in answers]
