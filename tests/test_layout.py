"""The house: a package imports only what stands below it, so that its layers can be read one at a time."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "vitprune"
FLOORS = (  # lowest first; rooms of one bound do not import each other
    {"errors", "_version"},
    {"common"},
    {"tokens", "schedule"},
    {"backbones"},
    {"model"},
    {"checkpoint"},
    {"data"},
    {"tasks"},
    {"measure"},
    {"evaluation", "adaptive"},
    {"training", "budget", "baselines", "export"},
    {"loading"},
    {"report"},
    {"jobs"},
    {"cli"},  # its progress display serves Python too
    {"api"},
)
SIDEWAYS = {("report", "export"), ("loading", "export")}
"""Lower packages that are not for helpers: who exports is the jobs' business, who loads must not need it."""


def _imports():
    """(importing room, imported room, where) of every import inside the package, late ones too."""
    for file in sorted(ROOT.rglob("*.py")):
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vitprune":
                names = [node.module] if node.module != "vitprune" else [f"vitprune.{a.name}" for a in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.split(".")[0] == "vitprune"]
            for name in names:
                to = [*name.split("."), "__init__"][1]
                if to != room:
                    yield room, to, f"{file.relative_to(ROOT.parent)}:{node.lineno}"


def test_rooms_are_those_of_the_plan():
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms == set.union(*FLOORS) | {"__init__", "__main__"}


def test_imports_run_downwards_only():
    bound = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    upward = [
        f"{where} ({room}) imports {to}"
        for room, to, where in _imports()
        if room not in ("__init__", "__main__") and bound.get(to, len(FLOORS)) >= bound[room]
    ]
    assert not upward, "\n".join(upward)


def test_helpers_are_not_borrowed_from_export():
    borrowed = [where for room, to, where in _imports() if (room, to) in SIDEWAYS]
    assert not borrowed, borrowed
