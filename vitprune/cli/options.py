"""Options that several commands share, in groups, and how their text becomes values."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from vitprune.cli import completion
from vitprune.cli.output import say
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.data import DataOptions
    from vitprune.loading.load import Loaded

TABLES = "Data: splits, columns, classes"

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer wants it: a parameter that is a dataclass of options becomes one parameter per field."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            annotations = get_type_hints(groups[name], include_extras=True)
            options = [(field.name, annotations[field.name], field.default) for field in fields(groups[name])]
        else:
            options = [(name, hints[name], parameter.default)]
        parameters += [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=default)
            for option, hint, default in options
        ]

    def call(**values: Any) -> None:
        values = {name: _expanded(value) for name, value in values.items()}
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})  # type: ignore[operator]
        command(**values)

    call.__doc__ = command.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _expanded(value: Any) -> Any:
    """`~` as the home folder, wherever a path may stand: the shell leaves it in --output=~/runs."""
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return [_expanded(each) for each in value]
    if isinstance(value, (str, Path)) and str(value).startswith("~"):
        return type(value)(os.path.expanduser(value))  # noqa: PTH111  Path's raises for users that do not exist
    return value


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm name (deit_small), hf-hub:owner/name, a model.safetensors of vitprune's or its run folder, a folder "
        "that timm or transformers saved, or demo",
        show_default=False,
        autocompletion=completion.model,
    ),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", autocompletion=completion.device)
]
Precision = Annotated[PrecisionName, typer.Option(metavar="NAME", help="auto, fp32, bf16 or fp16; auto is fp32.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, metavar="N", help="Images per pass.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-j",
        metavar="N",
        min=0,
        help="Processes that read images.",
        show_default="half the CPUs, at most 8",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Same seed, same result, on the CPU.",
        show_default="0",
        rich_help_panel="Training",
    ),
]


RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="short, paper, dense (features), none (no training), or a YAML file.",
        show_default="short; dense for --task dense",
        autocompletion=completion.recipe,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

Limit = Annotated[
    int | None,
    typer.Option(min=1, help="At most N images of each split.", metavar="N"),
]
DataArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="DATA",
        autocompletion=completion.data,
        help="a folder (train/ and val/, or class folders), imagenet, imagenette, hf:owner/name, parquet or tar "
        "files, or demo",
        show_default="imagenet; demo for the demo model",
    ),
]


@dataclass(frozen=True)
class TableOptions:
    """How DATA is read."""

    train_split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Split to train on: its name, a folder in DATA, or what its shards' names begin with.",
            show_default="found",
            rich_help_panel=TABLES,
        ),
    ] = None
    val_split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Split to evaluate on.", show_default="found", rich_help_panel=TABLES),
    ] = None
    input_key: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column of the images.", show_default="found", rich_help_panel=TABLES),
    ] = None
    target_key: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Column of the classes, labels or values; several: COLUMN,COLUMN.",
            show_default="found",
            rich_help_panel=TABLES,
        ),
    ] = None
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            help="Read a Hub data set or parquet files as they come, storing nothing.",
            rich_help_panel=TABLES,
        ),
    ] = False

    class_order: Annotated[
        Literal["timm", "torchvision"] | None,
        typer.Option(
            help="How class folders were sorted for the weights: 2 before 10 (timm), or 10 before 2 (torchvision).",
            show_default="asked for where they differ",
            rich_help_panel=TABLES,
        ),
    ] = None
    class_map: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Names of the model's classes in output order: text, JSON or CSV.",
            show_default=False,
            rich_help_panel=TABLES,
        ),
    ] = None

    labels_file: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="FILE",
            help="Classes, labels or values of images: text, CSV or JSON; its columns by --input-key, --target-key.",
            show_default="found beside them",
            rich_help_panel=TABLES,
        ),
    ] = None
    max_pixels: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Larger images count as unreadable.",
            show_default="178956970",
            rich_help_panel=TABLES,
        ),
    ] = None

    def parsed(self, limit: int | None = None) -> DataOptions:
        """The same for `vitprune.data.open_data`."""
        from vitprune.data.options import MAX_PIXELS, DataOptions

        return DataOptions(
            splits=(self.train_split, self.val_split),
            columns=(self.input_key, self.target_key),
            streaming=self.streaming,
            limit=limit,
            class_order=self.class_order,
            class_map=self.class_map,
            labels=self.labels_file,
            max_pixels=self.max_pixels or MAX_PIXELS,
        )


@dataclass(frozen=True)
class ImageOptions(TableOptions):
    """Of DATA."""

    limit: Limit = None
    data_option: Annotated[str | None, typer.Option("--data", metavar="DATA", hidden=True)] = None

    def spec(self, data: str | None, loaded: Loaded) -> str:
        """DATA, or where it was not given what goes with the model.

        Raises:
            UsageError: it was given twice.
        """
        if data and self.data_option:
            raise UsageError(f"DATA is given twice: '{data}' and --data {self.data_option}", "leave out --data")
        if given := data or self.data_option:
            return given
        if loaded.name == "demo":
            return "demo"
        say("no DATA given, so imagenet")
        return "imagenet"

    def parsed(self, limit: int | None = None) -> DataOptions:
        """As in TableOptions, with --limit."""
        return super().parsed(limit or self.limit)


def parse_numbers(text: str | None, option: str) -> list[int] | None:
    """`3,6,9` to [3, 6, 9].

    Raises:
        UsageError: an entry is not a whole number above 0.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    example = "1,8,32" if option == "--batch-size" else "3,6,9"
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} is '{text}', expected whole numbers above 0, such as {example}")
    return [int(part) for part in parts]


def parse_ratios(text: str | None, option: str, example: str = "0.8,0.6,0.4") -> list[float] | None:
    """`.8,.6,.4` to [0.8, 0.6, 0.4].

    Raises:
        UsageError: an entry is not a number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} is '{text}', expected numbers such as {example}") from None
