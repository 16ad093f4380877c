"""What a model costs on paper: multiply-accumulates and parameters, and the plan of a sparse one."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitprune.backbones import input_size as size_of
from vitprune.common.wrappers import unwrapped
from vitprune.model import SparseViT, attach


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image's forward pass in eval mode, attention included.

    Example:
        sparse = vitprune.load("model.safetensors")
        print(vitprune.count_macs(sparse, (3, 224, 224)) / 1e9, "GMACs")

    The convention of the DynamicViT paper (its "FLOPs"): every matrix product and convolution counts, so patch
    embedding, q k^T, attention times v, token predictors and classifier do; norms, activations, softmax, additions
    and top-k do not. DeiT-S is 4.60 G so counted; counters blind to attention say 4.25 G.

    Nothing is computed and no weight is copied: a copy of the module tree runs on tensors that have a shape and no
    data. `model` may be on any device, meta included, and is left as it is.

    Args:
        model: any model whose forward takes images (B, C, H, W) and whose shapes do not depend on their content; or an
            exported file, whose operators cannot be seen and which gives a model of the same `structure()`.
        input_size: (C, H, W).
    """
    model = unwrapped(model)
    if structure := getattr(model, "structure", None):
        model = structure()
    # Fake tensors rather than the meta device: they claim to be on the CPU, and autocast knows no device "meta".
    # no_grad rather than inference_mode, which would hide attention's matrix products from the counter.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    shadow = _shadow(model, fake).eval()
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    dtype = next(dtypes, torch.get_default_dtype())
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(False), torch.no_grad(), fake, sdpa_kernel(SDPBackend.MATH), counter:
        shadow(torch.empty(1, *input_size, dtype=dtype, device="cpu"))
    return int(counter.get_total_flops()) // 2


def count_params(model: nn.Module) -> int:
    """Parameters, predictors included; a shared one counts once, buffers do not."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe_plan(sparse: SparseViT, name: str) -> dict[str, Any]:
    """Plan and cost beside the dense model called `name`, for JSON: the same keys in every command.

    The sparse model is from `attach` or a file, on any device, meta included.
    """
    asked, plan, size = sparse.sparsity, sparse.schedule, size_of(sparse.model)
    by_keep = asked is not None and asked.tokens_left is None
    models = {"dense": attach(sparse.model, keep=1.0), "sparse": sparse}
    macs = {side: count_macs(model, size) for side, model in models.items()}
    return {
        "model": name,
        "task": sparse.task,
        "keep": sparse.keep if by_keep else None,
        "schedule": asked.token_schedule if asked is not None and by_keep else None,
        "pruned": sparse.pruned,
        "align": plan.align,
        "input_size": list(size),
        "depth": plan.depth,
        "num_prefix_tokens": sparse.backbone.num_prefix_tokens,
        "num_patches": plan.num_patches,
        "num_classes": sparse.num_classes,
        **({"keep_range": list(sparse.keep_range)} if sparse.keep_range else {}),
        "stages": [asdict(stage) for stage in plan.stages],
        **{side: {"gmacs": macs[side] / 1e9, "params_m": count_params(model) / 1e6} for side, model in models.items()},
        "delta": {"gmacs_pct": 100 * (macs["sparse"] / macs["dense"] - 1)},
    }


def _shadow(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A deep copy of `model` without its data: parameters and buffers become fake tensors."""
    # deepcopy takes what memo holds instead of copying it.
    memo: dict[int, Any] = {}
    with torch.inference_mode(False), fake:
        for parameter in model.parameters():
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return copy.deepcopy(model, memo)
