"""Options and first steps that the commands share which train: `sparsify` and `sweep`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from vitprune.cli.model_options import ModelOptions
from vitprune.cli.options import PrecisionName, RecipeName, Seed, option, parse_numbers
from vitprune.cli.output import say, waiting
from vitprune.common import distributed
from vitprune.errors import UsageError

if TYPE_CHECKING:
    import torch

    from vitprune.data import Data, DataOptions, Images
    from vitprune.loading.load import Loaded
    from vitprune.training.recipe import Recipe

of_training = partial(option, panel="Training")
_setting = partial(of_training, metavar="N")
"""An option that replaces a setting of the recipe; `shown` is that of the short one."""

Settings = Annotated[
    list[str] | None,
    of_training(
        "Any setting of the recipe, such as lr=2e-3 or weights.ce=1; may be repeated.",
        "--set",
        metavar="KEY=VALUE",
        shown=False,
    ),
]
Overwrite = Annotated[bool, option("Write into an --output that exists.", "--overwrite")]


@dataclass(frozen=True)
class RecipeOptions:
    """The recipe, and what replaces its settings."""

    recipe: RecipeName = None
    precision: Annotated[
        PrecisionName,
        option("auto, fp32, bf16 or fp16 for training; auto: 16 bits where they are fast.", metavar="NAME"),
    ] = "auto"
    batch_size: Annotated[
        str | None,
        option("Images per step; auto: fits them into memory.", "--batch-size", "-b", metavar="N|auto", shown="32"),
    ] = None
    workers: Annotated[
        int | None, _setting("Processes that read images.", "--workers", "-j", shown="half the CPUs, at most 8", min=0)
    ] = None
    seed: Seed = None
    grad_accum: Annotated[
        int | None,
        _setting(
            "Passes that share a step's images: less memory, the same result but for rounding.",
            "--grad-accum-steps",
            shown="1",
            min=1,
        ),
    ] = None
    no_labels: Annotated[bool, option("Train without labels, on any folder.", "--no-labels")] = False
    pretraining_steps: Annotated[int | None, _setting("Steps of predictor pretraining.", shown="200", min=0)] = None
    steps: Annotated[int | None, _setting("Steps after pretraining; for a range 600.", shown="300", min=0)] = None
    epochs: Annotated[
        float | None, _setting("The same as --steps, in passes over the images.", shown="by --steps", min=0)
    ] = None
    changes: Settings = None

    def chosen(self, model: str, task: str, *, ranged: bool, **more: Any) -> Recipe:
        """As `chosen_recipe` has it: of --task "dense" it is one of its own, and `more` are further settings."""
        settings = {
            **batch_settings(self.batch_size, self.grad_accum),
            "num_workers": self.workers,
            "pretraining_steps": self.pretraining_steps,
            "steps": self.steps,
            "epochs": self.epochs,
            "seed": self.seed,
            "precision": None if self.precision == "auto" else self.precision,
            "labels": False if self.no_labels else None,
            **more,
        }
        from vitprune.training.recipe import default_recipe

        return chosen_recipe(model, self.recipe or default_recipe(task), settings, self.changes, ranged=ranged)


def untrained(recipe: Recipe) -> Recipe:
    """A recipe that does not train, with the batches and workers of another."""
    from vitprune.training.recipe import load_recipe

    return load_recipe("none", batch_size=recipe.batch_size, num_workers=recipe.num_workers)


@dataclass(frozen=True)
class RunOptions:
    """How a run is kept and timed."""

    checkpoint_every: Annotated[
        int | None,
        of_training("Steps between two training checkpoints.", min=1, metavar="STEPS", shown="about every two minutes"),
    ] = None
    eval_precision: Annotated[
        Literal["fp32", "bf16", "fp16"], of_training("Precision of accuracy and speed in the report.")
    ] = "fp32"
    bench_batch_sizes: Annotated[str, of_training("Batch sizes that the report times.", metavar="N,N")] = "1,32"
    bench_seconds: Annotated[
        float | None,
        of_training("How long the report times each model at each batch size.", min=0, metavar="S", shown="2"),
    ] = None

    def timing(self, device: torch.device) -> dict[str, Any]:
        """How the report is measured, for the settings of a run."""
        from vitprune.common.devices import pick_precision

        sizes = parse_numbers(self.bench_batch_sizes, "--bench-batch-sizes") or []
        return {
            "eval_precision": pick_precision(self.eval_precision, device, training=False),
            "bench_batch_sizes": tuple(sorted(set(sizes))),
            "bench_seconds": self.bench_seconds,
        }


def batch_settings(batch_size: str | None, grad_accum: int | None) -> dict[str, Any]:
    """Settings of the recipe, which may not contradict each other."""
    if batch_size == "auto":
        if grad_accum is not None:
            raise UsageError("--batch-size auto finds out how many passes are needed", "leave out --grad-accum-steps")
        return {"grad_accum": "auto"}
    if batch_size is None:
        return {"grad_accum": grad_accum}
    if not batch_size.isdecimal() or int(batch_size) < 1:
        raise UsageError(f"--batch-size is '{batch_size}', expected a whole number above 0, or auto")
    return {"batch_size": int(batch_size), "grad_accum": grad_accum}


def parse_settings(changes: Sequence[str] | None) -> dict[str, str]:
    """`["lr=2e-3"]` to {"lr": "2e-3"}; a UsageError names an entry without `=`."""
    pairs = [change.partition("=") for change in changes or ()]
    for key, equals, _ in pairs:
        if not equals or not key:
            raise UsageError(f"--set is '{key}', expected KEY=VALUE", "for example --set lr=2e-3")
    return {key.strip(): value for key, _, value in pairs}


def chosen_recipe(
    model: str, name: str, settings: Mapping[str, Any], changes: Sequence[str] | None, *, ranged: bool = False
) -> Recipe:
    """The recipe `name` with what replaces its settings: `settings` but for None, then `changes`, which are --set.

    The demo model trains for fewer steps, and what is `ranged`, for a range of keep ratios, for more.

    Raises:
        UsageError: a setting out of range, or one that would do nothing.
    """
    from vitprune.training.recipe import load_recipe, usual

    given = {key: value for key, value in settings.items() if value is not None}
    changed = parse_settings(changes)
    recipe = load_recipe(name, **usual(name, model, given, ranged=ranged)).with_settings(changed)
    if "weights.ratio" in changed and recipe.deployed_share == 1:
        raise UsageError(
            f"--set weights.ratio does nothing in recipe '{name}': no step samples its decisions",
            "leave it out, or sample in some steps: --set deployed_share=0.5, or --recipe paper",
        )
    if "weights.ce" in changed and recipe.weights.ce and not recipe.labels:
        raise UsageError("--set weights.ce needs the labels that --no-labels leaves out", "give one of them")
    return recipe


def training_device(device: str, recipe: Recipe) -> Any:
    """The device that --device names, which must be there and train in the recipe's precision."""
    from vitprune.common.devices import pick_device, pick_precision

    where = pick_device(device)
    distributed.start(where)
    pick_precision(recipe.precision, where, training=True)
    return where


def load_dense_model(model: str, weights: ModelOptions) -> Loaded:
    """The model to start from, which must not be sparse already."""
    loaded = weights.load(model)
    if loaded.sparse is not None:
        raise UsageError(
            f"'{model}' is sparse already", "start from the dense model: a timm name, with --checkpoint FILE if need be"
        )
    return loaded


def training_images(loaded: Loaded, data: str, options: DataOptions, recipe: Recipe, plans: str, device: Any) -> Data:
    """Open the images to train and evaluate on, and say what is about to run; `plans` is what the model is to keep.

    Raises:
        DataError: there are none, or they do not fit the model.
        HubError: they cannot be had from the Hub.
    """
    from vitprune.data import open_data

    with waiting("opening the images"):
        gallery = loaded.task == "embedding"
        images = open_data(data, loaded.targets, options, training=recipe.trains, labels=recipe.labels, gallery=gallery)
    trained = f"{_counted(images.train)} to train on" if recipe.trains else "no training"
    say(f"{loaded.name}, {plans}, on {device}: {trained}, {_counted(images.val)} to evaluate on")
    for line in images.understood:
        say(line)
    return images


def _counted(images: Images | None) -> str:
    from vitprune.data import count_images

    return "a stream of images" if (count := count_images(images)) is None else f"{count} images"
