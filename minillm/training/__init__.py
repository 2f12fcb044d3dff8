"""What surrounds the loops of the training scripts."""

from minillm.distributed.parallelize import gradients_synced, marked_last, parallelize
from minillm.distributed.ranks import Ranks
from minillm.training.config import TrainingConfig
from minillm.training.optim import build_optimizers
from minillm.training.run import Run, begin, run_training
from minillm.training.schedule import Schedule, lr_at
from minillm.training.step import TrainState

__all__ = [
    "Ranks",
    "Run",
    "Schedule",
    "TrainState",
    "TrainingConfig",
    "begin",
    "build_optimizers",
    "gradients_synced",
    "lr_at",
    "marked_last",
    "parallelize",
    "run_training",
]
