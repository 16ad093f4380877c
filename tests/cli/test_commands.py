"""eval, bench, info, env, help, and the mistakes users make."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vitprune
from vitprune.backbones import preprocessing
from vitprune.checkpoint.sparse_file import describe, load_sparse, read_metadata, save
from vitprune.cli.app import run
from vitprune.errors import UsageError
from vitprune.training.recipe import load_recipe


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


def test_eval_compares_with_the_dense_model_labels_or_not(sparse_file, image_folder, make_vit, tmp_path, capsys):
    save_file(make_vit(num_classes=2).state_dict(), tmp_path / "dense.safetensors")
    arguments = ["eval", str(sparse_file), "-j", "0", "--checkpoint", str(tmp_path / "dense.safetensors")]
    assert run([*arguments, str(image_folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["delta"]["top1_points"] == pytest.approx(result["top1_pct"] - result["dense"]["top1_pct"])
    assert result["delta"]["kl"] > 0
    flat = (image_folder / "val" / "cat").rename(tmp_path / "flat")
    assert run([*arguments, str(flat), "--json"]) == 0
    captured = capsys.readouterr()
    assert "have no labels" in captured.err
    unlabelled = json.loads(captured.out)
    assert unlabelled["top1_pct"] is None
    assert 0 <= unlabelled["delta"]["agreement_pct"] <= 100
    assert run([*arguments, str(flat)]) == 0
    assert "same prediction as dense" in capsys.readouterr().out


def test_info_previews_the_plan_without_weights(capsys, no_hub, monkeypatch):
    macs = "vitprune.measure.macs.count_macs"
    monkeypatch.setattr(macs, lambda model, _: 10**9 * sum(model.schedule.tokens_per_block()))
    for options, pruned, align, num_tokens in (
        ([], "merge", 1, [75, 51, 27]),
        (["--recipe", "paper"], "drop", 1, [70, 49, 34]),
        (["--align", "8"], "merge", 8, [79, 47, 23]),
        (["--tokens-left", ".8,.6,.4", "--pruned", "drop"], "drop", 1, [80, 60, 40]),
    ):
        assert run(["info", "test_vit", *options, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert [stage["num_tokens"] for stage in plan["stages"]] == num_tokens
        assert (plan["pruned"], plan["align"]) == (pruned, align)
        assert plan["keep"] == (None if "--tokens-left" in options else 0.7)
        assert plan["schedule"] == (
            None if "--tokens-left" in options else "geometric" if "paper" in options else "late"
        )
        assert [stage["block"] for stage in plan["stages"]] == [1, 3, 4]
        gmacs = 100 + 2 * num_tokens[0] + num_tokens[1] + 2 * num_tokens[2]  # stages before blocks 1, 3 and 4 of 6
        assert (plan["dense"]["gmacs"], plan["sparse"]["gmacs"]) == (600, gmacs)
        assert plan["delta"]["gmacs_pct"] == pytest.approx(100 * (gmacs / 600 - 1))
        assert plan["sparse"]["params_m"] > plan["dense"]["params_m"]
    assert run(["info", "test_vit", "--keep", "0.5", "--prune-at", "2,4", "--token-schedule", "geometric"]) == 0
    out = capsys.readouterr().out
    for words in ("0-1", "2-3", "50", "25", "GMACs", "keep 0.5 leaves 50/25 of 100 patch tokens, as in the paper"):
        assert words in out
    assert run(["info", "test_vit", "--pruned", "drop"]) == 0
    out = capsys.readouterr().out
    assert "leaves 75/51/27 of 100 patch tokens (late schedule), at about the cost of the paper's 70/49/34" in out
    assert "pruned tokens are dropped" in out


def test_models_and_info_say_the_same_of_a_model(capsys, no_hub):
    assert run(["models", "test_vit2", "--keep", "0.5", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["num_supported"] == len(listed["rows"]) == 1
    assert run(["info", "test_vit2", "--keep", "0.5", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    row = listed["rows"][0]
    assert (row.pop("family"), row.pop("reason")) == ("vision_transformer", None)
    weights = row.pop("weights")
    assert row["task"] == "classification"
    assert weights == {"classification": ["r160_in1k"]}
    assert listed["weights"] == {"by_task": {"classification": 1}, "num_refused": 0, "reasons": []}
    assert row | {"model": plan["model"], "schema_version": plan["schema_version"]} == plan
    assert (row["keep"], row["pruned"]) == (0.5, "merge")


def test_models_says_what_they_are_for(capsys, no_hub):
    assert run(["models", "*base_patch16_clip_224"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"eva02_base_patch16_clip_224 +embedding", out)
    assert re.search(r"vit_base_patch16_clip_224 +classification", out), "of its default weights"
    assert re.search(r"pretrained weights of these by task: \d+ embedding, \d+ classification", out)


def test_info_searches_only_when_asked(capsys, no_hub, monkeypatch):
    search = "vitprune.budget.resolve.keep_for_gmacs"
    monkeypatch.setattr(search, lambda model, sparsity, gmacs: replace(sparsity, keep=20 * gmacs))
    assert run(["info", "test_vit", "--target-gmacs", "0.03", "--align", "16", "--json"]) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert (plan["keep"], plan["align"]) == (0.6, 16)
    assert "--target-gmacs 0.03: keep ratio 0.6" in err


def test_info_of_a_file_tells_what_it_is(sparse_file, capsys):
    assert run(["info", str(sparse_file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keep"] == 0.7


def test_the_printed_recipe_is_the_one_that_trains(capsys, tmp_path):
    arguments = ["sparsify", "demo", "--recipe", "paper", "--set", "lr=2e-3", "--epochs", "2", "--print-config"]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(printed)
    read, asked = load_recipe(str(tmp_path / "mine.yaml")), load_recipe("paper", epochs=2.0, lr=2e-3)
    assert read.model_dump(exclude={"name"}) == asked.model_dump(exclude={"name"})


@pytest.mark.parametrize(("keep", "asked", "steps"), [("0.7", 0.7, 300), ("0.5-0.9", (0.5, 0.9), 600)])
def test_a_range_trains_longer_by_command_and_from_python(keep, asked, steps, make_vit, capsys, monkeypatch):
    assert run(["sparsify", "deit_tiny", "--keep", keep, "--print-config"]) == 0
    assert f"\nsteps: {steps}\n" in capsys.readouterr().out

    def chosen(name, given):
        raise UsageError(f"{load_recipe(name, **given).steps} steps")

    monkeypatch.setattr("vitprune.api.training.chosen_recipe", chosen)
    with pytest.raises(UsageError, match=f"^{steps} steps"):
        vitprune.sparsify(make_vit(), "images", keep=asked)


def test_env_is_json(capsys):
    assert run(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == str(torch.__version__)


MISTAKES = [
    (["eval", "demo", "--min-top1", "0.9"], 2, "--min-top1 is 0.9, expected at least 1"),
    (["sparsify", "demo", "--max-drop", "-1"], 2, "--max-drop is -1, expected at least 0"),
    (["info", "typo.yaml"], 2, "'typo.yaml' is not a model"),
    (["eval", "deit_tiny", "demo", "--checkpoint", "model.safetensors"], 2, "sparse model already", "give it as MODEL"),
    (["train", "demo"], 2, "unknown command 'train'", "did you mean vitprune sparsify?"),
    (["validate", "demo"], 2, "did you mean vitprune eval?"),
    (["sparsify", "demo", "--keep-ratio", "0.7"], 2, "did you mean --keep?"),
    (["eval", "demo", "--amp"], 2, "did you mean --precision bf16?"),
    (["sparsify", "demo", "--lr", "1e-3"], 2, "did you mean --set lr=VALUE?"),
    (["info", "demo", "--prune-at", "3", "6", "9"], 2, "unexpected argument '6 9'", "such as 3,6,9"),
    (["info", "demo", "--keep", "70"], 2, "keep ratio is 70", "try --keep 0.7"),
    (["info", "demo", "--keep", "70%"], 2, "--keep is '70%', expected a number", "70 % is 0.7"),
    (["sparsify"], 2, "vitprune sparsify needs MODEL"),
    (["sparsify", "swin_tiny"], 2, "plain sequence of tokens"),
    (["sparsify", "demo", "--keep", "0"], 2, "keep ratio is 0, expected a number in (0, 1]"),
    (["sparsify", "demo", "--keep", "nan"], 2, "keep ratio is nan"),
    (["sparsify", "demo", "--keep", "most"], 2, "--keep is 'most', expected a number"),
    (["sparsify", "demo", "--align", "big"], 2, "--align is 'big', expected a whole number"),
    (["info", "demo", "--align", "0"], 2, "--align is 0, expected at least 1"),
    (["sparsify", "demo", "--target-speedup", "2", "--resume"], 2, "give what it found: --keep"),
    (["bench", "test_vit", "--mode", "eager,fast"], 2, "mode 'fast' is unknown"),
    (["bench", "test_vit", "--keep", "0.5,2"], 2, "keep ratio is 2"),
    (["sparsify", "demo", "--prune-at", "6,3"], 2, "expected rising block indices"),
    (["info", "demo", "--prune-at", "3;6"], 2, "--prune-at is '3;6'"),
    (["info", "demo", "--keep", "0.5", "--target-gmacs", "0.1"], 2, "--keep and --target-gmacs are mutually exclusive"),
    (["info", "demo", "--tokens-left", "a,b"], 2, "--tokens-left is 'a,b'"),
    (["sparsify", "demo", "--tokens-left", "0.4,0.6"], 2, "does not come back"),
    (["info", "demo", "--tokens-left", "0.4", "--token-schedule", "late"], 2, "a schedule of its own"),
    (["sparsify", "demo", "--set", "weights.ratio=1"], 2, "weights.ratio does nothing"),
    (["sparsify", "demo", "--no-labels", "--set", "weights.ce=1"], 2, "--no-labels leaves out"),
    (["sweep", "demo", "--set", "lr"], 2, "--set is 'lr', expected KEY=VALUE"),
    (["info", "model.safetensors", "--keep", "0.5"], 2, "has its own plan"),
    (["bench", "model.safetensors", "--keep", "0.5"], 2, "has its own plan"),
    (["compare", "model.safetensors", "--tokens-left", ".5"], 2, "has its own plan"),
    (["sparsify", "demo", "--recipe", "typo.yaml"], 2, "has no setting 'leanring_rate'"),
    (["sparsify", "demo", "--recipe", "list.yaml"], 2, "holds no settings"),
    (["sparsify", "demo", "--recipe", "broken.yaml"], 2, "is not YAML"),
    (["compare", "model.safetensors", "images", "--methods", "tome"], 1, "Hub"),
    (["sparsify", "demo", "--steps", "1", "--epochs", "1"], 2, "steps or epochs, not both"),
    (["sparsify", "demo", "--set", "lr=-1"], 2, "lr: expected greater than 0"),
    (["sparsify", "demo", "--device", "tpu"], 2, "device 'tpu' is unknown"),
    (["sparsify", "demo", "-b", "many"], 2, "--batch-size is 'many'"),
    (["sparsify", "demo", "-b", "0"], 2, "--batch-size is '0'"),
    (["sparsify", "demo", "-b", "auto", "--grad-accum-steps", "2"], 2, "--batch-size auto finds out"),
    (["sparsify", "demo", "--resume", "--overwrite"], 2, "--resume and --overwrite are mutually exclusive"),
    (["sparsify", "demo", "--resume", "--target-speedup", "2"], 2, "--target-speedup may measure"),
    (["sparsify", "demo", "--target-speedup", "0.9"], 2, "--target-speedup is 0.9, expected more"),
    (["bench", "demo", "--target-speedup", "nan"], 2, "--target-speedup is nan"),
    (["bench", "demo", "--target-latency-ms", "0"], 2, "--target-latency-ms is 0, expected more than 0"),
    (
        ["bench", "demo", "--target-speedup", "2", "--keep", ".7"],
        2,
        "--keep and --target-speedup are mutually exclusive",
    ),
    (
        ["sparsify", "demo", "--target-speedup", "2", "--target-latency-ms", "4"],
        2,
        "--target-speedup and --target-latency-ms are mutually exclusive",
    ),
    (["bench", "test_vit", "-b", "0"], 2, "--batch-size is '0'"),
    (["sparsify", "demo", "--data", "nowhere"], 2, "the data 'nowhere' was not found"),
    (["sparsify", "demo", "--data", "images"], 1, "the model has 10 classes"),
    (["eval", "model.safetensors", "three"], 1, "the model has 2 classes (cat, dog)"),
    (["convert", "absent.pth", "--keep", "0.7"], 2, "file 'absent.pth' not found"),
    (["sparsify", "model.safetensors", "--data", "images"], 2, "is sparse already"),
    (["bench", "demo", "--target-latency-ms", "inf"], 2, "--target-latency-ms is inf"),
    (["sparsfy"], 2, "unknown command 'sparsfy'", "did you mean vitprune sparsify?"),
    (["info", "demo", "--kepe", "0.7"], 2, "vitprune info has no option --kepe", "did you mean --keep?"),
    (
        ["info", "demo", "--token-schedule", "lat"],
        2,
        "--token-schedule is 'lat', expected one of",
        "did you mean --token-schedule late?",
    ),
    (
        ["info", "demo", "--recipe", "shrot"],
        2,
        "recipe 'shrot' is neither one of ours nor a file",
        "did you mean short?",
    ),
    (["info", "deit_smal"], 2, "model or file 'deit_smal' not found", "did you mean deit_small"),
    (["eval", "demo", "imagnet"], 2, "did you mean imagenet?"),
    (["compare", "demo", "--methods", "randm"], 2, "unknown method 'randm'", "did you mean random?"),
    (["sparsify", "demo", "--set", "weights.k=1"], 2, "has no setting 'weights.k'", "did you mean weights.kl?"),
    (["frobnicate"], 2, "the commands are sparsify, eval", "\nhint: "),
    (["info", "demo", "--wrong"], 2, "vitprune info --help shows"),
    (["info", "--keep"], 2, "--keep needs a value", "\nhint: "),
    (["info", "demo", "--json=5"], 2, "--json takes no value", "\nhint: "),
    (["info", "demo", "more"], 2, "unexpected argument 'more'", "\nhint: "),
    (["eval", "demo", "-b", "0"], 2, "--batch-size is 0, expected at least 1", "\nhint: "),
    (["eval", "demo", "-b", "2.5"], 2, "--batch-size is '2.5', expected a whole number", "\nhint: "),
    (["sparsify", "demo", "--keep", ".9", ".7"], 2, "'.7' was not found", "such as 3,6,9"),
    (["bench", "demo", "-b", "1", "8"], 2, "'8' not found", "such as 3,6,9"),
    (["compare", "demo", "--methods", "tome", "random"], 2, "'random' is a method, not DATA", "tome,random"),
    (["info", "dinov2"], 2, "`vitprune models dinov2` lists"),
    (["bench", "demo", "--keep", ".9", ".7"], 2, "file '.7' not found", "joined with commas"),
    (["eval", "folder-of-runs", "demo"], 2, "'folder-of-runs' is no model, but holds some", "folder-of-runs/one"),
    (["info", "ViT-B-16"], 2, "`vitprune models vit_base_patch16` lists", "such as vit_base_patch16_224"),
    (["eval", "junk.pth", "images"], 1, "'junk.pth' is not a PyTorch checkpoint"),
    (["visualize", "model.safetensors", "images", "--mean", "--heatmap"], 2, "without heat maps"),
    (["info", "dino_vits8"], 2, "`vitprune models vit_small_patch8` lists"),
    (["info", "ViT-B-16"], 2, "`vitprune models vit_base_patch16` lists"),
    (["info", "clip"], 2, "`vitprune models clip` lists"),
    (["info", "google/vit-base-patch16-224"], 2, "hf-hub:google/vit-base-patch16-224"),
    (["eval", "demo", "demo", "--img-size", "128"], 2, "--img-size goes with a timm name"),
    (["eval", "demo", "demo", "--checkpoint", "junk.pth"], 2, "--checkpoint goes with a timm name"),
    (["eval", "deit_tiny", "images", "--checkpoint", "junk.pth"], 1, "not a PyTorch checkpoint"),
    (["info", "deit_tiny", "--img-size", "225"], 2, "no multiple of the patch size 16x16", "try --img-size 224"),
    (["bench", "vit_small_patch16_dinov3", "--img-size", "300"], 2, "300x300 is no multiple", "288 or 304"),
    (["info", "deit_tiny", "--model-kwargs", "fcnorm=1"], 2, "--model-kwargs fcnorm: 'deit", "did you mean fc_norm?"),
    (["info", "deit_tiny", "--model-kwargs", "fc_norm"], 2, "--model-kwargs is 'fc_norm', expected KEY=VALUE"),
    (["info", "deit_tiny", "--model-kwargs", "depth=2", "depth=3"], 2, "--model-kwargs gives depth twice"),
    (["info", "demo", "--model-kwargs", "depth=2"], 2, "says how its model is built"),
    (["eval", "deit_tiny", "images", "--checkpoint-key", "ema"], 2, "--checkpoint-key names weights in a file"),
    (["sparsify", "demo", "--target-batch-size", "8"], 2, "--target-batch-size says how a target is measured"),
    (["sparsify", "demo", "--set", "learning_rate=1"], 2, "did you mean lr?"),
    (["eval", "demo", "imagenet"], 1, "the model has 10 classes", "'imagenet' has 1000"),
    (["eval", "demo", "flat"], 1, "accuracy needs labels", "`vitprune predict` shows predictions"),
    (["sparsify", "demo", "--mean", ".5,.5,.5"], 2, "--mean is of own weights, and there is no --checkpoint"),
    (
        ["eval", "deit_tiny", "--checkpoint", "junk.pth", "--std", "0"],
        2,
        "--std is '0', expected three numbers above 0",
    ),
    (["sparsify", "demo", "--bench-batch-sizes", "0"], 2, "--bench-batch-sizes is '0'"),
    (["compare", "demo", "demo", "-o", "list.yaml"], 2, "the output 'list.yaml' exists"),
    (["predict", "demo", "absent.jpg"], 2, "image or folder 'absent.jpg' not found"),
    (["predict", "demo", "flat", "-o", "p.txt"], 2, "expected a name that ends in .csv, .json, .npz"),
    (["push", "flat/model.safetensors", "me/x", "--yes"], 2, "run folder 'flat/model.safetensors' not found"),
    (["info", "demo", "--img-size", "big"], 2, "--img-size: 'big' is no image size", "\nhint: "),
]


@pytest.fixture
def workplace(sparse_file, image_folder, tmp_path, monkeypatch, no_hub):
    """A folder of good and bad files as current directory, without network."""
    for name in "abc":
        (tmp_path / "three" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "three" / name / "1.png")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (96, 96), "red").save(tmp_path / "flat" / "1.png")
    (tmp_path / "folder-of-runs" / "one").mkdir(parents=True)
    (tmp_path / "folder-of-runs" / "one" / "model.safetensors").touch()
    (tmp_path / "junk.pth").write_text("no weights")
    (tmp_path / "typo.yaml").write_text("leanring_rate: 1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("lr: [1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_mistakes_get_one_clear_sentence_and_write_nothing(workplace, capsys):
    before = sorted(workplace.rglob("*"))
    for arguments, exit_code, *words in MISTAKES:
        assert run(arguments) == exit_code, arguments
        out, err = capsys.readouterr()
        assert out == "", arguments
        assert all(said in err for said in words), err
        assert re.fullmatch(r"error: [^\n]+\n(\nhint: [^\n]+\n)?", err), err
    assert sorted(workplace.rglob("*")) == before


def test_error_with_json_is_one_object(workplace, capsys):
    assert run(["eval", "absent.safetensors", "images", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)
    assert error.pop("schema_version") == 2
    assert error == {"error": "file 'absent.safetensors' not found", "hint": "check the path", "exit_code": 2}


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


def test_home_is_expanded_in_every_path(sparse_file, image_folder, monkeypatch, capsys):
    """The shell leaves `~` alone in --output=~/x and in environment variables."""
    monkeypatch.setenv("HOME", str(sparse_file.parent))
    sparse_file.rename(sparse_file.parent / "a.safetensors")
    monkeypatch.setenv("VITPRUNE_IMAGENET", f"~/{image_folder.name}")
    for data in (f"~/{image_folder.name}", "imagenet"):
        assert run(["eval", "~/a.safetensors", data, "-j", "0", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["num_images"] == 6
    image = f"~/{image_folder.name}/val/cat/0.png"
    assert run(["predict", "~/a.safetensors", image, "--output=~/out.csv"]) == 0
    assert (sparse_file.parent / "out.csv").is_file()
    assert run(["info", "~nobody-of-that-name/a.safetensors"]) == 2
    assert "file '~nobody-of-that-name/a.safetensors' not found" in capsys.readouterr().err


def test_what_was_left_out_and_how_images_were_read_is_said(sparse_file, image_folder, capsys):
    Image.fromarray(torch.full((40, 40), 257 * 99).numpy().astype("uint16")).save(image_folder / "val/cat/0.png")
    (image_folder / "val" / "cat" / "x.heic").write_bytes(b"x")
    assert run(["eval", str(sparse_file), str(image_folder), "-j", "0"]) == 0
    out, err = capsys.readouterr()
    assert "left out: 1 x .heic (Pillow cannot read it: convert it)" in err
    assert "1 image(s) of more than 8 bits, scaled to 8" in out
    assert run(["eval", str(sparse_file), str(image_folder), "-j", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["left_out"].startswith("1 x .heic")
    assert result["remarks"] == ["1 image(s) of more than 8 bits, scaled to 8"]


def test_exif_goes_into_the_file_and_is_refused_beside_it(image_folder, weights_file, tmp_path, capsys):
    arguments = [
        "sparsify",
        "test_vit",
        str(image_folder),
        "--checkpoint",
        str(weights_file),
        "--exif",
        "--device",
        "cpu",
    ]
    options = ["--recipe", "none", "-j", "0", "-o", str(tmp_path / "run"), "--force-labels"]
    assert run([*arguments, *options]) == 0
    file = str(tmp_path / "run" / "model.safetensors")
    capsys.readouterr()
    assert read_metadata(tmp_path / "run" / "model.safetensors").preprocessing.exif
    assert preprocessing(load_sparse(tmp_path / "run" / "model.safetensors")[0].model)["exif"]
    assert run(["eval", file, str(image_folder), "-j", "0", "--exif"]) == 2
    err = capsys.readouterr().err
    assert "says itself how images are prepared" in err
    assert "leave out --exif" in err
    assert run(["export", file, "--format", "timm"]) == 0, "timm refuses what it does not know in a folder"
    assert "timm does not turn images by their EXIF orientation" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info demo", "sparsify demo --dry-run", "compare demo"])
@pytest.mark.parametrize("asked", ["--keep 1", "--keep 1.0", "--tokens-left 1,1,1"])
def test_a_plan_that_prunes_nothing_is_refused(command, asked, capsys):
    assert run([*command.split(), *asked.split()]) == 2
    assert "1 prunes nothing: the dense model is what you have" in capsys.readouterr().err


def test_a_plan_that_starves_the_model_is_said(capsys):
    assert run(["info", "demo", "--keep", ".01", "--json"]) == 0
    captured = capsys.readouterr()
    assert "keep 0.01 leaves 1/1/1 of 196 patch tokens" in captured.err
    assert "accuracy will be poor" in captured.err
    assert json.loads(captured.out)["keep"] == 0.01
    assert run(["info", "demo", "--keep", ".3"]) == 0
    assert "accuracy will" not in capsys.readouterr().err
