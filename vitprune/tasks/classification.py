"""One class an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
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
    paired_shares,
    percent,
)
from vitprune.tasks.differences import spread
from vitprune.tokens.losses import distillation_loss

_TOP = 5


@dataclass(frozen=True)
class Predictions(Results):
    """What one model predicts for every image.

    Attributes:
        top: likeliest classes, best first, (num_images, up to 5).
        kl: KL divergence of the model's prediction from the dense model's, in nats, (num_images,); None of the dense
            one itself, or without one. It needs no labels, and distinguishes models on far fewer images than
            accuracy does.
        confidence: probability of the likeliest class, (num_images,); None where not known.
        certainty: that less the next class', likewise.
    """

    top: Tensor
    kl: Tensor | None = None
    confidence: Tensor | None = None
    certainty: Tensor | None = None

    @property
    def correct(self) -> Tensor:
        """Whether the likeliest class is right, (num_images,) of bool."""
        return self.top[:, 0] == self.targets

    @property
    def top1_pct(self) -> float | None:
        """Share of images whose likeliest class is right, in percent; None without labels."""
        return percent(self.correct) if self.labelled else None

    @property
    def top5_pct(self) -> float | None:
        """Share of images with the right class among the five likeliest, in percent; None without labels."""
        return percent((self.top == self.targets[:, None]).any(dim=1)) if self.labelled else None

    @property
    def mean_kl(self) -> float | None:
        """Mean of `kl`, in nats."""
        return None if self.kl is None else self.kl.mean().item()

    def agreement_pct(self, other: Predictions) -> float:
        """Share of images on which both models give the same class, in percent."""
        return percent(self.same(other))

    def accuracy(self) -> dict[str, Any]:
        """Top-1 and top-5 accuracy."""
        return {"top1_pct": self.top1_pct, "top5_pct": self.top5_pct}

    def same(self, dense: Predictions) -> Tensor:
        """Whether the likeliest class is the same."""
        return self.top[:, 0] == dense.top[:, 0]

    def fidelity(self, dense: Predictions) -> dict[str, Any]:
        """Same class as dense, and mean KL divergence from it."""
        return {"agreement_pct": self.agreement_pct(dense), "kl": self.mean_kl}

    def change(self, other: Predictions) -> dict[str, Any]:
        """Of top-1."""
        labelled = self.labelled and other.labelled
        return changed("top1_points", paired_shares(self.correct, other.correct) if labelled else None)

    def only(self, chosen: Tensor) -> Predictions:
        """Of some images, by a mask (num_images,)."""
        known = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: value[chosen] for name, value in known.items() if value is not None})

    def distances(self, dense: Predictions) -> Tensor:
        """KL divergence, in nats."""
        return (self.top[:, 0] != dense.top[:, 0]).double() if self.kl is None else self.kl


class Classification(Task):
    """One class an image, by softmax."""

    name = "classification"
    accuracy = (Figure("top1_pct", "top-1 (%)", "top-1"), Figure("top5_pct", "top-5 (%)", "top-5"))
    problem_type = "single_label_classification"
    change = Change("top1_points", "top-1", "points")
    fidelity = (
        Figure("agreement_pct", "same prediction as dense (%)", "same", 1),
        Figure("kl", "KL from dense (nats)", "KL", 3, higher_is_better=False),
    )

    decides = "class"
    said = "it predicts the dense model's class on {agreement_pct} % of {images}"

    def distillation(self, student: Selection | MaskedOutput, teacher: Selection, outputs: Spread | None) -> Tensor:
        """KL(teacher || student)."""
        return distillation_loss(student.logits, teacher.logits)

    def influence(self, output: Tensor) -> Tensor:
        """Log-probability of the likeliest class."""
        return output.float().log_softmax(dim=-1).amax(dim=-1).sum()

    def record(self, output: Tensor, reference: Tensor | None = None) -> Record:
        """Likeliest classes, confidence and divergence of logits (B, num_classes)."""
        record = {
            "top": output.topk(min(_TOP, output.shape[-1]), dim=-1).indices.cpu(),
            "confidence": output.softmax(dim=-1).amax(dim=-1).cpu(),
            "certainty": self.certainty(output).cpu(),
        }
        return record if reference is None else record | {"kl": divergence(output, reference).cpu()}

    def decisions(self, output: Tensor) -> Tensor:
        """The likeliest class, (N, num_classes) to (N,)."""
        return output.argmax(dim=1)

    def certainty(self, output: Tensor) -> Tensor:
        """Probability of the likeliest class less that of the next one, (N, num_classes) to (N,)."""
        best = output.float().softmax(dim=-1).topk(min(2, output.shape[-1]), dim=-1).values
        return best[:, 0] - best[:, -1]

    def margins(self, output: Tensor) -> Tensor:
        """The likeliest class' logit less the next one's, (N, num_classes) to (N,)."""
        best = output.topk(min(2, output.shape[1]), dim=1).values
        return (best[:, 0] - best[:, -1]) / spread(output)

    def answers(self, output: Tensor, names: Mapping[int, str], count: int = NUM_SHOWN) -> list[Answer]:
        """The likeliest classes."""
        return [likeliest(each, names, count) for each in output.float().log_softmax(dim=-1).cpu()]

    def results(self, record: Record, targets: Tensor) -> Predictions:
        return Predictions(targets, record["top"], record.get("kl"), record["confidence"], record["certainty"])


def likeliest(log_probabilities: Tensor, names: Mapping[int, str], count: int = NUM_SHOWN) -> list[NamedClass]:
    """The `count` likeliest classes of one image, best first, by log-probabilities (num_classes,) and known names."""
    best = log_probabilities.topk(min(count, len(log_probabilities)))
    shares = (100 * best.values.exp()).tolist()
    return [
        NamedClass(index=index, name=names.get(index), probability_pct=share)
        for index, share in zip(best.indices.tolist(), shares, strict=True)
    ]


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || model) of each image, (B, num_classes) to (B,), in nats."""
    log_probabilities = logits.float().log_softmax(dim=-1), reference.float().log_softmax(dim=-1)
    return F.kl_div(*log_probabilities, reduction="none", log_target=True).sum(dim=-1)


def class_accuracy(names: Mapping[int, str], **models: Results) -> list[dict[str, Any]]:
    """Top-1 accuracy in percent of several models, by its key in a row, on the same images, a row a class, for JSON.

    Empty without labels, and where the task is another.
    """
    known = {key: model for key, model in models.items() if isinstance(model, Predictions) and model.labelled}
    if len(known) < len(models) or not known:
        return []
    labels, rows = next(iter(known.values())).targets, []
    for index in sorted(set(labels.tolist())):
        members = labels == index
        shares = {key: percent(model.correct[members]) for key, model in known.items()}
        rows.append({"index": index, "name": names.get(index), "num_images": int(members.sum()), **shares})
    return rows


def on_rare_classes(
    shown: Mapping[int, float], fewer_than: float, dense: Results, sparse: Results
) -> dict[str, Any] | None:
    """Sparse against dense on images of the classes that training hardly shows, for JSON.

    Those are classes of which `shown` has fewer than so many training images. Of images without labels the dense model
    says the class. None where no image is of such a class, or all are, and where the task is another.
    """
    if not (isinstance(dense, Predictions) and isinstance(sparse, Predictions)):
        return None
    classes = (dense.targets if dense.labelled else dense.top[:, 0]).tolist()
    rare = torch.tensor([shown.get(index, 0) < fewer_than for index in classes])
    if not rare.any() or rare.all():
        return None
    before, after = dense.only(rare), sparse.only(rare)
    return {
        "num_images": int(rare.sum()),
        "dense_top1_pct": before.top1_pct,
        "sparse_top1_pct": after.top1_pct,
        **after.change(before),
        **after.fidelity(before),
    }
