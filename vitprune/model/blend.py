"""Weights for a range of keep ratios: the further a ratio is from 1, the further from the dense model's.

What training changes for the lowest ratio is more than a mild one needs, and would harm it: at keep 0.9 the dense
model's own weights lose less than any trained ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.backbones import Backbone


def tail_parameters(backbone: Backbone, first_block: int) -> dict[str, nn.Parameter]:
    """The parameters of what runs from block `first_block` on, by their names in the model."""
    trunk = backbone.trunk(first_block)
    return {name: tensor for name, tensor in backbone.model.named_parameters() if name not in trunk}


def with_child(model: nn.Module, name: str, child: nn.Module | None) -> Any:
    """The same module with another child, or without one: a view, whose other children are the model's."""
    view = copy.copy(model)
    view._modules = {**model._modules, name: child}
    return view


class Blend(nn.Module):
    """Two ends of the weights from the first stage on, and what lies between them: at keep ratio k

        dense + (1 - k) / (1 - lowest) * (tuned - dense)

    Args:
        dense: the dense model's weights, by name: they hold at keep 1.
        tuned: those that were trained, by the same names: they hold at `lowest`.
        lowest: keep ratio, in (0, 1).
    """

    def __init__(self, dense: Mapping[str, Tensor], tuned: Mapping[str, Tensor], lowest: float) -> None:
        super().__init__()
        self.lowest = lowest
        self.ends = nn.ModuleDict({"dense": _Weights(dense), "tuned": _Weights(tuned)})

    @property
    def dense(self) -> dict[str, Tensor]:
        """By name."""
        return self._end("dense")

    @property
    def tuned(self) -> dict[str, Tensor]:
        """By name."""
        return self._end("tuned")

    @torch.no_grad()
    def fill(self, model: nn.Module, keep: float) -> None:
        """Write the weights of a keep ratio into a timm model."""
        share = share_of_tuned(keep, self.lowest)
        dense, tuned = self.dense, self.tuned
        for name, parameter in model.named_parameters():
            if name in dense:
                parameter.copy_(torch.lerp(dense[name], tuned[name], share))

    def own_tail(self, model: nn.Module) -> nn.Module:
        """A copy of a timm model, whose other weights are shared with it."""
        blended = self.dense.keys()
        shared = [tensor for name, tensor in model.named_parameters() if name not in blended] + list(model.buffers())
        return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})

    def dense_model(self, model: nn.Module) -> nn.Module:
        """The dense timm model that the one of a sparse model came from; the trunk is shared with it."""
        dense = self.own_tail(model)
        self.fill(dense, 1.0)
        return dense

    def _end(self, name: str) -> dict[str, Tensor]:
        return {key.replace("/", "."): tensor for key, tensor in self.ends[name].named_buffers()}


def share_of_tuned(keep: float, lowest: float) -> float:
    """How far from the dense weights those of a keep ratio are: 1 at the lowest ratio, 0 at 1."""
    return (1 - keep) / (1 - lowest)


class _Weights(nn.Module):
    """Tensors by name; buffers, for nothing here is trained. Torch allows no points in their names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor.detach().clone())
