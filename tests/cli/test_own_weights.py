"""Weight files and arguments of one's own, on the command line and in Python: what is understood is said."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitprune
from vitprune.cli.app import run
from vitprune.cli.model_options import parse_model_kwargs, spread_model_kwargs
from vitprune.errors import UsageError


@pytest.fixture
def training_file(make_vit, tmp_path):
    """A checkpoint of a training script: fp16, with an average beside the last weights."""
    state = {name: tensor.half() for name, tensor in make_vit(num_classes=2).state_dict().items()}
    content = {
        "state_dict": {f"module.{name}": 1.5 * tensor for name, tensor in state.items()},
        "state_dict_ema": state,
    }
    torch.save(content, tmp_path / "last.pth.tar")
    save_file(state, tmp_path / "plain.safetensors")
    return tmp_path / "last.pth.tar"


def figures(arguments, capsys):
    assert run(arguments) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_eval_says_which_weights_it_took_and_gives_the_plain_figure(training_file, image_folder, capsys):
    common = ["eval", "test_vit", str(image_folder), "-j", "0", "--json", "--checkpoint"]
    plain, said = figures([*common, str(training_file.with_name("plain.safetensors"))], capsys)
    assert "are fp16, converted to fp32" in said
    average, said = figures([*common, str(training_file)], capsys)
    assert "taken: 'state_dict_ema'" in said
    assert average == plain
    last, said = figures([*common, str(training_file), "--checkpoint-key", "state_dict"], capsys)
    assert "taken" not in said
    assert last["num_images"] == plain["num_images"]


def test_sparsify_says_it_too_and_the_file_knows_its_set(training_file, image_folder, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["sparsify", "test_vit", "--checkpoint", str(training_file), "--checkpoint-key", "state_dict"]
    arguments += ["--model-kwargs", "qk_norm=False", "pool_include_prefix=true", "--recipe", "none", "-o", str(out)]
    assert run(arguments) == 0, capsys.readouterr().err
    capsys.readouterr()
    header = json.loads((out / "config.json").read_text())
    assert header["origin"]["checkpoint_key"] == "state_dict.module"
    assert header["model_args"]["pool_include_prefix"] is True
    weights = load_file(out / "model.safetensors")
    saved = torch.load(training_file)["state_dict"]["module.norm.weight"]
    assert torch.equal(weights["norm.weight"], saved.float())
    again = ["eval", str(out), str(image_folder), "-j", "0", "--json", "--checkpoint", str(training_file)]
    result, said = figures(again, capsys)
    assert "that MODEL was made from are taken: 'state_dict.module'" in said
    assert result["delta"]["kl"] < 10


def test_arguments_reach_every_command_that_builds_a_model(capsys):
    plain, _ = figures(["info", "deit_tiny", "--json"], capsys)
    for arguments in (["depth=4", "embed_dim=96"], ["depth=4", "--model-kwargs", "embed_dim=96"]):
        small, _ = figures(["info", "deit_tiny", "--json", "--model-kwargs", *arguments], capsys)
        assert (plain["depth"], small["depth"]) == (12, 4)
        assert small["dense"]["params_m"] < plain["dense"]["params_m"] / 4
    bench = ["bench", "test_vit", "-b", "1", "--seconds", "0", "--json", "--keep", "0.5"]
    bench += ["--model-kwargs", "patch_size=32"]
    rows, _ = figures(bench, capsys)
    assert rows["rows"][0]["gmacs"] < figures([*bench[:-2]], capsys)[0]["rows"][0]["gmacs"]


def test_python_takes_the_same_and_says_the_same(training_file, image_folder, capsys):
    how = {"checkpoint": training_file, "checkpoint_key": "state_dict_ema", "model_kwargs": {"qk_norm": False}}
    result = vitprune.evaluate("test_vit", str(image_folder), num_workers=0, **how)
    assert result["num_images"] == 6
    assert "are fp16, converted to fp32" in capsys.readouterr().err
    vitprune.evaluate("test_vit", str(image_folder), num_workers=0, progress=False, **how)
    assert capsys.readouterr().err == ""
    sparse = vitprune.sparsify("test_vit", keep=0.5, recipe="none", progress=False, **how)
    assert not sparse.model.blocks[0].attn.qkv.weight.isnan().any()


def test_values_are_pythons_or_text():
    given = ["a=1", "b=.5", "c=False", "d=none", "e=avg", "f=(1, 2)", "g=[1,2]", "h='x=y'", "i = true"]
    assert parse_model_kwargs(given) == {
        "a": 1,
        "b": 0.5,
        "c": False,
        "d": None,
        "e": "avg",
        "f": (1, 2),
        "g": [1, 2],
        "h": "x=y",
        "i": True,
    }
    for wrong in ("a", "=1", "a=", "a-b=1"):
        with pytest.raises(UsageError, match="expected KEY=VALUE"):
            parse_model_kwargs([wrong])


def test_several_pairs_follow_one_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c=d").mkdir()
    given = ["eval", "m", "--model-kwargs", "a=1", "b=2", "c=d", "--json", "e=1"]
    once = "--model-kwargs"
    assert spread_model_kwargs(given) == ["eval", "m", once, "a=1", once, "b=2", "c=d", "--json", "e=1"]
