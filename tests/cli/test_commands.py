"""eval, bench, info, env, help, and the mistakes users make."""

import json
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vitprune.checkpoint.sparse_file import describe, save
from vitprune.cli.app import run


@pytest.fixture
def sparse_file(make_sparse, tmp_path):
    sparse = make_sparse(num_classes=2)
    save(sparse, tmp_path / "model.safetensors", describe(sparse, class_names=("cat", "dog")))
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("command", ["bench", "compare", "sweep"])
def test_what_is_timed_runs_in_one_process(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run([command, "demo"]) == 2
    assert f"vitprune {command} runs in one process, not in 2" in capsys.readouterr().err


def test_eval_of_a_sparse_file(sparse_file, image_folder, capsys):
    assert run(["eval", str(sparse_file), str(image_folder), "--device", "cpu", "-j", "0"]) == 0
    out, err = capsys.readouterr()
    assert "top-1" in out
    assert "on 6 images" in out
    assert "evaluating" in err
    assert run(["eval", str(sparse_file), str(image_folder), "-j", "0", "--limit", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 3
    assert run(["eval", str(sparse_file), str(image_folder), "-j", "0", "--min-top1", "101"]) == 3


def test_eval_of_a_dense_model(weights_file, image_folder, capsys):
    arguments = ["eval", "test_vit", str(image_folder), "--checkpoint", str(weights_file), "-j", "0", "--json"]
    assert run(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["keep"] == 1.0
    assert result["precision"] == "fp32"


def test_info_shows_the_plan_without_weights(capsys, no_hub):
    assert run(["info", "deit_small", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(s["block"], s["num_tokens"]) for s in plan["stages"]] == [(3, 148), (6, 100), (9, 52)]
    assert plan["dropped"] == "fold"
    assert round(plan["sparse"]["params_m"] * 1e6) == 22_774_414
    assert run(["info", "deit_small", "--recipe", "paper", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(s["block"], s["num_tokens"]) for s in plan["stages"]] == [(3, 137), (6, 96), (9, 67)]
    assert plan["dropped"] == "drop"
    assert round(plan["dense"]["gmacs"], 3) == 4.599
    assert round(plan["sparse"]["gmacs"], 3) == 2.981
    assert round(plan["sparse"]["params_m"] * 1e6) == 22_774_414
    assert run(["info", "deit_small", "--keep", "0.5", "--stages", "4,8", "--schedule", "geometric"]) == 0
    out = capsys.readouterr().out
    assert "0-3" in out
    assert "98" in out
    assert "49" in out


def test_info_finds_the_keep_ratio_of_a_budget(capsys, no_hub):
    assert run(["info", "test_vit", "--target-gmacs", "0.03", "--json"]) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert 0.029 < plan["sparse"]["gmacs"] <= 0.03
    assert f"--target-gmacs 0.03: keep ratio {plan['keep']}" in err


def test_info_with_free_ratios_and_with_whole_tiles(capsys, no_hub):
    assert run(["info", "deit_tiny", "--ratios", ".8,.6,.4", "--dropped", "drop", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["keep"] is None
    assert [stage["num_tokens"] for stage in plan["stages"]] == [156, 117, 78]
    assert run(["info", "deit_small", "--align", "8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["align"] == 8
    assert [stage["num_tokens"] for stage in plan["stages"]] == [151, 95, 55]
    assert plan["sparse"]["gmacs"] == pytest.approx(3.001, rel=0.01), "the cost without tiles"


def test_info_measures_the_alignment_only_when_asked(capsys, no_hub, monkeypatch):
    seen = []

    def fastest_align(model, sparsity, batch_size, device, precision, listener):
        seen.append((sparsity.keep, batch_size, str(device), precision))
        return 16

    monkeypatch.setattr(sys.modules["vitprune.budget.resolve"], "fastest_align", fastest_align)
    options = ["--device", "cpu", "--precision", "bf16", "--target-batch-size", "4"]
    assert run(["info", "test_vit", "--keep", "0.6", "--align", "auto", *options, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["align"] == 16
    assert seen == [(0.6, 4, "cpu", "bf16")]
    assert "--align auto: measuring on cpu, bf16, batch size 4" in err


def test_info_of_a_file_tells_what_it_is(sparse_file, capsys):
    assert run(["info", str(sparse_file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keep"] == 0.7


def test_env_is_json(capsys):
    assert run(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == str(torch.__version__)


MISTAKES = {
    "no command": (["sparsfy"], 2, "there is no command 'sparsfy'"),
    "no such option": (["sparsify", "demo", "--kep", "0.5"], 2, "vitprune sparsify has no option --kep"),
    "no model": (["sparsify"], 2, "vitprune sparsify needs MODEL"),
    "unknown model": (["sparsify", "deit_smal"], 2, "there is no model or file 'deit_smal'"),
    "ambiguous model": (["info", "vit_base_r50"], 2, "could be several models"),
    "unsupported family": (["sparsify", "swin_tiny"], 1, "plain sequence of tokens"),
    "keep 0": (["sparsify", "demo", "--keep", "0"], 2, "keep ratio is 0, expected a number in (0, 1]"),
    "keep 1.5": (["info", "demo", "--keep", "1.5"], 2, "keep ratio is 1.5"),
    "keep nan": (["sparsify", "demo", "--keep", "nan"], 2, "keep ratio is nan"),
    "keep text": (["sparsify", "demo", "--keep", "most"], 2, "--keep is 'most', expected a number"),
    "align text": (["sparsify", "demo", "--align", "big"], 2, "--align is 'big', expected a whole number"),
    "align 0": (["info", "demo", "--align", "0"], 2, "--align is '0'"),
    "align too large": (["info", "demo", "--align", "200"], 2, "no stage can fill such tiles"),
    "align of a file": (["info", "model.safetensors", "--align", "8"], 2, "has its own plan"),
    "align auto again": (["sparsify", "demo", "--align", "auto", "--resume"], 2, "give what it found: --keep"),
    "mode in bench": (["bench", "test_vit", "--mode", "eager,fast"], 2, "mode 'fast' is unknown"),
    "graphs without a GPU": (
        ["bench", "test_vit", "--mode", "cudagraphs", "--device", "cpu"],
        2,
        "needs an NVIDIA GPU",
    ),
    "keep in bench": (["bench", "test_vit", "--keep", "0.5,2"], 2, "keep ratio is 2"),
    "stages outside": (["info", "demo", "--stages", "3,6,12"], 2, "blocks 0..11"),
    "stages in sparsify": (["sparsify", "demo", "--stages", "6,3"], 2, "expected rising block indices"),
    "stages text": (["info", "demo", "--stages", "3;6"], 2, "--stages is '3;6'"),
    "keep and target": (["info", "demo", "--keep", "0.5", "--target-gmacs", "0.1"], 2, "--keep and --target-gmacs say"),
    "ratios text": (["info", "demo", "--ratios", "a,b"], 2, "--ratios is 'a,b'"),
    "ratios rising": (["sparsify", "demo", "--ratios", "0.4,0.6"], 2, "does not come back"),
    "ratios and schedule": (["info", "demo", "--ratios", "0.4", "--schedule", "late"], 2, "a schedule of their own"),
    "target above dense": (["info", "demo", "--target-gmacs", "9"], 2, "the dense model needs 0."),
    "target below all": (["info", "demo", "--target-gmacs", "0.001"], 2, "still leaves 0."),
    "no such schedule": (
        ["info", "demo", "--schedule", "early"],
        2,
        "--schedule is 'early', expected one of",
    ),
    "ratio weight of top-k": (["sparsify", "demo", "--set", "weights.ratio=1"], 2, "weights.ratio does nothing"),
    "labels and none": (["sparsify", "demo", "--no-labels", "--set", "weights.ce=1"], 2, "--no-labels leaves out"),
    "no setting": (["sweep", "demo", "--set", "lr"], 2, "--set is 'lr', expected KEY=VALUE"),
    "no such setting": (["compare", "demo", "--set", "speed=1"], 2, "has no setting 'speed'"),
    "plan of a file": (["info", "model.safetensors", "--keep", "0.5"], 2, "has its own plan"),
    "plan of a timed file": (["bench", "model.safetensors", "--keep", "0.5"], 2, "has its own plan"),
    "plan of a compared file": (["compare", "model.safetensors", "--ratios", ".5"], 2, "has its own plan"),
    "no such recipe": (["sparsify", "demo", "--recipe", "long"], 2, "recipe 'long' is neither one of ours nor a file"),
    "recipe with a typo": (
        ["sparsify", "demo", "--recipe", "typo.yaml"],
        2,
        "leanring_rate: Extra inputs",
    ),
    "recipe of no settings": (["sparsify", "demo", "--recipe", "list.yaml"], 2, "holds no settings"),
    "recipe that is no YAML": (["sparsify", "demo", "--recipe", "broken.yaml"], 2, "is not YAML"),
    "no such method": (["compare", "demo", "--methods", "tome,magic"], 2, "there is no method 'magic'"),
    "compare without a dense model": (["compare", "model.safetensors", "images", "--methods", "tome"], 1, "Hub"),
    "steps and epochs": (["sparsify", "demo", "--steps", "1", "--epochs", "1"], 2, "steps or epochs, not both"),
    "negative rate": (["sparsify", "demo", "--set", "lr=-1"], 2, "lr: Input should be greater than 0"),
    "no such device": (["sparsify", "demo", "--device", "tpu"], 2, "device 'tpu' is unknown"),
    "fp16 on the CPU": (["eval", "demo", "--device", "cpu", "--precision", "fp16"], 2, "fp16"),
    "batch size text": (["sparsify", "demo", "-b", "many"], 2, "--batch-size is 'many'"),
    "batch size none": (["sparsify", "demo", "-b", "0"], 2, "--batch-size is '0'"),
    "batch size twice": (["sparsify", "demo", "-b", "auto", "--grad-accum", "2"], 2, "--batch-size auto finds out"),
    "resume and overwrite": (["sparsify", "demo", "--resume", "--overwrite"], 2, "--overwrite replaces it"),
    "target again": (["sparsify", "demo", "--resume", "--target-speedup", "2"], 2, "--target-speedup may measure"),
    "target of nothing": (["sparsify", "demo", "--target-speedup", "0.9"], 2, "--target-speedup is 0.9, expected more"),
    "target nan": (["bench", "demo", "--target-speedup", "nan"], 2, "--target-speedup is nan"),
    "target of no time": (["bench", "demo", "--target-latency-ms", "0"], 2, "--target-latency-ms is 0, expected mill"),
    "keep and speed": (
        ["bench", "demo", "--target-speedup", "2", "--keep", ".7"],
        2,
        "--keep and --target-speedup say",
    ),
    "two targets": (
        ["sparsify", "demo", "--target-speedup", "2", "--target-latency-ms", "4"],
        2,
        "--target-speedup and --target-latency-ms say",
    ),
    "batch size 0": (["bench", "test_vit", "-b", "0"], 2, "--batch-size is '0'"),
    "no data folder": (["sparsify", "demo", "--data", "nowhere"], 1, "the data 'nowhere' is not there"),
    "empty data folder": (["sparsify", "demo", "--data", "empty"], 1, "there are no images in 'empty'"),
    "class count": (["sparsify", "demo", "--data", "images"], 1, "the model has 10 classes"),
    "class count in eval": (["eval", "model.safetensors", "three"], 1, "the model has 2 classes (cat, dog)"),
    "push of no run": (["push", "images", "me/mine"], 2, "'images' holds no report.json, so it is no complete run"),
    "push to no name": (["push", "images", "mine"], 2, "'mine' is no name of a repository on the Hub"),
    "missing checkpoint": (["convert", "absent.pth", "--keep", "0.7"], 1, "there is no file 'absent.pth'"),
    "not official": (["convert", "plain.pth", "--keep", "0.7"], 1, "no official DynamicViT checkpoint"),
    "weights alone": (["eval", "plain.pth", "images"], 2, "'plain.pth' holds weights alone"),
    "missing file": (["eval", "absent.safetensors", "images"], 1, "there is no file 'absent.safetensors'"),
    "truncated file": (["eval", "truncated.safetensors", "images"], 1, "'truncated.safetensors' is damaged"),
    "weights that are not ours": (["bench", "weights.safetensors"], 1, "was not written by vitprune"),
    "sparse already": (["sparsify", "model.safetensors", "--data", "images"], 2, "is sparse already"),
    "missing weights": (["sparsify", "test_vit", "--checkpoint", "absent.pth"], 1, "there is no file 'absent.pth'"),
    "wrong shape": (["sparsify", "test_vit", "--checkpoint", "wrong.safetensors"], 1, "blocks.0.mlp.fc1.weight"),
    "NaN weights": (["sparsify", "test_vit", "--checkpoint", "nan.safetensors"], 1, "NaN or infinite values"),
    "pickled weights": (["sparsify", "test_vit", "--checkpoint", "pickled.pth"], 1, "only tensors are read"),
    "hub": (["sparsify", "deit_tiny", "--data", "images"], 1, "the Hugging Face Hub is out of reach"),
    "output is a file": (["sparsify", "demo", "-o", "weights.safetensors"], 1, "is a file, not a folder"),
    "output exists": (["sparsify", "demo", "-o", "images"], 1, "the output folder 'images' exists"),
}


@pytest.fixture(scope="module")
def files(make_vit, make_sparse, tmp_path_factory):
    """A folder with good and bad files."""
    root = tmp_path_factory.mktemp("place")
    (root / "empty").mkdir()
    for name in (
        "images/train/cat",
        "images/train/dog",
        "images/val/cat",
        "images/val/dog",
        "three/a",
        "three/b",
        "three/c",
    ):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(root / name / "1.png")
    sparse = make_sparse(num_classes=2)
    save(sparse, root / "model.safetensors", describe(sparse, class_names=("cat", "dog")))
    content = (root / "model.safetensors").read_bytes()
    (root / "truncated.safetensors").write_bytes(content[: len(content) // 2])
    state = make_vit(num_classes=2).state_dict()
    save_file(state, root / "weights.safetensors")
    save_file(state | {"blocks.0.mlp.fc1.weight": torch.zeros(7, 7)}, root / "wrong.safetensors")
    save_file(state | {"norm.bias": torch.full((64,), float("nan"))}, root / "nan.safetensors")
    (root / "typo.yaml").write_text("leanring_rate: 1\n")
    (root / "list.yaml").write_text("- 1\n")
    (root / "broken.yaml").write_text("lr: [1\n")
    torch.save({"model": state}, root / "plain.pth")
    torch.save({"model": state, "extra": _Thing()}, root / "pickled.pth")
    return root


class _Thing:
    """Not a tensor."""


@pytest.fixture
def workplace(files, monkeypatch, no_hub):
    """The folder of files as current directory, without network."""
    monkeypatch.chdir(files)
    monkeypatch.delenv("VITPRUNE_IMAGENET", raising=False)
    return files


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gets_one_clear_sentence_and_writes_nothing(mistake, workplace, capsys):
    arguments, exit_code, message = MISTAKES[mistake]
    before = sorted(workplace.rglob("*"))
    assert run([*arguments]) == exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    lines = [line for line in err.splitlines() if line]
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    assert sorted(workplace.rglob("*")) == before


def test_error_with_json_is_one_object(workplace, capsys):
    assert run(["eval", "absent.safetensors", "images", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)
    assert error == {"error": "there is no file 'absent.safetensors'", "hint": "check the path", "exit_code": 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_missing_gpu_is_said(capsys):
    assert run(["bench", "--device", "cuda"]) == 2
    assert "device 'cuda' is not there" in capsys.readouterr().err


def test_traceback_on_request_only(monkeypatch, capsys):
    monkeypatch.setenv("VITPRUNE_DEBUG", "1")
    assert run(["info", "xyzzy"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_bug_in_vitprune_is_not_dressed_up(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("vitprune.loading.load.load_model", broken)
    assert run(["info", "demo"]) == 1
    err = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: surprise" in err
    assert "bug in vitprune" in err
