"""Recipe, objective, and the loop that distils a dense model into its sparse copy."""

from vitprune.training.checkpoints import Checkpoints, State
from vitprune.training.loop import TrainedStep, train
from vitprune.training.objective import Objective, StepLoss
from vitprune.training.progress import Progress, StepRecord, check_tracker, step_log, tracker_log
from vitprune.training.recipe import LossWeights, Phase, Precision, Recipe, load_recipe

__all__ = [
    "Checkpoints",
    "LossWeights",
    "Objective",
    "Phase",
    "Precision",
    "Progress",
    "Recipe",
    "State",
    "StepLoss",
    "StepRecord",
    "TrainedStep",
    "check_tracker",
    "load_recipe",
    "step_log",
    "tracker_log",
    "train",
]
