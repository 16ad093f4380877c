"""Accuracy: several models on the same images in one pass, so that their difference is paired."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprune.common import distributed
from vitprune.common.devices import DTYPES, Precision
from vitprune.common.oom import explained_out_of_memory
from vitprune.data import UNLABELLED, Faults, Images, ImageSet, batches, dead_workers_told, make_loader
from vitprune.errors import DataError

_CONFIDENCE_95 = 1.96


@dataclass(frozen=True)
class Predictions:
    """What one model said of every image.

    Attributes:
        top: likeliest classes, best first, (num_images, up to 5).
        labels: true classes (num_images,); UNLABELLED where not known.
        kl: KL divergence of the model's answer from the reference model's, in nats, (num_images,); None of the
            reference itself, or where there is none. It needs no labels, and tells models apart on far fewer images
            than accuracy does.
    """

    top: Tensor
    labels: Tensor
    kl: Tensor | None = None

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether accuracy can be told."""
        return self.num_images > 0 and not bool((self.labels == UNLABELLED).any())

    @property
    def correct(self) -> Tensor:
        """Whether the likeliest class is right, (num_images,) of bool."""
        return self.top[:, 0] == self.labels

    @property
    def top1_pct(self) -> float | None:
        """Share of images whose likeliest class is right, in percent; None without labels."""
        return _percent(self.correct) if self.labelled else None

    @property
    def top5_pct(self) -> float | None:
        """Share of images with the right class among the five likeliest, in percent; None without labels."""
        return _percent((self.top == self.labels[:, None]).any(dim=1)) if self.labelled else None

    def agreement_pct(self, other: Predictions) -> float:
        """Share of images on which both models give the same class, in percent."""
        return _percent(self.top[:, 0] == other.top[:, 0])

    @property
    def mean_kl(self) -> float | None:
        """Mean of `kl`, in nats."""
        return None if self.kl is None else self.kl.mean().item()

    def summary(self) -> dict[str, Any]:
        """Figures for JSON."""
        return {"top1_pct": self.top1_pct, "top5_pct": self.top5_pct, "num_images": self.num_images}


@dataclass(frozen=True)
class PairedDifference:
    """Difference of top-1 accuracy on the same images, in points, with a 95 % interval."""

    points: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassAccuracy:
    """How often images of one class are recognised.

    Attributes:
        index: of the model's output.
        num_images: images of the class.
        top1_pct: of each model.
    """

    index: int
    num_images: int
    top1_pct: tuple[float, ...]


def class_accuracy(*models: Predictions) -> list[ClassAccuracy]:
    """Top-1 accuracy of several models on the same images, class by class; empty without labels."""
    if not all(model.labelled for model in models):
        return []
    labels, found = models[0].labels, []
    for index in sorted(set(labels.tolist())):
        members = labels == index
        shares = tuple(_percent(model.correct[members]) for model in models)
        found.append(ClassAccuracy(index, int(members.sum()), shares))
    return found


def paired_difference(model: Predictions, baseline: Predictions) -> PairedDifference | None:
    """top-1 of `model` less that of `baseline`, in points; None without labels.

    The interval is the normal approximation over per-image differences (-1, 0, 1), which is narrower than that of
    two separate samples, because both models see the same images.
    """
    if not (model.labelled and baseline.labelled):
        return None
    difference = model.correct.double() - baseline.correct.double()
    mean = difference.mean().item()
    spread = difference.std().item() if len(difference) > 1 else 0.0
    half = _CONFIDENCE_95 * spread / math.sqrt(len(difference))
    return PairedDifference(100 * mean, 100 * (mean - half), 100 * (mean + half))


def paired_points(model: Predictions, baseline: Predictions) -> dict[str, Any]:
    """`paired_difference` for JSON; both entries None without labels."""
    difference = paired_difference(model, baseline)
    if difference is None:
        return {"top1_points": None, "top1_points_ci95": None}
    return {"top1_points": difference.points, "top1_points_ci95": [difference.low, difference.high]}


def compared(
    model: Predictions, dense: Predictions, rates: Mapping[int, float], dense_rates: Mapping[int, float]
) -> dict[str, Any]:
    """How a model differs from the dense one, for JSON: accuracy, same predictions, divergence and speed.

    Args:
        model: its predictions.
        dense: those of the dense model, on the same images.
        rates: images per second by batch size.
        dense_rates: the dense model's, at these batch sizes at least.
    """
    ratios = {size: rate / dense_rates[size] for size, rate in rates.items()}
    return {
        **paired_points(model, dense),
        "agreement_pct": model.agreement_pct(dense),
        "kl": model.mean_kl,
        "speedup": [{"batch_size": size, "speedup": ratio, "slower": ratio < 1} for size, ratio in ratios.items()],
    }


@torch.inference_mode()
def predict(
    models: Mapping[str, nn.Module],
    loader: Any,
    device: torch.device,
    precision: Precision = "fp32",
    on_batch: Callable[[int], None] | None = None,
    reference: str | None = None,
    faults: Faults | None = None,
) -> dict[str, Predictions]:
    """Run every model over every image.

    Args:
        models: by name; used in eval mode and left so.
        loader: see `vitprune.data.make_loader`, not a training one.
        device: where to run; the models are moved there.
        precision: "fp32", or "bf16"/"fp16" by autocast.
        on_batch: called with the number of images of each finished batch.
        reference: name of the model from whose answers the others' divergence is told.
        faults: where unreadable images are counted, which are left out; None if there may be none.

    Raises:
        DataError: an image cannot be read, too many, or all; names it. Or a process that reads them died.
    """
    for model in models.values():
        model.to(device).eval()
    tops: dict[str, list[Tensor]] = {name: [] for name in models}
    kls: dict[str, list[Tensor]] = {name: [] for name in models if reference not in (None, name)}
    all_labels: list[Tensor] = []
    with dead_workers_told():
        for images, labels in batches(loader, faults):
            images = images.to(device, non_blocking=True)
            with autocast(device, precision):
                logits = {name: model(images).float() for name, model in models.items()}
            for name, answer in logits.items():
                tops[name].append(answer.topk(min(5, answer.shape[-1]), dim=-1).indices.cpu())
            for name, parts in kls.items():
                parts.append(_divergence(logits[name], logits[str(reference)]).cpu())
            all_labels.append(labels)
            if on_batch is not None:
                on_batch(len(labels))
    if not all_labels:
        raise DataError("no image could be read", "check the data set with an image viewer")
    labels = torch.cat(all_labels)
    return {
        name: Predictions(torch.cat(parts), labels, torch.cat(kls[name]) if name in kls else None)
        for name, parts in tops.items()
    }


def predict_together(
    models: Mapping[str, nn.Module],
    images: Images,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    precision: Precision,
    on_batch: Callable[[int], None] | None = None,
    reference: str | None = None,
    faults: Faults | None = None,
) -> dict[str, Predictions]:
    """As `predict`, the images shared by all processes: each counts once, and all know the result.

    Args:
        models: as there.
        images: with the evaluation transform set.
        batch_size: of one process.
        num_workers: of one process.
        device: as there.
        precision: as there.
        on_batch: called with the number of images of each batch that this process has finished.
        reference: as there.
        faults: as there; counts those of all processes in the end.

    Raises:
        DataError: as there.
        VitpruneError: out of memory.
    """
    faults = Faults() if faults is None else faults
    part = images.part(distributed.rank(), distributed.world_size())
    loader = make_loader(part, batch_size, num_workers=num_workers)
    own: dict[str, Predictions] | None = None
    if not isinstance(part, ImageSet) or len(part):
        what = f"evaluating {batch_size} images at a time on {device}"
        with explained_out_of_memory(what, "try a lower --batch-size"):
            own = predict(models, loader, device, precision, on_batch, reference, faults)
    everyone = distributed.gather((own, faults.count, faults.seen, faults.names))
    faults.count, faults.seen = (sum(values) for values in list(zip(*everyone, strict=True))[1:3])
    faults.names[:] = list(dict.fromkeys(name for *_, names in everyone for name in names))
    found = [predictions for predictions, *_ in everyone if predictions is not None]
    return {name: _joined([predictions[name] for predictions in found]) for name in models}


def _joined(parts: list[Predictions]) -> Predictions:
    kls = [part.kl for part in parts if part.kl is not None]
    return Predictions(
        torch.cat([part.top for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat(kls) if kls else None,
    )


def _divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || model) of each image, (B,), in nats."""
    answers = logits.log_softmax(dim=-1), reference.log_softmax(dim=-1)
    return F.kl_div(*answers, reduction="none", log_target=True).sum(dim=-1)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """torch.autocast for "bf16" and "fp16", nothing for "fp32"."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def _percent(mask: Tensor) -> float:
    return 100 * mask.double().mean().item()
