"""The training room: slimming inside ``transformers.Trainer``, with a dense teacher."""

from __future__ import annotations

from slimkern.training.callback import SlimCallback
from slimkern.training.callbacks import AverageWeights, KeepBest, StopOnInterrupt
from slimkern.training.distillation import DistillationWeights
from slimkern.training.healing import HealingSettings, freeze_
from slimkern.training.loss import DistillationLoss
from slimkern.training.task import Task
from slimkern.training.tasks import ClassificationTask, EmbeddingTask, RegressionTask
from slimkern.training.teacher import Teacher
from slimkern.training.trainer import DistillTrainer, TrainingSettings, disable_dropout, predict

__all__ = [
    "AverageWeights",
    "ClassificationTask",
    "DistillTrainer",
    "DistillationLoss",
    "DistillationWeights",
    "EmbeddingTask",
    "HealingSettings",
    "KeepBest",
    "RegressionTask",
    "SlimCallback",
    "StopOnInterrupt",
    "Task",
    "Teacher",
    "TrainingSettings",
    "disable_dropout",
    "freeze_",
    "predict",
]
