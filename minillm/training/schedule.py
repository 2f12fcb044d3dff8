"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state for them."""

import math

import torch


def default_lr(kind: str, dim: int) -> float:
    """A peak learning rate for width `dim`: the best of those tried at 128 (docs/defaults.md), scaled to other widths
    by 1/√width, which is a rule of thumb, not measured.
    """
    return {"muon": 0.09, "adamw": 0.045}[kind] / math.sqrt(dim)


def lr_at(step: int, *, lr: float, steps: int, warmup: int, schedule: str, min_ratio: float, decay: float) -> float:
    """Learning rate of step `step` (0-based) of `steps`.

    Linear warm-up over `warmup` steps, then "cosine" down to min_ratio · lr; "wsd" (constant, then linear
    down over the last `decay` share of all steps; Hu et al. 2024, arXiv:2404.06395); or "constant".
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    if schedule == "wsd":
        begin = max(steps - round(decay * steps), warmup)
        left = (steps - step) / max(1, steps - begin)
        return lr * (min_ratio + (1 - min_ratio) * min(1.0, left))
    done = (step - warmup) / max(1, steps - warmup)
    return lr * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
