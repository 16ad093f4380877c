"""What a model is for: classification, multilabel, regression, embedding or dense features."""

from vitprune.model import TaskName
from vitprune.tasks.base import Change, Figure, Record, Results, Task, joined
from vitprune.tasks.class_vectors import ClassVectors, read_class_vectors
from vitprune.tasks.classification import Classification, Predictions, class_accuracy
from vitprune.tasks.dense import Dense
from vitprune.tasks.embedding import Embedding, Embeddings
from vitprune.tasks.multilabel import MultiLabel
from vitprune.tasks.regression import Regression

TASKS: dict[str, Task] = {
    task.name: task for task in (Classification(), MultiLabel(), Regression(), Embedding(), Dense())
}
"""By name."""


def task_named(name: TaskName, classes: ClassVectors | None = None) -> Task:
    """The task of that name, for embeddings with vectors of the classes where there are some."""
    return Embedding(classes) if classes is not None and name == "embedding" else TASKS[name]


__all__ = [
    "TASKS",
    "Change",
    "ClassVectors",
    "Embedding",
    "Embeddings",
    "Figure",
    "Predictions",
    "Record",
    "Results",
    "Task",
    "TaskName",
    "class_accuracy",
    "joined",
    "read_class_vectors",
    "task_named",
]
