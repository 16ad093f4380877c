"""Sparse models: what they are made of, their two passes, and how one is attached to a timm model."""

from vitprune.model.attach import attach, attach_as, build
from vitprune.model.attention import AttentionViT
from vitprune.model.passes import MaskedOutput, Selection, TaskName, Tokens
from vitprune.model.sparse_vit import SparseViT

__all__ = [
    "AttentionViT",
    "MaskedOutput",
    "Selection",
    "SparseViT",
    "TaskName",
    "Tokens",
    "attach",
    "attach_as",
    "build",
]
