"""AdamW as the recipe has it: groups, rates, what a step trains, and the update itself."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from vitprune.model import SparseViT
from vitprune.training.recipe import Phase, Recipe


def make_optimizer(student: SparseViT, recipe: Recipe, predictor_lr: float, backbone_lr: float | None) -> Any:
    """AdamW over predictors and, with a rate of its own, backbone.

    No weight decay on norms, biases and what timm exempts.
    """
    student.requires_grad_(True)  # timm leaves out of its groups what is frozen when they are made
    groups = [g | {"lr": predictor_lr} for g in param_groups_weight_decay(student.predictors, recipe.weight_decay)]
    if backbone_lr is not None:
        exempt = tuple(cast(Any, student.model).no_weight_decay())
        decayed = param_groups_weight_decay(student.model, recipe.weight_decay, exempt)
        groups += [g | {"lr": backbone_lr} for g in decayed]
    return create_optimizer_v2([group for group in groups if group["params"]], opt="adamw", weight_decay=0.0)


def make_scheduler(optimizer: Any, num_steps: int, warmup_share: float) -> CosineLRScheduler:
    """Linear warm-up, then a cosine to 0; a function of the step alone."""
    return CosineLRScheduler(
        optimizer,
        t_initial=num_steps,
        warmup_t=round(num_steps * warmup_share),
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def freeze(student: SparseViT, recipe: Recipe, phase: Phase, train_backbone: bool) -> None:
    """Say what a step trains: what has no gradient is left alone by the optimiser."""
    student.predictors.requires_grad_(phase != "deployed")  # top-k passes no gradient to them
    student.model.requires_grad_(train_backbone and recipe.train_trunk)
    if train_backbone and not recipe.train_trunk:
        first_block = student.schedule.blocks[0] if student.schedule.stages else 0
        for module in student.backbone.tail(first_block):
            module.requires_grad_(True)


def update(accelerator: Accelerator, optimizer: Any, student: SparseViT, loss: Tensor, clip_grad: float | None) -> bool:
    """Backward and optimiser step; False, with nothing changed, if the loss or the gradient is not finite."""
    optimizer.zero_grad()
    finite = torch.isfinite(loss.detach()).float()
    if accelerator.num_processes > 1:  # all go on or none: the others would wait for its gradient
        finite = accelerator.reduce(finite, "mean")
    if finite < 1:
        return False
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(student.parameters(), math.inf if clip_grad is None else clip_grad)
    if accelerator.scaler is None and norm is not None and not torch.isfinite(norm):
        return False
    optimizer.step()
    # With fp16 the gradient scaler itself leaves out a step whose gradient overflows.
    return not accelerator.optimizer_step_was_skipped


def optimizer_tensors(optimizer: Any) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `<parameter number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": torch.as_tensor(value) for number, of in state.items() for name, value in of.items()}


def restore_optimizer(optimizer: Any, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
