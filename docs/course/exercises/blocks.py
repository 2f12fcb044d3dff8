"""Lesson 14, to be filled in; then `pytest docs/course/checks/blocks.py`."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def softmax_kernel(X, Y, width, BLOCK: tl.constexpr):
    """y = e^(x − max x) / Σ e^(x − max x), for one row of X (N, C): program n takes row n.

    BLOCK is a power of 2 and may be more than the width. What do the columns beyond it have to hold?
    """
    pass


def softmax(x: Tensor) -> Tensor:
    """The softmax of each row of x (N, C) fp32, by the kernel."""
    n_rows, width = x.shape
    y = torch.full_like(x, float("nan"))  # what is not written shows
    softmax_kernel[(n_rows,)](x, y, width, BLOCK=triton.next_power_of_2(width))
    return y


# Under a sliding window a query sees nothing of some blocks of keys: all their scores are −∞. What does `attention` of
# the experiment return for such a query, if the block is the first one, and if it is the last? "right" or "nan".
EMPTY_BLOCK_FIRST = ""
EMPTY_BLOCK_LAST = ""
