"""Features of every patch, for heads that segment, measure depth or detect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprune.backbones import wrap
from vitprune.model import MaskedOutput, Selection, SparseViT
from vitprune.tasks.base import NUM_SHOWN, Answer, Figure, Record, Results, Spread, Task
from vitprune.tasks.differences import of_vectors
from vitprune.tokens.losses import token_loss


class PatchFeatures(NamedTuple):
    """What a model gives for the patches of a batch.

    Attributes:
        features: after the final norm, pruned ones filled in, (B, N, C).
        kept: which have a token of their own to the end, (B, N) of bool; None where that is not known.
    """

    features: Tensor
    kept: Tensor | None


@dataclass(frozen=True)
class PatchLikeness(Results):
    """How like the dense model's the patches' features are, means over the patches of each image, (num_images,).

    Of all, of `kept` ones with a token of their own, and of the others; NaN where that is none, or not known.
    """

    cosine: Tensor
    kept: Tensor
    pruned: Tensor

    @property
    def labelled(self) -> bool:
        """Never: nothing is right or wrong of features."""
        return False

    def fidelity(self, dense: PatchLikeness) -> dict[str, Any]:
        """Centred cosine to dense: mean over images and their 5th percentile, and of kept and of pruned patches."""
        return {
            "token_cosine": self.cosine.mean().item(),
            "token_cosine_p5": self.cosine.quantile(0.05).item(),
            "token_cosine_kept": _mean(self.kept),
            "token_cosine_pruned": _mean(self.pruned),
        }

    def distances(self, dense: PatchLikeness) -> Tensor:
        """1 less the cosine."""
        return 1 - self.cosine


class Dense(Task):
    """Features of every patch."""

    name = "dense"
    output = "features"
    loss = "tokens"
    targets = None
    filled = True
    comparable = False
    fidelity = (
        Figure("token_cosine", "patches' cosine to dense, centred", "cosine", 4),
        Figure("token_cosine_p5", "its 5th percentile over images", "5th pct", 4),
        Figure("token_cosine_kept", "of kept patches", "kept", 4),
        Figure("token_cosine_pruned", "of pruned patches", "pruned", 4),
    )
    rate_reference = 0.1
    pipeline = "image-feature-extraction"
    noun = "image backbone"
    no_accuracy = "features of patches are neither right nor wrong"
    explained = (
        "Cosine: how alike the directions of the sparse and the dense model's features of a patch are, 1 for the same, "
        "both less the mean of the image's dense features, which all its patches share; means over the patches of an "
        "image. A merged patch follows the token that it is part of, a dropped one stays what it was."
    )

    said = (
        "its patches' features have cosine {token_cosine} to the dense model's, centred, those of pruned patches "
        "{token_cosine_pruned}, on {images}"
    )
    distance = "1 - cosine"

    def run(self, model: nn.Module, images: Tensor) -> PatchFeatures:
        """The patches' features."""
        if isinstance(model, SparseViT):
            return self.of_selection(model.select(images, filled=True))
        prefix: Any = getattr(model, "num_prefix_tokens", None)
        if prefix is None:
            prefix = (getattr(model, "backbone", None) or wrap(model)).num_prefix_tokens
        features = model.forward_features(images)  # type: ignore[operator]
        return PatchFeatures(features[:, prefix:].float(), None)

    def of_selection(self, selection: Selection) -> PatchFeatures:
        assert selection.filled is not None
        return PatchFeatures(selection.filled.float(), selection.kept())

    def vectors(self, output: PatchFeatures) -> Tensor:
        """Features of all patches, (B, N, C)."""
        return output.features

    def answers(self, output: PatchFeatures, names: Mapping[int, str], count: int = NUM_SHOWN) -> list[Answer]:
        """Nothing for people."""
        return [[] for _ in output.features]

    def differences(self, output: Tensor, reference: Tensor) -> Tensor:
        """As `Task.differences`, by the length of what differs."""
        return of_vectors(output, reference)

    def distillation(self, student: Selection | MaskedOutput, teacher: Selection, outputs: Spread | None) -> Tensor:
        """Relative squared error of the patches' features, of a masked pass of those that are kept."""
        if isinstance(student, MaskedOutput):
            return token_loss(student.features, teacher.features, student.kept[-1], relative=True)
        features = student.features if student.filled is None else student.filled
        return token_loss(features, teacher.features, relative=True)

    def record(self, output: PatchFeatures, reference: PatchFeatures | None = None) -> Record:
        """Likeness to the dense model's features."""
        theirs = (output if reference is None else reference).features
        likeness = _likeness(output.features, theirs)  # (B, N)
        kept = output.kept
        unknown = likeness.new_full((len(likeness),), torch.nan)
        return {
            "cosine": likeness.mean(dim=1).cpu(),
            "kept": (unknown if kept is None else _over(likeness, kept)).cpu(),
            "pruned": (unknown if kept is None else _over(likeness, ~kept)).cpu(),
        }

    def patch_likeness(self, output: PatchFeatures, reference: PatchFeatures) -> Tensor:
        """The cosine of each patch's features."""
        return _likeness(output.features, reference.features)

    def results(self, record: Record, targets: Tensor) -> PatchLikeness:
        return PatchLikeness(targets, record["cosine"], record["kept"], record["pruned"])


def _likeness(features: Tensor, reference: Tensor) -> Tensor:
    """Cosine of each patch's features, (B, N, C) to (B, N), less what all patches of the image share in `reference`.

    That says nothing of any of them.
    """
    centre = reference.mean(dim=1, keepdim=True)
    return F.cosine_similarity(features - centre, reference - centre, dim=2)


def _over(likeness: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked patches, (B, N) to (B,); NaN where there are none."""
    weight = mask.to(likeness.dtype)
    return (likeness * weight).sum(dim=1) / weight.sum(dim=1)


def _mean(values: Tensor) -> float | None:
    """Of those that are numbers; None where none is."""
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else None
