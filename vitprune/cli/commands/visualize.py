"""`vitprune visualize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitprune.cli import completion
from vitprune.cli.model_options import told
from vitprune.cli.options import AsJson, Device, TableOptions, option
from vitprune.cli.output import number, print_json, print_line, print_table, say, waiting
from vitprune.cli.plan_options import FileKeep
from vitprune.cli.progress import RunProgress
from vitprune.cli.training_options import Overwrite
from vitprune.common import distributed
from vitprune.common.files import check_writable
from vitprune.common.run_folder import RUNS, RunFolder
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.report.visualize import Subject


def visualize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model.safetensors that vitprune wrote, or its run folder.", show_default=False
        ),
    ],
    tables: TableOptions,
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="IMAGE", help="Image files, or folders of them.", show_default="of a demo model: --data demo"
        ),
    ] = None,
    keep: FileKeep = None,
    data: Annotated[
        str | None,
        option(
            "Images of a data set instead, as in eval.", metavar="DATA", autocompletion=completion.data, shown=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        option("Folder for the PNGs.", "--output", "-o", metavar="DIR", shown="runs/<model>-<keep>-keepmaps"),
    ] = None,
    overwrite: Overwrite = False,
    heatmap: Annotated[
        bool, option("Add heat maps of importance and, of a model that merges, redundancy.", "--heatmap")
    ] = False,
    mean: Annotated[
        bool, option("Draw how often each position is kept, over all images, instead of a PNG for each.", "--mean")
    ] = False,
    checkpoint: Annotated[
        Path | None, option("Weights of the dense model that MODEL was made from, to compare with.", metavar="FILE")
    ] = None,
    limit: Annotated[
        int | None,
        option(
            "At most N images, chosen at random, always the same.",
            min=1,
            metavar="N",
            shown="16 of folders and data sets; all with --mean",
        ),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Which tokens are kept, stage by stage: a PNG per image, with what dense and sparse say of it.

    Dense predictions are of the dense model where there is one (--checkpoint FILE; always for a demo model), else of
    the fine-tuned backbone with all tokens, and the caption says which.

    Examples:

      vitprune visualize runs/deit_small_patch16_224-keep0.7 cat.jpg dog.jpg

      vitprune visualize runs/deit_small_patch16_224-keep0.7 path/to/images --heatmap

      vitprune visualize runs/demo-keep0.7 --data demo --mean
    """
    distributed.refuse_several("visualize")
    check_writable(output or RUNS)
    with waiting("loading PyTorch"):
        from vitprune.common.devices import pick_device
        from vitprune.report.visualize import NUM_DRAWN, load_subject, open_images
        from vitprune.report.visualize import visualize as draw
        from vitprune.schedule import plan_slug
    if mean and heatmap:
        raise UsageError("--mean counts how often positions are kept, without heat maps", "leave out one")
    where = pick_device(device)
    subject = load_subject(model, checkpoint, keep)
    told(subject.loaded)
    subject.sparse.to(where)
    found, many = open_images(subject, images or [], data, tables.parsed())
    name = f"{subject.loaded.short_name}-{plan_slug(subject.metadata.label)}-keepmaps"
    folder = RunFolder.choose(output, name, overwrite=overwrite, of_run=False)
    limit = NUM_DRAWN if limit is None and many and not mean else limit
    with RunProgress() as progress:
        drawn = draw(subject, found, folder, progress, heat=heatmap, mean=mean, limit=limit)
    if as_json:
        print_json(drawn)
        return
    if not subject.is_dense:
        say("dense: the fine-tuned backbone with all tokens; --checkpoint FILE gives the dense model's predictions")
    _print(drawn, subject)
    print_line(f"{len(drawn['files'])} file(s) written to {folder}")


def _print(drawn: dict[str, Any], subject: Subject) -> None:
    from vitprune.tasks import task_named

    if drawn["mean"] is None:
        rows = [
            [Path(each["name"]).name, *(_said(each, side) for side in ("dense", "sparse")), number(each["distance"], 3)]
            for each in drawn["images"]
        ]
        distance = task_named(subject.sparse.task).distance
        columns = ["image", "dense" if subject.is_dense else "all tokens", "sparse", distance]
        print_table(subject.legend.model, columns, rows)
        if any("neighbours" in each for each in drawn["images"]):
            print_line("dense, sparse: the image here that is nearest by the model's vectors")
        return
    for index, (shares, stage) in enumerate(zip(drawn["mean"]["kept_pct"], subject.legend.stages, strict=True)):
        print_line(
            f"stage {index + 1}, before block {stage.block}: positions kept on {min(shares):.0f} to "
            f"{max(shares):.0f} % of {drawn['mean']['num_images']} images"
        )


def _said(entry: dict[str, Any], side: str) -> str:
    """The likeliest class, or what there is instead: a text, the name of the nearest image."""
    from vitprune.tasks import NamedClass

    if "neighbours" in entry:
        return "".join(Path(name).name for name in entry["neighbours"][side][:1])
    answer = entry[side]
    return answer if isinstance(answer, str) else "".join(NamedClass(**each).text for each in answer[:1])
