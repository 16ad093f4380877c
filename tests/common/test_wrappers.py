"""Models in what torch, timm and PEFT wrap around them."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

import vitprune
from vitprune.common.wrappers import how_wrapped, is_compiled, unwrapped
from vitprune.errors import UsageError


class PeftModel(nn.Module):
    """As PEFT's: the model in it has its layers replaced in place."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model


WRAPPERS = {
    "compiled": (torch.compile, "compiled"),
    "DataParallel": (nn.DataParallel, "wrapped in DataParallel"),
    "PEFT": (PeftModel, "wrapped in PeftModel"),
    "timm's average": (ModelEmaV3, r"an average of weights \(ModelEmaV3\)"),
    "timm's older average": (ModelEmaV2, r"an average of weights \(ModelEmaV2\)"),
    "torch's average": (AveragedModel, r"an average of weights \(AveragedModel\)"),
    "several": (lambda model: torch.compile(nn.DataParallel(model)), "compiled"),
}
by_wrapper = pytest.mark.parametrize(("wrap", "how"), WRAPPERS.values(), ids=list(WRAPPERS))


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.randn(3, 96, 96, generator=torch.Generator().manual_seed(index)), index % 2


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@by_wrapper
def test_the_model_within_is_found_and_nothing_is_seen_around_others(make_vit, wrap, how):
    model = make_vit()
    assert same(unwrapped(wrap(model)), model)
    assert type(unwrapped(wrap(model))) is type(model)
    assert unwrapped(model) is model
    assert how_wrapped(model) is None
    plain = nn.Sequential(model)
    assert unwrapped(plain) is plain


@pytest.mark.parametrize("kind", ["PEFT", "several"])
def test_functions_that_read_a_model_take_it_wrapped(make_vit, image_folder, tmp_path, kind):
    """Which wrappers there are is told above."""
    sparse = vitprune.attach(make_vit(num_classes=2, img_size=96, depth=2), 0.6, [1])
    wrapped = WRAPPERS[kind][0](sparse)
    assert same(vitprune.load(vitprune.save(wrapped, tmp_path / "run")), sparse)
    quiet = {"device": "cpu", "progress": False}
    expected = vitprune.evaluate(sparse, Images(), num_workers=0, **quiet)
    assert vitprune.evaluate(wrapped, Images(), num_workers=0, **quiet) == expected
    image = image_folder / "val" / "cat" / "0.png"
    assert vitprune.predict(wrapped, image, **quiet) == vitprune.predict(sparse, image, **quiet)
    assert vitprune.count_macs(wrapped, (3, 96, 96)) == vitprune.count_macs(sparse, (3, 96, 96))
    assert len(vitprune.visualize(wrapped, image, tmp_path / "maps", progress=False)["files"]) == 1
    if is_compiled(wrapped):
        for models in (wrapped, {"a": sparse, "b": wrapped}):
            with pytest.raises(UsageError, match="is compiled") as caught:
                vitprune.benchmark(models, [1], seconds=0.001, **quiet)
            assert "mode='compile'" in caught.value.hint
        return
    rows = [vitprune.benchmark(each, [1], seconds=0.001, **quiet) for each in (wrapped, {"a": wrapped}, sparse)]
    assert [[row["gmacs"] for row in each] for each in (rows[0], rows[1])] == [
        [row["gmacs"] for row in rows[2]],
        [rows[2][1]["gmacs"]],
    ]


def test_a_wrapped_model_is_exported_and_made_sparse(make_vit, tmp_path):
    dense = make_vit(num_classes=2, img_size=96, depth=3)
    done = vitprune.export_model(nn.DataParallel(dense), tmp_path / "timm")
    assert done.output.is_dir()
    settings = {"pretraining_steps": 1, "steps": 1, "batch_size": 2, "num_workers": 0, "precision": "fp32"}
    sparse = vitprune.sparsify(
        nn.DataParallel(dense), Images(), device="cpu", evaluate=False, progress=False, **settings
    )
    assert type(sparse.model) is type(dense)


@by_wrapper
def test_where_a_wrapper_would_be_lost_it_is_refused_with_how(make_vit, wrap, how):
    dense, recipe = make_vit(), vitprune.Recipe()
    with pytest.raises(UsageError, match=f"the VisionTransformer is {how}") as caught:
        vitprune.attach(wrap(dense))
    assert "attach first" in caught.value.hint
    student, teacher = vitprune.attach(copy.deepcopy(dense)), vitprune.attach(dense, 1.0)
    with pytest.raises(UsageError, match="the model is sparse already"):
        vitprune.attach(wrap(student))
    for models, name in (((wrap(student), teacher), "student"), ((student, wrap(teacher)), "teacher")):
        with pytest.raises(UsageError, match=f"the {name} is {how}") as caught:
            vitprune.Objective(*models, recipe)
        assert "wrap or compile the Objective" in caught.value.hint


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_in_ddp_the_state_travels_the_warning_comes_first_and_the_objective_trains(make_vit, tmp_path):
    ddp = nn.parallel.DistributedDataParallel
    model, images = make_vit(num_classes=2, img_size=96), torch.stack([Images()[i][0] for i in range(4)])
    student = vitprune.attach(copy.deepcopy(model), 0.6).train()
    wrapped = ddp(student)
    assert same(vitprune.load(vitprune.save(wrapped, tmp_path)), student)
    ddp(vitprune.attach(copy.deepcopy(model), 0.6)).load_state_dict(wrapped.state_dict())
    with pytest.warns(UserWarning, match="vitprune.Objective trains them"):
        wrapped(images).sum().backward()
    with pytest.raises(RuntimeError, match="find_unused_parameters"):  # what the warning came before
        wrapped(images)
    student = vitprune.attach(copy.deepcopy(model), 0.6)
    objective = vitprune.Objective(student, vitprune.attach(model, 1.0), vitprune.Recipe()).train()
    trained = ddp(objective, find_unused_parameters=True)
    for phase in ("pretraining", "sampled", "deployed"):
        trained(images, phase=phase).total.backward()
    assert all(parameter.grad is not None for parameter in student.predictors.parameters())


@by_wrapper
def test_a_wrapper_within_is_refused_with_how(make_vit, make_images, wrap, how):
    sparse = vitprune.attach(make_vit())
    images = make_images(sparse)
    sparse.model = wrap(sparse.model)
    with pytest.raises(UsageError, match=f"the model in the SparseViT is {how}"):
        sparse(images)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo asks every tensor for one
def test_a_compiled_objective_gives_the_same(make_vit, make_images):
    model = make_vit(img_size=96, depth=2)
    student = vitprune.attach(copy.deepcopy(model), 0.6, [1])
    objective = vitprune.Objective(student, vitprune.attach(model, 1.0), vitprune.Recipe()).train()
    images, compiled = make_images(student), torch.compile(objective, backend="eager")
    for phase in ("pretraining", "deployed"):
        torch.testing.assert_close(compiled(images, phase=phase).total, objective(images, phase=phase).total)


def test_adapted_layers_within_are_refused_by_save_alone(make_vit, tmp_path):
    """As of PEFT: the file could not be rebuilt."""
    sparse = vitprune.attach(make_vit(num_classes=2, img_size=96, depth=2), 0.6, [1])
    layer = sparse.model.blocks[0].attn.qkv
    layer.lora_A = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="adapter such as LoRA") as caught:
        vitprune.save(PeftModel(sparse), tmp_path / "m.safetensors")
    assert "merge_and_unload" in caught.value.hint
    assert (
        vitprune.evaluate(PeftModel(sparse), Images(), device="cpu", num_workers=0, progress=False)["num_images"] == 4
    )
    assert not (tmp_path / "m.safetensors").exists()
