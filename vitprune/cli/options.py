"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from vitprune.cli import completion
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.data import DataOptions
    from vitprune.loading.load import Loaded

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
ScheduleName = Literal["geometric", "late"]
DroppedName = Literal["drop", "fold"]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm name (deit_small_patch16_224.fb_in1k) or short name (deit_small), hf-hub:owner/name, "
        "a model.safetensors that vitprune wrote, a folder that timm or transformers saved, or demo.",
        show_default=False,
        autocompletion=completion.model,
    ),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", autocompletion=completion.device)
]
Precision = Annotated[PrecisionName, typer.Option(help="auto: bf16 or fp16 for training where fast, fp32 elsewhere.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per step.")]
Workers = Annotated[
    int | None,
    typer.Option("--workers", "-j", min=0, help="Processes that read images.", show_default="half the CPUs"),
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Same seed, same result, on the CPU.", show_default="by recipe: 0")
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="At most N images of each part, chosen at random, always the same.", metavar="N"),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Weights for a timm name: .safetensors, .pth, .bin or .npz, not from the Hub."),
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


ImgSize = Annotated[
    ImageSize | None,
    typer.Option(
        parser=_image_size,
        metavar="PIXELS",
        help="Another image size, 384 or 256x320 (height, width); position embeddings are resampled.",
    ),
]
Splits = Annotated[
    str | None,
    typer.Option(
        metavar="TRAIN,VAL",
        help="Splits of a table: their names, or what shards' names begin with.",
        show_default="found",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(metavar="IMAGE,LABEL", help="Columns of a table with images and classes.", show_default="found"),
]
Streaming = Annotated[
    bool, typer.Option("--streaming", help="Read a Hub data set or parquet files as they come, storing nothing.")
]
Keep = Annotated[
    float | None,
    typer.Option(metavar="RATIO", help="Share of patch tokens that one stage keeps, in (0, 1].", show_default="0.7"),
]
Stages = Annotated[
    str | None,
    typer.Option(
        metavar="BLOCKS", help="Blocks before which tokens are dropped, such as 3,6,9.", show_default="by depth"
    ),
]
Schedule = Annotated[
    ScheduleName | None,
    typer.Option(
        help="How stages share the work at one cost: the paper's r, r^2, r^3, or more of it late.",
        show_default="by recipe",
    ),
]
Ratios = Annotated[
    str | None,
    typer.Option(
        metavar="RATIOS",
        help="Shares of all tokens left after each stage, such as .8,.6,.4, instead of --keep.",
        show_default=False,
    ),
]
Dropped = Annotated[
    DroppedName | None,
    typer.Option(
        help="What becomes of the tokens that leave: gone, or folded into the most similar that stay.",
        show_default="by recipe",
    ),
]
Align = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Token counts that fill tiles of N, prefix tokens included, at the same MACs: 8, or auto: measured here.",
        show_default="1",
    ),
]
TargetBatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Images per pass where a target or --align auto is measured.", show_default="32"
    ),
]
TargetGmacs = Annotated[
    float | None,
    typer.Option(metavar="G", help="Find the keep ratio that costs at most this, in GMACs.", show_default=False),
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Find, by measuring here, the keep ratio and stages that are this many times as fast as dense.",
        show_default=False,
    ),
]
TargetLatency = Annotated[
    float | None,
    typer.Option(
        "--target-latency-ms",
        metavar="MS",
        help="The same by the time of a pass, in milliseconds.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="short (minutes), paper (as published), or a YAML file.",
        autocompletion=completion.recipe,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; talk goes to stderr.")]


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


def parse_ratios(text: str | None, option: str) -> list[float] | None:
    """`.8,.6,.4` to [0.8, 0.6, 0.4].

    Raises:
        UsageError: an entry is not a number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} is '{text}', expected ratios such as 0.8,0.6,0.4") from None


def parse_pair(text: str | None, option: str) -> tuple[str | None, str | None]:
    """Two names with a comma between them; either may be left out.

    Raises:
        UsageError: more than two; names `option`.
    """
    names = [name.strip() or None for name in (text or "").split(",")]
    if len(names) > 2:
        raise UsageError(f"{option} takes two names, got '{text}'", f"for example {option} train,validation")
    return names[0], names[1] if len(names) == 2 else None


def data_options(splits: str | None, columns: str | None, streaming: bool, limit: int | None) -> DataOptions:
    """What the options say of DATA.

    Raises:
        UsageError: --splits or --columns holds more than two names.
    """
    from vitprune.data import DataOptions

    pair = parse_pair(splits, "--splits"), parse_pair(columns, "--columns")
    return DataOptions(splits=pair[0], columns=pair[1], streaming=streaming, limit=limit)


def data_spec(data: str | None, loaded: Loaded) -> str:
    """DATA, or where it was not given what goes with the model."""
    return data or ("demo" if loaded.name == "demo" else "imagenet")
