"""`vitprune visualize`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from vitprune.cli import completion
from vitprune.cli.options import (
    AsJson,
    Columns,
    Device,
    Splits,
    Streaming,
    data_options,
)
from vitprune.cli.output import print_json, print_line, print_table, talk, waiting
from vitprune.cli.progress import RunProgress
from vitprune.common import distributed
from vitprune.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from vitprune.checkpoint.metadata import Metadata
    from vitprune.data import DataOptions, Images, ImageSet, ModelClasses
    from vitprune.loading.load import Loaded
    from vitprune.model import SparseViT
    from vitprune.report.visualize import Drawn

_SHOWN = 16
"""Images of a folder or a data set that are drawn without --limit."""


def visualize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model.safetensors that vitprune wrote, or its run folder.", show_default=False
        ),
    ],
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="IMAGE", help="Image files, or folders of them.", show_default="of a demo model: --data demo"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            autocompletion=completion.data,
            help="Images of a data set instead, as in eval.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for the PNGs.", show_default="runs/<model>-<keep>-keepmaps"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into an --output that exists.")] = False,
    sheet: Annotated[bool, typer.Option("--sheet", help="One PNG for all images instead of one for each.")] = False,
    heatmap: Annotated[
        bool, typer.Option("--heatmap", help="Add heat maps of the predictors' keep scores (log-odds).")
    ] = False,
    mean: Annotated[
        bool,
        typer.Option("--mean", help="Draw how often each position stays, over all images, instead of a PNG for each."),
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights of the dense model that MODEL was made from, to compare with."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="At most N images, chosen at random, always the same.",
            show_default=f"{_SHOWN} of folders and data sets; all with --mean",
        ),
    ] = None,
    splits: Splits = None,
    columns: Columns = None,
    streaming: Streaming = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Which tokens stay, stage by stage: a PNG per image, with the three likeliest classes, dense and sparse.

    Dense answers are of the dense model where it is at hand (--checkpoint FILE; a demo model's always is), else of the
    fine-tuned backbone with all tokens, and the caption says which.

    Examples:

      vitprune visualize runs/deit_small_patch16_224-keep0.7 cat.jpg dog.jpg

      vitprune visualize runs/deit_small_patch16_224-keep0.7 path/to/images --sheet --heatmap

      vitprune visualize runs/demo-keep0.7 --data demo --mean
    """
    distributed.refuse_several("visualize")
    with waiting("loading PyTorch"):
        from vitprune.common.devices import pick_device
        from vitprune.common.run_folder import RunFolder
        from vitprune.data import ModelClasses, count_images, readable_names
        from vitprune.report.drawing import Legend
        from vitprune.report.visualize import MOST_ON_A_SHEET, Wanted
        from vitprune.report.visualize import visualize as draw
        from vitprune.schedule import plan_slug
    where = pick_device(device)
    subject = _subject(model, checkpoint)
    num_classes = subject.sparse.num_classes
    classes = ModelClasses(num_classes, subject.loaded.class_names)
    options = data_options(splits, columns, streaming, None)
    dataset, chosen = _images(images or [], data, options, classes, subject.loaded.name)
    dataset = _limited(dataset, _SHOWN if limit is None and chosen and not mean else limit)
    total = count_images(dataset)
    if sheet and (total is None or total > MOST_ON_A_SHEET):
        many = "a stream of" if total is None else total
        raise UsageError(f"--sheet takes at most {MOST_ON_A_SHEET} images, got {many}", "--limit 16")
    known = dataset.class_names | dict(enumerate(subject.loaded.class_names or ()))
    name = f"{subject.loaded.short_name}-{plan_slug(subject.about.label)}-keepmaps"
    folder = RunFolder.choose(output, name, overwrite=overwrite).path
    legend = Legend(
        f"{subject.loaded.name}, {subject.about.label}",
        subject.about.stages,
        subject.about.dropped == "fold",
        "dense" if subject.is_dense else "fine-tuned backbone with all tokens",
    )
    RunFolder(folder).create(needed_bytes=2**20)
    wanted = Wanted(folder, single=not mean, sheet=sheet, heat=heatmap, mean=mean)
    with RunProgress() as progress:
        progress.begin("drawing", total)
        given = subject.sparse.to(where), subject.dense, dataset, readable_names(known, num_classes)
        try:
            drawn = draw(*given, legend, wanted, progress)
        except BaseException:
            with suppress(OSError):  # it holds something, then
                folder.rmdir()
            raise
    if as_json:
        print_json(_result(subject, legend, drawn, folder))
        return
    if not subject.is_dense:
        talk("dense answers are of the fine-tuned backbone with all tokens; --checkpoint FILE gives the dense model's")
    _print(drawn, legend, subject.is_dense, folder)


class _Subject(NamedTuple):
    loaded: Loaded
    sparse: SparseViT
    dense: nn.Module
    is_dense: bool
    about: Metadata


def _subject(model: str, checkpoint: Path | None) -> _Subject:
    """The sparse model and what to compare it with.

    Raises:
        UsageError: MODEL is dense, or keeps everything.
    """
    from vitprune.loading.load import load_dense, load_model

    loaded = load_model(model)
    if loaded.sparse is None or loaded.metadata is None:
        raise UsageError(
            f"'{model}' is a dense model: all its tokens stay, so there is nothing to show",
            f"make it sparse first: vitprune sparsify {model}",
        )
    if not loaded.sparse.schedule.stages:
        raise UsageError(f"'{model}' keeps all its tokens (keep 1), so there is nothing to show")
    if checkpoint is None and loaded.metadata.model != "demo":
        return _Subject(loaded, loaded.sparse, loaded.sparse.model, False, loaded.metadata)
    dense = load_dense(loaded, checkpoint)
    return _Subject(loaded, loaded.sparse, dense.model, True, loaded.metadata)


def _images(
    images: list[Path], data: str | None, options: DataOptions, classes: ModelClasses, name: str
) -> tuple[Images, bool]:
    """The images, and whether there may be more of them than anyone wants to see.

    Raises:
        UsageError: none are named, or in two ways.
        DataError: they are not there.
    """
    from vitprune.data import open_data

    if images and data is not None:
        raise UsageError("IMAGE and --data both say which images", "give one of them")
    if images:
        return _from_files(images), any(path.is_dir() for path in images)
    if data is None and name != "demo":
        raise UsageError("no images are named", "give image files, folders, or --data DATA")
    spec = data or "demo"
    try:
        return open_data(spec, classes, options).val, True
    except DataError:  # labels that are missing or do not fit are no loss here
        return open_data(spec, classes, options, labels=False).val, True


def _limited(images: Images, limit: int | None) -> Images:
    from vitprune.data import count_images

    if limit is None:
        return images
    total = count_images(images)
    if total is not None and limit < total:
        talk(f"{limit} of {total} images, chosen at random; --limit N for another number")
    return images.sample(limit)


def _from_files(images: list[Path]) -> ImageSet:
    from vitprune.data import UNLABELLED, ImageSet, open_image, read_folder

    paths: list[Path] = []
    for path in images:
        if path.is_dir():
            paths += read_folder(path, None).items
        elif path.is_file():
            paths.append(path)
        else:
            raise DataError(f"there is no image or folder '{path}'", "check the path")
    paths = list(dict.fromkeys(paths))
    return ImageSet(paths, [UNLABELLED] * len(paths), open_image)


def _result(subject: _Subject, legend: Any, drawn: Drawn, folder: Path) -> dict[str, Any]:
    return {
        "model": subject.loaded.name,
        "keep": subject.about.keep,
        "label": subject.about.label,
        "dropped": subject.about.dropped,
        "grid_size": list(subject.sparse.backbone.grid_size),
        "stages": [asdict(stage) for stage in subject.about.stages],
        "dense": legend.dense,
        "pictures": drawn.images,
        "mean": drawn.mean,
        "files": [str(file) for file in drawn.files],
        "output": str(folder),
    }


def _print(drawn: Drawn, legend: Any, is_dense: bool, folder: Path) -> None:
    if drawn.mean is None:
        rows = [
            [Path(each["name"]).name, *(_answer(each[side][0]) for side in ("dense", "sparse"))]
            for each in drawn.images
        ]
        print_table(legend.model, ["image", "dense" if is_dense else "all tokens", "sparse"], rows)
    else:
        for number, (shares, stage) in enumerate(zip(drawn.mean["kept_pct"], legend.stages, strict=True)):
            print_line(
                f"stage {number + 1}, before block {stage.block}: positions stay on {min(shares):.0f} to "
                f"{max(shares):.0f} % of {drawn.mean['num_images']} images"
            )
    print_line(f"{len(drawn.files)} file(s) written to {folder}")


def _answer(answer: dict[str, Any]) -> str:
    name = answer["name"] or f"class {answer['index']}"
    return f"{name} {answer['probability_pct']:.1f} %"
