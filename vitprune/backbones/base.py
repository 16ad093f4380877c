"""What the rest of vitprune may ask of a vision transformer, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from torch import Tensor, nn

from vitprune.errors import UnsupportedModelError


class Backbone(ABC):
    """A timm model seen as embed > blocks > norm > head over a plain sequence of tokens.

    An adapter, not a module: it owns no weights and keeps a reference to `model`, whose own code does the work.
    Token sequences are (B, P + N, C): P prefix tokens (class, distillation, register) in front of N patch tokens.

    Attributes:
        model: the timm model.
        embed_dim: C.
        depth: number of blocks.
        num_prefix_tokens: P.
        grid_size: patch grid (rows, columns); N is their product.
        num_classes: width of the classifier, 0 for a headless model.
    """

    model: nn.Module
    embed_dim: int
    depth: int
    num_prefix_tokens: int
    grid_size: tuple[int, int]
    num_classes: int

    @property
    def num_patches(self) -> int:
        """N, patch tokens before anything is dropped."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    @abstractmethod
    def pooling(self) -> Literal["class token", "patches", "attention pool"]:
        """What the classifier looks at."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to tokens (B, P + N, C), ready for block 0."""

    @abstractmethod
    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None, positions: Any = None) -> Tensor:
        """Run one block.

        Args:
            index: which.
            x: (B, P + K, C).
            attn_mask: added to the attention logits, broadcastable to (B, heads, P + K, P + K).
            positions: what `positions_of` gave for the tokens of `x`; None is for all tokens.
        """

    def positions_of(self, present: Tensor | None = None) -> Any:
        """What `block` needs to know of where tokens sit; None in models whose tokens carry it themselves.

        To be asked once, and again whenever tokens have left: what it gives serves all blocks until then.

        Args:
            present: original positions of the patch tokens still there, (B, K); None for all.
        """
        return None

    def check_halves(self) -> None:
        """Make sure that `attention_half` and `mlp_half` can be used.

        Raises:
            UnsupportedModelError: a block is not attention and then MLP, each with a residual.
        """
        raise UnsupportedModelError(f"the blocks of a {type(self.model).__name__} cannot be run in halves")

    def attention_half(self, index: int, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """The first half of `block`: attention and its residual."""
        raise NotImplementedError

    def mlp_half(self, index: int, x: Tensor) -> Tensor:
        """The second half of `block`: MLP and its residual."""
        raise NotImplementedError

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """The final norm before pooling (identity in models that norm after pooling)."""

    @abstractmethod
    def token_features(self, x: Tensor) -> Tensor:
        """Normalised patch tokens (B, N, C) out of `norm`'s output, for the token loss."""

    def token_logits(self, features: Tensor) -> Tensor | None:
        """The model's own answer for each patch token, out of `token_features`: (B, N, C) to (B, N, num_classes).

        None where patch tokens have no classifier of their own. Where they have, the token loss compares these answers
        with the teacher's instead of features.
        """
        return None

    @abstractmethod
    def head(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Pool `norm`'s output and classify.

        Args:
            x: (B, P + N, C).
            kept: D-hat (B, N) of the patch tokens in a masked pass: pooling then sees kept tokens only, as it will
                when the others are really gone. None when all tokens of `x` count.
            sizes: with folding, how many patches each patch token stands for, (B, N): it counts as many times.

        Returns:
            Logits (B, num_classes).
        """

    @abstractmethod
    def tail(self, first_block: int) -> list[nn.Module]:
        """The modules that run from block `first_block` on, classifier included."""

    @abstractmethod
    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth, rising from 0 at the first block to `rate` at the last; acts in training mode only."""
