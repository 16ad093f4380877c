"""The plan as it travels with weights: one uint8 tensor in `state_dict()`, the JSON of what makes them answer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from vitprune.common.own_members import PublicModule
from vitprune.errors import CheckpointError
from vitprune.schedule import PredictorName, Pruned, ScheduleName, Similarity, Stage, plan_label

PLAN_KEY = "_extra_state"
"""Its name in a state dict: torch gives it to what a module keeps beside parameters and buffers."""


@dataclass(frozen=True)
class Plan:
    """Where tokens are pruned, how many are left, how they are chosen and what becomes of the others.

    `keep` and `schedule` are what was asked for, None where that is not known; weights that were trained for all of
    `keep_range` go with every plan in it.
    """

    stages: tuple[Stage, ...]
    num_patches: Annotated[int, Field(ge=1)]
    align: int
    pruned: Pruned
    balance: float | None
    beta: float
    predictor: PredictorName | None
    keep: float | None
    schedule: ScheduleName | None
    similarity: Similarity = "features"  # of plans that do not say
    keep_range: tuple[float, float] | None = None

    def __str__(self) -> str:
        if not self.stages:
            return f"dense, all {self.num_patches} patch tokens stay"
        blocks, tokens = (
            "/".join(str(getattr(stage, name)) for stage in self.stages) for name in ("block", "num_tokens")
        )
        asked = plan_label(self.keep, [stage.ratio for stage in self.stages], self.align)
        where = f"{tokens} of {self.num_patches} patch tokens left by stages before blocks {blocks}"
        shown = [asked if self.keep is None else f"{asked} ({self.schedule})", where, f"pruned='{self.pruned}'"]
        if self.keep_range is not None:
            shown.append("trained for keep {:g} to {:g}".format(*self.keep_range))
        if self.pruned == "merge":
            shown += [f"balance={self.balance}", f"beta={self.beta:g}"]
            shown += [f"similarity='{self.similarity}'"] if self.similarity != "features" else []
        return ", ".join([*shown, f"predictor={self.predictor!r}"])

    def agrees(self, other: Plan) -> bool:
        """Whether weights of the one answer in the other as they were trained to, at whatever image size."""
        return self._decisive == other._decisive

    @property
    def _decisive(self) -> tuple[Any, ...]:
        shares = tuple((stage.block, stage.ratio) for stage in self.stages)
        how = (self.align, self.pruned, self.balance, self.beta, self.predictor, self.similarity)
        if self.keep_range is not None:
            return tuple(stage.block for stage in self.stages), self.keep_range, self.schedule, how
        return shares and (shares, how)


_PLANS = TypeAdapter(Plan)


def pack(plan: Plan) -> Tensor:
    """The plan as a uint8 tensor, a new one each time: averages of weights write into what they get."""
    return torch.tensor(list(_PLANS.dump_json(plan)), dtype=torch.uint8, device="cpu")


def unpack(packed: Any) -> Plan:
    """What `pack` was given.

    Raises:
        CheckpointError: it is no such tensor.
    """
    try:
        # An average over checkpoints may have made floats of it.
        return _PLANS.validate_json(bytes(packed.double().round().to(torch.uint8).tolist()))
    except (ValidationError, AttributeError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the plan in the weights ('{PLAN_KEY}') cannot be read", "take it out to use the model's own"
        ) from error


class PlannedModule(PublicModule):
    """A module whose weights mean something for one plan, and which tells others apart."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()  # DataParallel's replicas share it

    @property
    def plan(self) -> Plan:
        """The module's plan."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """The plan, for `state_dict`."""
        return pack(self.plan)

    def set_extra_state(self, state: Any) -> None:
        """Compare the plan of a `state_dict` with the module's own, before anything is loaded.

        Raises:
            CheckpointError: they differ.
        """
        theirs, own = unpack(state), self.plan
        if not theirs.agrees(own):
            raise CheckpointError(
                f"the weights were trained for another plan than this model's: {theirs}; here: {own}",
                "attach with their arguments, or save with vitprune.save, whose files rebuild the model",
            )

    def say_once(self, sentence: str, stacklevel: int) -> None:
        """A Python warning, once a model."""
        if sentence not in self._said:
            self._said.add(sentence)
            warnings.warn(sentence, UserWarning, stacklevel)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # A module of no parameters of its own: this loads the plan alone, and torch would call weights without one
        # incomplete.
        missing = f"{prefix}{PLAN_KEY}" not in state_dict
        if missing:
            state_dict = {**state_dict, f"{prefix}{PLAN_KEY}": self.get_extra_state()}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if missing and (plan := self.plan).stages:
            self.say_once(
                f"the weights do not say for which plan they were trained, as older ones do not; taken for: {plan}", 5
            )
