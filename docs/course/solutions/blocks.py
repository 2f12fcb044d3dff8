"""Lesson 14, one way to do it."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def softmax_kernel(X, Y, width, BLOCK: tl.constexpr):
    """See the exercise."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(X + row * width + column, mask=inside, other=float("-inf"))  # e^−∞ = 0 adds nothing to the sum
    p = tl.exp(x - tl.max(x))
    tl.store(Y + row * width + column, p / tl.sum(p), mask=inside)


def softmax(x: Tensor) -> Tensor:
    """The softmax of each row of x (N, C) fp32, by the kernel."""
    n_rows, width = x.shape
    y = torch.empty_like(x)
    softmax_kernel[(n_rows,)](x, y, width, BLOCK=triton.next_power_of_2(width))
    return y


EMPTY_BLOCK_FIRST = "nan"  # the maximum so far is −∞ too, and −∞ − (−∞) is no number
EMPTY_BLOCK_LAST = "right"  # the maximum is a number, and e^(−∞ − it) = 0
