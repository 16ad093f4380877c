"""How to train: one settings object, and the recipes that come with vitprune."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import yaml
from pydantic import BaseModel, Field, model_validator

from vitprune.common.formatting import close_match, first_line, flattened
from vitprune.common.json_version import RENAMED
from vitprune.common.own_members import PublicSettings
from vitprune.data import Augmentation
from vitprune.errors import UsageError
from vitprune.schedule import PredictorName, Sparsity
from vitprune.training.pretraining import Target

Phase = Literal["pretraining", "sampled", "deployed"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
RECIPES = ("short", "paper", "none", "dense")
"""Names of the settings files beside this module, in recipes/."""
_LENGTHS = ("steps", "epochs")
"""Two ways to say how long to train."""


class PlannedStep(NamedTuple):
    """A planned step: its phase, see `Recipe`, the scale of its Gumbel noise, and whether it trains the backbone."""

    phase: Phase
    noise: float
    trains_backbone: bool


class LossWeights(PublicSettings):
    """Weights of the losses: the four of DynamicViT eq. 16, and that of what the classifier reads."""

    ce: float = Field(0.0, ge=0, description="cross-entropy with the labels")
    ratio: float = Field(2.0, ge=0, description="squared distance of the kept share from its target")
    kl: float = Field(1.0, ge=0, description="KL divergence from the teacher's classes")
    pooled: float = Field(
        0.5, ge=0, description="relative squared distance of what the classifier reads from the teacher's"
    )
    token: float = Field(
        0.0,
        ge=0,
        description="squared distance of kept tokens' features from the teacher's, of merged ones from their mean; in "
        "LV-ViT, whose patch tokens are classified too, KL divergence from the teacher's predictions",
    )


class Recipe(PublicSettings):
    """Settings of a training run. The defaults are those of recipes/short.yaml, which says what they are for.

    Example:
        recipe = vitprune.Recipe(steps=1000, weights=vitprune.LossWeights(ce=0.5))
        sparse = vitprune.sparsify("deit_small", "path/to/images", recipe=recipe)

    Training has up to three phases. "pretraining": predictors alone learn the ranking of tokens that the teacher gives.
    Then, with an optimiser and a schedule of their own: "sampled", in which predictors and backbone learn together with
    sampled decisions and masked attention (the paper's), and "deployed", in which the backbone learns on the path that
    is deployed, where pruned tokens are really removed.
    """

    _elsewhere: ClassVar[Mapping[str, str]] = RENAMED | {
        "learning_rate": "lr",
        "wd": "weight_decay",
        "max_grad_norm": "clip_grad",
        "bs": "batch_size",
        "warmup_ratio": "warmup_share",
        "schedule": "token_schedule",
        "num_epochs": "epochs",
        "max_steps": "steps",
    }

    name: str = Field("short", description="of the settings file this began with")
    token_schedule: Literal["geometric", "late"] = Field("late", description="how the stages share the work")
    pruned: Literal["drop", "merge"] = Field("merge", description="what happens to pruned tokens")
    predictor: PredictorName = Field(
        "light",
        description="what scores tokens: ours, DynamicViT's, or untrained the model's attention or the tokens' norm",
    )
    balance: float | None = Field(
        0.1,
        ge=0,
        description="with merging, how much a token's importance counts beside its redundancy; None: it alone decides",
    )
    beta: float = Field(1.0, ge=0, description="with merging, how much importance counts in averages: exp(beta * a)")

    similarity: Literal["features", "keys"] = Field(
        "features", description="with merging, what tokens are compared by: themselves, or their keys in the next block"
    )
    prune_every: int | None = Field(
        None,
        ge=1,
        description="a stage before every so many blocks from the second on, at the cost of the default stages; None: "
        "these",
    )
    pretraining_steps: int = Field(200, ge=0, description="steps of predictor pretraining")
    pretraining_target: Target = Field("auto", description="what to rank tokens by")
    steps: int | None = Field(None, ge=0, description="steps after pretraining; None for 300")
    epochs: float | None = Field(None, ge=0, description="the same in passes over the images, instead of steps")
    deployed_share: float = Field(1.0, ge=0, le=1, description="share of those steps on the deployed path, at the end")
    noise_end: float = Field(1.0, ge=0, le=1, description="scale of the Gumbel noise at the last sampled step")
    tau: float = Field(1.0, gt=0, description="temperature of the Gumbel-softmax")

    batch_size: int = Field(32, ge=1, description="images a step, of all processes together")
    grad_accum: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="microbatches that share a process' batch, to need less memory; auto: as few as fit"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the predictors")
    lr_batch_size: int | None = Field(None, ge=1, description="batch size that lr is for; None: lr holds for any")
    tune_lr_scale: float = Field(0.1, gt=0, description="the predictors' rate after pretraining, as a share of lr")
    backbone_lr_scale: float = Field(0.04, ge=0, description="the backbone's rate as a share of lr")
    rate_reference_kl: float | None = Field(
        0.13,
        gt=0,
        description="KL after pretraining at which backbone_lr_scale holds; the rate follows it, from .3 to 1.5 times; "
        "None: the rate is fixed",
    )
    backbone_parameters: Literal["all", "norms"] = Field(
        "all", description="what of the backbone trains: all, or its norms, biases and layer scales alone"
    )
    train_trunk: bool = Field(False, description="also train the blocks before the first stage, where no token is gone")
    freeze_epochs: float = Field(0.0, ge=0, description="passes after pretraining with the backbone frozen")
    warmup_share: float = Field(0.05, ge=0, le=1, description="share of each optimiser's steps in which the rate rises")
    weight_decay: float = Field(0.05, ge=0)
    clip_grad: float | None = Field(1.0, gt=0, description="largest gradient norm")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="of the exponential moving average of weights; 0 is off")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block")

    weights: LossWeights = LossWeights()
    relative_token_loss: bool = Field(True, description="token loss over the mean square of the teacher's features")
    labels: bool = Field(True, description="use labels; False is distillation alone")
    augmentation: Augmentation = Augmentation()

    precision: Precision = "auto"
    compile: bool = Field(False, description="run the transformer blocks through torch.compile")
    seed: int = Field(0, ge=0)
    num_workers: int | None = Field(None, ge=0, description="processes that read images; None to choose")
    max_unreadable: float = Field(
        0.01, ge=0, le=1, description="share of training images that may be unreadable: skipped, named and counted"
    )
    max_skipped: int = Field(20, ge=1, description="non-finite steps in a row after which training stops")

    @classmethod
    def _title(cls, settings: Mapping[str, Any]) -> str:
        return f"recipe '{settings.get('name', 'short')}'"

    @model_validator(mode="after")
    def _one_length(self) -> Recipe:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self

    @model_validator(mode="after")
    def _some_predictors_are_not_trained(self) -> Recipe:
        if self.predictor == "attention" and self.trains:
            raise ValueError("predictor 'attention' goes with no training: pretraining_steps 0 and steps 0")
        for key, value, goes in (
            ("pretraining_steps", self.pretraining_steps, 0),
            ("deployed_share", self.deployed_share, 1),
        ):
            if self.predictor == "norm" and value != goes:
                raise ValueError(f"{key} is {value}, and predictor 'norm' learns nothing: leave it at {goes}")
        return self

    @property
    def trains(self) -> bool:
        """Whether there is a step to take."""
        return self.pretraining_steps > 0 or (self.steps != 0 if self.epochs is None else self.epochs > 0)

    def with_settings(self, updates: Mapping[str, Any]) -> Recipe:
        """This recipe with some settings replaced.

        Args:
            updates: values by key, nested ones by their path or as a dict: {"lr": 1e-4, "weights.kl": 1.5}. A text is
                read as in a settings file: {"clip_grad": "null"}. `steps` and `epochs` replace each other.

        Raises:
            UsageError: no such setting, with the nearest one there is; or a value of another kind or out of range.
        """
        content = self.model_dump()
        known = flattened(content).keys() - {"name"}
        if updates.keys() & _LENGTHS:
            content |= dict.fromkeys(_LENGTHS)
        parsed = {key: _parse(value) if isinstance(value, str) else value for key, value in updates.items()}
        groups = {key: value.model_dump() for key, value in parsed.items() if isinstance(value, BaseModel)}
        for key, value in flattened(parsed | groups).items():
            if key not in known:
                raise self._unknown(key, content)
            group, _, name = key.rpartition(".")
            (content[group] if group else content)[name] = value
        return Recipe(**content)

    def workers(self) -> int:
        """Processes that read images."""
        if self.num_workers is not None:
            return self.num_workers
        return min(8, (os.cpu_count() or 1) // 2)

    def plan_steps(self, steps_per_epoch: int | None, *, has_stages: bool) -> list[list[PlannedStep]]:
        """All steps of a run, a list for each optimiser, none of them empty; a model without stages has fewer."""
        steps = self.num_steps(steps_per_epoch)
        deployed = round(steps * self.deployed_share)
        # Without stages there is nothing to rank; on the deployed path only the backbone can train.
        tunes = self.backbone_lr_scale > 0
        num_pretraining, num_sampled = (self.pretraining_steps, steps - deployed) if has_stages else (0, 0)
        num_deployed = deployed if tunes else 0
        frozen = round(self.freeze_epochs * (steps_per_epoch or 0))
        pretraining = [PlannedStep("pretraining", 1.0, False) for _ in range(num_pretraining)]
        together = [
            PlannedStep(
                phase="sampled" if step < num_sampled else "deployed",
                noise=1.0 + (self.noise_end - 1.0) * min(1.0, step / max(1, num_sampled - 1)),
                trains_backbone=tunes and step >= frozen,
            )
            for step in range(num_sampled + num_deployed)
        ]
        return [planned for planned in (pretraining, together) if planned]

    def num_steps(self, steps_per_epoch: int | None) -> int:
        """Steps after pretraining; the length of an epoch is None where the data is a stream.

        Raises:
            UsageError: the length of training is given in passes over such a stream.
        """
        if steps_per_epoch is None and (self.epochs is not None or self.freeze_epochs > 0):
            raise UsageError(
                "the data is a stream, so how long a pass over it is is not known", "use --steps, and freeze_epochs 0"
            )
        if self.epochs is not None:
            return round(self.epochs * (steps_per_epoch or 0))
        return DEFAULT_STEPS if self.steps is None else self.steps

    @property
    def plan_defaults(self) -> Sparsity:
        """What applies where a request for a plan says nothing."""
        return Sparsity(
            token_schedule=self.token_schedule,
            pruned=self.pruned,
            balance=self.balance,
            beta=self.beta,
            predictor=self.predictor,
            similarity=self.similarity,
        )

    def plan_for(self, depth: int) -> Sparsity:
        """`plan_defaults` for a model of so many blocks."""
        stages = None if self.prune_every is None else [*range(1, depth, self.prune_every)]
        return replace(self.plan_defaults, prune_at=stages)

    @property
    def peak_lr(self) -> float:
        """`lr` for the batch size used."""
        return self.lr if self.lr_batch_size is None else self.lr * self.batch_size / self.lr_batch_size


DEFAULT_STEPS = 300

DEMO = {"pretraining_steps": 60, "steps": 20}
"""What differs for the embedded demo, which must be done in two minutes on two cores."""
RANGE = {"steps": 600}
"""What differs for a range of keep ratios: each then comes out as if trained for it alone (examples/RESULTS.md)."""


def default_recipe(task: str) -> str:
    """The settings file that a task takes where none is named."""
    return "dense" if task == "dense" else "short"


def usual(recipe: str, model: str, given: Mapping[str, Any], *, ranged: bool) -> dict[str, Any]:
    """Settings of a recipe, with what differs where nothing is said: of "short" for the demo and for a range.

    Args:
        recipe: its name.
        model: what the user called the model.
        given: settings that are asked for.
        ranged: whether one training is for a range of keep ratios.
    """
    base = {} if recipe != "short" else DEMO if model == "demo" else RANGE if ranged else {}
    return {key: value for key, value in base.items() if key != "steps" or "epochs" not in given} | dict(given)


def load_recipe(name: str = "short", **settings: Any) -> Recipe:
    """A recipe from a settings file, with some settings replaced.

    Args:
        name: "short", "paper", or the path of a YAML file like theirs.
        settings: what differs; for `weights` and `augmentation`, a dict of what differs in them. `steps` and `epochs`
            replace each other.

    Raises:
        UsageError: no such file, or a setting that does not exist or is out of range; names it.
    """
    base = _read(name)
    if settings.keys() & _LENGTHS:
        base = {key: value for key, value in base.items() if key not in _LENGTHS}
    for key, value in settings.items():
        base[key] = {**(base.get(key) or {}), **value} if isinstance(value, dict) else value
    return Recipe(**base)


def _parse(text: str) -> Any:
    """A value as YAML has it: number, true or false, null, else text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _read(name: str) -> dict[str, Any]:
    if name in RECIPES:
        text = resources.files("vitprune.training").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(name)
        if not path.is_file():
            close = close_match(name, RECIPES)
            hint = f"did you mean {close}?" if close else f"choose {', '.join(RECIPES)} or a YAML file"
            raise UsageError(f"recipe '{name}' is neither one of ours nor a file", hint)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"recipe '{name}' cannot be read: {error}") from error
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"recipe '{name}' is not YAML: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"recipe '{name}' holds no settings", "write one 'setting: value' per line")
    return {"name": Path(name).stem, **settings}
