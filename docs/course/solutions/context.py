"""Lesson 8, one way to do it."""

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, positions: Tensor, base: float, stretch: float) -> Tensor:
    """A pair is a complex number, and turning it is a product with e^(i angle)."""
    size = x.shape[-1]
    frequency = base ** -(torch.arange(0, size, 2, dtype=x.dtype) / size)  # radians a token, (D/2,)
    angle = positions[:, None, None] / stretch * frequency  # (T, 1, D/2): one for all heads
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # (T, H, D/2)
    return torch.view_as_real(pairs * turn).flatten(-2)


SHIFTED = "stays"  # only the difference of two positions is left
SLOWEST = "more"  # 2π base^(1 − 2/D) tokens
FASTEST = "as many"  # base to the power of 0
