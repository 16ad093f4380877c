"""Examples cannot drift: they run."""

import http.client
import io
import json
import os
import re
import runpy
import subprocess
import sys
import threading
import time
from contextlib import closing, redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
import uvicorn
from PIL import Image
from python_calls import check_calls
from safetensors.torch import load_file, save_file

import vitprune
from vitprune.cli.app import run
from vitprune.loading.load import load_model
from vitprune.training.recipe import load_recipe

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
QUICK = ["--device", "cpu", "-b", "4", "-j", "0", "--bench-seconds", "0"]
UNTRIED = {"train_demo_model.py"}  # a quarter of an hour


@pytest.fixture
def example(tmp_path, monkeypatch, capfd):
    """`example(name, *arguments, codes=(0,))`: what an example prints, run in `tmp_path`; PyTorch is loaded here."""

    def execute(name, *arguments, codes=(0,)):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, arguments)])
        capfd.readouterr()
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as done:
            code = done.code or 0
        out, err = capfd.readouterr()
        if isinstance(code, str):  # as Python does
            code, err = 1, f"{code}\n"
        assert code in codes, out + err
        return out or err

    return execute


@pytest.fixture
def shallow(make_vit, tmp_path):
    """Options that give a `test_vit` of two classes half of its blocks, and weights."""
    save_file(make_vit(num_classes=2, depth=3).state_dict(), tmp_path / "weights.safetensors")
    return ["--checkpoint", tmp_path / "weights.safetensors", "--model-kwargs", "depth=3"]


@pytest.fixture
def in_this_process(monkeypatch):
    """What an example starts, a command of vitprune or itself once more, runs here too."""

    def start(command, check=False, **_):
        out, err, code = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(out), redirect_stderr(err), monkeypatch.context() as patch:
            if command[1:3] == ["-m", "vitprune"]:
                code = run([*map(str, command[3:])])
            else:
                patch.setattr(sys, "argv", command[1:])
                runpy.run_path(command[1], run_name="__main__")
        assert not (check and code), err.getvalue()
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    monkeypatch.setattr(subprocess, "run", start)


def _cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_every_example_is_tested():
    assert NAMES
    assert set(NAMES) > UNTRIED
    source = Path(__file__).read_text()
    assert [name for name in NAMES if f'"{name}"' not in source] == []


@pytest.mark.parametrize("name", NAMES)
def test_examples_explain_themselves(name, example):
    assert "python examples/" in example(name, "--help")


def test_the_table_of_architectures_is_written(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    for more in ([], ["--costs-only"]):
        monkeypatch.setattr(sys, "argv", ["", "--only", "test_[rv]*t", "--output", str(file), *more])
        runpy.run_path(str(EXAMPLES / "describe_architectures.py"), run_name="__main__")
        rows = {name: reason for name, _, reason, *_ in json.loads(file.read_text())["rows"]}
        assert rows == {"test_resnet": 0, "test_vit": None}


def _notebook():
    return json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))


def _code():
    """The notebook's code, a text for each cell; lines that only a notebook understands are left out."""
    cells = (cell["source"] for cell in _notebook()["cells"] if cell["cell_type"] == "code")
    return ["".join(line for line in cell if not line.startswith(("%", "!"))) for cell in cells]


def test_the_notebook_is_valid_without_outputs_and_calls_what_there_is():
    notebook = _notebook()
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["language"]) == (4, "python")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
            assert (cell["execution_count"], cell["outputs"]) == (None, [])
        assert set(cell) == keys
        assert cell["cell_type"] in ("code", "markdown")
    called = check_calls("\n".join(_code()))
    assert called == {"sparsify", "predict", "visualize", "save", "load", "export_model"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs_and_shows_its_report(tmp_path, monkeypatch, capsys):
    shown = []
    display = ModuleType("IPython.display")  # no kernel runs here
    display.IFrame = display.Image = lambda name, *args, **kwargs: shown.append(Path(name))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in _code():
        exec(cell, names)
    report, picture = shown
    assert "<html" in report.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "my-images/0.png" in out
    assert float(out.splitlines()[-1].split()[0]) < 1e-3, "the exported file computes the same"


@pytest.mark.slow
def test_own_training_loop_runs_and_saves(example, tmp_path):
    out = example("train_loop.py", "--steps", "6")
    accuracy = float(out.split("top-1 of the sparse model: ")[1].split(" %")[0])
    assert accuracy > 20, "chance is 10; with so few steps the predictors still rank poorly"
    assert (tmp_path / "runs" / "train_loop" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_ablation_tables_its_variants_and_reads_what_is_there(example, tmp_path, image_folder, shallow):
    options = ["test_vit", "--data", image_folder, "--variants", "pretraining-only,drop", "--output", "out"]
    quick = [*shallow, *QUICK, "--pretraining-steps", "2", "--steps", "1"]
    out = example("ablation.py", *options, "--", *quick)
    assert [_cells(line)[0] for line in out.splitlines()[2:]] == ["pretraining-only", "drop"]
    for name, pruned in (("pretraining-only", "merge"), ("drop", "drop")):
        assert json.loads((tmp_path / "out" / name / "report.json").read_text())["pruned"] == pruned
    assert example("ablation.py", *options) == out, "finished runs are read, not repeated"


def test_ablation_varies_settings_that_exist_and_holds_out_training_images(tmp_path, image_folder):
    ablation = runpy.run_path(str(EXAMPLES / "ablation.py"))
    assert all(load_recipe(**changes) for changes in ablation["VARIANTS"].values())
    hold_out = ablation["hold_out"]
    total = len(list((image_folder / "train").glob("*/*")))
    made = hold_out(image_folder, tmp_path / "split", 3)
    train, val = ({path.resolve() for path in (made / split).glob("*/*")} for split in ("train", "val"))
    assert (len(train), len(val)) == (total - 3, 3)
    assert not train & val
    assert all(path.parent.parent == (image_folder / "train").resolve() for path in train | val)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_killed_runs_end_at_the_same_weights(example, image_folder, weights_file):
    """Killed about where training begins, which the seed says."""
    quick = ["--checkpoint", weights_file, "--data", image_folder, *QUICK, "--pretraining-steps", "4", "--steps", "40"]
    kills = ["--kills", "1", "--every", "2", "--seed", "12"]
    out = example("kill_and_resume.py", "test_vit", *kills, "--", *quick)
    assert "1 kills; weights identical" in out


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_data_comes_in_three_forms_and_memory_stays(example):
    out = example("data_speed.py", "demo", "--count", "64", "-j", "0", "--with-model", "tar")
    rows = [_cells(line)[:3] for line in out.splitlines()[3:7]]
    alone = [[form, "alone"] for form in ("folder", "parquet", "tar")]
    assert [row[:2] for row in rows] == [*alone, ["tar", "with the model"]]
    assert all(float(rate) > 0 for *_, rate in rows)
    after = [float(mib) for mib in out.splitlines()[-1].split(": ")[1].split(", ")]
    assert len(after) == 10
    assert after[-1] < after[1] + 50


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_faults_are_reported_and_nothing_crashes(example):
    out = example("faults.py", "demo", "--only", "a missing shard")
    assert "1 of 3 shards are missing" in out
    assert "does not end as a tar file does" in out


@pytest.mark.slow
def test_families_are_right_at_full_size(example):
    models = ["--models", "vit_tiny_patch16_224,cait_xxs24_224", "--img-size", "96"]
    out = example("families.py", *models, "--batch-size", "1", "--seconds", "0.1")
    for line in out.splitlines()[2:]:
        _, _, exact, masked, *_ = _cells(line)
        assert float(exact) == 0
        assert float(masked) < 1e-3


@pytest.mark.slow
def test_what_a_gpu_has_to_show_runs_anywhere_and_is_not_repeated(example):
    models = ["--models", "test_vit@64", "--right", "test_vit", "--device", "cpu", "--output", "out", "--no-training"]
    options = [*models, "--precision", "fp32", "--mode", "eager", "--batch-size", "1,2", "--seconds", "0.01"]
    out = example("gpu.py", *options, codes=(0, 3))
    assert re.search(r"\| test_vit \| 0.0e\+00 \| 0 \| \d.\de-0\d \|", out)
    rows = re.findall(r"\| test_vit@64 \| fp32 \| eager \| (\d) \| [\d,]+ \| [\d,]+ \| \d.\d\d x( SLOWER)? \|", out)
    assert [batch for batch, _ in rows] == ["1", "2"]
    for batch, slower in rows:  # beyond chance, which a hundredth of a second may not show
        assert bool(slower) == (f"- test_vit@64, fp32, eager, batch {batch}: slower than dense" in out)
    assert example("gpu.py", *options, codes=(0, 3)) == out, "what was measured is read, not measured again"
    if not torch.cuda.is_available():
        assert example("gpu.py", codes=(1,)) == "error: this PyTorch sees no CUDA GPU\n"


@pytest.mark.slow
def test_every_engine_opens_and_answers_as_pytorch(tmp_path):
    packages = {
        "PyTorch": "torch",
        "torch.export": "torch",
        "ONNX Runtime": "onnxruntime",
        "OpenVINO": "openvino",
        "ExecuTorch": "executorch",
        "LiteRT": "ai_edge_litert",
        "Core ML": "libcoremlpython",  # on macOS
    }
    options = ["test_vit", "--keep", "0.5", "--batch-size", "1,3", "--seconds", "0.01"]
    done = subprocess.run(  # engines' threads would not survive a fork of this process
        [sys.executable, str(EXAMPLES / "engines.py"), *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [_cells(line) for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [engine, model]
        for engine, package in packages.items()
        for model in (("dense", "merge", "drop") if find_spec(package) else ("dense, merge, drop",))
    ]
    missing = [row for row in rows if row[2] != "yes"]
    assert all(re.match("no: .*(package|macOS only)", row[2]) for row in missing)
    rows = [row for row in rows if row[2] == "yes"]
    assert all(float(row[3]) < 1e-3 for row in rows)
    assert all(float(row[5].split()[0].replace(",", "")) > 0 for row in rows)


@pytest.mark.slow
def test_images_are_answered_over_http_with_names_and_in_batches(example, tmp_path, image_folder, make_vit):
    serve = runpy.run_path(str(EXAMPLES / "serve.py"))
    sparse = vitprune.attach(make_vit(num_classes=2, depth=2), 0.5, [1])
    file = str(vitprune.export_model(sparse, tmp_path / "m.onnx", class_names=["cat", "dog"]).output)
    server = serve["Server"](file, 4)
    web = uvicorn.Server(uvicorn.Config(serve["application"](server), port=0, log_level="warning"))
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    while not web.started:
        time.sleep(0.05)
    port = web.servers[0].sockets[0].getsockname()[1]
    picture = image_folder / "val" / "cat" / "0.png"

    def ask(body):
        with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("POST", "/predict", body=body)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    status, said = ask(picture.read_bytes())
    (expected,) = vitprune.predict(sparse, picture, device="cpu", progress=False)
    (expected,) = expected.classes.values()
    assert status == 200
    assert {each["name"] for each in said["answer"]} == {"cat", "dog"}
    assert [each["index"] for each in said["answer"]] == [each.index for each in expected]
    shares = [each["probability_pct"] for each in said["answer"]]
    assert shares == pytest.approx([each.probability_pct for each in expected], abs=0.01)
    assert ask(b"no image") == (422, {"detail": "8 bytes that are no image: UnidentifiedImageError"})
    assert ask(picture.read_bytes())[0] == 200, "it goes on"
    other = image_folder / "val" / "dog" / "0.png"
    taken, wrong = serve["load"](port, [picture.read_bytes(), other.read_bytes()], 4, 1.0)
    assert (len(taken), wrong) == (server.num_images - 4, 0)
    assert len(taken) > 4
    first = said["answer"][0]
    assert not serve["same"](first, first | {"name": "cow"})
    assert not serve["same"](first, first | {"probability_pct": first["probability_pct"] + 1})
    assert server.num_batches < server.num_images, "what came meanwhile went together"
    web.should_exit = True
    thread.join(timeout=10)
    table = example(
        *("serve.py", file, file, "--load", str(image_folder / "val"), "--clients", "2", "--seconds", "0.5"),
        *("--rounds", "1", "--port", str(port)),
    )
    assert len(table.splitlines()) == 4


@pytest.mark.slow
def test_a_chart_of_comparisons(example, tmp_path):
    for name, model, gmacs in (("a", "x", 0.8), ("b", "x", 0.6), ("c", "y", 0.6)):
        rows = [
            {"method": "dense", "available": True, "gmacs": 1.25, "top1_pct": 75.0},
            {"method": "ours", "available": True, "gmacs": gmacs, "top1_pct": 74.0, "top1_points_ci95": [-2, 0.0]},
            {"method": "tome", "available": False},
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps({"model": model, "num_images": 100, "rows": rows}))
    out = example("compare_chart.py", "a.json", "b.json", "-o", "chart.png")
    assert out == "written to chart.png\n"
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert "of 2 models or sets of images" in example("compare_chart.py", "a.json", "c.json", codes=(1,))
    rows = [
        {"method": method, "available": True, "knn_top1_pct": None, "cosine": cosine, "gmacs": gmacs}
        for method, cosine, gmacs in (("dense", 1.0, 2.0), ("ours", 0.98, 1.0))
    ]
    about = {"model": "an encoder", "task": "embedding", "num_images": 100}
    (tmp_path / "d.json").write_text(json.dumps(about | {"rows": rows}))
    example("compare_chart.py", "d.json", "-o", "chart2.png")
    assert (tmp_path / "chart2.png").read_bytes() != (tmp_path / "chart.png").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_features_of_all_patches_are_judged_beside_others_at_their_cost(example, tmp_path, image_folder, monkeypatch):
    decoder = runpy.run_path(str(EXAMPLES / "dense_features.py"))["Decoder"]()
    save_file(decoder.state_dict(), tmp_path / "decoder.safetensors")
    shallow = {"depth": 4}
    monkeypatch.setattr("vitprune.loading.load.load_model", partial(load_model, model_kwargs=shallow))
    backbone = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224, **shallow)
    save_file(backbone.state_dict(), tmp_path / "vit.safetensors")
    vitprune.save(vitprune.attach(backbone, 0.7), tmp_path / "run.safetensors")
    files = ["run.safetensors", str(image_folder), "--weights", "vit.safetensors", "--decoder", "decoder.safetensors"]
    quick = ["--limit", "2", "--large", "0", "--bench-seconds", "0"]
    out = example("dense_features.py", *files, *quick)
    rows = {
        cells[1]: [float(cell) for cell in cells[2:]] for cells in map(_cells, out.split("|---")[-1].splitlines()[1:])
    }
    assert list(rows) == [
        "ours",
        "ours, untrained",
        "ToMe",
        "ToMe, more in late blocks",
        "class attention",
        "random tokens",
    ]
    costs = [values[0] for values in rows.values()]
    assert min(costs) > 0.98 * max(costs)
    assert all(-1 <= values[1] <= 1 and values[3] >= 0 for values in rows.values())
    assert rows["ours"] == rows["ours, untrained"], "nothing was trained"


def _wordnet_folder(root):
    """Four images of two of ImageNet's classes to train on, and as many to evaluate on."""
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for label, name in enumerate(("n01440764", "n02123045")):
            (root / part / name).mkdir(parents=True)
            for index in range(2):
                pixels = torch.randint(0, 128, (48, 64, 3), generator=generator) + 120 * label
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / part / name / f"{index}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("task", "width"), [("multilabel", 20), ("regression", 2)])
def test_a_fitted_head_goes_with_its_labels(example, task, width, tmp_path, make_vit):
    images = _wordnet_folder(tmp_path / "images")
    save_file(make_vit(num_classes=1000).state_dict(), tmp_path / "weights.safetensors")
    out = example("fit_head.py", task, "test_vit", "images", "--checkpoint", "weights.safetensors")
    assert f"{width} outputs" in out
    head = tmp_path / f"{task}.safetensors"
    assert load_file(head)["head.weight"].shape[0] == width
    columns = [] if task == "multilabel" else ["--target-key", "brightness,contrast"]
    labels = ["--labels", str(tmp_path / f"{task}.jsonl"), *columns]
    arguments = ["eval", "test_vit", str(images), "--checkpoint", str(head), "--task", task, *labels]
    assert run([*arguments, "-j", "0", "--device", "cpu"]) == 0


@pytest.mark.slow
def test_a_probe_on_a_dense_plan_is_the_classifier(example, tmp_path, make_vit):
    _wordnet_folder(tmp_path / "images")
    classifier = make_vit(num_classes=1000)
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    classifier.reset_classifier(0)
    vitprune.save(vitprune.attach(classifier, keep=0.5), tmp_path / "model.safetensors")
    out = example(
        "linear_probe.py",
        *("model.safetensors", "images", "--head", "weights.safetensors", "--methods", "random"),
    )
    rows = {cells[0]: cells[1:] for cells in map(_cells, out.splitlines()[3:])}
    assert list(rows) == ["dense", "random", "ours"]
    assert rows["dense"][3] == "100.0 %"
    assert float(rows["ours"][4]) > 0
