"""From the MODEL arguments of `vitprune bench` to what is timed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune.cli.plan_options import Measuring, meet_target, refuse_plan, resolve_sparsity
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from vitprune.measure import Contestant
    from vitprune.model import Sparsity


@dataclass(frozen=True)
class Subject:
    """What takes turns in one benchmark.

    Attributes:
        name: of the model.
        contestants: by label.
        baseline: label of the one that the others are compared with.
        input_size: of an image, (C, H, W).
        like: has the preprocessing.
    """

    name: str
    contestants: dict[str, Contestant]
    baseline: str
    input_size: tuple[int, int, int]
    like: nn.Module


@dataclass(frozen=True)
class Wishes:
    """What the options ask to be made of a MODEL.

    Attributes:
        plans: of a dense model.
        img_size: or None.
        refused: options that a file with a plan of its own does not take.
        floor: whether to add floors.
        align: --align.
        measuring: for --align auto and the targets.
    """

    plans: Sequence[Sparsity]
    img_size: tuple[int, int] | None
    refused: Sequence[object]
    floor: bool
    align: str | None
    measuring: Measuring


def subjects(specs: Sequence[str], wishes: Wishes, modes: Sequence[str]) -> list[Subject]:
    """One per model; exported files run beside the first one, or, where they are all there is, beside each other.

    Raises:
        UsageError: something is asked of a file that it cannot do.
    """
    from vitprune.export import is_program

    exported = [spec for spec in specs if is_program(spec)]
    if exported and list(modes) != ["eager"]:
        raise UsageError(
            f"--mode {','.join(modes)} does not go with '{exported[0]}': exported files run as they are",
            "leave out --mode, or bench the file apart",
        )
    result = [_subject(spec, wishes) for spec in specs if spec not in exported]
    if not exported:
        return result
    programs = _programs(exported, wishes)
    if not result:
        return [programs]
    if programs.input_size != result[0].input_size:
        raise UsageError(
            f"'{exported[0]}' takes images of {_text(programs.input_size)}, '{specs[0]}' of "
            f"{_text(result[0].input_size)}, so they cannot be timed on the same ones",
            "bench them apart, or give --img-size",
        )
    result[0] = replace(result[0], contestants=result[0].contestants | programs.contestants)
    return result


def _subject(spec: str, wishes: Wishes) -> Subject:
    """A dense model with the sparse ones to be made of it, or a sparse file with its dense backbone."""
    from vitprune.backbones import input_size
    from vitprune.loading.load import load_model, sparse_file
    from vitprune.measure import DENSE, Contestant, with_floors
    from vitprune.model import attach_as

    if sparse_file(spec):
        refuse_plan(spec, *wishes.refused)
    loaded = load_model(spec, weights="random", img_size=wishes.img_size)
    contestants = {DENSE: Contestant("dense", 1.0, loaded.model)}
    if loaded.sparse is not None and loaded.metadata is not None:
        contestants[loaded.metadata.label] = Contestant("sparse", loaded.metadata.keep, loaded.sparse)
    else:
        for asked in wishes.plans:
            if asked.keep < 1:
                plan = resolve_sparsity(loaded.model, asked, None, wishes.align, wishes.measuring)
                plan, _ = meet_target(loaded.model, plan, wishes.measuring)
                contestants[plan.label] = Contestant("sparse", plan.keep, attach_as(loaded.model, plan))
    contestants = with_floors(contestants) if wishes.floor else contestants
    return Subject(loaded.name, contestants, DENSE, input_size(loaded.model), loaded.model)


def _programs(specs: Sequence[str], wishes: Wishes) -> Subject:
    """Exported files; a dense one among them is what the others are compared with, or else the first."""
    from vitprune.export import Program
    from vitprune.loading.load import load_model
    from vitprune.measure import Contestant, Kind

    names = [Path(spec).name for spec in specs]
    contestants: dict[str, Contestant] = {}
    opened: list[Program] = []
    for spec, name in zip(specs, names, strict=True):
        program = load_model(spec, img_size=wishes.img_size, exported=True).model
        assert isinstance(program, Program)
        opened.append(program)
        label = f"{spec if names.count(name) > 1 else name} {program.precision}"
        kind: Kind = "sparse" if program.metadata.stages else "dense"
        contestants[label] = Contestant(kind, program.metadata.keep, program)
    sizes = {program.metadata.preprocessing.input_size: spec for spec, program in zip(specs, opened, strict=True)}
    if len(sizes) > 1:
        said = " and ".join(f"'{spec}' of {_text(size)}" for size, spec in sizes.items())
        raise UsageError(f"images of one size for all are timed, and these take others: {said}", "bench them apart")
    about = opened[0].metadata
    size: tuple[int, int, int] = about.preprocessing.input_size
    return Subject(about.model, contestants, _baseline(contestants), size, opened[0])


def _baseline(contestants: Mapping[str, Contestant]) -> str:
    dense = (label for label, each in contestants.items() if each.kind == "dense")
    return next(dense, next(iter(contestants)))


def _text(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
