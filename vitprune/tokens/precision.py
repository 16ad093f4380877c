"""What decides which tokens are kept is computed in fp32 at least, whatever the model runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` itself, or half precision as fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on where `x` is."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast switched off, only where it is on: exported graphs would hold the switch as an operator of its own."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()
