"""`eval --fidelity` and `--max-kl`: what is promised, and what came of it on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitprune.cli.options import parse_numbers
from vitprune.cli.output import print_json, print_line, print_table, say
from vitprune.cli.progress import RunProgress
from vitprune.common import distributed
from vitprune.common.files import check_new_file, write_text
from vitprune.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vitprune.common.devices import Precision
    from vitprune.data import Data
    from vitprune.jobs.promise import Asked, How
    from vitprune.loading.load import Loaded
    from vitprune.tasks import Task

_PANEL = "Promise"
_BATCH_SIZES = [1, 8, 32, 128]


@dataclass(frozen=True)
class PromiseOptions:
    """What is promised of a sparse file and its dense model together."""

    fidelity: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT",
            help="Promise the dense model's answer on so many percent of images like these.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    max_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Promise this mean KL divergence from it at most, each image's counted as 1 at most.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    confidence: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="With which the promise is to hold.", show_default="0.95", rich_help_panel=_PANEL
        ),
    ] = None
    calibrate: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Images, chosen at random, to choose the threshold by; the others measure.",
            show_default="600",
            min=1,
            rich_help_panel=_PANEL,
        ),
    ] = None
    bench_batch_sizes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES", help="Images per pass that are timed.", show_default="1,8,32,128", rich_help_panel=_PANEL
        ),
    ] = None
    bench_seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="How long each is timed.", show_default="2", min=0, rich_help_panel=_PANEL),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Page to write, HTML: fidelity against cost at every threshold, and images that went on.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Write over an --output that exists.", rich_help_panel=_PANEL),
    ] = False

    def asked(self) -> Asked | None:
        """The promise; None where none is asked for.

        Raises:
            UsageError: options that do not go together, or a number out of range.
        """
        if self.fidelity is None and self.max_kl is None:
            idle = next((name for name, value in vars(self).items() if not (value is None or value is False)), None)
            if idle is not None:
                option = "--" + idle.replace("_", "-")
                raise UsageError(f"{option} is of a promise, and none is asked for", "add --fidelity 99")
            return None
        distributed.refuse_several("eval --fidelity")
        from vitprune.jobs.promise import Asked

        if self.confidence is not None and not 0.5 <= self.confidence < 1:
            raise UsageError(f"--confidence is {self.confidence:g}, expected a share from 0.5 to below 1", "try 0.95")
        if self.output is not None:
            if self.output.suffix.lower() not in (".html", ".htm"):
                raise UsageError(
                    f"--output is '{self.output}', and what is written is a page",
                    "name it .html; --json prints the figures",
                )
            check_new_file(self.output, overwrite=self.overwrite)
        confidence = Asked.confidence if self.confidence is None else self.confidence
        return Asked(self.fidelity, self.max_kl, confidence, self.calibrate or Asked.num_images)

    def how(
        self, device: torch.device, precision: Precision, batch_size: int, workers: int, *, skip_unreadable: bool
    ) -> How:
        """How it is measured."""
        from vitprune.jobs.promise import How

        sizes = parse_numbers(self.bench_batch_sizes, "--bench-batch-sizes") or _BATCH_SIZES
        seconds = 2.0 if self.bench_seconds is None else self.bench_seconds
        return How(device, precision, batch_size, workers, 1.0 if skip_unreadable else 0.0, sizes, seconds)


def check_promised(loaded: Loaded, others: Mapping[str, object]) -> None:
    """Make sure that MODEL has a dense model to go on with.

    Args:
        loaded: MODEL.
        others: options of `eval` that a promise has no use for, and their values.

    Raises:
        UsageError: it is no sparse file, or one of these is given.
    """
    if idle := next((name for name, value in others.items() if value), None):
        raise UsageError(f"{idle} does not go with a promise, which measures fidelity and cost", f"leave out {idle}")
    if loaded.sparse is None or not loaded.sparse.schedule.stages:
        raise UsageError(
            f"'{loaded.spec}' is no sparse file, and --fidelity promises something of one and its dense model together",
            "name the model.safetensors of a run",
        )


def print_promise(
    loaded: Loaded,
    dense: nn.Module,
    data: Data,
    task: Task,
    asked: Asked,
    how: How,
    page: Path | None,
    *,
    as_json: bool,
) -> None:
    """Keep the promise on the images of `data`, print what came of it, and write the page that is asked for."""
    from vitprune.data.classes import readable_names
    from vitprune.jobs.promise import keep_promise
    from vitprune.report.promise_page import promise_rows, promise_sentences, render_promise_page
    from vitprune.report.samples import choose_routed

    sparse = loaded.sparse
    assert sparse is not None
    with RunProgress() as progress:
        found, routed = keep_promise(sparse, dense, data.val, task, asked, how, progress)
    result = {
        "model": loaded.name,
        "label": sparse.label,
        "task": task.name,
        "keep": loaded.keep,
        "data": data.name,
        "precision": how.precision,
        "device": str(how.device),
        **found,
    }
    if page is not None:
        names = readable_names(data.val.class_names | dict(enumerate(loaded.class_names or ())), sparse.num_classes)
        write_text(page, render_promise_page(result, choose_routed(sparse, dense, routed, names, how.device)))
        say(f"written to {page}")
    if as_json:
        print_json(result)
        return
    for sentence in promise_sentences(result, task):
        print_line(sentence)
    print_table(f"{result['model']}, {sparse.label}, beside dense", *promise_rows(result, task, str))
    for remark in result["remarks"]:
        print_line(remark)
