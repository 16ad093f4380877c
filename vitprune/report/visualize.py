"""Keep maps of many images, as files: what `vitprune visualize` does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.checkpoint.metadata import Metadata
from vitprune.common.files import replacing
from vitprune.common.progress import Listener
from vitprune.common.run_folder import RunFolder
from vitprune.data import (
    UNLABELLED,
    DataOptions,
    Images,
    ImageSet,
    ModelClasses,
    batches,
    count_images,
    eval_transform,
    make_loader,
    open_data,
    open_image,
    read_folder,
    readable_names,
)
from vitprune.errors import DataError, UsageError
from vitprune.loading.load import Loaded, load_dense, load_model
from vitprune.model import SparseViT
from vitprune.report.drawing import Legend, draw_mean, draw_montage
from vitprune.report.keepmaps import KeepMap, keep_maps, kept_shares

NUM_DRAWN = 16
"""Images of a folder or a data set that are drawn if nobody says how many."""
_BATCH_SIZE = 16


@dataclass(frozen=True)
class Subject:
    """A sparse model and what to compare it with.

    Attributes:
        loaded: the sparse model's file.
        sparse: the sparse model, with at least one stage.
        dense: the dense model, or the fine-tuned backbone with all tokens.
        is_dense: whether it is the dense model.
        metadata: of the sparse model.
    """

    loaded: Loaded
    sparse: SparseViT
    dense: nn.Module
    is_dense: bool
    metadata: Metadata

    @property
    def legend(self) -> Legend:
        """What captions say of the models."""
        about = self.metadata
        dense = "dense" if self.is_dense else "fine-tuned backbone with all tokens"
        return Legend(f"{self.loaded.name}, {about.label}", about.stages, about.dropped == "fold", dense)


@dataclass(frozen=True)
class DrawOptions:
    """What to draw.

    Attributes:
        folder: where files go; it is made where it does not exist.
        heat: add heat maps of the predictors' keep scores.
        mean: how often each position stays, over all images, instead of a montage for each.
        limit: at most so many images, chosen at random; None for all.
    """

    folder: Path
    heat: bool = False
    mean: bool = False
    limit: int | None = None


@dataclass
class DrawResult:
    """What was found and written.

    Attributes:
        images: one entry an image, for JSON.
        mean: how often each position stays, if that was drawn.
        files: all that were written, in order.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    mean: dict[str, Any] | None = None
    files: list[Path] = field(default_factory=list)

    def as_json(self, subject: Subject, folder: Path) -> dict[str, Any]:
        """The same with what it is of, for JSON."""
        about = subject.metadata
        return {
            "model": subject.loaded.name,
            "keep": about.keep,
            "label": about.label,
            "dropped": about.dropped,
            "grid_size": list(subject.sparse.backbone.grid_size),
            "stages": [asdict(stage) for stage in about.stages],
            "dense": subject.legend.dense,
            "pictures": self.images,
            "mean": self.mean,
            "files": [str(file) for file in self.files],
            "output": str(folder),
        }


def load_subject(model: str, checkpoint: Path | None) -> Subject:
    """The sparse model `model` and what to compare it with: the dense model if its weights are in `checkpoint`.

    Raises:
        UsageError: MODEL is dense, or keeps everything.
    """
    loaded = load_model(model)
    if loaded.sparse is None or loaded.metadata is None:
        raise UsageError(
            f"'{model}' is a dense model: all its tokens stay, so there is nothing to show",
            f"make it sparse first: vitprune sparsify {model}",
        )
    if not loaded.sparse.schedule.stages:
        raise UsageError(f"'{model}' keeps all its tokens (keep 1), so there is nothing to show")
    if checkpoint is None and loaded.metadata.model != "demo":
        return Subject(loaded, loaded.sparse, loaded.sparse.model, False, loaded.metadata)
    return Subject(loaded, loaded.sparse, load_dense(loaded, checkpoint).model, True, loaded.metadata)


def open_images(subject: Subject, files: Sequence[Path], data: str | None, options: DataOptions) -> tuple[Images, bool]:
    """The images to draw, and whether there may be more of them than anyone wants to see.

    Args:
        subject: whose classes the labels of `data` are matched with.
        files: image files, and folders of them.
        data: DATA, instead of `files`; None with neither is the demo's, for a demo model.
        options: of `data`.

    Raises:
        UsageError: none are named, or in two ways.
        DataError: they are not there.
    """
    if files and data is not None:
        raise UsageError("IMAGE and --data both say which images", "give one of them")
    if files:
        return _from_files(files), any(path.is_dir() for path in files)
    if data is None and subject.loaded.name != "demo":
        raise UsageError("no images are named", "give image files, folders, or --data DATA")
    spec, classes = data or "demo", ModelClasses(subject.sparse.num_classes, subject.loaded.class_names)
    try:
        return open_data(spec, classes, options).val, True
    except DataError:  # labels that are missing or do not fit are no loss here
        return open_data(spec, classes, options, labels=False).val, True


def visualize(subject: Subject, images: Images, options: DrawOptions, listener: Listener) -> DrawResult:
    """Draw which patches stay.

    Args:
        subject: the models; the sparse one says the device.
        images: what to draw; the transform is set here.
        options: which files.
        listener: told of every image.

    Raises:
        DataError: an image cannot be read; names it. What came before it is written.
        OutputError: a file cannot be written.
    """
    total = count_images(images)
    if options.limit is not None:
        if total is not None and options.limit < total:
            listener.say(f"{options.limit} of {total} images, chosen at random; --limit N for another number")
        images = images.sample(options.limit)
    RunFolder(options.folder).create(needed_bytes=2**20)
    listener.begin("drawing", count_images(images))
    try:
        return _drawn(subject, images, options, listener)
    except BaseException:
        with suppress(OSError):  # it holds something, then
            options.folder.rmdir()
        raise


def _drawn(subject: Subject, images: Images, options: DrawOptions, listener: Listener) -> DrawResult:
    sparse, legend = subject.sparse.eval(), subject.legend
    images.transform = eval_transform(sparse.model)
    result = DrawResult()
    taken: set[str] = set()
    for name, label, keep_map in _keep_maps(subject, images):
        entry = _entry(name, keep_map, label, options.heat)
        if not options.mean:
            path = options.folder / _file_name(name, taken)
            with replacing(path) as temporary:
                draw_montage(temporary, keep_map, Path(name).name, legend, label, options.heat)
            result.files.append(path)
            entry["file"] = str(path)
        result.images.append(entry)
        listener.advance(1)
    if options.mean:
        path = options.folder / "mean.png"
        num_images = len(result.images)
        kept_pct = kept_shares([entry["kept"] for entry in result.images], sparse.backbone.num_patches)
        with replacing(path) as temporary:
            draw_mean(temporary, kept_pct, sparse.backbone.grid_size, num_images, legend)
        result.files.append(path)
        result.mean = {"num_images": num_images, "kept_pct": kept_pct, "file": str(path)}
    return result


def _keep_maps(subject: Subject, images: Images) -> Iterator[tuple[str, str | None, KeepMap]]:
    """Every image's name, which a stream does not tell, its class where that is known, and its keep map."""
    sparse = subject.sparse
    dense = subject.dense.to(next(sparse.parameters()).device).eval()
    known = images.class_names | dict(enumerate(subject.loaded.class_names or ()))
    names = readable_names(known, sparse.num_classes)
    number = 0
    for batch, labels in batches(make_loader(images, _BATCH_SIZE)):
        for keep_map in keep_maps(sparse, dense, batch, labels, names):
            name = images.name(images.items[number]) if isinstance(images, ImageSet) else f"image {number}"
            label = None if keep_map.label is None else names.get(keep_map.label, f"class {keep_map.label}")
            yield name, label, keep_map
            number += 1


def _from_files(files: Sequence[Path]) -> ImageSet:
    paths: list[Path] = []
    for path in files:
        if path.is_dir():
            paths += read_folder(path, None).items
        elif path.is_file():
            paths.append(path)
        else:
            raise DataError(f"there is no image or folder '{path}'", "check the path")
    paths = list(dict.fromkeys(paths))
    return ImageSet(paths, [UNLABELLED] * len(paths), open_image)


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


def _file_name(name: str, taken: set[str]) -> str:
    """A name for the montage of an image: the image's, made safe, numbered where another has it."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(name).stem)[:100].strip(".") or "image"
    chosen, number = f"{stem}.png", 2
    while chosen.lower() in taken:
        chosen, number = f"{stem}-{number}.png", number + 1
    taken.add(chosen.lower())
    return chosen
