"""From the MODEL arguments of `vitprune bench` to what is timed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune.cli.plan_options import open_as_asked, refuse_plan, resolve_plan
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.budget.resolve import PlanRequest
    from vitprune.checkpoint.program import Program
    from vitprune.cli.model_options import StructureOptions
    from vitprune.measure import BenchModel
    from vitprune.training.recipe import Recipe


@dataclass(frozen=True)
class Benchmark:
    """Models by label that are timed interleaved, on images (C, H, W), and compared with the one called `baseline`.

    They are variants of the model `name`; `note` is what must be said of the comparison.
    """

    name: str
    models: dict[str, BenchModel]
    baseline: str
    input_size: tuple[int, int, int]
    note: str = ""


@dataclass(frozen=True)
class BenchRequest:
    """What the options ask to be made of a MODEL: of a dense one a sparse one for each plan, perhaps with bounds."""

    plans: Sequence[PlanRequest]
    recipe: Recipe
    structure: StructureOptions
    bounds: bool
    batch_sizes: Sequence[int]


def benchmarks(specs: Sequence[str], request: BenchRequest, modes: Sequence[str]) -> list[Benchmark]:
    """One per model; exported files run beside the first one, or, where they are all there is, beside each other.

    Raises:
        UsageError: something is asked of a file that it cannot do.
    """
    from vitprune.loading.load import is_exported

    exported = [spec for spec in specs if is_exported(spec)]
    if exported and list(modes) != ["eager"]:
        raise UsageError(
            f"--mode {','.join(modes)} does not go with '{exported[0]}': exported files run as they are",
            "leave out --mode, or bench the file apart",
        )
    if len(exported) == len(specs):
        for plan in request.plans:
            refuse_plan(exported[0], plan)
    result = [_variants(spec, request) for spec in specs if spec not in exported]
    if not exported:
        return result
    programs = _programs(exported, request)
    if not result:
        return [programs]
    if programs.input_size != result[0].input_size:
        raise UsageError(
            f"'{exported[0]}' takes images of {_text(programs.input_size)}, '{specs[0]}' of "
            f"{_text(result[0].input_size)}, so they cannot be timed on the same ones",
            "bench them apart, or give --img-size",
        )
    result[0].models.update(programs.models)
    note = "exported files run in engines of their own and dense in PyTorch: their speed-up is of the engine too"
    return [replace(result[0], note=note), *result[1:]]


def _variants(spec: str, request: BenchRequest) -> Benchmark:
    """A dense model with the sparse ones to be made of it, or a sparse file with its dense backbone."""
    from vitprune.backbones import input_size
    from vitprune.measure import BenchModel, with_bounds
    from vitprune.model import attach_as

    loaded = request.structure.load(spec, weights="random")
    models = {"dense": BenchModel("dense", 1.0, loaded.model)}
    if loaded.sparse is not None and loaded.metadata is not None:
        for asked in request.plans:
            open_as_asked(loaded, asked)
            at_ratio = loaded.sparse if loaded.keep is None else loaded.sparse.at(loaded.keep)
            models[loaded.metadata.label] = BenchModel("sparse", loaded.keep, at_ratio)
    else:
        for asked in request.plans:
            if asked.keep != 1:
                sparsity, _ = resolve_plan(asked, loaded.model, request.recipe)
                models[sparsity.label] = BenchModel("sparse", sparsity.keep, attach_as(loaded.model, sparsity))
    models = with_bounds(models) if request.bounds else models
    return Benchmark(loaded.name, models, "dense", input_size(loaded.model))


def _programs(specs: Sequence[str], request: BenchRequest) -> Benchmark:
    """Exported files; a dense one among them is what the others are compared with, or else the first."""
    from vitprune.checkpoint.program import Program
    from vitprune.measure import BenchModel, Kind

    names = [Path(spec).name for spec in specs]
    models: dict[str, BenchModel] = {}
    opened: dict[str, Program] = {}
    for spec, name in zip(specs, names, strict=True):
        program = request.structure.load(spec, exported=True).model
        assert isinstance(program, Program)
        takes = program.batch_size
        if takes is not None and any(size != takes for size in request.batch_sizes):
            raise UsageError(f"'{spec}' takes batches of {takes} only", f"--batch-size {takes}")
        opened[spec] = program
        label = f"{spec if names.count(name) > 1 else name} {program.precision}"
        kind: Kind = "sparse" if program.metadata.stages else "dense"
        for said, each in _timed(program).items():
            models[label + said] = BenchModel(kind, program.metadata.keep, each)
    sizes = {program.metadata.preprocessing.input_size: spec for spec, program in opened.items()}
    if len(sizes) > 1:
        said = " and ".join(f"'{spec}' of {_text(size)}" for size, spec in sizes.items())
        raise UsageError(f"images of one size for all are timed, and these take others: {said}", "bench them apart")
    baseline = next((label for label, each in models.items() if each.kind == "dense"), next(iter(models)))
    note = "" if models[baseline].kind == "dense" else f"compared with '{baseline}', the first file: none is dense"
    return Benchmark(opened[specs[0]].metadata.model, models, baseline, next(iter(sizes)), note)


def _timed(program: Program) -> dict[str, Program]:
    """What is timed of an exported file; of a cascade, of whose images none tells how many would go on, both ends."""
    from vitprune.adaptive import AdaptiveProgram

    if not isinstance(program, AdaptiveProgram):
        return {"": program}
    return {", none goes on": program.at(0.0), ", all go on": program.at(2.0)}


def _text(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
