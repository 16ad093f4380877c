"""What timm's own models can be asked for, of one that prunes: features of all patches, heads, groups of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vitprune.backbones import Backbone
from vitprune.errors import UsageError
from vitprune.model.passes import TaskName, Tokens
from vitprune.model.plan import PlannedModule
from vitprune.tokens.filling import Grid, fill_tokens


class TimmModule(PlannedModule):
    """A pruned model by timm's names.

    Features are of every patch of the image, also where tokens were pruned: `vitprune.tokens.filling` says how.
    """

    model: nn.Module
    class_names: tuple[str, ...] | None
    task: TaskName
    run_blocks: Callable[..., Tokens]

    @property
    def backbone(self) -> Backbone:
        """The adapter of `model`."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Width of the classifier; 0 without one."""
        return self.backbone.num_classes

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches (rows, columns) of the images that the model is built for."""
        return self.backbone.grid_size

    @property
    def num_features(self) -> int:
        """C, channels of `forward_features`."""
        return int(self.model.num_features)  # type: ignore[arg-type]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Timm's configuration of the weights, so that timm's data helpers work on this model too."""
        config: dict[str, Any] = getattr(self.model, "pretrained_cfg", None) or {}
        return config

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The same by timm's older name."""
        return self.pretrained_cfg

    def get_classifier(self) -> Any:
        """The model's classifier; of a distilled model both of them."""
        return self.model.get_classifier()  # type: ignore[operator]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier, as timm's; 0 for none: then `forward` gives pooled features (B, C).

        Args:
            num_classes: width of the new classifier.
            global_pool: another way to pool, by timm's name; None leaves it.

        Raises:
            UsageError: `global_pool` is no pooling.
        """
        if global_pool in ("", "none"):
            raise UsageError(f"with global_pool='{global_pool}' it would give tokens", "forward_features gives them")
        device = next(self.model.parameters()).device
        self.model.reset_classifier(num_classes, *(() if global_pool is None else (global_pool,)))  # type: ignore[operator]
        self.model.to(device)
        self.class_names = None
        self.task = "classification" if num_classes else "embedding"

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Another image size in pixels, as timm's: positions are resampled, and token counts follow the new grid.

        Args:
            img_size: side, or (height, width).

        Raises:
            UsageError: the family's image size cannot be changed once it is built, or it is no multiple of the patch's.
        """
        model: Any = self.model
        if not (hasattr(model, "set_input_size") and hasattr(model.patch_embed, "set_input_size")):
            way = "timm.create_model(..., img_size=...) builds it for another"
            raise UsageError(f"a {type(model).__name__} keeps the image size it was built for", way)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        rows, columns = model.patch_embed.patch_size
        if height % rows or width % columns or min(height, width) < 1:
            raise UsageError(f"img_size is {height}x{width}, no multiple of the patch size {rows}x{columns}")
        model.set_input_size(img_size=(height, width))

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens of all patches after the final norm: images (B, in_chans, H, W) to (B, P + N, C), as timm's.

        Prefix tokens (class, distillation, registers) come first, then the N patch tokens of the grid, row by row. A
        pruned one is filled from the token it was merged into, or is what it was when it was dropped. `select` gives
        the kept tokens alone. `model.forward_features` is the dense model's: it prunes nothing.
        """
        return self.backbone.features(self._filled(self.run_blocks(self.backbone.embed(images), grid=Grid())))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` gave, as timm's: (B, P + N, C) to logits (B, num_classes).

        Where a class token is read this is what `forward` says. Where patches are pooled it is close to it, as filled
        tokens stand for themselves, and no longer as parts of one; not where tokens were dropped, which `forward` does
        not pool and which are in the grid here.

        Args:
            x: (B, P + N, C).
            pre_logits: whether to pool only: what the classifier reads, (B, C).
        """
        return self.backbone.head_of_features(x, pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features after several blocks, on the full grid, by timm's arguments and in its forms.

        Example:
            features, (middle, last) = sparse.forward_intermediates(images, indices=[5, 11], norm=True)

        Args:
            x: images (B, in_chans, H, W).
            indices: blocks, those below 0 from the end; of an int the last so many; None for all.
            return_prefix_tokens: whether each comes as a pair with its prefix tokens (B, P, C), where there are any.
            norm: whether each goes through the final norm.
            stop_early: whether to stop after the last of these blocks; the features are then its.
            output_fmt: "NCHW" for (B, C, rows, columns), "NLC" for (B, N, C).
            intermediates_only: whether to leave out the features.
            output_dict: whether to give a dict of image_features, image_intermediates and image_intermediates_prefix.

        Returns:
            Features, as `forward_features` gives them, and the list of intermediates.

        Raises:
            UsageError: another `output_fmt`, or there is no such block.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UsageError(f"output_fmt is {output_fmt!r}", "choose from NCHW, NLC")
        taken, last = self._taken(indices)
        prefix, full = self.backbone.num_prefix_tokens, []

        def see(block: int, tokens: Tokens) -> None:
            if block in taken:
                filled = self._filled(tokens)
                full.append(self.backbone.norm_intermediate(filled) if norm else filled)

        end = last + 1 if stop_early else None
        tokens = self.run_blocks(self.backbone.embed(x), end=end, grid=Grid(), seen=see)
        patches, prefixes = [each[:, prefix:] for each in full], [each[:, :prefix] for each in full]
        if output_fmt == "NCHW":
            grid = self.backbone.grid_of(x)
            patches = [each.mT.reshape(*each.mT.shape[:2], *grid) for each in patches]
        if output_dict:
            features = {} if intermediates_only else {"image_features": self.backbone.features(self._filled(tokens))}
            with_prefix = {"image_intermediates_prefix": prefixes} if prefix and return_prefix_tokens else {}
            return {"image_intermediates": patches, **with_prefix, **features}
        given = list(zip(patches, prefixes, strict=True)) if prefix and return_prefix_tokens else patches
        return given if intermediates_only else (self.backbone.features(self._filled(tokens)), given)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """As `forward_intermediates`, by DINO's name and arguments: a list of (B, N, C), or (B, C, rows, columns).

        Args:
            x: images (B, in_chans, H, W).
            n: the last so many blocks, or which.
            reshape: whether to give (B, C, rows, columns).
            return_prefix_tokens: see `forward_intermediates`.
            norm: see there.
        """
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the blocks compute their activations anew in the backward pass, instead of keeping them."""
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should spare, as timm's optimizers ask for them."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}  # type: ignore[operator]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Timm's patterns of which parameters belong to which layer, as its layer decay asks for them.

        Predictors are in none, which timm takes for the last one.
        """
        groups = self.model.group_matcher(coarse)  # type: ignore[operator]
        return {name: _within_model(patterns) for name, patterns in groups.items()}

    def _filled(self, tokens: Tokens) -> Tensor:
        """The residual stream on the full grid, (B, P + N, C)."""
        prefix = self.backbone.num_prefix_tokens
        return tokens.x if tokens.grid is None else fill_tokens(tokens.x, tokens.grid, prefix)

    def _taken(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        depth = self.backbone.depth
        try:
            taken, last = feature_take_indices(depth, indices if indices is None else _plain(indices))
        except (AssertionError, ValueError) as error:  # of a list without any
            way = f"blocks are 0 to {depth - 1}, or -1 to -{depth} from the end; an int n is the last n"
            raise UsageError(f"indices are {indices}", way) from error
        return taken, last


def _plain(indices: int | Sequence[int]) -> int | list[int]:
    return indices if isinstance(indices, int) else list(indices)


def _within_model(patterns: Any) -> Any:
    """A pattern of a timm model's parameter names, or several with their places, as one of those here."""
    if isinstance(patterns, str):
        return rf"^model\.(?:{patterns.replace('|^', '|').removeprefix('^')})"
    return [(_within_model(pattern), *rest) for pattern, *rest in patterns]


class TokenFeatures(nn.Module):
    """A model's `forward_features` as its forward: what is exported, counted or timed where tokens are wanted.

    Args:
        model: a SparseViT, or any other with `forward_features`; used as it is, not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to (B, P + N, C)."""
        return self.model.forward_features(images)  # type: ignore[operator, no-any-return]
