"""What surrounds the loops of the training scripts."""

from minillm.training.config import TrainingConfig
from minillm.training.optim import build_optimizers
from minillm.training.run import Run
from minillm.training.schedule import lr_at

__all__ = ["Run", "TrainingConfig", "build_optimizers", "lr_at"]
