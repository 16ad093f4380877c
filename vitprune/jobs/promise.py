"""`eval --fidelity`: choose a threshold by some images, with a guarantee, and measure on others what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.adaptive import AdaptiveViT, Watched, curve, images_needed, promise
from vitprune.backbones import input_size
from vitprune.common.devices import Precision
from vitprune.common.progress import Listener
from vitprune.data import Faults, Images, ImageSet, batches, eval_transform, make_loader
from vitprune.errors import UsageError
from vitprune.evaluation import compared, predict
from vitprune.measure import benchmark, count_macs
from vitprune.model import SparseViT
from vitprune.report.samples import Routed
from vitprune.tasks import Results, Task


@dataclass(frozen=True)
class Asked:
    """What is to be promised.

    Attributes:
        fidelity_pct: share of images whose answer is to be the dense model's; or
        max_kl: mean over the images of the KL divergence from it, each counted as 1 at most.
        confidence: with which it is to hold.
        num_images: to choose the threshold by; the others measure.

    Raises:
        UsageError: not one of the first two is given, or a number is out of range.
    """

    fidelity_pct: float | None = None
    max_kl: float | None = None
    confidence: float = 0.95
    num_images: int = 600

    def __post_init__(self) -> None:
        if (self.fidelity_pct is None) == (self.max_kl is None):
            raise UsageError("--fidelity and --max-kl are mutually exclusive", "give one of them")
        if self.fidelity_pct is not None and not 50 <= self.fidelity_pct < 100:
            raise UsageError(
                f"--fidelity is {self.fidelity_pct:g}, expected percent from 50 to below 100", "try --fidelity 99"
            )
        if self.max_kl is not None and not 0 < self.max_kl < 1:
            raise UsageError(f"--max-kl is {self.max_kl:g}, expected nats between 0 and 1", "try --max-kl 0.01")

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
    allowed_share: float
    batch_sizes: Sequence[int]
    bench_seconds: float


def keep_promise(
    sparse: SparseViT, dense: nn.Module, images: Images, task: Task, asked: Asked, how: How, listener: Listener
) -> tuple[dict[str, Any], Routed]:
    """Choose the threshold on a random part of the images, measure fidelity, cost and speed on the others.

    Args:
        sparse: the first pass.
        dense: the model it was made from, which decides where the first pass is not sure.
        images: of the kind that is promised for; at least some more than `asked.num_images`.
        task: what the models are for.
        asked: the promise.
        how: how it is measured.
        listener: shows how far it is.

    Returns:
        What was promised and measured, for JSON; and the images that measured it.

    Raises:
        UsageError: too few images, a stream of them, or passes that do not go together.
        DataError: too many images cannot be read.
    """
    adaptive = AdaptiveViT([sparse, dense], threshold=2.0)
    adaptive.to(how.device).eval()
    chosen_by, others = _parts(images, asked)
    size = input_size(dense)
    macs = adaptive.costs(size)
    listener.begin("choosing the threshold", len(chosen_by))
    models = {"dense": dense, "sparse": sparse}
    found, faults = _predicted(models, chosen_by, task, how, listener)
    made = promise(_watched(found, asked, macs), asked.risk, asked.confidence)
    adaptive.threshold, adaptive.ended = made.threshold, []
    listener.begin("measuring on other images", len(others))
    found, more_faults = _predicted({**models, "adaptive": adaptive}, others, task, how, listener)
    ended, adaptive.ended = np.array(adaptive.ended), None
    spent = np.array(macs)[ended] / 1e9
    routed = _routed(others, more_faults, found, ended > 0)
    listener.begin("measuring speed", 3 * len(how.batch_sizes))
    timings = benchmark(
        _over(others, {**models, "adaptive": adaptive}, max(how.batch_sizes)),
        size,
        how.batch_sizes,
        device=how.device,
        precision=how.precision,
        min_seconds=how.bench_seconds,
        listener=listener,
    )
    delta = compared("adaptive", found, timings)
    at_fixed = compared("sparse", found, timings)
    faulty = Faults.merged([faults, more_faults])
    result = {
        "asked": {"fidelity_pct": asked.fidelity_pct, "max_kl": asked.max_kl, "confidence": asked.confidence},
        "threshold": made.threshold if made.threshold <= 1 else None,
        "calibration": {
            "num_images": made.num_images,
            "loss": made.loss,
            "bound": made.bound,
            "went_on_pct": made.share_pct[-1],
            "gmacs_mean": made.gmacs,
        },
        "num_images": found["adaptive"].num_images,
        **found["adaptive"].fidelity(found["dense"]),
        "loss": float(asked.losses(found["adaptive"], found["dense"]).mean()),
        "went_on_pct": 100 * float((ended > 0).mean()),
        "went_on": [routed.images.name(routed.images.items[row]) for row in np.flatnonzero(routed.went_on).tolist()],
        "costs": [
            {"gmacs": float(gmacs), "num_images": int(count)}
            for gmacs, count in zip(*np.unique(spent, return_counts=True), strict=True)
        ],
        "curve": [each._asdict() for each in curve(_watched(found, asked, macs), sparse.label)],
        "gmacs_mean": float(spent.mean()),
        "gmacs_worst": macs[-1] / 1e9,
        "gmacs_sparse": count_macs(sparse, size) / 1e9,
        "gmacs_dense": count_macs(dense, size) / 1e9,
        "delta": delta,
        "fixed": at_fixed,
        "speed": [
            {"model": each.model, "batch_size": each.batch_size, "images_per_s": each.images_per_s} for each in timings
        ],
        "num_unreadable": faulty.count,
        "unreadable": faulty.names,
        "remarks": faulty.remarks,
    }
    return result, routed


def _parts(images: Images, asked: Asked) -> tuple[ImageSet, ImageSet]:
    """A random part to choose by, always the same, and the others.

    Raises:
        UsageError: there are too few, or they are a stream.
    """
    if not isinstance(images, ImageSet):
        raise UsageError(
            "a promise is made by a random sample of the images, and a stream cannot be sampled",
            "leave out --streaming, or give a folder",
        )
    needed = images_needed(asked.risk, 1 - asked.confidence)
    if asked.num_images < needed:
        raise UsageError(
            f"--calibrate is {asked.num_images}, and what is asked for takes at least {needed} images at "
            f"{100 * asked.confidence:g} % confidence, if none of them loses anything",
            f"--calibrate {2 * needed}, or promise less",
        )
    if len(images) <= asked.num_images:
        raise UsageError(
            f"there are {len(images)} images; {asked.num_images} choose the threshold, and others have to measure it",
            f"give more images, or --calibrate N with N from {needed} to {max(needed, len(images) - 1)}",
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


def _watched(found: Mapping[str, Results], asked: Asked, macs: Sequence[int]) -> list[Watched]:
    """What the sparse and the dense model gave for every image."""
    sure = found["sparse"].certainty
    assert sure is not None
    nothing = np.zeros(found["dense"].num_images)
    return [
        Watched(sure.double().numpy(), asked.losses(found["sparse"], found["dense"]), macs[0]),
        Watched(nothing, nothing, macs[1]),
    ]


def _routed(images: ImageSet, faults: Faults, found: Mapping[str, Results], went_on: np.ndarray[Any, Any]) -> Routed:
    """Which image is which, of those that could be read."""
    readable = images.subset(sorted({*range(len(images))}.difference(faults.rows)))
    sure, same = found["sparse"].certainty, found["sparse"].same(found["dense"])
    assert sure is not None
    assert same is not None
    return Routed(readable, sure.numpy(), same.numpy(), went_on)


class _OfImages(nn.Module):
    """A model that is timed on real images, one batch after another: what it costs hangs on what they show."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.model, self.next = model, 0
        self.register_buffer("images", images)

    def forward(self, like: Tensor) -> Tensor:
        images, size = self.get_buffer("images"), len(like)
        first = self.next if self.next + size <= len(images) else 0
        self.next = first + size
        result: Tensor = self.model(images[first : self.next])
        return result


def _over(images: ImageSet, models: Mapping[str, nn.Module], at_least: int) -> dict[str, nn.Module]:
    """The models over the same real images, which are read once; where they are fewer than `at_least`, in turns."""
    loader, read = make_loader(images, 64, num_workers=0), list[Tensor]()
    for batch, _ in batches(loader, Faults(1.0)):
        read.append(batch)
        if sum(map(len, read)) >= max(256, at_least):
            break
    real = torch.cat(read)
    real = real.repeat(-(-at_least // len(real)), 1, 1, 1)
    return {name: _OfImages(model, real) for name, model in models.items()}
