"""Accuracy: several models on the same images in one pass, so that their difference is paired."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprune.common import distributed
from vitprune.common.devices import DTYPES, Precision, explained_out_of_memory
from vitprune.common.progress import SILENT, Listener
from vitprune.data import UNLABELLED, Faults, Images, batches, explain_worker_crash, make_loader
from vitprune.measure import Timing, speedups

_CONFIDENCE_95 = 1.96


@dataclass(frozen=True)
class Predictions:
    """What one model predicts for every image.

    Attributes:
        top: likeliest classes, best first, (num_images, up to 5).
        labels: true classes (num_images,); UNLABELLED where not known.
        kl: KL divergence of the model's prediction from the reference model's, in nats, (num_images,); None of the
            reference itself, or without one. It needs no labels, and distinguishes models on far fewer images
            than accuracy does.
        confidence: probability of the likeliest class, (num_images,); None where not known.
    """

    top: Tensor
    labels: Tensor
    kl: Tensor | None = None
    confidence: Tensor | None = None

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether every image has a label."""
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


def class_accuracy(names: Mapping[int, str], **models: Predictions) -> list[dict[str, Any]]:
    """Top-1 accuracy in percent of several models on the same images, a row a class, for JSON; empty without labels.

    Args:
        names: of the classes, by index of the models' output, where known.
        **models: by the key that their accuracy has in a row.
    """
    if not all(model.labelled for model in models.values()):
        return []
    labels, rows = next(iter(models.values())).labels, []
    for index in sorted(set(labels.tolist())):
        members = labels == index
        shares = {key: _percent(model.correct[members]) for key, model in models.items()}
        rows.append({"index": index, "name": names.get(index), "num_images": int(members.sum()), **shares})
    return rows


def paired_difference(model: Predictions, baseline: Predictions) -> dict[str, Any]:
    """top-1 of `model` less that of `baseline` in points, with a 95 % interval, for JSON; None without labels.

    The interval is that of Bonett and Price (2012) for paired shares: the normal approximation with one image more in
    each kind on which the models differ, so that few images, or no difference among them, do not look like certainty.
    It is narrower than that of two separate samples, because both models see the same images.
    """
    if not (model.labelled and baseline.labelled):
        return {"top1_points": None, "top1_points_ci95": None}
    count = len(model.correct)
    gained, lost = int((model.correct & ~baseline.correct).sum()), int((baseline.correct & ~model.correct).sum())
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = _CONFIDENCE_95 * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    between = [max(-1.0, up - down - half), min(1.0, up - down + half)]
    return {"top1_points": 100 * (gained - lost) / count, "top1_points_ci95": [100 * bound for bound in between]}


def compared(name: str, predictions: Mapping[str, Predictions], timings: Sequence[Timing]) -> dict[str, Any]:
    """How a model differs from the one called "dense", for JSON: accuracy, same predictions, divergence and speed.

    Args:
        name: of the model.
        predictions: by name, on the same images.
        timings: of the same names, from one benchmark.
    """
    model, dense = predictions[name], predictions["dense"]
    return {
        **paired_difference(model, dense),
        "agreement_pct": model.agreement_pct(dense),
        "kl": model.mean_kl,
        "speedup": speedups(name, timings),
    }


@torch.inference_mode()
def predict(
    models: Mapping[str, nn.Module],
    images: Images,
    device: torch.device,
    precision: Precision = "fp32",
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    reference: str | None = None,
    allowed_share: float = 0.0,
    listener: Listener = SILENT,
) -> tuple[dict[str, Predictions], Faults]:
    """Run every model over every image once; of several processes each reads a part, and all know the result.

    Models are moved to the device and left in eval mode; the transform of the images is set. Batch size and number of
    workers are of one process. The others' divergence is measured from the predictions of the model `reference`. At
    most `allowed_share` of the images, in [0, 1], may be unreadable; those are left out.

    Returns:
        Predictions by name, and the unreadable images.

    Raises:
        DataError: an image cannot be read, too many, or all; names it. Or a process that reads them died.
        VitpruneError: out of memory.
    """
    shard = images.shard(distributed.rank(), distributed.world_size())
    loader, faults = make_loader(shard, batch_size, num_workers=num_workers), Faults(allowed_share)
    tops: dict[str, list[Tensor]] = {name: [] for name in models}
    kls: dict[str, list[Tensor]] = {name: [] for name in models if reference not in (None, name)}
    sure: dict[str, list[Tensor]] = {name: [] for name in models}
    labels: list[Tensor] = []
    for model in models.values():
        model.to(device).eval()
    what = f"evaluating {batch_size} images at a time on {device}"
    with explained_out_of_memory(what, "try a lower --batch-size"), explain_worker_crash():
        for batch, batch_labels in batches(loader, faults):
            batch = batch.to(device, non_blocking=True)
            with autocast(device, precision):
                logits = {name: model(batch).float() for name, model in models.items()}
            for name, each in logits.items():
                tops[name].append(each.topk(min(5, each.shape[-1]), dim=-1).indices.cpu())
                sure[name].append(each.softmax(dim=-1).amax(dim=-1).cpu())
            for name, divergences in kls.items():
                divergences.append(_divergence(logits[name], logits[str(reference)]).cpu())
            labels.append(batch_labels)
            listener.advance(len(batch_labels))
    shards = distributed.gather((tops, kls, sure, labels, faults))
    all_faults = Faults.merged([each for *_, each in shards])
    all_labels = [each for *_, labels, _ in shards for each in labels]
    if not all_labels:
        raise all_faults.none_read()
    predictions = {
        name: Predictions(
            torch.cat([each for tops, *_ in shards for each in tops[name]]),
            torch.cat(all_labels),
            torch.cat([each for _, kls, *_ in shards for each in kls[name]]) if name in kls else None,
            torch.cat([each for _, _, sure, *_ in shards for each in sure[name]]),
        )
        for name in models
    }
    return predictions, all_faults


def _divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || model) of each image, (B,), in nats."""
    log_probabilities = logits.log_softmax(dim=-1), reference.log_softmax(dim=-1)
    return F.kl_div(*log_probabilities, reduction="none", log_target=True).sum(dim=-1)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """torch.autocast for "bf16" and "fp16", nothing for "fp32"."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def _percent(mask: Tensor) -> float:
    return 100 * mask.double().mean().item()
