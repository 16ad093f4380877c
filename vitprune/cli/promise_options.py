"""`eval --fidelity` and `--max-kl`: what is promised, what came of it on the screen, and `export --adaptive` of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitprune.cli.options import parse_numbers
from vitprune.cli.output import print_json, print_line, print_table, say
from vitprune.cli.progress import RunProgress
from vitprune.common import distributed
from vitprune.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vitprune.adaptive import AdaptiveViT
    from vitprune.cli.model_options import ModelOptions
    from vitprune.common.devices import Precision
    from vitprune.data import Data
    from vitprune.jobs.promise import Asked, How
    from vitprune.loading.load import Loaded
    from vitprune.tasks import Task

_PANEL = "Promise"


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
            help="Images, chosen at random, to choose passes and threshold by; the others measure.",
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
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write what came of it: a .json file for `export --adaptive FILE`, or a page, .html: fidelity against "
            "cost at every threshold, and images that went on. May be repeated.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write over an --output that exists.", rich_help_panel=_PANEL)
    ] = False

    def asked(self, keep: float | None) -> Asked | None:
        """The promise, with the first pass at a keep ratio or any of the file's; None where none is asked for.

        Raises:
            UsageError: options that do not go together, or a number out of range.
        """
        if self.fidelity is None and self.max_kl is None:
            idle = next((name for name, value in vars(self).items() if value), None)
            if idle is not None:
                option = "--" + idle.replace("_", "-")
                raise UsageError(f"{option} is of a promise, and none is asked for", "add --fidelity 99")
            return None
        distributed.refuse_several("eval --fidelity")
        from vitprune.jobs.promise import Asked, check_outputs

        check_outputs(self.output or (), overwrite=self.overwrite)
        confidence = Asked.confidence if self.confidence is None else self.confidence
        return Asked(self.fidelity, self.max_kl, confidence, self.calibrate or Asked.num_images, keep)

    def how(
        self, device: torch.device, precision: Precision, batch_size: int, workers: int, *, skip_unreadable: bool
    ) -> How:
        """How it is measured."""
        from vitprune.jobs.promise import How

        sizes = parse_numbers(self.bench_batch_sizes, "--bench-batch-sizes") or How.batch_sizes
        seconds = How.bench_seconds if self.bench_seconds is None else self.bench_seconds
        return How(device, precision, batch_size, workers, 1.0 if skip_unreadable else 0.0, sizes, seconds)


Adaptive = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="A cascade: images of which MODEL is less certain go on through the dense model (of --checkpoint or by "
        "its name). A threshold, or the FILE of eval --fidelity 99 -o FILE, for what that promised.",
        show_default=False,
    ),
]


def refuse_beside(what: str, others: Mapping[str, object]) -> None:
    """Make sure that options are not given that are of no use beside another.

    Args:
        what: the other, for the sentence.
        others: by option; what was not given is false.

    Raises:
        UsageError: one is given.
    """
    if idle := next((name for name, value in others.items() if value), None):
        raise UsageError(f"{idle} does not go with {what}", f"leave out {idle}")


def refuse_in_parts(what: str, kind: str, precision: str | None, batch: int | None, *, features: bool) -> None:
    """Make sure that nothing is asked of a cascade's files that they cannot be.

    Raises:
        UsageError: it is.
    """
    beside = {
        "--format": kind != "onnx",
        "--precision": precision not in (None, "fp32"),
        "--batch": batch,
        "--features": features,
    }
    refuse_beside(f"{what}: ONNX in fp32 for batches of any size", beside)


def check_sparse(loaded: Loaded, option: str) -> None:
    """Make sure that MODEL has a dense model to go on with.

    Raises:
        UsageError: it is no sparse file.
    """
    if loaded.sparse is None or not loaded.sparse.schedule.stages:
        raise UsageError(
            f"'{loaded.spec}' is no sparse file, and {option} is of one and its dense model together",
            "name the model.safetensors of a run",
        )


def load_cascade(asked: str, model: str, weights: ModelOptions, keep: float | None) -> tuple[Loaded, AdaptiveViT]:
    """MODEL at a keep ratio, and the cascade of it and its dense model.

    Args:
        asked: a threshold or the file of a promise.
        model: the argument MODEL.
        weights: its options; a --checkpoint is the dense model's.
        keep: --keep.

    Raises:
        UsageError: MODEL is no sparse file, the threshold is out of range, or the promise is not of MODEL.
        CheckpointError: the file of a promise cannot be read.
    """
    from vitprune.adaptive import AdaptiveViT
    from vitprune.jobs.promise import as_promised, read_promise

    threshold = _threshold(asked)
    made = read_promise(Path(asked)) if threshold is None else None
    if made is not None and keep is not None:
        raise UsageError(f"--keep and --adaptive {asked} both say the keep ratio", "leave out --keep")
    loaded = weights.load_apart(model)
    check_sparse(loaded, "--adaptive")
    assert loaded.sparse is not None
    dense = weights.dense_of(loaded).model
    if made is None:
        loaded.open_at(keep)
        return loaded, AdaptiveViT([loaded.sparse, dense], threshold or 0.0)
    adaptive = as_promised(made, loaded.sparse, dense)
    loaded.open_at(made.keep)
    return loaded, adaptive


def _threshold(text: str) -> float | None:
    """--adaptive as a number; None of a file.

    Raises:
        UsageError: it is no certainty.
    """
    try:
        threshold = float(text)
    except ValueError:
        return None
    if not 0 <= threshold <= 1:
        raise UsageError(f"--adaptive is {text}, expected a certainty from 0 to 1", "eval --fidelity 99 finds one")
    return threshold


def print_promise(
    loaded: Loaded,
    dense: nn.Module,
    data: Data,
    task: Task,
    asked: Asked,
    how: How,
    outputs: Sequence[Path],
    *,
    as_json: bool,
) -> None:
    """Keep the promise on the images of `data`, print what came of it, and write the files that are asked for."""
    from vitprune.jobs.promise import keep_promise, write_outputs
    from vitprune.report.promise_page import promise_rows, promise_sentences

    with RunProgress() as progress:
        adaptive, routed = keep_promise(loaded, dense, data, task, asked, how, progress)
    write_outputs(outputs, loaded, data, adaptive, routed)
    for output in outputs:
        say(f"written to {output}")
    result = adaptive.promise
    assert result is not None
    if as_json:
        print_json(result)
        return
    for sentence in promise_sentences(result, task):
        print_line(sentence)
    print_table(f"{result['model']}, {result['label']}, beside dense alone", *promise_rows(result, task, str))
    for remark in result["remarks"]:
        print_line(remark)
