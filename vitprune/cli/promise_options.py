"""`eval --fidelity` and `--max-kl`: what is promised, and what came of it on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitprune.cli.options import parse_numbers
from vitprune.cli.output import number, print_json, print_line, print_table
from vitprune.cli.progress import RunProgress
from vitprune.cli.tables import speedup_text
from vitprune.common import distributed
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

    def asked(self) -> Asked | None:
        """The promise; None where none is asked for.

        Raises:
            UsageError: options that do not go together, or a number out of range.
        """
        if self.fidelity is None and self.max_kl is None:
            idle = next((name for name, value in vars(self).items() if value is not None), None)
            if idle is not None:
                option = "--" + idle.replace("_", "-")
                raise UsageError(f"{option} is of a promise, and none is asked for", "add --fidelity 99")
            return None
        distributed.refuse_several("eval --fidelity")
        from vitprune.jobs.promise import Asked

        if self.confidence is not None and not 0.5 <= self.confidence < 1:
            raise UsageError(f"--confidence is {self.confidence:g}, expected a share from 0.5 to below 1", "try 0.95")
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
    loaded: Loaded, dense: nn.Module, data: Data, task: Task, asked: Asked, how: How, *, as_json: bool
) -> None:
    """Keep the promise on the images of `data`, and print what came of it."""
    from vitprune.jobs.promise import keep_promise

    assert loaded.sparse is not None
    with RunProgress() as progress:
        found = keep_promise(loaded.sparse, dense, data.val, task, asked, how, progress)
    result = {
        "model": loaded.name,
        "task": task.name,
        "keep": loaded.keep,
        "data": data.name,
        "precision": how.precision,
        "device": str(how.device),
        **found,
    }
    if as_json:
        print_json(result)
        return
    _print(result, loaded.sparse.label, task)


def _print(result: dict[str, Any], label: str, task: Task) -> None:
    calibration, asked = result["calibration"], result["asked"]
    of = f"the {'class' if task.decides == 'class' else 'labels'} of the dense model"
    percent = 100 * asked["confidence"]
    if asked["fidelity_pct"] is not None:
        promised = f"{of} on at least {asked['fidelity_pct']:g} % of images like these"
        bound = f"on {100 * (1 - calibration['bound']):.2f} % or more"
        measured = f"on {100 * (1 - result['loss']):.2f} %"
    else:
        promised = f"a mean KL divergence from the dense model of at most {asked['max_kl']:g}, counted to 1"
        bound, measured = f"{calibration['bound']:.4f} or less", f"{result['loss']:.4f}"
    threshold = result["threshold"]
    rule = "all images go on" if threshold is None else f"images whose answer leads by less than {threshold:.3f} go on"
    print_line(
        f"promised, with {percent:g} % confidence: {promised}; by {calibration['num_images']} images {bound}: {rule}"
    )
    print_line(f"measured on {result['num_images']} other images: {measured}")
    print_line(
        f"{result['went_on_pct']:.1f} % of them went on; GMACs {result['gmacs_mean']:.3f} on average and "
        f"{result['gmacs_worst']:.3f} at worst, dense {result['gmacs_dense']:.3f}"
    )
    rows = []
    first = task.fidelity[0]
    for kind, row, gmacs in (
        ("sparse alone", result["fixed"], result["gmacs_sparse"]),
        ("adaptive", result["delta"], result["gmacs_mean"]),
    ):
        rows.append(
            [
                kind,
                number(row[first.key], first.digits),
                number(row[task.finest.key], task.finest.digits),
                number(gmacs, 3),
                *map(speedup_text, row["speedup"]),
            ]
        )
    sizes = [f"batch {row['batch_size']}" for row in result["delta"]["speedup"]]
    columns = ["", first.text, task.finest.text, "GMACs", *sizes]
    print_table(f"{result['model']}, {label}, beside dense", columns, rows)
    for remark in result["remarks"]:
        print_line(remark)
