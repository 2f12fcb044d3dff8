"""Lesson 10, to be filled in; then `pytest docs/course/checks/lora.py`."""

from torch import Tensor


def joined(a1: Tensor, b1: Tensor, scaling1: float, a2: Tensor, b2: Tensor, scaling2: float) -> tuple[Tensor, Tensor]:
    """One adapter, (A, B) with scaling 1, that changes a matrix as two adapters do together.

    a: (r, in), b: (out, r), their ranks may differ. The change is scaling · B A, (out, in). No matrix of that size is
    made: of a large model it would not fit.
    """
    raise NotImplementedError


# A begins at random, B at zero. Which of them has a gradient other than zero in the first step: "A", "B", "both" or
# "none"? And if both began at zero?
FIRST_GRADIENT = ""
BOTH_ZERO = ""
