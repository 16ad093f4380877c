"""Options that several commands share, in groups, and how their text becomes values."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_type_hints

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
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})  # type: ignore[operator]
        command(**values)

    call.__doc__ = command.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


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


class ImageSize(NamedTuple):
    """Height and width of the model's input, in pixels."""

    height: int
    width: int


def _image_size(text: str) -> ImageSize:
    found = re.fullmatch(r"(\d+)(?:[x,](\d+))?", text)
    if not found or int(found[1]) < 1 or int(found[2] or 1) < 1:
        raise typer.BadParameter(f"'{text}' is no image size: give pixels, such as 384, or height and width: 256x320")
    return ImageSize(int(found[1]), int(found[2] or found[1]))


RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="short, paper, none (no training), or a YAML file.",
        autocompletion=completion.recipe,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

Limit = Annotated[
    int | None,
    typer.Option(min=1, help="At most N random images of each split.", metavar="N"),
]
ImgSize = Annotated[
    ImageSize | None,
    typer.Option(
        parser=_image_size,
        metavar="SIZE",
        help="Another image size: 384, or 256x320.",
        rich_help_panel="Preprocessing",
    ),
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


def _preprocessing(metavar: str | None, help_text: str, **limits: Any) -> Any:
    return typer.Option(
        metavar=metavar,
        help=f"{help_text} With --checkpoint.",
        show_default="timm's",
        rich_help_panel="Preprocessing",
        **limits,
    )


def _colours(text: str | None, option: str) -> tuple[float, ...] | None:
    numbers = parse_ratios(text, option, ".485,.456,.406")
    if numbers is not None and (len(numbers) not in (1, 3) or (option == "--std" and min(numbers) <= 0)):
        what = "three numbers above 0" if option == "--std" else "three numbers"
        raise UsageError(f"{option} is '{text}', expected {what}, one a colour, such as .5,.5,.5")
    return None if numbers is None else tuple(numbers)


def parse_model_kwargs(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`["fc_norm=False"]` to {"fc_norm": False}: values are Python's, or text.

    Raises:
        UsageError: an entry has no `=`, or there are two of one name.
    """
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not key.isidentifier() or not text:
            raise UsageError(
                f"--model-kwargs is '{pair}', expected KEY=VALUE", "for example --model-kwargs fc_norm=False"
            )
        if key in found:
            raise UsageError(f"--model-kwargs gives {key} twice", "give it once")
        text = text.capitalize() if text.lower() in ("true", "false", "none") else text
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    return found


def spread_model_kwargs(arguments: Sequence[str]) -> list[str]:
    """The command line with --model-kwargs before each of several KEY=VALUE, as timm's scripts take them."""
    found: list[str] = []
    for argument in arguments:
        follows = len(found) > 1 and found[-2] == "--model-kwargs"
        if follows and re.match(r"[A-Za-z_]\w*=", argument) and not Path(argument).exists():
            found.append("--model-kwargs")
        found.append(argument)
    return found


@dataclass(frozen=True)
class StructureOptions:
    """How MODEL is built."""

    img_size: ImgSize = None
    model_kwargs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Arguments for timm.create_model, such as global_pool=avg; may be repeated.",
            show_default=False,
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """What they are to `vitprune.loading.load.load_model`.

        Raises:
            UsageError: they cannot be read.
        """
        return {"img_size": self.img_size, "model_kwargs": parse_model_kwargs(self.model_kwargs)}

    def load(self, model: str, **more: Any) -> Loaded:
        """MODEL, from `load_model`, whose arguments `more` replaces; says what was understood."""
        from vitprune.loading.load import load_model

        return told(load_model(model, **{**self.arguments(), **more}))


def told(loaded: Loaded) -> Loaded:
    """Say what was made of the weights of a model, and return it."""
    for line in loaded.understood:
        say(line)
    return loaded


@dataclass(frozen=True)
class ModelOptions(StructureOptions):
    """Of MODEL."""

    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Own weights for a timm name: .safetensors, .pth, .npz, an index of shards."),
    ] = None
    checkpoint_key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Which of several sets of weights in it, such as state_dict.",
            show_default="the EMA",
        ),
    ] = None
    mean: Annotated[str | None, _preprocessing("R,G,B", "Images are normalised by it, such as .485,.456,.406.")] = None
    std: Annotated[str | None, _preprocessing("R,G,B", "Likewise, such as .229,.224,.225.")] = None
    crop_pct: Annotated[
        float | None,
        _preprocessing("SHARE", "Of the resized image that is evaluated, such as 0.9.", min=0.1, max=10),
    ] = None
    interpolation: Annotated[
        Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"] | None,
        _preprocessing("FILTER", "How images are resized: bicubic, bilinear, nearest, lanczos, box or hamming."),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """As in StructureOptions."""
        weights = {"checkpoint": self.checkpoint, "checkpoint_key": self.checkpoint_key}
        return {**super().arguments(), **weights, "preprocessing": self.preprocessing()}

    def dense_of(self, sparse: Loaded) -> Loaded:
        """The dense model that a sparse file was made from, from --checkpoint or by its name; tells as `load`."""
        from vitprune.loading.load import load_dense

        return told(load_dense(sparse, self.checkpoint, self.checkpoint_key))

    def preprocessing(self) -> dict[str, Any]:
        """What replaces timm's preprocessing.

        Raises:
            UsageError: no numbers, or options that are of no use.
        """
        given: dict[str, Any] = {
            "mean": _colours(self.mean, "--mean"),
            "std": _colours(self.std, "--std"),
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
        }
        given = {key: value for key, value in given.items() if value is not None}
        if given and self.checkpoint is None:
            name = next(iter(given)).replace("_", "-")
            raise UsageError(
                f"--{name} is of own weights, and there is no --checkpoint",
                "leave it out: weights of timm and files of vitprune say how their images are prepared",
            )
        return given


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
        typer.Option(metavar="COLUMN", help="Column of the classes.", show_default="found", rich_help_panel=TABLES),
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

    def parsed(self, limit: int | None = None) -> DataOptions:
        """The same for `vitprune.data.open_data`."""
        from vitprune.data import DataOptions

        return DataOptions(
            splits=(self.train_split, self.val_split),
            columns=(self.input_key, self.target_key),
            streaming=self.streaming,
            limit=limit,
            class_order=self.class_order,
            class_map=self.class_map,
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
