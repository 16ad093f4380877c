"""Options that several commands share, in groups, and how their text becomes values."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from vitprune.cli import completion
from vitprune.cli.output import say
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.data import DataOptions
    from vitprune.loading.load import Loaded

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


def option(text: str, *names: str, panel: str | None = None, shown: str | bool = True, **more: Any) -> Any:
    """`typer.Option` by its help; `panel` and `shown` are its `rich_help_panel` and `show_default`."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=shown, **more)


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
Device = Annotated[str, option("auto, cpu, cuda, cuda:N or mps.", metavar="NAME", autocompletion=completion.device)]
Precision = Annotated[PrecisionName, option("auto, fp32, bf16 or fp16; auto is fp32.", metavar="NAME")]
BatchSize = Annotated[int, option("Images per pass.", "--batch-size", "-b", min=1, metavar="N")]
Workers = Annotated[
    int | None,
    option("Processes that read images.", "--workers", "-j", metavar="N", min=0, shown="half the CPUs, at most 8"),
]
Seed = Annotated[
    int | None, option("Same seed, same result, on the CPU.", metavar="N", min=0, shown="0", panel="Training")
]
RecipeName = Annotated[
    str | None,
    option(
        "short, paper, dense (features), none (no training), or a YAML file.",
        "--recipe",
        metavar="NAME",
        shown="short; dense for --task dense",
        autocompletion=completion.recipe,
    ),
]
AsJson = Annotated[bool, option("One JSON object on stdout.", "--json")]
Limit = Annotated[int | None, option("At most N images of each split.", min=1, metavar="N")]
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
_of_data = partial(option, panel="Data: splits, columns, classes")


@dataclass(frozen=True)
class TableOptions:
    """How DATA is read."""

    train_split: Annotated[
        str | None,
        _of_data(
            "Split to train on: its name, a folder in DATA, or what its shards' names begin with.",
            metavar="NAME",
            shown="found",
        ),
    ] = None
    val_split: Annotated[str | None, _of_data("Split to evaluate on.", metavar="NAME", shown="found")] = None
    input_key: Annotated[str | None, _of_data("Column of the images.", metavar="COLUMN", shown="found")] = None
    target_key: Annotated[
        str | None,
        _of_data("Column of the classes, labels or values; several: COLUMN,COLUMN.", metavar="COLUMN", shown="found"),
    ] = None
    streaming: Annotated[
        bool, _of_data("Read a Hub data set or parquet files as they come, storing nothing.", "--streaming")
    ] = False
    class_order: Annotated[
        Literal["timm", "torchvision"] | None,
        _of_data(
            "How class folders were sorted for the weights: 2 before 10 (timm), or 10 before 2 (torchvision).",
            shown="asked for where they differ",
        ),
    ] = None
    class_map: Annotated[
        Path | None,
        _of_data("Names of the model's classes in output order: text, JSON or CSV.", metavar="FILE", shown=False),
    ] = None
    labels_file: Annotated[
        Path | None,
        _of_data(
            "Classes, labels or values of images: text, CSV or JSON; its columns by --input-key, --target-key.",
            "--labels",
            metavar="FILE",
            shown="found beside them",
        ),
    ] = None
    max_pixels: Annotated[
        int | None, _of_data("Larger images count as unreadable.", metavar="N", min=1, shown="178956970")
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
        """DATA, which may be given once, or else what goes with the model."""
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
    """`3,6,9` to [3, 6, 9]; a UsageError names an entry that is not a whole number above 0."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    example = "1,8,32" if option == "--batch-size" else "3,6,9"
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} is '{text}', expected whole numbers above 0, such as {example}")
    return [int(part) for part in parts]


def parse_ratios(text: str | None, option: str, example: str = "0.8,0.6,0.4") -> list[float] | None:
    """`.8,.6,.4` to [0.8, 0.6, 0.4]; a UsageError says that an entry is not a number."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} is '{text}', expected numbers such as {example}") from None
