"""Examples cannot drift: they run."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "ablation.py",
        "compare_chart.py",
        "data_speed.py",
        "families.py",
        "faults.py",
        "gpu.py",
        "kill_and_resume.py",
        "quantise_onnx.py",
        "train_demo_model.py",
        "train_loop.py",
    }


def _run(name, *arguments, cwd):
    command = [sys.executable, "-W", "error::UserWarning:vitprune", str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.slow
def test_own_training_loop_runs_and_saves(tmp_path):
    done = _run("train_loop.py", "--steps", "12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout.split("top-1 of the sparse model: ")[1].split(" %")[0])
    assert accuracy > 20, "chance is 10; with so few steps the predictors still rank poorly"
    assert (tmp_path / "runs" / "train_loop" / "model.safetensors").is_file()


@pytest.mark.slow
def test_ablation_tables_its_variants_and_reads_what_is_there(tmp_path):
    options = ["demo", "--variants", "warm-only,drop", "--output", "out"]
    quick = ["--limit", "20", "--warm-start-steps", "2", "--device", "cpu", "-b", "10", "--bench-seconds", "0.1"]
    done = _run("ablation.py", *options, "--", *quick, "--steps", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]] == ["warm-only", "drop"]
    reports = {
        name: json.loads((tmp_path / "out" / name / "report.json").read_text()) for name in ("warm-only", "drop")
    }
    assert [reports[name]["dropped"] for name in ("warm-only", "drop")] == ["fold", "drop"]
    again = _run("ablation.py", *options, cwd=tmp_path)
    assert again.stdout == done.stdout, "finished runs are read, not repeated"


def test_ablation_holds_out_training_images(tmp_path, image_folder):
    sys.path.insert(0, str(EXAMPLES))
    try:
        from ablation import hold_out
    finally:
        sys.path.remove(str(EXAMPLES))
    total = len(list((image_folder / "train").glob("*/*")))
    made = hold_out(image_folder, tmp_path / "split", 3)
    parts = {part: {path.resolve() for path in (made / part).glob("*/*")} for part in ("train", "val")}
    assert (len(parts["train"]), len(parts["val"])) == (total - 3, 3)
    assert not parts["train"] & parts["val"]
    assert all(path.parent.parent == (image_folder / "train").resolve() for path in parts["train"] | parts["val"])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_killed_runs_end_at_the_same_weights(tmp_path):
    quick = [
        "--limit",
        "40",
        "--warm-start-steps",
        "4",
        "--steps",
        "30",
        "-b",
        "8",
        "-j",
        "0",
        "--bench-seconds",
        "0.1",
    ]
    done = _run("kill_and_resume.py", "demo", "--kills", "1", "--every", "2", "--", *quick, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "weights identical" in done.stdout


@pytest.mark.slow
def test_data_comes_in_three_forms_and_memory_stays(tmp_path):
    done = _run("data_speed.py", "demo", "--count", "64", "-j", "0", "--with-model", "tar", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:4] for line in done.stdout.splitlines()[3:7]]
    assert [[form.strip(), what.strip()] for form, what, _ in rows] == [
        ["folder", "alone"],
        ["parquet", "alone"],
        ["tar", "alone"],
        ["tar", "with the model"],
    ]
    assert all(float(rate) > 0 for *_, rate in rows)
    after = [float(mib) for mib in done.stdout.splitlines()[-1].split(": ")[1].split(", ")]
    assert len(after) == 10
    assert after[-1] < after[1] + 50


@pytest.mark.slow
def test_faults_are_told_and_nothing_crashes(tmp_path):
    done = _run("faults.py", "demo", "--only", "a missing shard", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 3 shards are missing" in done.stdout
    assert "does not end as a tar file does" in done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "ablation.py",
        "compare_chart.py",
        "data_speed.py",
        "families.py",
        "faults.py",
        "gpu.py",
        "kill_and_resume.py",
        "quantise_onnx.py",
        "train_loop.py",
        "train_demo_model.py",
    ],
)
def test_examples_explain_themselves(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as done:  # in this process, which has loaded PyTorch
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert done.value.code == 0
    assert "python examples/" in capsys.readouterr().out


@pytest.mark.slow
def test_families_are_right_at_full_size(tmp_path):
    models = "vit_tiny_patch16_224,cait_xxs24_224"
    done = _run(
        "families.py", "--models", models, "--img-size", "96", "--batch-size", "1", "--seconds", "0.1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[2:]:
        _, _, _, exact, masked, *_ = line.split("|")
        assert float(exact) == 0
        assert float(masked) < 1e-3


@pytest.mark.slow
def test_int8_keeps_the_demos_answers_in_half_the_space(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from vitprune import attach, export_model
    from vitprune.export import open_program
    from vitprune.loading.load import load_model

    demo = load_model("demo")
    sparse = attach(demo.model, 0.8, stages=(6,), dropped="fold")
    made = export_model(sparse, tmp_path / "m.onnx", class_names=demo.class_names)
    quick = ["--data", "demo", "--limit", "40", "--calibrate", "16", "--seconds", "0.1"]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["quantise_onnx.py", str(tmp_path / "m.onnx"), *quick])
    importlib.import_module("quantise_onnx").main()
    exact, quantised = (line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:])
    assert (exact[0].strip(), quantised[0].strip()) == ("fp32", "int8")
    assert float(quantised[3].removesuffix(" % ")) > 90, "the same answer as in fp32"
    assert float(quantised[5]) < 0.6 * float(exact[5]), "MiB"
    program = open_program(tmp_path / "m-int8.onnx")
    assert program.precision == "int8"
    assert program.metadata == open_program(made.output).metadata


@pytest.mark.slow
def test_what_a_gpu_has_to_show_runs_anywhere_and_is_not_repeated(tmp_path):
    models = ["--models", "test_vit@64", "--right", "test_vit", "--device", "cpu", "--output", "out"]
    options = [*models, "--precision", "fp32", "--mode", "eager", "--batch-size", "1,2", "--seconds", "0.01"]
    done = _run("gpu.py", *options, "--no-training", cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    assert re.search(r"\| test_vit \| 0.0e\+00 \| 0 \| \d.\de-0\d \|", done.stdout)
    rows = re.findall(r"\| test_vit@64 \| fp32 \| eager \| (\d) \| [\d,]+ \| [\d,]+ \| (\d.\d\d) x", done.stdout)
    assert [batch for batch, _ in rows] == ["1", "2"]
    slower = [batch for batch, speedup in rows if float(speedup) < 1]
    for batch in slower:
        assert f"- test_vit@64, fp32, eager, batch {batch}: slower than dense" in done.stdout
    again = _run("gpu.py", *options, "--no-training", cwd=tmp_path)
    assert again.stdout == done.stdout, "what was measured is read, not measured again"


@pytest.mark.slow
def test_without_a_gpu_that_is_said(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU")
    done = _run("gpu.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: this PyTorch sees no CUDA GPU\n")


def _comparison(model, gmacs):
    rows = [
        {"method": "dense", "available": True, "gmacs": 1.25, "top1_pct": 75.0},
        {"method": "ours", "available": True, "gmacs": gmacs, "top1_pct": 74.0, "delta_points_ci95": [-2, 0.0]},
        {"method": "tome", "available": False},
    ]
    return {"model": model, "num_images": 100, "rows": rows}


@pytest.mark.slow
def test_a_chart_of_comparisons(tmp_path):
    for name, model, gmacs in (("a", "x", 0.8), ("b", "x", 0.6), ("c", "y", 0.6)):
        (tmp_path / f"{name}.json").write_text(json.dumps(_comparison(model, gmacs)))
    done = _run("compare_chart.py", "a.json", "b.json", "-o", "chart.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "written to chart.png\n"), done.stderr
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    done = _run("compare_chart.py", "a.json", "c.json", cwd=tmp_path)
    assert done.returncode == 1
    assert "of 2 models or sets of images" in done.stderr
