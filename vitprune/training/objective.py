"""What a training step minimises, phase by phase."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprune.common.own_members import PublicModule
from vitprune.common.wrappers import how_wrapped
from vitprune.errors import UsageError
from vitprune.model import MaskedOutput, Selection, SparseViT
from vitprune.model.passes import Decide
from vitprune.schedule import Stage
from vitprune.tasks import Spread, Task, task_named
from vitprune.tokens.losses import pooled_loss, ratio_loss, token_distillation_loss, token_loss
from vitprune.tokens.masking import gumbel_decision, gumbel_noise
from vitprune.tokens.selection import gather_tokens
from vitprune.training.pretraining import ranking_loss, teacher_saliency
from vitprune.training.recipe import Phase, Recipe


class StepLoss(NamedTuple):
    """The loss of a step.

    Attributes:
        total: weighted sum, a scalar with gradient.
        components: the unweighted losses by name, detached scalars.
        kept_ratios: share of the original tokens kept after each stage, (num_stages,), detached.
        classes: the teacher's, of each image, (B,); None where it was not asked, or names none.
    """

    total: Tensor
    components: dict[str, Tensor]
    kept_ratios: Tensor
    classes: Tensor | None = None


Rows = tuple[int, int]
"""Which rows of a larger batch some images are: the first one's number, and how many there are in all."""


class Objective(PublicModule):
    """Student and losses as one module, so that a data-parallel wrapper sees the whole step, but not the teacher.

    Example:
        objective = vitprune.Objective(student, vitprune.attach(teacher, keep=1.0), vitprune.Recipe()).train()
        loss = objective(images, labels, "deployed")
        loss.total.backward()

    While the student's blocks before its first stage hold the teacher's weights, these run once for both, by the
    teacher and without gradient, unless `recipe.train_trunk` says that they train. Once they differ, be it in one
    number, the student runs its own. Every call compares them, which is cheap beside a batch.

    Args:
        student: the sparse model.
        teacher: the dense model, a SparseViT without stages; never trained, always in eval mode.
        recipe: the settings; `weights`, `labels`, `train_trunk`, `tau`, `pretraining_target` and
            `relative_token_loss` are read here, the others are for `vitprune.sparsify`.

    Of values and embeddings the loss is measured by where the teacher's outputs lie: over the first batch that it
    sees, or what `spread` was set to.

    Raises:
        UsageError: one of the models is no SparseViT, or both share a backbone.
    """

    teacher: SparseViT

    def __init__(self, student: SparseViT, teacher: SparseViT, recipe: Recipe) -> None:
        super().__init__()
        for name, model in (("student", student), ("teacher", teacher)):
            if how := how_wrapped(model):
                hint = "give the SparseViT in it, and wrap or compile the Objective"
                raise UsageError(f"the {name} is {how}", hint)
            if not isinstance(model, SparseViT):
                way = "keep=0.7" if name == "student" else "keep=1.0"
                raise UsageError(
                    f"the {name} is a {type(model).__name__}, not a SparseViT", f"vitprune.attach(model, {way})"
                )
        if student.blend is not None:
            raise UsageError(
                "the student was trained for a range of keep ratios, and its weights lie between two ends",
                "set student.blend = None to train it further for its ratio alone",
            )
        if student.model is teacher.model:
            raise UsageError(
                "student and teacher share a backbone, which the teacher freezes",
                "attach one of them to a copy: vitprune.attach(copy.deepcopy(model), 0.7)",
            )
        self.student = student
        # Past nn.Module, or it would belong to this module: wrapped, and sent from process to process.
        object.__setattr__(self, "teacher", teacher.requires_grad_(False).eval())
        self.recipe = recipe
        self.spread: Spread | None = None
        blocks = student.schedule.blocks
        self.first_block = blocks[0] if blocks else 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Objective:
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]  # .to() and .cuda() move it along
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> Objective:
        """Set the student's mode, but for its batch norms; the teacher is always in eval mode. What is deployed
        uses running statistics, and few small batches must not replace those that the weights came with.
        """
        self.training = mode
        self.student.train(mode)
        for module in self.student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        phase: Phase | None = None,
        noise: float = 1.0,
        rows: Rows | None = None,
    ) -> StepLoss:
        """The loss of one batch, or of some rows of a larger one.

        Args:
            images: (B, in_chans, H, W).
            labels: class indices (B,) or, of mixed images, class probabilities (B, num_classes); None where none are
                trained on: with `recipe.labels` False, `recipe.weights.ce` 0, or in the phase "pretraining".
            phase: "pretraining" trains the predictors alone, "sampled" predictors and backbone, "deployed" the
                backbone from the first stage on, or all of it with `recipe.train_trunk`. See `Recipe`.
            noise: scale of the Gumbel noise in sampled steps.
            rows: where the images belong in the batch of all microbatches and processes: together these draw the
                noise that one pass over all would draw. None where they are all.

        Raises:
            UsageError: no such phase, labels that it needs are missing, or the student has nothing to train in it.
        """
        self._check(phase, labels)
        with torch.no_grad():
            trunk = self.teacher.backbone.embed_up_to(images, self.first_block)
        if phase == "pretraining":
            with torch.no_grad():
                shared = self.shares_trunk
                own = trunk if shared else self.student.backbone.embed_up_to(images, self.first_block)
            return self._pretraining(trunk, own)
        with torch.no_grad():
            teacher = self.teacher.select_from(trunk, self.first_block)
        # One that prunes by its attention reads that of the block before the stage.
        by_attention = self.student.predictor == "attention"
        if not (self.recipe.train_trunk or by_attention) and self.shares_trunk:
            x, first = trunk, self.first_block
        else:
            x, first = self.student.backbone.embed(images), 0
        if phase == "sampled":
            decide = self._decide(noise, rows or (0, len(images)))
            loss = self._sampled(self.student.forward_masked_from(x, first, decide), labels, teacher)
        else:
            loss = self._deployed(self.student.select_from(x, first, self._task.filled), labels, teacher)
        return loss._replace(classes=self._task.decisions(teacher.logits)) if self._task.decides == "class" else loss

    @property
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what it finds decides what runs
    def shares_trunk(self) -> bool:
        """Whether student and teacher are one model up to the first stage: same classes, names and numbers."""
        own, theirs = (model.backbone.trunk(self.first_block) for model in (self.student, self.teacher))
        return (
            type(self.student.model) is type(self.teacher.model)
            and own.keys() == theirs.keys()
            # By value: versions of tensors do not count what is written through `.data`.
            and all(_equal(tensor, theirs[name]) for name, tensor in own.items())
        )

    def _check(self, phase: Phase | None, labels: Tensor | None) -> None:
        if phase not in get_args(Phase):
            raise UsageError(f"phase is {phase!r}", f"choose from {', '.join(get_args(Phase))}")
        untrained = {"attention": "prunes by its attention", "norm": "prunes by the norm of its tokens"}
        why = untrained.get(self.student.predictor or "") if self.student.schedule.stages else "prunes nothing"
        if phase != "deployed" and why is not None:
            raise UsageError(
                f"the student {why}, so it has no predictors to train in the phase '{phase}'",
                'the phase "deployed" trains its backbone',
            )
        if labels is None and phase != "pretraining" and self._uses_labels:
            raise UsageError(
                f"labels are needed: weights.ce is {self.recipe.weights.ce:g}", "give them, or set labels=False"
            )

    @property
    def _task(self) -> Task:
        """What the student is for."""
        return task_named(self.student.task)

    @property
    def _uses_labels(self) -> bool:
        return self.recipe.labels and self.recipe.weights.ce > 0

    def _pretraining(self, trunk: Tensor, own: Tensor) -> StepLoss:
        """Of the teacher's tokens and the student's at the first stage."""
        # The attention of compiled blocks cannot be recorded.
        eager = torch.compiler.set_stance("force_eager") if self.recipe.compile else nullcontext()
        with eager:
            target, influence = self.recipe.pretraining_target, self._task.influence
            saliency = teacher_saliency(self.teacher.backbone, trunk, self.first_block, target, influence)
        tokens = self.student.run_blocks(own, self.first_block, self.student.schedule.blocks[-1])
        loss = ranking_loss(tokens.scores, tokens.indices, saliency)
        return StepLoss(loss, {"rank": loss.detach()}, self._deployed_ratios(tokens.indices))

    def _decide(self, noise: float, rows: Rows) -> Decide:
        first, num_images = rows

        def draw(like: Tensor) -> Tensor:
            return gumbel_noise(like.new_empty(num_images, *like.shape[1:]))[first : first + len(like)]

        def decide(log_pi: Tensor, kept: Tensor, stage: Stage) -> Tensor:
            return gumbel_decision(log_pi, self.recipe.tau, noise, draw)

        return decide

    def _sampled(self, out: MaskedOutput, labels: Tensor | None, teacher: Selection) -> StepLoss:
        losses = self._distil(out, labels, teacher)
        if self.recipe.weights.token > 0:
            losses["token"] = self._token_loss(out.features, teacher.features, out.kept[-1])
        losses["ratio"] = ratio_loss(out.kept, self.student.schedule.ratios)
        return self._sum(losses, torch.stack([mask.detach().mean() for mask in out.kept]))

    def _deployed(self, out: Selection, labels: Tensor | None, teacher: Selection) -> StepLoss:
        losses = self._distil(out, labels, teacher)
        if self.recipe.weights.token > 0:
            losses["token"] = self._token_loss(out.features, self._counterparts(out, teacher.features))
        return self._sum(losses, self._deployed_ratios(out.indices))

    def _counterparts(self, out: Selection, features: Tensor) -> Tensor:
        """What the teacher has (B, N, C) in the place of each kept token: the mean of those merged into it, or its own.

        A merged token is to say what all of them said.
        """
        if out.choices:
            members = F.one_hot(out.owners(), out.features.shape[1]).to(features.dtype)  # (B, N, K)
            return members.transpose(1, 2) @ features / members.sum(dim=1).unsqueeze(-1)
        return gather_tokens(features, out.indices[-1]) if out.indices else features

    def _distil(self, out: MaskedOutput | Selection, labels: Tensor | None, teacher: Selection) -> dict[str, Tensor]:
        task = self._task
        if task.needs_spread and self.spread is None:
            self.spread = Spread.of(teacher.logits)
        losses = {task.loss: task.distillation(out, teacher, self.spread)}
        if self.recipe.weights.pooled > 0:
            losses["pooled"] = pooled_loss(out.pooled, teacher.pooled)
        if labels is not None and self._uses_labels:
            losses["ce"] = task.supervision(out.logits, labels, self.recipe.augmentation.smoothing, self.spread)
        return losses

    def _token_loss(self, features: Tensor, target: Tensor, kept: Tensor | None = None) -> Tensor:
        own, teachers = (
            model.backbone.token_logits(x) for model, x in ((self.student, features), (self.teacher, target))
        )
        if own is not None and teachers is not None:
            return token_distillation_loss(own, teachers, kept)
        return token_loss(features, target, kept, relative=self.recipe.relative_token_loss)

    def _sum(self, losses: dict[str, Tensor], kept_ratios: Tensor) -> StepLoss:
        weights = self.recipe.weights.model_dump()
        weights[self._task.loss] = weights["kl"]
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return StepLoss(total, {name: loss.detach() for name, loss in losses.items()}, kept_ratios)

    def _deployed_ratios(self, indices: tuple[Tensor, ...]) -> Tensor:
        num_patches = self.student.schedule.num_patches
        return torch.tensor([chosen.shape[1] / num_patches for chosen in indices])


def _equal(one: Tensor, other: Tensor) -> bool:
    """As torch.equal, which cannot compare tensors of other places and precisions."""
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
