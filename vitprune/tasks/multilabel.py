"""Any number of labels an image, each yes or no."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune.model import MaskedOutput, Selection
from vitprune.tasks.base import (
    NUM_SHOWN,
    Answer,
    Change,
    Figure,
    NamedClass,
    Record,
    Results,
    Spread,
    Task,
    changed,
    percent,
)
from vitprune.tasks.differences import spread

_RESAMPLES = 200


@dataclass(frozen=True)
class Decisions(Results):
    """What one model says of every label of every image.

    Attributes:
        logits: (num_images, num_labels); above 0 is yes, a probability above 0.5.
        kl: KL divergence of the labels' probabilities from the dense model's, in nats, mean over labels,
            (num_images,); None of the dense one itself, or without one.
    """

    logits: Tensor
    kl: Tensor | None = None

    @property
    def labelled(self) -> bool:
        """Whether it is known which labels are right."""
        return self.targets.ndim == 2

    def accuracy(self) -> dict[str, Any]:
        """Mean average precision over the labels that occur, and F1 over all decisions, in percent."""
        if not self.labelled:
            return {"map_pct": None, "f1_pct": None}
        said, right = self.logits > 0, self.targets > 0.5
        found = 2 * int((said & right).sum())
        total = int(said.sum() + right.sum())
        return {
            "map_pct": _mean_precision(*_ranked(self.logits, self.targets)),
            "f1_pct": 100 * found / total if total else 100.0,
        }

    @property
    def certainty(self) -> Tensor:
        """As the task has it, (num_images,)."""
        return MultiLabel().certainty(self.logits)

    def same(self, dense: Decisions) -> Tensor:
        """Whether all labels are the same."""
        return ((self.logits > 0) == (dense.logits > 0)).all(dim=1)

    def fidelity(self, dense: Decisions) -> dict[str, Any]:
        """Same decisions as dense, of all labels of all images, and mean KL divergence from it."""
        same = percent((self.logits > 0) == (dense.logits > 0))
        return {"label_agreement_pct": same, "kl": None if self.kl is None else self.kl.mean().item()}

    def change(self, other: Decisions) -> dict[str, Any]:
        """Of the mean average precision; the interval is a paired bootstrap's over the images."""
        if not (self.labelled and other.labelled):
            return changed("map_points", None)
        ranked = [_ranked(each.logits, each.targets) for each in (self, other)]
        ours, theirs = (_mean_precision(*each) for each in ranked)
        if ours is None or theirs is None:
            return changed("map_points", None)
        drawn, generator = [], torch.Generator().manual_seed(0)
        for _ in range(_RESAMPLES):
            rows = torch.randint(self.num_images, (self.num_images,), generator=generator)
            times = torch.bincount(rows, minlength=self.num_images).double()
            first, second = (_mean_precision(*each, times) for each in ranked)
            drawn.append((first or 0.0) - (second or 0.0))
        bounds = torch.tensor(drawn, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        return changed("map_points", (ours - theirs, bounds.tolist()))

    def distances(self, dense: Decisions) -> Tensor:
        """KL divergence, in nats."""
        return binary_divergence(self.logits, dense.logits) if self.kl is None else self.kl


class MultiLabel(Task):
    """Any number of labels an image, by a sigmoid each."""

    name = "multilabel"
    targets = "labels"
    accuracy = (Figure("map_pct", "mAP (%)", "mAP"), Figure("f1_pct", "F1 at 0.5 (%)", "F1"))
    change = Change("map_points", "mAP", "points")
    fidelity = (
        Figure("label_agreement_pct", "same labels as dense (%)", "same"),
        Figure("kl", "KL from dense (nats a label)", "KL", 4, higher_is_better=False),
    )
    rate_reference = 0.02
    problem_type = "multi_label_classification"
    noun = "multi-label image classifier"
    truth = "true labels"
    explained = (
        "mAP: for each label the images are ranked by its probability; its average precision is that of the ranks down "
        "to each right image, and mAP the mean over labels that occur. F1: of all decisions by a probability above "
        "0.5. KL: of each label's two outcomes, mean over labels."
    )

    decides = "label"
    said = "it gives the dense model's labels in {label_agreement_pct} % of all decisions on {images}"

    def distillation(self, student: Selection | MaskedOutput, teacher: Selection, outputs: Spread | None) -> Tensor:
        """KL(teacher || student) of each label's two outcomes, summed over the labels of an image, batch mean."""
        return binary_divergence(student.logits, teacher.logits.detach()).mean() * student.logits.shape[-1]

    def supervision(self, logits: Tensor, labels: Tensor, smoothing: float, outputs: Spread | None) -> Tensor:
        """Binary cross-entropy with labels (B, num_labels), mean over labels and images."""
        return F.binary_cross_entropy_with_logits(logits.float(), labels * (1 - smoothing) + smoothing / 2)

    def influence(self, output: Tensor) -> Tensor:
        """Log-probability of all that it decides."""
        return F.logsigmoid(output.float().abs()).sum()

    def record(self, output: Tensor, reference: Tensor | None = None) -> Record:
        """Logits (B, num_labels) and their divergence."""
        record = {"logits": output.cpu()}
        return record if reference is None else record | {"kl": binary_divergence(output, reference).cpu()}

    def decisions(self, output: Tensor) -> Tensor:
        """Whether each label is given, (N, num_labels)."""
        return output > 0

    def certainty(self, output: Tensor) -> Tensor:
        """Of the label that is least sure the probability of its outcome less that of the other, (N, L) to (N,)."""
        return (output.float().abs().amin(dim=-1) / 2).tanh()

    def margins(self, output: Tensor) -> Tensor:
        """How far each logit is from 0, (N, num_labels)."""
        return output.abs() / spread(output)

    def answers(self, output: Tensor, names: Mapping[int, str], count: int = NUM_SHOWN) -> list[Answer]:
        """The labels that it gives, surest first."""
        ranked = _likeliest(output, names, count)
        return [[each for each in labels if each.probability_pct > 50] or "no label" for labels in ranked]

    def ranked(self, output: Tensor, names: Mapping[int, str], count: int) -> list[Answer]:
        """The likeliest labels, whether given or not."""
        return [*_likeliest(output, names, count)]

    def results(self, record: Record, targets: Tensor) -> Decisions:
        return Decisions(targets, record["logits"], record.get("kl"))

    def right(self, target: Tensor, names: Mapping[int, str]) -> str | None:
        """The labels that the image has."""
        if not target.ndim:
            return None
        rows = (target > 0.5).nonzero().flatten().tolist()
        return "; ".join(names.get(row, f"label {row}") for row in rows) or "no label"


def _likeliest(logits: Tensor, names: Mapping[int, str], count: int) -> list[list[NamedClass]]:
    """The `count` likeliest labels of each image, best first."""
    return [
        [
            NamedClass(index=index, name=names.get(index), probability_pct=100 * shares[index].item())
            for index in shares.argsort(descending=True)[:count].tolist()
        ]
        for shares in logits.float().sigmoid().cpu()
    ]


def binary_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || model) of a label's two outcomes, mean over the labels of each image, (B, L) to (B,), in nats."""
    logits, reference = logits.float(), reference.float()
    yes = reference.sigmoid()
    per_label = yes * (F.logsigmoid(reference) - F.logsigmoid(logits))
    per_label = per_label + (1 - yes) * (F.logsigmoid(-reference) - F.logsigmoid(-logits))
    return per_label.mean(dim=-1)


def _ranked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each label the images by falling logit, and whether the label is right there; both (num_images, L)."""
    order = logits.argsort(dim=0, descending=True, stable=True)
    return order, targets.double().gather(0, order)


def _mean_precision(order: Tensor, right: Tensor, times: Tensor | None = None) -> float | None:
    """Mean over the labels that occur of their average precision, in percent, each image counted so many times."""
    counted = torch.ones_like(right) if times is None else times[order]
    hits = right * counted
    precision = hits.cumsum(dim=0) / counted.cumsum(dim=0).clamp(min=1)
    occur = hits.sum(dim=0)
    if not bool((occur > 0).any()):
        return None
    average = (precision * hits).sum(dim=0) / occur.clamp(min=1)
    return 100 * average[occur > 0].mean().item()
