"""Lesson 11, one way to do it."""

import torch
from torch import Tensor


def best_scale(difference: Tensor) -> float:
    """See the exercise."""

    def slope(scale: float) -> float:
        return float(-(difference * torch.sigmoid(-scale * difference)).mean())

    low, high = 0.0, 1.0
    while slope(high) < 0:
        high *= 2
    for _ in range(60):  # halve the interval that has the zero in it
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


LOSS_OF_SHIFTED = "stays"  # it sees differences alone
ACCURACY_OF_DOUBLED = "stays"  # the order is the same
