"""Images that a cheap pass is sure of stop there; the others go on, from the blocks that all passes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.common.own_members import PublicModule
from vitprune.errors import UsageError
from vitprune.measure import count_macs
from vitprune.model import SparseViT, TaskName, attach
from vitprune.tasks import task_named


class AdaptiveViT(PublicModule):
    """A cascade of passes of rising cost over one trunk: the blocks before the first stage, which run once.

    The first pass sees every image. Of those whose certainty is below the threshold the next one, at a higher keep
    ratio or dense, decides instead. Certainty is the task's: of a classifier the probability of the likeliest class
    less that of the next one. Batches are split and joined by index: in every pass shapes are static.

    Example:
        sparse = vitprune.load("model.safetensors")
        adaptive = vitprune.AdaptiveViT([sparse, model], threshold=0.4)
        logits = adaptive(images)

    Args:
        passes: cheapest first: sparse models with the same blocks before the first stage, then possibly the dense one.
        threshold: images of at least this certainty stop, 0 or more; it is at most 1.

    Raises:
        UsageError: fewer than two passes, another order, other trunks or outputs, no certainty, a threshold below 0.

    Attributes:
        threshold: as above; it can be set.
        ended: of each image since it was set to a list, the number of the pass that decided; None to keep no account.
        promise: what `vitprune.promise` promised of it with this threshold, as `vitprune eval --json` has it; or None.
    """

    def __init__(self, passes: Sequence[SparseViT | nn.Module], threshold: float) -> None:
        super().__init__()
        if len(passes) < 2 or not isinstance(passes[0], SparseViT) or not passes[0].schedule.stages:
            raise UsageError("an adaptive model needs two passes or more, of which the first prunes")
        models = [each if isinstance(each, SparseViT) else attach(each, keep=1.0) for each in passes]
        self.passes = nn.ModuleList(models)
        self.first_block = end_of_trunk(models)
        self.task = models[0].task
        if task_named(self.task).certainty(torch.zeros(1, 2)) is None:
            raise UsageError(
                f"the task is {self.task}, whose outputs do not say how sure a model is",
                "adaptive passes are for classification and multilabel",
            )
        self.threshold = threshold
        self.ended: list[int] | None = None
        self._check_alike(models)

    @property
    def threshold(self) -> float:
        """The certainty from which on an image stops."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        if not value >= 0:  # above 1 no image stops before the last pass
            raise UsageError(f"the threshold is {value:g}, expected 0 or more", "certainties lie in [0, 1]")
        self._threshold = float(value)
        self.promise: dict[str, Any] | None = None

    @property
    def models(self) -> list[SparseViT]:
        """The passes; a dense one has no stages."""
        return list(self.passes)  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        """The passes, for people: "keep 0.5, then dense"."""
        return ", then ".join(each.label for each in self.models)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the outputs of the pass that decided each, (B, num_classes)."""
        return self.route(images)[0]

    def route(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and of each image the number of the pass that decided, (B,)."""
        outputs, ended = route(self.trunk()(images), self.tails(), self.threshold)
        if self.ended is not None:
            self.ended += ended.tolist()
        return outputs, ended

    def trunk(self) -> nn.Module:
        """The blocks that all passes share: images (B, in_chans, H, W) to tokens (B, P + N, C)."""
        return Trunk(self.models[0], self.first_block)

    def tails(self) -> list[nn.Module]:
        """What each pass is from there on: tokens to outputs (B, num_classes) and how sure they are, (B,)."""
        return [Tail(each, self.first_block, self.task) for each in self.models]

    def costs(self, input_size: tuple[int, int, int]) -> list[int]:
        """Multiply-accumulates of an image (C, H, W) that ends in each pass: the trunk, and all passes up to it."""
        trunk = count_macs(self.trunk(), input_size)
        tails = [count_macs(each, input_size) - trunk for each in self.models]
        return [trunk + sum(tails[: number + 1]) for number in range(len(tails))]

    def _check_alike(self, models: Sequence[SparseViT]) -> None:
        first, *others = (each.backbone.trunk(self.first_block) for each in models)
        for number, trunk in enumerate(others, start=2):
            differ = [
                name
                for name in first.keys() | trunk.keys()
                if name not in first or name not in trunk or not torch.equal(first[name], trunk[name].to(first[name]))
            ]
            if differ:
                raise UsageError(
                    f"passes 1 and {number} are no models of one trunk: '{min(differ)}' differs",
                    "adaptive passes share the blocks before the first stage, which the default recipe does not train",
                )
        if len({each.num_classes for each in models}) > 1:
            counts = " and ".join(str(each.num_classes) for each in models)
            raise UsageError(f"the passes have {counts} outputs", "all of them are made from one dense model")
        tokens = [sum(each.schedule.tokens_per_block()) for each in models]
        if tokens != sorted(tokens):
            raise UsageError(f"the passes do not rise in cost: {self.label}", "give the cheapest first")


class Trunk(nn.Module):
    """The blocks that all passes share: images (B, in_chans, H, W) to tokens (B, P + N, C)."""

    def __init__(self, model: SparseViT, first_block: int) -> None:
        super().__init__()
        self.model, self.first_block = model, first_block

    def forward(self, images: Tensor) -> Tensor:
        return self.model.backbone.embed_up_to(images, self.first_block)


class Tail(nn.Module):
    """A pass from the trunk on: tokens (B, P + N, C) to outputs (B, num_classes) and how sure they are, (B,)."""

    def __init__(self, model: SparseViT, first_block: int, task: TaskName) -> None:
        super().__init__()
        self.model, self.first_block, self.task = model, first_block, task_named(task)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model.select_from(tokens, self.first_block).logits
        certainty = self.task.certainty(outputs.float())
        assert certainty is not None
        return outputs, certainty


def end_of_trunk(models: Sequence[SparseViT]) -> int:
    """The block from which on passes differ; what prunes by its attention reads that of the block before the stage."""
    return min(block - (each.predictor == "attention") for each in models for block in each.schedule.blocks)


def account(ended: Sequence[int], costs: Sequence[int]) -> dict[str, float]:
    """What became of images and what that cost, for JSON.

    Args:
        ended: of each image, the number of the pass that decided.
        costs: multiply-accumulates of an image that ends in each pass.
    """
    number = max(1, len(ended))
    return {
        "went_on_pct": 100 * sum(each > 0 for each in ended) / number,
        "gmacs_mean": sum(costs[each] for each in ended) / number / 1e9,
        "gmacs_worst": costs[-1] / 1e9,
    }


def route(
    tokens: Tensor, tails: Sequence[Callable[[Tensor], tuple[Tensor, Tensor]]], threshold: float
) -> tuple[Tensor, Tensor]:
    """What the pass that decides each image gives, (B, num_classes), and the number of that pass, (B,).

    Args:
        tokens: of the trunk, (B, P + N, C).
        tails: of the passes; what each of them gives is that of `Tail`.
        threshold: images of at least this certainty stop.
    """
    outputs, certainty = tails[0](tokens)
    ended = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    unsure = (~(certainty >= threshold)).nonzero().flatten()  # of what is no number too
    for number, tail in enumerate(tails[1:], start=1):
        if not len(unsure):
            break
        again, certainty = tail(tokens[unsure])
        outputs, ended = outputs.index_copy(0, unsure, again), ended.index_fill(0, unsure, number)
        unsure = unsure[~(certainty >= threshold)]
    return outputs, ended
