"""Dense, sparse and others on the same images, in the same run, against the same clock."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.backbones import input_size
from vitprune.baselines import RandomPredictor
from vitprune.budget.speed import Prediction, measure_speed
from vitprune.common import distributed
from vitprune.common.devices import Precision
from vitprune.common.progress import Listener
from vitprune.data import Data, Faults, Images, ImageSet, batches, count_images, eval_transform, make_loader
from vitprune.evaluation import predict
from vitprune.measure import Timing, benchmark
from vitprune.model import SparseViT
from vitprune.tasks import Results, Task
from vitprune.training.recipe import Recipe

EVAL_BATCH_SIZE = 64
"""At most; a training batch may be far more than one process holds."""
MOST_IN_GALLERY = 50_000
"""Training images that k-NN asks, chosen at random where there are more."""
BENCH_SECONDS = 2.0
"""How long a run times each model at each batch size, by default."""
_NUM_REAL = 256
"""Images that a model is timed on whose cost hangs on them."""


def random_baseline(model: nn.Module, sparse: SparseViT) -> SparseViT:
    """`model`, untouched, with the token counts of `sparse`: tokens are kept at random, others merged or dropped."""
    predictors = [RandomPredictor(seed) for seed in range(len(sparse.schedule.stages))]
    return SparseViT(model, sparse.schedule, predictors, sparse.pruned, None, 0.0)


def evaluate(
    models: Mapping[str, nn.Module],
    data: Data,
    recipe: Recipe,
    device: torch.device,
    precision: Precision,
    listener: Listener,
    *,
    task: Task,
    batch_size: int | None = None,
) -> dict[str, Results]:
    """What several models give on the same images of `data.val`, prepared as the first model needs them.

    Where one is called "dense", the others are compared with it. What cannot be read is left out and
    set as `data.faults`: an hour of training is not lost to one bad image. The batch size, of one process, is the
    recipe's if none is given, but at most EVAL_BATCH_SIZE.
    """
    transform = eval_transform(next(iter(models.values())))
    gallery = gallery_of(data, task)
    for images in (data.val, gallery):
        if images is not None:
            images.transform = transform
    total = count_images(data.val)
    listener.begin("evaluating", None if total is None else math.ceil(total / distributed.world_size()))
    results, data.faults = predict(
        models,
        data.val,
        device,
        precision,
        task=task,
        gallery=gallery,
        batch_size=batch_size or min(recipe.batch_size, EVAL_BATCH_SIZE),
        num_workers=recipe.workers(),
        reference="dense" if "dense" in models else None,
        allowed_share=1.0,
        listener=listener,
    )
    return results


def has_accuracy(task: Task, data: Data) -> bool:
    """Whether the images have what the task's accuracy figures need."""
    gallery = data.train is not None and data.train.labelled
    return task.measures_accuracy(labelled=data.val.labelled, gallery=gallery)


def gallery_of(data: Data, task: Task) -> Images | None:
    """The training images whose classes the task asks, a copy of its own; None where it needs none or knows none."""
    known = task.gallery and data.train is not None and data.train.labelled and data.val.labelled
    return copy.copy(data.train.sample(MOST_IN_GALLERY)) if known and data.train is not None else None


def bench(
    models: Mapping[str, nn.Module],
    device: torch.device,
    precision: Precision,
    seconds: float | None,
    listener: Listener,
    batch_sizes: Sequence[int],
) -> list[Timing]:
    """Time models of one input size interleaved, each so many seconds (None: 2) at each batch size."""
    listener.begin("measuring speed", len(models) * len(batch_sizes))
    return benchmark(
        models,
        input_size(next(iter(models.values()))),
        batch_sizes,
        device=device,
        precision=precision,
        min_seconds=BENCH_SECONDS if seconds is None else seconds,
        listener=listener,
    )


def over_images(model: nn.Module, images: Images, batch_sizes: Sequence[int]) -> nn.Module:
    """A model to be timed on real images, one batch after another: what an adaptive one costs hangs on what they show.

    In random order, for a folder is sorted by class, and some classes are easier; of a stream the first ones. Where
    they are few, in turns. Their transform is set.
    """
    wanted, read = max(_NUM_REAL, *batch_sizes), list[Tensor]()
    if isinstance(images, ImageSet):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images = images.subset(order[:wanted].tolist())
    for batch, _ in batches(make_loader(images, EVAL_BATCH_SIZE), Faults(allowed_share=1.0)):
        read.append(batch)
        if sum(map(len, read)) >= wanted:
            break
    real = torch.cat(read)
    return _OfImages(model, real.repeat(-(-wanted // len(real)), 1, 1, 1))


class _OfImages(nn.Module):
    """A model that runs on images of its own, whatever it is given, of which the number counts."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.model, self.next = model, 0
        self.register_buffer("images", images)

    def forward(self, like: Tensor) -> Tensor:
        images, size = self.get_buffer("images"), len(like)
        first = self.next if self.next + size <= len(images) else 0
        self.next = first + size
        result: Tensor = self.model(images[first : self.next])
        return result


def outcome(
    prediction: Prediction | None,
    models: Mapping[str, nn.Module],
    device: torch.device,
    seconds: float | None,
    listener: Listener,
) -> dict[str, Any] | None:
    """What was predicted before training, beside what is measured now; see `Prediction.compared_with`."""
    if prediction is None:
        return None
    listener.begin("measuring the speed target", None)
    speed = measure_speed(
        models["dense"], models["sparse"], prediction.target, device, BENCH_SECONDS if seconds is None else seconds
    )
    return prediction.compared_with(speed)
