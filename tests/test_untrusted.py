"""Files and settings from anywhere: whatever they hold, an error of ours or a model, quickly and within bounds."""

import contextlib
import io
import json
import struct
import tracemalloc
import zlib
from typing import NamedTuple

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import vitprune
from vitprune.checkpoint.metadata import METADATA_KEY
from vitprune.checkpoint.sparse_file import describe, read_metadata, save
from vitprune.cli.app import run
from vitprune.cli.options import parse_numbers, parse_ratios
from vitprune.data import Unreadable
from vitprune.data.images import ImageSet, open_image
from vitprune.errors import CheckpointError, UsageError, VitpruneError
from vitprune.loading.load import load_model
from vitprune.training.recipe import load_recipe

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


ARGUMENTS = st.sampled_from(["depth", "embed_dim", "num_heads", "img_size", "patch_size", "num_classes", "global_pool"])


class Saved(NamedTuple):
    """Tensors and header of a file; short in hypothesis' reports."""

    tensors: dict
    header: dict

    def __repr__(self):
        return "saved"


@pytest.fixture(scope="module")
def saved(make_sparse, tmp_path_factory):
    """A file of ours, its tensors and its header."""
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    sparse = make_sparse(num_classes=2)
    save(sparse, path, describe(sparse, class_names=("cat", "dog")))
    return Saved(load_file(path), json.loads(read_metadata(path).model_dump_json()))


def rewrite(saved, path, change):
    save_file(saved.tensors, path, metadata={METADATA_KEY: json.dumps(saved.header | change)})
    return path


# safetensors


def assert_damaged(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        vitprune.load(path)


@quick
@given(content=st.binary(max_size=200), length=st.integers(0, 2**64 - 1))
@example(content=b"{}", length=2**62)
def test_any_bytes_and_a_header_that_lies_about_its_length_are_an_error_of_ours(tmp_path, content, length):
    assert_damaged(tmp_path / "model.safetensors", content)
    assert_damaged(tmp_path / "model.safetensors", struct.pack("<Q", length) + content)


@settings(quick, max_examples=20)
@given(data=st.data(), arguments=st.dictionaries(ARGUMENTS | st.text(max_size=12), values, max_size=3))
def test_any_value_in_the_metadata_is_a_model_or_an_error_of_ours(saved, tmp_path, data, arguments):
    key = data.draw(st.sampled_from(sorted(saved.header)))
    for change in ({key: data.draw(values)}, {"model_args": arguments}):
        with contextlib.suppress(VitpruneError):
            vitprune.load(rewrite(saved, tmp_path / "model.safetensors", change))


REFUSED = [
    ({"schema_version": 99}, "schema_version"),
    ({"architecture": "hf-hub:someone/model"}, "architecture"),
    ({"architecture": "local-dir:/etc"}, "architecture"),
    ({"architecture": "no_such_model"}, "cannot build 'no_such_model'"),
    ({"architecture": "resnet18"}, "resnet18"),
    ({"model": "../../etc/passwd"}, "model"),
    ({"model": "hf-hub:someone/model"}, "model"),
    ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
    ({"model_args": {"pretrained": True}}, "pretrained"),
    ({"model_args": {"depth": "many"}}, "cannot build"),
    ({"keep": 7}, "keep"),
    ({"align": 0}, "align"),
    ({"stages": [{"block": 99, "ratio": 0.5, "num_tokens": 3}]}, "stages"),
    ({"stages": [{"block": 2, "ratio": 0.5, "num_tokens": 3000}]}, "stages"),
    ({"surprise": 1}, "surprise"),
]
HUGE = [
    ({"model_args": {"depth": 10**5}}, "depth"),
    ({"model_args": {"embed_dim": 10**9}}, "out of range"),
    ({"model_args": {"embed_dim": 10**5, "num_heads": 1}}, "does not fit"),
    ({"num_patches": 10**12}, "num_patches"),
    ({"class_names": ["x" * 10**5]}, "class_names"),
    ({"class_names": ["x"] * (9 * 2**20 // 5)}, "bytes long"),
]


def test_what_a_header_may_not_say(saved, tmp_path):
    tiny_crop = {"preprocessing": saved.header["preprocessing"] | {"crop_pct": 1e-6}}  # of an image of any size
    for change, message in (*REFUSED, *HUGE, (tiny_crop, "crop_pct")):
        path = rewrite(saved, tmp_path / "model.safetensors", change)
        if traced := (change, message) in HUGE:
            tracemalloc.start()
        with pytest.raises(VitpruneError, match=message) as caught:
            vitprune.load(path)
        if traced:
            assert tracemalloc.get_traced_memory()[1] < 500 * 2**20
            tracemalloc.stop()
        assert any(word in caught.value.message for word in ("model.safetensors", "cannot build", "stages"))
    vitprune.load(rewrite(saved, path, {}))  # the bounds leave room for what is real


def test_odd_rows_of_accuracy_are_passed_over(saved, tmp_path):
    for rows in ([1, {"top1_pct": 3.0}, {"keep": 0.5, "top1_pct": 70.0}], {"keep": 0.5}, "none"):
        header = {"keep": 0.7, "keep_range": [0.5, 0.9], "accuracy": {"keeps": rows}}
        loaded = load_model(str(rewrite(saved, tmp_path / "model.safetensors", header)))
        loaded.open_at(0.6)
        assert loaded.metadata.accuracy is None
    assert loaded.keep == 0.6


def test_names_with_markup_and_escapes_are_shown_as_they_are(saved, tmp_path, image_folder, capsys):
    for folder, name in (("cat", "[red]a[/b]"), ("dog", "b\x1b[2J\x07")):
        (image_folder / "val" / folder).rename(image_folder / "val" / name.replace("/", "|"))
    names = ["[red]a[|b]", "b\x1b[2J\x07"]
    path = rewrite(saved, tmp_path / "model.safetensors", {"class_names": names})
    assert run(["eval", str(path), str(image_folder), "--per-class", "--device", "cpu", "-j", "0"]) == 0
    shown = capsys.readouterr().out
    assert "[red]a[|b]" in shown
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown


# images


def test_a_image_bomb_is_unreadable_and_takes_no_memory(tmp_path):
    """A PNG that says 50,000 x 50,000 pixels in a few hundred bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    tracemalloc.start()
    sample = ImageSet([tmp_path / "bomb.png"], [0], open_image)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(sample, Unreadable)
    assert sample.reason == "it has more than 178,956,970 pixels"
    assert peak < 50 * 2**20


@quick
@given(content=st.binary(max_size=300), cut=st.integers(0, 300))
def test_any_bytes_are_a_image_or_unreadable(tmp_path, content, cut):
    real = io.BytesIO()
    Image.new("RGB", (16, 16)).save(real, "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(real.getvalue()[:cut] + content)
    sample = ImageSet([path], [0], open_image)[0]
    assert isinstance(sample, (tuple, Unreadable))


# settings


@quick
@given(
    content=st.dictionaries(st.sampled_from(["lr", "steps", "batch_size", "weights", "tau", "x"]), values, max_size=3)
)
def test_any_recipe_is_settings_or_an_error_of_ours(tmp_path, content):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    with contextlib.suppress(UsageError):
        assert load_recipe(str(tmp_path / "r.yaml")).lr > 0


def test_a_recipe_that_would_run_code_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("!!python/object/apply:os.system ['touch hacked']")
    with pytest.raises(UsageError, match="not YAML"):
        load_recipe(str(tmp_path / "r.yaml"))


@quick
@given(text=st.text(max_size=20))
def test_any_text_of_an_option_is_a_value_or_an_error_of_ours(text):
    for parse in (parse_numbers, parse_ratios):
        with contextlib.suppress(UsageError):
            parse(text, "--option")
