"""The learning rate of each step: a pure function of its number, so that a resumed run needs no state for it."""

import math
import typing
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from minillm.base.options import convert, declared
from minillm.training.config import TrainingConfig

OPTIONS = ("lr", "steps", "warmup_steps", "schedule", "min_lr_ratio", "decay_share")  # what a schedule is made of


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
    def of(cls, training_config: TrainingConfig | SimpleNamespace) -> "Schedule":
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

    @property
    def decay_begins(self) -> int:
        """wsd: the number of steps before the rate falls, at least the warm-up; else all steps."""
        if self.shape != "wsd":
            return self.steps
        return max(self.steps - round(self.decay * self.steps), self.warmup)


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
        left = (steps - step) / max(1, steps - schedule.decay_begins)
        return lr * (min_ratio + (1 - min_ratio) * min(1.0, left))
    done = (step - warmup) / max(1, steps - warmup)
    return lr * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def saved_schedule(saved: dict, training_config: TrainingConfig) -> Schedule:
    """The schedule of a checkpoint's options; those that it does not hold are as in `training_config`.

    Raises `UserError` for a value that the option cannot have.
    """
    rules, hints = declared(training_config), typing.get_type_hints(type(training_config))
    values = {name: getattr(training_config, name) for name in OPTIONS}
    for name in OPTIONS:
        if saved.get(name) is not None:
            values[name] = convert(name, rules[name], hints[name], saved[name])
    return Schedule.of(SimpleNamespace(**values))


def rate_change(before: Schedule, after: Schedule, step: int, may_be_constant: bool) -> str:
    """A line on the learning rate after `step` steps if it will not go on as it was planned; else "".

    before, after: the schedule of the steps taken, and that of the steps to come. may_be_constant: whether the run
    could have --schedule constant; then the line says how the last rate would be kept, where it rises.
    """
    upcoming = sorted({step, max(step, after.warmup - 1), after.steps - 1})  # from 0: the next, the peak, the last
    if all(lr_at(s, before) == lr_at(s, after) for s in upcoming):
        return ""
    last, following = lr_at(step - 1, before), lr_at(step, after)
    listed = ", then ".join(f"{lr_at(s, after):.2e} in step {s + 1:,}" for s in upcoming)
    line = f"learning rate: {last:.2e} in step {step:,}, now {listed}"
    if may_be_constant and following > 1.05 * last > 0 and step >= after.warmup:
        line += f": {following / last:.1f} times the last, which --schedule constant --lr {last:.3g} would keep"
    return line


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
