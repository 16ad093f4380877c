"""Eager, compiled, captured: the same answers, and clear words where it cannot be."""

import pytest
import torch
from torch import nn

from vitprune.errors import DeviceError, UsageError, VitpruneError
from vitprune.measure import benchmark, check_mode, modes
from vitprune.measure.modes import prepare

CPU = torch.device("cpu")


def test_graphs_need_cuda_and_names_must_be_known():
    assert [check_mode(name, CPU) for name in ("eager", "compile")] == ["eager", "compile"]
    with pytest.raises(DeviceError, match="'cudagraphs' needs an NVIDIA GPU, not device 'cpu'") as caught:
        check_mode("cudagraphs", CPU)
    assert "--mode eager" in caught.value.hint
    with pytest.raises(UsageError, match="mode 'jit' is unknown"):
        check_mode("jit", CPU)


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile without a compiler: traces the whole pass, and runs it op by op."""
    real = torch.compile
    monkeypatch.setattr(modes.torch, "compile", lambda model, **options: real(model, backend="eager", **options))
    yield
    torch.compiler.reset()


@pytest.mark.slow
def test_a_compiled_pass_is_the_eager_one(make_sparse, make_images, quick_compile):
    sparse = make_sparse(img_size=48, prune_at=[2])
    images = make_images(sparse)
    with torch.inference_mode():
        torch.testing.assert_close(prepare(sparse, images, "compile")(), sparse(images), rtol=0, atol=1e-5)


class Adds(nn.Module):
    """One class, many instances, each compiled for itself."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, images):
        return images + self.number


@pytest.mark.slow
def test_more_models_of_one_class_than_pytorch_keeps_by_default(quick_compile):
    images = torch.zeros(2)
    passes = [prepare(Adds(number), images, "compile") for number in range(20)]
    assert [forward()[0].item() for forward in passes] == list(range(20))


@pytest.mark.slow
def test_every_batch_size_is_compiled(make_vit, quick_compile):
    quick = {"device": CPU, "precision": "fp32", "rounds": 2, "min_seconds": 0.001}
    rows = benchmark({"model": make_vit(img_size=32)}, (3, 32, 32), [1, 2], mode="compile", **quick)
    assert [(row.mode, row.batch_size) for row in rows] == [("compile", 1), ("compile", 2)]


class Breaks(nn.Module):
    """Needs a value of a tensor in Python, which no whole graph can hold."""

    def forward(self, images):
        return images + 1 if images.sum().item() > 0 else images


@pytest.mark.slow
def test_what_does_not_compile_is_named_with_a_way_out(quick_compile):
    with pytest.raises(VitpruneError, match=r"torch\.compile of a Breaks failed") as caught:
        prepare(Breaks(), torch.ones(2), "compile")
    assert "--mode eager" in caught.value.hint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_is_the_eager_pass(make_sparse, make_images):
    sparse = make_sparse(img_size=96).cuda()
    images = make_images(sparse).cuda()
    with torch.inference_mode():
        replay = prepare(sparse, images, "cudagraphs")
        images.copy_(make_images(sparse, seed=1))
        torch.testing.assert_close(replay(), sparse(images), rtol=0, atol=1e-4)
