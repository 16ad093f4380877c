"""The options of MODEL: its weights, how it is built and how its images are prepared."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from vitprune.cli.options import option, parse_ratios
from vitprune.cli.output import say
from vitprune.errors import UsageError

if TYPE_CHECKING:
    from vitprune.loading.load import Loaded

_of_model = partial(option, panel="Model")
_of_images = partial(option, panel="Preprocessing")
_with_checkpoint = partial(_of_images, shown="timm's")


class ImageSize(NamedTuple):
    """Height and width of the model's input, in pixels."""

    height: int
    width: int


def _image_size(text: str) -> ImageSize:
    found = re.fullmatch(r"(\d+)(?:[x,](\d+))?", text)
    if not found or int(found[1]) < 1 or int(found[2] or 1) < 1:
        raise typer.BadParameter(f"'{text}' is no image size: give pixels, such as 384, or height and width: 256x320")
    return ImageSize(int(found[1]), int(found[2] or found[1]))


def _colours(text: str | None, option: str) -> tuple[float, ...] | None:
    numbers = parse_ratios(text, option, ".485,.456,.406")
    if numbers is not None and (len(numbers) not in (1, 3) or (option == "--std" and min(numbers) <= 0)):
        what = "three numbers above 0" if option == "--std" else "three numbers"
        raise UsageError(f"{option} is '{text}', expected {what}, one a colour, such as .5,.5,.5")
    return None if numbers is None else tuple(numbers)


def parse_model_kwargs(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`["fc_norm=False"]` to {"fc_norm": False}: values are Python's, or text, and each name is there once."""
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

    img_size: Annotated[
        ImageSize | None, _of_images("Another image size: 384, or 256x320.", parser=_image_size, metavar="SIZE")
    ] = None
    model_kwargs: Annotated[
        list[str] | None,
        _of_model(
            "Arguments for timm.create_model, such as global_pool=avg; may be repeated.",
            metavar="KEY=VALUE",
            shown=False,
        ),
    ] = None
    task: Annotated[
        Literal["auto", "classification", "multilabel", "regression", "embedding", "dense"],
        _of_model(
            "What MODEL is for: classification, multilabel, regression, embedding or dense (token features).",
            metavar="TASK",
            shown="what its weights say",
        ),
    ] = "auto"

    def arguments(self) -> dict[str, Any]:
        """What they are to `vitprune.loading.load.load_model`."""
        kwargs = parse_model_kwargs(self.model_kwargs)
        return {"img_size": self.img_size, "model_kwargs": kwargs, "task": self.task}

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
        option("Own weights for a timm name: .safetensors, .pth, .npz, an index of shards.", metavar="FILE"),
    ] = None
    checkpoint_key: Annotated[
        str | None,
        _of_model("Which of several sets of weights in it, such as state_dict.", metavar="NAME", shown="the EMA"),
    ] = None
    mean: Annotated[
        str | None,
        _with_checkpoint("Images are normalised by it, such as .485,.456,.406. With --checkpoint.", metavar="R,G,B"),
    ] = None
    std: Annotated[
        str | None, _with_checkpoint("Likewise, such as .229,.224,.225. With --checkpoint.", metavar="R,G,B")
    ] = None
    crop_pct: Annotated[
        float | None,
        _with_checkpoint(
            "Of the resized image that is evaluated, such as 0.9. With --checkpoint.", metavar="SHARE", min=0.1, max=10
        ),
    ] = None
    interpolation: Annotated[
        Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"] | None,
        _with_checkpoint(
            "How images are resized: bicubic, bilinear, nearest, lanczos, box or hamming. With --checkpoint.",
            metavar="FILTER",
        ),
    ] = None
    class_embeddings: Annotated[
        Path | None,
        _of_model(
            "Vectors of the classes by a text tower (.safetensors), for zero-shot figures of an embedding.",
            metavar="FILE",
            shown=False,
        ),
    ] = None
    exif: Annotated[bool, _of_images("Turn images by their EXIF orientation; timm does not.", "--exif")] = False

    def arguments(self) -> dict[str, Any]:
        """As in StructureOptions."""
        weights = {"checkpoint": self.checkpoint, "checkpoint_key": self.checkpoint_key}
        return {**super().arguments(), **weights, "preprocessing": self.preprocessing()}

    def load(self, model: str, **more: Any) -> Loaded:
        """As in StructureOptions, with the vectors of --class-embeddings."""
        loaded = super().load(model, **more)
        if self.class_embeddings is not None:
            from vitprune.loading.loaded import add_class_vectors

            add_class_vectors(loaded, self.class_embeddings)
        return loaded

    def refuse_class_embeddings(self, command: str) -> None:
        """Refuse --class-embeddings of a command that measures nothing."""
        if self.class_embeddings is not None:
            way = "leave it out; `vitprune eval` and `compare` take it"
            raise UsageError(f"--class-embeddings is for zero-shot figures, and `vitprune {command}` gives none", way)

    def load_apart(self, model: str) -> Loaded:
        """As `load`; of a file that has weights of its own --checkpoint is that of the dense model it was made from."""
        from vitprune.loading.load import sparse_file

        has_weights = sparse_file(model) is not None or model.startswith("hf-hub:")
        return self.load(model, **({"checkpoint": None, "checkpoint_key": None} if has_weights else {}))

    def dense_of(self, sparse: Loaded) -> Loaded:
        """The dense model that a sparse file was made from, from --checkpoint or by its name; tells as `load`."""
        from vitprune.loading.load import load_dense

        return told(load_dense(sparse, self.checkpoint, self.checkpoint_key))

    def preprocessing(self) -> dict[str, Any]:
        """What replaces timm's preprocessing, if there is something to replace."""
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
        return given | ({"exif": True} if self.exif else {})
