"""Recipe, warm start, objective and the loop."""

from vitprune.training.checkpoints import Checkpoints, State
from vitprune.training.log import StepLog
from vitprune.training.loop import train
from vitprune.training.objective import Objective, StepLoss
from vitprune.training.progress import Progress, StepRecord
from vitprune.training.recipe import LossWeights, Phase, Precision, Recipe, load_recipe
from vitprune.training.tracking import Tracking, check_tracker

__all__ = [
    "Checkpoints",
    "LossWeights",
    "Objective",
    "Phase",
    "Precision",
    "Progress",
    "Recipe",
    "State",
    "StepLog",
    "StepLoss",
    "StepRecord",
    "Tracking",
    "check_tracker",
    "load_recipe",
    "train",
]
