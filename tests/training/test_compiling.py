"""--compile: the numbers of eager training, and nothing compiled left behind."""

import copy

import pytest
import torch

from vitprune import attach
from vitprune.errors import DeviceError
from vitprune.training.loop import compiled_blocks
from vitprune.training.objective import Objective
from vitprune.training.recipe import load_recipe


def losses_and_gradient(objective, images, phase):
    torch.manual_seed(0)
    loss = objective(images, torch.tensor([0, 1]), phase)
    objective.zero_grad()
    loss.total.backward()
    return loss.total.item(), {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_compiled_steps_have_the_losses_and_gradients_of_eager_ones(make_vit):
    teacher = make_vit(num_classes=2, depth=2)
    objective = Objective(
        *(attach(copy.deepcopy(teacher), prune_at=[1], pruned="merge"), attach(teacher, 1.0), load_recipe(compile=True))
    ).train()
    images = torch.randn(2, 3, 64, 64)
    phases = ("pretraining", "sampled", "deployed")
    eager = {phase: losses_and_gradient(objective, images, phase) for phase in phases}
    with compiled_blocks(objective.student, objective.teacher):
        assert all(block._compiled_call_impl is not None for block in objective.student.model.blocks)
        compiled = {phase: losses_and_gradient(objective, images, phase) for phase in phases}
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] > 0, "something was compiled"
        assert not counters["graph_break"]
    for phase in phases:
        assert compiled[phase][0] == pytest.approx(eager[phase][0], rel=1e-5)
        assert compiled[phase][1].keys() == eager[phase][1].keys()
        for name, gradient in eager[phase][1].items():
            torch.testing.assert_close(compiled[phase][1][name], gradient, rtol=1e-3, atol=1e-5)
    for model in (objective.student, objective.teacher):
        assert all(block._compiled_call_impl is None for block in model.model.blocks)


def test_a_machine_without_compiler_is_told_so_before_anything_runs(make_vit, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    model = attach(make_vit(num_classes=2))
    with pytest.raises(DeviceError, match=r"(?m)compile=True does not work on cpu: no C.. compiler$") as error:
        compiled_blocks(model).__enter__()
    assert "leave it out" in error.value.hint
