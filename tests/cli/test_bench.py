"""vitprune bench."""

import json

import pytest

from vitprune.checkpoint.sparse_file import describe, save
from vitprune.cli.app import run
from vitprune.measure import Timing


@pytest.fixture(scope="module")
def sparse_file(make_sparse, tmp_path_factory):
    sparse, path = make_sparse(num_classes=2, img_size=48), tmp_path_factory.mktemp("bench") / "model.safetensors"
    save(sparse, path, describe(sparse, class_names=("cat", "dog")))
    return str(path)


@pytest.fixture
def untimed(monkeypatch):
    """Sparse models are 1.4 times as fast as dense, their bounds twice."""

    def benchmark(models, input_size, batch_sizes, *, mode, **settings):
        ms = {name: 0.5 if "bound" in name else 1 / 1.4 if "keep" in name else 1.0 for name in models}
        return [
            Timing(name, size, *[ms[name]] * 3, 1e3 * size / ms[name], None, 1, *[ms[name]] * 3, mode=mode)
            for size in batch_sizes
            for name in models
        ]

    monkeypatch.setattr("vitprune.measure.bound.benchmark", benchmark)


def test_rows_carry_units_and_marks_and_bounds_are_apart_from_models_one_can_use(sparse_file, capsys):
    assert run(["bench", sparse_file, "--device", "cpu", "--seconds", "0.01", "-b", "1,2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows, bounds = result["rows"], result["bounds"]
    assert [(row["keep"], row["batch_size"]) for row in rows] == [(1.0, 1), (0.7, 1), (1.0, 2), (0.7, 2)]
    for row in rows:
        assert {"images_per_s", "latency_ms_p50", "gmacs", "macs_ratio", "peak_memory_mib", "efficiency"} <= set(row)
        low, high = row["speedup_ci95"]
        assert low <= row["speedup"] <= high
        assert row["slower"] == (high < 1)
        assert row["images_per_s"] == pytest.approx(1000 * row["batch_size"] / row["latency_ms_p50"])
    assert result["environment"]["num_threads"] >= 1
    assert [row["kind"] for row in rows] == ["dense", "sparse"] * 2
    assert {(row["kind"], row["label"]) for row in bounds} == {("bound", "bound of keep 0.7")}
    assert rows[1]["overhead_over_bound_pct"] is not None


def test_without_bounds_and_the_check_looks_at_sparse_rows_only(sparse_file, untimed, capsys):
    command = ["bench", sparse_file, "--device", "cpu", "-b", "1", "--json"]
    assert run([*command, "--min-speedup", "1.3"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["overhead_over_bound_pct"] == pytest.approx(
        100 * (2 / 1.4 - 1)
    )
    assert run([*command, "--no-bound", "--min-speedup", "1.5"]) == 3
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["bounds"] == []
    assert result["rows"][1]["overhead_over_bound_pct"] is None
    assert "--min-speedup: missed, measured 1.400" in err


def test_several_keep_ratios_and_modes_as_tables(untimed, capsys, no_hub, monkeypatch):
    monkeypatch.setattr("vitprune.measure.bound.count_macs", lambda model, size: 10**9)
    command = ["bench", "test_vit", "--keep", "0.9,0.5", "-b", "1,2", "--device", "cpu", "--mode", "eager,compile"]
    assert run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[1] for line in lines if line.startswith("test_vit.")] == ["eager", "compile"]
    for label, times in (("dense", 8), ("keep 0.9", 8), ("keep 0.5", 8), ("(bound)", 16)):
        assert sum(line.startswith(f"{label}  ") for line in lines) == times
    assert any(line.startswith("(bound): no model to use") for line in lines)
