"""The benchmark: fair, complete, and clear when it fails."""

import time
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from vitprune.errors import UsageError, VitpruneError
from vitprune.measure import Timing, benchmark, runner, speedup
from vitprune.model import attach

CPU = torch.device("cpu")
SIZE = (3, 8, 8)


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MIN_WARM_UP_S", 0.0)
    monkeypatch.setattr(runner, "MAX_WARM_UP_S", 0.1)


class Sleeper(nn.Module):
    """Takes at least `seconds`, and tells `seen` of its call."""

    def __init__(self, seconds: float, seen: Callable[[Tensor], object] = lambda _: None) -> None:
        super().__init__()
        self.seconds = seconds
        self.seen = seen

    def forward(self, images: Tensor) -> Tensor:
        self.seen(images)
        time.sleep(self.seconds)
        return images


def test_every_model_and_batch_size_gets_a_row_as_soon_as_it_is_done() -> None:
    dense = timm.create_model("test_vit", img_size=32, patch_size=8)
    sparse = attach(timm.create_model("test_vit", img_size=32, patch_size=8), 0.5)
    reported: list[Timing] = []
    rows = benchmark(
        {"dense": dense, "sparse": sparse},
        (3, 32, 32),
        [1, 4],
        device=CPU,
        precision="fp32",
        rounds=2,
        min_seconds=0.02,
        on_row=reported.append,
    )
    assert reported == rows
    assert [(row.batch_size, row.model) for row in rows] == [(1, "dense"), (1, "sparse"), (4, "dense"), (4, "sparse")]
    for row in rows:
        assert 0 < row.latency_ms_p25 <= row.latency_ms_p50 <= row.latency_ms_p75
        assert row.images_per_s == pytest.approx(1e3 * row.batch_size / row.latency_ms_p50)
        assert 0 < row.single_pass_ms_p50 <= row.single_pass_ms_p90 <= row.single_pass_ms_p99
        assert row.peak_memory_mib > 1
        assert row.num_single_passes == row.num_runs >= 2, "on the CPU every pass is timed by itself"
        assert (row.mode, row.attention, row.loader_images_per_s) == ("eager", "fused", None)


def test_order_alternates_from_round_to_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    time_block = runner.Runner.time_block

    def spy(one: runner.Runner) -> float:
        order.append(one.name)
        return time_block(one)

    monkeypatch.setattr(runner.Runner, "time_block", spy)
    models = {name: nn.Flatten() for name in "abc"}
    benchmark(models, SIZE, [1], device=CPU, precision="fp32", rounds=4, min_seconds=0.01)
    assert "".join(order) == "abc" + "cba" + "abc" + "cba"


def test_a_slower_model_is_marked() -> None:
    models = {"dense": Sleeper(0.001), "sparse": Sleeper(0.02)}
    rows = benchmark(models, SIZE, [1, 2], device=CPU, precision="fp32", rounds=2, min_seconds=0.05)
    result = speedup(rows, baseline="dense")
    assert [(entry.batch_size, entry.model, entry.slower) for entry in result] == [
        (1, "dense", False),
        (1, "sparse", True),
        (2, "dense", False),
        (2, "sparse", True),
    ]
    assert result[0].ratio == 1
    assert result[1].ratio < 0.5


def test_models_that_share_a_backbone_share_its_copy() -> None:
    shared, seen = nn.Linear(4, 4), {}

    class Tail(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.backbone, self.name = shared, name

        def forward(self, images: Tensor) -> Tensor:
            seen[self.name] = self.backbone.weight.data_ptr()
            return images

    models = {name: Tail(name) for name in "ab"}
    benchmark(models, SIZE, [1], device=CPU, precision="bf16", rounds=2, min_seconds=0.001)
    assert seen["a"] == seen["b"] != shared.weight.data_ptr()
    assert shared.weight.dtype == torch.float32, "the models themselves are left as they are"


def test_all_models_see_the_same_images_in_the_precision_asked_for() -> None:
    seen: dict[str, list[Tensor]] = {"a": [], "b": []}
    models = {name: Sleeper(0, images.append) for name, images in seen.items()}
    for model in models.values():
        model.__deepcopy__ = lambda memo, model=model: model  # a real copy would record into a copied list
    benchmark(models, SIZE, [3], device=CPU, precision="bf16", rounds=2, min_seconds=0.001)
    first = seen["a"][0]
    assert first.shape == (3, *SIZE)
    assert first.dtype == torch.bfloat16
    assert all(torch.equal(first, images) for images in seen["a"] + seen["b"])


def test_given_models_are_not_changed() -> None:
    model = attach(timm.create_model("test_vit", img_size=32, patch_size=8), 0.5).train()
    benchmark({"sparse": model}, (3, 32, 32), [2], device=CPU, precision="bf16", rounds=2, min_seconds=0.001)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(module.training for module in model.modules())


def test_slow_models_stop_after_a_whole_pair_of_rounds() -> None:
    models = {"a": Sleeper(0.01), "b": Sleeper(0.01)}
    rows = benchmark(models, SIZE, [1], device=CPU, precision="fp32", rounds=100, min_seconds=0.01, max_seconds=0.03)
    assert {row.num_runs for row in rows} <= {2, 4}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_batch_size_and_keeps_earlier_rows(error: Exception) -> None:
    def fail_at_8(images: Tensor) -> None:
        if len(images) == 8:
            raise error

    rows: list[Timing] = []
    with pytest.raises(VitpruneError, match="out of memory while timing batch size 8 on cpu") as caught:
        benchmark(
            {"model": Sleeper(0, fail_at_8)},
            SIZE,
            [1, 8],
            device=CPU,
            precision="fp32",
            rounds=2,
            min_seconds=0.001,
            on_row=rows.append,
        )
    assert "--batch-size" in (caught.value.hint or "")
    assert [row.batch_size for row in rows] == [1]


def test_other_errors_of_a_model_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        benchmark({"model": nn.Linear(5, 5)}, SIZE, [1], device=CPU, precision="fp32")


def test_nothing_to_time_is_refused() -> None:
    model = {"model": nn.Flatten()}
    with pytest.raises(UsageError, match=r"0 model\(s\)"):
        benchmark({}, SIZE, [1], device=CPU, precision="fp32")
    with pytest.raises(UsageError, match=r"0 batch size\(s\)"):
        benchmark(model, SIZE, [], device=CPU, precision="fp32")
    with pytest.raises(UsageError, match="batch size is 0"):
        benchmark(model, SIZE, [4, 0], device=CPU, precision="fp32")
    with pytest.raises(UsageError, match="number of rounds is 1"):
        benchmark(model, SIZE, [1], device=CPU, precision="fp32", rounds=1)


def test_speedup_without_the_baseline_is_refused() -> None:
    row = Timing("sparse", 32, 1.0, 1.0, 1.0, 32e3, None, 10)
    with pytest.raises(UsageError, match="'dense' has no timing at batch size 32"):
        speedup([row], baseline="dense")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_peak_memory_is_that_of_the_model_alone() -> None:
    def peak(*names: str) -> float | None:
        models = {name: nn.Linear(2048, 2048) for name in names}
        device = torch.device("cuda")
        return benchmark(models, (1, 1, 2048), [4], device=device, precision="fp32")[0].peak_memory_mib

    alone = peak("a")
    assert alone is not None
    assert alone >= 16
    assert peak("a", "b", "c") == pytest.approx(alone, rel=0.05)
