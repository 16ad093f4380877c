"""Official DynamicViT checkpoints against a plain rewriting of what the original does at inference."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import vitprune
from vitprune.checkpoint.sparse_file import read_metadata
from vitprune.cli.app import run
from vitprune.errors import CheckpointError, UsageError
from vitprune.loading.dynamicvit import load_official
from vitprune.measure import count_macs, count_params

# family, width, depth, heads, what residuals are divided by, blocks of the stages
DEIT_TI = ("deit", 192, 12, 3, 1, (3, 6, 9))
DEIT_256 = ("deit", 256, 12, 4, 1, (3, 6, 9))
DEIT_S = ("deit", 384, 12, 6, 1, (3, 6, 9))
DEIT_B = ("deit", 768, 12, 12, 1, (3, 6, 9))
LVVIT_T = ("lvvit", 240, 12, 4, 1, (3, 6, 9))
LVVIT_S = ("lvvit", 384, 16, 6, 2, (4, 8, 12))
LVVIT_M = ("lvvit", 512, 20, 8, 2, (5, 10, 15))


def random_state(kind, size, num_classes, num_predictors=3, seed=0):
    """Random weights under the names and in the shapes of the authors' files."""
    family, width, depth, *_ = kind
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def put(name, *shape, centre=0.0, scale=0.1):
        state[name] = centre + scale * torch.randn(shape, generator=generator)

    def layer(name, out, *fan_in, bias=True):
        put(f"{name}.weight", out, *fan_in, scale=torch.Size(fan_in).numel() ** -0.5)
        if bias:
            put(f"{name}.bias", out)

    def norm(name, channels):
        put(f"{name}.weight", channels, centre=1.0)
        put(f"{name}.bias", channels)

    put("cls_token", 1, 1, width, scale=0.5)
    put("pos_embed", 1, 1 + (size // 16) ** 2, width, scale=0.5)
    if family == "deit":
        layer("patch_embed.proj", width, 3, 16, 16)
    else:
        for index, (channels, kernel) in enumerate([(3, 7), (64, 3), (64, 3)], start=1):
            layer(f"patch_embed.conv{index}", 64, channels, kernel, kernel, bias=False)
            norm(f"patch_embed.bn{index}", 64)
            put(f"patch_embed.bn{index}.running_mean", 64)
            state[f"patch_embed.bn{index}.running_var"] = 0.5 + torch.rand(64, generator=generator)
            state[f"patch_embed.bn{index}.num_batches_tracked"] = torch.tensor(7)
        layer("patch_embed.proj", width, 64, 8, 8)
    hidden = width * (4 if family == "deit" else 3)
    for block in (f"blocks.{index}" for index in range(depth)):
        norm(f"{block}.norm1", width)
        layer(f"{block}.attn.qkv", 3 * width, width, bias=family == "deit")
        layer(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        layer(f"{block}.mlp.fc1", hidden, width)
        layer(f"{block}.mlp.fc2", width, hidden)
    norm("norm", width)
    layer("head", num_classes, width)
    if family == "lvvit":
        layer("aux_head", num_classes, width)
    for index in range(num_predictors):
        predictor = f"score_predictor.{index}"
        norm(f"{predictor}.in_conv.0", width)
        layer(f"{predictor}.in_conv.1", width, width)
        layer(f"{predictor}.out_conv.0", width // 2, width)
        layer(f"{predictor}.out_conv.2", width // 4, width // 2)
        layer(f"{predictor}.out_conv.4", 2, width // 4)
    return state


def original(state, images, kind, keep, blocks=None):
    """Inference as the authors' code does it, from the weights alone: (logits, number of tokens of each block)."""
    family, _, depth, heads, skip_lam, usual = kind
    blocks = blocks or usual
    eps = 1e-6 if family == "deit" else 1e-5

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name, x, eps=eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    x = images
    if family == "lvvit":
        for index, (stride, padding) in enumerate([(2, 3), (1, 1), (1, 1)], start=1):
            x = F.conv2d(x, state[f"patch_embed.conv{index}.weight"], stride=stride, padding=padding)
            names = ("running_mean", "running_var", "weight", "bias")
            x = F.relu(F.batch_norm(x, *(state[f"patch_embed.bn{index}.{name}"] for name in names)))
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(x, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    num_patches = x.shape[1]
    x = torch.cat((state["cls_token"].expand(len(x), -1, -1), x), dim=1) + state["pos_embed"]
    seen = []
    for index in range(depth):
        if index in blocks:
            stage = blocks.index(index)
            predictor, patches = f"score_predictor.{stage}", x[:, 1:]
            hidden = F.gelu(linear(f"{predictor}.in_conv.1", norm(f"{predictor}.in_conv.0", patches, 1e-5)))
            local, shared = hidden.chunk(2, dim=-1)
            policy = torch.ones(*patches.shape[:2], 1)
            shared = (shared * policy).sum(dim=1, keepdim=True) / policy.sum(dim=1, keepdim=True)
            hidden = torch.cat((local, shared.expand_as(local)), dim=-1)
            hidden = F.gelu(linear(f"{predictor}.out_conv.0", hidden))
            hidden = F.gelu(linear(f"{predictor}.out_conv.2", hidden))
            score = linear(f"{predictor}.out_conv.4", hidden).log_softmax(dim=-1)[..., 0]  # theirs: 0 is keep
            best = score.argsort(dim=1, descending=True)[:, : int(num_patches * keep ** (stage + 1))]
            kept = torch.stack([image[rows] for image, rows in zip(patches, best, strict=True)])
            x = torch.cat((x[:, :1], kept), dim=1)
        seen.append(x.shape[1] - 1)
        block = f"blocks.{index}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        attention = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + linear(f"{block}.attn.proj", (attention @ v).transpose(1, 2).flatten(2)) / skip_lam
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))) / skip_lam
    x = norm("norm", x)
    logits = linear("head", x[:, 0])
    if family == "lvvit":
        logits = logits + 0.5 * linear("aux_head", x[:, 1:]).max(dim=1).values
    return logits, seen


def noise(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "size", "keep", "name", "num_tensors"),
    [
        (DEIT_TI, 96, 0.5, "deit_tiny_patch16_224", 182),
        (DEIT_256, 96, 0.7, "deit_256_patch16_224", 182),
        (LVVIT_T, 96, 0.6, "lvvit_t", 190),
        pytest.param(DEIT_S, 224, 0.7, "deit_small_patch16_224", 182, marks=pytest.mark.slow),
        pytest.param(DEIT_S, 224, 0.9, "deit_small_patch16_224", 182, marks=pytest.mark.slow),
        pytest.param(DEIT_B, 64, 0.7, "deit_base_patch16_224", 182, marks=pytest.mark.slow),
        pytest.param(LVVIT_S, 96, 0.7, "lvvit_s", 234, marks=pytest.mark.slow),
        pytest.param(LVVIT_M, 64, 0.8, "lvvit_m", 278, marks=pytest.mark.slow),
    ],
)
def test_answers_are_the_originals(kind, size, keep, name, num_tensors, tmp_path):
    state, images = random_state(kind, size, num_classes=10), noise(size)
    assert len(state) == num_tensors
    torch.save({"model": state}, tmp_path / "official.pth")
    sparse, metadata = load_official(tmp_path / "official.pth", keep)
    with torch.no_grad():
        expected, seen = original(state, images, kind, keep)
        dense, _ = original(state, images, kind, 1.0)
        torch.testing.assert_close(sparse(images), expected, rtol=0, atol=1e-4)
    assert (expected - dense).abs().mean() > 0.02 * dense.std(), "dropping tokens must matter, or this says nothing"
    assert not sparse.training
    assert metadata.model == name
    assert sparse.schedule.tokens_per_block() == tuple(seen)
    assert sparse.schedule.blocks == kind[-1]


def test_published_sizes_with_a_thousand_classes(tmp_path):
    torch.save(random_state(DEIT_S, 224, num_classes=1000), tmp_path / "official.pth")
    sparse, metadata = load_official(tmp_path / "official.pth", 0.7)
    assert count_params(sparse) == 22_774_414
    assert sparse.schedule.num_tokens == (137, 96, 67)
    assert metadata.schedule == "geometric"
    assert metadata.pruned == "drop"
    assert metadata.preprocessing.crop_pct == 0.9
    assert metadata.origin == {
        "source": "official.pth",
        "license": "mit",
        "origin_url": "https://github.com/raoyongming/DynamicViT",
    }


@pytest.fixture
def official(tmp_path):
    """A small file of official, and its weights."""
    state = random_state(LVVIT_T, 64, num_classes=2)
    torch.save({"model": state}, tmp_path / "official.pth")
    return tmp_path / "official.pth", state


def test_every_wrapping_is_read_and_only_a_namespace_let_in(official):
    path, state = official
    expected, _ = original(state, noise(64), LVVIT_T, 0.7)
    settings = argparse.Namespace(model="lvvit", ratio_weight=2.0, resume="", epoch=None, betas=(0.9, 0.99))
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    for content in (state, {"model": state, "args": settings, "epoch": 29}, {"state_dict": parallel, "args": settings}):
        torch.save(content, path)
        sparse, _ = load_official(path, 0.7)
        torch.testing.assert_close(sparse(noise(64)), expected, rtol=0, atol=1e-4)


def test_stages_may_be_chosen_one_for_each_predictor(official):
    path, state = official
    sparse, _ = load_official(path, 0.7, stages=[2, 5, 8])
    expected, _ = original(state, noise(64), LVVIT_T, 0.7, blocks=(2, 5, 8))
    torch.testing.assert_close(sparse(noise(64)), expected, rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match=r"prune_at=\[3, 6\] names 2 block\(s\), but '.*' has 3 predictors"):
        load_official(path, 0.7, stages=[3, 6])
    with pytest.raises(UsageError, match=r"blocks 0\.\.11"):
        load_official(path, 0.7, stages=[3, 6, 12])


def test_there_are_as_many_stages_as_predictors(tmp_path):
    for num_predictors, blocks in ((1, (6,)), (5, (2, 4, 6, 8, 10))):
        torch.save(random_state(LVVIT_T, 64, 2, num_predictors), tmp_path / "official.pth")
        sparse, _ = load_official(tmp_path / "official.pth", 0.8)
        assert sparse.schedule.blocks == blocks


# Refusals


def test_keep_must_be_given_and_a_ratio(official):
    for keep, message in ((0.0, "ratio is"), (1.5, "ratio is"), (float("nan"), "ratio is"), (1, "nothing to convert")):
        with pytest.raises(UsageError, match=message):
            load_official(official[0], keep)
    with pytest.raises(UsageError, match=r"official\.pth' does not say which share") as caught:
        load_official(official[0], None)
    assert "--keep 0.7" in caught.value.hint


def _without(state, *words):
    return {name: tensor for name, tensor in state.items() if not any(word in name for word in words)}


CHANGES = {
    "no predictors": (lambda state: _without(state, "score_predictor"), "no official DynamicViT checkpoint"),
    "unknown width": (lambda state: state | {"pos_embed": torch.zeros(1, 17, 320)}, "shapes are not those of"),
    "unknown depth": (lambda state: _without(state, "blocks.11."), "shapes are not those of"),
    "no stem": (lambda state: _without(state, "patch_embed"), "shapes are not those of"),
    "no positions": (lambda state: _without(state, "pos_embed"), "shapes are not those of"),
    "a tensor less": (lambda state: _without(state, "blocks.3.norm1.bias"), "'blocks.3.norm1.bias' is missing"),
    "a tensor more": (lambda state: state | {"surprise": torch.zeros(2)}, "'surprise' is (2,), expected none"),
    "a predictor in part": (lambda state: _without(state, "predictor.1.out_conv.2.bias"), "predictors.1.out_proj.2"),
    "a predictor missing": (lambda state: _without(state, "predictor.1."), "'predictors.1.in_proj.0.bias' is missing"),
    "wrong shape": (lambda state: state | {"norm.bias": torch.zeros(7)}, "'norm.bias' is (7,), expected (240,)"),
    "NaN": (lambda state: state | {"norm.bias": torch.full((240,), float("nan"))}, "NaN or infinite values"),
    "positions of no square": (lambda state: state | {"pos_embed": torch.zeros(1, 19, 240)}, "'pos_embed' is (1, 19"),
}


def test_what_is_not_official_is_refused_with_the_reason(official):
    path, state = official
    for change, (alter, message) in CHANGES.items():
        torch.save(alter(state), path)
        with pytest.raises(CheckpointError) as caught:
            load_official(path, 0.7)
        assert message in caught.value.message, change


# Commands


def test_convert_writes_a_file_for_all_other_commands(official, tmp_path, image_folder, monkeypatch, capsys):
    path, state = official
    monkeypatch.chdir(tmp_path)
    assert run(["convert", str(path), "--keep", "0.7", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "lvvit_t"
    assert [stage["num_tokens"] for stage in result["stages"]] == [11, 7, 5]
    assert result["output"] == "runs/lvvit_t-keep0.7/model.safetensors"
    sparse = vitprune.load(result["output"])
    expected, _ = original(state, noise(64), LVVIT_T, 0.7)
    torch.testing.assert_close(sparse(noise(64)), expected, rtol=0, atol=1e-4)
    assert result["sparse"]["gmacs"] == count_macs(sparse, (3, 64, 64)) / 1e9
    metadata = read_metadata(Path(result["output"]))
    assert metadata.model_dump(mode="json") == json.loads(Path(result["output"]).with_name("config.json").read_text())
    assert metadata.origin["source"] == "official.pth", "no path of the user's machine in files"
    assert metadata.origin["license"] == result["origin"]["license"] == "mit"
    assert run(["eval", result["output"], str(image_folder), "--device", "cpu", "-j", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["keep"], result["num_images"]) == ("lvvit_t", 0.7, 6)


def test_convert_does_not_overwrite_unasked(official, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["convert", str(official[0]), "--keep", "0.75", "-o", "there/model.safetensors"]
    (tmp_path / "there").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "there" / name).write_text("mine")
        assert run(arguments) == 2
        assert "exists" in capsys.readouterr().err
        assert (tmp_path / "there" / name).read_text() == "mine"
    assert run([*arguments, "--overwrite"]) == 0
    assert "12 before block 3, 9 before block 6, 6 before block 9" in capsys.readouterr().out
    vitprune.load("there/model.safetensors")
    for name in ("there", "model.pth"):
        assert run([*arguments[:-1], name]) == 2
        assert "is not the name of a .safetensors file" in capsys.readouterr().err


def test_other_commands_say_that_it_is_to_be_converted(official, capsys):
    for command in ("eval", "bench", "info", "compare", "sparsify"):
        assert run([command, str(official[0])]) == 2
        assert f"vitprune convert {official[0]} --keep 0.7" in capsys.readouterr().err
