"""Lesson 6, one way to do it."""

from torch import Tensor


def lion(w: Tensor, grad: Tensor, m: Tensor, *, lr: float, weight_decay: float) -> tuple[Tensor, Tensor]:
    """See the exercise."""
    change = (0.9 * m + 0.1 * grad).sign()
    return w - lr * (change + weight_decay * w), 0.99 * m + 0.01 * grad


SGD_STEP = "× 1000"
ADAMW_STEP = "stays"  # a mean over the root of a mean square
MUON_STEP = "stays"  # its singular values are brought near 1, whatever they were
FIRST_GRADIENT_LATE = "0.45"  # 0.1 g / √(0.05 g²): the correction for the beginning is over by then
