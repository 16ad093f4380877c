"""`vitprune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitprune.cli.options import AsJson, option
from vitprune.cli.output import print_json, print_line, say


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that sparsify wrote.", show_default=False)],
    output: Annotated[
        Path | None, option("Page to write.", "--output", "-o", metavar="FILE", shown="RUN/report.html")
    ] = None,
    overwrite: Annotated[bool, option("Write over an --output that exists.", "--overwrite")] = False,
    no_images: Annotated[
        bool, option("Leave out the images of the data set, to show the page to others.", "--no-images")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Draw a run's report.html again, from report.json, log.jsonl and keepmaps.json beside it.

    One file that needs nothing from elsewhere: open it in a browser, print it, send it. Without --output the model
    card, README.md, is written too if the folder has none.

    Examples:

      vitprune report runs/deit_small_patch16_224-keep0.7

      vitprune report runs/deit_small_patch16_224-keep0.7 --no-images -o page.html
    """
    from vitprune.checkpoint.sparse_file import read_metadata
    from vitprune.common.files import check_new_file, write_text
    from vitprune.common.run_folder import RunFolder
    from vitprune.report.card import KEPT_CARD, write_card
    from vitprune.report.page import render_page
    from vitprune.report.runs import read_run

    if output is not None:
        check_new_file(output, overwrite=overwrite)
    found = read_run(run)
    files = RunFolder(RunFolder.of(run))
    path = output or files.page
    write_text(path, render_page(found, images=not no_images))
    card: Path | None = None
    if output is None and not files.weights.is_file():
        say(f"{files.card.name} was not written: it describes {files.weights.name}, which is not in '{files}'")
    elif output is None and write_card(run, found, read_metadata(files.weights)):
        card = files.card
    elif output is None:
        say(KEPT_CARD.format(files.card))
    size, shown = path.stat().st_size, 0 if no_images or found.keep_maps is None else found.keep_maps.num_images
    if as_json:
        written = None if card is None else str(card)
        print_json({"output": str(path), "size_mib": size / 2**20, "num_images": shown, "card": written})
        return
    print_line(f"written to {path}: {size / 2**20:.2f} MiB, {shown} images")
    if card is not None:
        print_line(f"written to {card}: the model card")
