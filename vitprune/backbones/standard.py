"""What timm's plain transformers have in common: blocks, norm, pooling by `global_pool`, fc_norm, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitprune.backbones.base import Backbone
from vitprune.backbones.pooling import weighted_pool


class StandardBackbone(Backbone):
    """The parts of an adapter that do not differ between timm's plain transformers.

    Against timm's own forward, random token dropout in training (`patch_drop`) is not applied: the predictors decide
    which tokens go. With `kept` or `sizes`, pooling heeds them.
    """

    pools_prefix = False
    """Whether pooling sees prefix tokens too."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.embed_dim = model.embed_dim
        self.depth = len(self.blocks)
        self.num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
        rows, columns = self._grid()
        self.grid_size = (int(rows), int(columns))
        self.num_classes = model.num_classes

    @property
    def blocks(self) -> Any:
        """The model's blocks."""
        model: Any = self.model
        return model.blocks

    def _grid(self) -> tuple[int, int]:
        model: Any = self.model
        grid: tuple[int, int] = model.patch_embed.grid_size
        return grid

    @property
    def pooling(self) -> Literal["class token", "patches", "attention pool"]:
        """By timm's `global_pool`; the parameter-free pool ("prr") has no query of its own."""
        model: Any = self.model
        if getattr(model, "attn_pool", None) is not None and model.global_pool != "prr":
            return "attention pool"
        return "class token" if model.global_pool == "token" else "patches"

    def _run(self, function: Callable[..., Tensor], x: Tensor, **arguments: Any) -> Tensor:
        """Call a block; honours `model.set_grad_checkpointing()`."""
        model: Any = self.model
        owner = getattr(model, "encoder", model)
        if owner.grad_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(function, x, use_reentrant=False, **arguments)
            return out
        return function(x, **arguments)

    def norm(self, x: Tensor) -> Tensor:
        """The final norm; identity where timm norms after pooling."""
        model: Any = self.model
        out: Tensor = model.norm(x)
        return out

    def token_features(self, x: Tensor) -> Tensor:
        """Patch tokens, through `fc_norm` where that is the model's only norm, so that their scale is bounded."""
        model: Any = self.model
        patches = x[:, self.num_prefix_tokens :]
        if isinstance(model.norm, nn.Identity):
            patches = model.fc_norm(patches)
        return patches

    def head(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Timm's own head, or with `kept` or `sizes` the same one on a pooling that heeds them."""
        model: Any = self.model
        uneven = kept is not None or sizes is not None
        if uneven and (getattr(model, "attn_pool", None) is not None or model.global_pool != "token"):
            pooled = weighted_pool(model, x, self.num_prefix_tokens, kept, sizes, self.pools_prefix)
            masked: Tensor = model.head(model.head_drop(model.fc_norm(pooled)))
            return masked
        logits: Tensor | tuple[Tensor, Tensor] = model.forward_head(x)  # reads prefix tokens only, or all tokens count
        if isinstance(logits, tuple):  # a distilled model in its own training mode gives both heads
            logits = (logits[0] + logits[1]) / 2
        return logits

    def tail(self, first_block: int) -> list[nn.Module]:
        """Blocks, norms, pooling and classifier(s)."""
        model: Any = self.model
        ends = [getattr(model, name, None) for name in ("norm", "attn_pool", "fc_norm", "head", "head_dist")]
        return [*self.blocks[first_block:], *(module for module in ends if module is not None)]

    def set_drop_path(self, rate: float) -> None:
        """Replace what timm calls `drop_path*` in every block."""
        for index, block in enumerate(self.blocks):
            share = rate * index / max(1, self.depth - 1)
            for module in list(block.modules()):
                for name, _ in list(module.named_children()):
                    if name.startswith("drop_path"):
                        setattr(module, name, DropPath(share) if share else nn.Identity())
