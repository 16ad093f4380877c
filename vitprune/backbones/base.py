"""What the rest of vitprune may ask of a vision transformer, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


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

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to tokens (B, P + N, C), ready for block 0."""

    @abstractmethod
    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Run one block; `attn_mask` is added to the attention logits, broadcastable to (B, heads, T, T)."""

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """The final norm before pooling (identity in models that norm after pooling)."""

    @abstractmethod
    def token_features(self, x: Tensor) -> Tensor:
        """Normalised patch tokens (B, N, C) out of `norm`'s output, for the token loss."""

    @abstractmethod
    def head(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Pool `norm`'s output and classify.

        Args:
            x: (B, P + N, C).
            kept: D-hat (B, N) of the patch tokens in a masked pass: pooling then sees kept tokens only, as it will
                when the others are really gone. None when all tokens of `x` count.

        Returns:
            Logits (B, num_classes).
        """
