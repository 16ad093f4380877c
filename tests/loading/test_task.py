"""What a model is for: what "auto" finds, what may be asked instead, and models without a head."""

import pytest
import timm
import torch
from architectures import TINY
from safetensors.torch import load_file, save_file

from vitprune.backbones import wrap
from vitprune.checkpoint.sparse_file import describe, save
from vitprune.errors import CheckpointError, UsageError
from vitprune.loading.architectures import count_weights, shipped_table
from vitprune.loading.load import load_dense, load_model, loaded_from
from vitprune.loading.task import TASK_KEY, embedding_width, tasks_of_weights
from vitprune.model import attach

CLIP = {"name": "vit_base_patch16_clip_224", **TINY}
CLIP_TAG = "vit_base_patch16_clip_224.openai"
NO_HEAD = "the model has no classifier"
PROJECTION = "the projection of a CLIP image tower"
AUTO = {
    "deit_tiny_patch16_224": None,
    "deit3_small_patch16_224": None,
    "deit_tiny_distilled_patch16_224": None,
    "vit_base_patch16_224.augreg_in21k": None,
    "vit_base_patch16_224.bamboo": None,
    "beit_base_patch16_224": None,
    "eva02_tiny_patch14_336": None,
    "cait_xxs24_224": None,
    "lvvit_t": None,
    "eva_giant_patch14_224.clip_ft_in1k": None,
    "vit_base_patch16_clip_224.openai_ft_in12k": None,
    "vit_base_patch16_clip_224.laion2b_ft_in1k": None,
    "vit_base_patch16_224.mae": NO_HEAD,
    "vit_base_patch16_224.dino": NO_HEAD,
    "vit_small_patch14_dinov2": NO_HEAD,
    "vit_small_patch14_reg4_dinov2": NO_HEAD,
    "vit_small_patch16_dinov3": NO_HEAD,
    "vit_base_patch16_siglip_224": NO_HEAD,
    "vit_base_patch16_siglip_gap_224": NO_HEAD,
    "aimv2_large_patch14_224": NO_HEAD,
    "naflexvit_base_patch16_siglip": NO_HEAD,
    "vit_pe_spatial_tiny_patch16_512": NO_HEAD,
    "vit_base_patch16_clip_224.openai": PROJECTION,
    "eva02_base_patch16_clip_224": PROJECTION,
    "vit_pe_core_tiny_patch16_384": PROJECTION,
    "vitamin_small_224": PROJECTION,
    "vit_base_mci_224.apple_mclip": PROJECTION,
}
CLASSES = (1000, 11221, 11821, 21841, 21843, 115217)
"""Class counts of ImageNet's sets and Bamboo; whatever other width timm's weights have is an embedding's."""


@pytest.mark.parametrize("name", AUTO)
def test_auto_believes_the_weights_of_a_name(name):
    loaded = load_model(name, weights="none")
    assert loaded.task == ("embedding" if AUTO[name] else "classification")
    lines = [line for line in loaded.understood if line.startswith("task: ")]
    if AUTO[name] is None:
        assert not lines
        return
    images = torch.zeros(1, *loaded.model.pretrained_cfg["input_size"], device="meta")
    outputs = loaded.model(images)
    assert lines == [f"task: embedding of {outputs.shape[1]} numbers ({AUTO[name]})"]
    assert attach(loaded.model)(images).shape == outputs.shape


def test_of_every_pretrained_tag_the_task_is_found():
    supported = [row["model"] for row in shipped_table().rows.values() if row["reason"] is None]
    for name in supported:
        for task, tags in tasks_of_weights(name).items():
            for tag in tags:
                outputs = timm.get_pretrained_cfg(f"{name}.{tag}").num_classes
                assert task == ("classification" if outputs in CLASSES else "embedding"), f"{name}.{tag}: {outputs}"


def test_the_table_has_every_pretrained_tag():
    rows = shipped_table().rows
    if timm.__version__ != shipped_table().timm:
        pytest.skip(f"the table is of timm {shipped_table().timm}, installed is {timm.__version__}")
    for name, row in rows.items():
        found = tasks_of_weights(name)
        if row["reason"] is None:
            assert row["weights"] == found, name
        else:
            assert row["num_weights"] == sum(map(len, found.values())), name
    counted = count_weights(list(rows.values()))
    assert sum(counted["by_task"].values()) + counted["num_refused"] == len(timm.list_pretrained())


def vit(make_vit, num_classes, **arguments):
    return make_vit("vit_tiny_patch16_224", **{**TINY, "num_classes": num_classes, **arguments})


@pytest.mark.parametrize(
    ("num_classes", "problem", "task", "line"),
    [
        (3, None, "classification", None),
        (3, "classification", "classification", None),
        (3, "multilabel", "multilabel", "task: multilabel of 3 labels (problem_type"),
        (3, "regression", "regression", "task: regression of 3 values (problem_type"),
        (1, "regression", "regression", "task: regression of 1 value (problem_type"),
        (1, "multilabel", "multilabel", "task: multilabel of 1 label (problem_type"),
        (0, None, "embedding", "task: embedding of 64 numbers (the model has no classifier)"),
        (0, "multilabel", "embedding", "task: embedding of 64 numbers (the model has no classifier)"),
    ],
)
def test_auto_believes_what_is_said_of_the_outputs(make_vit, num_classes, problem, task, line):
    model = vit(make_vit, num_classes)
    model.pretrained_cfg = {**model.pretrained_cfg, **({TASK_KEY: problem} if problem else {})}
    loaded = loaded_from(model)
    assert loaded.task == task
    assert [each.startswith(line) for each in loaded.understood] == [True] if line else loaded.understood == []


def test_one_output_is_no_class(make_vit):
    model = vit(make_vit, 1)
    for asked in ("auto", "classification"):
        with pytest.raises(UsageError, match="has one output") as caught:
            loaded_from(model, task=asked)
        assert 'task="regression"' in str(caught.value)
        assert 'task="multilabel"' in str(caught.value)
    for asked in ("regression", "multilabel", "dense"):
        assert loaded_from(model, task=asked).task == asked


@pytest.mark.parametrize(
    ("num_classes", "said", "asked", "message"),
    [
        (0, None, "classification", 'task="classification" needs outputs, and the model has none'),
        (0, None, "multilabel", 'task="multilabel" needs outputs'),
        (0, None, "regression", 'task="regression" needs outputs'),
        (3, "multilabel", "classification", 'task="classification" does not go with the model, .* says multilabel'),
        (3, "regression", "multilabel", 'task="multilabel" does not go with the model, .* says regression'),
        (3, None, "embedding", 'task="embedding": the model has a classifier'),
        (3, None, "segmentation", "task 'segmentation' is no task"),
    ],
)
def test_a_task_that_the_outputs_contradict_is_refused(make_vit, num_classes, said, asked, message):
    model = vit(make_vit, num_classes)
    model.pretrained_cfg = {**model.pretrained_cfg, **({TASK_KEY: said} if said else {})}
    with pytest.raises(UsageError, match=message):
        loaded_from(model, task=asked)


def test_a_projection_with_class_names_or_of_another_width_is_a_classifier(make_vit):
    for num_classes, names, task in (
        (512, None, "embedding"),
        (512, [f"class {i}" for i in range(512)], "classification"),
        (10, None, "classification"),
    ):
        model = make_vit(**{**CLIP, "num_classes": num_classes})
        assert loaded_from(model, names).task == task
    assert loaded_from(make_vit(**{**CLIP, "num_classes": 512}), task="classification").task == "classification"


@pytest.mark.parametrize(
    ("name", "asked", "kwargs", "width", "line"),
    [
        ("deit_tiny_patch16_224", "embedding", {}, 64, "the classifier of 1000 classes is left out"),
        ("deit_tiny_patch16_224", "auto", {"num_classes": 0}, 64, "the classifier of 1000 classes is left out"),
        ("deit_tiny_patch16_224", "dense", {"num_classes": 0}, 64, "the classifier of 1000 classes is left out"),
        (CLIP_TAG, "embedding", {}, 512, None),
        (
            CLIP_TAG,
            "auto",
            {"num_classes": 0},
            64,
            "the projection to 512 numbers is left out",
        ),
        ("vit_small_patch14_dinov2", "embedding", {"num_classes": 0, "img_size": 84}, 64, None),
    ],
)
def test_a_head_is_left_out_on_request(name, asked, kwargs, width, line):
    loaded = load_model(name, weights="random", task=asked, model_kwargs={**TINY, **kwargs})
    assert loaded.task == ("embedding" if asked == "auto" else asked)
    channels_height_width = (3, *loaded.model.patch_embed.img_size)
    assert loaded.model(torch.zeros(1, *channels_height_width)).shape == (1, width)
    assert [each.split(", which")[0] for each in loaded.understood if "left out" in each] == ([line] if line else [])
    assert loaded.class_names is None


@pytest.fixture
def classifier(make_vit, tmp_path):
    """A model with three classes, and its file."""
    model = vit(make_vit, 3)
    save_file(model.state_dict(), tmp_path / "classifier.safetensors")
    return model, tmp_path / "classifier.safetensors"


def test_files_with_and_without_a_classifier_give_the_same_encoder(classifier, make_images):
    model, file = classifier
    bare = file.with_name("encoder.pth")
    torch.save({name: each for name, each in load_file(file).items() if not name.startswith("head.")}, bare)
    images = make_images(model)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    for path in (file, bare):
        for asked, kwargs in (("auto", {"num_classes": 0}), ("embedding", {})):
            loaded = load_model("vit_tiny_patch16_224", checkpoint=path, task=asked, model_kwargs={**TINY, **kwargs})
            with torch.no_grad():
                assert torch.equal(loaded.model(images), expected)
            said = any("the classifier of 3 classes is left out" in line for line in loaded.understood)
            assert said == (path == file)
            assert (loaded.task, loaded.model.num_classes) == ("embedding", 0)
    with pytest.raises(CheckpointError, match=r"head\.weight is missing") as caught:
        load_model("vit_tiny_patch16_224", checkpoint=bare, model_kwargs=TINY)
    assert "--model-kwargs num_classes=0" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("vit_small_patch14_dinov2", 84, 64),
        ("vit_base_patch16_clip_224.openai", 96, 512),
        ("vit_base_patch16_clip_224", 96, 512),
        ("vit_base_patch16_siglip_224", 96, 64),
        ("eva02_base_patch16_clip_224", 96, 512),
        ("vit_small_patch16_dinov3", 96, 64),
        ("vit_base_patch16_224.mae", 96, 64),
        ("naflexvit_base_patch16_siglip", 96, 64),
    ],
)
def test_a_file_of_an_encoder_is_one(make_vit, tmp_path, name, size, width):
    sizes = {**TINY, "img_size": size}
    model = make_vit(name, **sizes, num_classes=512 if width == 512 else 0)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_model(name, checkpoint=tmp_path / "weights.safetensors", model_kwargs=sizes)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))
        assert attach(loaded.model)(images).shape == (2, width)
    assert loaded.task == "embedding"


def test_weights_of_the_hub_lose_their_classifier(monkeypatch):
    torch.manual_seed(0)
    whole = timm.create_model("test_vit")
    monkeypatch.setattr("vitprune.loading.load.check_hub", lambda *arguments, **more: None)
    monkeypatch.setattr("vitprune.loading.load.from_hub", lambda name, sizes: timm.create_model(name, **sizes))
    loaded = load_model("test_vit", model_kwargs={"num_classes": 0})
    assert loaded.model(torch.zeros(1, 3, 160, 160)).shape == (1, embedding_width(whole))
    with pytest.raises(UsageError, match=r"the weights of 'test_vit\.r160_in1k' are for 1000 classes"):
        load_model("test_vit", model_kwargs={"num_classes": 7})


def test_a_file_says_its_task_and_keeps_it(classifier, tmp_path):
    _, weights = classifier
    loaded = load_model("vit_tiny_patch16_224", checkpoint=weights, task="embedding", model_kwargs=TINY)
    sparse = attach(loaded.model, keep=0.6)
    metadata = describe(sparse, name=loaded.name).model_copy(update={"task": "embedding"})
    file = tmp_path / "run" / "model.safetensors"
    file.parent.mkdir()
    save(sparse, file, metadata)
    for asked in ("auto", "embedding"):
        assert load_model(str(file), task=asked).task == "embedding"
    with pytest.raises(UsageError, match=r"task=.dense. does not go with '.*safetensors', .* made for embedding"):
        load_model(str(file), task="dense")
    dense = load_dense(load_model(str(file)), weights)
    assert (dense.task, dense.model.num_classes) == ("embedding", 0)
    assert torch.equal(dense.model(torch.ones(1, 3, 96, 96)), loaded.model(torch.ones(1, 3, 96, 96)))


def test_the_width_of_an_embedding_is_that_of_the_output():
    for name, arguments in (("cait_xxs24_224", TINY), ("beit_base_patch16_224", TINY), ("test_vit3", {"img_size": 96})):
        model = timm.create_model(name, **{**arguments, "num_classes": 0}).eval()
        size = (3, 96, 96)
        assert model(torch.zeros(1, *size)).shape == (1, embedding_width(model))
        assert wrap(model).num_classes == 0
