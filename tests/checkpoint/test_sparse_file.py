"""model.safetensors: rebuilt from itself alone, and refused with a reason when it cannot be."""

import json
import os
import pickle

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vitprune
from vitprune.checkpoint.metadata import METADATA_KEY, Metadata
from vitprune.checkpoint.sparse_file import describe, read_metadata, save
from vitprune.checkpoint.weight_file import open_weights
from vitprune.errors import CheckpointError
from vitprune.model import SparseViT, attach_as
from vitprune.schedule import Schedule, Sparsity, Stage, make_schedule


@pytest.fixture
def saved(make_sparse, tmp_path):
    sparse = make_sparse(num_classes=2, img_size=96)
    path = tmp_path / "model.safetensors"
    save(sparse, path, describe(sparse, class_names=("cat", "dog")))
    return sparse, path


def test_loads_to_the_same_answers_offline(saved, make_images):
    sparse, path = saved
    images = make_images(sparse)
    loaded = vitprune.load(path)
    assert not loaded.training
    assert torch.equal(loaded(images), sparse(images))
    assert loaded.schedule == sparse.schedule
    assert torch.equal(vitprune.load(path.parent)(images), sparse(images)), "a run folder will do, too"


def test_tensors_carry_timm_names_and_predictors_stand_beside(saved):
    sparse, path = saved
    names = set(load_file(path))
    assert names == set(sparse.model.state_dict()) | {n for n in sparse.state_dict() if n.startswith("predictors.")}


def test_header_is_one_json_string_and_config_json_the_same(saved):
    _, path = saved
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    content = json.loads(header[METADATA_KEY])
    assert content == json.loads((path.parent / "config.json").read_text())
    assert content["schema_version"] == 2
    assert content["class_names"] == ["cat", "dog"]
    assert [stage["num_tokens"] for stage in content["stages"]] == [25, 17, 12]
    assert content["preprocessing"]["input_size"] == [3, 96, 96]


def test_a_file_of_version_1_is_read_in_todays_words(saved, make_images):
    sparse, path = saved
    merged = SparseViT(sparse.model, sparse.schedule, sparse.predictors, "merge").eval()
    save(merged, path, describe(merged))
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()[METADATA_KEY])
    old = {key: value for key, value in content.items() if key != "pruned"} | {"schema_version": 1, "dropped": "fold"}
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(old)})
    loaded, images = vitprune.load(path), make_images(sparse)
    assert loaded.pruned == "merge"
    assert torch.equal(loaded(images), merged(images))
    assert not torch.equal(loaded(images), sparse(images))


@pytest.mark.parametrize(
    ("predictor", "pruned", "expected"),
    [("light", "merge", (0.3, 2.0)), ("paper", "merge", (0.3, 2.0)), ("light", "drop", (None, 0.0))],
)
def test_how_tokens_are_chosen_is_in_the_file(make_vit, make_images, tmp_path, predictor, pruned, expected):
    model = make_vit(num_classes=2, img_size=96)
    sparsity = Sparsity(0.5, pruned=pruned, predictor=predictor, balance=0.3, beta=2.0, similarity="keys")
    sparse, images = attach_as(model, sparsity).eval(), make_images(model)
    save(sparse, tmp_path / "model.safetensors", describe(sparse))
    loaded = vitprune.load(tmp_path)
    assert (loaded.predictor, loaded.pruned) == (predictor, pruned)
    assert (loaded.balance, loaded.beta) == expected, "what is dropped is in no average"
    assert loaded.similarity == ("keys" if pruned == "merge" else "features"), "and is compared with nothing"
    assert torch.equal(loaded(images), sparse(images))


def test_a_file_that_says_nothing_of_it_chooses_as_the_paper_does(saved, make_images):
    """Those of earlier versions."""
    sparse, path = saved
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()[METADATA_KEY])
    old = {key: value for key, value in content.items() if key not in ("predictor", "balance", "beta", "similarity")}
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(old)})
    loaded, images = vitprune.load(path), make_images(sparse)
    assert (loaded.predictor, loaded.balance, loaded.beta) == ("paper", None, 0.0)
    assert torch.equal(loaded(images), sparse(images))


ASKED = {
    "keep": Sparsity(0.7),
    "geometric": Sparsity(0.6, token_schedule="geometric"),
    "shares": Sparsity(tokens_left=[0.8, 0.5, 0.3]),
    "aligned": Sparsity(0.7, align=4),
    "published": Sparsity.as_published(0.5),
    "dense": Sparsity(1.0),
}


@pytest.mark.parametrize("way", ["attach", "schedule", "loaded", "resized"])
@pytest.mark.parametrize("kind", ASKED)
def test_the_file_says_what_was_asked_for(make_vit, tmp_path, kind, way):
    model, asked = make_vit(num_classes=2, img_size=96), ASKED[kind]
    if way == "schedule":
        schedule = make_schedule(6, 36, asked, num_prefix_tokens=1)
        sparse = SparseViT(model, schedule, pruned=asked.pruned, balance=asked.balance, beta=asked.beta)
    else:
        sparse = attach_as(model, asked)
    if way == "resized":
        sparse.set_input_size(128)
    if way == "loaded":
        sparse = vitprune.load(vitprune.save(sparse, tmp_path / "first"))
    found = read_metadata(vitprune.save(sparse, tmp_path / "model.safetensors"))
    free = asked.tokens_left is not None
    assert (found.keep, found.schedule) == ((None, None) if free else (asked.keep, asked.token_schedule))
    assert found.label == ("dense" if kind == "dense" else asked.label)


def test_of_a_plan_made_by_hand_the_file_says_its_shares(make_vit, tmp_path):
    schedule = Schedule(6, 36, (Stage(2, 0.5, 18), Stage(4, 0.25, 9)))
    found = read_metadata(vitprune.save(SparseViT(make_vit(img_size=96), schedule), tmp_path))
    assert (found.keep, found.schedule, found.label) == (None, None, "ratios 0.5,0.25")
    assert vitprune.load(tmp_path).schedule == schedule


def test_predictors_of_ones_own_cannot_be_stored(make_sparse):
    plain = make_sparse(num_classes=2)
    own = SparseViT(plain.model, plain.schedule, [torch.nn.Identity() for _ in plain.schedule.stages])
    with pytest.raises(CheckpointError, match="predictors are not vitprune's"):
        describe(own)


def test_timm_reads_the_dense_backbone(saved, make_images):
    sparse, path = saved
    dense = timm.create_model("test_vit", num_classes=2, img_size=96)
    missing = dense.load_state_dict(load_file(path), strict=False)
    assert missing.missing_keys == []
    images = make_images(sparse)
    assert torch.equal(dense.eval()(images), sparse.model(images))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 4, "embed_dim": 48, "num_heads": 2, "img_size": 64}),
        ("vit_base_patch16_siglip_224", {"depth": 4, "embed_dim": 48, "num_heads": 2, "num_classes": 5}),
        ("vit_tiny_patch16_224", {"depth": 4, "global_pool": "avg", "in_chans": 1, "patch_size": 32}),
    ],
)
def test_every_argument_of_create_model_comes_back(name, arguments, make_sparse, make_images, tmp_path):
    sparse = make_sparse(name, **arguments)
    path = tmp_path / "model.safetensors"
    save(sparse, path, describe(sparse))
    images = make_images(sparse)
    assert torch.equal(vitprune.load(path)(images), sparse(images))


def test_aligned_counts_come_back_and_files_from_before_still_load(make_vit, make_images, saved, tmp_path):
    sparsity = Sparsity(0.7, pruned="merge", align=8)
    sparse = attach_as(make_vit(img_size=96), sparsity).eval()
    metadata = describe(sparse, sparsity=sparsity)
    assert (metadata.align, metadata.label) == (8, "keep 0.7 align 8")
    save(sparse, tmp_path / "aligned.safetensors", metadata)
    loaded = vitprune.load(tmp_path / "aligned.safetensors")
    assert loaded.schedule == sparse.schedule
    images = make_images(sparse)
    assert torch.equal(loaded(images), sparse(images))
    sparse, path = saved
    header = json.loads(read_metadata(path).model_dump_json())
    assert header.pop("align") == 1
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(header)})
    assert vitprune.load(path).schedule == sparse.schedule


def test_model_not_made_by_create_model_is_refused(make_vit):
    from timm.models.vision_transformer import VisionTransformer

    bare = VisionTransformer(img_size=64, embed_dim=32, depth=4, num_heads=2)
    with pytest.raises(CheckpointError, match="does not say which timm architecture"):
        describe(vitprune.attach(bare))


def test_missing_truncated_and_plain_files_are_refused(saved, weights_file, tmp_path):
    with pytest.raises(CheckpointError, match=r"file '.*absent.safetensors' not found"):
        vitprune.load(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="not written by vitprune") as caught:
        vitprune.load(weights_file)
    assert "--checkpoint" in caught.value.hint
    content = saved[1].read_bytes()
    for share in (0.0, 0.0001, 0.5, 0.999):
        saved[1].write_bytes(content[: int(len(content) * share)])
        with pytest.raises(CheckpointError, match="damaged"):
            vitprune.load(saved[1])


def test_tensors_that_do_not_fit_are_named(saved):
    _, path = saved
    metadata, tensors = read_metadata(path), load_file(path)
    without = {name: tensor for name, tensor in tensors.items() if name != "head.bias"}
    for changed, message in (
        (tensors | {"head.weight": torch.zeros(3, 64)}, r"'head.weight' is \(3, 64\), expected \(2, 64\)"),
        (without, "'head.bias' is missing"),
        (tensors | {"extra": torch.zeros(2)}, "'extra' is .* expected none"),
        (tensors | {"head.bias": torch.tensor([0.0, float("nan")])}, "NaN or infinite values in 'head.bias'"),
    ):
        save_file(changed, path, metadata={METADATA_KEY: metadata.model_dump_json()})
        with pytest.raises(CheckpointError, match=message):
            vitprune.load(path)


def test_a_bound_that_binds_nothing_is_no_damage(tmp_path):
    """Gemma's clipped layers hold their bounds as single numbers, infinite until they are calibrated."""
    size = {"img_size": 96, "num_classes": 2, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_kv_heads": 2}
    model = timm.create_model("gemma4_vit_167m", **size, head_dim=32, intermediate_size=128).eval()
    sparse = attach_as(model, Sparsity(0.5, [1])).eval()
    assert any(buffer.isinf().any() for buffer in model.buffers())
    path = tmp_path / "model.safetensors"
    save(sparse, path, describe(sparse))
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(vitprune.load(path)(images), sparse(images))
    metadata, tensors = read_metadata(path), load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 0 and tensor.isinf())
    save_file(tensors | {name: torch.tensor(float("nan"))}, path, metadata={METADATA_KEY: metadata.model_dump_json()})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        vitprune.load(path)


class _Payload:
    def __reduce__(self):
        return os.system, ("echo pickled code ran > /dev/stderr",)


def test_pickled_code_is_refused_and_does_not_run(tmp_path, capfd):
    for path in (tmp_path / "code.pth", tmp_path / "old.bin"):
        if path.suffix == ".pth":
            torch.save({"model": _Payload()}, path)
        else:
            path.write_bytes(pickle.dumps(_Payload()))
        with pytest.raises(CheckpointError, match=path.name):
            open_weights(path)
    assert "pickled code ran" not in capfd.readouterr().err


def test_a_file_of_before_tasks_without_a_classifier_is_of_an_encoder(make_sparse):
    content = describe(make_sparse(num_classes=0)).model_dump()
    assert content["task"] == "embedding"
    del content["task"]
    assert Metadata.model_validate(content).task == "embedding"
    assert Metadata.model_validate(content | {"task": "dense"}).task == "dense"
