"""What the rest of vitprune may ask of a vision transformer, and how timm's plain ones do it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import timm.data
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import get_model_input_config
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitprune.backbones.pooling import weighted_pool
from vitprune.errors import UnsupportedModelError, UsageError

PREPROCESSING = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
"""What timm's data configuration says of how images are prepared."""


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """Timm's data configuration of a timm model, at the image size it was built for, and `exif`.

    `exif` is whether images are turned by their EXIF orientation first, which timm does not.

    timm's own `resolve_model_data_config` gives the size the weights came with, which differs after
    `create_model(..., img_size=...)`.
    """
    size = {"input_size": get_model_input_config(model)["input_size"]}
    config = timm.data.resolve_model_data_config(model, args=size)
    if config["input_size"][0] == 1:  # grey: timm keeps the three colours' figures
        config |= {key: (sum(config[key]) / len(config[key]),) for key in ("mean", "std")}
    exif = bool((getattr(model, "pretrained_cfg", None) or {}).get("exif", False))
    return {key: config[key] for key in PREPROCESSING} | {"exif": exif}


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a timm model takes."""
    channels, height, width = preprocessing(model)["input_size"]
    return int(channels), int(height), int(width)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def patch_size(model: Any) -> tuple[int, int] | None:
    """(height, width) of a patch in pixels; None where a timm model's stem does not say."""
    encoder = getattr(model, "encoder", model)
    patches = getattr(model, "embeds", None) or getattr(encoder, "patch_embed", None)
    size = getattr(patches, "patch_size", None) or getattr(encoder, "patch_size", None)
    return (size, size) if isinstance(size, int) else size and (int(size[0]), int(size[1]))


def check_whole_patches(model: nn.Module, size: tuple[int, int]) -> None:
    """Make sure that an image size, (height, width), is a multiple of the patch size.

    Raises:
        UsageError: it is not; names the nearest that are.
    """
    patch = patch_size(model)
    if patch is None or all(side % of == 0 for side, of in zip(size, patch, strict=True)):
        return
    nearest = [
        [max(1, whole(side / of)) * of for side, of in zip(size, patch, strict=True)]
        for whole in (math.floor, math.ceil)
    ]
    texts = [str(height) if height == width else f"{height}x{width}" for height, width in nearest]
    raise UsageError(
        f"the image size {size[0]}x{size[1]} is no multiple of the patch size {patch[0]}x{patch[1]}",
        f"try --img-size {' or '.join(dict.fromkeys(texts))}",
    )


class Backbone:
    """A timm model seen as embed > blocks > norm > head over a plain sequence of tokens.

    An adapter, not a module: it owns no weights and keeps a reference to `model`, whose own code does the work. Token
    sequences are (B, P + N, C): P prefix tokens (class, distillation, register) in front of N patch tokens. This class
    serves timm's VisionTransformer (ViT, DeiT, DeiT-III, CLIP, DINOv2, SigLIP, AugReg ...) and
    VisionTransformerDistilled; a family's file holds what differs.

    Against timm's own forward, random token dropout in training (`patch_drop`) is not applied: the predictors decide
    which tokens are pruned.

    Attributes:
        model: the timm model.
        encoder: the part of it that holds the blocks.
        embed_dim: C.
        depth: number of blocks.
        num_prefix_tokens: P.
        floors: whether the stem leaves out pixels that fill no patch, where its patch embedding does not say.

    Raises:
        UsageError: the stem takes whole patches only, and the model's image size is none; names the nearest.
    """

    floors = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.encoder: Any = getattr(model, "encoder", model)
        self.embed_dim: int = model.embed_dim
        self.depth = len(self.blocks)
        self.num_prefix_tokens: int = getattr(model, "num_prefix_tokens", 0)
        patches = self._patches
        if not (getattr(patches, "strict_img_size", self.floors) or getattr(patches, "dynamic_img_pad", False)):
            check_whole_patches(model, input_size(model)[1:])

    @property
    def pools_prefix(self) -> bool:
        """Whether pooling sees prefix tokens too."""
        return bool(getattr(self.model, "pool_include_prefix", False))

    @property
    def num_classes(self) -> int:
        """Width of the classifier now, 0 without one: `reset_classifier` changes it, and so does another `head`."""
        head = self.model.get_classifier()
        head = head[0] if isinstance(head, tuple) else head
        return 0 if isinstance(head, nn.Identity) else int(getattr(head, "out_features", self.model.num_classes))

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch grid (rows, columns) now; N is their product. `set_input_size` changes it."""
        rows, columns = self._grid()
        return int(rows), int(columns)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Patch grid (rows, columns) of these images, where the model takes others than it was built for."""
        dynamic = getattr(self._patches, "dynamic_feat_size", None)
        rows, columns = self.grid_size if dynamic is None else dynamic(images.shape[-2:])
        return int(rows), int(columns)

    @property
    def blocks(self) -> Any:
        """The model's blocks."""
        return self.encoder.blocks

    @property
    def num_patches(self) -> int:
        """N, patch tokens before anything is pruned."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def pooling(self) -> Literal["class token", "patches", "attention pool"]:
        """What the classifier looks at; timm's parameter-free pool ("prr") has no query of its own."""
        if getattr(self.model, "attn_pool", None) is not None and self.model.global_pool != "prr":
            return "attention pool"
        return "class token" if self.model.global_pool == "token" else "patches"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to tokens (B, P + N, C), ready for block 0."""
        return self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(images)))

    def block(self, index: int, x: Tensor, attn_mask: Tensor | None = None, positions: Any = None) -> Tensor:
        """Run one block.

        Args:
            index: which.
            x: (B, P + K, C).
            attn_mask: added to the attention logits, broadcastable to (B, heads, P + K, P + K).
            positions: what `positions_of` gave for the tokens of `x`; None is for all tokens.
        """
        return self._run(self.blocks[index], x, attn_mask)

    def embed_up_to(self, images: Tensor, first_block: int) -> Tensor:
        """Images (B, in_chans, H, W) to all tokens (B, P + N, C) as block `first_block` sees them."""
        x, positions = self.embed(images), self.positions_of()
        for index in range(first_block):
            x = self.block(index, x, positions=positions)
        return x

    def positions_of(self, present: Tensor | None = None) -> Any:
        """What `block` needs to know of where tokens sit; None in models whose tokens carry it themselves.

        To be asked once, and again after every stage: what it gives serves all blocks until the next.

        Args:
            present: original positions of the patch tokens kept so far, (B, K); None for all.
        """
        return None

    def check_halves(self) -> None:
        """Make sure that `attention_half` and `mlp_half` can be used.

        Raises:
            UnsupportedModelError: a block is not timm's plain one, whose variants order or fuse the parts otherwise.
        """
        kinds = {type(block) for block in self.blocks}
        if kinds != {Block}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise UnsupportedModelError(f"blocks of the kind {names} cannot be run in halves, as merging needs")

    def attention_half(self, index: int, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """The first half of `block`: attention and its residual."""
        block, mask = self.blocks[index], None if attn_mask is None else attn_mask.to(x.dtype)
        return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=mask)))

    def mlp_half(self, index: int, x: Tensor) -> Tensor:
        """The second half of `block`: MLP and its residual."""
        block = self.blocks[index]
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def check_keys(self, blocks: Iterable[int]) -> None:
        """Make sure that `keys` can be had of these blocks.

        Raises:
            UnsupportedModelError: one is no pre-norm block of timm's whose attention projects keys in one layer.
        """
        for index in blocks:
            block = self.blocks[index]
            attention = getattr(block, "attn", None)
            projects = getattr(attention, "qkv", None) is not None or hasattr(attention, "k_proj")
            if type(block) not in (Block, EvaBlock) or not projects:
                raise UnsupportedModelError(
                    f"tokens cannot be compared by the keys of block {index}, a {type(block).__name__}",
                    'compare them by their features: similarity="features"',
                )

    def keys(self, index: int, x: Tensor) -> Tensor:
        """What a block's attention makes of tokens (B, K, C) to be found by, mean over heads: (B, K, D).

        Before they are normed and positions turned into them. See `check_keys`.
        """
        block = self.blocks[index]
        attention, x = block.attn, block.norm1(x)
        heads = getattr(attention, "num_kv_heads", None) or attention.num_heads
        fused = getattr(attention, "qkv", None)
        layer = attention.k_proj if fused is None else fused
        if type(layer) is not nn.Linear:  # adapters (LoRA) and quantised layers: as a whole
            keys = layer(x) if fused is None else layer(x).chunk(3, dim=-1)[1]
            return keys.reshape(*keys.shape[:2], heads, -1).mean(dim=2)
        weight: Tensor = layer.weight
        bias: Tensor | None = layer.bias
        if fused is not None:
            weight, bias = weight.chunk(3)[1], None if bias is None else bias.chunk(3)[1]
        # The mean of the weights: a head's worth of products instead of all heads'.
        bias = None if bias is None else bias.reshape(heads, -1).mean(dim=0)
        return F.linear(x, weight.reshape(heads, -1, weight.shape[1]).mean(dim=0), bias)

    def norm(self, x: Tensor) -> Tensor:
        """The final norm before pooling; identity where timm norms after pooling."""
        return self.model.norm(x)

    def norm_intermediate(self, x: Tensor) -> Tensor:
        """What timm's `forward_intermediates` norms tokens after any block by."""
        return self.norm(x)

    def features(self, x: Tensor) -> Tensor:
        """What timm's `forward_features` gives: all tokens after the last block, (B, P + N, C), to the same."""
        return self.norm(x)

    def head_of_features(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Timm's `forward_head`: `features` to logits (B, num_classes), or to what the classifier reads, (B, C)."""
        return self.pool(x) if pre_logits else self.head(x)

    def token_features(self, x: Tensor) -> Tensor:
        """Normalised patch tokens (B, N, C) out of `norm`'s output, for the token loss.

        Through `fc_norm` where that is the model's only norm, so that their scale is bounded.
        """
        patches = x[:, self.num_prefix_tokens :]
        return self.model.fc_norm(patches) if isinstance(self.model.norm, nn.Identity) else patches

    def token_logits(self, features: Tensor) -> Tensor | None:
        """The logits of each patch token, out of `token_features`: (B, N, C) to (B, N, num_classes).

        None where patch tokens have no classifier of their own. Where they have, the token loss compares these with
        the teacher's instead of features.
        """
        return None

    def head(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """Pool `norm`'s output and classify.

        Args:
            x: (B, P + N, C).
            kept: D-hat (B, N) of the patch tokens in a masked pass: pooling then sees kept tokens only, as it will
                when the others are really gone. None when all tokens of `x` count.
            sizes: with merging, how many patches each patch token stands for, (B, N): it counts as many times.

        Returns:
            Logits (B, num_classes).
        """
        if self._pools_unevenly(kept, sizes):
            return self.model.head(self.pool(x, kept, sizes))
        logits = self.model.forward_head(x)  # reads prefix tokens only, or all tokens count
        if isinstance(logits, tuple):  # a distilled model in its own training mode gives both heads
            return (logits[0] + logits[1]) / 2
        return logits

    def pool(self, x: Tensor, kept: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        """What the classifier reads, (B, C); the arguments are those of `head`."""
        model = self.model
        if self._pools_unevenly(kept, sizes):
            pooled = weighted_pool(model, x, self.num_prefix_tokens, kept, sizes, self.pools_prefix)
            return model.head_drop(model.fc_norm(pooled))
        return model.forward_head(x, pre_logits=True)

    def _pools_unevenly(self, kept: Tensor | None, sizes: Tensor | None) -> bool:
        if kept is None and sizes is None:
            return False
        return getattr(self.model, "attn_pool", None) is not None or self.model.global_pool != "token"

    def tail(self, first_block: int) -> list[nn.Module]:
        """The modules that run from block `first_block` on, norms, pooling and classifiers included."""
        names = ("norm", "attn_pool", "blocks_token_only", "fc_norm", "head", "head_dist", "aux_head")
        ends = [getattr(self.encoder, "norm", None), *(getattr(self.model, name, None) for name in names)]
        return [*self.blocks[first_block:], *(module for module in ends if module is not None)]

    def trunk(self, first_block: int) -> dict[str, Tensor]:
        """Parameters and buffers of what runs before block `first_block`, by name: all that are not of `tail`."""
        of_tail = {id(tensor) for module in self.tail(first_block) for tensor in _tensors(module).values()}
        return {name: tensor for name, tensor in _tensors(self.model).items() if id(tensor) not in of_tail}

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth, rising from 0 at the first block to `rate` at the last; acts in training mode only."""
        for index, block in enumerate(self.blocks):
            share = rate * index / max(1, self.depth - 1)
            for module in list(block.modules()):
                for name, _ in list(module.named_children()):
                    if name.startswith("drop_path"):
                        setattr(module, name, DropPath(share) if share else nn.Identity())

    @property
    def _patches(self) -> Any:
        return self.encoder.patch_embed

    def _grid(self) -> tuple[int, int]:
        return self.model.patch_embed.grid_size

    def _run(self, function: Callable[..., Tensor], x: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        """Call a block, the mask in the dtype of the tokens; honours `model.set_grad_checkpointing()`."""
        if attn_mask is not None:
            more["attn_mask"] = attn_mask.to(x.dtype)
        if self.encoder.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, x, use_reentrant=False, **more)
        return function(x, **more)
