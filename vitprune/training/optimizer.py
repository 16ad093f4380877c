"""AdamW as the recipe has it: groups, rates, what a step trains, and the average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor

from vitprune.model import SparseViT
from vitprune.training.checkpoints import State
from vitprune.training.recipe import Phase, PlannedStep, Recipe


def set_trainable(student: SparseViT, recipe: Recipe, phase: Phase, train_backbone: bool) -> None:
    """Which weights a step trains: the optimiser skips what has no gradient."""
    student.predictors.requires_grad_(phase != "deployed")  # top-k passes no gradient to them
    student.model.requires_grad_(train_backbone and recipe.train_trunk)
    if train_backbone and not recipe.train_trunk:
        first_block = student.schedule.blocks[0] if student.schedule.stages else 0
        for module in student.backbone.tail(first_block):
            module.requires_grad_(True)
    if recipe.backbone_parameters == "norms":
        for parameter in student.model.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter.ndim == 1)


class Optimization:
    """What changes the weights in the planned steps: AdamW, its schedule and, if the recipe has it, their average.

    `backbone_lr` is the peak rate of the backbone, None if it does not train.
    """

    def __init__(
        self, student: SparseViT, recipe: Recipe, steps: Sequence[PlannedStep], backbone_lr: float | None
    ) -> None:
        self.student = student
        predictor_lr = recipe.peak_lr * (1.0 if steps[0].phase == "pretraining" else recipe.tune_lr_scale)
        self.optimizer: Any = _make_optimizer(student, recipe, predictor_lr, backbone_lr)
        # Linear warm-up, then a cosine to 0; a function of the step alone.
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=len(steps),
            warmup_t=round(len(steps) * recipe.warmup_share),
            warmup_lr_init=0.0,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        averages = recipe.ema_decay > 0 and backbone_lr is not None
        self.average = ModelEmaV3(student, decay=recipe.ema_decay) if averages else None

    def finish(self) -> None:
        """Give the student its averaged weights, where there are any."""
        if self.average is not None:
            self.student.load_state_dict(self.average.module.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """Weights ("student.*"), their average ("average.*") and "optimizer.<parameter number>.<name>"."""
        tensors = {f"student.{name}": tensor for name, tensor in self.student.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in values.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.module.state_dict().items()}
        return tensors

    def restore(self, state: State) -> None:
        """Put back what `tensors` gave."""
        self.student.load_state_dict(state.under("student."))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.under("optimizer.").items():
            number, _, name = key.partition(".")
            moments.setdefault(int(number), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.average is not None:
            self.average.module.load_state_dict(state.under("average."))


def _make_optimizer(student: SparseViT, recipe: Recipe, predictor_lr: float, backbone_lr: float | None) -> Any:
    """AdamW over predictors and, with a rate of its own, backbone; no weight decay on norms, biases and timm's list."""
    student.requires_grad_(True)  # timm's groups do not hold what is frozen when they are made
    groups = [g | {"lr": predictor_lr} for g in param_groups_weight_decay(student.predictors, recipe.weight_decay)]
    if backbone_lr is not None:
        exempt = tuple(cast(Any, student.model).no_weight_decay())
        decayed = param_groups_weight_decay(student.model, recipe.weight_decay, exempt)
        groups += [g | {"lr": backbone_lr} for g in decayed]
    return create_optimizer_v2([group for group in groups if group["params"]], opt="adamw", weight_decay=0.0)
