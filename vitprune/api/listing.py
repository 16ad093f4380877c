"""`vitprune.list_models`, which needs no torch."""

from __future__ import annotations

from vitprune.loading.architectures import describe_all, match_names


def list_models(pattern: str | None = None) -> list[str]:
    """Names of timm's architectures whose tokens can be pruned. Needs no weights.

    They are known for the timm that vitprune was made with; what another adds, or you registered, is built once.

    Example:
        vitprune.list_models("deit*")

    Args:
        pattern: timm's wildcards, or a part of the name; None for all.

    Raises:
        UnknownModelError: none matches.
    """
    return [row["model"] for row in describe_all(match_names(pattern)) if row["reason"] is None]
