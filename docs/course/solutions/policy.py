"""Lesson 13, one way to do it."""

import torch
from torch import Tensor


def best_policy(log_ref: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, float]:
    """See the exercise."""
    exponents = log_ref + rewards / beta  # e of it is never computed, so it cannot overflow
    log_z = torch.logsumexp(exponents, 0)
    return exponents - log_z, float(beta * log_z)


REWARD_OF_THE_BEST = "falls"  # distance is dearer, so less of it is bought
KL_OF_THE_BEST = "falls"
WITHOUT_BASELINE = "changes"  # by 10 E[∇ log π], which is 0 on average and not for the answers drawn
WITH_GRPO = "stays"  # the group's mean takes the constant out
