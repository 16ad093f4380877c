"""The comparison: floors, ratios of ratios, modes apart."""

import pytest
import torch

from vitprune.measure import Contestant, FloorViT, ImageSource, check_source, count_macs, side_by_side
from vitprune.measure.sidebyside import with_floors
from vitprune.model import attach

SIZE = (3, 32, 32)
QUICK = {"device": torch.device("cpu"), "precision": "fp32", "rounds": 2, "min_seconds": 0.001}


@pytest.fixture
def contestants(make_vit):
    model = make_vit(img_size=32, patch_size=8)
    return {"dense": Contestant("dense", 1.0, model), "keep 0.5": Contestant("sparse", 0.5, attach(model, 0.5))}


def test_only_sparse_models_have_floors_and_they_follow_them(contestants, make_vit):
    contestants["keep 1"] = Contestant("sparse", 1.0, attach(make_vit(img_size=32), 1.0))
    contestants["other"] = Contestant("sparse", None, torch.nn.Flatten())
    floors = with_floors(contestants)
    assert list(floors) == ["dense", "keep 0.5", "floor of keep 0.5", "keep 1", "other"]
    floor = floors["floor of keep 0.5"]
    assert (floor.kind, floor.floor_of) == ("floor", "keep 0.5")
    assert isinstance(floor.model, FloorViT)


def test_a_floor_costs_less_than_its_model_and_has_its_counts(contestants):
    sparse = contestants["keep 0.5"].model
    floor = FloorViT(sparse)
    assert floor.schedule == sparse.schedule
    assert count_macs(floor, SIZE) < count_macs(sparse, SIZE)
    assert sum(p.numel() for p in floor.parameters()) == sum(p.numel() for p in sparse.model.parameters())


def test_rows_compare_within_their_batch_size(contestants):
    rows = side_by_side("tiny", with_floors(contestants), SIZE, [1, 2], ["eager"], **QUICK)
    labels = ["dense", "keep 0.5", "floor of keep 0.5"]
    assert [(row["batch_size"], row["label"]) for row in rows] == [(b, label) for b in (1, 2) for label in labels]
    for dense, sparse, floor in (rows[:3], rows[3:]):
        assert sparse["speedup"] == pytest.approx(sparse["images_per_s"] / dense["images_per_s"])
        assert sparse["efficiency"] == pytest.approx(sparse["speedup"] / sparse["macs_ratio"])
        slowdown = sparse["latency_ms_p50"] / floor["latency_ms_p50"]
        assert sparse["overhead_over_floor_pct"] == pytest.approx(100 * (slowdown - 1))
        assert dense["overhead_over_floor_pct"] is floor["overhead_over_floor_pct"] is None
        assert [row["kind"] for row in (dense, sparse, floor)] == ["dense", "sparse", "floor"]
        assert sparse["macs_ratio"] == pytest.approx(dense["gmacs"] / sparse["gmacs"])
        assert dense["speedup"] == dense["efficiency"] == 1


def test_throughput_with_reading_beside_that_without(contestants, image_folder):
    from vitprune.data import eval_transform, open_data

    images = open_data(str(image_folder), None, labels=False).val  # 6 images
    images.transform = eval_transform(contestants["dense"].model)
    source = ImageSource(images, num_workers=0, seconds=0.05)
    check_source(source, [4])
    rows = side_by_side("tiny", contestants, SIZE, [4], ["eager"], source=source, **QUICK)
    for row in rows:
        assert 0 < row["loader_images_per_s"] < row["images_per_s"]
