"""One small model and its ONNX file: exporting takes seconds."""

from types import SimpleNamespace

import pytest

from vitprune.checkpoint.sparse_file import describe, save
from vitprune.export import export
from vitprune.model import SparseViT


@pytest.fixture(scope="session")
def exported(make_sparse, tmp_path_factory):
    """A sparse model of two classes with one stage: `sparse`, `metadata`, `onnx`, and both files in `folder`."""
    folder, tiny = tmp_path_factory.mktemp("exported"), {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64}
    plain = make_sparse("vit_tiny_patch16_224", keep=0.5, prune_at=(1,), num_classes=2, **tiny)
    sparse = SparseViT(plain.model, plain.schedule, plain.predictors, "merge", balance=0.1, beta=1.0).eval()
    metadata = describe(sparse, name="mine", class_names=("cat", "dog"), origin={"license": "mit"})
    save(sparse, folder / "model.safetensors", metadata)
    onnx = export(sparse, metadata, folder / "model.onnx", "onnx")
    return SimpleNamespace(sparse=sparse, metadata=metadata, folder=folder, onnx=onnx)
