"""Keep maps of many images, as files: what `vitprune visualize` does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import nn

from vitprune.common.files import replacing
from vitprune.data import Images, ImageSet, batches, eval_transform, make_loader
from vitprune.model import SparseViT
from vitprune.report.drawing import Legend, draw_mean, montage, sheet
from vitprune.report.keepmaps import KeepMap, MeanMap, keep_maps

MOST_ON_A_SHEET = 100
_BATCH_SIZE = 16


class Advance(Protocol):
    """Who wants to know how many images are done."""

    def advance(self, count: int) -> None:
        """`count` more of them are done."""


@dataclass(frozen=True)
class Wanted:
    """What to draw.

    Attributes:
        folder: where files go; it is there.
        single: a montage per image.
        sheet: all montages under each other in one file.
        heat: add heat maps of the predictors' keep scores.
        mean: how often each position stays, over all images.
    """

    folder: Path
    single: bool = True
    sheet: bool = False
    heat: bool = False
    mean: bool = False


@dataclass
class Drawn:
    """What was found and written.

    Attributes:
        images: one entry an image, for JSON.
        mean: how often each position stays, where it was asked for.
        files: all that were written, in order.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    mean: dict[str, Any] | None = None
    files: list[Path] = field(default_factory=list)


def visualize(
    sparse: SparseViT,
    dense: nn.Module,
    images: Images,
    names: Mapping[int, str],
    legend: Legend,
    wanted: Wanted,
    progress: Advance,
) -> Drawn:
    """Draw which patches stay.

    Args:
        sparse: the sparse model, with at least one stage; it says the device.
        dense: the model to compare with.
        images: what to draw; the transform is set here.
        names: of the classes, by index.
        legend: what captions say of the model.
        wanted: which files.
        progress: is told of every image.

    Raises:
        DataError: an image cannot be read; names it. What came before it is written.
        OutputError: a file cannot be written.
    """
    dense.to(next(sparse.parameters()).device).eval()
    sparse.eval()
    images.transform = eval_transform(sparse.model)
    result, mean = Drawn(), MeanMap(sparse.backbone.num_patches, len(sparse.schedule.stages))
    montages: list[Image.Image] = []
    taken: set[str] = set()
    for name, keep_map in _all_keep_maps(sparse, dense, images, names):
        mean.add(keep_map.kept)
        label = None if keep_map.label is None else names.get(keep_map.label, f"class {keep_map.label}")
        entry = _entry(name, keep_map, label, wanted.heat)
        if wanted.single or wanted.sheet:
            drawn = montage(keep_map, Path(name).name, legend, label, wanted.heat)
            if wanted.sheet:
                montages.append(drawn)
            else:
                entry["file"] = str(_save(drawn, wanted.folder / _file_name(name, taken), result))
        result.images.append(entry)
        progress.advance(1)
    if montages:
        _save(sheet(montages), wanted.folder / "sheet.png", result)
    if wanted.mean:
        path = wanted.folder / "mean.png"
        with replacing(path) as temporary:
            draw_mean(temporary, mean.kept_pct, sparse.backbone.grid_size, mean.num_images, legend)
        result.files.append(path)
        result.mean = {"num_images": mean.num_images, "kept_pct": mean.kept_pct, "file": str(path)}
    return result


def _all_keep_maps(
    sparse: SparseViT, dense: nn.Module, dataset: Images, names: Mapping[int, str]
) -> Iterator[tuple[str, KeepMap]]:
    """Every image with its name, which a stream does not tell."""
    number = 0
    for images, labels in batches(make_loader(dataset, _BATCH_SIZE)):
        for keep_map in keep_maps(sparse, dense, images, labels, names):
            known = isinstance(dataset, ImageSet)
            yield (dataset.name(dataset.items[number]) if known else f"image {number}"), keep_map  # type: ignore[union-attr]
            number += 1


def _entry(name: str, keep_map: KeepMap, label: str | None, scores: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": name,
        "label": None if keep_map.label is None else {"index": keep_map.label, "name": label},
        "kept": [list(stage) for stage in keep_map.kept],
        "kept_pct": list(keep_map.kept_pct),
        "dense": [answer.model_dump() for answer in keep_map.dense],
        "sparse": [answer.model_dump() for answer in keep_map.sparse],
        "kl": keep_map.kl,
        "file": None,
    }
    if scores:
        entry["scores"] = [list(stage) for stage in keep_map.scores]
    return entry


def _save(image: Image.Image, path: Path, result: Drawn) -> Path:
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
    result.files.append(path)
    return path


def _file_name(name: str, taken: set[str]) -> str:
    """A name for the montage of an image: the image's, made safe, numbered where another has it."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(name).stem)[:100].strip(".") or "image"
    chosen, number = f"{stem}.png", 2
    while chosen.lower() in taken or chosen in ("sheet.png", "mean.png"):
        chosen, number = f"{stem}-{number}.png", number + 1
    taken.add(chosen.lower())
    return chosen
