"""Official DynamicViT checkpoints (https://github.com/raoyongming/DynamicViT) as models of ours.

Such a file holds weights and says neither which architecture nor how many tokens it was trained to keep: the first is
read off the shapes, the second is the user's to say. Its predictors put keep before drop; ours follow the paper, where
drop comes first.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import timm
from torch import Tensor, nn

from vitprune.backbones import wrap
from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.sparse_file import describe, fill
from vitprune.checkpoint.weight_file import open_weights
from vitprune.common.progress import SILENT, Listener
from vitprune.errors import CheckpointError, UsageError
from vitprune.loading.weight_sets import choose_weights
from vitprune.model import SparseViT, attach_as
from vitprune.schedule import Sparsity, default_stages

ORIGIN = {"license": "mit", "origin_url": "https://github.com/raoyongming/DynamicViT"}

_PREDICTOR = re.compile(r"score_predictor\.(\d+)\.(in|out)_conv\.(.+)")
_EXPECTED = ("cls_token", "pos_embed", "norm.weight", "head.weight", "blocks.0.norm1.weight", "blocks.1.norm1.weight")
"""Tensors that all of them have, and a model without predictors too."""
_LAST_LAYER = "out_conv.4."
_PATCH = 16
"""Pixels of a patch's side, in all of them."""
_ARCHITECTURES = {  # by family, width and depth, which tell what shapes cannot, such as the number of heads
    ("deit", 192, 12): "deit_tiny_patch16_224",
    ("deit", 256, 12): "deit_256_patch16_224",
    ("deit", 384, 12): "deit_small_patch16_224",
    ("deit", 768, 12): "deit_base_patch16_224",
    ("lvvit", 240, 12): "lvvit_t",
    ("lvvit", 384, 16): "lvvit_s",
    ("lvvit", 512, 20): "lvvit_m",
    ("lvvit", 768, 24): "lvvit_l",
}
_BUILT_FROM = {"deit_256_patch16_224": ("deit_tiny_patch16_224", {"embed_dim": 256, "num_heads": 4})}
"""What timm does not have by itself, as an architecture of timm and its arguments."""


def load_official(
    path: Path, keep: float | None, stages: Sequence[int] | None = None, listener: Listener = SILENT
) -> tuple[SparseViT, Metadata]:
    """An official checkpoint as a sparse model that prunes as the original does: geometric schedule, tokens dropped.

    Of the torch pickle only tensors, and an argparse.Namespace beside them, are unpickled. The share of tokens that one
    stage keeps, in (0, 1), and the block indices before which its predictors act (None for equal parts of the depth)
    it does not say. The model is in eval mode, and the metadata is to save it with.

    Raises:
        CheckpointError: the file is missing, damaged, not official, or of an architecture that was not published.
        UsageError: `keep` is missing or out of range, or `stages` does not fit the predictors.
    """
    chosen = choose_weights(open_weights(path), _EXPECTED)
    state = chosen.tensors
    predictors = {int(match[1]) for match in map(_PREDICTOR.fullmatch, state) if match}
    if not predictors:
        raise CheckpointError(
            f"'{path}' is no official DynamicViT checkpoint: it has no 'score_predictor' tensors",
            f"plain weights go with the name of their architecture: NAME and --checkpoint {path}",
        )
    if keep is None:
        raise UsageError(
            f"'{path}' does not say which share of its tokens it was trained to keep",
            f"vitprune convert {shlex.quote(str(path))} --keep 0.7 makes a model.safetensors of it",
        )
    if keep == 1:
        raise UsageError("at keep 1 nothing is pruned, so there is nothing to convert", "try --keep 0.7")
    for line in chosen.said:
        listener.say(line)
    name, model = _build(state, path)
    backbone = wrap(model)
    stages = _stages(path, backbone.depth, len(predictors), stages)
    sparse = attach_as(model, Sparsity.as_published(keep, stages))
    fill(sparse, _renamed(state), f"'{path}'", name)
    origin = {"source": path.name, **ORIGIN}
    return sparse.eval(), describe(sparse, name=name, origin=origin)


def _build(state: dict[str, Tensor], path: Path) -> tuple[str, nn.Module]:
    """The model that the shapes are those of, with fresh weights."""
    family, stem = "lvvit", state.get("patch_embed.conv1.weight")
    if stem is None:
        family, stem = "deit", state.get("patch_embed.proj.weight")
    positions, head = state.get("pos_embed"), state.get("head.weight")
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    name = None if positions is None else _ARCHITECTURES.get((family, positions.shape[-1], depth))
    if stem is None or positions is None or head is None or name is None:
        raise CheckpointError(
            f"'{path}' has token predictors, but its shapes are not those of a DeiT or LV-ViT that we know",
            "known are DeiT-Ti, -256, -S, -B and LV-ViT-T, -S, -M, -L",
        )
    timm_name, arguments = _BUILT_FROM.get(name, (name, {}))
    model: nn.Module = timm.create_model(
        timm_name,
        img_size=_PATCH * math.isqrt(positions.shape[1] - 1),
        in_chans=stem.shape[1],
        num_classes=head.shape[0],
        **arguments,
    )
    return name, model


def _stages(path: Path, depth: int, num_predictors: int, stages: Sequence[int] | None) -> tuple[int, ...]:
    chosen = default_stages(depth, num_predictors) if stages is None else tuple(stages)
    if len(chosen) != num_predictors:
        given = ",".join(map(str, chosen))
        raise UsageError(
            f"--prune-at {given} names {len(chosen)} block(s), but '{path}' has {num_predictors} predictors",
            f"name one block for each; the default is {','.join(map(str, default_stages(depth, num_predictors)))}",
        )
    return chosen


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under the names of our file, drop before keep."""
    renamed = {}
    for name, tensor in state.items():
        match = _PREDICTOR.fullmatch(name)
        if match is None:
            renamed[name] = tensor
        else:
            stage, part, rest = match.groups()
            renamed[f"predictors.{stage}.{part}_proj.{rest}"] = tensor.flip(0) if _LAST_LAYER in name else tensor
    return renamed
