"""What the passes of a sparse model take and give.

Shapes: B images, P prefix tokens (class, distillation, registers), N patch tokens, K_s of them kept after stage s, C
channels. Of the paper: pi are a predictor's probabilities (drop, keep), D is the decision of one stage (1 keep), D-hat
the product of the decisions so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitprune.schedule import Stage
from vitprune.tokens.redundancy import Choice

TaskName = Literal["classification", "multilabel", "regression", "embedding", "dense"]
"""What a model is for."""

Decide = Callable[[Tensor, Tensor, Stage], Tensor]
"""How the masked pass samples: (log_pi (B, N, 2), D-hat so far (B, N), stage) to D (B, N)."""


class Tokens(NamedTuple):
    """A batch on its way through the blocks, and what its stages chose so far.

    Attributes:
        x: (B, P + K, C).
        sizes: with merging, how many patches each token stands for, (B, P + K); None before the first stage.
        indices: original positions of the patch tokens kept at each stage so far, each (B, K_s), rising.
        scores: keep scores of the tokens that reached each stage, each (B, K_{s-1}).
        choices: with merging, what each stage chose among the tokens that reached it.
    """

    x: Tensor
    sizes: Tensor | None = None
    indices: tuple[Tensor, ...] = ()
    scores: tuple[Tensor, ...] = ()
    choices: tuple[Choice, ...] = ()


class Selection(NamedTuple):
    """What the deployed pass computed and which tokens it kept.

    Attributes:
        logits: (B, num_classes).
        pooled: what the classifier reads, (B, C).
        features: kept patch tokens after the final norm, (B, K, C).
        indices: original positions of the tokens kept after each stage, each (B, K_s), rising.
        scores: keep scores of the tokens that reached each stage, each (B, K_{s-1}).
        sizes: with merging, how many patches each token kept to the end stands for, (B, K); else None.
        choices: with merging, what each stage chose among the tokens that reached it.
    """

    logits: Tensor
    pooled: Tensor
    features: Tensor
    indices: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]
    sizes: Tensor | None
    choices: tuple[Choice, ...]

    def owners(self, stage: int = -1) -> Tensor:
        """With merging, which of the tokens kept after a stage each patch has become part of, (B, N) of rows in K_s."""
        owners: Tensor | None = None
        for kept, pruned, nearest, _ in self.choices[: stage + 1 or None]:
            rows = torch.empty(kept.shape[0], kept.shape[1] + pruned.shape[1], dtype=kept.dtype, device=kept.device)
            rows.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
            rows.scatter_(1, pruned, nearest)
            owners = rows if owners is None else rows.gather(1, owners)
        if owners is None:
            raise ValueError("no stage merged tokens")
        return owners


class MaskedOutput(NamedTuple):
    """What the masked (training) pass computed.

    Attributes:
        logits: (B, num_classes).
        pooled: what the classifier reads, (B, C).
        features: all patch tokens after the final norm, (B, N, C).
        kept: D-hat after each stage, each (B, N).
        log_pi: log-probabilities of dropping and keeping, each (B, N, 2).
    """

    logits: Tensor
    pooled: Tensor
    features: Tensor
    kept: tuple[Tensor, ...]
    log_pi: tuple[Tensor, ...]
