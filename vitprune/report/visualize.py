"""Keep maps of many images, as files: what `vitprune visualize` does."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.checkpoint.metadata import Metadata
from vitprune.common.files import replacing
from vitprune.common.progress import Listener
from vitprune.common.run_folder import RunFolder, is_ours
from vitprune.common.stopping import stopped_error
from vitprune.data import (
    UNLABELLED,
    DataOptions,
    Images,
    ImageSet,
    batches,
    count_images,
    eval_transform,
    image_files,
    make_loader,
    open_data,
    open_image,
    readable_names,
)
from vitprune.errors import DataError, UsageError
from vitprune.loading.load import Loaded, load_dense, load_model
from vitprune.model import SparseViT
from vitprune.report.drawing import Legend, draw_mean, draw_montage
from vitprune.report.keepmaps import NUM_NEIGHBOURS, KeepMap, keep_maps, kept_shares, relations
from vitprune.tasks import Answer, Record, task_named

NUM_DRAWN = 16
"""Images of a folder or a data set that are drawn if nobody says how many."""
_BATCH_SIZE = 16


@dataclass(frozen=True)
class Subject:
    """A sparse model, with at least one stage, and what to compare it with."""

    loaded: Loaded
    sparse: SparseViT
    metadata: Metadata
    dense: nn.Module
    is_dense: bool
    """Whether that is the dense model, and not the fine-tuned backbone with all tokens."""

    @property
    def legend(self) -> Legend:
        """What captions say of the models."""
        about = self.metadata
        dense = "dense" if self.is_dense else "fine-tuned backbone with all tokens"
        merged, truth = about.pruned == "merge", task_named(self.sparse.task).truth
        return Legend(f"{self.loaded.name}, {about.label}", about.stages, merged, dense, truth)


def load_subject(model: str, checkpoint: Path | None, keep: float | None = None) -> Subject:
    """The sparse model `model` and what to compare it with: the dense model, where its weights are at hand.

    Raises:
        UsageError: MODEL is dense, or keeps everything, or was not trained for the keep ratio `keep`.
    """
    loaded = load_model(model)
    loaded.open_at(keep)
    if loaded.sparse is None or loaded.metadata is None:
        raise UsageError(
            f"'{model}' is a dense model: all its tokens are kept, so there is nothing to show",
            f"make it sparse first: vitprune sparsify {shlex.quote(str(model))}",
        )
    if not loaded.sparse.schedule.stages:
        raise UsageError(f"'{model}' keeps all its tokens (keep 1), so there is nothing to show")
    holds_dense = loaded.metadata.model == "demo" or loaded.sparse.blend is not None
    if checkpoint is None and not holds_dense:
        return Subject(loaded, loaded.sparse, loaded.metadata, loaded.sparse.model, is_dense=False)
    dense = load_dense(loaded, checkpoint)
    loaded.understood += dense.understood
    return Subject(loaded, loaded.sparse, loaded.metadata, dense.model, is_dense=True)


def open_images(subject: Subject, files: Sequence[Path], data: str | None, options: DataOptions) -> tuple[Images, bool]:
    """The images to draw, and whether there may be more of them than anyone wants to see.

    They are files and folders of them, or DATA, whose labels are matched with the subject's classes, or with neither
    the demo's, for a demo model.

    Raises:
        UsageError: none are named, or in two ways.
        DataError: they are not there.
    """
    if files and data is not None:
        raise UsageError("IMAGE and --data both say which images", "give one of them")
    if files:
        paths = list(dict.fromkeys(found for path in files for found in image_files(path)))
        read = partial(open_image, max_pixels=options.max_pixels)
        return ImageSet(paths, [UNLABELLED] * len(paths), read), any(path.is_dir() for path in files)
    if data is None and subject.loaded.name != "demo":
        raise UsageError("no images are named", "give image files, folders, or --data DATA")
    spec, classes = data or "demo", subject.loaded.targets
    try:
        return open_data(spec, classes, options).val, True
    except DataError:  # labels that are missing or do not fit are no loss here
        return open_data(spec, classes, options, labels=False).val, True


def visualize(
    subject: Subject,
    images: Images,
    folder: RunFolder,
    listener: Listener,
    *,
    heat: bool = False,
    mean: bool = False,
    limit: int | None = None,
) -> dict[str, Any]:
    """Draw which patches are kept, on the sparse model's device, and say what was found and written, for JSON.

    The arguments are those of `vitprune.visualize`; the transform of the images is set here.

    Raises:
        DataError: an image cannot be read; names it. What came before it is written.
        OutputError: a file cannot be written.
    """
    total = count_images(images)
    if limit is not None:
        if total is not None and limit < total:
            listener.say(f"{limit} of {total} images, chosen at random; --limit N for another number")
        images = images.sample(limit)
    images.transform = eval_transform(subject.sparse.model)
    with folder.claimed(needed_bytes=2**20):
        listener.begin("drawing", count_images(images))
        taken = {path.name.lower() for path in folder.path.glob("*.png") if not is_ours(path)}
        try:
            records: list[dict[str, Record]] = []
            found = _keep_maps(subject, images, records)
            entries = list(_entries(subject, found, None if mean else folder.path, taken, heat, listener))
        except KeyboardInterrupt as error:
            raise stopped_error(error, f"; what is drawn so far is in {folder}", None) from error
        _relate(subject, entries, records, neighbours=not mean)
        kept = [entry["kept"] for entry in entries]
        drawn = _mean(subject, kept, folder.path / _file_name("mean", taken)) if mean else None
    about = subject.metadata
    return {
        "model": subject.loaded.name,
        "keep": about.keep,
        "label": about.label,
        "pruned": about.pruned,
        "grid_size": list(subject.sparse.backbone.grid_size),
        "stages": [asdict(stage) for stage in about.stages],
        "dense": subject.legend.dense,
        "images": entries,
        "mean": drawn,
        "files": [each["file"] for each in ([drawn] if drawn else entries)],
        "output": str(folder),
    }


def _entries(
    subject: Subject,
    found: Iterator[tuple[str, KeepMap]],
    folder: Path | None,
    taken: set[str],
    heat: bool,
    listener: Listener,
) -> Iterator[dict[str, Any]]:
    """What is said of every image; its montage goes into `folder`, if there is one, but not on a name in `taken`."""
    for name, keep_map in found:
        path = None
        if folder is not None:
            path = folder / _file_name(name, taken)
            with replacing(path) as temporary:
                draw_montage(temporary, keep_map, Path(name).name, subject.legend, heat)
        entry: dict[str, Any] = {
            "name": name,
            "label": None if keep_map.label_name is None else {"index": keep_map.label, "name": keep_map.label_name},
            "kept": keep_map.kept,
            "kept_pct": keep_map.kept_pct,
            "dense": _as_json(keep_map.dense),
            "sparse": _as_json(keep_map.sparse),
            "distance": None,
            "file": None if path is None else str(path),
        }
        if keep_map.owners:
            entry["owners"] = keep_map.owners
        if heat:
            entry |= {"scores": keep_map.scores, "redundancy": keep_map.redundancy}
        yield entry
        listener.advance(1)


def _relate(
    subject: Subject, entries: list[dict[str, Any]], records: list[dict[str, Record]], *, neighbours: bool
) -> None:
    """Set how far sparse is from dense, as among all images, and by name which of them are nearest to each."""
    if not entries:
        return
    distances, nearest = relations(task_named(subject.sparse.task), records, neighbours=neighbours)
    for number, (entry, distance) in enumerate(zip(entries, distances, strict=True)):
        entry["distance"] = distance if math.isfinite(distance) else None
        if nearest:
            near = {model: rows[number][:NUM_NEIGHBOURS] for model, rows in nearest.items()}
            entry["neighbours"] = {model: [entries[row]["name"] for row in rows] for model, rows in near.items()}


def _as_json(answer: Answer) -> list[dict[str, Any]] | str:
    return answer if isinstance(answer, str) else [each.model_dump() for each in answer]


def _mean(subject: Subject, kept: list[list[list[int]]], path: Path) -> dict[str, Any]:
    """Draw how often each position is kept."""
    backbone = subject.sparse.backbone
    kept_pct = kept_shares(kept, backbone.num_patches)
    with replacing(path) as temporary:
        draw_mean(temporary, kept_pct, backbone.grid_size, len(kept), subject.legend)
    return {"num_images": len(kept), "kept_pct": kept_pct, "file": str(path)}


def _keep_maps(subject: Subject, images: Images, records: list[dict[str, Record]]) -> Iterator[tuple[str, KeepMap]]:
    """Every image's name, which a stream does not tell, and its keep map; what the task records goes to `records`."""
    sparse = subject.sparse.eval()
    dense = subject.dense.to(next(sparse.parameters()).device).eval()
    known = images.class_names | dict(enumerate(subject.loaded.class_names or ()))
    names = readable_names(known, sparse.num_classes)
    number = count()
    for batch, labels in batches(make_loader(images, _BATCH_SIZE)):
        found, record = keep_maps(sparse, dense, batch, labels, names)
        records.append(record)
        for keep_map in found:
            index = next(number)
            yield images.name(images.items[index]) if isinstance(images, ImageSet) else f"image {index}", keep_map


def _file_name(name: str, taken: set[str]) -> str:
    """A name for the montage of an image: the image's, made safe, numbered where another has it."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(name).stem)[:100].strip(".") or "image"
    names = chain([f"{stem}.png"], (f"{stem}-{number}.png" for number in count(2)))
    chosen = next(each for each in names if each.lower() not in taken)
    taken.add(chosen.lower())
    return chosen
