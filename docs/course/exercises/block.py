"""Lesson 4, to be filled in; then `pytest docs/course/checks/block.py`."""

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean of x² + eps) · weight, over the last dimension. x: (T, C), weight: (C,)."""
    raise NotImplementedError


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """∂L/∂x (T, C) and ∂L/∂weight (C,), from dy = ∂L/∂y (T, C). By formula: without autograd."""
    raise NotImplementedError


# Each of n parts adds a vector to the stream, independent of the others, with numbers of variance 1. How does the
# standard deviation of the stream's numbers grow? "stays", "as √n" or "as n".
GROWTH = ""

# The stream is multiplied by 10 (and eps is 0). What does the norm's output do? "stays", "× 10" or "× √10".
AFTER_NORM = ""
