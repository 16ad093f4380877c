"""The table that `vitprune models` answers from: it says what building says, and needs no torch."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import timm

import vitprune
from vitprune.loading import architectures
from vitprune.loading.architectures import (
    cache_folder,
    describe_all,
    known_names,
    match_names,
    shipped_table,
    table_text,
)
from vitprune.loading.names import describe_architecture
from vitprune.schedule import Sparsity
from vitprune.training.recipe import load_recipe

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PLAN = load_recipe("short").plan_defaults
SAMPLE = ("deit_tiny_patch16_224", "test_vit", "lvvit_t", "cait_xxs24_224", "eva02_tiny_patch14_224", "test_resnet")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and the names of what is built."""
    built = []

    def build(name, sparsity):
        built.append(name)
        return describe_architecture(name, sparsity)

    monkeypatch.setattr(architectures, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("vitprune.loading.names.describe_architecture", build)
    return tmp_path / "cache", built


def without(names, monkeypatch):
    """A table in which some architectures are not."""
    table = shipped_table()
    rows = {name: row for name, row in table.rows.items() if name not in names}
    monkeypatch.setattr(architectures, "shipped_table", lambda: table._replace(rows=rows))


@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_says_what_building_says(name):
    assert shipped_table().rows[name] == describe_architecture(name, PLAN)


def test_the_table_is_of_this_timm_and_whole():
    if version("timm") != shipped_table().timm:
        pytest.skip(f"the table is of timm {shipped_table().timm}, installed is {version('timm')}")
    assert list(shipped_table().rows) == timm.list_models()
    stated = re.search(r"timm\s+([\d.]+):\s+(\d+)\s+of\s+its\s+([\d,]+)\s+architectures", README)
    timms = [row for row in shipped_table().rows.values() if row["family"] != "lvvit_model"]
    assert int(stated[2]) == sum(row["reason"] is None for row in timms)
    assert int(stated[3].replace(",", "")) == len(timms)


def test_the_text_of_the_table_comes_back(monkeypatch, tmp_path):
    rows = [shipped_table().rows[name] for name in SAMPLE]
    (tmp_path / "table.json").write_text(table_text("1.2.3", rows))
    monkeypatch.setattr(architectures, "TABLE", tmp_path / "table.json")
    found = shipped_table.__wrapped__()
    assert found.timm == "1.2.3"
    assert list(found.rows.values()) == rows


def test_nothing_is_built_of_what_the_table_has(cache):
    assert len(describe_all(match_names())) > 1000
    assert vitprune.list_models("deit_tiny*") == ["deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"]
    assert not cache[1]
    assert not cache[0].exists()


def test_what_another_timm_adds_is_built_once(cache, monkeypatch):
    folder, built = cache
    without({"test_vit", "test_resnet"}, monkeypatch)
    rows = describe_all(["test_vit", "deit_tiny_patch16_224", "test_resnet"])
    assert built == ["test_vit", "test_resnet"]
    assert rows[0] == describe_architecture("test_vit", PLAN)
    assert [row["model"] for row in rows] == ["test_vit", "deit_tiny_patch16_224", "test_resnet"]
    assert describe_all(["test_vit", "test_resnet"]) == [rows[0], rows[2]]
    assert len(built) == 2
    (file,) = folder.iterdir()
    assert version("timm") in file.name
    for content in ("{", "[1]", '{"a": 1}'):
        file.write_text(content)
        assert describe_all(["test_vit"]) == rows[:1]
    assert len(built) == 5


def test_of_another_plan_only_what_can_be_pruned_is_built(cache):
    _, built = cache
    half = Sparsity(0.5)
    rows = describe_all(["test_resnet", "test_vit"], half)
    assert built == ["test_vit"]
    assert rows[1]["keep"] == 0.5
    describe_all(["test_vit"], half)
    describe_all(["test_vit"], Sparsity(0.6))
    assert built == ["test_vit", "test_vit"]


def test_a_cache_that_cannot_be_written_does_no_harm(cache, monkeypatch, tmp_path):
    _, built = cache
    (tmp_path / "file").touch()
    monkeypatch.setattr(architectures, "cache_folder", lambda: tmp_path / "file" / "below")
    for _ in range(2):
        assert describe_all(["test_vit"], Sparsity(0.5))[0]["keep"] == 0.5
    assert len(built) == 2


def test_the_cache_is_where_the_system_has_its_caches(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/mine")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    for platform, folder in (
        ("linux", "/var/mine/vitprune"),
        ("darwin", "/home/me/Library/Caches/vitprune"),
        ("win32", "/local/vitprune/Cache"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_folder().as_posix() == folder
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().as_posix() == "/home/me/.cache/vitprune"


def test_models_registered_by_others_are_listed(monkeypatch):
    monkeypatch.setattr(timm, "list_models", lambda *args: ["my_own_vit", "test_vit"])
    assert known_names() == ["my_own_vit", "test_vit"]


@pytest.mark.parametrize("asks", ["vitprune.list_models()", "run(['models', '--json'])", "run(['models', 'deit'])"])
def test_the_list_needs_no_torch(asks):
    if version("timm") != shipped_table().timm:
        pytest.skip("of another timm the names are timm's to say")
    code = (
        f"import sys, vitprune; from vitprune.cli.app import run; {asks}; print({{'torch', 'timm'}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    if "json" in asks:
        assert json.loads(done.stdout[: done.stdout.rindex("}") + 1])["num_supported"] > 300
