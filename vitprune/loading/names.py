"""Architectures of timm: the one that a short name means, those that match a pattern, and what one costs."""

from __future__ import annotations

import difflib
import re
from typing import Any

import timm
import torch

from vitprune.backbones import family_of, why_not
from vitprune.backbones.registry import ADAPTERS
from vitprune.common.formatting import JOIN_WITH_COMMAS, is_number
from vitprune.errors import UnknownModelError, UsageError
from vitprune.loading.task import num_outputs, task_of, tasks_of_weights
from vitprune.measure import describe_plan
from vitprune.model import attach_as
from vitprune.schedule import Sparsity


def resolve_name(spec: str) -> str:
    """The full timm name of a name or an unambiguous short name: `deit_small` is `deit_small_patch16_224`.

    Raises:
        UnknownModelError: no or several models of that name; offers some.
    """
    base, _, tag = spec.removeprefix("timm/").partition(".")
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
            tried = f"no file or folder of that name, and none of the {len(known)} known architectures"
            raise UnknownModelError(
                f"model or file '{spec}' not found: {tried}", _hint(spec.removeprefix("timm/"), known)
            )
    tags = {name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")}
    if tag and tag not in tags:
        raise UnknownModelError(
            f"'{base}' has no weights tagged '{tag}'", f"its tags are: {', '.join(sorted(tags)) or 'none'}"
        )
    if not tag:
        default = timm.get_pretrained_cfg(base)
        tag = (default.tag or "") if default is not None else ""
    return f"{base}.{tag}" if tag else base


def _hint(spec: str, known: list[str]) -> str:
    """What somebody who wrote `spec` may have meant: supported models whose name holds it, or close names."""
    base = spec.partition(".")[0]
    if is_number(spec):
        return JOIN_WITH_COMMAS
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.endswith((".json", ".yaml", ".html")):
        return f"a repository of the Hugging Face Hub is named hf-hub:{spec}"
    short = sorted({re.sub(r"_patch\d+.*", "", name) for name in known} | set(known))
    close = difflib.get_close_matches(base, short, n=3, cutoff=0.5)
    families = {adapted.__module__.rpartition(".")[2] for adapted in ADAPTERS}
    supported = sorted(name for family in families for name in timm.list_models(module=family))
    if not difflib.get_close_matches(base, close, cutoff=0.8):  # no slip of the pen
        for needle in _needles(base.lower().replace("-", "_")):
            if needle and (found := [name for name in supported if needle in name]):
                return f"`vitprune models {needle}` lists {len(found)}, such as {min(found, key=len)}"
    close = [name for name in close if any(each.startswith(name) for each in supported)]
    return f"did you mean {' or '.join(close)}?" if close else "names are timm's: timm.list_models('vit*')"


def _needles(name: str) -> list[str]:
    """What to look for in timm's names instead of one of another library's: all of it; `vit_base_patch16` for ViT-B-16,
    ViT-B/16 or vitb16; or its first word.
    """
    sizes = {size[0]: size for size in ("tiny", "small", "base", "large", "huge", "giant")}
    theirs = re.search(r"vit_?([tsblhg])[_/]?(\d+)", name)
    first = re.split(r"[_/.]", name)[0]
    return [
        name,
        *([f"vit_{sizes[theirs[1]]}_patch{theirs[2]}"] if theirs else []),
        *([first] if len(first) > 2 else []),
    ]


def describe_architecture(name: str, sparsity: Sparsity) -> dict[str, Any]:
    """One architecture at the input size of its default weights, built without them: what it costs, for JSON.

    `task` is what it is for with these, `weights` the tags of timm's weights by task. Where its tokens cannot be
    pruned, `reason` says why, and there is only `num_weights`, how many there are; else that is None.
    """
    with torch.device("meta"):
        model = timm.create_model(name)
    row = {"model": name, "family": family_of(model), "reason": why_not(model)}
    weights = tasks_of_weights(name)
    of_refused = {"num_weights": sum(map(len, weights.values()))}
    if row["reason"] is not None:
        return row | of_refused
    try:
        sparse = attach_as(model, sparsity)
    except UsageError as error:  # stages that this depth does not have
        return row | {"reason": error.message} | of_refused
    task = None if num_outputs(model) == 1 else task_of(model)[0]  # of one output only its owner knows
    return row | describe_plan(sparse, name) | {"task": task, "weights": weights}
