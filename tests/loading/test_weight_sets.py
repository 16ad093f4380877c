"""One reader for every container: prefixes, wrappers, shards and number formats give the same model, or an error."""

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from vitprune.errors import CheckpointError, UsageError
from vitprune.loading.load import load_model

WRAPPINGS = {
    "plain": "",
    "DataParallel": "module.",
    "compiled": "_orig_mod.",
    "compiled DataParallel": "_orig_mod.module.",
    "Lightning": "state_dict.model.",
    "Lightning, compiled": "state_dict.model._orig_mod.",
    "net": "net.",
    "backbone": "backbone.",
    "model": "model.",
    "model_state_dict": "model_state_dict.",
    "teacher": "teacher.backbone.",
    "EMA alone": "state_dict_ema.module.",
    "three deep": "checkpoint.model.net.",
}


@pytest.fixture(scope="module")
def model(make_vit):
    return make_vit(num_classes=2)


def written(path, sets):
    """A file with tensors under dotted prefixes: containers in a pickle, one flat table in safetensors."""
    flat = {prefix + name: tensor.clone() for prefix, state in sets.items() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        save_file(flat, path)
        return path
    content = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 2)}}, "param_groups": []}}
    for prefix, state in sets.items():
        wrapper, _, rest = prefix.partition(".")
        if wrapper in ("", "module", "_orig_mod", "net", "backbone"):
            content |= {prefix + name: tensor for name, tensor in state.items()}
        else:
            content.setdefault(wrapper, {}).update({rest + name: tensor for name, tensor in state.items()})
    torch.save(content, path)
    return path


def scaled(state, factor):
    return {name: factor * tensor for name, tensor in state.items()}


def same(loaded, model, images):
    with torch.no_grad():
        return torch.equal(loaded.model(images), model(images))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_prefixes_and_wrappers_are_read_alike(wrapping, suffix, model, make_images, tmp_path):
    file = written(tmp_path / f"weights{suffix}", {WRAPPINGS[wrapping]: model.state_dict()})
    loaded = load_model("test_vit", checkpoint=file)
    assert same(loaded, model, make_images(model))
    assert loaded.understood == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_average_is_taken_and_said(suffix, model, make_images, tmp_path):
    images, state = make_images(model), model.state_dict()
    for average in ("state_dict_ema.", "model_ema.module.", "ema."):
        sets = {"state_dict.module.": scaled(state, 1.5), average: state}
        file = written(tmp_path / f"weights{suffix}", sets)
        loaded = load_model("test_vit", checkpoint=file)
        assert same(loaded, model, images)
        (line,) = loaded.understood
        assert f"taken: '{average.rstrip('.')}'" in line
        assert "'state_dict" in line
        assert loaded.origin["checkpoint_key"] == average.rstrip(".")
        other = load_model("test_vit", checkpoint=file, checkpoint_key="state_dict")
        assert not same(other, model, images)


def test_several_sets_are_refused_with_the_choices(model, make_images, tmp_path):
    state = model.state_dict()
    file = written(tmp_path / "w.pth", {"student.": scaled(state, 1.5), "teacher.": state})
    with pytest.raises(CheckpointError, match=r"several sets of weights .*'student', 'teacher'") as caught:
        load_model("test_vit", checkpoint=file)
    assert "--checkpoint-key student" in caught.value.hint
    assert same(load_model("test_vit", checkpoint=file, checkpoint_key="teacher"), model, make_images(model))
    with pytest.raises(UsageError, match="no weights of the model under 'ema'") as caught:
        load_model("test_vit", checkpoint=file, checkpoint_key="ema")
    assert "'student', 'teacher'" in caught.value.hint
    with pytest.raises(UsageError, match="there is no checkpoint"):
        load_model("test_vit", checkpoint_key="teacher")


def test_copies_of_one_set_are_no_choice(model, make_images, tmp_path):
    file = written(tmp_path / "w.pth", {"model.": model.state_dict(), "state_dict.": model.state_dict()})
    loaded = load_model("test_vit", checkpoint=file)
    assert same(loaded, model, make_images(model))
    assert loaded.understood == []


def test_tensors_beside_the_model_are_named(model, make_images, tmp_path):
    loss = {"criterion.weight": torch.ones(2)}
    file = written(tmp_path / "w.safetensors", {"model.": model.state_dict(), "": loss})
    loaded = load_model("test_vit", checkpoint=file)
    assert same(loaded, model, make_images(model))
    assert "1 tensors beside it: criterion.weight" in loaded.understood[0]


def test_missing_and_unexpected_tensors_stay_errors(model, tmp_path):
    state = dict(model.state_dict())
    for prefix in ("", "state_dict.model."):
        changed = {name: tensor for name, tensor in state.items() if name != "blocks.1.norm1.bias"}
        with pytest.raises(CheckpointError, match=r"blocks\.1\.norm1\.bias"):
            load_model("test_vit", checkpoint=written(tmp_path / "w.pth", {prefix: changed}))
        file = written(tmp_path / "w.pth", {prefix: state | {"blocks.9.scale": torch.ones(2)}})
        with pytest.raises(CheckpointError, match=r"blocks\.9\.scale"):
            load_model("test_vit", checkpoint=file)
        headless = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        with pytest.raises(CheckpointError, match=r"head\.weight"):
            load_model("test_vit", checkpoint=written(tmp_path / "w.pth", {prefix: headless}))


def test_names_of_no_model_are_shown(tmp_path):
    sets = {"state_dict.": {"encoder.conv.weight": torch.ones(2, 2)}, "extra.": {"layer.bias": torch.ones(2)}}
    with pytest.raises(CheckpointError, match=r"'state_dict' with encoder\.conv\.weight; 'extra' with layer\.bias"):
        load_model("test_vit", checkpoint=written(tmp_path / "w.pth", sets))


@pytest.mark.parametrize(
    ("dtype", "name", "tolerance"),
    [
        (torch.float16, "fp16", 1e-2),
        (torch.bfloat16, "bf16", 1e-1),
        (torch.float8_e4m3fn, "fp8", 1.0),
        (torch.float64, "fp64", 1e-6),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_number_formats_become_fp32_and_are_said(dtype, name, tolerance, suffix, model, make_images, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    loaded = load_model("test_vit", checkpoint=written(tmp_path / f"w{suffix}", {"module.": state}))
    assert all(parameter.dtype == torch.float32 for parameter in loaded.model.parameters())
    assert f"are {name}, converted to fp32" in loaded.understood[0]
    images = make_images(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), model(images), rtol=0, atol=tolerance)


def test_quantised_and_infinite_weights_are_refused(model, tmp_path):
    state, name = model.state_dict(), "blocks.0.mlp.fc1.weight"
    for wrong, message in (
        (state[name].to(torch.int8), "in int8, not in floating-point numbers"),
        (torch.full_like(state[name], float("nan")).to(torch.float8_e4m3fn), "NaN or infinite"),
        (torch.full_like(state[name], float("inf")).half(), "NaN or infinite"),
        (state[name].to_sparse(), "quantised or sparse"),
    ):
        torch.save(state | {name: wrong}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=message):
            load_model("test_vit", checkpoint=tmp_path / "w.pth")


def shards(folder, state, suffix):
    """A state in two files and their index."""
    folder.mkdir(exist_ok=True)
    names, stem = list(state), "model" if suffix == "safetensors" else "pytorch_model"
    places = {}
    for number, part in enumerate((names[:20], names[20:]), start=1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        tensors = {name: state[name].clone() for name in part}
        save_file(tensors, folder / file) if suffix == "safetensors" else torch.save(tensors, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_by_their_index_and_their_folder(suffix, model, make_images, tmp_path):
    index = shards(tmp_path / "sharded", {f"model.{k}": v for k, v in model.state_dict().items()}, suffix)
    for path in (index, index.parent):
        assert same(load_model("test_vit", checkpoint=path), model, make_images(model))
    with pytest.raises(UsageError, match="holds weights alone"):
        load_model(str(index))


def test_faulty_indices_name_what_is_wrong(model, tmp_path):
    index = shards(tmp_path / "sharded", model.state_dict(), "safetensors")
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    for places, message in (
        ({**content["weight_map"], first: "other.safetensors"}, "shard 'other.safetensors' of .* not found"),
        ({**content["weight_map"], first: "../weights.safetensors"}, "no file beside it"),
        ({**content["weight_map"], "more": content["weight_map"][first]}, "holds 'more', and it does not"),
        ({}, "no 'weight_map'"),
        ([], "no 'weight_map'"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(CheckpointError, match=message):
            load_model("test_vit", checkpoint=index)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_model("test_vit", checkpoint=index)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_model("test_vit", checkpoint=tmp_path / "empty")


def trained(path, dense, **args):
    torch.save({"state_dict": dense.state_dict(), "args": argparse.Namespace(**args)}, path)
    return path


def test_a_training_file_says_how_its_images_were_prepared(model, tmp_path):
    args = {"mean": [0.1, 0.2, 0.3], "std": (0.4, 0.5, 0.6), "crop_pct": 0.8, "interpolation": "", "crop_mode": None}
    file = trained(tmp_path / "w.pth", model, model="test_vit", lr=0.1, **args)
    loaded = load_model("test_vit", checkpoint=file)
    assert loaded.model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert loaded.model.pretrained_cfg["std"] == (0.4, 0.5, 0.6)
    assert loaded.model.pretrained_cfg["crop_pct"] == 0.8
    assert loaded.understood == [
        "'w.pth' says how its images were prepared: mean 0.1,0.2,0.3, std 0.4,0.5,0.6, crop_pct 0.8"
    ]
    given = load_model("test_vit", checkpoint=file, preprocessing={"crop_pct": 1.0})
    assert given.model.pretrained_cfg["crop_pct"] == 1.0, "an option wins"
    for wrong in (
        {"mean": [1] * 2},
        {"std": [0, 1, 1]},
        {"crop_pct": "a"},
        {"interpolation": "sinc"},
        {"crop_mode": 3},
    ):
        with pytest.raises(CheckpointError, match=next(iter(wrong))):
            load_model("test_vit", checkpoint=trained(tmp_path / "w.pth", model, **wrong))


def test_arguments_of_a_training_file_that_timm_does_not_have_are_refused(model, tmp_path):
    file = trained(tmp_path / "w.pth", model, model_kwargs={"fc_nrm": False})
    with pytest.raises(CheckpointError, match=r"says how its model was built: .*fc_nrm.* no such argument"):
        load_model("test_vit", checkpoint=file)


def test_odd_tensors_are_refused_without_a_traceback(model, tmp_path):
    """timm's filters index shapes before torch compares them."""
    state = model.state_dict()
    for name in ("pos_embed", "patch_embed.proj.weight", "head.weight", "blocks.0.norm1.bias"):
        for odd in (torch.zeros(()), torch.zeros(0), torch.zeros(1, 2, 3, 4, 5)):
            torch.save(state | {name: odd}, tmp_path / "w.pth")
            with pytest.raises(CheckpointError):
                load_model("test_vit", checkpoint=tmp_path / "w.pth")


def test_a_training_file_of_another_architecture_is_refused(model, tmp_path):
    file = trained(tmp_path / "w.pth", model, model="vit_tiny_patch16_224")
    with pytest.raises(UsageError, match="was trained as 'vit_tiny_patch16_224', and MODEL is 'test_vit'"):
        load_model("test_vit", checkpoint=file)
    assert load_model("test_vit", checkpoint=trained(tmp_path / "w.pth", model, model="my_own_vit")).understood == []


def test_a_training_file_says_of_which_tag_its_preprocessing_is(make_vit, tmp_path):
    model = make_vit("vit_base_patch16_224", depth=1, embed_dim=64, num_heads=2)
    file = trained(tmp_path / "w.pth", model, model="vit_base_patch16_224.mae")
    sizes = {"depth": 1, "embed_dim": 64, "num_heads": 2}
    loaded = load_model("vit_base_patch16_224", checkpoint=file, model_kwargs=sizes)
    assert loaded.model.pretrained_cfg["mean"] == timm.get_pretrained_cfg("vit_base_patch16_224.mae").mean
    assert "began as vit_base_patch16_224.mae" in loaded.understood[0]
    asked = load_model("vit_base_patch16_224.augreg_in21k", checkpoint=file, model_kwargs=sizes)
    assert asked.model.pretrained_cfg["mean"] == timm.get_pretrained_cfg("vit_base_patch16_224.augreg_in21k").mean


def test_a_training_file_says_how_its_model_pools(make_vit, make_images, tmp_path):
    """Averaging before the norm has the tensors of a class token's model: only the options of the training tell."""
    model = make_vit(num_classes=2, global_pool="avg", fc_norm=False)
    for args in (
        {"gp": "avg", "model_kwargs": {"fc_norm": False}},
        {"model_kwargs": {"global_pool": "avg", "fc_norm": False}},
    ):
        loaded = load_model("test_vit", checkpoint=trained(tmp_path / "w.pth", model, **args))
        assert same(loaded, model, make_images(model))
        assert "built with global_pool=avg fc_norm=False" in loaded.understood[0]
