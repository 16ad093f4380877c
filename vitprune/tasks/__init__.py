"""What a model is for: classification, multilabel, regression, embedding or dense features."""

from vitprune.model import TaskName
from vitprune.tasks.base import Answer, Change, Figure, NamedClass, Record, Results, Spread, Task, in_words, joined
from vitprune.tasks.class_vectors import ClassVectors, read_class_vectors
from vitprune.tasks.classification import Classification, Predictions, class_accuracy, likeliest, on_rare_classes
from vitprune.tasks.dense import Dense
from vitprune.tasks.embedding import Embedding, Embeddings
from vitprune.tasks.multilabel import MultiLabel
from vitprune.tasks.regression import Regression

TASKS: dict[str, Task] = {
    task.name: task for task in (Classification(), MultiLabel(), Regression(), Embedding(), Dense())
}
"""By name."""


def zero_shot_task() -> Task:
    """Embedding with the figures that vectors of the classes give, for results that were measured with some."""
    return Embedding(zero_shot=True)


def task_named(name: TaskName, classes: ClassVectors | None = None) -> Task:
    """The task of that name, for embeddings with vectors of the classes where there are some."""
    return Embedding(classes) if classes is not None and name == "embedding" else TASKS[name]


__all__ = [
    "TASKS",
    "Answer",
    "Change",
    "ClassVectors",
    "Embedding",
    "Embeddings",
    "Figure",
    "NamedClass",
    "Predictions",
    "Record",
    "Results",
    "Spread",
    "Task",
    "TaskName",
    "class_accuracy",
    "in_words",
    "joined",
    "likeliest",
    "on_rare_classes",
    "read_class_vectors",
    "task_named",
    "zero_shot_task",
]
