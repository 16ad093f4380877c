"""Every architecture of the installed timm whose class has an adapter works, and README counts them."""

import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch
from agreement import calm_attention

from vitprune.backbones import why_not
from vitprune.backbones.registry import ADAPTERS, NO_SEQUENCE
from vitprune.loading.architectures import count_weights, shipped_table
from vitprune.loading.names import describe_architecture
from vitprune.loading.task import embedding_width, num_outputs, task_of
from vitprune.model import attach_as
from vitprune.schedule import Sparsity
from vitprune.training.recipe import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
OWN = ("lvvit_model",)
"""Modules of this project that register models with timm."""


def small(name):
    """Arguments that shrink an architecture in depth, width and image size, and nothing else."""
    arguments = {"depth": 4, "embed_dim": 64, "num_heads": 2, "num_classes": 5, "img_size": 96}
    if "patch14" in name or name.startswith("deepseek"):
        arguments["img_size"] = 84
    if name.startswith(("vitamin", "vit_base_mci")):  # the width is that of a convolutional stem
        del arguments["embed_dim"], arguments["num_heads"]
    if "giant_patch14" in name:  # a fractional ratio of a small width is not even, which their MLP needs
        arguments["mlp_ratio"] = 4
    if "sapiens2" in name:
        arguments["num_kv_heads"] = (2, 1, 1, 2)
    return arguments


class _Asked(Exception):
    """Carries the class that an architecture would have been built of."""


@pytest.fixture(scope="module")
def classes():
    """The class of every architecture, asked of timm's own entry points, without building any."""

    found, build = {}, timm.models.build_model_with_cfg

    def ask(model_cls, variant, *args, **kwargs):
        if name.startswith("vit_") and family(model_cls) == "resnet":  # the stem of a hybrid
            return build(model_cls, variant, *args, **kwargs)
        raise _Asked(model_cls)

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith(("timm.models.", "vitprune.")) and hasattr(module, "build_model_with_cfg"):
                patch.setattr(module, "build_model_with_cfg", ask)
        for name in timm.list_models():
            with pytest.raises(_Asked) as asked:
                timm.create_model(name)
            found[name] = asked.value.args[0]
    return found


@pytest.fixture(scope="module")
def verdicts(classes):
    """Why not, by name; None of those that are supported. Of the classes that have an adapter each is built, small."""
    found, seen = dict.fromkeys(classes, "no adapter"), {}
    for name, cls in classes.items():
        if cls in ADAPTERS:
            torch.manual_seed(0)
            model = timm.create_model(name, **small(name))
            calm_attention(model)
            size = small(name)["img_size"]
            key = size, signature(model)
            if key not in seen:
                seen[key] = why_not(model) or check(model, size) or check_encoder(model, name, size)
            found[name] = seen[key]
    return found


def signature(model):
    """What a model computes, but for its weights: made small, many architectures are one."""
    plain = (bool, int, float, str, tuple, type(None))
    modules = [
        (name, type(module), *sorted((key, str(value)) for key, value in vars(module).items() if type(value) in plain))
        for name, module in model.named_modules()
    ]
    return (*modules, *((name, tensor.shape) for name, tensor in model.state_dict().items()))


def family(cls):
    return cls.__module__.rpartition(".")[2]


def check(model, size):
    """None if the masked and the gathered pass agree, tokens dropped or merged; the rest is test_contract's."""
    images = torch.randn(2, 3, size, size)
    for pruned in ("drop", "merge"):
        sparse = attach_as(model, Sparsity(0.6, pruned=pruned)).eval()  # of 9 patches few are left
        with torch.no_grad():
            gathered, masked = sparse(images), sparse.forward_masked(images).logits
        if not torch.allclose(gathered, masked, rtol=1e-3, atol=1e-4):
            return "broken"
    return None


def check_encoder(model, name, size):
    """None if the same holds without a head, and timm builds such a model of the same tensors."""
    model.reset_classifier(0)
    with torch.device("meta"):
        built = timm.create_model(name, **{**small(name), "num_classes": 0})
    if built.state_dict().keys() != model.state_dict().keys():
        return "broken"
    with torch.no_grad():
        wide = model(torch.zeros(1, 3, size, size)).shape == (1, embedding_width(model))
    return check(model, size) if wide else "broken"


def test_every_architecture_with_an_adapter_works(classes, verdicts):
    assert not [name for name, verdict in verdicts.items() if verdict == "broken"]
    assert {family(cls) for cls in ADAPTERS} <= {family(cls) for cls in classes.values()}


def test_readme_states_the_counts(classes, verdicts):
    stated = re.search(r"timm\s+([\d.]+):\s+(\d+)\s+of\s+its\s+([\d,]+)\s+architectures", README)
    assert stated, "README says how many architectures are supported, of which timm"
    if stated[1] != version("timm"):
        pytest.skip(f"README counts timm {stated[1]}, installed is {version('timm')}")
    timms = [name for name, cls in classes.items() if family(cls) not in OWN]
    supported = Counter(family(classes[name]) for name in timms if verdicts[name] is None)
    assert int(stated[2]) == supported.total(), sorted(supported.items())
    assert int(stated[3].replace(",", "")) == len(timms)


def test_auto_finds_the_task_of_every_pretrained_tag_and_it_can_be_made_sparse():
    """The model as its weights need it, but for its depth: what is said of it is what its output is."""
    found, plan, shapes = Counter(), load_recipe("short").plan_defaults, {}
    for row in shipped_table().rows.values():
        if row["reason"] is not None:
            continue
        for tag in timm.list_pretrained(f"{row['model']}.*"):
            with torch.device("meta"):
                few = {key: value[:2] for key, value in small(tag).items() if key == "num_kv_heads"}
                shallow = {"depth": 2} | few
                model = timm.create_model(tag, **shallow)
                key = size, _ = model.pretrained_cfg["input_size"], signature(model)
                if key not in shapes:
                    shapes[key] = attach_as(model, plan).eval()(torch.zeros(1, *size)).shape
            task, said = task_of(model)
            assert tag.partition(".")[2] in row["weights"][task], tag
            assert shapes[key] == (1, num_outputs(model) or embedding_width(model)), tag
            if task == "embedding":
                assert f"embedding of {shapes[key][1]} numbers" in said, tag
            found[task] += 1
    assert found == count_weights(list(shipped_table().rows.values()))["by_task"]


def test_the_table_of_architectures_says_what_building_says(classes):
    table, plan = shipped_table(), load_recipe("short").plan_defaults
    if table.timm != version("timm"):
        pytest.skip(f"the table is of timm {table.timm}, installed is {version('timm')}")
    assert list(table.rows) == list(classes)
    ours: dict[str, list[str]] = {}
    for name, cls in classes.items():
        row = table.rows[name]
        if cls not in ADAPTERS:
            assert (row["family"], row["reason"]) == (family(cls), NO_SEQUENCE), name
            continue
        ours.setdefault(row["family"], []).append(name)
        if row["reason"] is None:
            assert 0.4 * row["dense"]["gmacs"] < row["sparse"]["gmacs"] < 0.95 * row["dense"]["gmacs"], name
    # Each takes a second or more at its full size: of every family the first, and of all every fortieth.
    again = {*(names[0] for names in ours.values()), *sorted(name for names in ours.values() for name in names)[::40]}
    for name in sorted(again):
        assert table.rows[name] == describe_architecture(name, plan), name
