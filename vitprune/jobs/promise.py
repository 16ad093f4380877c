"""`eval --fidelity`: choose passes and a threshold by some images, with a guarantee, and measure on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError
from torch import nn

from vitprune.adaptive import AdaptiveViT, Watched, account, cheapest_promise, check_enough, curve
from vitprune.backbones import input_size
from vitprune.checkpoint.weight_file import check_exists
from vitprune.common.devices import Precision
from vitprune.common.files import check_new_file, read_json, write_json, write_text
from vitprune.common.formatting import first_fault
from vitprune.common.json_version import SCHEMA_VERSION
from vitprune.common.progress import Listener
from vitprune.data import Data, Faults, Images, ImageSet, eval_transform, readable_names
from vitprune.errors import UsageError
from vitprune.evaluation import compared, predict
from vitprune.jobs.identity import fingerprint_of_weights
from vitprune.jobs.side_by_side import bench, over_images
from vitprune.jobs.sparsify import at_ratios
from vitprune.loading.load import Loaded
from vitprune.measure import count_macs
from vitprune.model import SparseViT
from vitprune.report.promise_page import render_promise_page
from vitprune.report.samples import Routed, choose_routed
from vitprune.tasks import Results, Task


@dataclass(frozen=True)
class Asked:
    """What is to be promised.

    Attributes:
        fidelity_pct: share of images whose answer is to be the dense model's; or
        max_kl: mean over the images of the KL divergence from it, each counted as 1 at most.
        confidence: with which it is to hold.
        num_images: to choose passes and threshold by; the others measure.
        keep: ratio of the first pass; None for the file's, or of a file of a range the one that costs least.

    Raises:
        UsageError: not one of the first two is given, or a number is out of range.
    """

    fidelity_pct: float | None = None
    max_kl: float | None = None
    confidence: float = 0.95
    num_images: int = 600
    keep: float | None = None

    def __post_init__(self) -> None:
        if self.fidelity_pct is None and self.max_kl is None:
            raise UsageError("there is nothing to promise", "try --fidelity 99, or --max-kl 0.01")
        if self.fidelity_pct is not None and self.max_kl is not None:
            raise UsageError("--fidelity and --max-kl are mutually exclusive", "give one of them")
        if self.fidelity_pct is not None and not 50 <= self.fidelity_pct < 100:
            raise UsageError(
                f"--fidelity is {self.fidelity_pct:g}, expected percent from 50 to below 100", "try --fidelity 99"
            )
        if self.max_kl is not None and not 0 < self.max_kl < 1:
            raise UsageError(f"--max-kl is {self.max_kl:g}, expected nats between 0 and 1", "try --max-kl 0.01")
        if not 0.5 <= self.confidence < 1:
            raise UsageError(
                f"--confidence is {self.confidence:g}, expected a share from 0.5 to below 1", "try --confidence 0.95"
            )

    @property
    def risk(self) -> float:
        """The mean loss that is promised not to be passed."""
        return 1 - self.fidelity_pct / 100 if self.fidelity_pct is not None else float(self.max_kl or 0)

    def losses(self, model: Results, dense: Results) -> np.ndarray[Any, Any]:
        """Of each image, in [0, 1]."""
        if self.max_kl is not None:
            return model.distances(dense).double().clamp(0, 1).numpy()
        same = model.same(dense)
        assert same is not None
        return (~same).double().numpy()


@dataclass(frozen=True)
class How:
    """Where and how it is measured; the fields are those of `vitprune.evaluation.predict` and `measure.benchmark`."""

    device: torch.device
    precision: Precision
    batch_size: int
    num_workers: int
    allowed_share: float = 0.0
    batch_sizes: Sequence[int] = (1, 8, 32, 128)
    bench_seconds: float = 2.0


def keep_promise(
    loaded: Loaded, dense: nn.Module, data: Data, task: Task, asked: Asked, how: How, listener: Listener
) -> tuple[AdaptiveViT, Routed]:
    """Choose passes and threshold by a random part of the images; measure fidelity, cost and speed on the others.

    Args:
        loaded: with the sparse model, the first pass, or of a file of a range the one at the ratio that costs least.
        dense: the model it was made from, which decides where the first pass is not sure.
        data: images of the kind that is promised for; at least some more than `asked.num_images`.
        task: what the models are for.
        asked: the promise.
        how: how it is measured.
        listener: shows how far it is.

    Returns:
        The passes, whose `promise` says what was promised and measured, for JSON; and the images that measured it.

    Raises:
        UsageError: too few images, a stream of them, or passes that do not go together.
        DataError: too many images cannot be read.
    """
    assert loaded.sparse is not None
    cascades = [AdaptiveViT([each, dense], threshold=2.0) for each in _firsts(loaded.sparse, asked.keep)]
    chosen_by, others = _parts(data.val, asked, several=len(cascades) > 1)
    listener.begin("choosing passes and threshold", len(chosen_by))
    adaptive, chosen, faults = _chosen(cascades, chosen_by, task, asked, how, listener)
    listener.begin("measuring on other images", len(others))
    models = {"dense": dense, "sparse": adaptive.models[0], "adaptive": adaptive}
    adaptive.ended = []
    found, more_faults = _predicted(models, others, task, how, listener)
    ended, adaptive.ended = adaptive.ended, None
    faulty, size = Faults.merged([faults, more_faults]), input_size(dense)
    costs, routed = adaptive.costs(size), _routed(others, more_faults, found, np.array(ended) > 0)
    watched = _watched(found["sparse"], found["dense"], asked, costs)
    timed = models | {"adaptive": over_images(adaptive, others, how.batch_sizes)}
    timings = bench(timed, how.device, how.precision, how.bench_seconds, listener, how.batch_sizes)
    adaptive.promise = {
        "model": loaded.name,
        "task": task.name,
        "data": data.name,
        "precision": how.precision,
        "device": str(how.device),
        "asked": {"fidelity_pct": asked.fidelity_pct, "max_kl": asked.max_kl, "confidence": asked.confidence},
        "weights": fingerprint_of_passes(loaded.sparse, dense),
        **chosen,
        "num_images": found["adaptive"].num_images,
        **found["adaptive"].fidelity(found["dense"]),
        "loss": float(asked.losses(found["adaptive"], found["dense"]).mean()),
        **account(ended, costs),
        "went_on": [routed.images.name(routed.images.items[row]) for row in np.flatnonzero(routed.went_on).tolist()],
        "costs": [{"gmacs": costs[number] / 1e9, "num_images": ended.count(number)} for number in sorted(set(ended))],
        "curve": [each._asdict() for each in curve(watched, adaptive.models[0].label)],
        "gmacs_sparse": costs[0] / 1e9,
        "gmacs_dense": count_macs(dense, size) / 1e9,
        "delta": compared("adaptive", found, timings),
        "fixed": compared("sparse", found, timings),
        "speed": [
            {"model": each.model, "batch_size": each.batch_size, "images_per_s": each.images_per_s} for each in timings
        ],
        "num_unreadable": faulty.count,
        "unreadable": faulty.names,
        "remarks": faulty.remarks,
    }
    return adaptive, routed


def check_outputs(outputs: Sequence[Path], *, overwrite: bool) -> None:
    """Make sure, before the work, that `write_outputs` can write these.

    Raises:
        UsageError: one is neither .html nor .json.
        OutputError: one exists, or cannot be written.
    """
    for output in outputs:
        if output.suffix not in (".html", ".json"):
            raise UsageError(
                f"--output is '{output}', and what is written is a page or the figures", "name it .html or .json"
            )
        check_new_file(output, overwrite=overwrite)


def write_outputs(outputs: Sequence[Path], loaded: Loaded, data: Data, adaptive: AdaptiveViT, routed: Routed) -> None:
    """Write what `keep_promise` gave: the figures, which `read_promise` reads, as .json, or a page as .html."""
    result = adaptive.promise
    assert result is not None
    for output in outputs:
        if output.suffix == ".json":
            write_json(output, {"schema_version": SCHEMA_VERSION} | result)
            continue
        first, dense = adaptive.models
        names = readable_names(data.val.class_names | dict(enumerate(loaded.class_names or ())), first.num_classes)
        shown = choose_routed(first, dense.model, routed, names, torch.device(result["device"]))
        write_text(output, render_promise_page(result, shown))


class KeptPromise(BaseModel):
    """What `keep_promise` gave, as far as a model is made of it again."""

    schema_version: Literal[2] = SCHEMA_VERSION
    threshold: float | None = Field(ge=0, le=1)
    keep: float | None
    weights: str
    asked: dict[str, Any]
    calibration: dict[str, Any]


def read_promise(path: Path) -> KeptPromise:
    """A promise out of the file that `eval --fidelity 99 -o FILE` wrote.

    Raises:
        CheckpointError: the file is not found or damaged.
        UsageError: it holds something else.
    """
    check_exists(path)
    try:
        return KeptPromise.model_validate(read_json(path))
    except ValidationError as error:
        raise UsageError(
            f"'{path}' holds no promise: {first_fault(error)}",
            "vitprune eval MODEL DATA --fidelity 99 -o FILE writes one",
        ) from error


def as_promised(made: KeptPromise, sparse: SparseViT, dense: nn.Module) -> AdaptiveViT:
    """The model that a promise was made of.

    Raises:
        UsageError: it was made of other weights, or saves nothing.
    """
    if made.weights != fingerprint_of_passes(sparse, dense):
        raise UsageError(
            "the promise was made of other weights than these", "promise anew: vitprune eval --fidelity 99"
        )
    if made.threshold is None:
        raise UsageError("of this promise all images go on, which costs more than the dense model", "promise less")
    first = sparse if made.keep is None else sparse.at(made.keep)
    adaptive = AdaptiveViT([first, dense], made.threshold)
    adaptive.promise = made.model_dump()
    return adaptive


def fingerprint_of_passes(sparse: SparseViT, dense: nn.Module) -> str:
    """Of all weights that a promise hangs on, whatever the keep ratio."""
    return fingerprint_of_weights(nn.ModuleList([sparse.blend or sparse.model, sparse.predictors, dense]))


def _firsts(sparse: SparseViT, keep: float | None) -> list[SparseViT]:
    """What may be the first pass: the model at the ratio that is asked for, or at several of its range."""
    if keep is not None:
        return [sparse.at(keep)]
    return sorted([sparse, *at_ratios(sparse).values()], key=lambda each: each.keep or 0.0)


def _chosen(
    cascades: Sequence[AdaptiveViT], images: ImageSet, task: Task, asked: Asked, how: How, listener: Listener
) -> tuple[AdaptiveViT, dict[str, Any], Faults]:
    """The cascade that costs least, with its threshold, and what is promised of it, for JSON."""
    dense = cascades[0].models[-1].model
    found, faults = _predicted(
        {"dense": dense, **{each.label: each.models[0] for each in cascades}}, images, task, how, listener
    )
    watched = [_watched(found[each.label], found["dense"], asked, each.costs(input_size(dense))) for each in cascades]
    number, made = cheapest_promise(watched, asked.risk, asked.confidence)
    adaptive = cascades[number]
    adaptive.threshold = made.threshold
    return (
        adaptive,
        {
            "keep": adaptive.models[0].keep,
            "label": adaptive.label,
            "chosen_from": [each.label for each in cascades],
            "threshold": made.threshold if made.threshold <= 1 else None,
            "calibration": {
                "num_images": made.num_images,
                "num_choosing": found["dense"].num_images - made.num_images,
                "loss": made.loss,
                "bound": made.bound,
                "went_on_pct": made.share_pct[-1],
                "gmacs_mean": made.gmacs,
            },
        },
        faults,
    )


def _parts(images: Images, asked: Asked, *, several: bool) -> tuple[ImageSet, ImageSet]:
    """A random part to choose by, always the same, and the others.

    Raises:
        UsageError: there are too few, or they are a stream.
    """
    if not isinstance(images, ImageSet):
        raise UsageError(
            "a promise is made by a random sample of the images, and a stream cannot be sampled",
            "leave out --streaming, or give a folder",
        )
    check_enough(asked.num_images, asked.risk, asked.confidence, several=several)
    if len(images) <= asked.num_images:
        raise UsageError(
            f"there are {len(images)} images; {asked.num_images} choose the threshold, and others have to measure it",
            "give more images, or a lower --calibrate",
        )
    rest, chosen = images.split(asked.num_images / len(images))
    return chosen, rest


def _predicted(
    models: Mapping[str, nn.Module], images: ImageSet, task: Task, how: How, listener: Listener
) -> tuple[dict[str, Results], Faults]:
    images.transform = eval_transform(models["dense"])
    return predict(
        models,
        images,
        how.device,
        how.precision,
        task=task,
        batch_size=how.batch_size,
        num_workers=how.num_workers,
        reference="dense",
        allowed_share=how.allowed_share,
        listener=listener,
    )


def _watched(first: Results, dense: Results, asked: Asked, costs: Sequence[int]) -> list[Watched]:
    """What a first pass and the dense model gave for every image."""
    assert first.certainty is not None
    nothing = np.zeros(dense.num_images)
    sure = first.certainty.double().numpy()
    return [Watched(sure, asked.losses(first, dense), costs[0]), Watched(nothing, nothing, costs[-1])]


def _routed(images: ImageSet, faults: Faults, found: Mapping[str, Results], went_on: np.ndarray[Any, Any]) -> Routed:
    """Which image is which, of those that could be read."""
    readable = images.subset(sorted({*range(len(images))}.difference(faults.rows)))
    sure, same = found["sparse"].certainty, found["sparse"].same(found["dense"])
    assert sure is not None
    assert same is not None
    return Routed(readable, sure.numpy(), same.numpy(), went_on)
