"""One or several numbers an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitprune.model import MaskedOutput, Selection
from vitprune.tasks.base import CONFIDENCE_95, NUM_SHOWN, Answer, Change, Figure, Record, Results, Spread, Task, changed
from vitprune.tasks.differences import of_numbers, spread_of_each

_FLOOR = 1e-3
"""Of the spread, as a share of the mean: a value that the teacher hardly changes must not drown the others."""


@dataclass(frozen=True)
class Values(Results):
    """What one model gives for every image, (num_images, num_values)."""

    values: Tensor

    @property
    def labelled(self) -> bool:
        """Whether the right values are known."""
        return self.targets.ndim == 2

    def accuracy(self) -> dict[str, Any]:
        """Mean absolute error, and the share of the targets' variance that is explained; means over the values."""
        if not self.labelled:
            return {"mae": None, "r2": None}
        values, targets = self.values.double(), self.targets.double()
        rest = (targets - targets.mean(dim=0)).square().sum(dim=0)
        known = rest > 0
        explained = 1 - (values - targets).square().sum(dim=0)[known] / rest[known]
        return {
            "mae": (values - targets).abs().mean().item(),
            "r2": explained.mean().item() if bool(known.any()) else None,
        }

    def fidelity(self, dense: Values) -> dict[str, Any]:
        """Correlation with dense, and the root mean square of the difference, also over the spread of dense.

        A value that dense never changes has neither: it is left out, and with none left the figures are None.
        """
        ours, theirs = self.values.double(), dense.values.double()
        spread = theirs.std(dim=0, correction=0)
        known = spread > 0
        error = (ours - theirs).square().mean(dim=0).sqrt()
        rmse = error.square().mean().sqrt().item()
        found: dict[str, Any] = {"pearson_r": None, "rmse_to_dense": rmse, "error_pct": None}
        if not bool(known.any()):
            return found
        centred = [each[:, known] - each[:, known].mean(dim=0) for each in (ours, theirs)]
        norms = [each.norm(dim=0) for each in centred]
        correlation = (centred[0] * centred[1]).sum(dim=0) / (norms[0] * norms[1]).clamp(min=1e-300)
        error_pct = 100 * (error[known] / spread[known]).mean().item()
        return found | {"pearson_r": correlation.mean().item(), "error_pct": error_pct}

    def change(self, other: Values) -> dict[str, Any]:
        """Of the mean absolute error; the interval is the normal one of the paired difference."""
        if not (self.labelled and other.labelled):
            return changed("mae_change", None)
        errors = [(each.values.double() - each.targets.double()).abs().mean(dim=1) for each in (self, other)]
        difference = errors[0] - errors[1]
        mean, count = difference.mean().item(), len(difference)
        if count < 2:  # of one image there is no interval
            return changed("mae_change", None)
        half = CONFIDENCE_95 * difference.std(correction=1).item() / count**0.5
        return changed("mae_change", (mean, [mean - half, mean + half]))

    def distances(self, dense: Values) -> Tensor:
        """Difference over the spread of dense, root mean square over the values that vary; NaN where none does."""
        ours, theirs = self.values.double(), dense.values.double()
        spread = theirs.std(dim=0, correction=0)
        known = spread > 0
        return ((ours - theirs)[:, known] / spread[known]).square().mean(dim=1).sqrt()


class Regression(Task):
    """One or several numbers an image."""

    name = "regression"
    output = "values"
    loss = "error"
    needs_spread = True
    targets = "values"
    accuracy = (Figure("mae", "mean absolute error", "error", 4, higher_is_better=False), Figure("r2", "R2", "R2", 4))
    change = Change("mae_change", "mean absolute error", "", 4, higher_is_better=False)
    fidelity = (
        Figure("pearson_r", "correlation with dense (Pearson r)", "Pearson r", 4),
        Figure("rmse_to_dense", "difference to dense (RMS)", "RMS", 4, higher_is_better=False),
        Figure("error_pct", "difference over the spread of dense (%)", "% of spread", 1, higher_is_better=False),
    )
    rate_reference = 0.1
    pipeline = "image-feature-extraction"
    problem_type = "regression"
    noun = "image regressor"
    truth = "true values"
    explained = (
        "Correlation and difference: of the sparse and the dense model's values over the evaluated images, means over "
        "the values; the spread is the standard deviation of the dense model's."
    )

    said = (
        "its values correlate with the dense model's by {pearson_r} (Pearson r) and differ by {rmse_to_dense} "
        "(root mean square) on {images}"
    )
    distance = "difference"

    def distillation(self, student: Selection | MaskedOutput, teacher: Selection, outputs: Spread | None) -> Tensor:
        """Squared error over the variance of the teacher's values, mean over values and images."""
        return _relative_error(student.logits, teacher.logits.detach(), outputs)

    def supervision(self, logits: Tensor, labels: Tensor, smoothing: float, outputs: Spread | None) -> Tensor:
        """Squared error with targets (B, num_values), over the variance of the teacher's values."""
        return _relative_error(logits, labels, outputs)

    def influence(self, output: Tensor) -> Tensor:
        """The values' size."""
        return output.float().abs().sum()

    def record(self, output: Tensor, reference: Tensor | None = None) -> Record:
        """Values (B, num_values)."""
        return {"values": output.cpu()}

    def vectors(self, output: Tensor) -> Tensor:
        """The values."""
        return output

    def answers(self, output: Tensor, names: Mapping[int, str], count: int = NUM_SHOWN) -> list[Answer]:
        """The values."""
        return [", ".join(f"{value:.4g}" for value in each) for each in output.tolist()]

    def differences(self, output: Tensor, reference: Tensor) -> Tensor:
        """As `Task.differences`, each value by its own spread: they need not be of one size."""
        return of_numbers(output, reference, spread_of_each(reference))

    def results(self, record: Record, targets: Tensor) -> Values:
        return Values(targets, record["values"])

    def right(self, target: Tensor, names: Mapping[int, str]) -> str | None:
        """The values that were to be found."""
        return ", ".join(f"{value:.4g}" for value in target.tolist()) if target.ndim else None


def _relative_error(values: Tensor, target: Tensor, outputs: Spread | None) -> Tensor:
    spread = Spread.of(target) if outputs is None else outputs
    variance = spread.std.square() + (_FLOOR * spread.mean).square()
    error = (values.float() - target.float()).square() / variance.clamp(min=torch.finfo(torch.float32).tiny)
    return error.mean()
