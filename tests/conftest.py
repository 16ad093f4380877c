"""Small models with weights under which dropping tokens changes the answer."""

import gc
import os
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of processes that tests start: two tests run at a time

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from vitprune.backbones import input_size
from vitprune.measure import benchmark
from vitprune.model import SparseViT, attach_as
from vitprune.schedule import Sparsity


def pytest_collection_finish():
    """What was imported is never garbage: looking for some takes half a second every time a run ends."""
    gc.freeze()


torch.set_num_threads(1)  # tiny tensors: a second thread costs time, on a busy machine most of it


@pytest.fixture(scope="session", autouse=True)
def any_processor():
    """Training on the CPU picks fp32, whether or not this one has bf16 in hardware."""
    with pytest.MonkeyPatch.context() as patch:
        for query in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            patch.setattr(torch.cpu, query, lambda: False, raising=False)
        yield


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw all weights: timm's initial ones (LayerScale 1e-5, tokens 1e-6, std .02) make blocks near-identities."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_token = name.endswith(("pos_embed", "_token", "latent"))
            if is_token or parameter.ndim == 0:
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif name.endswith(("weight", "gamma")):  # norms and LayerScale
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return module


def _make_vit(name="test_vit", seed=0, **kwargs):
    return randomise(timm.create_model(name, **kwargs), seed).eval()


def _make_sparse(name="test_vit", keep=0.7, prune_at=None, seed=0, **kwargs) -> SparseViT:
    sparse = attach_as(_make_vit(name, seed, **kwargs), Sparsity.as_published(keep, prune_at))
    randomise(sparse.predictors, seed + 1)
    return sparse.eval()


def _make_images(model, count=2, seed=0, size=None):
    """Normal noise of the size the model (dense or sparse) was built for."""
    dense = getattr(model, "model", model)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, dense.in_chans, *(size or input_size(dense)[1:]), generator=generator)
    return images.to(next(model.parameters()).dtype)


@pytest.fixture(scope="session")
def make_vit():
    """`make_vit(name="test_vit", seed=0, **timm_kwargs)`: a timm model in eval mode with lively weights."""
    return _make_vit


@pytest.fixture(scope="session")
def make_sparse():
    """`make_sparse(name, keep, prune_at, seed, **timm_kwargs)`: the paper's SparseViT, predictors lively."""
    return _make_sparse


@pytest.fixture(scope="session")
def make_images():
    """`make_images(model, count=2, seed=0, size=None)`: a batch that fits the model."""
    return _make_images


def _make_image_folder(root):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 128, (48, 64, 3), generator=generator) + 120 * label
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def make_image_folder():
    """`make_image_folder(root)`: see `image_folder`."""
    return _make_image_folder


@pytest.fixture
def image_folder(tmp_path):
    """A data set of two classes with 12 training and 6 validation images in train/ and val/."""
    return _make_image_folder(tmp_path / "images")


@pytest.fixture
def weights_file(make_vit, tmp_path):
    """Weights of a `test_vit` with two classes, as a plain safetensors file."""
    path = tmp_path / "weights.safetensors"
    save_file(make_vit(num_classes=2).state_dict(), path)
    return path


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A machine that cannot reach the Hugging Face Hub and has nothing cached; no test waits for the network."""
    import huggingface_hub
    from huggingface_hub import constants

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests neither read nor write the cache of who runs them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitprune.loading.architectures.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_bench():
    """Nobody reads the speeds that tests measure: no warm-up, and runs time each model twice, on two images at most."""

    def timed(models, input_size, batch_sizes, **settings):
        settings |= {"rounds": 2, "min_seconds": 0.001}
        for asked in batch_sizes:
            for timing in benchmark(models, input_size, [min(asked, 2)], **settings):
                yield replace(timing, batch_size=asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitprune.jobs.side_by_side.benchmark", lambda *args, **settings: [*timed(*args, **settings)])
        patch.setattr("vitprune.jobs.side_by_side.BENCH_SECONDS", 0.001)  # of a target, which times by itself
        patch.setattr("vitprune.measure.runner.MAX_WARM_UP_S", 0.0)
        yield
