"""What a model is for, as its checkpoint says: what `--task auto` finds, and what is wrong with another task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, get_args

import timm
from torch import nn

from vitprune.backbones import why_not, wrap
from vitprune.errors import UsageError
from vitprune.model import TaskName
from vitprune.tasks import TASKS

AskedTask = TaskName | Literal["auto"]

PROBLEM_TYPES: dict[str, TaskName] = {task.problem_type: task.name for task in TASKS.values() if task.problem_type}
"""transformers' `problem_type`, which `vitprune export` writes into timm's config.json too."""
TASK_KEY = "task"
"""Entry of a model's `pretrained_cfg`: what its folder says of its outputs; timm's own have none."""
_SPOKEN = {
    "multilabel": "problem_type in its config.json is 'multi_label_classification'",
    "regression": "problem_type in its config.json is 'regression'",
}
_IMAGE_TOWER = re.compile(r"clip|pe_core")
"""In timm's names of image towers that were trained beside a text tower; SigLIP's have no projection."""
_FINE_TUNED = "_ft_"
"""In the tags of those that were given a classifier."""
_OF_OUTPUTS = ("classification", "multilabel", "regression")


def check_task(asked: str) -> None:
    """Make sure that a task is one; a UsageError names them."""
    if asked not in (known := ("auto", *get_args(TaskName))):
        raise UsageError(f"--task '{asked}' is no task", f"one of {', '.join(known)}")


def task_of(
    model: nn.Module, asked: AskedTask = "auto", *, named: bool = False, what: str = "the model"
) -> tuple[TaskName, str | None]:
    """What a timm model is for.

    Args:
        model: one whose head has been left out, where that was asked for.
        asked: "auto" for what the checkpoint says: a task in its folder's config.json; no outputs, or the projection of
            a CLIP image tower, are an embedding; else classification.
        named: whether its outputs have class names, so that they are no projection.
        what: to call it in errors.

    Returns:
        The task and, where "auto" found another than classification, a line that says why.

    Raises:
        UsageError: it has one output, and `asked` does not say of what; or `asked` does not go with its outputs.
    """
    check_task(asked)
    outputs, said = num_outputs(model), _config(model).get(TASK_KEY)
    if asked != "auto":
        _check_fits(asked, outputs, said, what)
        return asked, None
    if outputs == 0:
        return "embedding", f"task: embedding of {embedding_width(model)} numbers (the model has no classifier)"
    if gives_embedding(model, named=named):
        return "embedding", f"task: embedding of {outputs} numbers (the projection of a CLIP image tower)"
    if outputs == 1 and said in (None, "classification"):
        raise _one_output(what, "which classes cannot be read from")
    if said in _SPOKEN:
        what_of = f"{outputs} {'label' if said == 'multilabel' else 'value'}{'' if outputs == 1 else 's'}"
        return said, f"task: {said} of {what_of} ({_SPOKEN[said]})"
    return "classification", None


def gives_embedding(model: nn.Module, *, named: bool = False) -> bool:
    """Whether a model's outputs are an embedding: it has no head, or one that projects; `named` as in `task_of`."""
    said = _config(model).get(TASK_KEY)
    return num_outputs(model) == 0 or said == "embedding" or (said is None and not named and is_projection(model))


def check_same_task(asked: AskedTask, task: TaskName, what: str) -> None:
    """Make sure that a file that says its task is not asked for another; a UsageError names both."""
    check_task(asked)
    if asked not in ("auto", task):
        raise UsageError(
            f"--task {asked} does not go with '{what}', which was made for {task}",
            f"leave out --task, or make it again from the dense model with --task {asked}",
        )


def num_outputs(model: nn.Module) -> int | None:
    """How many numbers a model's head gives, 0 without one; None of a module that does not say."""
    if why_not(model) is None:
        return wrap(model).num_classes
    outputs = getattr(model, "num_classes", None)
    return outputs if isinstance(outputs, int) else None


def embedding_width(model: nn.Module) -> int:
    """How many numbers a timm model gives that has no head."""
    width: int = model.num_features  # type: ignore[assignment]
    return width


def is_projection(model: nn.Module) -> bool:
    """Whether a model's head, as wide as one that timm has weights of, projects into the space of a text tower.

    timm's configurations do not tell the width of an embedding from a number of classes; its names do.
    """
    architecture = str(_config(model).get("architecture") or "")
    return bool(architecture) and num_outputs(model) in _projections(architecture)


def tasks_of_weights(architecture: str) -> dict[TaskName, list[str]]:
    """The tags of timm's weights for an architecture, by the task that "auto" finds for them; builds nothing."""
    found: dict[TaskName, list[str]] = {}
    for name in timm.list_pretrained(f"{architecture}.*"):
        outputs = getattr(timm.get_pretrained_cfg(name), "num_classes", None)
        embeds = outputs == 0 or outputs in _projections(architecture)
        found.setdefault("embedding" if embeds else "classification", []).append(name.partition(".")[2])
    return found


@cache
def _projections(architecture: str) -> frozenset[int]:
    """How wide the projections are that timm has weights of, for an architecture."""
    if not timm.is_model(architecture):
        return frozenset()
    names = [name for name in timm.list_pretrained(f"{architecture}.*") if _IMAGE_TOWER.search(name)]
    configs = [timm.get_pretrained_cfg(name) for name in names if _FINE_TUNED not in name]
    return frozenset(config.num_classes for config in configs if config is not None and config.num_classes)


def leave_out_head(model: Any) -> list[str]:
    """Take a timm model's head away, so that it gives what that read; a line on what it was, none where it had none."""
    outputs = num_outputs(model)
    if not outputs:
        return []
    projects = is_projection(model) or _config(model).get(TASK_KEY) == "embedding"
    what = f"the projection to {outputs} numbers" if projects else f"the classifier of {outputs} classes"
    model.reset_classifier(0)
    return [f"{what} is left out, which leaves an embedding of {embedding_width(model)} numbers"]


def with_head(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for timm.create_model without a class count of 0: weights are loaded whole, and the head left out then.

    timm would drop the tensors of a head by itself, and be silent about others that do not fit.
    """
    return {key: value for key, value in arguments.items() if (key, value) != ("num_classes", 0)}


def _check_fits(asked: TaskName, outputs: int | None, said: TaskName | None, what: str) -> None:
    if asked not in _OF_OUTPUTS:
        return
    if outputs == 0:
        raise UsageError(
            f"--task {asked} needs outputs, and {what} has none: it gives an embedding",
            "say --task embedding or --task dense, or give weights with a classifier: --checkpoint FILE",
        )
    if said is not None and said != asked:
        raise UsageError(
            f"--task {asked} does not go with {what}, whose config.json says {said}",
            f"leave it out, or say --task {said}",
        )
    if outputs == 1 and asked == "classification":
        raise _one_output(what, "whose softmax is always 1")


def _one_output(what: str, why: str) -> UsageError:
    return UsageError(
        f"{what} has one output, {why}",
        "say what it is: --task regression for a value, --task multilabel for a label that is there or not",
    )


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}
