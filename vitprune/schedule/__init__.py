"""From a keep ratio to a plan: what is asked for, and the stages of a model."""

from vitprune.schedule.counts import keep_in_words, num_kept
from vitprune.schedule.plan import NUM_STAGES, Schedule, Stage, default_stages, make_schedule, schedule_for
from vitprune.schedule.sparsity import (
    PredictorName,
    Pruned,
    ScheduleName,
    Similarity,
    Sparsity,
    known_pruned,
    middle,
    plan_label,
    plan_slug,
)

__all__ = [
    "NUM_STAGES",
    "PredictorName",
    "Pruned",
    "Schedule",
    "ScheduleName",
    "Similarity",
    "Sparsity",
    "Stage",
    "default_stages",
    "keep_in_words",
    "known_pruned",
    "make_schedule",
    "middle",
    "num_kept",
    "plan_label",
    "plan_slug",
    "schedule_for",
]
