"""Which images a report shows: easy and hard ones, right and wrong ones, by a rule and not by taste."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from vitprune.data import Data, Faults, ImageSet, batches, make_loader
from vitprune.model import SparseViT
from vitprune.report.keepmaps import NUM_NEIGHBOURS, KeepMap, keep_maps, relations
from vitprune.report.schema import ImageRow, KeepMaps
from vitprune.tasks import Record, task_named

NUM_SEEN = 200
"""Images to choose from, at random; of a stream the first ones."""
GROUPS = {
    "both right": 3,
    "dense right, sparse wrong": 2,
    "dense wrong, sparse right": 2,
    "both wrong": 2,
    "same prediction": 3,
    "another prediction": 3,
    "evaluated images": 6,
}
"""How many images of each group are shown, in this order."""
ROUTED = {
    "went on, and the answer changed": 4,
    "went on, and the answer stayed": 4,
    "stopped with another answer than dense": 4,
}
"""Likewise of images of which some went on from the sparse to the dense model."""
_OF_ALL = "evaluated images"
_THUMBNAIL = 72
"""Longest side, in pixels, of an image that is shown as a neighbour."""
_SIDE = 256
_QUALITY = 80
_BATCH_SIZE = 16


def choose_images(
    sparse: SparseViT, dense: nn.Module, data: Data, names: Mapping[int, str], device: torch.device
) -> KeepMaps | None:
    """Run both models on some images of `data.val`, whose transform is set, and keep a few of them, small.

    Of each group those with the least, the middle and the greatest distance of sparse from dense, by the task. Where
    images are not classified all are one group. This goes into keepmaps.json; None where the model has no stage.
    """
    if not sparse.schedule.stages:
        return None
    sparse.to(device).eval()
    dense.to(device).eval()
    task, seen, records = task_named(sparse.task), list[KeepMap](), list[dict[str, Record]]()
    some = data.val.sample(NUM_SEEN)
    for images, labels in batches(make_loader(some, _BATCH_SIZE), Faults(allowed_share=1.0)):
        found, record = keep_maps(sparse, dense, images, labels, names)
        for keep_map in found:
            keep_map.image.thumbnail((_SIDE, _SIDE))
        seen += found
        records.append(record)
    if not seen:
        return KeepMaps(grid_size=sparse.backbone.grid_size, num_seen=0, images=[])
    distances, nearest = relations(task, records)
    for number, keep_map in enumerate(seen):
        keep_map.distance = distances[number]
        keep_map.neighbours = {name: rows[number][:NUM_NEIGHBOURS] for name, rows in nearest.items()}
    groups: dict[str, list[KeepMap]] = {name: [] for name in GROUPS}
    for keep_map in seen:
        # Else a model gave no output to speak of, and there is no place for it in the order.
        if math.isfinite(keep_map.distance):
            groups[group_of(keep_map) if task.name == "classification" else _OF_ALL].append(keep_map)
    rows = [
        _row(name, place, keep_map)
        for name, members in groups.items()
        for place, keep_map in _picked(members, GROUPS[name])
    ]
    numbers = sorted({number for row in rows for near in row.neighbours.values() for number in near})
    places = {number: place for place, number in enumerate(numbers)}
    for row in rows:
        row.neighbours = {name: [places[number] for number in near] for name, near in row.neighbours.items()}
    num_seen = sum(map(len, groups.values()))
    kept = [_small(seen[number]) for number in numbers]
    return KeepMaps(grid_size=sparse.backbone.grid_size, num_seen=num_seen, images=rows, thumbnails=kept)


class Routed(NamedTuple):
    """Images that could be read, their transform set, of which some went on from the sparse model to another.

    Of each the sparse model's certainty, whether its answer is the dense model's, and whether it went on, all (n,).
    """

    images: ImageSet
    certainty: np.ndarray[Any, Any]
    same: np.ndarray[Any, Any]
    went_on: np.ndarray[Any, Any]


def choose_routed(
    sparse: SparseViT, dense: nn.Module, routed: Routed, names: Mapping[int, str], device: torch.device
) -> KeepMaps:
    """Some images of each group of `ROUTED`, small, from the least to the most certain; both models run on these."""
    sparse.to(device).eval()
    dense.to(device).eval()
    members = (routed.went_on & ~routed.same, routed.went_on & routed.same, ~routed.went_on & ~routed.same)
    rows: list[ImageRow] = []
    for (group, most), chosen in zip(ROUTED.items(), members, strict=True):
        order = np.flatnonzero(chosen)
        order = order[np.argsort(routed.certainty[order], kind="stable")]
        places = np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int))
        numbers = order[places].tolist()
        said = f"{group}: {len(order)} of {len(chosen)}"
        for images, labels in batches(make_loader(routed.images.subset(numbers), _BATCH_SIZE)) if numbers else ():
            found, _ = keep_maps(sparse, dense, images, labels, names)
            for number, keep_map in zip(numbers, found, strict=True):
                keep_map.image.thumbnail((_SIDE, _SIDE))
                rows.append(_row(said, f"certainty {routed.certainty[number]:.3f}", keep_map))
    return KeepMaps(grid_size=sparse.backbone.grid_size, num_seen=len(routed.certainty), images=rows)


def _small(keep_map: KeepMap) -> str:
    image = keep_map.image.copy()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return _jpeg(image)


def group_of(keep_map: KeepMap) -> str:
    """Who was right, of classifiers."""
    dense, sparse = (
        each[0].index for each in (keep_map.dense, keep_map.sparse) if not isinstance(each, str) and len(each)
    )
    if keep_map.label is None:
        return "same prediction" if dense == sparse else "another prediction"
    of_dense, of_sparse = ("right" if predicted == keep_map.label else "wrong" for predicted in (dense, sparse))
    return f"both {of_dense}" if of_dense == of_sparse else f"dense {of_dense}, sparse {of_sparse}"


def _picked(group: list[KeepMap], count: int) -> list[tuple[str, KeepMap]]:
    """Up to `count` of a group, each with its place: the farthest, the nearest, the one in the middle, and so on."""
    order = sorted(group, key=lambda keep_map: keep_map.distance)
    if len(order) < 2:
        return [("only one", keep_map) for keep_map in order]
    last = len(order) - 1
    places: dict[int, str] = {}
    around = {"farthest": (last, last - 1), "nearest": (0, 1), "middle": (last // 2, last // 2 + 1)}
    wanted = [(place, indices[again]) for again in (0, 1) for place, indices in around.items()]
    for place, index in wanted[:count]:
        places.setdefault(index, place)
    return [(places[index], order[index]) for index in sorted(places)]


def _row(group: str, place: str, keep_map: KeepMap) -> ImageRow:
    image, same = keep_map.image, ("kept", "owners", "dense", "sparse", "distance", "likeness", "neighbours")
    return ImageRow(
        group=group,
        place=place,
        jpeg=_jpeg(image),
        width=image.width,
        height=image.height,
        label=keep_map.label_name,
        **{key: getattr(keep_map, key) for key in same},
    )


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
