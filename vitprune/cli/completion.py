"""What the shell completes with the tab key.

Each function gets the word so far and gives whole words. None of them imports timm or torch, which takes seconds:
names of models are read from timm's sources. Where nothing of ours fits, the shell completes file names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

_FAMILIES = (
    "beit",
    "cait",
    "deepseek_vit",
    "deit",
    "eva",
    "gemma4_vit",
    "naflexvit",
    "qwen3_vit",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vitamin",
)
"""timm's modules whose models vitprune supports, or most of them."""
_LVVIT = ("lvvit_t", "lvvit_s", "lvvit_m", "lvvit_l")
_FIRST = ("demo", "deit_tiny", "deit_small", "deit_base", "vit_small", "vit_base")
"""Of a few hundred, what is offered before the first letter."""
_DATA = ("demo", "imagenet", "imagenette", "hf:")
_MODEL_FILES = (".safetensors", ".pth", ".onnx", ".pt2")
_RECIPES = ("short", "paper")
_SHORTEST_TAIL = re.compile(r"_patch\d+.*")


def model(incomplete: str) -> list[str]:
    """MODEL: names of timm and short names, `demo`, files and folders; after a dot the tags of the weights."""
    if not incomplete:
        return [*_FIRST, *_local(incomplete, _MODEL_FILES)]
    sources = "\n".join(_sources())
    if "." in incomplete:
        names = set(re.findall(r"""['"](\w+\.\w+)['"]\s*:\s*_cfg""", sources))
    else:
        names = set(re.findall(r"^@register_model\s+def (\w+)\(", sources, flags=re.MULTILINE))
        names |= {_SHORTEST_TAIL.sub("", name) for name in names} | {"demo", *_LVVIT}
    return _with_files(sorted(names), incomplete, _MODEL_FILES)


def data(incomplete: str) -> list[str]:
    """DATA: the words it knows, and folders."""
    return _with_files(_DATA, incomplete, (".parquet", ".tar"))


def recipe(incomplete: str) -> list[str]:
    """The recipes that come with vitprune, and YAML files."""
    return _with_files(_RECIPES, incomplete, (".yaml", ".yml"))


def device(incomplete: str) -> list[str]:
    """Names of devices."""
    return [name for name in ("auto", "cpu", "cuda", "mps") if name.startswith(incomplete)]


def several(*known: str) -> Callable[[str], list[str]]:
    """For a list of words with commas between them: the next word, those given before it."""

    def next_of(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        return [f"{before}{comma}{word}" for word in known if word.startswith(last) and word not in given]

    return next_of


def _with_files(words: Iterable[str], incomplete: str, endings: tuple[str, ...]) -> list[str]:
    found = [word for word in words if word.startswith(incomplete)]
    return [*found, *_local(incomplete, endings)] if found else []


def _local(incomplete: str, endings: tuple[str, ...]) -> list[str]:
    """Folders, and files with one of the endings, in the working folder."""
    paths = (path for path in Path().iterdir() if path.name.startswith(incomplete) and not path.name.startswith("."))
    return sorted(
        f"{path.name}/" if path.is_dir() else path.name for path in paths if path.is_dir() or path.suffix in endings
    )


def _sources() -> Iterable[str]:
    timm = find_spec("timm")  # does not import it
    for root in (timm.submodule_search_locations or ()) if timm else ():
        for family in _FAMILIES:
            path = Path(root, "models", f"{family}.py")
            if path.is_file():
                yield path.read_text(encoding="utf-8")
