"""The learning rate of each step: a pure function of its number, so that a resumed run needs no state for it."""

import math
from dataclasses import dataclass

import torch

from minillm.training.config import TrainingConfig


@dataclass(frozen=True)
class Schedule:
    """How the learning rate rises and falls over a run."""

    lr: float  # the peak
    steps: int  # of the whole run
    warmup: int  # steps
    shape: str  # cosine, wsd or constant
    min_ratio: float  # the last rate as a share of the peak
    decay: float  # wsd: the share of all steps in which it falls

    @classmethod
    def of(cls, training_config: TrainingConfig) -> "Schedule":
        """What the options of a run say; warm-up that is not given takes 20 steps, but at most a tenth of all."""
        steps, warmup = training_config.steps, training_config.warmup_steps
        return cls(
            lr=training_config.lr,
            steps=steps,
            warmup=min(20, steps // 10) if warmup is None else warmup,
            shape=training_config.schedule,
            min_ratio=training_config.min_lr_ratio,
            decay=training_config.decay_share,
        )


def lr_at(step: int, schedule: Schedule) -> float:
    """Learning rate of step `step`, counted from 0.

    Linear warm-up, then "cosine" down to min_ratio · lr (Loshchilov & Hutter 2017, arXiv:1608.03983); "wsd", which is
    constant and then linear down (Hu et al. 2024, arXiv:2404.06395); or "constant".
    """
    lr, steps, warmup, min_ratio = schedule.lr, schedule.steps, schedule.warmup, schedule.min_ratio
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule.shape == "constant":
        return lr
    if schedule.shape == "wsd":
        decay_begins = max(steps - round(schedule.decay * steps), warmup)
        left = (steps - step) / max(1, steps - decay_begins)
        return lr * (min_ratio + (1 - min_ratio) * min(1.0, left))
    done = (step - warmup) / max(1, steps - warmup)
    return lr * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
