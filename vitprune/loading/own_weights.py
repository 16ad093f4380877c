"""A weight file of one's own, for an architecture of timm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn

from vitprune.checkpoint.sparse_file import written_by_vitprune
from vitprune.checkpoint.weight_file import check_npz, read_weights
from vitprune.errors import CheckpointError, UsageError
from vitprune.loading.hub import first_mismatch
from vitprune.loading.transformers import convert_state, is_transformers_state

_MOST_CHANGE = 1.0
"""How far fine-tuning moves weights at most, in norms of the weights; two models that have nothing in common are 1.4
apart, and sparsify's short recipe moves them by hundredths."""


def check_made_from(sparse: nn.Module, dense: nn.Module, source: str, file: str) -> None:
    """Make sure that a sparse model's backbone is a fine-tuned copy of a dense model, and not of other weights.

    Args:
        sparse: the backbone.
        dense: what is taken for its origin, of the same shapes.
        source: what to call the dense model's weights.
        file: what to call the sparse model.

    Raises:
        UsageError: their weights are as far from each other as those of two models that were trained apart.
    """
    theirs = dense.state_dict()
    distance = norm = 0.0
    for name, tensor in sparse.state_dict().items():
        other = theirs.get(name)
        if tensor.ndim >= 2 and other is not None and other.shape == tensor.shape:
            distance += (tensor.float() - other.float()).pow(2).sum().item()
            norm += other.float().pow(2).sum().item()
    if distance > _MOST_CHANGE**2 * norm:
        raise UsageError(
            f"'{source}' does not hold the weights that '{file}' was made from, but those of another model",
            f"--checkpoint takes the dense weights that sparsify started from; `vitprune info {file}` names them",
        )


def build_with_weights(name: str, path: Path, sizes: dict[str, Any]) -> Any:
    """A timm model with the weights of a file, through timm's own conversion of foreign layouts.

    Args:
        name: of the architecture.
        path: a weight file; it says how many classes and channels there are.
        sizes: more arguments for timm.create_model.

    Raises:
        UsageError: the file is a sparse model of ours.
        CheckpointError: it is missing, damaged, or does not fit.
    """
    overlay: dict[str, Any]
    channels: dict[str, int] = {}
    if path.suffix == ".safetensors" and path.is_file() and written_by_vitprune(path):
        raise UsageError(f"'{path}' is a sparse model already", f"give it as MODEL: {path}")
    if path.suffix == ".npz":
        check_npz(path)
        overlay, classes = {"file": str(path), "custom_load": True}, {}
    else:
        state = read_weights(path)
        if is_transformers_state(state):
            state = convert_state(state)
        config = timm.get_pretrained_cfg(name)
        head = (config.classifier if config is not None else None) or "head"
        head_weight = state.get(f"{head if isinstance(head, str) else head[0]}.weight")
        # A fine-tuned model has its own class count; the file says which.
        classes = {"num_classes": int(head_weight.shape[0])} if head_weight is not None else {}
        first = state.get(f"{config.first_conv if config is not None else ''}.weight")
        if first is not None and first.ndim == 4 and first.shape[1] != 3:
            channels = {"in_chans": int(first.shape[1])}
        overlay = {"state_dict": state, "custom_load": False, **classes}
    try:
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **{**sizes, **classes, **channels}
        )
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"the weights in '{path}' do not fit {name}: {first_mismatch(error)}",
            "check that MODEL is the architecture the file was saved from",
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # or every copy of the model drags the weights along
    return model
