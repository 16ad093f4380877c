"""How much of the object the kept tokens cover, where the drawing knows where the object is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.data import Data, ImageSet, batches, make_loader
from vitprune.model import SparseViT


@torch.inference_mode()
def object_coverage(models: Mapping[str, nn.Module], data: Data, device: torch.device) -> dict[str, float]:
    """Share of the object's pixels that lie under tokens kept after the last stage, in percent, mean over images.

    Args:
        models: by name; dense ones are passed over.
        data: with `object_mask` and the evaluation transform of `val` set; images are not cropped by it.
        device: where to run.
    """
    assert data.object_mask is not None
    assert isinstance(data.val, ImageSet)
    sparse = {n: m for n, m in models.items() if isinstance(m, SparseViT) and m.schedule.stages}
    shares: dict[str, list[Tensor]] = {name: [] for name in sparse}
    done = 0
    for images, _ in batches(make_loader(data.val, 64)):
        masks = np.stack([data.object_mask(item) for item in data.val.items[done : done + len(images)]])
        done += len(images)
        for name, model in sparse.items():
            per_patch = _per_patch(torch.from_numpy(masks), model.backbone.grid_size)  # (B, N)
            kept = model.to(device).eval().select(images.to(device)).indices[-1].cpu()
            shares[name].append(per_patch.gather(1, kept).sum(dim=1) / per_patch.sum(dim=1))
    return {name: 100 * torch.cat(parts).mean().item() for name, parts in shares.items()}


def _per_patch(masks: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Number of object pixels under each patch: (B, H, W) to (B, N)."""
    batch, height, width = masks.shape
    rows, columns = grid_size
    cells = masks.float().reshape(batch, rows, height // rows, columns, width // columns)
    return cells.sum(dim=(2, 4)).reshape(batch, rows * columns)
