"""What torch, timm and PEFT put around a model, and the model in it."""

from __future__ import annotations

from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_AVERAGED = (AveragedModel, ModelEmaV2, ModelEmaV3)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in a compiled, data-parallel, averaged or PEFT's one, which shares its weights; else `model` itself."""
    while (found := _inner(model)) is not None:
        model = found[0]
    return model


def how_wrapped(model: nn.Module) -> str | None:
    """What was done to a model, for a sentence: "compiled", "wrapped in DataParallel"; None if nothing was."""
    found = _inner(model)
    return None if found is None else found[1]


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile made the model, or one within it."""
    return any(isinstance(getattr(module, "_orig_mod", None), nn.Module) for module in model.modules())


def _inner(model: nn.Module) -> tuple[nn.Module, str] | None:
    around = f"wrapped in {type(model).__name__}"
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        return inner, "compiled"
    if isinstance(model, _PARALLEL):
        return model.module, around
    if isinstance(model, _AVERAGED):
        return model.module, f"an average of weights ({type(model).__name__})"
    if isinstance(model, nn.Module) and callable(base := getattr(model, "get_base_model", None)):  # PEFT's
        return base(), around
    return None
