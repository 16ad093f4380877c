"""The files in which a complete run tells what it did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune.checkpoint.metadata import Metadata
from vitprune.common.files import write_json
from vitprune.data import Data, readable_names
from vitprune.model import SparseViT
from vitprune.report.card import card_is_ours, write_card
from vitprune.report.page import write_page
from vitprune.report.publishable import publishable
from vitprune.report.runs import CARD, KEEP_MAPS, LOG, PAGE, REPORT, read_run
from vitprune.report.samples import choose_images


def accuracy_of(report: dict[str, Any]) -> dict[str, Any]:
    """What a file's header says of its accuracy; without paths, for the file may be published."""
    return {name: publishable(report)[name] for name in ("dense", "sparse", "data")}


def write_results(
    folder: Path, report: dict[str, Any], models: Mapping[str, nn.Module], data: Data, metadata: Metadata
) -> None:
    """Write keepmaps.json, report.json, report.html and README.md, the model card.

    Page and card come last: whatever goes wrong with them, `vitprune report` makes them again. A README.md that is the
    user's own stays.

    Args:
        folder: of the run.
        report: see `build_report`.
        models: "dense" and "sparse", on one device.
        data: the images, the transform of `val` set.
        metadata: of the sparse model, complete.

    Raises:
        OutputError: a file cannot be written.
    """
    sparse = models["sparse"]
    assert isinstance(sparse, SparseViT)
    names = readable_names(data.val.class_names | dict(enumerate(metadata.class_names or [])), sparse.num_classes)
    chosen = choose_images(sparse, models["dense"], data, names, torch.device(report["device"]))
    if chosen is not None:
        write_json(folder / KEEP_MAPS, chosen.model_dump(mode="json", by_alias=True))
    write_json(folder / REPORT, report)
    run = read_run(folder)
    write_page(folder / PAGE, run)
    write_card(folder, run, metadata)


def forget_results(folder: Path) -> None:
    """Remove what an earlier run left, which would be taken for the next one's; but no README.md of the user's own."""
    for name in (REPORT, KEEP_MAPS, PAGE, LOG):
        (folder / name).unlink(missing_ok=True)
    if card_is_ours(folder / CARD):
        (folder / CARD).unlink(missing_ok=True)
