"""A vector an image, for retrieval, clustering, zero-shot classification and heads of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprune.model import MaskedOutput, Selection
from vitprune.tasks.base import Change, Figure, Record, Results, Spread, Task, changed, paired_shares, percent
from vitprune.tasks.class_vectors import ClassVectors
from vitprune.tasks.differences import of_vectors

_NUM_NEIGHBOURS = 10
_KNN, _TEMPERATURE = 20, 0.07
"""Of DINO's evaluation (Caron et al. 2021, https://arxiv.org/abs/2104.14294, appendix F)."""
_CHUNK = 1024
_KNN_CHANGE = Change("knn_top1_points", "k-NN top-1", "points")
_ZERO_SHOT_CHANGE = Change("zero_shot_top1_points", "zero-shot top-1", "points")


@dataclass(frozen=True)
class Embeddings(Results):
    """What one model gives for every image.

    Attributes:
        vectors: of unit length, (num_images, D).
        gallery: those of the training images and their classes, which k-NN asks; None without them.
        classes: vectors of the classes, of unit length, (num_classes, D), for zero-shot classification.
    """

    vectors: Tensor
    gallery: tuple[Tensor, Tensor] | None = None
    classes: Tensor | None = None

    def beside(self, training: Results) -> Embeddings:
        """The same with a gallery, if that has classes."""
        assert isinstance(training, Embeddings)
        return replace(self, gallery=(training.vectors, training.targets)) if training.labelled else self

    def knn(self) -> Tensor | None:
        """The class that each image's 20 nearest training images vote for, (num_images,), by weights exp(cos / .07)."""
        if not self.labelled or self.gallery is None:
            return None
        keys, of_key = self.gallery
        num_classes = int(max(of_key.max(), self.targets.max())) + 1
        found = []
        for chunk in _chunks(self.vectors):
            near, rows = (chunk @ keys.T).topk(min(_KNN, len(keys)), dim=1)
            votes = torch.zeros(len(chunk), num_classes).scatter_add_(1, of_key[rows], (near / _TEMPERATURE).exp())
            found.append(votes.argmax(dim=1))
        return torch.cat(found)

    def zero_shot(self) -> Tensor | None:
        """Classes by falling likeness to the image, up to 5, (num_images, up to 5)."""
        if not self.labelled or self.classes is None:
            return None
        return (self.vectors @ self.classes.T).topk(min(5, len(self.classes)), dim=1).indices

    def accuracy(self) -> dict[str, Any]:
        """k-NN top-1 and, with class vectors, zero-shot top-1 and top-5, in percent."""
        knn, top, found = self.knn(), self.zero_shot(), {}
        found["knn_top1_pct"] = None if knn is None else percent(knn == self.targets)
        if self.classes is not None:
            found["zero_shot_top1_pct"] = None if top is None else percent(top[:, 0] == self.targets)
            found["zero_shot_top5_pct"] = None if top is None else percent((top == self.targets[:, None]).any(dim=1))
        return found

    def fidelity(self, dense: Embeddings) -> dict[str, Any]:
        """Centred cosine to dense, its mean and 5th percentile; shared neighbours among the evaluated images.

        Vectors of another width have neighbours alone.
        """
        likeness = self.likeness(dense) if self.vectors.shape == dense.vectors.shape else None
        ours, theirs = self.nearest(), dense.nearest()
        found = {
            "cosine": None if likeness is None else likeness.mean().item(),
            "cosine_p5": None if likeness is None else likeness.quantile(0.05).item(),
            "neighbour_overlap_pct": None,
            "same_nearest_pct": None,
        }
        if ours.shape[1]:  # of a single image there is no neighbour
            shared = (ours[:, :, None] == theirs[:, None, :]).any(dim=2)
            found |= {"neighbour_overlap_pct": percent(shared), "same_nearest_pct": percent(ours[:, 0] == theirs[:, 0])}
        return found

    def likeness(self, dense: Embeddings) -> Tensor:
        """Cosine to the dense model's vector of each image, (num_images,), both less the mean of the dense ones.

        What all images share says nothing of an image, and makes any two vectors look alike.
        """
        centre = dense.vectors.double().mean(dim=0) if self.num_images > 1 else 0.0
        return F.cosine_similarity(self.vectors.double() - centre, dense.vectors.double() - centre, dim=1)

    def nearest(self) -> Tensor:
        """Rows of the nearest other images, up to 10, nearest first, (num_images, neighbours)."""
        count, found = min(_NUM_NEIGHBOURS, self.num_images - 1), []
        for first, chunk in zip(range(0, self.num_images, _CHUNK), _chunks(self.vectors), strict=True):
            alike = chunk @ self.vectors.T
            rows = torch.arange(len(chunk))
            alike[rows, first + rows] = -torch.inf
            found.append(alike.topk(count, dim=1).indices)
        return torch.cat(found)

    def change(self, other: Embeddings) -> dict[str, Any]:
        """Of k-NN and zero-shot top-1, where they are known."""
        found = changed(_KNN_CHANGE.key, self._paired(self.knn(), other.knn()))
        if self.classes is not None:
            found |= changed(_ZERO_SHOT_CHANGE.key, self._paired(self.zero_shot(), other.zero_shot()))
        return found

    def _paired(self, ours: Tensor | None, theirs: Tensor | None) -> tuple[float, list[float]] | None:
        """Of two models' predictions, (num_images,) or best first (num_images, up to 5)."""
        if ours is None or theirs is None:
            return None
        first, second = (each.reshape(self.num_images, -1)[:, 0] == self.targets for each in (ours, theirs))
        return paired_shares(first, second)

    def summary(self) -> dict[str, Any]:
        """As `Results.summary`, with how many training images k-NN asks."""
        gallery = {} if not self.labelled or self.gallery is None else {"num_gallery_images": len(self.gallery[1])}
        return super().summary() | gallery

    def distances(self, dense: Embeddings) -> Tensor:
        """1 less the centred cosine."""
        return 1 - self.likeness(dense)


class Embedding(Task):
    """A vector an image; with vectors of the classes by a text tower, or the words alone, also zero-shot figures."""

    name = "embedding"
    output = "embedding"
    loss = "embedding"
    needs_spread = True
    gallery = True
    comparable = False
    fidelity = (
        Figure("cosine", "cosine to dense, centred", "cosine", 4),
        Figure("cosine_p5", "its 5th percentile", "5th pct", 4),
        Figure("neighbour_overlap_pct", "same 10 nearest images (%)", "neighbours", 1),
        Figure("same_nearest_pct", "same nearest image (%)", "nearest", 1),
    )
    rate_reference = 0.06
    pipeline = "image-feature-extraction"
    noun = "image encoder"

    said = (
        "its vectors have cosine {cosine} to the dense model's, centred, and {neighbour_overlap_pct} % of the same 10 "
        "nearest images on {images}"
    )
    distance = "1 - cosine"
    explained = (
        "Cosine: how alike the directions of the sparse and the dense model's vector of an image are, 1 for the same, "
        "both less the mean of the dense vectors, which all images share. Nearest images: the other evaluated images "
        "whose vectors are most like the image's, by each model's own vectors; 100 % where both find the same."
    )

    def __init__(self, classes: ClassVectors | None = None, *, zero_shot: bool = False) -> None:
        self.classes = classes
        knn = Figure("knn_top1_pct", "k-NN top-1 (%)", "k-NN")
        figures = (
            Figure("zero_shot_top1_pct", "zero-shot top-1 (%)", "zero-shot"),
            Figure("zero_shot_top5_pct", "zero-shot top-5 (%)", "top-5"),
        )
        named = classes is not None or zero_shot
        self.accuracy = (*figures, knn) if named else (knn,)
        self.change = _ZERO_SHOT_CHANGE if named else _KNN_CHANGE
        self.targets = "class" if named else "group"
        if not named:
            self.no_accuracy = "k-NN needs classes of the evaluated and of training images"

    def vectors(self, output: Tensor) -> Tensor:
        """The vectors, not of unit length."""
        return output

    def differences(self, output: Tensor, reference: Tensor) -> Tensor:
        """As `Task.differences`, by the length of what differs."""
        return of_vectors(output, reference)

    def distillation(self, student: Selection | MaskedOutput, teacher: Selection, outputs: Spread | None) -> Tensor:
        """1 less the cosine, both less the mean of the teacher's vectors, batch mean."""
        ours, target = student.logits.float(), teacher.logits.detach().float()
        centre = 0.0 if outputs is None else outputs.mean
        likeness: Tensor = F.cosine_similarity(ours - centre, target - centre, dim=1)
        return (1 - likeness).mean()

    def record(self, output: Tensor, reference: Tensor | None = None) -> Record:
        """Vectors (B, D)."""
        return {"vectors": F.normalize(output.float(), dim=-1).cpu()}

    def results(self, record: Record, targets: Tensor) -> Embeddings:
        return Embeddings(targets, record["vectors"], classes=None if self.classes is None else self.classes.vectors)

    def measures_accuracy(self, *, labelled: bool, gallery: bool) -> bool:
        """As `Task.measures_accuracy`; k-NN asks training images."""
        return labelled and (gallery or self.change is _ZERO_SHOT_CHANGE)

    def explanation(self, summary: Mapping[str, Any]) -> str:
        """As `Task.explanation`, with how k-NN was measured, where it was."""
        count = summary.get("num_gallery_images")
        if not count:
            return self.explained
        nearest = f"{min(_KNN, count)} nearest of {count} training images"
        return f"{self.explained} k-NN: the class that the {nearest} vote for."


def _chunks(vectors: Tensor) -> tuple[Tensor, ...]:
    return vectors.tensor_split(tuple(range(_CHUNK, len(vectors), _CHUNK)))
