"""A sparse model compiles whole, serves every batch size with one graph, and answers as it does op by op."""

import shutil

import pytest
import torch
from agreement import calm_attention
from torch._inductor.exc import InvalidCxxCompiler

import vitprune
from vitprune.model import SparseViT

pytestmark = pytest.mark.slow

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64, "prune_at": [1]}
KINDS = {
    "positions in the tokens": {"name": "vit_tiny_patch16_224", **TINY},
    "rotary positions": {"name": "vit_small_patch16_dinov3", **TINY, "num_classes": 7},
    "a bias for every pair": {"name": "beit_base_patch16_224", **TINY},
    "class attention": {"name": "cait_xxs24_224", **TINY},
}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("kind", "pruned"), [("positions in the tokens", "drop"), *((kind, "merge") for kind in KINDS)]
)
def test_one_whole_graph_serves_all_batch_sizes(make_sparse, make_images, kind, pruned):
    plain = make_sparse(**KINDS[kind])
    calm_attention(plain.model)
    sparse = SparseViT(plain.model, plain.schedule, plain.predictors, pruned, 0.1, 1.0).eval()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(sparse, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for batch_size in (2, 5):
            images = make_images(sparse, batch_size)
            torch.testing.assert_close(compiled(images), sparse(images), rtol=0, atol=1e-5)
    assert len(graphs) == 1


def test_a_loaded_model_is_compiled_once_for_one_image_and_once_for_several(
    make_sparse, make_images, monkeypatch, tmp_path
):
    plain = make_sparse(**KINDS["positions in the tokens"])
    images, real, graphs = make_images(plain, 5), torch.compile, []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **settings: real(model, backend=count, **settings))
    sparse = vitprune.load(vitprune.save(plain, tmp_path / "model.safetensors"), compile=True)
    assert type(sparse) is SparseViT
    graphs.clear()  # of the look for a compiler
    with torch.no_grad():
        expected = plain(images)
        for batch_size in (1, 2, 5, 3, 1):
            torch.testing.assert_close(sparse(images[:batch_size]), expected[:batch_size], rtol=0, atol=1e-5)
        assert len(graphs) == 2
        torch.testing.assert_close(sparse.select(images).logits, expected, rtol=0, atol=1e-5)


def test_the_training_pass_compiles_whole_too(make_sparse, make_images):
    sparse = make_sparse(**KINDS["positions in the tokens"])
    sparse.pruned, sparse.balance, sparse.beta = "merge", 0.1, 1.0
    images = make_images(sparse)
    compiled = torch.compile(sparse.forward_masked, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, sparse.forward_masked(images).logits, rtol=0, atol=1e-5)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_code_answers_as_the_model_does(make_sparse, make_images):
    sparse = make_sparse(**KINDS["positions in the tokens"])
    sparse.pruned, sparse.balance, sparse.beta = "merge", 0.1, 1.0
    images = make_images(sparse, 3)
    with torch.no_grad():
        expected = sparse(images)
        try:
            answer = torch.compile(sparse, fullgraph=True)(images)
        except InvalidCxxCompiler as error:
            pytest.skip(f"the C++ compiler does not work: {error}")
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-4)
