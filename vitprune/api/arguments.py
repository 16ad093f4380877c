"""What the functions take as model, data and recipe, and how they show progress."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import nn
from torch.utils.data import DataLoader, Dataset

from vitprune.adaptive import AdaptiveViT
from vitprune.cli.progress import RunProgress
from vitprune.common.wrappers import unwrapped
from vitprune.data import Data, DataOptions, open_data, open_torch
from vitprune.errors import UsageError, in_python
from vitprune.loading.load import Loaded, load_model, loaded_from
from vitprune.loading.loaded import add_class_vectors
from vitprune.loading.task import AskedTask as AskedTask
from vitprune.model import SparseViT
from vitprune.training.recipe import Recipe, load_recipe

P = ParamSpec("P")
R = TypeVar("R")

Model = nn.Module | str | Path
"""A timm model, a SparseViT or an AdaptiveViT; or what the commands take as MODEL: a timm name, a file, a run folder,
"demo"."""

Images = str | Path | Dataset[Any] | DataLoader[Any]
"""What the commands take as DATA (a folder, "imagenet", "hf:owner/name", "demo"), a torch Dataset or a DataLoader.

A Dataset gives an image, or (image, label), by index; labels are output indices of the model, and optional where
accuracy is not asked for. PIL images get the transform that the model's weights want, in training with random crops
and flips; tensors (C, H, W) are taken as they are. Of a DataLoader the dataset, batch size and number of workers are
used.
"""


class ProgressShown(RunProgress):
    """Shows how a job goes, or nothing of it."""

    def __init__(self, shown: bool) -> None:
        super().__init__()
        if not shown:
            self.console.quiet = True
            self.live = False

    def say(self, sentence: str) -> None:
        """A line of its own, in the words of Python."""
        super().say(in_python(sentence))


def keeps_mode(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, after which the model it is given trains or evaluates as before: loops of one's own go on."""

    @functools.wraps(function)
    def restoring(*args: P.args, **kwargs: P.kwargs) -> R:
        given = args[0] if args else next(iter(kwargs.values()), None)
        models = given.values() if isinstance(given, Mapping) else [given]
        modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
        before = [(module, module.training) for module in modules]
        try:
            return function(*args, **kwargs)
        finally:
            for module, mode in before:
                module.training = mode

    return restoring


def chosen_recipe(recipe: Recipe | str, settings: Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, str):
        return load_recipe(recipe, **settings)
    return load_recipe("short", **(recipe.model_dump() | dict(settings))) if settings else recipe


def loader_settings(data: Any) -> dict[str, Any]:
    """What a DataLoader says of how to read."""
    if not isinstance(data, DataLoader) or data.batch_size is None:
        return {}
    return {"batch_size": data.batch_size, "num_workers": data.num_workers}


def known(
    model: Model,
    checkpoint: str | Path | None = None,
    img_size: int | tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    *,
    checkpoint_key: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    task: AskedTask = "auto",
    class_embeddings: str | Path | None = None,
    progress: bool = True,
) -> Loaded:
    """What is known of a model; one that the caller made is unwrapped and, unless it is sparse, copied.

    Of an AdaptiveViT it is what is known of its first pass, see `subject_of`.

    What was understood of its weights is shown with the progress.
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    if isinstance(model, AdaptiveViT):
        model = model.models[0]
    if isinstance(model, (str, Path)):
        loaded = load_model(
            str(model),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            checkpoint_key=checkpoint_key,
            img_size=img_size,
            model_kwargs=model_kwargs,
            task=task,
        )
    elif any(each is not None for each in (checkpoint, checkpoint_key, img_size, model_kwargs)):
        raise UsageError(
            "--checkpoint, --checkpoint-key, --img-size and --model-kwargs go with the name of a model, "
            "not with one that is built"
        )
    elif isinstance(model, SparseViT):
        own = task in ("auto", model.task)
        loaded = loaded_from(model.model, model.class_names, task=model.task if own else task, said=own)
        loaded.sparse = model
        if model.header:
            loaded.name, loaded.origin = model.header.metadata.model, model.header.metadata.origin
    else:
        loaded = loaded_from(copy.deepcopy(model), class_names, task=task)  # training moves and freezes the teacher
    loaded.class_names = tuple(class_names) if class_names else loaded.class_names
    if class_embeddings is not None:
        add_class_vectors(loaded, Path(class_embeddings))
    for line in loaded.understood if progress else ():
        ProgressShown(progress).say(line)
    return loaded


def subject_of(model: Model, loaded: Loaded) -> tuple[str, nn.Module]:
    """What runs of a model that `known` knows, and its kind: "adaptive", "sparse" or "dense"."""
    if isinstance(model, nn.Module) and isinstance(adaptive := unwrapped(model), AdaptiveViT):
        return "adaptive", adaptive
    return ("dense", loaded.model) if loaded.sparse is None else ("sparse", loaded.sparse)


def opened(
    data: Images,
    loaded: Loaded,
    val: Dataset[Any] | DataLoader[Any] | None,
    limit: int | None,
    *,
    training: bool,
    labels: bool,
) -> Data:
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}, expected at least 1")
    classes = loaded.targets
    if not isinstance(data, (str, Path)):
        images = open_torch(data, val, classes, training=training, labels=labels)
        if limit is not None:
            images.train, images.val = images.train and images.train.sample(limit), images.val.sample(limit)
        return images
    if val is not None:
        raise UsageError("val_data goes with a Dataset or a DataLoader", "a folder has its own: a val folder in it")
    gallery = loaded.task == "embedding"
    return open_data(str(data), classes, DataOptions(limit=limit), training=training, labels=labels, gallery=gallery)
