"""Which images a report shows: easy and hard ones, right and wrong ones, by a rule and not by taste."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from vitprune.data import Data, Faults, batches, make_loader
from vitprune.model import SparseViT
from vitprune.report.keepmaps import KeepMap, keep_maps
from vitprune.report.schema import ImageRow, KeepMaps

NUM_SEEN = 200
"""Images to choose from, at random; of a stream the first ones."""
BOTH_RIGHT, DENSE_ONLY, SPARSE_ONLY, NEITHER = (
    "both right",
    "dense right, sparse wrong",
    "dense wrong, sparse right",
    "both wrong",
)
SAME, OTHER = "same answer", "another answer"
GROUPS = {BOTH_RIGHT: 3, DENSE_ONLY: 2, SPARSE_ONLY: 2, NEITHER: 2, SAME: 3, OTHER: 3}
"""How many images of each group are shown, in this order."""
_SIDE = 256
_QUALITY = 80
_BATCH_SIZE = 16


def choose_images(
    sparse: SparseViT, dense: nn.Module, data: Data, names: Mapping[int, str], device: torch.device
) -> KeepMaps | None:
    """Run both models on some images of the evaluation and keep a few of them, small.

    Of each group (both right, only one, none; without labels: the same answer, another) those whose sparse answer is
    nearest to the dense one, in the middle, and farthest, by KL divergence.

    Args:
        sparse: the sparse model.
        dense: the model it was made from.
        data: its `val` images, with their transform set.
        names: of the classes, by index.
        device: where to run.

    Returns:
        What goes into keepmaps.json; None where the model has no stage.
    """
    if not sparse.schedule.stages:
        return None
    sparse.to(device).eval()
    dense.to(device).eval()
    maps: list[KeepMap] = []
    some = data.val.sample(NUM_SEEN)
    for images, labels in batches(make_loader(some, _BATCH_SIZE), Faults(allowed_share=1.0)):
        for keep_map in keep_maps(sparse, dense, images, labels, names):
            if math.isfinite(keep_map.kl):  # else a model gave no answer, and there is no place for it in the order
                keep_map.image.thumbnail((_SIDE, _SIDE))
                maps.append(replace(keep_map, scores=()))
    groups: dict[str, list[KeepMap]] = {}
    for keep_map in maps:
        groups.setdefault(group_of(keep_map), []).append(keep_map)
    rows = [
        _row(name, place, keep_map, names)
        for name, count in GROUPS.items()
        for place, keep_map in _picked(groups.get(name, []), count)
    ]
    return KeepMaps(grid_size=sparse.backbone.grid_size, num_seen=len(maps), images=rows)


def group_of(keep_map: KeepMap) -> str:
    """Who was right."""
    dense, sparse = keep_map.dense[0].index, keep_map.sparse[0].index
    if keep_map.label is None:
        return SAME if dense == sparse else OTHER
    return {
        (True, True): BOTH_RIGHT,
        (True, False): DENSE_ONLY,
        (False, True): SPARSE_ONLY,
        (False, False): NEITHER,
    }[dense == keep_map.label, sparse == keep_map.label]


def _picked(group: list[KeepMap], count: int) -> list[tuple[str, KeepMap]]:
    """Up to `count` of a group, each with its place: the farthest, the nearest, and then the one in the middle."""
    order = sorted(group, key=lambda keep_map: keep_map.kl)
    if len(order) < 2:
        return [("only one", keep_map) for keep_map in order]
    last = len(order) - 1
    places: dict[int, str] = {}
    for place, index in list({"farthest": last, "nearest": 0, "middle": last // 2}.items())[:count]:
        places.setdefault(index, place)
    return [(places[index], order[index]) for index in sorted(places)]


def _row(group: str, place: str, keep_map: KeepMap, names: Mapping[int, str]) -> ImageRow:
    buffer = io.BytesIO()
    keep_map.image.save(buffer, "JPEG", quality=_QUALITY)
    label = None if keep_map.label is None else names.get(keep_map.label, f"class {keep_map.label}")
    return ImageRow(
        group=group,
        place=place,
        jpeg=base64.b64encode(buffer.getvalue()).decode(),
        width=keep_map.image.width,
        height=keep_map.image.height,
        label=label,
        kept=[list(stage) for stage in keep_map.kept],
        dense=list(keep_map.dense),
        sparse=list(keep_map.sparse),
        kl=keep_map.kl,
    )
