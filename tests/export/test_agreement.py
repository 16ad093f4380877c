"""The check after export, by task: it lets rounding pass, and nothing else."""

import pytest
import torch
from torch import nn

from vitprune.errors import ExportError
from vitprune.export.agreement import compare, in_batches, random_images
from vitprune.tasks import TASKS, task_named

SHAPES = {"classification": (5,), "multilabel": (5,), "regression": (2,), "embedding": (24,), "dense": (10, 24)}
SIZE = (3, 8, 8)


class Model(nn.Module):
    """A linear model of the shape that a task has; values of very different sizes, vectors with much in common."""

    def __init__(self, task):
        super().__init__()
        self.shape = SHAPES[task]
        generator = torch.Generator().manual_seed(1)
        count = torch.Size(self.shape).numel()
        self.weight = torch.randn(192, count, generator=generator) / 14
        self.offset = 3 * torch.randn(count, generator=generator) if task in ("embedding", "dense") else 0.0
        self.scale = torch.tensor([1000.0, 0.001]) if task == "regression" else 1.0

    def forward(self, images):
        return ((images.flatten(1) @ self.weight + self.offset) * self.scale).reshape(-1, *self.shape)


class Program(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, images):
        return self.change(self.model(images))


def checked(task, change, precision="fp32"):
    model = Model(task)
    return compare(model, Program(model, change), in_batches(random_images(SIZE)), precision, task_named(task))


def test_every_task_is_tried():
    assert SHAPES.keys() == TASKS.keys()


@pytest.mark.parametrize("task", SHAPES)
def test_rounding_passes(task):
    exact = checked(task, lambda outputs: outputs)
    assert (exact.num_images, exact.max_difference, exact.typical_difference) == (12, 0, 0)
    rounded = checked(task, lambda outputs: outputs.half().float(), "fp16")
    assert 0 < rounded.typical_difference < 0.01
    if task in ("classification", "multilabel"):
        assert rounded.num_clear_changed == 0
        assert rounded.agreement_pct == 100
    else:
        assert (rounded.num_clear, rounded.num_clear_changed, rounded.agreement_pct) == (None, None, None)


def another_image(outputs):
    return outputs.roll(1, dims=0) if len(outputs) > 1 else outputs.flip(-1)


def one_number(outputs):
    """What must not be lost among larger or many others: the last value, label or number."""
    last = torch.zeros(outputs.shape[-1])
    last[-1] = 1
    return outputs * (1 - last) + 2 * outputs * last


WRONG = {
    "another image's": another_image,
    "always the same": lambda outputs: outputs * 0 + torch.arange(outputs[0].numel()).reshape(outputs[0].shape),
    "others' order": lambda outputs: outputs.flip(-1),
    "one number": one_number,
    "2 % too long": lambda outputs: 1.02 * outputs,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("task", SHAPES)
def test_wrong_programs_are_found(task, wrong):
    outputs = {"embedding": "numbers of the embedding", "regression": "values", "dense": "features"}.get(task, "logits")
    with pytest.raises(ExportError, match=f"the {outputs} of a typical image are .* standard deviations off"):
        checked(task, WRONG[wrong])
    if wrong in ("another image's", "always the same", "others' order"):
        with pytest.raises(ExportError, match=r"where rounding explains 0\.25") as caught:
            checked(task, WRONG[wrong], "fp16")
        assert caught.value.hint == "try --precision fp32"


@pytest.mark.parametrize("task", SHAPES)
def test_what_is_not_finite_or_of_another_shape_is_found(task):
    name = "embedding" if task == "embedding" else "values" if task == "regression" else "features|logits"
    with pytest.raises(ExportError, match=f"its .*({name}) are not finite"):
        checked(task, lambda outputs: outputs / 0)
    with pytest.raises(ExportError, match=r"of 1 images its .* are \(1, .*, and the model's \(1, "):
        checked(task, lambda outputs: outputs[..., :1])


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_a_clear_decision_that_changes_is_found_where_the_typical_image_is_right(task):
    def one_of_five(outputs):
        return outputs if len(outputs) < 5 else torch.cat((outputs[:-1], -outputs[-1:]))

    decides = {"classification": "class", "multilabel": "label"}[task]
    with pytest.raises(ExportError, match=rf"\d of \d+ clear {decides} decisions change"):
        checked(task, one_of_five)


def test_values_that_hardly_vary_are_known_no_better_than_their_digits():
    """40 years, give or take an hour: fp16 has no such numbers."""
    task = task_named("regression")
    model = Program(Model("embedding"), lambda outputs: 40 + 1e-4 * outputs[:, :1])
    batches = [*in_batches(random_images(SIZE))]
    rounded = Program(model, lambda outputs: outputs.half().float())
    assert compare(model, rounded, batches, "fp16", task).typical_difference < 0.25
    with pytest.raises(ExportError, match="values of a typical image"):
        compare(model, rounded, batches, "fp32", task)
    with pytest.raises(ExportError, match="values of a typical image"):
        compare(model, Program(model, lambda outputs: outputs + 1), batches, "fp16", task)
