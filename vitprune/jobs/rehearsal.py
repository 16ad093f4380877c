"""What a run would do and cost, found by its first steps: `sparsify --dry-run`."""

from __future__ import annotations

import copy
import math
import resource
from collections import Counter
from contextlib import closing
from typing import Any

import torch

from vitprune.common import distributed
from vitprune.common.progress import Listener
from vitprune.data import Data, Images, count_images, explain_worker_crash
from vitprune.jobs.label_check import check_labels
from vitprune.jobs.sparsify import describe_run, new_student, to_train_on
from vitprune.loading.load import Loaded
from vitprune.measure import describe_plan
from vitprune.model import SparseViT, attach
from vitprune.schedule import Sparsity
from vitprune.training.loop import train
from vitprune.training.progress import Progress
from vitprune.training.recipe import Recipe


def rehearse(
    loaded: Loaded,
    data: Data,
    recipe: Recipe,
    sparsity: Sparsity,
    device: torch.device,
    listener: Listener,
    *,
    force_labels: bool = False,
) -> dict[str, Any]:
    """All checks of a run and its first steps, for JSON; writes nothing.

    Returns:
        The plan, its cost, `num_steps`, the estimated `seconds` of training (from the last of two steps of each phase,
        so without the time that workers take to start), and the `peak_memory_mib` of doing so.
    """
    distributed.start(device)
    student = new_student(loaded.model, sparsity, recipe.seed, loaded.task)
    describe_run(student, loaded, data, recipe, sparsity)
    if not force_labels:
        check_labels(loaded, data, device, listener)
    images = to_train_on(student, data, recipe)
    per_epoch = count_images(images)
    planned = recipe.plan_steps(
        None if per_epoch is None else max(1, per_epoch // recipe.batch_size), has_stages=bool(student.schedule.stages)
    )
    phases = Counter(step.phase for steps in planned for step in steps)
    rates = {} if images is None else _rates(loaded, student, images, recipe, device, listener)
    slowest = min(rates.values(), default=math.inf)
    return {
        **describe_plan(student, loaded.name),
        "num_train_images": per_epoch,
        "num_val_images": count_images(data.val),
        "num_steps": sum(phases.values()),
        "seconds": sum(count * recipe.batch_size / rates.get(phase, slowest) for phase, count in phases.items()),
        "peak_memory_mib": peak_memory_mib(device),
    }


def _rates(
    loaded: Loaded, student: SparseViT, images: Images, recipe: Recipe, device: torch.device, listener: Listener
) -> dict[str, float]:
    """Images per second of the second step of each phase."""
    rates: dict[str, float] = {}
    # At a fixed rate: to measure it would take longer than the steps.
    short = {"pretraining_steps": min(2, recipe.pretraining_steps), "steps": 2, "epochs": None, "freeze_epochs": 0.0}
    short |= {"rate_reference_kl": None}
    few = recipe.model_copy(update=short)
    teacher = attach(copy.deepcopy(loaded.model), keep=1.0)
    listener.begin("trying some training steps", None)
    with explain_worker_crash(), closing(train(student, teacher, images, few, device, Progress())) as steps:
        for step in steps:
            rates[step.record.phase] = step.record.images_per_s
    return rates


def peak_memory_mib(device: torch.device) -> float:
    """The most memory used so far: of a GPU what torch has allocated on it, else what the process holds, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
