"""A sparse model without training and without images: the file alone."""

from __future__ import annotations

from typing import Any

from vitprune.checkpoint.sparse_file import describe, save
from vitprune.common.run_folder import RunFolder
from vitprune.jobs.sparsify import new_student, num_bytes
from vitprune.loading.load import Loaded
from vitprune.measure import describe_plan
from vitprune.model import SparseViT
from vitprune.schedule import Sparsity


def write_untrained(loaded: Loaded, sparsity: Sparsity, folder: RunFolder) -> tuple[SparseViT, dict[str, Any]]:
    """Write model.safetensors and config.json of a model that prunes by its own attention.

    Returns:
        The sparse model and, for JSON, its plan and cost; nothing of accuracy or speed, for nothing was measured.

    Raises:
        OutputError: the folder cannot be written.
        CheckpointError: a file could not be loaded again.
    """
    student = new_student(loaded.model, sparsity, 0, loaded.task).eval()
    metadata = describe(
        student, name=loaded.name, sparsity=sparsity, class_names=loaded.class_names, origin=loaded.origin
    )
    with folder.claimed(needed_bytes=2 * num_bytes(student)):
        folder.forget()
        save(student, folder.weights, metadata)
    return student, describe_plan(student, loaded.name) | {
        "measured": False,
        "output": str(folder),
    }
