"""The benchmark: fair, complete, and clear when it fails; rows beside dense and the zero-overhead bound."""

import time

import pytest
import torch
from torch import nn

from vitprune.common.progress import Listener
from vitprune.errors import UsageError, VitpruneError
from vitprune.measure import benchmark, count_macs, count_params, runner
from vitprune.measure.bound import BenchModel, ZeroOverheadViT, side_by_side, with_bounds
from vitprune.model import attach

SIZE, VIT_SIZE = (3, 8, 8), (3, 32, 32)
HERE = {"device": torch.device("cpu"), "precision": "fp32"}
QUICK = {**HERE, "rounds": 2, "min_seconds": 0.001}


@pytest.fixture
def dense(make_vit):
    return make_vit(img_size=32, patch_size=8)


class Sleeper(nn.Module):
    """Takes at least `seconds`, and tells `seen` of its call."""

    def __init__(self, seconds, seen=lambda _: None):
        super().__init__()
        self.seconds, self.seen = seconds, seen

    def forward(self, images):
        self.seen(images)
        time.sleep(self.seconds)
        return images


class Counter(Listener):
    """Adds up what it hears."""

    done = 0

    def advance(self, count=1):
        self.done += count


def test_every_model_and_batch_size_gets_a_row(dense):
    models, heard = {"dense": dense, "sparse": attach(dense, 0.6)}, Counter()
    rows = benchmark(models, VIT_SIZE, [1, 4], **HERE, rounds=2, min_seconds=0.02, listener=heard)
    assert heard.done == len(rows)
    assert [(row.batch_size, row.model) for row in rows] == [(1, "dense"), (1, "sparse"), (4, "dense"), (4, "sparse")]
    for row in rows:
        assert 0 < row.latency_ms_p25 <= row.latency_ms_p50 <= row.latency_ms_p75
        assert row.images_per_s == pytest.approx(1e3 * row.batch_size / row.latency_ms_p50)
        assert 0 < row.single_pass_ms_p50 <= row.single_pass_ms_p90 <= row.single_pass_ms_p99
        assert row.peak_memory_mib is None, "only CUDA tells"
        assert row.num_single_passes == row.num_runs >= 2, "on the CPU every pass is timed by itself"
        assert row.mode == "eager"
    assert [len(row.rounds_ms) for row in rows] == [2] * len(rows)


def test_order_alternates_from_round_to_round(monkeypatch):
    order, time_block = [], runner.Runner.time_block

    def spy(one):
        order.append(one.name)
        return time_block(one)

    monkeypatch.setattr(runner.Runner, "time_block", spy)
    benchmark({name: nn.Flatten() for name in "abc"}, SIZE, [1], **HERE, rounds=4, min_seconds=0.01)
    assert "".join(order) == "abc" + "cba" + "abc" + "cba"


def test_models_are_not_changed_and_share_the_copy_of_a_shared_backbone():
    shared, seen = nn.Linear(4, 4), {}

    class Tail(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.backbone, self.name = shared, name

        def forward(self, images):
            seen[self.name] = self.backbone.weight.data_ptr()
            return images

    models = {name: Tail(name).train() for name in "ab"}
    benchmark(models, SIZE, [1], **{**QUICK, "precision": "bf16"})
    assert seen["a"] == seen["b"] != shared.weight.data_ptr()
    assert shared.weight.dtype == torch.float32, "the models themselves are left as they are"
    assert all(model.training for model in models.values())


def test_all_models_see_the_same_images_in_the_precision_asked_for():
    seen = {"a": [], "b": []}
    models = {name: Sleeper(0, images.append) for name, images in seen.items()}
    for model in models.values():
        model.__deepcopy__ = lambda memo, model=model: model  # a real copy would record into a copied list
    benchmark(models, SIZE, [3], **{**QUICK, "precision": "bf16"})
    first = seen["a"][0]
    assert (first.shape, first.dtype) == ((3, *SIZE), torch.bfloat16)
    assert all(torch.equal(first, images) for images in seen["a"] + seen["b"])


def test_slow_models_stop_after_a_whole_pair_of_rounds():
    models = {"a": Sleeper(0.01), "b": Sleeper(0.01)}
    rows = benchmark(models, SIZE, [1], **HERE, rounds=100, min_seconds=0.01, max_seconds=0.03)
    assert {row.num_runs for row in rows} <= {2, 4}


def test_out_of_memory_names_the_batch_size():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ):

        def fail_at_8(images, error=error):
            if len(images) == 8:
                raise error

        heard = Counter()
        with pytest.raises(VitpruneError, match="out of memory while timing batch size 8 on cpu") as caught:
            benchmark({"model": Sleeper(0, fail_at_8)}, SIZE, [1, 8], **QUICK, listener=heard)
        assert "--batch-size" in caught.value.hint
        assert heard.done == 1
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        benchmark({"model": nn.Linear(5, 5)}, SIZE, [1], **QUICK)


def test_nothing_to_time_is_refused():
    model = {"model": nn.Flatten()}
    for models, sizes, rounds, message in (
        ({}, [1], 2, r"0 model\(s\)"),
        (model, [], 2, r"0 batch size\(s\)"),
        (model, [4, 0], 2, "batch size is 0"),
        (model, [1], 1, "number of rounds is 1"),
    ):
        with pytest.raises(UsageError, match=message):
            benchmark(models, SIZE, sizes, **HERE, rounds=rounds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_peak_memory_is_that_of_the_model_alone():
    def peak(*names):
        models = {name: nn.Linear(2048, 2048) for name in names}
        return benchmark(models, (1, 1, 2048), [4], device=torch.device("cuda"), precision="fp32")[0].peak_memory_mib

    assert peak("a") >= 16
    assert peak("a", "b", "c") == pytest.approx(peak("a"), rel=0.05)


# Side by side


@pytest.fixture
def variants(dense):
    return {"dense": BenchModel("dense", 1.0, dense), "keep 0.6": BenchModel("sparse", 0.6, attach(dense, 0.6))}


def test_only_sparse_models_have_bounds_and_they_follow_them(variants, dense):
    variants["keep 1"] = BenchModel("sparse", 1.0, attach(dense, 1.0))
    variants["other"] = BenchModel("sparse", None, nn.Flatten())
    models = with_bounds(variants)
    assert list(models) == ["dense", "keep 0.6", "bound of keep 0.6", "keep 1", "other"]
    bound, sparse = models["bound of keep 0.6"], models["keep 0.6"].model
    assert (bound.kind, bound.bound_of) == ("bound", "keep 0.6")
    assert isinstance(bound.model, ZeroOverheadViT)
    assert bound.model.schedule == sparse.schedule
    assert count_macs(bound.model, VIT_SIZE) < count_macs(sparse, VIT_SIZE)
    assert count_params(bound.model) == count_params(sparse.model)


def test_rows_compare_within_their_batch_size(variants):
    rows = side_by_side("tiny", with_bounds(variants), VIT_SIZE, [1, 2], ["eager"], **QUICK)
    labels = ["dense", "keep 0.6", "bound of keep 0.6"]
    assert [(row["batch_size"], row["label"]) for row in rows] == [(b, label) for b in (1, 2) for label in labels]
    for dense, sparse, bound in (rows[:3], rows[3:]):
        assert sparse["speedup"] == pytest.approx(sparse["images_per_s"] / dense["images_per_s"])
        assert sparse["efficiency"] == pytest.approx(sparse["speedup"] / sparse["macs_ratio"])
        slowdown = sparse["latency_ms_p50"] / bound["latency_ms_p50"]
        assert sparse["overhead_over_bound_pct"] == pytest.approx(100 * (slowdown - 1))
        assert dense["overhead_over_bound_pct"] is bound["overhead_over_bound_pct"] is None
        assert [row["kind"] for row in (dense, sparse, bound)] == ["dense", "sparse", "bound"]
        assert sparse["macs_ratio"] == pytest.approx(dense["gmacs"] / sparse["gmacs"])
        assert dense["speedup"] == dense["efficiency"] == 1
