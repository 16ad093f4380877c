"""What `import vitprune` offers."""

import inspect
import pydoc
import re
import subprocess
import sys
import textwrap
import typing
import warnings
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from python_calls import check_calls

import vitprune
from vitprune.api.arguments import known
from vitprune.checkpoint.sparse_file import read_metadata


def test_every_name_is_there_and_known_to_type_checkers():
    for name in vitprune.__all__:
        assert getattr(vitprune, name).__name__.removeprefix("vitprune.") == name
    assert set(vitprune.__all__) <= set(dir(vitprune))
    typed = re.findall(r"import (\w+) as \1$", Path(vitprune.__file__).read_text(), re.MULTILINE)
    assert sorted(typed) == sorted([*vitprune.__all__, "__version__"])


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sparsifi'"):
        vitprune.sparsifi  # noqa: B018


def test_import_and_cli_do_not_load_torch():
    code = "import sys, vitprune, vitprune.cli.app; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sparsify_without_data_warns_and_leaves_the_model_alone(make_vit, make_images):
    model = make_vit()
    images = make_images(model)
    before = model(images)
    with pytest.warns(UserWarning, match="not trained"):
        sparse = vitprune.sparsify(model, keep=0.5)
    assert len(sparse.predictors) == 3
    assert sparse(images).shape == before.shape
    assert sparse.model is not model
    assert torch.equal(model(images), before)


def test_sparsify_with_data_trains_and_writes_a_loadable_run(make_vit, make_images, image_folder, tmp_path):
    model = make_vit(num_classes=2, img_size=64, depth=3)
    images = make_images(model)
    before = model(images)
    recipe = vitprune.Recipe(pretraining_steps=1, steps=4, batch_size=4, num_workers=0, precision="fp32")
    output = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse = vitprune.sparsify(
            model, keep=0.5, data=image_folder, recipe=recipe, device="cpu", output=output, bench_seconds=0.001
        )
    assert torch.equal(model(images), before), "the teacher must not change"
    assert all(parameter.requires_grad for parameter in [*model.parameters(), *sparse.parameters()])
    assert not torch.equal(sparse.model.blocks[-1].mlp.fc2.weight, model.blocks[-1].mlp.fc2.weight)
    loaded = vitprune.load(output)
    assert torch.equal(loaded(images), sparse(images))


QUICK = {"device": "cpu", "pretraining_steps": 1, "steps": 2, "batch_size": 4, "num_workers": 0, "precision": "fp32"}


class Noise(torch.utils.data.Dataset):
    """Ten images as tensors, of two classes, or more, or none."""

    def __init__(self, labelled, num_classes=2):
        self.images = torch.randn(10, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        self.labelled, self.num_classes = labelled, num_classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return (self.images[index], index % self.num_classes) if self.labelled else self.images[index]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("as_loader", [True, False])
def test_sparsify_takes_datasets_and_loaders_and_reports(make_vit, labelled, as_loader, capsys):
    data = Noise(labelled)
    settings = QUICK
    if as_loader:
        data = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
        settings = {key: value for key, value in QUICK.items() if key not in ("batch_size", "num_workers")}
    model = make_vit(num_classes=2, img_size=64, depth=3)
    sparse = vitprune.sparsify(model, data, 0.5, progress=False, bench_seconds=0.001, **settings)
    report = sparse.report
    assert (report.keep, report.data.num_val_images, report.data.name) == (0.5, 1, "Noise")
    assert (report.sparse.top1_pct is None) is not labelled
    assert report.training.recipe["batch_size"] == (3 if as_loader else 4)
    assert capsys.readouterr() == ("", "")


def test_evaluation_after_training_can_be_left_out_and_images_given_for_it(make_vit):
    model = make_vit(num_classes=2, img_size=64, depth=3)
    assert vitprune.sparsify(model, Noise(True), evaluate=False, **QUICK).report is None
    sparse = vitprune.sparsify(model, Noise(False), val_data=Noise(True), bench_seconds=0.001, **QUICK)
    assert sparse.report.data.num_val_images == 10
    result = vitprune.evaluate(sparse, Noise(True), device="cpu", num_workers=0)
    assert result["top1_pct"] == sparse.report.sparse.top1_pct


def test_defaults_are_the_command_lines(make_vit):
    with pytest.warns(UserWarning, match="not trained"):
        sparse = vitprune.sparsify(make_vit())
    assert sparse.sparsity == vitprune.Sparsity() == vitprune.Recipe().plan_defaults


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.utils.data.DataLoader(Noise(True), collate_fn=list), "collate_fn of its own"),
        (torch.utils.data.DataLoader(Noise(True), sampler=[0, 1]), "sampler"),
        (torch.utils.data.Subset(Noise(True), []), "holds no images"),
        ([("text", 0)], "gives str, expected a PIL image or a tensor"),
        (iter(()), "has no length"),
        ("nowhere", "'nowhere' was not found"),
    ],
)
def test_unusable_data_is_an_error(make_vit, data, message):
    with pytest.raises(vitprune.VitpruneError, match=message):
        vitprune.sparsify(make_vit(), data, **QUICK)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_labels_that_the_model_does_not_have_are_an_error(make_vit, num_workers):
    """In one sentence, also where a worker process finds it."""
    with pytest.raises(vitprune.errors.DataError, match="its label is 2, but the model has 2 classes") as caught:
        vitprune.evaluate(
            make_vit(num_classes=2, img_size=64, depth=3), Noise(True, 3), device="cpu", num_workers=num_workers
        )
    assert "Traceback" not in str(caught.value)


class Broken(Noise):
    """Its first image shows that it holds images; then it fails as Datasets do."""

    asked = 0

    def __getitem__(self, index):
        self.asked += 1
        if self.asked > 1 or torch.utils.data.get_worker_info() is not None:
            raise KeyError("path")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_dataset_raises_is_said_with_its_image(make_vit, num_workers):
    model = make_vit(img_size=64, depth=3)
    with pytest.raises(vitprune.errors.DataError, match="cannot read image 'image 0': KeyError: 'path'"):
        vitprune.evaluate(model, Broken(True), device="cpu", num_workers=num_workers)


def test_models_go_on_in_the_mode_they_were_in(make_vit):
    sparse = vitprune.attach(make_vit(img_size=64, depth=3), 0.5, [1]).train()
    sparse.predictors.eval()
    before = [module.training for module in sparse.modules()]
    vitprune.evaluate(sparse, Noise(True), device="cpu", num_workers=0, progress=False)
    vitprune.benchmark(sparse, (1,), device="cpu", seconds=0.01, progress=False)
    assert [module.training for module in sparse.modules()] == before


def test_what_is_no_model_for_a_function_is_said_with_the_way_out(make_vit, make_sparse, tmp_path):
    dense, sparse, file = make_vit(), make_sparse(), tmp_path / "m.safetensors"
    for call, words, hint in (
        (lambda: vitprune.attach(sparse, 0.7), "the model is sparse already", "start from the dense model"),
        (lambda: vitprune.attach("deit_tiny"), "the model is a str", "timm.create_model"),
        (lambda: vitprune.attach(torch.compile(dense), 0.7), "is compiled", "attach first"),
        (lambda: vitprune.attach(dense, "0.7"), "keep ratio is '0.7', expected a number", None),
        (lambda: vitprune.attach(dense, True), "keep ratio is True", None),
        (lambda: vitprune.save(dense, file), "a VisionTransformer cannot be saved", "timm's to save"),
        (lambda: vitprune.visualize(dense, "demo", tmp_path / "maps"), "keeps all its tokens", "attach prunes"),
    ):
        with pytest.raises(vitprune.errors.UsageError, match=words) as caught:
            call()
        assert hint is None or hint in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_numbers_and_names_that_cannot_be_are_refused(make_vit, tmp_path):
    sparse = vitprune.attach(make_vit(num_classes=5, img_size=64, depth=3), 0.5, [1])
    for limit in (0, -1):
        with pytest.raises(vitprune.errors.UsageError, match=f"limit is {limit}, expected at least 1"):
            vitprune.evaluate(sparse, Noise(True), limit=limit, device="cpu")
    with pytest.raises(vitprune.errors.UsageError, match="2 class names for 5 classes"):
        vitprune.save(sparse, tmp_path / "m.safetensors", class_names=["a", "b"])


def test_save_load_keep_the_class_names(make_sparse, make_images, tmp_path):
    sparse = make_sparse(num_classes=2)
    assert vitprune.save(sparse, tmp_path / "made" / "run", ["cat", "dog"]).name == "model.safetensors"
    loaded = vitprune.load(tmp_path / "made" / "run")
    images = make_images(sparse)
    assert torch.equal(loaded(images), sparse(images))
    assert loaded.class_names == ("cat", "dog")
    with pytest.raises(vitprune.errors.UsageError, match=r"does not end in \.safetensors"):
        vitprune.save(sparse, tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_what_a_file_says_is_still_said_after_load_and_save(make_vit, tmp_path):
    made = vitprune.sparsify(make_vit(num_classes=2, img_size=64, depth=3), Noise(True), bench_seconds=0.001, **QUICK)
    first, second, third = (read_metadata(vitprune.save(made, tmp_path / name)) for name in ("a", "b", "c"))
    assert first.accuracy["sparse"]["top1_pct"] == made.report.sparse.top1_pct
    assert first.training["completed"]
    assert first.origin["source"]
    loaded = vitprune.load(tmp_path / "a")
    assert loaded.sparsity.token_schedule == "late"
    assert known(loaded).name == first.model
    assert read_metadata(vitprune.save(loaded, tmp_path / "again")) == first == second == third
    with torch.no_grad():
        loaded.model.norm.weight.mul_(1.01)
    changed = read_metadata(vitprune.save(loaded, tmp_path / "changed"))
    assert (changed.accuracy, changed.training) == (None, None), "they are other weights' figures"
    assert changed == first.model_copy(update={"accuracy": None, "training": None})


def test_an_export_says_what_the_file_that_it_is_from_says(make_vit, tmp_path):
    made = vitprune.sparsify(make_vit(num_classes=2, img_size=64, depth=3), Noise(True), bench_seconds=0.001, **QUICK)
    before = read_metadata(vitprune.save(made, tmp_path))
    extra = {"vitprune.json": ""}
    torch.export.load(vitprune.export_model(vitprune.load(tmp_path), tmp_path / "model.pt2").output, extra_files=extra)
    found = type(before).model_validate_json(extra["vitprune.json"])
    assert (before.keep, before.schedule) == (0.7, "late")
    assert before.accuracy
    assert before.origin
    assert found == before


def test_old_names_of_arguments_work_for_one_release(make_vit):
    sparsify = partial(vitprune.sparsify, make_vit(), recipe="none")
    for call in (vitprune.Sparsity, partial(vitprune.attach, make_vit()), sparsify):
        with pytest.warns(DeprecationWarning, match="is now") as warned:
            old = call(stages=[2, 4], schedule="geometric")
        assert sorted(str(each.message) for each in warned) == [
            "schedule= is now token_schedule=",
            "stages= is now prune_at=",
        ]
        asked = old if isinstance(old, vitprune.Sparsity) else old.sparsity
        assert (asked.prune_at, asked.token_schedule) == ([2, 4], "geometric")


def test_one_set_of_names_says_how_much_is_pruned():
    names = set(inspect.signature(vitprune.Sparsity).parameters)
    for function in (vitprune.attach, vitprune.sparsify):
        taken = set(inspect.signature(function).parameters) | set(vitprune.Recipe.model_fields)
        assert names - {"keep_range"} <= taken, function  # a range is given as keep=(low, high)


def test_benchmark_compares_with_all_tokens(make_sparse):
    rows = vitprune.benchmark(make_sparse(), [1], device="cpu", seconds=0.001, progress=False)
    assert [row["label"] for row in rows] == ["dense", "sparse"]
    assert rows[0]["speedup"] == 1
    assert rows[1]["gmacs"] < rows[0]["gmacs"]


def test_visualize_draws_files_and_folders(make_sparse, image_folder, tmp_path):
    sparse = make_sparse(num_classes=2)
    image = image_folder / "val" / "cat" / "0.png"
    drawn = vitprune.visualize(sparse, image, tmp_path / "one", progress=False)
    assert [Path(file).is_file() for file in drawn["files"]] == [True]
    drawn = vitprune.visualize(sparse, image_folder / "val" / "cat", tmp_path / "all", mean=True, progress=False)
    assert drawn["mean"]["num_images"] == 3


def test_models_are_listed_by_name():
    assert "test_vit" in vitprune.list_models("test_*")
    assert "test_resnet" not in vitprune.list_models("test_*")


@pytest.mark.parametrize(("name", "format"), [("model.trt", None), ("model.onnx", "trt")])
def test_unknown_export_formats_and_endings_are_errors(make_sparse, tmp_path, name, format):
    with pytest.raises(vitprune.VitpruneError, match="trt"):
        vitprune.export_model(make_sparse(), tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


RUN_OFFLINE = {"Objective", "Sparsity", "attach"}
WITHOUT_EXAMPLE = {
    "Augmentation",
    "Exported",
    "ImagePrediction",
    "LossWeights",
    "MaskedOutput",
    "Schedule",
    "Selection",
    "SparseViT",
    "Stage",
    "StepLoss",
    "TokenPredictor",
    "VitpruneError",
    "errors",
    "make_schedule",
}


def _classes(hint):
    """Of ours, in an annotation."""
    if typing.get_args(hint):
        return {each for part in typing.get_args(hint) for each in _classes(part)}
    return {hint} if inspect.isclass(hint) and hint.__module__.startswith("vitprune") else set()


def _signatures():
    for public in (getattr(vitprune, name) for name in vitprune.__all__ if name != "errors"):
        if inspect.isfunction(public):
            yield public
        elif inspect.isclass(public):
            members = [getattr(public, name) for name in dir(public) if not name.startswith("_") or name == "__init__"]
            yield from (member for member in members if inspect.isfunction(member) or inspect.ismethod(member))
            yield from (member.fget for member in members if isinstance(member, property))
            yield public  # of a NamedTuple or settings, the fields


INNER = {"Agreement", "Backbone", "Choice", "Grid", "NamedClass", "Plan", "PlannedStep", "Tokens"}
"""Parts of those that are public, to be read and not made; each is documented where it is defined."""


def test_classes_that_public_signatures_name_are_public():
    named = set()
    for function in _signatures():
        for hint in typing.get_type_hints(function).values():
            named |= {each.__name__ for each in _classes(hint)}
    assert {"Selection", "MaskedOutput", "StepLoss", "SparseViT"} <= named
    assert named - {*vitprune.__all__} == INNER


@pytest.mark.parametrize("name", sorted({*vitprune.__all__} - WITHOUT_EXAMPLE))
def test_docstrings_show_a_use_that_works(name, make_vit):
    text = inspect.getdoc(getattr(vitprune, name)).partition("Example:\n")[2]
    code = textwrap.dedent(re.match(r"(?:    .*\n?)+", text).group())
    assert name in check_calls(code)
    if name in RUN_OFFLINE:
        student, images = vitprune.attach(make_vit()), torch.randn(2, 3, 160, 160)
        known = {"student": student, "teacher": make_vit(), "images": images, "labels": torch.tensor([0, 1])}
        exec(code, {"torch": torch, "timm": timm, "vitprune": vitprune} | known)


def test_help_shows_what_vitprune_defines_and_nothing_inherited():
    text = pydoc.render_doc(vitprune, renderer=pydoc.plaintext)
    assert len(text.splitlines()) < 1950, "of three named tuples Python shows what every tuple has"
    assert "forward_masked" in text
    assert "share of those steps on the deployed path" in text, "fields of settings are described"
    assert "register_forward_hook" not in text
    assert "model_dump" not in text


def test_instances_still_list_everything(make_sparse):
    listed = dir(make_sparse())
    assert {"forward_masked", "state_dict", "parameters", "predictors", "schedule"} <= set(listed)
    assert {"with_settings", "model_dump", "lr"} <= set(dir(vitprune.Recipe()))
