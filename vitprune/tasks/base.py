"""What a model is for: how far a sparse model is from its dense one, how good both are, and in which words."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from vitprune.data import UNLABELLED, TargetKind
from vitprune.model import MaskedOutput, Selection, TaskName
from vitprune.tasks.differences import of_numbers, spread

CONFIDENCE_95 = 1.96
NUM_SHOWN = 3
"""Classes or labels that are named of an image."""
Record = dict[str, Tensor]
"""What is kept of a model's outputs: tensors of one row an image, on the CPU, by name."""


class NamedClass(BaseModel):
    """One class that a model names for an image, by the index of its output."""

    model_config = ConfigDict(frozen=True)

    index: int
    name: str | None = None
    probability_pct: float

    @property
    def text(self) -> str:
        """Such as "tench 93.1 %"."""
        return f"{self.name or f'class {self.index}'} {self.probability_pct:.1f} %"


Answer = list[NamedClass] | str
"""What a model says of an image: classes, likeliest first, or a text; empty where it is not for people."""


class Spread(NamedTuple):
    """Where a teacher's outputs lie: their mean and standard deviation, (num_outputs,).

    Not of a batch: its share of a loss would hang on what else is in it.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, outputs: Tensor) -> Spread:
        """Of outputs (n, num_outputs)."""
        outputs = outputs.detach().float()
        return cls(outputs.mean(dim=0), outputs.std(dim=0, correction=0))


class Figure(NamedTuple):
    """A figure that a task measures.

    Attributes:
        key: in JSON.
        text: for tables, with its unit.
        short: for the head of a column.
        digits: after the point.
        higher_is_better: or lower.
    """

    key: str
    text: str
    short: str
    digits: int = 2
    higher_is_better: bool = True

    @property
    def in_percent(self) -> bool:
        """Whether values are."""
        return self.key.endswith("_pct")

    def said(self, value: str) -> str:
        """A value with its unit and what it is of: "71.59 % top-1", "R2 0.8831"."""
        name, _, unit = self.text.partition(" (%)")
        return f"{value} % {name}{unit}" if name != self.text else f"{name} {value}"


class Change(NamedTuple):
    """The difference of the first accuracy figure, sparse less dense, paired by image.

    Attributes:
        key: in JSON; "<key>_ci95" beside it is its 95 % interval.
        text: what changes, for sentences.
        unit: such as "points"; empty where the figure has none.
    """

    key: str
    text: str
    unit: str
    digits: int = 2
    higher_is_better: bool = True


@dataclass(frozen=True)
class Results(ABC):
    """What one model gives for every image, as far as figures need it.

    Attributes:
        targets: what is right: class indices (num_images,), UNLABELLED where not known; or one row an image.
    """

    targets: Tensor

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.targets)

    @property
    def labelled(self) -> bool:
        """Whether it is known for every image what is right."""
        return self.num_images > 0 and not bool((self.targets == UNLABELLED).any())

    def accuracy(self) -> dict[str, Any]:
        """How good the model is, by the keys of `Task.accuracy`; None where that is not known."""
        return {}

    @abstractmethod
    def fidelity(self, dense: Any) -> dict[str, Any]:
        """How close it is to the dense model on the same images, by the keys of `Task.fidelity`."""

    def change(self, other: Any) -> dict[str, Any]:
        """Its first accuracy figure less that of another model on the same images, with a 95 % interval, for JSON."""
        return {}

    @abstractmethod
    def distances(self, dense: Any) -> Tensor:
        """How far it is from the dense model, of each image, (num_images,); 0 is the same."""

    @property
    def certainty(self) -> Tensor | None:
        """How sure the model is of each image, (num_images,) in [0, 1], see `Task.certainty`; None where not known."""
        return None

    def same(self, dense: Any) -> Tensor | None:
        """Whether each image's answer is the dense model's, (num_images,) of bool; None of a task without answers."""
        return None

    def nearest(self) -> Tensor | None:
        """Of each image the rows of those that are most like it, nearest first, (num_images, some); None of a task
        that says nothing of that.
        """
        return None

    def beside(self, training: Results) -> Results:
        """The same, knowing what the model gives for the training images."""
        return self

    def summary(self) -> dict[str, Any]:
        """Accuracy figures for JSON."""
        return self.accuracy() | {"num_images": self.num_images}


class Task(ABC):
    """What a model is for. Everything that reads a model's outputs asks it.

    Attributes:
        name: as in `--task`.
        output: what the exported output is called.
        loss: what its distillation loss is called in logs.
        targets: which labels go with it; None for none.
        accuracy: figures against labels, of each model; the first is the one that limits and charts take.
        change: the difference of that figure; None without one.
        no_accuracy: why there are no accuracy figures, where there are none.
        truth: what `right` says, for captions.
        explained: what the figures mean, where their names do not say it; see `explanation`.
        comparable: whether outputs of models that were trained apart mean the same.
        fidelity: figures of a model against its dense one; the first is the one that limits and charts take.
        rate_reference: distillation loss after predictor pretraining at which the recipe's rate of the backbone holds;
            None for the recipe's own.
        pipeline: the Hub's name of it.
        problem_type: what transformers calls it in a config.json, where it does.
        noun: what it makes of a model, for sentences.
        said: how close a model is to its dense one, in words, with the fidelity figures by key and `images`.
        distance: what `Results.distances` are called.
        decides: what `decisions` are called; empty where there are none.
        needs_spread: whether its losses need to know where the teacher's outputs lie.
        filled: whether its loss needs the features of all patches, pruned ones filled in.
        gallery: whether its accuracy needs the training images' outputs too, see `Results.beside`.
    """

    name: ClassVar[TaskName]
    output: ClassVar[str] = "logits"
    loss: ClassVar[str] = "kl"
    targets: TargetKind | None = "class"
    accuracy: tuple[Figure, ...] = ()
    change: Change | None = None
    no_accuracy: str = "the images have no labels"
    truth: ClassVar[str] = "true class"
    explained: ClassVar[str] = ""
    comparable: ClassVar[bool] = True
    fidelity: ClassVar[tuple[Figure, ...]]
    rate_reference: ClassVar[float | None] = None
    pipeline: ClassVar[str] = "image-classification"
    problem_type: ClassVar[str | None] = None
    noun: ClassVar[str] = "image classifier"
    said: ClassVar[str]
    distance: ClassVar[str] = "KL"
    decides: ClassVar[str] = ""
    needs_spread: ClassVar[bool] = False
    filled: ClassVar[bool] = False
    gallery: ClassVar[bool] = False

    @property
    def outputs(self) -> str:
        """The output's name, of many numbers."""
        return "numbers of the embedding" if self.output == "embedding" else self.output

    def run(self, model: nn.Module, images: Tensor) -> Any:
        """What a model gives for images (B, in_chans, H, W): by default its output, (B, ...) in fp32."""
        return model(images).float()

    @abstractmethod
    def distillation(self, student: Selection | MaskedOutput, teacher: Selection, outputs: Spread | None) -> Tensor:
        """The loss of a student's pass against the teacher's, a scalar in fp32; no gradient flows into the teacher.

        `outputs` are the teacher's over some training images, where `needs_spread`.
        """

    def supervision(self, logits: Tensor, labels: Tensor, smoothing: float, outputs: Spread | None) -> Tensor:
        """The loss against labels, for recipes that train on them: by default cross-entropy.

        Args:
            logits: (B, num_classes).
            labels: class indices (B,), or of mixed images, which timm has smoothed, probabilities (B, num_classes).
            smoothing: of the labels, in [0, 1).
            outputs: as in `distillation`.
        """
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing if labels.ndim == 1 else 0.0)

    def influence(self, output: Tensor) -> Tensor:
        """A scalar of a teacher's outputs (B, ...) whose gradient says which tokens these hang on.

        By default how far each vector reaches from the batch's mean, where it is now: what tells an image from others.
        Its length would not do: behind a LayerNorm it is the same for all.
        """
        vectors = output.float()
        own = vectors.detach() - (vectors.detach().mean(dim=0) if len(vectors) > 1 else 0.0)
        return (vectors * F.normalize(own, dim=-1)).sum()

    def of_selection(self, selection: Selection) -> Any:
        """What `run` would give, out of the pass of a sparse model, with the features of all patches where `filled`."""
        return selection.logits.float()

    def answers(self, output: Any, names: Mapping[int, str], count: int = NUM_SHOWN) -> list[Answer]:
        """What a batch's outputs of `run` say of each image, for people: at most `count` classes or labels, named."""
        return [[] for _ in output]

    def ranked(self, output: Any, names: Mapping[int, str], count: int) -> list[Answer]:
        """As `answers`, but `count` classes or labels whatever the model makes of them."""
        return self.answers(output, names, count)

    def vectors(self, output: Any) -> Tensor | None:
        """A batch's outputs of `run` as numbers that are of use to others, (B, ...); None where `answers` say it."""
        return None

    def decisions(self, output: Tensor) -> Tensor | None:
        """What outputs (N, ...) decide; None where they decide nothing."""
        return None

    def margins(self, output: Tensor) -> Tensor | None:
        """How far outputs (N, ...) are from deciding otherwise, in units of how far they lie apart and in the shape of
        `decisions`.
        """
        return None

    def certainty(self, output: Tensor) -> Tensor | None:
        """How far outputs (N, ...) are from another answer, (N,) in [0, 1]; None where they do not say."""
        return None

    def differences(self, output: Tensor, reference: Tensor) -> Tensor:
        """How far exported outputs (N, ...) are from a reference's, in units of how far that one's lie apart, (N,)."""
        return of_numbers(output, reference, spread(reference))

    @abstractmethod
    def record(self, output: Any, reference: Any = None) -> Record:
        """What to keep of a batch's outputs of `run`, beside those of the dense model, where there is one."""

    @abstractmethod
    def results(self, record: Record, targets: Tensor) -> Results:
        """All batches' records, joined, and what is right."""

    @property
    def finest(self) -> Figure:
        """The first fidelity figure that does not count images or labels: it tells models apart on few images."""
        return next(each for each in self.fidelity if not each.in_percent)

    def measures_accuracy(self, *, labelled: bool, gallery: bool) -> bool:
        """Whether there are accuracy figures, of images that are `labelled` or not, and training images that are."""
        return bool(self.accuracy) and labelled

    def patch_likeness(self, output: Any, reference: Any) -> Tensor | None:
        """How like the dense model's the output of `run` is at every patch, in [-1, 1], (B, N); None of one for all."""
        return None

    def right(self, target: Tensor, names: Mapping[int, str]) -> str | None:
        """What is right of an image, a class index or UNLABELLED, (), or a row, for people; None where not known."""
        index = UNLABELLED if target.ndim else int(target)
        return None if index == UNLABELLED else names.get(index, f"class {index}")

    def explanation(self, summary: Mapping[str, Any]) -> str:
        """What the figures mean, in plain words; `summary` is that of the results. Empty where their names say it."""
        return self.explained


def in_words(answer: Answer) -> str:
    """What a model says of an image, in one line."""
    return answer if isinstance(answer, str) else "; ".join(each.text for each in answer)


def joined(records: Sequence[Mapping[str, Tensor]]) -> Record:
    """Records of several batches as one."""
    return {name: torch.cat([each[name] for each in records]) for name in records[0]}


def percent(mask: Tensor) -> float:
    """Share of True, in percent."""
    return 100 * mask.double().mean().item()


def paired_shares(ours: Tensor, theirs: Tensor) -> tuple[float, list[float]]:
    """Share of True in `ours` less that in `theirs`, in points, and its 95 % interval; both (num_images,) of bool.

    The interval is that of Bonett and Price (2012) for paired shares: the normal approximation with one image more in
    each kind on which the models differ, so that few images, or no difference among them, do not look like certainty.
    It is narrower than that of two separate samples, because both models see the same images.
    """
    count = len(ours)
    gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = CONFIDENCE_95 * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    between = [max(-1.0, up - down - half), min(1.0, up - down + half)]
    return 100 * (gained - lost) / count, [100 * bound for bound in between]


def changed(key: str, difference: tuple[float, list[float]] | None) -> dict[str, Any]:
    """A difference and its interval under the keys of a `Change`."""
    value, interval = difference or (None, None)
    return {key: value, f"{key}_ci95": interval}
