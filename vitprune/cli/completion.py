"""What the shell completes with the tab key beyond commands, options and choices, which Typer knows.

Where nothing of ours fits, the shell completes file names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

_FAMILIES = ("deit", "vision_transformer", "beit", "eva")
"""timm's modules with most of the models that vitprune supports."""


def words(*known: str) -> Callable[[str], list[str]]:
    """Completes one of a few words."""

    def beginning(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return beginning


def model(incomplete: str) -> list[str]:
    """MODEL: names that timm registers, read from its sources, for importing it takes seconds."""
    names = {"demo"}
    timm = find_spec("timm")
    for root in (timm.submodule_search_locations or ()) if timm else ():
        for family in _FAMILIES:
            source = Path(root, "models", f"{family}.py").read_text(encoding="utf-8")
            names.update(re.findall(r"^@register_model\s+def (\w+)\(", source, flags=re.MULTILINE))
    return words(*sorted(names))(incomplete)


data = words("demo", "imagenet", "imagenette", "hf:")
recipe = words("short", "paper")
device = words("auto", "cpu", "cuda", "mps")
