"""vitprune bench."""

import json

import pytest

from vitprune.checkpoint.sparse_file import describe, save
from vitprune.cli.app import run

QUICK = ["--device", "cpu", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch):
    monkeypatch.setattr("vitprune.measure.runner.MIN_WARM_UP_S", 0.0)
    monkeypatch.setattr("vitprune.measure.runner.MAX_WARM_UP_S", 0.1)


@pytest.fixture
def sparse_file(make_sparse, tmp_path):
    sparse = make_sparse(num_classes=2, img_size=48)
    save(sparse, tmp_path / "model.safetensors", describe(sparse, class_names=("cat", "dog")))
    return tmp_path / "model.safetensors"


def test_rows_carry_units_and_marks(sparse_file, capsys):
    assert run(["bench", str(sparse_file), *QUICK, "-b", "1,2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = result["rows"]
    assert [(row["keep"], row["batch_size"]) for row in rows] == [(1.0, 1), (0.7, 1), (1.0, 2), (0.7, 2)]
    for row in rows:
        assert {"images_per_s", "latency_ms_p50", "gmacs", "macs_ratio", "peak_memory_mib", "efficiency"} <= set(row)
        assert row["slower"] == (row["speedup"] < 1)
        assert row["images_per_s"] == pytest.approx(1000 * row["batch_size"] / row["latency_ms_p50"])
    assert result["environment"]["num_threads"] >= 1


def test_floors_are_apart_from_models_one_can_use(sparse_file, capsys):
    assert run(["bench", str(sparse_file), *QUICK, "-b", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in result["rows"]] == ["dense", "sparse"]
    assert [(row["kind"], row["label"]) for row in result["floors"]] == [("floor", "floor of keep 0.7")]
    assert result["rows"][1]["overhead_over_floor_pct"] is not None
    assert run(["bench", str(sparse_file), *QUICK, "-b", "1", "--json", "--no-floor"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["floors"] == []
    assert result["rows"][1]["overhead_over_floor_pct"] is None


def test_the_check_looks_at_sparse_rows_only(sparse_file, monkeypatch, capsys):
    import vitprune.measure

    def with_speedups(*args, **kwargs):
        speedups = {"dense": 1.0, "keep 0.7": 1.4, "floor of keep 0.7": 0.1}
        return [row | {"speedup": speedups[row["label"]]} for row in real(*args, **kwargs)]

    real = vitprune.measure.side_by_side
    monkeypatch.setattr(vitprune.measure, "side_by_side", with_speedups)
    command = ["bench", str(sparse_file), *QUICK, "-b", "1", "--min-speedup"]
    assert run([*command, "1.3"]) == 0
    assert run([*command, "1.5"]) == 3
    assert "--min-speedup: missed, measured 1.400" in capsys.readouterr().err


def test_several_keep_ratios(capsys, no_hub):
    assert run(["bench", "test_vit", "--keep", "0.9,0.5", "-b", "1", *QUICK, "--min-speedup", "1000"]) == 3
    out, err = capsys.readouterr()
    assert "0.9" in out
    assert "0.5" in out
    assert "(floor): no model to use" in out
    assert "--min-speedup: missed" in err
