"""Token merging, from its paper (ToMe, Bolya et al., ICLR 2023, https://arxiv.org/abs/2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from vitprune.backbones import AttentionRecorder, wrap
from vitprune.tokens.filling import Grid, fill_tokens, pruned_grid
from vitprune.tokens.masking import size_bias


def merges_per_block(depth: int, total: int, *, late: bool = False) -> tuple[int, ...]:
    """How many tokens each block merges, `total` in all.

    Args:
        depth: number of blocks.
        total: merges of all blocks together.
        late: in proportion to the square of the block's number, counted from 1, instead of equally: published to lose
            less at the same cost.
    """
    weights = [((index + 1) / depth) ** 2 if late else 1.0 for index in range(depth)]
    borders = [0]
    for index in range(depth):  # rounding the running sum keeps the total exact
        borders.append(round(total * sum(weights[: index + 1]) / sum(weights)))
    return tuple(after - before for before, after in pairwise(borders))


class ToMeViT(nn.Module):
    """A model that merges its most similar patch tokens in every block, between attention and MLP. No training.

    Patch tokens are split into two sets interleaved; every token of the first finds its most similar one in the second
    (cosine of the keys, mean over heads); the `merges` most similar pairs become one token each, their average
    weighted by size. Attention weighs keys by size (log size added to their logits). Prefix tokens never merge.

    Args:
        model: a timm model of a supported family whose blocks have attention and MLP one after the other.
        merges: per block, how many tokens to merge; at most half of those left.

    Raises:
        UnsupportedModelError: see `vitprune.backbones.wrap`, or the blocks are built otherwise.
    """

    def __init__(self, model: nn.Module, merges: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.backbone = wrap(model)
        self.backbone.check_halves()
        if len(merges) != self.backbone.depth:
            raise ValueError(f"expected merges for {self.backbone.depth} blocks, got {len(merges)}")
        self.merges = tuple(merges)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        x, sizes, _ = self._run(images)
        return self.backbone.head(self.backbone.norm(x), sizes=sizes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the tokens of all patches, (B, P + N, C), filled in as a SparseViT's are."""
        x, _, grid = self._run(images, Grid())
        filled = x if grid is None else fill_tokens(x, grid, self.backbone.num_prefix_tokens)
        return self.backbone.features(filled)

    def _run(self, images: Tensor, grid: Grid | None = None) -> tuple[Tensor, Tensor, Grid | None]:
        """Tokens after the last block (B, P + K, C), their sizes (B, K) and, of a new grid, that of all merges."""
        backbone, prefix = self.backbone, self.backbone.num_prefix_tokens
        x = backbone.embed(images)
        sizes = torch.ones(x.shape[0], x.shape[1] - prefix, device=x.device)
        for index, planned in enumerate(self.merges):
            recorder = AttentionRecorder()
            with recorder:
                x = backbone.attention_half(index, x, size_bias(sizes, prefix))
            merges = min(planned, (x.shape[1] - prefix) // 2)
            if merges:
                keys = recorder.keys[-1].float().mean(dim=1)[:, prefix:]
                patches, sizes, rows = _merge(x[:, prefix:], sizes, keys, merges)
                if grid is not None:
                    grid = pruned_grid(grid, x[:, prefix:], patches, rows)
                x = torch.cat((x[:, :prefix], patches), dim=1)
            x = backbone.mlp_half(index, x)
        return x, sizes, grid


def _merge(x: Tensor, sizes: Tensor, keys: Tensor, merges: int) -> tuple[Tensor, Tensor, Tensor]:
    """X (B, N, C), sizes (B, N) and keys (B, N, D) to N - `merges` tokens, their sizes, and the row of each before."""
    unit = keys / keys.norm(dim=-1, keepdim=True)
    similarity, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=-1)  # (B, N / 2)
    order = similarity.argsort(dim=-1, descending=True)
    merged, kept = order[:, :merges], order[:, merges:].sort(dim=-1).values
    target = partner.gather(1, merged)

    def merge(values: Tensor) -> Tensor:
        def rows(indices: Tensor) -> Tensor:
            return indices.unsqueeze(-1).expand(-1, -1, values.shape[-1])

        first, second = values[:, ::2], values[:, 1::2]
        second = second.scatter_add(1, rows(target), first.gather(1, rows(merged)))
        return torch.cat((first.gather(1, rows(kept)), second), dim=1)

    weight = sizes.unsqueeze(-1)
    total, new_sizes = merge(x * weight), merge(weight)
    left = order.shape[1] - merges
    rows = order.new_empty(x.shape[:2])
    places = torch.empty_like(order).scatter_(1, kept, torch.arange(left, device=x.device).expand_as(kept))
    rows[:, ::2] = places.scatter_(1, merged, left + target)
    rows[:, 1::2] = torch.arange(left, left + rows[:, 1::2].shape[1], device=x.device)
    return (total / new_sizes).to(x.dtype), new_sizes.squeeze(-1), rows
