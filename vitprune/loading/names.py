"""Names of timm's architectures: the one that a short name means, and those that match a pattern."""

from __future__ import annotations

import difflib
import re

import timm

from vitprune.errors import UnknownModelError


def resolve_name(spec: str) -> str:
    """The full timm name of a name or an unambiguous short name: `deit_small` is `deit_small_patch16_224`.

    Raises:
        UnknownModelError: no or several models of that name; offers some.
    """
    base, _, tag = spec.partition(".")
    known = timm.list_models()
    if base not in known:
        starts = [name for name in known if name.startswith(base + "_")]
        usual = f"{base}_patch16_224"
        plain = [name for name in starts if re.fullmatch(r"_patch\d+(_\d+)?", name[len(base) :])]
        if usual in known:
            base = usual
        elif len(plain) == 1 or (not plain and len(starts) == 1):
            base = (plain or starts)[0]
        elif starts:
            shown = ", ".join((plain or starts)[:6])
            raise UnknownModelError(f"'{spec}' could be several models", f"choose one of: {shown}")
        else:
            short = sorted({re.sub(r"_patch\d+.*", "", name) for name in known} | set(known))
            close = difflib.get_close_matches(base, short, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else "names are timm's: timm.list_models('vit*')"
            tried = f"no file or folder of that name, and none of timm's {len(known)} architectures"
            raise UnknownModelError(f"there is no model or file '{spec}': {tried}", hint)
    tags = {name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")}
    if tag and tag not in tags:
        raise UnknownModelError(
            f"'{base}' has no weights tagged '{tag}'", f"its tags are: {', '.join(sorted(tags)) or 'none'}"
        )
    if not tag:
        default = timm.get_pretrained_cfg(base)
        tag = (default.tag or "") if default is not None else ""
    return f"{base}.{tag}" if tag else base


def match_names(pattern: str | None = None) -> list[str]:
    """Architectures of timm whose name matches, in timm's order.

    Args:
        pattern: timm's wildcards ("deit*"), or a part of the name; None for all.

    Raises:
        UnknownModelError: none does; offers close matches.
    """
    everything: list[str] = timm.list_models()
    if pattern is None:
        return everything
    wild = any(mark in pattern for mark in "*?[")
    names: list[str] = timm.list_models(pattern) if wild else [name for name in everything if pattern in name]
    if not names:
        close = difflib.get_close_matches(pattern, everything, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "try a wildcard: vitprune models 'vit*'"
        raise UnknownModelError(f"timm has no model that matches '{pattern}'", hint)
    return names
