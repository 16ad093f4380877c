"""Whether the labels can be those of the model: before an hour of training, on a few images."""

from __future__ import annotations

import torch
from torch.distributions import Binomial

from vitprune.common.progress import Listener
from vitprune.data import Data, eval_transform
from vitprune.errors import DataError
from vitprune.evaluation import predict
from vitprune.loading.load import Loaded
from vitprune.tasks import Predictions, Results, task_named

_NUM_IMAGES, _FEWEST_IMAGES = 200, 20
WHAT_TO_CHECK = (
    "check the order of the class folders (--class-order, --class-map), the weights, their --mean and --std, and what "
    "they classify by (tokens averaged before the norm: --model-kwargs global_pool=avg fc_norm=False)"
)


def doubt(results: Results, num_classes: int) -> str | None:
    """Why the labels seem to be others than the model was trained with; None where they may be right.

    They do if it is no better than chance and is itself sure of far more: the number of right answers is no more than
    one of `num_classes` guesses gives (one-sided binomial test at 5 %), and so few by its own confidence only once in
    a thousand data sets. Of fewer than 20 images nothing is said, nor of tasks that do not classify.
    """
    if not (isinstance(results, Predictions) and results.labelled and results.confidence is not None):
        return None
    if num_classes < 2:
        return None
    count, right = results.num_images, int(results.correct.sum())
    if count < _FEWEST_IMAGES:
        return None
    sure = float(results.confidence.mean())
    if 1 - _at_most(right - 1, count, 1 / num_classes) < 0.05 or _at_most(right, count, sure) > 1e-3:
        return None
    return (
        f"the model gives the right class for {right} of {count} images, about as chance would "
        f"({100 / num_classes:.3g} %), though it is {100 * sure:.0f} % sure on average: these labels seem not its own"
    )


def check_labels(loaded: Loaded, data: Data, device: torch.device, listener: Listener) -> None:
    """Make sure, on a few images of `data.val`, that the labels can be the model's.

    Raises:
        DataError: they seem to be others.
    """
    images = data.val.sample(_NUM_IMAGES)
    if loaded.task != "classification" or not images.labelled:
        return
    images.transform = eval_transform(loaded.model)
    listener.begin("checking the labels", None)
    found, _ = predict({"dense": loaded.model}, images, device, task=task_named(loaded.task), allowed_share=1.0)
    if reason := doubt(found["dense"], getattr(loaded.model, "num_classes", 0)):
        raise DataError(reason, f"{WHAT_TO_CHECK}; --force-labels goes on, --no-labels does without")


def _at_most(right: int, count: int, share: float) -> float:
    """Probability of at most `right` successes in `count` tries that each succeed with probability `share`."""
    tries = Binomial(torch.tensor(float(count), dtype=torch.float64), torch.tensor(share, dtype=torch.float64))
    numbers = torch.arange(right + 1, dtype=torch.float64)
    return float(tries.log_prob(numbers).exp().sum())  # type: ignore[no-untyped-call]
