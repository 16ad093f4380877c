"""Which tokens are kept: of an image, how often over many images, and how much of an object they cover."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitprune.backbones import preprocessing
from vitprune.data import UNLABELLED, Data, ImageSet, batches, make_loader
from vitprune.model import SparseViT
from vitprune.tasks import Answer, Record, Task, joined, task_named

NUM_NEIGHBOURS = 5
"""Images that are shown as the nearest to another."""
_NUM_COVERED = 200
"""Images that the coverage of the object is measured on, at random."""


@dataclass
class KeepMap:
    """What became of the patches of one image, most of it as `vitprune.report.schema.ImageRow` has it.

    Attributes:
        image: as the models saw it, resized and cropped, RGB.
        grid_size: patches (rows, columns); a patch's number counts them in raster order.
        kept: numbers of the patches kept after each stage, rising.
        scores: keep scores of the patches that reached each stage, by the order of their numbers.
        redundancy: how like a more important one each of these was, a cosine, and None of the most important; no entry
            for stages that did not ask.
        label: index of the true class; None where not known.
        label_name: what it is called, or what else is right: labels, values.
    """

    image: Image.Image
    grid_size: tuple[int, int]
    kept: list[list[int]]
    scores: list[list[float]]
    dense: Answer
    sparse: Answer
    distance: float
    label: int | None = None
    label_name: str | None = None
    redundancy: list[list[float | None]] = field(default_factory=list)
    owners: list[list[int]] = field(default_factory=list)
    likeness: list[float] = field(default_factory=list)
    neighbours: dict[Literal["dense", "sparse"], list[int]] = field(default_factory=dict)

    @property
    def num_patches(self) -> int:
        """Patches of the image."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def kept_pct(self) -> list[float]:
        """Share of the patches kept after each stage, in percent."""
        return [100 * len(stage) / self.num_patches for stage in self.kept]

    def reached(self, stage: int) -> Sequence[int]:
        """Numbers of the patches that stage `stage` chose among."""
        return self.kept[stage - 1] if stage else range(self.num_patches)


@torch.inference_mode()
def keep_maps(
    sparse: SparseViT, dense: nn.Module, images: Tensor, labels: Tensor, names: Mapping[int, str]
) -> tuple[list[KeepMap], dict[str, Record]]:
    """Run both models, in eval mode and on one device, on a batch of preprocessed images (B, C, H, W).

    The sparse model has at least one stage. Labels are class indices (B,), or UNLABELLED, or a row of other targets for
    each; names are those of the classes, by index.

    Returns:
        A map for each image, distances as among these images, and what the task records of "dense" and "sparse".
    """
    on_device, task = images.to(next(sparse.parameters()).device), task_named(sparse.task)
    selection = sparse.select(on_device, filled=task.filled)
    outputs = {"dense": task.run(dense, on_device), "sparse": task.of_selection(selection)}
    records = {name: task.record(output, outputs["dense"]) for name, output in outputs.items()}
    answers = {name: task.answers(output, names) for name, output in outputs.items()}
    distances, _ = relations(task, [records], neighbours=False)
    likeness = task.patch_likeness(outputs["sparse"], outputs["dense"])
    choices = selection.choices
    redundancy = [each.redundancy for each in choices if each.redundancy is not None]
    owners = [selection.indices[stage].gather(1, selection.owners(stage)) for stage in range(len(choices))]
    found = [
        KeepMap(
            image=as_seen(sparse.model, image),
            grid_size=sparse.backbone.grid_size,
            kept=[stage[i].tolist() for stage in selection.indices],
            scores=[stage[i].float().tolist() for stage in selection.scores],
            dense=answers["dense"][i],
            sparse=answers["sparse"][i],
            distance=distances[i],
            label=None if label.ndim or label == UNLABELLED else int(label),
            label_name=task.right(label, names),
            redundancy=[[r if math.isfinite(r) else None for r in each[i].tolist()] for each in redundancy],
            owners=[each[i].tolist() for each in owners],
            likeness=[] if likeness is None else [round(each, 3) for each in likeness[i].clamp(-1, 1).tolist()],
        )
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    return found, records


def relations(
    task: Task, records: Sequence[Mapping[str, Record]], *, neighbours: bool = True
) -> tuple[list[float], dict[Literal["dense", "sparse"], list[list[int]]]]:
    """How images of some batches are to each other, by what the task recorded of "dense" and "sparse".

    Returns:
        How far sparse is from dense, of each image; and by model the numbers of the others nearest to it, nearest
        first; nothing of a task that knows of none, or without `neighbours`.
    """
    of_dense, of_sparse = (joined([each[name] for each in records]) for name in ("dense", "sparse"))
    unknown = torch.full((len(next(iter(of_dense.values()))),), UNLABELLED)
    dense, sparse = (task.results(record, unknown) for record in (of_dense, of_sparse))
    distances: list[float] = sparse.distances(dense).tolist()
    ours, theirs = (sparse.nearest(), dense.nearest()) if neighbours else (None, None)
    if ours is None or theirs is None:
        return distances, {}
    return distances, {"dense": theirs.tolist(), "sparse": ours.tolist()}


def as_seen(model: nn.Module, image: Tensor) -> Image.Image:
    """A preprocessed image (C, H, W) as an RGB image again: what the model saw."""
    config = preprocessing(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    pixels = (image.float() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())


def kept_shares(images: Sequence[Sequence[list[int]]], num_patches: int) -> list[list[float]]:
    """How often each patch is kept, by stage, in percent of the images; these by the kept patches of each stage."""
    counts = torch.zeros(len(images[0]), num_patches)  # (stages, N)
    for image in images:
        for stage, kept in enumerate(image):
            counts[stage, kept] += 1
    shares: list[list[float]] = (100 * counts / len(images)).tolist()
    return shares


@torch.inference_mode()
def object_coverage(models: Mapping[str, nn.Module], data: Data, device: torch.device) -> dict[str, float]:
    """Share of the object's pixels that lie under tokens kept after the last stage, in percent, mean over some images.

    Dense models are passed over. `object_mask` and the transform of `data.val` are set; that does not crop the images.
    """
    assert data.object_mask is not None
    assert isinstance(data.val, ImageSet)
    sparse = {n: m for n, m in models.items() if isinstance(m, SparseViT) and m.schedule.stages}
    some = data.val.sample(_NUM_COVERED)
    shares: dict[str, list[Tensor]] = {name: [] for name in sparse}
    done = 0
    for images, _ in batches(make_loader(some, 64)):
        items = some.items[done : done + len(images)]
        masks = torch.from_numpy(np.stack([data.object_mask(item) for item in items])).float()  # (B, H, W)
        done += len(images)
        for name, model in sparse.items():
            rows, columns = model.backbone.grid_size
            cells = masks.reshape(len(images), rows, masks.shape[1] // rows, columns, masks.shape[2] // columns)
            per_patch = cells.sum(dim=(2, 4)).flatten(1)  # (B, N)
            kept = model.to(device).eval().select(images.to(device)).indices[-1].cpu()
            shares[name].append(per_patch.gather(1, kept).sum(dim=1) / per_patch.sum(dim=1))
    return {name: 100 * torch.cat(parts).mean().item() for name, parts in shares.items()}
