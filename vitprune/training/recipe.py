"""How to train: one settings object."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Phase = Literal["warm", "sampled", "deployed"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class LossWeights(BaseModel):
    """Weights of the four losses of DynamicViT eq. 16.

    The paper, with all of ImageNet, has ce 1, ratio 2, kl 0.5, token 0.5. In a short training on few pictures
    cross-entropy teaches their mix of classes rather than to do without the dropped tokens, so the default leaves it
    out and weighs the teacher's answer more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ce: float = Field(0.0, ge=0, description="cross-entropy with the labels")
    ratio: float = Field(2.0, ge=0, description="squared distance of the kept share from its target")
    kl: float = Field(1.0, ge=0, description="KL divergence from the teacher's classes")
    token: float = Field(0.5, ge=0, description="squared distance of kept tokens' features from the teacher's")


class Recipe(BaseModel):
    """Settings of a training run. The defaults are for minutes on a few thousand pictures.

    Training has three phases. `warm`: predictors alone learn the ranking of tokens that the teacher's gradients
    give. `sampled`: the end-to-end objective of the paper, decisions sampled, masked attention. `deployed`: the
    backbone adapts to what inference does, top-k with the other tokens really gone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    warm_start_steps: int = Field(250, ge=0, description="steps of the warm start")
    steps: int | None = Field(None, ge=0, description="steps after the warm start")
    epochs: float | None = Field(None, ge=0, description="the same in passes over the pictures, instead of steps")
    deployed_share: float = Field(0.75, ge=0, le=1, description="share of those steps on the deployed path, at the end")
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the predictors")
    tune_lr_scale: float = Field(0.1, gt=0, description="the predictors' rate after the warm start, as a share of lr")
    backbone_lr_scale: float = Field(0.05, ge=0, description="the backbone's rate as a share of lr")
    freeze_epochs: float = Field(0.0, ge=0, description="passes after the warm start with the backbone frozen")
    weight_decay: float = Field(0.05, ge=0)
    warmup_share: float = Field(0.05, ge=0, le=1, description="share of a phase in which the rate rises")
    clip_grad: float = Field(1.0, gt=0, description="largest gradient norm")
    tau: float = Field(1.0, gt=0, description="temperature of the Gumbel-softmax")
    weights: LossWeights = LossWeights()
    labels: bool = Field(True, description="use labels; False is distillation alone")
    crop_scale: float = Field(0.5, gt=0, le=1, description="smallest share of a picture that a training crop shows")
    precision: Precision = "auto"
    seed: int = Field(0, ge=0)
    num_workers: int | None = Field(None, ge=0, description="processes that read pictures; None to choose")
    max_skipped: int = Field(20, ge=1, description="non-finite steps in a row after which training stops")

    @model_validator(mode="after")
    def _one_length(self) -> Recipe:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self

    def workers(self) -> int:
        """Processes that read pictures."""
        if self.num_workers is not None:
            return self.num_workers
        return min(8, (os.cpu_count() or 1) // 2)

    def num_steps(self, steps_per_epoch: int) -> int:
        """Steps after the warm start."""
        if self.epochs is not None:
            return round(self.epochs * steps_per_epoch)
        return DEFAULT_STEPS if self.steps is None else self.steps


DEFAULT_STEPS = 200

DEMO = {"warm_start_steps": 80, "steps": 40}
"""What differs for the embedded demo, which must be done in two minutes on two cores."""
