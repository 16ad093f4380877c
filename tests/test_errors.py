"""Errors speak the language of who reads them: options on the command line, arguments in Python."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import vitprune
from vitprune.errors import VitpruneError, in_python


@pytest.mark.parametrize(
    ("command_line", "python"),
    [
        ("--align is 0, expected at least 1", "align is 0, expected at least 1"),
        ("try --align 8, or leave it out", "try align=8, or leave it out"),
        ("for example --prune-at 3,6,9", "for example prune_at=[3, 6, 9]"),
        ("give a weight file: --checkpoint FILE", "give a weight file: checkpoint=FILE"),
        ("use --device cpu", 'use device="cpu"'),
        ("such as --set lr=3e-4", "such as lr=3e-4"),
        ("train without: --no-labels", "train without: labels=False"),
        ("choose another --output or add --overwrite", "choose another output or add overwrite=True"),
        ("fewer --workers", "fewer num_workers"),
        ("-o model.onnx", "output=model.onnx"),
        ("try --model-kwargs global_pool=avg", 'try model_kwargs={"global_pool": "avg"}'),
        ("try --model-kwargs fc_norm=False", 'try model_kwargs={"fc_norm": False}'),
        ("choose one: --checkpoint-key teacher", 'choose one: checkpoint_key="teacher"'),
        ("vitprune sparsify --print-config lists them", "help(vitprune.Recipe) lists them"),
    ],
)
def test_options_are_said_as_arguments(command_line, python):
    error = VitpruneError(command_line, command_line)
    assert str(error) == f"{python}\nhint: {python}"
    assert error.message == error.hint == command_line


def test_what_only_the_command_line_can_say_of_tables_is_a_dataset_in_python():
    error = VitpruneError("no val part", "name its splits: --train-split TRAIN --val-split VAL")
    assert str(error) == "no val part\nhint: give its images as a torch Dataset instead"


ELSEWHERE = {
    "target_precision",
    "also",
    "nproc_per_node",
    "report_to",
}
"""Of checks that Python cannot meet: of the sweep, of trackers, of a command in a report."""


def test_every_option_that_an_error_names_is_an_argument_in_python():
    known = {*vitprune.Recipe.model_fields, *ELSEWHERE}
    for name in vitprune.__all__:
        if inspect.isfunction(value := getattr(vitprune, name)):
            known |= set(inspect.signature(value).parameters)
    root, texts = Path(vitprune.__file__).parent, []
    for file in root.rglob("*.py"):
        if "cli" not in file.parts and file.name != "errors.py":
            nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
            docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            constants = (n for n in nodes if isinstance(n, ast.Constant) and id(n) not in docstrings)
            texts += [(n.value, file.name) for n in constants if re.search(r"--[a-z]", str(n.value))]
    assert len(texts) > 20
    for text, file in texts:
        said = str(VitpruneError("", text))
        arguments = {in_python(option).partition("=")[0] for option in re.findall(r"--[a-z][a-z0-9-]*", text)} - {"set"}
        unknown = [name for name in arguments - known if re.search(rf"\b{name}\b", said)]
        assert not unknown, (file, said)
        assert "--" not in said, (file, said)


def test_no_error_names_an_option_in_python(make_vit, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    mistakes = [
        {"align": 0},
        {"keep": 70},
        {"keep": 0.5, "target_gmacs": 1},
        {"tokens_left": [2]},
        {"tokens_left": [0.5], "prune_at": [1, 2]},
        {"prune_at": [9, 3]},
        {"target_speedup": 0.5},
        {"checkpoint": "weights.pth"},
        {"recipe": "shorter"},
        {"lr": -1},
        {"stage": [3]},
        {"data": "demo", "device": "tpu"},
        {"data": "demo", "output": tmp_path / "run"},
    ]
    for mistake in mistakes:
        with pytest.raises(VitpruneError) as raised:
            vitprune.sparsify(make_vit(), **mistake)
        assert not re.search(r"--[a-z]|print_config", str(raised.value)), str(raised.value)


def test_a_keep_ratio_in_the_place_of_the_images_is_told_its_name(make_vit):
    with pytest.raises(VitpruneError) as raised:
        vitprune.sparsify(make_vit(), 0.7)
    assert str(raised.value) == "0.7 stands where the images go: a keep ratio is given as keep=0.7"
