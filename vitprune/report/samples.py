"""Which images a report shows: easy and hard ones, right and wrong ones, by a rule and not by taste."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping

import torch
from torch import nn

from vitprune.data import Data, Faults, batches, make_loader
from vitprune.model import SparseViT
from vitprune.report.keepmaps import KeepMap, keep_maps
from vitprune.report.schema import ImageRow, KeepMaps

NUM_SEEN = 200
"""Images to choose from, at random; of a stream the first ones."""
GROUPS = {
    "both right": 3,
    "dense right, sparse wrong": 2,
    "dense wrong, sparse right": 2,
    "both wrong": 2,
    "same prediction": 3,
    "another prediction": 3,
}
"""How many images of each group are shown, in this order."""
_SIDE = 256
_QUALITY = 80
_BATCH_SIZE = 16


def choose_images(
    sparse: SparseViT, dense: nn.Module, data: Data, names: Mapping[int, str], device: torch.device
) -> KeepMaps | None:
    """Run both models on some images of `data.val`, whose transform is set, and keep a few of them, small.

    Of each group those with the least, the middle and the greatest KL divergence of sparse from dense.

    Returns:
        What goes into keepmaps.json; None where the model has no stage.
    """
    if not sparse.schedule.stages:
        return None
    sparse.to(device).eval()
    dense.to(device).eval()
    groups: dict[str, list[KeepMap]] = {name: [] for name in GROUPS}
    some = data.val.sample(NUM_SEEN)
    for images, labels in batches(make_loader(some, _BATCH_SIZE), Faults(allowed_share=1.0)):
        for keep_map in keep_maps(sparse, dense, images, labels, names):
            if math.isfinite(keep_map.kl):  # else a model gave no prediction, and there is no place for it in the order
                keep_map.image.thumbnail((_SIDE, _SIDE))
                groups[group_of(keep_map)].append(keep_map)
    rows = [
        _row(name, place, keep_map)
        for name, members in groups.items()
        for place, keep_map in _picked(members, GROUPS[name])
    ]
    num_seen = sum(map(len, groups.values()))
    return KeepMaps(grid_size=sparse.backbone.grid_size, num_seen=num_seen, images=rows)


def group_of(keep_map: KeepMap) -> str:
    """Who was right."""
    dense, sparse = keep_map.dense[0].index, keep_map.sparse[0].index
    if keep_map.label is None:
        return "same prediction" if dense == sparse else "another prediction"
    of_dense, of_sparse = ("right" if predicted == keep_map.label else "wrong" for predicted in (dense, sparse))
    return f"both {of_dense}" if of_dense == of_sparse else f"dense {of_dense}, sparse {of_sparse}"


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


def _row(group: str, place: str, keep_map: KeepMap) -> ImageRow:
    buffer = io.BytesIO()
    keep_map.image.save(buffer, "JPEG", quality=_QUALITY)
    return ImageRow(
        group=group,
        place=place,
        jpeg=base64.b64encode(buffer.getvalue()).decode(),
        width=keep_map.image.width,
        height=keep_map.image.height,
        label=keep_map.label_name,
        kept=keep_map.kept,
        owners=keep_map.owners,
        dense=keep_map.dense,
        sparse=keep_map.sparse,
        kl=keep_map.kl,
    )
