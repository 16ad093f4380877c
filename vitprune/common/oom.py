"""Errors for memory that runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitprune.errors import VitpruneError

_WORDS = ("out of memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory has run out: only CUDA has a class for it, others say it in words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


@contextmanager
def explained_out_of_memory(what: str, way_out: str, kind: type[VitpruneError] = VitpruneError) -> Iterator[None]:
    """In the block, running out of memory becomes an error that says during what, and the way out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise kind(f"out of memory while {what}", way_out) from error
        raise
