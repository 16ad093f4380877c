"""A model that has been loaded, and what is known of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.checkpoint.metadata import Metadata
from vitprune.common.formatting import writable
from vitprune.data import ModelClasses
from vitprune.errors import UsageError
from vitprune.loading.task import AskedTask, embedding_width, gives_embedding, leave_out_head, task_of
from vitprune.model import SparseViT, TaskName
from vitprune.tasks import ClassVectors, read_class_vectors, task_named


@dataclass
class Loaded:
    """A model and what is known of it.

    Attributes:
        spec: the MODEL argument.
        name: full timm name, with the tag of its weights where there is one.
        model: the timm model; of one of our files, its backbone, fine-tuned for pruned tokens; of an ONNX file, the
            program in it.
        sparse: the sparse model of one of our files, else None.
        class_names: in output order, where known.
        origin: where the weights come from and under which licence.
        metadata: header of one of our files, or what it would be.
        understood: what was made of the weights, a line each: which of several sets, what was converted or resampled.
        task: what the model is for.
        class_vectors: of a text tower, for zero-shot figures of an embedding.
    """

    spec: str
    name: str
    model: nn.Module
    sparse: SparseViT | None = None
    class_names: tuple[str, ...] | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    metadata: Metadata | None = None
    understood: list[str] = field(default_factory=list)
    task: TaskName = "classification"
    class_vectors: ClassVectors | None = None

    @property
    def keep(self) -> float | None:
        """The keep ratio; of a dense model 1, None where shares were chosen freely."""
        return 1.0 if self.metadata is None else self.metadata.keep

    def open_at(self, keep: float | None) -> None:
        """Set the keep ratio of a model that was trained for a range; None leaves the one it has.

        Raises:
            UsageError: it was not, or not for that ratio.
        """
        if keep is None or keep == self.keep:
            return
        if self.sparse is None or self.metadata is None:
            what = "a dense model" if self.metadata is None else "an exported file, which has one keep ratio"
            raise UsageError(
                f"'{self.spec}' is {what}, and --keep {keep:g} is asked for",
                "--keep goes with files that `vitprune sparsify --keep 0.5-0.9` wrote",
            )
        self.sparse.keep = keep
        self.metadata = self.metadata.at(keep, self.sparse.schedule.stages)

    @property
    def targets(self) -> ModelClasses | None:
        """What the labels of its images are; None where its task has none."""
        task = task_named(self.task, self.class_vectors)
        if task.targets is None:
            return None
        if self.class_vectors is not None:
            names = self.class_vectors.names
            return ModelClasses(len(names), names, source="the class embeddings")
        count = 0 if task.targets == "group" else getattr(self.model, "num_classes", 0)
        return ModelClasses(count, self.class_names, kind=task.targets)

    @property
    def short_name(self) -> str:
        """A name fit for a folder."""
        return "demo" if self.spec == "demo" else re.sub(r"[^A-Za-z0-9_.-]+", "_", self.name.partition(".")[0])


def loaded_from(
    model: nn.Module, class_names: Sequence[str] | None = None, *, task: AskedTask = "auto", said: bool = False
) -> Loaded:
    """What is known of a timm model that the caller has made; its head is left as it is.

    If the model itself has `said` what it is for, an embedding may come out of any head.

    Raises:
        UsageError: the task does not go with it, see `task_of`; or an embedding is asked of a classifier.
    """
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    architecture, tag = config.get("architecture") or type(model).__name__, config.get("tag")
    name = f"{architecture}.{tag}" if tag else architecture
    loaded = as_loaded(name, name, model, {})
    loaded.class_names = names_of(class_names) or loaded.class_names
    named = loaded.class_names is not None
    if task == "embedding" and not said and not gives_embedding(model, named=named):
        raise UsageError("--task embedding: the model has a classifier", "leave it out: model.reset_classifier(0)")
    loaded.task, why = task_of(model, task, named=named)
    loaded.understood += [why] if why else []
    return loaded


def as_loaded(spec: str, name: str, model: nn.Module, origin: dict[str, Any], understood: Sequence[str] = ()) -> Loaded:
    """A timm model with what its configuration says of it; `origin` wins over that."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    labels = config.get("label_names")
    about = {
        "source": config.get("hf_hub_id") or name,
        "license": config.get("license"),
        "origin_url": config.get("origin_url"),
    }
    names = names_of(labels) if labels and len(labels) == getattr(model, "num_classes", 0) else None
    about |= {key: writable(value) if isinstance(value, str) else value for key, value in origin.items()}
    model = model.eval()
    return Loaded(spec, writable(name), model, class_names=names, origin=about, understood=list(understood))


def find_task(loaded: Loaded, asked: AskedTask, *, headless: bool) -> None:
    """Say what a dense model is for; one that is to give an embedding loses its classifier, not its projection.

    If `headless`, any head is left out.

    Raises:
        UsageError: the task does not go with the model, see `task_of`.
    """
    named = loaded.class_names is not None
    left_out: list[str] = []
    if headless or (asked == "embedding" and not gives_embedding(loaded.model, named=named)):
        left_out = without_head(loaded)
    loaded.task, said = task_of(loaded.model, asked, named=named, what=f"'{loaded.spec}'")
    loaded.understood += [said] if said and not left_out else []


def without_head(loaded: Loaded) -> list[str]:
    """Take the head away, if there is one; what that was, as `loaded.understood` then says too."""
    said = leave_out_head(loaded.model)
    loaded.class_names = None
    loaded.understood += said
    return said


def add_class_vectors(loaded: Loaded, path: Path) -> None:
    """Let a model's classes be known by vectors of a text tower, see `read_class_vectors`.

    Raises:
        UsageError: the model is for another task than embedding.
        DataError: the file cannot be read, or does not fit the model.
    """
    if loaded.task != "embedding":
        raise UsageError(f"--class-embeddings goes with --task embedding, and {loaded.name} is for {loaded.task}")
    width = getattr(loaded.model, "num_classes", 0) or embedding_width(loaded.model)
    loaded.class_vectors = read_class_vectors(path, width)


def names_of(names: Any) -> tuple[str, ...] | None:
    """Class names as texts."""
    return None if names is None else tuple(str(name) for name in names)
